//! Data-parallel processes under `mpirun`. Needs `--features mpi` and Open MPI.

use std::{
    fs,
    path::Path,
    process::{Command, Output, Stdio},
    thread,
    time::{Duration, Instant},
};

use crate::common::{SMALL, newest_state, ok, pictures, skip, stderr, text};

/// `mpirun -n N byol ARGS`; `None`, after reporting a skip, if there is no `mpirun`.
fn mpirun(n: usize, args: &[&str]) -> Option<Command> {
    if Command::new("mpirun").arg("--version").output().is_err() {
        skip("mpirun is not installed (Debian: openmpi-bin)");
        return None;
    }
    let mut command = Command::new("mpirun");
    // Tests may run as root, and with more ranks than cores.
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] {
        command.env(name, "1");
    }
    command.args(["--oversubscribe", "-n", &n.to_string(), env!("CARGO_BIN_EXE_byol")]).args(args);
    Some(command)
}

fn output(n: usize, args: &[&str]) -> Option<Output> {
    Some(mpirun(n, args)?.output().expect("mpirun runs"))
}

/// Flags of a small run with a learning rate so low that rounding errors do not grow: at ten times
/// this rate, a nearly constant channel amplifies them to 0.01 within six steps.
fn flags<'a>(data: &'a str, out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
    let own = ["--optimizer", "sgd", "--lr", "0.002", "--set", "checkpoint.every_steps=2"];
    let buffer = ["--set", "train.shuffle=8"];
    [&["pretrain", data, "--out", out][..], &SMALL, &own, &buffer, more].concat()
}

fn losses(run: &Path) -> Vec<f64> {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    lines.filter(|line| line["kind"] == "step").map(|line| line["loss"].as_f64().unwrap()).collect()
}

#[test]
fn data_parallel_matches_single_process_and_resumes_on_any_number_of_ranks() {
    let folder = tempfile::tempdir().unwrap();
    let (data, shards) = (folder.path().join("data"), folder.path().join("shards"));
    pictures(&data, 40);
    let run = |name: &str| folder.path().join(name);
    ok(&flags(text(&data), text(&run("one")), &[]));
    let one = losses(&run("one"));
    for (n, name) in [(2, "two"), (4, "four")] {
        let Some(done) = output(n, &flags(text(&data), text(&run(name)), &[])) else { return };
        assert!(done.status.success(), "{}", stderr(&done));
        let text = stderr(&done);
        assert_eq!(text.matches("plan:").count(), 1, "only rank 0 prints: {text}");
        assert!(text.contains(&format!("{n} ranks: communication per rank ")), "{text}");
        let parallel = losses(&run(name));
        assert_eq!(parallel.len(), one.len());
        for (a, b) in one.iter().zip(&parallel).take(6) {
            assert!((a - b).abs() < 1e-3 * a, "{n} ranks: {parallel:?}, one {one:?}");
        }
    }
    // Two ranks that read shards in sequence through a shuffle buffer are killed. Resumed on two
    // ranks, the run is bit-identical to an uninterrupted one; on one rank, it completes all steps.
    ok(&["pack", text(&data), "--out", text(&shards)]);
    let whole = output(2, &flags(text(&shards), text(&run("whole")), &[])).unwrap();
    assert!(whole.status.success(), "{}", stderr(&whole));
    let killed = run("killed");
    let mut job = mpirun(2, &flags(text(&shards), text(&killed), &[])).unwrap().stderr(Stdio::null()).spawn().unwrap();
    let start = Instant::now();
    while !killed.join("checkpoints/step-0000000004").exists() && start.elapsed() < Duration::from_secs(60) {
        thread::sleep(Duration::from_millis(2));
    }
    job.kill().unwrap();
    job.wait().unwrap();
    // Ranks that lose their mpirun exit by themselves, after a moment.
    thread::sleep(Duration::from_secs(3));
    let single = run("single");
    copy(&killed, &single);
    let resumed = output(2, &["resume", text(&killed)]).unwrap();
    assert!(resumed.status.success(), "{}", stderr(&resumed));
    assert!(newest_state(&killed) == newest_state(&run("whole")), "bit-identical to an uninterrupted run");
    ok(&["resume", text(&single)]);
    assert_eq!(losses(&single).len(), one.len());
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
fn dead_rank_ends_the_job_and_leaves_a_valid_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 40);
    let args = flags(text(&data), text(&out), &["--epochs", "100000"]);
    let Some(mut command) = mpirun(2, &args) else { return };
    let job = command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
    while !out.join("checkpoints/step-0000000006").exists() {
        thread::sleep(Duration::from_millis(10));
    }
    // The second child of mpirun.
    let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", job.id())).unwrap();
    let second = children.split_whitespace().last().expect("mpirun has children").to_owned();
    assert!(Command::new("kill").args(["-9", &second]).status().unwrap().success());
    let start = Instant::now();
    let ended = job.wait_with_output().unwrap();
    assert!(start.elapsed() < Duration::from_secs(60), "the job hangs");
    assert!(!ended.status.success());
    let message = stderr(&ended);
    assert!(message.contains("byol resume") || message.contains("Killed"), "{message}");
    // The run can be resumed.
    let plan = fs::read_to_string(out.join("plan.toml")).unwrap();
    assert!(plan.contains("epochs = 100000"));
    let mut resumed = crate::common::byol(&["resume", text(&out)]).stderr(Stdio::null()).spawn().unwrap();
    let steps = losses(&out).len();
    let start = Instant::now();
    while losses(&out).len() <= steps && start.elapsed() < Duration::from_secs(60) {
        thread::sleep(Duration::from_millis(20));
    }
    assert!(losses(&out).len() > steps);
    resumed.kill().unwrap();
    resumed.wait().unwrap();
}

#[test]
fn mismatched_ranks_give_one_error() {
    let folder = tempfile::tempdir().unwrap();
    let (data, other, out) = (folder.path().join("data"), folder.path().join("other"), folder.path().join("run"));
    pictures(&data, 40);
    pictures(&other, 42);
    let error = |output: Output| {
        assert!(!output.status.success());
        let text = stderr(&output);
        assert_eq!(text.matches("error:").count(), 1, "{text}");
        text.lines().find(|line| line.starts_with("error:")).unwrap().to_owned()
    };
    let Some(uneven) = output(3, &flags(text(&data), text(&out), &[])) else { return };
    let uneven = error(uneven);
    assert!(uneven.contains("batch size 8 is not divisible by 3"), "{uneven}");
    let mut job = mpirun(1, &flags(text(&data), text(&out), &[])).unwrap();
    job.args([":", "-n", "1", env!("CARGO_BIN_EXE_byol")]).args(flags(text(&other), text(&out), &[]));
    assert!(error(job.output().unwrap()).contains("rank 1 has different images"));
    let copy = folder.path().join("byol");
    let mut bytes = fs::read(env!("CARGO_BIN_EXE_byol")).unwrap();
    bytes.push(0);
    fs::write(&copy, bytes).unwrap();
    #[cfg(unix)]
    fs::set_permissions(&copy, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let mut job = mpirun(1, &flags(text(&data), text(&out), &[])).unwrap();
    job.args([":", "-n", "1", text(&copy)]).args(flags(text(&data), text(&out), &[]));
    assert!(error(job.output().unwrap()).contains("rank 1 has a different program"));
    assert!(!out.exists());
    let twice = output(2, &["devices"]).expect("there is an mpirun");
    assert!(!twice.status.success() && stderr(&twice).contains("without `mpirun`"));
}
