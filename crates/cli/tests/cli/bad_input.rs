//! Invalid input: one clear error, a non-zero exit code, and no partial files.

use std::{fs, path::Path};

use crate::common::{byol, json, ok, pictures, pretrain, refused, run, skip, stderr, text};
use byol::nn::{Encoder, EncoderSpec, Normalization};

fn assert_absent(out: &Path) {
    assert!(!out.exists(), "{} was left behind", out.display());
}

#[test]
fn rejects_folders_without_images() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    refused(&pretrain(&data, &out, &[]), &["does not exist", text(&data)]);
    fs::create_dir(&data).unwrap();
    refused(&pretrain(&data, &out, &[]), &["no images in", text(&data), "JPEG"]);
    fs::write(data.join("notes.txt"), "not an image").unwrap();
    refused(&pretrain(&data, &out, &[]), &["no images in"]);
    assert_absent(&out);
}

#[test]
fn skips_and_lists_unreadable_images() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 40);
    let good = fs::read(data.join("even/000.png")).unwrap();
    fs::write(data.join("even/cut.png"), &good[..good.len() / 2]).unwrap();
    fs::write(data.join("even/empty.jpg"), b"").unwrap();
    fs::write(data.join("odd/text.jpg"), b"this is a text").unwrap();
    fs::write(data.join("odd/huge.png"), huge_png()).unwrap();
    let output = run(&pretrain(&data, &out, &["--json"]));
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stderr(&output).contains("skipped 4 unreadable images"), "{}", stderr(&output));
    let listed = fs::read_to_string(out.join("skipped.txt")).unwrap();
    for (name, why) in
        [("cut.png", "PNG"), ("empty.jpg", "empty"), ("text.jpg", "not a JPEG"), ("huge.png", "30000 x 30000")]
    {
        let line = listed.lines().find(|l| l.contains(name)).unwrap_or_else(|| panic!("{name} is not in {listed}"));
        assert!(line.contains(why), "{line}");
    }
    assert_eq!(json(&output)["finished"], true);
}

/// PNG header of an image of 30,000 x 30,000 pixels.
fn huge_png() -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
    bytes.extend(30_000u32.to_be_bytes());
    bytes.extend(30_000u32.to_be_bytes());
    bytes.extend([8, 2, 0, 0, 0]);
    let mut crc = !0u32;
    for byte in &bytes[12..] {
        crc ^= u32::from(*byte);
        for _ in 0..8 {
            crc = if crc & 1 == 1 { crc >> 1 ^ 0xEDB8_8320 } else { crc >> 1 };
        }
    }
    bytes.extend((!crc).to_be_bytes());
    bytes.extend(b"\0\0\0\0IDAT");
    bytes
}

#[test]
fn rejects_folders_with_mostly_unreadable_images() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 10);
    for i in 0..11 {
        fs::write(data.join(format!("even/bad{i}.jpg")), b"").unwrap();
    }
    refused(&pretrain(&data, &out, &[]), &["11 of 21", "more than half"]);
    assert_absent(&out);
}

#[cfg(unix)]
#[test]
fn file_without_read_permission_ends_the_command() {
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 40);
    let locked = data.join("even/000.png");
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o000)).unwrap();
    if fs::read(&locked).is_ok() {
        skip("this user can read every file (root)");
        return;
    }
    refused(&pretrain(&data, &out, &[]), &["cannot read", "000.png", "permissions"]);
}

#[test]
fn rejects_invalid_recipes() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 20);
    let cases: [(&[&str], &[&str]); 9] = [
        (&["--set", "taget.tau=0.9"], &["unknown recipe key `taget.tau`", "`target.tau`"]),
        (&["--epochs", "0"], &["train.epochs", "0 (expected 1"]),
        (&["--batch", "1000"], &["batch size 1000 exceeds the 18 training images", "--batch 18"]),
        (&["--recipe", "cifar100"], &["unknown recipe `cifar100`", "did you mean `cifar10`?"]),
        (&["--accumulate", "3"], &["train.accumulate", "divisor of batch size 8"]),
        (&["--tau", "1.5"], &["target.tau", "1.5 (expected 0 to 1)"]),
        (&["--set", "epochs"], &["KEY=VALUE"]),
        (&["--width", "0"], &["encoder.width", "above 0"]),
        (&["--optimizer", "adam"], &["optimizer.kind", "adamw"]),
    ];
    for (flags, words) in cases {
        refused(&[&pretrain(&data, &out, &[])[..], flags].concat(), words);
    }
    assert_absent(&out);
    let file = folder.path().join("mine.toml");
    fs::write(&file, "[train]\nepoch = 3\n").unwrap();
    refused(
        &["pretrain", text(&data), "--out", text(&out), "--recipe", text(&file)],
        &["`train.epoch`", "`train.epochs`"],
    );
}

#[test]
fn refuses_to_write_into_a_non_empty_folder() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 20);
    fs::create_dir(&out).unwrap();
    fs::write(out.join("thesis.tex"), "years of work").unwrap();
    refused(&pretrain(&data, &out, &[]), &["is not empty", "--out"]);
    fs::remove_file(out.join("thesis.tex")).unwrap();
    fs::write(out.join("plan.toml"), "").unwrap();
    refused(&pretrain(&data, &out, &[]), &["already contains a run", "byol resume"]);
}

#[test]
fn rejects_non_encoder_files() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    pictures(&data, 20);
    let file = folder.path().join("encoder.safetensors");
    let eval = ["eval", "knn", text(&file), text(&data), "--device", "cpu"];
    refused(&eval, &["cannot read encoder", text(&file)]);
    fs::write(&file, b"nonsense").unwrap();
    refused(&eval, &["not a complete safetensors file"]);
}

/// A limit on the file size stands in for a full disk, which would need privileges to set up.
#[cfg(unix)]
#[test]
fn failed_writes_leave_no_partial_files() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 40);
    let args = pretrain(&data, &out, &[]).iter().map(|a| format!("'{a}'")).collect::<Vec<_>>().join(" ");
    // 64 blocks of 512 bytes or 1 KiB. The limit's signal is ignored, so that the write itself
    // fails.
    let script = format!("trap '' XFSZ; ulimit -f 64; exec '{}' {args}", env!("CARGO_BIN_EXE_byol"));
    let output = std::process::Command::new("sh").args(["-c", &script]).output().unwrap();
    assert!(!output.status.success());
    let text = stderr(&output);
    assert!(text.contains("cannot write") && text.contains("free some space"), "{text}");
    let whole = |path: &Path| !path.to_string_lossy().contains("step-") && !path.ends_with("encoder.safetensors");
    for entry in fs::read_dir(&out).unwrap().chain(fs::read_dir(out.join("checkpoints")).unwrap()) {
        assert!(whole(&entry.unwrap().path()));
    }
}

#[test]
fn rejects_unavailable_instruction_sets() {
    let output = byol(&["devices"]).env("BYOL_ISA", "sse9").output().unwrap();
    let text = stderr(&output);
    assert!(!output.status.success() && text.contains("BYOL_ISA=sse9") && text.contains("portable"), "{text}");
    let output = byol(&["devices", "--json"]).env("BYOL_ISA", "portable").output().unwrap();
    assert_eq!(json(&output)["machine"]["isa"], "portable");
}

#[test]
fn help_describes_input_and_behavior() {
    for (command, words) in [
        (&["pretrain"][..], "Class subfolders are labels"),
        (&["eval", "linear"], "selected on a tenth of the training images"),
        (&["embed"], "FILE.partial-rows"),
        (&["explore"], "nothing is fetched from a network"),
    ] {
        let output = ok(&[command, &["--help"]].concat());
        let text = String::from_utf8_lossy(&output.stdout).split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(text.contains(words), "{command:?}: {text}");
    }
}

#[test]
fn draws_views_and_lists_devices() {
    let folder = tempfile::tempdir().unwrap();
    let (data, sheet) = (folder.path().join("data"), folder.path().join("sheet.png"));
    pictures(&data, 6);
    refused(&["views", text(&data), "-o", "sheet.jpg"], &["unsupported output file sheet.jpg", "`.png`"]);
    ok(&["views", text(&data), "-o", text(&sheet), "--count", "3"]);
    let picture = image::open(&sheet).unwrap();
    assert_eq!((picture.width(), picture.height()), (5 * 168 + 8, 3 * 168 + 8));
    let devices = json(&ok(&["devices", "--json"]));
    assert_eq!(devices["devices"][0]["choice"], "cpu");
    assert_ne!(devices["auto"], serde_json::Value::Null);
}

#[test]
fn rejects_masks_that_do_not_match_their_images() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out, scenes) = (folder.path().join("data"), folder.path().join("run"), folder.path().join("scenes"));
    pictures(&data, 20);
    crate::common::ok(&pretrain(&data, &out, &["--epochs", "2"]));
    let segment = ["eval", "segment", text(&out), text(&scenes), "--device", "cpu", "--steps", "1"];
    refused(&segment, &["does not exist", "scenes"]);
    fs::create_dir_all(scenes.join("images")).unwrap();
    refused(&segment, &["no folder `masks`"]);
    crate::common::masked(&scenes, 6);
    fs::remove_file(scenes.join("masks/03.png")).unwrap();
    refused(&segment, &["03.png has no mask"]);
    image::GrayImage::new(5, 5).save(scenes.join("masks/03.png")).unwrap();
    refused(&segment, &["is 48 x 40, but its mask is 5 x 5"]);
    image::RgbImage::new(48, 40).save(scenes.join("masks/03.png")).unwrap();
    refused(&segment, &["expected 8-bit gray"]);
    image::GrayImage::from_pixel(48, 40, image::Luma([7])).save(scenes.join("masks/03.png")).unwrap();
    refused(&segment, &["names 3 classes, but a mask has class 7"]);
    fs::remove_file(scenes.join("images/03.png")).unwrap();
    refused(&segment, &["03.png has no image"]);
    // A single class, then a class that only test images have.
    let mask = |i: usize, class: u8| {
        let path = scenes.join(format!("masks/{i:02}.png"));
        image::GrayImage::from_pixel(48, 40, image::Luma([class])).save(path).unwrap();
    };
    fs::remove_file(scenes.join("masks/03.png")).unwrap();
    [0, 1, 2, 4, 5].into_iter().for_each(|i| mask(i, 0));
    refused(&segment, &["have the same class"]);
    mask(5, 1);
    refused(&segment, &["has test images but no training images"]);
    // Two images with the same name; an unlabeled class in the middle of the list.
    image::RgbImage::new(48, 40).save(scenes.join("images/02.bmp")).unwrap();
    refused(&segment, &["02.bmp and", "02.png have the same name"]);
    fs::remove_file(scenes.join("images/02.bmp")).unwrap();
    fs::write(scenes.join("classes.txt"), "sky\nvoid\nroad\n").unwrap();
    refused(&segment, &["no pixel of the test masks"]);
    mask(5, 2);
    refused(&segment, &["class `road`", "no training images"]);
    // Depth.
    let depth = |data: &Path, word: &str| {
        refused(&["eval", "depth", text(&out), text(data), "--device", "cpu", "--steps", "1"], &[word]);
    };
    depth(&scenes, "no folder `depth`");
    depth(&data, "neither `images` and `depth` nor NYUv2's");
    fs::create_dir(scenes.join("depth")).unwrap();
    depth(&scenes, "has no depth");
}

#[test]
fn rejects_unusable_labels() {
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("run"));
    pictures(&data, 24);
    crate::common::ok(&pretrain(&data, &out, &["--epochs", "2"]));
    let knn = |data: &Path| {
        let data = text(data).to_owned();
        ["eval", "knn", text(&out), &data, "--device", "cpu"].map(str::to_owned)
    };
    let refuse = |data: &Path, words: &[&str]| {
        let args = knn(data);
        refused(&args.iter().map(String::as_str).collect::<Vec<_>>(), words);
    };
    // A single class.
    refuse(&data.join("even"), &["has no labels"]);
    // A class that only test images have.
    let split = folder.path().join("split");
    pictures(&split.join("train"), 8);
    pictures(&split.join("test"), 8);
    fs::create_dir(split.join("test/rare")).unwrap();
    fs::copy(split.join("test/odd/001.png"), split.join("test/rare/1.png")).unwrap();
    refuse(&split, &["class `rare`", "no training images"]);
    fs::write(
        split.join("labels.csv"),
        "path,label,split\ntrain/odd/001.png,a,train\ntrain/even/002.png,b,train\ntest/rare/1.png,rare,test\n",
    )
    .unwrap();
    refuse(&split, &["class `rare`", "no training images"]);
    fs::write(split.join("labels.csv"), "path,label\ntrain/none.png,a\n").unwrap();
    refuse(&split, &["labels.csv", "line 2 names", "none.png"]);
}

#[test]
fn rejects_labels_that_no_classifier_can_learn() {
    let (folder, _, encoder) = crate::common::trained();
    let folder = folder.path().join("unlearnable");
    pictures(&folder, 12);
    let csv = |lines: &dyn Fn(usize) -> String| {
        let lines: String =
            (0..12).map(|i| format!("{}/{i:03}.png,{}\n", if i % 2 == 0 { "even" } else { "odd" }, lines(i))).collect();
        fs::write(folder.join("labels.csv"), format!("path,label,split\n{lines}")).unwrap();
    };
    csv(&|i| format!("same,{}", if i < 8 { "train" } else { "test" }));
    for what in ["knn", "transfer", "linear"] {
        refused(&["eval", what, text(encoder), text(&folder), "--device", "cpu"], &["have the same class"]);
    }
    csv(&|i| match i {
        0..4 => "a,train".into(),
        4..8 => "b,train".into(),
        8 => "c,test".into(),
        _ => "a,test".into(),
    });
    for what in ["knn", "transfer"] {
        refused(&["eval", what, text(encoder), text(&folder), "--device", "cpu"], &["class `c`", "no training images"]);
    }
}

#[test]
fn rejects_or_warns_about_encoders_for_other_images() {
    let (folder, data, encoder) = crate::common::trained();
    let evaluate = |encoder: &Path| run(&["eval", "knn", text(encoder), text(data), "--k", "1", "--device", "cpu"]);
    let device = burn::tensor::Device::flex();
    let like = byol::nn::weights::load(encoder, &device).unwrap().spec;
    let save = |name: &str, spec: EncoderSpec| {
        let path = folder.path().join(name);
        let random = Encoder::random(spec, 0, &device);
        byol::nn::weights::save(&path, &random.spec, &random.weights).unwrap();
        path
    };
    let gray = Normalization { mean: vec![0.5], std: vec![0.2] };
    let gray = save("gray.safetensors", EncoderSpec { channels: 1, normalization: gray, ..like.clone() });
    refused(
        &["eval", "knn", text(&gray), text(data), "--device", "cpu"],
        &["the images have 3 channels, but the encoder was trained on 1"],
    );
    let large = evaluate(&save("large.safetensors", EncoderSpec { size: 64, ..like }));
    assert!(large.status.success() && stderr(&large).contains("the encoder expects 64 px"), "{}", stderr(&large));
}
