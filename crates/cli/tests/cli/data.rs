//! Layouts of data: what is read, what is reported, and what lacks labels.

use std::{fs, path::Path};

use crate::common::{json, ok, pictures, pretrain, refused, run, stderr, text, trained};

/// Copies pictures of one class to another place.
fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn knn(encoder: &Path, data: &Path) -> std::process::Output {
    run(&["eval", "knn", text(encoder), text(data), "--k", "1", "--device", "cpu", "--json"])
}

#[test]
fn evaluates_the_images_that_have_labels() {
    let (_, _, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    // One picture beside the class folders.
    let data = folder.path().join("stray");
    pictures(&data, 20);
    fs::copy(data.join("even/000.png"), data.join("map.png")).unwrap();
    let output = knn(encoder, &data);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("1 of 21 training images has no label and is not used"), "{}", stderr(&output));
    // A table of a few images.
    let data = folder.path().join("few");
    pictures(&data, 20);
    let rows: String =
        (0..6).map(|i| format!("{0}/{i:03}.png,{0}\n", if i % 2 == 0 { "even" } else { "odd" })).collect();
    fs::write(data.join("labels.csv"), format!("path,label\n{rows}")).unwrap();
    let output = knn(encoder, &data);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("14 of 20 training images have no label"), "{}", stderr(&output));
}

#[test]
fn errors_name_the_split_without_labels() {
    let (_, _, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    pictures(&data.join("train"), 12);
    copy(&data.join("train/even"), &data.join("val"));
    let eval = ["eval", "knn", text(encoder), text(&data), "--device", "cpu"];
    refused(&eval, &["the val split of", "has no labels: val/ has no class folders (first image: val/000.png)"]);
    // Hidden test labels: the validation split takes the role of the test split.
    fs::rename(data.join("val"), data.join("test")).unwrap();
    copy(&data.join("train/even"), &data.join("val/even"));
    copy(&data.join("train/odd"), &data.join("val/odd"));
    let output = knn(encoder, &data);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("the test split has no labels: testing on the 12 images"), "{}", stderr(&output));
    // Training images without labels.
    fs::remove_dir_all(data.join("train")).unwrap();
    copy(&data.join("val/even"), &data.join("train"));
    refused(&eval, &["the training split of", "train/ has no class folders"]);
}

#[test]
fn pretrains_on_every_image_of_a_class_named_like_a_split() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 40);
    copy(&data.join("even"), &data.join("train"));
    fs::write(data.join("IMG_1.HEIC"), "not read").unwrap();
    let output = ok(&pretrain(&data, &out, &[]));
    let text = stderr(&output).replace("\n  ", " ");
    assert!(text.contains("54 training images, 6 monitoring images, 3 classes"), "{text}");
    assert!(text.contains("not used: HEIC file (1)"), "{text}");
    assert!(fs::read_to_string(out.join("skipped.txt")).unwrap().contains("IMG_1.HEIC"));
}

#[cfg(unix)]
#[test]
fn named_pipes_do_not_block() {
    let (folder, _, encoder) = trained();
    let (data, out) = (folder.path().join("pipes"), folder.path().join("pipes.npy"));
    pictures(&data, 8);
    assert!(std::process::Command::new("mkfifo").arg(data.join("even/x.jpg")).status().unwrap().success());
    let output = ok(&crate::common::embed(encoder, &data, &out, &["--json"]));
    assert_eq!(json(&output)["rows"], 8);
    assert!(stderr(&output).contains("not used: special file (1)"), "{}", stderr(&output));
}
