//! Packing and training on shards, through the real binary.

use std::{fs, path::Path, thread, time::Duration};

use crate::common::{byol, bytes, json, newest_state, ok, pictures, pretrain, refused, run, stderr, text};

/// `pictures`, packed into shards of a megabyte: a single one.
fn packed(folder: &Path, n: u32) -> std::path::PathBuf {
    let (data, shards) = (folder.join("data"), folder.join("shards"));
    pictures(&data, n);
    ok(&["pack", text(&data), "-o", text(&shards), "--shard-mb", "1"]);
    shards
}

/// Splits the only shard into shards of `samples` samples each, named as other programs do.
fn split(shards: &Path, samples: usize) {
    let file = fs::File::open(shards.join("train-000000.tar")).unwrap();
    let mut archive = tar::Archive::new(file);
    let members: Vec<(String, Vec<u8>)> = archive
        .entries()
        .unwrap()
        .map(|entry| {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
            (entry.path().unwrap().to_string_lossy().into_owned(), bytes)
        })
        .collect();
    for (i, some) in members.chunks(2 * samples).enumerate() {
        let mut tar = tar::Builder::new(fs::File::create(shards.join(format!("{i:03}.tar"))).unwrap());
        for (name, bytes) in some {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, name, &bytes[..]).unwrap();
        }
        tar.finish().unwrap();
    }
    fs::remove_file(shards.join("train-000000.tar")).unwrap();
    fs::remove_file(shards.join("manifest.json")).unwrap();
}

#[test]
fn shards_hold_readable_images_with_names_and_classes() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    pictures(&data, 30);
    fs::write(data.join("even/broken.png"), b"\x89PNG\r\n\x1a\nno").unwrap();
    let shards = folder.path().join("shards");
    let result = json(&ok(&["pack", text(&data), "-o", text(&shards), "--json"]));
    assert_eq!((&result["images"], &result["shards"]), (&30.into(), &1.into()));
    assert!(result["skipped"][0].as_str().unwrap().contains("broken.png"));
    // Repeating the command changes nothing.
    let before = fs::metadata(shards.join("train-000000.tar")).unwrap().modified().unwrap();
    ok(&["pack", text(&data), "-o", text(&shards)]);
    assert_eq!(before, fs::metadata(shards.join("train-000000.tar")).unwrap().modified().unwrap());
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(shards.join("manifest.json")).unwrap()).unwrap();
    assert_eq!((&manifest["complete"], &manifest["classes"]), (&true.into(), &serde_json::json!(["even", "odd"])));
    // Other settings are refused.
    refused(&["pack", text(&data), "-o", text(&shards), "--size", "8"], &["other settings", "another folder"]);
    refused(&["pack", text(&data), "-o", text(&data)], &["already contains other files"]);

    // The embeddings of the shards are those of the folder.
    let (_keep, _, encoder) = crate::common::trained();
    let (a, b) = (folder.path().join("a.csv"), folder.path().join("b.csv"));
    fs::remove_file(data.join("even/broken.png")).unwrap();
    ok(&crate::common::embed(encoder, &data, &a, &[]));
    ok(&crate::common::embed(encoder, &shards, &b, &[]));
    let rows = |path: &Path| {
        let text = fs::read_to_string(path).unwrap();
        let row = |line: &str| {
            let (path, rest) = line.split_once(',').unwrap();
            let (label, vector) = rest.split_once(',').unwrap();
            (path.rsplit('/').next().unwrap().to_owned(), label.to_owned(), vector.to_owned())
        };
        let mut rows: Vec<_> = text.lines().skip(1).map(row).collect();
        rows.sort();
        rows
    };
    assert_eq!(rows(&a), rows(&b));
}

#[test]
fn size_shrinks_larger_images() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    pictures(&data, 4);
    image::RgbImage::new(100, 60).save(data.join("even/large.jpg")).unwrap();
    let shards = folder.path().join("shards");
    ok(&["pack", text(&data), "-o", text(&shards), "--size", "30"]);
    let mut archive = tar::Archive::new(fs::File::open(shards.join("train-000000.tar")).unwrap());
    let mut sizes = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
        if let Ok(image) = image::load_from_memory(&bytes) {
            sizes.push((image.width(), image.height()));
        }
    }
    sizes.sort_unstable();
    assert_eq!(sizes, [(20, 16), (20, 16), (20, 16), (20, 16), (50, 30)]);
}

#[test]
fn resume_on_shards_after_kill_is_bit_identical() {
    let folder = tempfile::tempdir().unwrap();
    let shards = packed(folder.path(), 48);
    split(&shards, 10);
    let whole = folder.path().join("whole");
    let flags = ["--set", "train.shuffle=6", "--set", "checkpoint.every_steps=4", "--epochs", "8"];
    let result = json(&ok(&pretrain(&shards, &whole, &[&flags[..], &["--json"]].concat())));
    assert_eq!(result["finished"], true);

    let killed = folder.path().join("killed");
    let mut child = byol(&pretrain(&shards, &killed, &flags)).spawn().unwrap();
    let metrics = killed.join("metrics.jsonl");
    while fs::read_to_string(&metrics).map_or(0, |text| text.matches("\"step\":").count()) < 15 {
        assert!(child.try_wait().unwrap().is_none(), "the run ended before it could be killed");
        thread::sleep(Duration::from_millis(2));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    ok(&["resume", text(&killed)]);
    assert!(bytes(&whole) == bytes(&killed) && newest_state(&whole) == newest_state(&killed));

    // The same shards as a pattern with a range.
    let pattern = shards.join("{000..004}.tar");
    let again = folder.path().join("again");
    ok(&pretrain(&pattern, &again, &flags));
    assert!(bytes(&whole) == bytes(&again));
}

#[test]
fn unreadable_images_of_shards_are_skipped_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let shards = packed(folder.path(), 80);
    let path = shards.join("train-000000.tar");
    let mut tar = fs::read(&path).unwrap();
    // The pixels of the last image, after the 64 that are checked before the run.
    let start = tar.windows(4).rposition(|w| w == b"IDAT").unwrap();
    tar[start + 8..start + 40].fill(0x55);
    fs::write(&path, tar).unwrap();
    let out = folder.path().join("run");
    let output = ok(&pretrain(&shards, &out, &[]));
    assert!(stderr(&output).contains("skipped 1 unreadable image"), "{}", stderr(&output));
    assert!(fs::read_to_string(out.join("skipped.txt")).unwrap().contains("PNG"));
}

#[test]
fn rejects_invalid_shards() {
    let folder = tempfile::tempdir().unwrap();
    let shards = packed(folder.path(), 12);
    let path = shards.join("train-000000.tar");
    let whole = fs::read(&path).unwrap();
    let out = folder.path().join("run");
    let rejects = |words: &[&str]| {
        refused(&pretrain(&shards, &out, &[]), words);
        assert!(!out.exists());
    };
    for length in [whole.len() - 1024, whole.len() / 2, 700] {
        fs::write(&path, &whole[..length]).unwrap();
        rejects(&["train-000000.tar", "truncated"]);
    }
    fs::write(&path, b"").unwrap();
    rejects(&["train-000000.tar"]);
    let mut empty = tar::Builder::new(fs::File::create(&path).unwrap());
    let mut header = tar::Header::new_gnu();
    header.set_size(3);
    empty.append_data(&mut header, "a.txt", &b"abc"[..]).unwrap();
    empty.finish().unwrap();
    rejects(&["no images"]);
    refused(&pretrain(&shards.join("{0..3}.tar"), &out, &[]), &["0.tar"]);
    refused(&pretrain(&shards.join("{a..3}.tar"), &out, &[]), &["braces"]);
    fs::write(shards.join("train-000000.parquet"), b"PAR1 and no more").unwrap();
    fs::remove_file(&path).unwrap();
    rejects(&["Parquet"]);
    assert!(!run(&["pack", text(&folder.path().join("none")), "-o", text(&out)]).status.success());
}

#[test]
fn interrupted_packing_is_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    // Enough for several shards of a megabyte.
    fs::create_dir_all(&data).unwrap();
    for i in 0..40u32 {
        let noise = image::RgbImage::from_fn(200, 200, |x, y| {
            let v = (x * 7919 + y * 104_729 + i * 1_299_709).wrapping_mul(2_654_435_761) >> 8;
            image::Rgb([v as u8, (v >> 8) as u8, (v >> 16) as u8])
        });
        noise.save(data.join(format!("{i}.png"))).unwrap();
    }
    let whole = folder.path().join("whole");
    let result = json(&ok(&["pack", text(&data), "-o", text(&whole), "--shard-mb", "1", "--json"]));
    assert!(result["shards"].as_u64().unwrap() > 2, "{result}");
    // As after a crash: the last shard is incomplete, and the manifest lists those before it.
    let stopped = folder.path().join("stopped");
    fs::create_dir(&stopped).unwrap();
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(whole.join("manifest.json")).unwrap()).unwrap();
    let first = manifest["shards"][0].clone();
    manifest["done"] = first["images"].clone();
    manifest["complete"] = false.into();
    manifest["shards"] = serde_json::json!([first]);
    fs::write(stopped.join("manifest.json"), manifest.to_string()).unwrap();
    fs::copy(whole.join("train-000000.tar"), stopped.join("train-000000.tar")).unwrap();
    fs::write(stopped.join("train-000001.tar.partial"), b"half").unwrap();
    ok(&["pack", text(&data), "-o", text(&stopped), "--shard-mb", "1"]);
    let files = |folder: &Path| {
        let mut all: Vec<_> = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path()).collect();
        all.sort();
        all.iter().map(|p| (p.file_name().unwrap().to_owned(), fs::read(p).unwrap())).collect::<Vec<_>>()
    };
    assert!(files(&whole) == files(&stopped));
}

#[test]
fn archives_beside_images_are_unused_and_shard_names_give_the_split() {
    let folder = tempfile::tempdir().unwrap();
    let shards = packed(folder.path(), 30);
    let out = folder.path().join("run");
    // An archive among images is not the data set, whether the run begins or continues.
    let data = folder.path().join("data");
    fs::copy(shards.join("train-000000.tar"), data.join("backup.tar")).unwrap();
    let before = folder.path().join("before");
    let log = stderr(&ok(&pretrain(&data, &before, &[])));
    assert!(log.contains("backup.tar") && log.contains("27 training images"), "{log}");
    fs::copy(shards.join("train-000000.tar"), data.join("again.tar")).unwrap();
    ok(&["resume", text(&before)]);
    // The split is part of a longer file name, as on Hugging Face.
    let other = folder.path().join("other");
    fs::create_dir(&other).unwrap();
    fs::copy(shards.join("train-000000.tar"), other.join("pictures-train-0.tar")).unwrap();
    fs::copy(shards.join("train-000000.tar"), other.join("pictures-validation-0.tar")).unwrap();
    let log = stderr(&ok(&pretrain(&other, &out, &[])));
    assert!(log.contains("30 training images, 30 monitoring images"), "{log}");
    // The plan has an absolute path: the run resumes from any folder.
    let (near, run) = (folder.path().join("near"), folder.path().join("relative"));
    fs::create_dir(&near).unwrap();
    fs::copy(shards.join("train-000000.tar"), near.join("000.tar")).unwrap();
    let args = pretrain(Path::new("near/{000..000}.tar"), &run, &[]);
    assert!(byol(&args).current_dir(folder.path()).output().unwrap().status.success());
    ok(&["resume", text(&run)]);
}

#[test]
fn packing_is_verified_and_rejects_sets_without_readable_images() {
    let folder = tempfile::tempdir().unwrap();
    let shards = packed(folder.path(), 12);
    let path = shards.join("train-000000.tar");
    let mut bytes = fs::read(&path).unwrap();
    bytes[600] ^= 1;
    fs::write(&path, bytes).unwrap();
    let again = ["pack", text(&folder.path().join("data")), "-o", text(&shards), "--shard-mb", "1"].map(str::to_owned);
    let again: Vec<&str> = again.iter().map(String::as_str).collect();
    refused(&again, &["train-000000.tar", "checksum differs"]);
    fs::remove_file(&path).unwrap();
    refused(&again, &["train-000000.tar"]);
    let broken = folder.path().join("broken");
    fs::create_dir(&broken).unwrap();
    fs::write(broken.join("a.png"), b"\x89PNG\r\n\x1a\nno").unwrap();
    refused(&["pack", text(&broken), "-o", text(&folder.path().join("none"))], &["1 of 1 images"]);
}

#[test]
fn unreadable_monitoring_images_are_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("data");
    pictures(&data, 300);
    let shards = folder.path().join("shards");
    fs::create_dir(&shards).unwrap();
    let mut tar = tar::Builder::new(fs::File::create(shards.join("0.tar")).unwrap());
    let mut add = |name: String, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, name, bytes).unwrap();
    };
    for i in 0..300u32 {
        let class = if i % 2 == 0 { "even" } else { "odd" };
        let bytes = fs::read(data.join(format!("{class}/{i:03}.png"))).unwrap();
        // Every second image of an interval after the 64 that are checked before the run.
        let broken = i > 70 && i < 110 && i % 2 == 1;
        add(format!("{i:03}.png"), if broken { &bytes[..40] } else { &bytes });
        add(format!("{i:03}.cls"), (i % 2).to_string().as_bytes());
    }
    tar.finish().unwrap();
    drop(tar);
    let out = folder.path().join("run");
    ok(&pretrain(&shards, &out, &["--epochs", "1", "--warmup-epochs", "0"]));
    ok(&["resume", text(&out)]);
    let listed = fs::read_to_string(out.join("skipped.txt")).unwrap();
    let mut lines: Vec<&str> = listed.lines().collect();
    lines.sort_unstable();
    lines.dedup();
    assert_eq!(lines.len(), listed.lines().count(), "no image is listed twice: {listed}");
    let table = json(&ok(&["eval", "knn", text(&out), text(&shards), "--k", "1", "--json", "--device", "cpu"]));
    assert_eq!(table["rows"].as_array().unwrap().len(), 1);
}

/// A Parquet file with two row groups of four images each, of several kilobytes.
fn parquet(path: &Path) {
    use arrow_array::{ArrayRef, BinaryArray, RecordBatch};
    let image = |i: u32| {
        let noise =
            |x: u32, y: u32, c: u32| (((x * 7919 + y * 104_729 + i * 13 + c).wrapping_mul(2_654_435_761)) >> 13) as u8;
        let image = image::RgbImage::from_fn(40, 40, |x, y| image::Rgb([0, 1, 2].map(|c| noise(x, y, c))));
        let mut bytes = std::io::Cursor::new(Vec::new());
        image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    };
    let images: ArrayRef = std::sync::Arc::new(BinaryArray::from_iter_values((0..8).map(image)));
    let batch = RecordBatch::try_from_iter([("image", images)]).unwrap();
    let file = fs::File::create(path).unwrap();
    let mut writer = parquet::arrow::ArrowWriter::try_new(file, batch.schema(), None).unwrap();
    for first in [0, 4] {
        writer.write(&batch.slice(first, 4)).unwrap();
        writer.flush().unwrap();
    }
    writer.close().unwrap();
}

#[cfg(unix)]
#[test]
fn missing_or_full_temporary_folder_ends_the_command() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("images.parquet");
    parquet(&data);
    let (_keep, _, encoder) = crate::common::trained();
    let (table, shards) = (folder.path().join("a.csv"), folder.path().join("shards"));
    let missing = folder.path().join("missing");
    let commands = [crate::common::embed(encoder, &data, &table, &[]), vec!["pack", text(&data), "-o", text(&shards)]];
    for args in &commands {
        let output = byol(args).env("TMPDIR", &missing).output().unwrap();
        let log = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(log.contains(text(&missing)) && log.contains("TMPDIR"), "{log}");
        // A limit on the size of files acts like a full disk. Its unit is a kilobyte or half of it.
        let script = "trap '' XFSZ; ulimit -f 10; exec \"$@\"";
        let mut limited = std::process::Command::new("sh");
        limited.args(["-c", script, "sh", env!("CARGO_BIN_EXE_byol")]).args(args);
        let output = limited.env("TMPDIR", folder.path()).output().unwrap();
        let log = stderr(&output);
        assert_eq!(output.status.code(), Some(1), "{log}");
        assert!(log.contains(text(folder.path())) && log.contains("temporary file"), "{log}");
        assert!(!table.exists() && !log.contains("skipped"), "{log}");
        ok(args);
        let _ = fs::remove_file(&table);
    }
}

#[test]
fn image_column_is_chosen_with_a_flag() {
    let folder = tempfile::tempdir().unwrap();
    let (data, shards) = (folder.path().join("images.parquet"), folder.path().join("shards"));
    parquet(&data);
    refused(&["pack", text(&data), "-o", text(&shards), "--column", "mask"], &["`mask`", "image", "--column"]);
    ok(&["pack", text(&data), "-o", text(&shards), "--column", "image"]);
}
