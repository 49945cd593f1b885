//! Complete runs of the real binary: results, reproducibility, resume, crashes.

use std::{collections::BTreeMap, fs, path::Path, thread, time::Duration};

use crate::common::{
    Server, byol, bytes, embed, json, masked, newest_state, ok, pictures, pretrain, refused, stderr, text,
};
use crate::tutorial::assert_output_is_documented;

/// Lines of `metrics.jsonl`.
fn metrics(run: &Path) -> Vec<serde_json::Value> {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn every_evaluation_works_and_leaves_the_encoder_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 60);
    let result = json(&ok(&pretrain(&data, &out, &["--json", "--tensorboard"])));
    assert_eq!(result["finished"], true);
    assert_eq!(result["steps"], result["total_steps"]);
    for name in ["plan.toml", "metrics.jsonl", "encoder.safetensors", "best.safetensors", "checkpoints", "tensorboard"]
    {
        assert!(out.join(name).exists(), "{name}");
    }
    let lines = metrics(&out);
    let count = |kind: &str| lines.iter().filter(|l| l["kind"] == kind).count();
    // 54 images (6 of 60 are held out), batch 8, 3 epochs: ⌊162 / 8⌋ steps; epochs 0 to 3.
    assert_eq!((count("step"), count("epoch")), (20, 4));
    assert!(
        lines.iter().filter(|l| l["kind"] == "epoch").all(|l| l["rankme"].as_f64().is_some() && l["knn"].is_number())
    );
    // Health is not judged before step 200: only the first checkpoint counts as healthy.
    assert_eq!(fs::read_dir(out.join("checkpoints")).unwrap().count(), 4, "the last three checkpoints and the first");

    let before = bytes(&out);
    // Multi-label images, scored by mean average precision.
    let multi_label = folder.path().join("multi-label");
    pictures(&multi_label, 30);
    let line = |i: usize| {
        let parity = if i.is_multiple_of(2) { "even" } else { "odd" };
        let more = if i.is_multiple_of(3) { format!("{parity}/{i:03}.png,three\n") } else { String::new() };
        format!("{parity}/{i:03}.png,{parity}\n{more}")
    };
    fs::write(multi_label.join("labels.csv"), "path,label\n".to_owned() + &(0..30).map(line).collect::<String>())
        .unwrap();
    let common = ["--json", "--device", "cpu"];
    for (evaluation, flags, rows) in [
        ("knn", &["--k", "1,3", "--with-random"][..], 4),
        ("linear", &["--epochs", "2", "--batch", "16", "--with-random"], 2),
        ("linear", &["--fast"], 1),
        ("finetune", &["--labels", "50%", "--epochs", "1", "--rates", "0.05,0.1", "--frozen", "--from-scratch"], 3),
        ("label-free", &["--limit", "20", "--baseline", text(&out)], 29),
        // The earlier name of the command.
        ("report", &["--limit", "20"], 21),
        ("transfer", &[text(&multi_label), "--finetune", "--epochs", "1"], 4),
    ] {
        let table = json(&ok(&[&["eval", evaluation, text(&out), text(&data)], &common[..], flags].concat()));
        let results = table["rows"].as_array().unwrap();
        assert_eq!(results.len(), rows, "{evaluation} {flags:?}: {table}");
        for row in results {
            let (value, interval) = (row["value"].as_f64().unwrap(), &row["interval"]);
            if let Some([low, high]) = interval.as_array().map(|i| [0, 1].map(|k| i[k].as_f64().unwrap())) {
                assert!(low <= value && value <= high && (row["share"] == false || (0.0..=1.0).contains(&value)));
            }
        }
        let name = table["evaluation"].as_str().unwrap();
        let suffix = if evaluation == "report" { "-2" } else { "" };
        let saved: serde_json::Value =
            serde_json::from_slice(&fs::read(out.join(format!("eval/{name}{suffix}.json"))).unwrap()).unwrap();
        assert_eq!(saved, table, "saved in the run");
        assert_eq!(before, bytes(&out), "evaluation never changes an encoder");
    }
    // Repeating an evaluation replaces its results, also if the paths are spelled differently.
    let saved = || fs::read_dir(out.join("eval")).unwrap().count();
    let (before, file) = (saved(), out.join("encoder.safetensors"));
    ok(&[&["eval", "linear", text(&file), text(&data.join("../data")), "--fast"], &common[1..]].concat());
    assert_eq!(saved(), before);
    refused(
        &["eval", "linear", text(&out), text(&multi_label), "--device", "cpu"],
        &["several classes each", "eval transfer"],
    );
    refused(
        &[
            "eval",
            "finetune",
            text(&out),
            text(&data),
            "--labels",
            "100%",
            "--device",
            "cpu",
            "--epochs",
            "3",
            "--rates",
            "1e42",
        ],
        &["classifier has diverged", "--rates"],
    );
}

#[test]
fn validation_split_is_trained_on_if_there_is_a_test_split() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    for (split, n) in [("train", 20), ("val", 8), ("test", 6)] {
        pictures(&data.join(split), n);
    }
    ok(&pretrain(&data, &out, &["--epochs", "2"]));
    let table = json(&ok(&["eval", "knn", text(&out), text(&data), "--json", "--device", "cpu"]));
    let counts = ["train_images", "test_images"].map(|key| table["settings"][key].as_u64().unwrap());
    assert_eq!(counts, [28, 6]);
}

#[test]
fn one_and_two_threads_are_bit_identical() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    pictures(&data, 40);
    let run = |threads: &str| {
        let out = folder.path().join(threads);
        ok(&pretrain(&data, &out, &["--threads", threads]));
        (bytes(&out), newest_state(&out))
    };
    assert!(run("1") == run("2"));
}

#[test]
fn accumulation_normalizes_by_micro_batch_and_learns() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    pictures(&data, 40);
    let losses = |name: &str, flags: &[&str], plan: &str| -> Vec<f64> {
        let out = folder.path().join(name);
        let output = ok(&pretrain(&data, &out, &[&["--epochs", "12"], flags].concat()));
        assert!(stderr(&output).contains(plan), "{}", stderr(&output));
        let steps = metrics(&out).into_iter().filter(|line| line["kind"] == "step");
        steps.map(|line| line["loss"].as_f64().unwrap()).collect()
    };
    let whole = losses("whole", &[], "batch 8;");
    let split = losses("split", &["--accumulate", "2"], "batch 8 in 2 micro-batches of 4;");
    // 36 images, batch 8, 12 epochs: the step count is that of whole batches.
    assert_eq!((whole.len(), split.len()), (54, 54));
    // Same weights, images and views in the first step. Only the batch statistics differ, since
    // each micro-batch is normalized by itself.
    assert!((whole[0] - split[0]).abs() > 1e-3, "{} and {}", whole[0], split[0]);
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&split[..9]), mean(&split[45..]));
    assert!(last < 0.7 * first, "mean loss from {first} to {last}: {split:?}");
}

#[test]
fn resume_after_kill_is_bit_identical() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    pictures(&data, 60);
    let often = ["--set", "checkpoint.every_steps=3"];
    let whole = folder.path().join("whole");
    ok(&pretrain(&data, &whole, &often));

    // Three kills, each a little later than the one before.
    let broken = folder.path().join("broken");
    let mut child = byol(&pretrain(&data, &broken, &often)).stderr(std::process::Stdio::null()).spawn().unwrap();
    for extra in [30, 80, 150] {
        // There must be a checkpoint to resume from.
        for _ in 0..60_000 {
            let checkpoints = fs::read_dir(broken.join("checkpoints")).map_or(0, |d| d.flatten().count());
            if checkpoints > 0 || child.try_wait().unwrap().is_some() {
                break;
            }
            thread::sleep(Duration::from_millis(5));
        }
        thread::sleep(Duration::from_millis(extra));
        let _ = child.kill();
        child.wait().unwrap();
        child = byol(&["resume", text(&broken)]).stderr(std::process::Stdio::null()).spawn().unwrap();
    }
    assert!(child.wait().unwrap().success());
    assert!(bytes(&whole) == bytes(&broken), "the encoder");
    assert!(newest_state(&whole) == newest_state(&broken), "the complete state");
    let steps = |run: &Path| {
        metrics(run)
            .into_iter()
            .map(|l| (l["kind"].to_string(), l["step"].to_string(), l["loss"].to_string(), l["rankme"].to_string()))
            .collect::<Vec<_>>()
    };
    assert_eq!(steps(&whole), steps(&broken), "every step and epoch is logged once");
}

#[test]
fn finished_run_can_be_extended() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 60);
    ok(&pretrain(&data, &out, &[]));
    let (short, text_of_plan) = (bytes(&out), || fs::read_to_string(out.join("plan.toml")).unwrap());
    let plan = text_of_plan();

    let complete = ok(&["resume", text(&out)]);
    assert!(stderr(&complete).contains("`--epochs` extends it"), "{}", stderr(&complete));
    refused(
        &["resume", text(&out), "--epochs", "2"],
        &["`--epochs 2` is too low", "completed epochs: 3", "higher `--epochs`"],
    );
    refused(&["resume", text(&out), "--epochs", "2000000"], &["train.epochs"]);
    // Nothing is extended unless the run can continue.
    refused(&["resume", text(&out), "--epochs", "5", "--data", "nowhere"], &["nowhere"]);
    assert_eq!(text_of_plan(), plan);

    let longer = ok(&["resume", text(&out), "--epochs", "5", "--verbose"]);
    for words in ["new schedule: 5 epochs instead of 3; learning rate", "detail: checkpoint", "peak memory"] {
        assert!(stderr(&longer).contains(words), "{words}: {}", stderr(&longer));
    }
    assert!(bytes(&out) != short);
    let epochs: Vec<u64> =
        metrics(&out).iter().filter(|l| l["kind"] == "epoch").map(|l| l["epoch"].as_u64().unwrap()).collect();
    assert_eq!(epochs, [0, 1, 2, 3, 4, 5]);
    assert_eq!(toml(&text_of_plan())["recipe"]["train"]["epochs"], 5);
    assert!(text_of_plan().contains("[[extended]]\nstep = "), "{}", text_of_plan());
    // The extended run resumes and serves as a recipe like any other.
    ok(&["pretrain", text(&data), "--recipe", text(&out), "--dry-run", "--device", "cpu"]);
    ok(&["resume", text(&out)]);
    let state = json(&ok(&["runs", text(folder.path()), "--json"]));
    assert_eq!(
        (&state["runs"][0]["state"], &state["runs"][0]["epochs"]),
        (&"finished".into(), &serde_json::json!([5, 5]))
    );
}

#[cfg(unix)]
#[test]
fn ctrl_c_saves_a_checkpoint_and_exits_with_130() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 60);
    let child =
        byol(&pretrain(&data, &out, &["--epochs", "300"])).stderr(std::process::Stdio::piped()).spawn().unwrap();
    for _ in 0..12_000 {
        if out.join("encoder.safetensors").exists() {
            break;
        }
        thread::sleep(Duration::from_millis(5));
    }
    std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130), "{}", stderr(&output));
    assert!(stderr(&output).contains("resume with: `byol resume"));
}

#[test]
fn rejects_damaged_checkpoints_and_names_the_intact_one_before() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 40);
    ok(&pretrain(&data, &out, &[]));
    let mut all: Vec<_> = fs::read_dir(out.join("checkpoints")).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    let newest = all.pop().unwrap();
    let good = all.pop().unwrap();
    let state = newest.join("state.safetensors");
    let intact = fs::read(&state).unwrap();
    let mut flipped = intact.clone();
    flipped[intact.len() / 2] ^= 1;
    for (bytes, word) in [(&flipped[..], "checksum"), (&intact[..100], "checksum"), (&[][..], "checksum")] {
        fs::write(&state, bytes).unwrap();
        refused(&["resume", text(&out)], &["damaged", word, text(&good)]);
    }
    fs::remove_file(&state).unwrap();
    refused(&["resume", text(&out)], &["cannot read the checkpoint", text(&good)]);
    fs::write(&state, &intact).unwrap();
    let json_file = newest.join("state.json");
    let changed = fs::read_to_string(&json_file).unwrap().replace("\"version\": 1", "\"version\": 99");
    fs::write(&json_file, changed).unwrap();
    refused(&["resume", text(&out)], &["version 99", text(&good)]);
    fs::remove_dir_all(&newest).unwrap();
    ok(&["resume", text(&out)]);
    fs::remove_dir_all(out.join("checkpoints")).unwrap();
    refused(&["resume", text(&out)], &["no checkpoint"]);
    refused(&["resume", text(folder.path())], &["plan.toml"]);
}

#[test]
fn resume_rejects_changed_data() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 40);
    ok(&pretrain(&data, &out, &[]));
    fs::remove_file(data.join("even/000.png")).unwrap();
    refused(&["resume", text(&out)], &["have changed since the run started"]);
}

#[test]
fn moved_data_are_found_by_a_flag() {
    let folder = tempfile::tempdir().unwrap();
    let (data, moved, out) = (folder.path().join("data"), folder.path().join("moved"), folder.path().join("run"));
    pictures(&data, 40);
    ok(&pretrain(&data, &out, &[]));
    let (trained, checkpoints) = (bytes(&out), out.join("checkpoints"));
    let mut saved: Vec<_> = fs::read_dir(&checkpoints).unwrap().map(|entry| entry.unwrap().path()).collect();
    saved.sort();
    fs::remove_dir_all(saved.last().unwrap()).unwrap();
    fs::rename(&data, &moved).unwrap();
    let (report, run) = (folder.path().join("report.html"), text(&out));
    let report_args = ["report", run, "-o", text(&report), "--device", "cpu"];
    for args in [&["resume", run][..], &report_args, &["explore", run, "--port", "0", "--device", "cpu"]] {
        refused(args, &[text(&data), "do not exist", "`--data`"]);
    }
    ok(&["resume", run, "--data", text(&moved)]);
    assert_eq!(bytes(&out), trained);
    ok(&[&report_args[..], &["--data", text(&moved)]].concat());
    let e = folder.path().join("e.npy");
    ok(&embed(&out, &moved, &e, &[]));
    for input in [run, text(&e)] {
        let args = ["explore", input, "--data", text(&moved), "--port", "0", "--device", "cpu", "--map", "pca"];
        assert_eq!(Server::start(&args).get("/thumb/0").0, 200, "{input}");
    }
    // Embeddings of the place where the images were before.
    let again = folder.path().join("again");
    fs::rename(&moved, &again).unwrap();
    // Rows of an interrupted computation for another place are discarded.
    let mut cache = fs::read_dir(out.join("explore")).unwrap().map(|entry| entry.unwrap().path());
    let table = cache.find(|path| path.extension().is_some_and(|extension| extension == "parquet")).unwrap();
    fs::write(table.with_extension("parquet.partial-rows"), "{}\n").unwrap();
    for input in [run, text(&e)] {
        let args = ["explore", input, "--data", text(&again), "--port", "0", "--device", "cpu", "--map", "pca"];
        assert_eq!(Server::start(&args).get("/thumb/0").0, 200, "{input}");
    }
    // Other images do not pass as the moved ones.
    fs::remove_file(again.join("even/000.png")).unwrap();
    refused(&["resume", run, "--data", text(&again)], &["have changed since the run started", text(&again)]);
}

#[test]
fn divergence_stops_the_run_and_names_step_and_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 40);
    let args = pretrain(&data, &out, &["--optimizer", "sgd", "--lr", "1e39", "--set", "health.images=0"]);
    refused(&args, &["the loss is", "at step", "last good checkpoint", "checkpoints/step-"]);
    assert!(fs::read_dir(out.join("checkpoints")).unwrap().count() >= 1);
}

#[test]
fn demo_gains_ten_points_and_draws_neighbors() {
    let folder = tempfile::tempdir().unwrap();
    // Shorter than by default. Whether even shorter runs collapse depends on rounding.
    let output = byol(&["demo", "--epochs", "16"]).current_dir(folder.path()).output().unwrap();
    let out = folder.path().join("byol-runs/demo");
    let printed = format!("{}{}", stderr(&output), String::from_utf8_lossy(&output.stdout));
    let percent = |label: &str| -> f64 {
        let line = printed.lines().find_map(|line| line.trim().strip_prefix(label)).expect(label);
        line.trim().trim_end_matches(" %").parse().unwrap()
    };
    let (before, after) = (percent("random initialization"), percent("after pretraining"));
    assert!((0.0..=100.0).contains(&after) && after >= before + 10.0, "kNN from {before} % to {after} %");
    assert_output_is_documented("demo", &printed);
    let picture = image::open(out.join("neighbors.png")).unwrap();
    assert!(picture.width() > picture.height(), "six rows of a query, five neighbors before and five after");
}

#[test]
fn benchmarks_report_positive_speeds() {
    let step =
        ["bench", "--width", "0.125", "--batch", "4", "--hidden", "16", "--steps", "1", "--device", "cpu", "--json"];
    let result = json(&ok(&step));
    for key in ["images_per_second", "gflop_per_second", "peak_gflop_per_second", "share_of_peak"] {
        assert!(result[key].as_f64().unwrap() > 0.0, "{key}: {result}");
    }
    let bands = json(&ok(&[&step[..], &["--channels", "13"]].concat()));
    assert_eq!(bands["channels"], 13);
    let large = ["bench", "--width", "0.25", "--batch", "32", "--hidden", "512", "--steps", "2", "--threads", "1"];
    let large = json(&ok(&[&large[..], &["--device", "cpu", "--json"]].concat()));
    assert_eq!(large["fresh_blocks"], 0, "a step reuses the memory of the previous one");
    let forward = json(&ok(&[&step[..], &["--forward-only"]].concat()));
    assert!(forward["split_ms"].is_null() && forward["images_per_second"].as_f64().unwrap() > 0.0);

    let folder = tempfile::tempdir().unwrap();
    pictures(folder.path(), 6);
    let views = json(&ok(&["bench", "views", text(folder.path()), "--size", "32", "--json"]));
    assert_eq!((views["images"].as_u64(), views["bad"].as_u64()), (Some(6), Some(0)));

    let kernels = json(&ok(&["bench", "kernels", "--width", "0.125", "--batch", "1", "--json"]));
    assert!(kernels["shapes"].as_array().unwrap().len() > 5);
}

#[test]
fn plan_estimates_time_and_reports_what_does_not_fit() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    pictures(&data, 20);
    let plan = ["plan", text(&data), "--encoders", "resnet18x0.0625", "--device", "cpu"];
    let with = |more: &[&'static str]| [&plan[..], more].concat();
    let table = json(&ok(&with(&["--budget", "10m", "--batches", "4,4000000000", "--ranks", "1,2,3", "--json"])));
    assert_eq!((&table["images"], &table["budget_seconds"]), (&20.into(), &600.0.into()));
    let (fits, shared, uneven, not) = (&table["rows"][0], &table["rows"][1], &table["rows"][2], &table["rows"][3]);
    let number = |of: &serde_json::Value| of.as_f64().unwrap();
    assert_eq!(fits["fits"], true);
    assert!(number(&fits["memory_mb"]) > 10.0 && number(&fits["images_per_second"]) > 0.0);
    let epochs = 600.0 / number(&fits["epoch_seconds"]);
    assert!((number(&fits["epochs"]) - epochs).abs() < 1e-6 * epochs);
    let faster = number(&shared["images_per_second"]) / number(&fits["images_per_second"]);
    assert!(shared["fits"] == true && faster < 2.0, "two ranks are not twice as fast as one: {faster}");
    assert_eq!((&uneven["fits"], &not["fits"]), (&false.into(), &false.into()));
    assert!(uneven["why"].as_str().unwrap().contains("3 ranks"));
    let output = ok(&with(&["--batches", "4000000000"]));
    assert!(String::from_utf8_lossy(&output.stdout).contains("does not fit: the data set has 20 images"));
    let output = ok(&["plan", text(&data), "--encoders", "resnet18x0.0625", "--batches", "4"]);
    assert_output_is_documented("plan", &String::from_utf8_lossy(&output.stdout));
    refused(&with(&["--gbit", "0"]), &["`--gbit` must be above 0"]);
    refused(&with(&["--budget", "soon"]), &["invalid duration `soon`", "`90m`, `8h`, `3d`"]);
    refused(&["plan", text(&data), "--encoders", "vgg16"], &["invalid encoder `vgg16`", "`resnet50`, `resnet18x0.25`"]);
    refused(&["plan", text(&folder.path().join("none"))], &["none"]);
}

#[test]
fn ablation_study_is_resumable_and_writes_a_table_and_a_plot() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("study"));
    pictures(&data, 40);
    let study = [
        "ablate",
        text(&data),
        "--study",
        "target",
        "--out",
        text(&out),
        "--epochs",
        "2",
        "--device",
        "cpu",
        "--json",
        "--set",
        "encoder.width=0.125",
        "--set",
        "heads.hidden=16",
        "--set",
        "heads.projection=8",
        "--set",
        "train.batch=8",
    ];
    // Measured again, another precision may be faster.
    let table = json(&ok(&[&study[..], &["--set", "train.precision=f32"]].concat()));
    // Six runs and the random initialization, two metrics each.
    assert_eq!(table["rows"].as_array().unwrap().len(), 14);
    assert_eq!(table["rows"][12]["name"], "random initialization: linear top-1");
    let plot = fs::read_to_string(out.join("target.svg")).unwrap();
    assert!(plot.contains("<circle") && plot.contains("random initialization"), "{plot}");
    let encoder = fs::read(out.join("byol-0.9/encoder.safetensors")).unwrap();
    assert_eq!(json(&ok(&study)), table, "finished runs are not repeated");
    assert_eq!(fs::read(out.join("byol-0.9/encoder.safetensors")).unwrap(), encoder);
    for changed in [["--epochs", "3"], ["--set", "train.precision=bf16"]] {
        let other = [&study[..], &changed].concat();
        refused(&other, &["contains a run with different settings", "--out"]);
    }
}

#[test]
fn failed_runs_stop_or_roll_back() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    pictures(&data, 40);
    // Diverges in the first steps, whatever the initialization.
    let broken = ["--lr", "1e39", "--optimizer", "sgd", "--epochs", "4", "--warmup-epochs", "1"];
    let stopped = folder.path().join("stopped");
    let text = refused(&pretrain(&data, &stopped, &broken), &["diverged", "--on-collapse rollback"]);
    assert!(text.contains("step"), "{text}");
    let back = folder.path().join("back");
    refused(&pretrain(&data, &back, &[&broken[..], &["--on-collapse", "rollback"]].concat()), &["divergence"]);
    let lines = metrics(&back);
    let rollbacks: Vec<_> = lines.iter().filter(|l| l["kind"] == "rollback").collect();
    assert_eq!(rollbacks.len(), 5, "gives up after five rollbacks");
    let peaks: Vec<f64> = rollbacks.iter().map(|l| l["peak"].as_f64().unwrap()).collect();
    assert!(peaks.windows(2).all(|p| (p[0] / p[1] - 2.0).abs() < 1e-9), "{peaks:?}");
    assert!(rollbacks.iter().all(|l| l["why"].as_str().unwrap().contains("divergence")));
}

#[test]
fn segmentation_learns_colors_and_leaves_the_encoder_unchanged() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out, scenes) = (folder.path().join("data"), folder.path().join("run"), folder.path().join("scenes"));
    pictures(&data, 24);
    ok(&pretrain(&data, &out, &["--epochs", "2"]));
    masked(&scenes, 20);
    let before = bytes(&out);
    let flags = ["--steps", "40", "--batch", "4", "--crop", "32", "--json", "--device", "cpu"];
    for more in [&[][..], &["--frozen"]] {
        let table = json(&ok(&[&["eval", "segment", text(&out), text(&scenes)], &flags[..], more].concat()));
        let value = |name: &str| {
            let rows = table["rows"].as_array().unwrap();
            rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{name}: {table}"))["value"]
                .as_f64()
                .unwrap()
        };
        // Two classes told apart by color; the third of classes.txt is void. Chance is about 0.5.
        assert!(value("pixel accuracy") > 0.7 && value("mean IoU") > 0.4, "{more:?}: {table}");
        assert!(
            (0.0..=1.0).contains(&value("IoU field"))
                && (0.0..=1.0).contains(&value("mean IoU, random initialization"))
        );
        assert!(image::open(out.join("eval/segment.png")).is_ok());
    }
    assert_eq!(before, bytes(&out));
}

#[test]
fn depth_is_learned_from_both_folder_layouts() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 24);
    ok(&pretrain(&data, &out, &["--epochs", "2"]));
    let (plain, nyu) = (folder.path().join("plain"), folder.path().join("nyu"));
    for i in 0..15u64 {
        let (image, meters) = byol::data::synthetic::scene(1, i, 48, 64);
        let picture = image::RgbImage::from_raw(64, 48, image.pixels.into_u8()).unwrap();
        let millimeters: Vec<u16> = meters.iter().map(|m| (1000.0 * m) as u16).collect();
        let depth = image::ImageBuffer::<image::Luma<u16>, _>::from_raw(64, 48, millimeters).unwrap();
        let scene = nyu.join(if i < 12 { "train/kitchen_1" } else { "test/office_1" });
        for path in [plain.join("images"), plain.join("depth"), scene.clone()] {
            fs::create_dir_all(path).unwrap();
        }
        picture.save(plain.join(format!("images/{i}.png"))).unwrap();
        depth.save(plain.join(format!("depth/{i}.png"))).unwrap();
        picture.save(scene.join(format!("rgb_{i:05}.png"))).unwrap();
        depth.save(scene.join(format!("sync_depth_{i:05}.png"))).unwrap();
    }
    let before = bytes(&out);
    let flags = ["--steps", "4", "--batch", "2", "--crop", "32", "--frozen", "--json", "--device", "cpu"];
    for data in [&plain, &nyu] {
        let table = json(&ok(&[&["eval", "depth", text(&out), text(data)], &flags[..]].concat()));
        let value = |name: &str| {
            let rows = table["rows"].as_array().unwrap();
            rows.iter().find(|row| row["name"] == name).unwrap_or_else(|| panic!("{name}: {table}"))["value"]
                .as_f64()
                .unwrap()
        };
        assert!(value("pct < 1.25") <= value("pct < 1.25³") && value("pct < 1.25³") > 0.3, "{table}");
        assert!(value("rms, meters") > 0.0 && value("rel, random initialization") > 0.0);
        assert_eq!(table["settings"]["test_images"], 3);
    }
    assert!(image::open(out.join("eval/depth-frozen.png")).is_ok());
    assert_eq!(before, bytes(&out));
    fs::remove_file(nyu.join("test/office_1/sync_depth_00013.png")).unwrap();
    refused(&["eval", "depth", text(&out), text(&nyu), "--device", "cpu"], &["has no sync_depth_00013 beside it"]);
}

#[test]
fn plan_of_a_run_is_a_recipe() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run, again) = (folder.path().join("data"), folder.path().join("run"), folder.path().join("again"));
    pictures(&data, 24);
    let small = pretrain(&data, &run, &["--epochs", "1", "--warmup-epochs", "0"]);
    let dry = |args: &[&str]| {
        let output = ok(&[args, &["--dry-run"]].concat());
        // The placement is measured when the run starts.
        let text = String::from_utf8(output.stdout).unwrap().replace("placement = \"auto\"\n", "");
        toml(&text)
    };
    let plan = dry(&small);
    assert!(!run.exists(), "a dry run writes nothing");
    let quiet = ok(&[&small[..], &["--quiet"]].concat());
    assert!(quiet.stdout.is_empty() && !stderr(&quiet).contains("loss"), "{}", stderr(&quiet));
    let runs = json(&ok(&["runs", text(folder.path()), "--json"]));
    let first = &runs["runs"][0];
    assert_eq!((&first["state"], &first["epochs"]), (&"finished".into(), &serde_json::json!([1, 1])), "{runs}");
    assert_eq!(toml(&fs::read_to_string(run.join("plan.toml")).unwrap()), plan);
    for recipe in [run.clone(), run.join("plan.toml")] {
        let args = ["pretrain", text(&data), "--out", text(&again), "--device", "cpu", "--recipe", text(&recipe)];
        assert_eq!(dry(&args)["recipe"], plan["recipe"]);
    }
    let shown = ok(&["recipe", "show", text(&run)]);
    assert_eq!(toml(&String::from_utf8(shown.stdout).unwrap()), plan["recipe"]);

    // A short run of a named recipe has a short warm-up.
    let cifar10 = ["pretrain", text(&data), "--out", text(&again), "--device", "cpu", "--recipe", "cifar10"];
    let short = dry(&[&cifar10[..], &["--epochs", "2", "--batch", "8"]].concat());
    assert_eq!(short["recipe"]["train"]["warmup_epochs"], 0);
    let list = String::from_utf8(ok(&["recipe", "list"]).stdout).unwrap();
    assert!(list.lines().any(|line| line.starts_with("cifar10 ")) && list.lines().count() > 4, "{list}");
    refused(&["recipe", "show", "auto"], &["depends on the data", "--dry-run"]);
}

/// TOML as JSON, by the keys of a plan: scalars, lists of scalars and tables.
fn toml(text: &str) -> serde_json::Value {
    let mut root = serde_json::Map::new();
    let mut path: Vec<String> = Vec::new();
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if let Some(header) = line.strip_prefix('[') {
            path = header.trim_end_matches(']').split('.').map(str::to_owned).collect();
            continue;
        }
        let (key, value) = line.split_once(" = ").expect("a key and a value");
        let value = serde_json::from_str(value).unwrap_or_else(|_| value.into());
        let mut table = &mut root;
        for name in &path {
            table = table.entry(name).or_insert_with(|| serde_json::json!({})).as_object_mut().unwrap();
        }
        table.insert(key.to_owned(), value);
    }
    root.into()
}

/// Tensors of a safetensors file, as bytes by name.
fn tensors(path: &Path) -> BTreeMap<String, Vec<u8>> {
    let file = fs::read(path).unwrap();
    let (length, rest) = file.split_first_chunk::<8>().unwrap();
    let (header, data) = rest.split_at(u64::from_le_bytes(*length) as usize);
    let header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).unwrap();
    let named = header.into_iter().filter(|(name, _)| name != "__metadata__");
    let range = |value: &serde_json::Value| {
        let end = |i: usize| value["data_offsets"][i].as_u64().unwrap() as usize;
        end(0)..end(1)
    };
    named.map(|(name, value)| (name, data[range(&value)].to_vec())).collect()
}

/// `fixtures/run-4b588f9` is a run of commit 4b588f9 on an AVX2 machine, stopped at step 9 of 18,
/// with the encoder of its last step: `BYOL_ISA=avx2 byol pretrain /data/idx --recipe cifar10
/// --width 0.02 --size 8 --batch 16 --epochs 6 --threads 1 --set train.warmup_epochs=1 --set
/// heads.hidden=8 --set heads.projection=4`.
#[test]
fn run_of_an_earlier_version_resumes_to_its_bits() {
    let folder = tempfile::tempdir().unwrap();
    let (data, run) = (folder.path().join("idx"), folder.path().join("run"));
    fs::create_dir_all(&data).unwrap();
    let (n, side) = (48, 12);
    let pixel = |i: usize, y: usize, x: usize| (i * 37 + y * 19 + x * (7 + i % 5) * 3 + (i * x * y) % 29 * 5) as u8;
    let image = |i| (0..side * side).map(move |at| pixel(i, at / side, at % side));
    let idx = |name: &str, dims: &[usize], values: Vec<u8>| {
        let mut file = vec![0, 0, 8, dims.len() as u8];
        dims.iter().for_each(|&d| file.extend((d as u32).to_be_bytes()));
        file.extend(values);
        fs::write(data.join(name), file).unwrap();
    };
    for (split, n) in [("train", n), ("t10k", 12)] {
        idx(&format!("{split}-images-idx3-ubyte"), &[n, side, side], (0..n).flat_map(image).collect());
        idx(&format!("{split}-labels-idx1-ubyte"), &[n], (0..n).map(|i| (i % 3) as u8).collect());
    }
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/run-4b588f9");
    let step = Path::new("checkpoints/step-0000000009");
    fs::create_dir_all(run.join(step)).unwrap();
    let checkpoint = ["state.json", "state.safetensors"].map(|name| step.join(name));
    for file in ["plan.toml".into(), "metrics.jsonl".into()].iter().chain(&checkpoint) {
        fs::copy(fixture.join(file), run.join(file)).unwrap();
    }

    let (has_avx2, same_processor);
    #[cfg(target_arch = "x86_64")]
    {
        has_avx2 = is_x86_feature_detected!("avx2");
        // With AVX-512, Burn's own operations sum in another order.
        same_processor = has_avx2 && !is_x86_feature_detected!("avx512f");
    }
    #[cfg(not(target_arch = "x86_64"))]
    {
        (has_avx2, same_processor) = (false, false);
    }
    let mut resume = byol(&["resume", text(&run), "--data", text(&data), "--threads", "1"]);
    let output = if has_avx2 { resume.env("BYOL_ISA", "avx2") } else { &mut resume }.output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    let (resumed, expected) =
        (tensors(&run.join("encoder.safetensors")), tensors(&fixture.join("expected.safetensors")));
    assert!(resumed.keys().eq(expected.keys()));
    for (name, values) in &expected {
        if same_processor {
            assert_eq!(resumed[name], *values, "{name}");
        }
        let floats =
            |bytes: &[u8]| -> Vec<f32> { bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect() };
        for (a, b) in floats(&resumed[name]).into_iter().zip(floats(values)) {
            assert!((a - b).abs() <= 1e-3 * b.abs().max(1.0), "{name}: {a} instead of {b}");
        }
    }
    ok(&["eval", "knn", text(&run), text(&data), "--k", "1", "--device", "cpu"]);
}
