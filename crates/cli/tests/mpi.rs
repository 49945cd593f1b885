//! Several processes under `mpirun`. With `--features mpi`, where Open MPI is installed.
#![cfg(feature = "mpi")]

mod common;

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use common::{SMALL, newest_state, ok, pictures, stderr, text};

/// `mpirun -n N byol ARGS`, none where there is no mpirun.
fn mpirun(n: usize, args: &[&str]) -> Option<Command> {
    if Command::new("mpirun").arg("--version").output().is_err() {
        println!("NOT TESTED: there is no mpirun; Debian has it in openmpi-bin");
        return None;
    }
    let mut command = Command::new("mpirun");
    // Tests may run as root, and on fewer cores than ranks.
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] {
        command.env(name, "1");
    }
    command.args(["--oversubscribe", "-n", &n.to_string(), env!("CARGO_BIN_EXE_byol")]).args(args);
    Some(command)
}

fn output(n: usize, args: &[&str]) -> Option<Output> {
    Some(mpirun(n, args)?.output().expect("mpirun runs"))
}

/// The flags of a small run whose steps are small enough that rounding does not grow: at ten times this rate a channel that is all but
/// constant makes hundredths of it within six.
fn flags<'a>(data: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let own = ["--precision", "f32", "--optimizer", "sgd", "--lr", "0.002", "--set", "checkpoint.every_steps=2"];
    let buffer = ["--set", "train.shuffle=8"];
    [&["pretrain", data, "--out", out][..], &SMALL, &own, &buffer, more].concat()
}

fn losses(run: &Path) -> Vec<f64> {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter(|line| line["kind"] == "step").map(|line| line["loss"].as_f64().unwrap()).collect()
}

#[test]
fn processes_walk_as_one_does_and_another_number_goes_on() {
    let folder = tempfile::tempdir().unwrap();
    let (data, shards) = (folder.path().join("data"), folder.path().join("shards"));
    pictures(&data, 40);
    let run = |name: &str| folder.path().join(name);
    ok(&flags(text(&data), text(&run("one")), &[]));
    let one = losses(&run("one"));
    for (n, name) in [(2, "two"), (4, "four")] {
        let Some(done) = output(n, &flags(text(&data), text(&run(name)), &[])) else { return };
        assert!(done.status.success(), "{}", stderr(&done));
        let said = stderr(&done);
        assert_eq!(said.matches("plan:").count(), 1, "the first rank alone talks: {said}");
        assert!(said.contains(&format!("{n} ranks: ")), "{said}");
        let of_ranks = losses(&run(name));
        assert_eq!(of_ranks.len(), one.len());
        for (a, b) in one.iter().zip(&of_ranks).take(6) {
            assert!((a - b).abs() < 1e-3 * a, "{n} ranks: {of_ranks:?}, one {one:?}");
        }
    }
    // Killed in the middle, with two ranks that read shards in sequence through a buffer; on with two gives the bits of the run that was
    // not, on with one all its steps.
    ok(&["pack", text(&data), "--out", text(&shards)]);
    let whole = output(2, &flags(text(&shards), text(&run("whole")), &[])).unwrap();
    assert!(whole.status.success(), "{}", stderr(&whole));
    let killed = run("killed");
    let mut job = mpirun(2, &flags(text(&shards), text(&killed), &[])).unwrap().stderr(Stdio::null()).spawn().unwrap();
    let began = Instant::now();
    while !killed.join("checkpoints/step-0000000004").exists() && began.elapsed() < Duration::from_secs(60) {
        thread::sleep(Duration::from_millis(2));
    }
    job.kill().unwrap();
    job.wait().unwrap();
    // Ranks that have lost their mpirun end by themselves, but not at once.
    thread::sleep(Duration::from_secs(3));
    let alone = run("alone");
    copy(&killed, &alone);
    let resumed = output(2, &["resume", text(&killed)]).unwrap();
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert!(newest_state(&killed) == newest_state(&run("whole")), "the bits of a run that was never stopped");
    ok(&["resume", text(&alone)]);
    assert_eq!(losses(&alone).len(), one.len());
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if from.is_dir() { copy(&from, &to) } else { fs::copy(&from, &to).map(|_| ()).unwrap() }
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_dead_rank_ends_the_job_and_the_last_checkpoint_stands() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 40);
    let args = flags(text(&data), text(&out), &["--epochs", "100000"]);
    let Some(mut command) = mpirun(2, &args) else { return };
    let job = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    while !out.join("checkpoints/step-0000000006").exists() {
        thread::sleep(Duration::from_millis(10));
    }
    // The second of mpirun's children.
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", job.id())).unwrap();
    let second = children.split_whitespace().last().expect("mpirun has children").to_owned();
    assert!(Command::new("kill").args(["-9", &second]).status().unwrap().success());
    let began = Instant::now();
    let ended = job.wait_with_output().unwrap();
    assert!(began.elapsed() < Duration::from_secs(60), "it hangs");
    assert!(!ended.status.success());
    let said = stderr(&ended);
    assert!(said.contains("byol resume") || said.contains("Killed"), "{said}");
    // What it left can be gone on with.
    let plan = fs::read_to_string(out.join("plan.toml")).unwrap();
    assert!(plan.contains("epochs = 100000"));
    let mut resumed = common::byol(&["resume", text(&out)]).stderr(Stdio::null()).spawn().unwrap();
    let steps = losses(&out).len();
    let began = Instant::now();
    while losses(&out).len() <= steps && began.elapsed() < Duration::from_secs(60) {
        thread::sleep(Duration::from_millis(20));
    }
    assert!(losses(&out).len() > steps);
    resumed.kill().unwrap();
    resumed.wait().unwrap();
}

#[test]
fn what_does_not_go_together_is_said_in_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let (data, other, out) = (folder.path().join("data"), folder.path().join("other"), folder.path().join("run"));
    pictures(&data, 40);
    pictures(&other, 42);
    let error = |output: Output| {
        assert!(!output.status.success());
        let said = stderr(&output);
        assert_eq!(said.matches("error:").count(), 1, "{said}");
        said.lines().find(|line| line.starts_with("error:")).unwrap().to_owned()
    };
    let Some(uneven) = output(3, &flags(text(&data), text(&out), &[])) else { return };
    let uneven = error(uneven);
    assert!(uneven.contains("no multiple of 3"), "{uneven}");
    let mut apart = mpirun(1, &flags(text(&data), text(&out), &[])).unwrap();
    apart.args([":", "-n", "1", env!("CARGO_BIN_EXE_byol")]).args(flags(text(&other), text(&out), &[]));
    assert!(error(apart.output().unwrap()).contains("rank 1 has other images"));
    let copy = folder.path().join("byol");
    let mut bytes = fs::read(env!("CARGO_BIN_EXE_byol")).unwrap();
    bytes.push(0);
    fs::write(&copy, bytes).unwrap();
    #[cfg(unix)]
    fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut apart = mpirun(1, &flags(text(&data), text(&out), &[])).unwrap();
    apart.args([":", "-n", "1", text(&copy)]).args(flags(text(&data), text(&out), &[]));
    assert!(error(apart.output().unwrap()).contains("rank 1 has another program"));
    assert!(!out.exists());
    let twice = output(2, &["devices"]).expect("there is an mpirun");
    assert!(!twice.status.success() && stderr(&twice).contains("start it without mpirun"));
}
