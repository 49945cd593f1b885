//! Mistakes and surprises of a new user's first hour: files that are in the way, swapped arguments,
//! runs that learn nothing, spellings of flags.

use std::fs;

use crate::common::{embed, json, ok, pictures, pretrain, refused, stderr, text, trained};

#[test]
fn existing_pictures_are_not_overwritten() {
    let folder = tempfile::tempdir().unwrap();
    let (data, sheet) = (folder.path().join("data"), folder.path().join("sheet.png"));
    pictures(&data, 4);
    let views = ["views", text(&data), "-o", text(&sheet), "-n", "2"];
    ok(&views);
    let before = fs::read(&sheet).unwrap();
    refused(&views, &["sheet.png", "--overwrite"]);
    assert_eq!(fs::read(&sheet).unwrap(), before);
    ok(&[&views[..], &["--overwrite", "--augment", "overhead"]].concat());
    assert_ne!(fs::read(&sheet).unwrap(), before);
    refused(&[&views[..], &["--overwrite", "--augment", "space"]].concat(), &["overhead", "microscopy"]);
}

#[test]
fn report_of_a_folder_without_a_run_names_the_folder() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("report.html"), "mine").unwrap();
    let run = folder.path().join("no-run");
    let output = crate::common::byol(&["report", text(&run)]).current_dir(folder.path()).output().unwrap();
    assert!(!output.status.success() && stderr(&output).contains("no-run"), "{}", stderr(&output));
    assert!(!stderr(&output).contains("report.html"), "{}", stderr(&output));
}

#[test]
fn own_encoders_need_no_import_and_arguments_have_an_order() {
    let (folder, data, run) = trained();
    let out = folder.path().join("imported.safetensors");
    let encoder = run.join("encoder.safetensors");
    refused(&["import", text(&encoder), "-o", text(&out), "--size", "16"], &["is a byol encoder", "without an import"]);
    let out = folder.path().join("swapped.npy");
    refused(&embed(data, run, &out, &[]), &["is not the folder of a run", "`byol embed RUN DATA`"]);
}

#[test]
fn output_that_cannot_be_created_is_not_a_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let (data, file) = (folder.path().join("data"), folder.path().join("file"));
    pictures(&data, 20);
    fs::write(&file, "in the way").unwrap();
    let out = file.join("run");
    let message = refused(&pretrain(&data, &out, &[]), &["cannot write", "file"]);
    assert!(!message.contains("checkpoint"), "{message}");
}

#[test]
fn short_flags_and_splits_are_those_of_the_other_commands() {
    let (_, data, run) = trained();
    let folder = tempfile::tempdir().unwrap();
    let vectors = folder.path().join("few.npy");
    ok(&embed(run, data, &vectors, &["--limit", "3"]));
    assert_eq!(fs::read(&vectors).unwrap().len(), 128 + 3 * 32 * 4);
    refused(&embed(run, data, &folder.path().join("val.npy"), &["--split", "val"]), &["val"]);
    let file = folder.path().join("all.parquet");
    ok(&embed(run, data, &file, &[]));
    let selected = json(&ok(&["select", text(&file), "--count", "2", "--json"]));
    assert!(selected["selected"][0]["nearest_before"].is_null(), "{selected}");
    assert_eq!(
        json(&ok(&["outliers", text(&file), "--count", "2", "--json"]))["outliers"].as_array().unwrap().len(),
        2
    );
}

#[test]
fn a_run_that_learns_nothing_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 200);
    let hopeless = ["--lr", "100000", "--epochs", "1", "--warmup-epochs", "0", "--json"];
    let output = crate::common::run(&pretrain(&data, &out, &hopeless));
    let printed = stderr(&output);
    let ends_well = output.status.success() && !printed.contains("warning: worse than");
    assert!(!ends_well, "{printed}");
    assert!(printed.contains("than 1000") || printed.contains("failed:") || printed.contains("error:"), "{printed}");

    let out = folder.path().join("auto");
    let auto = ["pretrain", text(&data), "--out", text(&out), "--epochs", "1", "--width", "0.0625", "--device", "cpu"];
    let output = ok(&[&auto[..], &["--set", "heads.hidden=16", "--set", "health.images=32", "--json"]].concat());
    assert!(stderr(&output).contains("runs of fewer than 1000 often end no better than random"), "{}", stderr(&output));
    let verdict = json(&output)["verdict"].as_str().map(str::to_owned).unwrap_or_default();
    assert!(verdict.contains("kNN accuracy") && verdict.contains("random initialization"), "{verdict:?}");
}

#[test]
fn notes_have_at_most_80_columns() {
    let folder = tempfile::tempdir().unwrap();
    pictures(&folder.path().join("data"), 40);
    let auto = ["pretrain", "data", "--out", "run", "--epochs", "1", "--width", "0.0625", "--device", "cpu"];
    let output = crate::common::byol(&auto).current_dir(folder.path()).output().unwrap();
    let printed = stderr(&output);
    let notes = printed.lines().filter(|line| !line.starts_with("warning:") && !line.starts_with("hint:"));
    let wide: Vec<&str> = notes.filter(|line| line.chars().count() > 80).collect();
    assert!(wide.is_empty() && printed.contains("  auto: "), "{wide:?}\n{printed}");
}

#[test]
fn evaluations_say_that_they_use_pretraining_images_only_where_they_do() {
    let (_, data, run) = trained();
    let folder = tempfile::tempdir().unwrap();
    let other = folder.path().join("other");
    pictures(&other, 40);
    let note = "the encoder was pretrained on these images";
    for (data, expected) in [(data, true), (&other, false)] {
        let output = stderr(&ok(&["eval", "knn", text(run), text(data), "--device", "cpu"]));
        assert!(output.contains("testing on one image in five") && output.contains(note) == expected, "{output}");
    }
}
