//! Images of any number of channels and bit depth.

use std::{fs, path::Path};

use crate::common::{json, ok, pretrain, refused, run, stderr, text};

/// A NumPy array `uint16 [12, 10, channels]`, as `numpy.save` writes it.
fn npy(channels: usize, value: impl Fn(usize, usize) -> u16) -> Vec<u8> {
    let mut header = format!("{{'descr': '<u2', 'fortran_order': False, 'shape': (12, 10, {channels}), }}");
    header.extend(std::iter::repeat_n(' ', 117 - header.len()));
    header.push('\n');
    let values = (0..120 * channels).flat_map(|i| value(i / channels, i % channels).to_le_bytes());
    [b"\x93NUMPY\x01\x00\x76\x00", header.as_bytes()].concat().into_iter().chain(values).collect()
}

/// Writes `n` arrays of two classes: stripes in two directions, with other values in each channel.
fn arrays(folder: &Path, n: usize, channels: usize) {
    for i in 0..n {
        let class = folder.join(["across", "down"][i % 2]);
        fs::create_dir_all(&class).unwrap();
        let value = |pixel: usize, c: usize| {
            let at = if i % 2 == 0 { pixel / 10 } else { pixel % 10 };
            (1000 + 300 * c + (at * (i + 3) * 700) % 9000) as u16
        };
        fs::write(class.join(format!("{i:03}.npy")), npy(channels, value)).unwrap();
    }
}

#[test]
fn five_channels_from_files_to_embeddings() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (root.path().join("data"), root.path().join("run"));
    arrays(&data, 60, 5);
    let output = ok(&pretrain(&data, &out, &["--channels", "all", "--augment", "overhead"]));
    let notes = stderr(&output);
    assert!(notes.contains("5 channels, with ranges detected") && notes.contains("5 channels"), "{notes}");
    assert!(notes.contains("channel           low") && notes.contains("      5          "), "{notes}");
    let plan = fs::read_to_string(out.join("plan.toml")).unwrap();
    assert!(plan.contains("channels = 5\n"), "{plan}");

    ok(&["resume", text(&out), "--epochs", "4"]);
    let knn = json(&ok(&["eval", "knn", text(&out), text(&data), "--json"]));
    assert!(knn["rows"].is_array(), "{knn}");
    ok(&["eval", "label-free", text(&out), text(&data)]);
    let file = root.path().join("embeddings.npy");
    ok(&["embed", text(&out), text(&data), "-o", text(&file)]);
    let first = data.join("across/000.npy");
    ok(&["search", text(&file), "--image", text(&first)]);
    ok(&["views", text(&data), "--channels", "5,1,2", "-o", text(&root.path().join("views.png"))]);
    let sheet = root.path().join("sheet.png");
    let channels = ["views", text(&data), "--channels", "all", "--by-channel", "-n", "3", "-o", text(&sheet)];
    assert!(stderr(&ok(&channels)).contains("3 images, each with its 5 channels"));
    ok(&["report", text(&out), "-o", text(&root.path().join("report.html"))]);
    ok(&["export", text(&out), "-o", text(&root.path().join("encoder.onnx"))]);
    refused(&["export", text(&out), "--format", "hf", "-o", text(&root.path().join("hub"))], &["width"]);

    let other = root.path().join("other");
    arrays(&other, 8, 4);
    let output = run(&["embed", text(&out), text(&other), "-o", text(&root.path().join("other.npy"))]);
    assert!(!output.status.success() && stderr(&output).contains("it has 4 channels, not 5"), "{}", stderr(&output));
    let eval = |flag: &str, value: &str, words: &[&str]| {
        refused(&["eval", "knn", text(&out), text(&data), flag, value], words);
    };
    eval("--channels", "1,2", &["trained with `--channels all`", "hint: omit `--channels`"]);
    eval("--levels", "0,9", &["has a range for each channel"]);
    ok(&["eval", "knn", text(&out), text(&data), "--channels", "all"]);
    refused(&["pack", text(&data), "-o", text(&root.path().join("packed")), "--channels", "all"], &["RGB"]);
    let file = root.path().join("copy.onnx");
    ok(&["export", text(&out.join("encoder.safetensors")), "-o", text(&file)]);
}

#[test]
fn gray_of_16_bits_is_one_channel() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (root.path().join("data"), root.path().join("run"));
    fs::create_dir(&data).unwrap();
    for i in 0..40u16 {
        let gray = image::ImageBuffer::from_fn(20, 16, |x, y| {
            image::Luma([500 + 40 * ((x as u16 * (i + 1) + y as u16 * 7) % 100)])
        });
        gray.save(data.join(format!("{i}.png"))).unwrap();
    }
    ok(&pretrain(&data, &out, &["--channels", "all"]));
    assert!(fs::read_to_string(out.join("plan.toml")).unwrap().contains("channels = 1\n"));
    // The weights of an RGB encoder start one of other channels.
    let (rgb, four) = (root.path().join("rgb"), root.path().join("four"));
    ok(&pretrain(&data, &rgb, &[]));
    arrays(&four, 40, 4);
    let started = root.path().join("started");
    ok(&pretrain(&four, &started, &["--channels", "all", "--init", text(&rgb)]));
}

#[test]
fn images_of_several_files() {
    let root = tempfile::tempdir().unwrap();
    let (data, out) = (root.path().join("data"), root.path().join("run"));
    for i in 0..40usize {
        let folder = data.join(["forest", "sea"][i % 2]);
        fs::create_dir_all(&folder).unwrap();
        let bands = [("b1", 1), ("b2", 3)];
        for (name, channels) in bands {
            let value = |pixel: usize, c: usize| (1000 + 300 * c + (pixel % 10 * (i + 3) * 700) % 9000) as u16;
            fs::write(folder.join(format!("tile{i}_{name}.npy")), npy(channels, value)).unwrap();
        }
    }
    fs::remove_file(data.join("sea/tile1_b2.npy")).unwrap();
    fs::write(data.join("sea/other.npy"), npy(1, |_, _| 1)).unwrap();
    let files = "{id}_b1.npy,{id}_b2.npy";
    let notes = stderr(&ok(&pretrain(&data, &out, &["--channels", files])));
    for words in [
        "4 channels, with ranges detected",
        "image file without a pattern of `--channels` (1): not a file of an image",
        "skipped 1 unreadable image",
    ] {
        assert!(notes.contains(words), "{words}: {notes}");
    }
    let skipped = fs::read_to_string(out.join("skipped.txt")).unwrap();
    assert!(skipped.contains("tile1_b1.npy: its file tile1_b2.npy does not exist"), "{skipped}");
    let knn = json(&ok(&["eval", "knn", text(&out), text(&data), "--json"]));
    assert!(knn["rows"].is_array(), "{knn}");
    let file = root.path().join("embeddings.parquet");
    ok(&["embed", text(&out), text(&data), "-o", text(&file)]);
    ok(&["search", text(&file), "--image", text(&data.join("forest/tile0_b1.npy"))]);
    let views = |channels: &str, words: &[&str]| {
        refused(&["views", text(&data), "--channels", channels, "-o", "x.png"], words);
    };
    views("{id}_x.npy,{id}_b1.npy", &["no images", "patterns of `--channels`"]);
    views("{id},{id}_b1.npy", &["invalid file pattern `{id}`"]);
    refused(
        &["eval", "knn", text(&out), text(&data), "--channels", "all"],
        &["the encoder was trained with `--channels {id}_b1.npy,{id}_b2.npy`"],
    );
}

#[test]
fn unusable_channels_are_refused_with_the_remedy() {
    let root = tempfile::tempdir().unwrap();
    let case = |name: &str| {
        let folder = root.path().join(name);
        fs::create_dir(&folder).unwrap();
        folder
    };
    let views = |data: &Path, channels: &str, words: &[&str]| {
        refused(&["views", text(data), "--channels", channels, "-o", text(&root.path().join("views.png"))], words);
    };
    let constant = case("constant");
    for i in 0..9 {
        let value = |pixel: usize, c: usize| if c == 1 { 7 } else { (pixel * (i + 1)) as u16 };
        fs::write(constant.join(format!("{i}.npy")), npy(3, value)).unwrap();
    }
    views(&constant, "all", &["channel 2: every pixel has the value 7", "hint: leave it out with `--channels`"]);
    views(&constant, "3,2", &["channel 2"]);
    ok(&["views", text(&constant), "--channels", "1,3", "-o", text(&root.path().join("two.png"))]);
    views(&constant, "4", &["it has 3 channels and no channel 4"]);
    views(&constant, "0", &["invalid channels `0`"]);

    let mixed = case("mixed");
    for i in 0..9usize {
        fs::write(mixed.join(format!("{i}.npy")), npy(3 + i % 2, |pixel, c| (pixel * (c + 2)) as u16)).unwrap();
    }
    views(&mixed, "all", &["the images differ in their number of channels", "has 3", "has 4"]);
}
