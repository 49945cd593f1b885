//! Folders of sounds.

use std::{f32::consts::TAU, fs, path::Path};

use crate::common::{Server, json, ok, pretrain, refused, run, stderr, text, trained};

/// A WAV file of 16-bit samples, one channel.
fn wav(rate: u32, samples: &[f32]) -> Vec<u8> {
    let data: Vec<u8> = samples.iter().flat_map(|s| ((s * 32767.0) as i16).to_le_bytes()).collect();
    let mut bytes = b"RIFF".to_vec();
    bytes.extend((36 + data.len() as u32).to_le_bytes());
    bytes.extend(b"WAVEfmt \x10\0\0\0\x01\0\x01\0");
    bytes.extend([rate, 2 * rate].map(u32::to_le_bytes).concat());
    bytes.extend(b"\x02\0\x10\0data");
    bytes.extend((data.len() as u32).to_le_bytes());
    [bytes, data].concat()
}

/// Half a second whose pitch rises or falls.
fn glide(rate: u32, i: usize) -> Vec<u8> {
    let n = rate / 2;
    let base = 300.0 + 40.0 * (i % 17) as f32;
    let sample = |t: u32| {
        let (at, t) = (t as f32 / n as f32, t as f32 / rate as f32);
        let hz = if i.is_multiple_of(2) { base * (1.0 + at) } else { base * (2.0 - at) };
        0.3 * (TAU * hz * t).sin()
    };
    wav(rate, &(0..n).map(sample).collect::<Vec<_>>())
}

/// Writes `n` sounds of two classes.
fn sounds(folder: &Path, n: usize) {
    for i in 0..n {
        let class = folder.join(["rising", "falling"][i % 2]);
        fs::create_dir_all(&class).unwrap();
        // A quarter has another sample rate.
        fs::write(class.join(format!("{i:03}.wav")), glide(if i % 8 < 2 { 22_050 } else { 8000 }, i)).unwrap();
    }
}

#[test]
fn sounds_from_files_to_embeddings() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (root.path().join("data"), root.path().join("run"));
    sounds(&data, 60);
    fs::write(data.join("rising/empty.wav"), wav(8000, &[])).unwrap();
    fs::write(data.join("rising/cut.flac"), &include_bytes!("../../../../golden/tone.flac")[..3000]).unwrap();
    fs::write(data.join("rising/song.m4a"), b"ftyp").unwrap();
    let notes = stderr(&ok(&pretrain(&data, &out, &["--size", "32"])));
    for words in [
        "sounds at 8000 Hz: log-mel spectrograms of 64 bands",
        "2 unreadable images",
        ".m4a file (1): unsupported format; convert them to WAV or FLAC",
    ] {
        assert!(notes.contains(words), "{words}: {notes}");
    }
    let skipped = fs::read_to_string(out.join("skipped.txt")).unwrap();
    assert!(skipped.contains("cut.flac: FLAC data is truncated or damaged"), "{skipped}");
    assert!(skipped.contains("empty.wav: "), "{skipped}");
    let plan = fs::read_to_string(out.join("plan.toml")).unwrap();
    assert!(plan.contains("rate = 8000") && plan.contains("mixup = 0.4"), "{plan}");

    ok(&["resume", text(&out), "--epochs", "4"]);
    for kind in ["knn", "linear", "finetune"] {
        let flags: &[&str] = if kind == "finetune" { &["--epochs", "1", "--labels", "100%"] } else { &[] };
        let result = json(&ok(&[&["eval", kind, text(&out), text(&data), "--json"], flags].concat()));
        assert!(result["rows"].is_array(), "{result}");
    }
    ok(&["eval", "label-free", text(&out), text(&data)]);
    let file = root.path().join("embeddings.npy");
    ok(&["embed", text(&out), text(&data), "-o", text(&file)]);
    let server = Server::start(&["explore", text(&file), "--port", "0", "--device", "cpu", "--map", "pca"]);
    assert!(String::from_utf8(server.get("/api/info").1).unwrap().contains("\"sounds\":true"));
    let (status, sound) = server.get("/sound/0");
    assert!(status == 200 && sound.starts_with(b"RIFF"), "{status}");
    assert_eq!((server.get("/sound/999").0, server.get("/thumb/0").0), (404, 200));
    drop(server);
    ok(&["search", text(&file), "--image", text(&data.join("rising/000.wav"))]);
    ok(&["views", text(&data), "-o", text(&root.path().join("views.png"))]);
    ok(&["report", text(&out), "-o", text(&root.path().join("report.html"))]);
    ok(&["export", text(&out), "-o", text(&root.path().join("encoder.onnx"))]);

    let image = root.path().join("image");
    fs::create_dir(&image).unwrap();
    fs::write(image.join("a.png"), b"\x89PNG\r\n\x1a\n").unwrap();
    let knn = ["eval", "knn", text(&out)];
    refused(&[&knn[..], &[text(&image)]].concat(), &["contains images, but the encoder was trained on sounds"]);
    refused(&[&knn[..], &[text(&data), "--channels", "1"]].concat(), &["trained on sounds", "omit `--channels`"]);
    refused(&["pack", text(&data), "-o", text(&root.path().join("shards"))], &["not sounds"]);
    let channels = ["views", text(&data), "--channels", "all", "-o", "x.png"];
    refused(&channels, &["contains sounds, not images", "omit `--channels`"]);
}

#[test]
fn sounds_are_labeled_by_a_table() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (root.path().join("data"), root.path().join("run"));
    fs::create_dir(&data).unwrap();
    let mut table = "path,label\n".to_owned();
    for i in 0..40 {
        fs::write(data.join(format!("{i}.wav")), glide(16_000, i)).unwrap();
        table += &format!("{i}.wav,{}\n", ["rising", "falling"][i % 2]);
    }
    fs::write(data.join("labels.csv"), table).unwrap();
    fs::write(data.join("cover.png"), b"\x89PNG\r\n\x1a\n").unwrap();
    let notes = stderr(&ok(&pretrain(&data, &out, &["--size", "32"])));
    for words in ["sounds with labels.csv", "image (1): not read beside sounds", "at 16000 Hz"] {
        assert!(notes.contains(words), "{words}: {notes}");
    }
    ok(&["eval", "knn", text(&out), text(&data)]);
    // The sounds of another sample rate are converted to that of the encoder.
    let one = root.path().join("one.wav");
    fs::write(&one, glide(8000, 3)).unwrap();
    ok(&["embed", text(&out), text(&one), "-o", text(&root.path().join("one.npy"))]);
    let (_, images, photos) = trained();
    refused(&["eval", "knn", text(photos), text(&data)], &["the encoder was trained on images, not on sounds"]);
    refused(&["eval", "knn", text(&out), text(images)], &["contains images, but the encoder was trained on sounds"]);
    refused(&["export", text(&out), "--format", "hf", "-o", text(&root.path().join("hub"))], &["not of sounds"]);
    fs::copy(out.join("encoder.safetensors"), root.path().join("copy.safetensors")).unwrap();
    let copy = root.path().join("copy.safetensors");
    ok(&["export", text(&copy), "-o", text(&root.path().join("copy.onnx"))]);
    ok(&["eval", "label-free", text(&copy), text(&data)]);
}

#[test]
fn sounds_beside_images_are_reported() {
    let root = tempfile::tempdir().unwrap();
    let folder = root.path().join("only");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("a.opus"), b"OggS").unwrap();
    let refused_views = |words: &[&str]| refused(&["views", text(&folder), "-o", "x.png"], words);
    refused_views(&["no images", "1 .opus file", "convert them to WAV or FLAC"]);
    fs::write(folder.join("b.wav"), b"RIFF\0\0\0\0WAVEfmt ").unwrap();
    refused_views(&["b.wav", "WAV"]);
    fs::write(folder.join("c.png"), b"not a PNG").unwrap();
    let warning = stderr(&run(&["views", text(&folder), "-o", "x.png"]));
    assert!(warning.contains("sound (1): not read beside image files; put them into a folder of"), "{warning}");
}
