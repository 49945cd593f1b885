//! Uses of an encoder through the real binary: embed, search, duplicates, outliers, select, export,
//! import; and other tools that read the files.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use crate::common::{
    Server, byol, bytes, embed, json, ok, pictures, pretrain, refused, run, skip, stderr, text, trained,
};

/// Python packages of the scripts.
const PACKAGES: [&str; 5] = ["numpy", "pyarrow", "polars", "onnxruntime", "safetensors"];

/// Python interpreter of the scripts: the one that `BYOL_PYTHON` names or, with `BYOL_TEST_PIP=1`,
/// one in a virtual environment that the packages are installed into. `None`, after reporting a
/// skip, if neither is set.
fn python() -> Option<PathBuf> {
    static ENVIRONMENT: OnceLock<PathBuf> = OnceLock::new();
    if let Some(named) = std::env::var_os("BYOL_PYTHON") {
        return Some(PathBuf::from(named));
    }
    if std::env::var_os("BYOL_TEST_PIP").is_none_or(|value| value != "1") {
        skip("reads files with other tools; set BYOL_PYTHON, or BYOL_TEST_PIP=1 to install them with pip");
        return None;
    }
    Some(ENVIRONMENT.get_or_init(install_packages).clone())
}

/// Creates a virtual environment with the packages, unless a previous test run has left one.
fn install_packages() -> PathBuf {
    let home = Path::new(env!("CARGO_TARGET_TMPDIR")).join("python");
    let python = home.join("bin/python");
    let imports = format!("import {}", PACKAGES.join(", "));
    if Command::new(&python).args(["-c", &imports]).output().is_ok_and(|o| o.status.success()) {
        return python;
    }
    let run = |command: &mut Command| {
        let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        assert!(output.status.success(), "{command:?}: {}", stderr(&output));
    };
    run(Command::new("python3").args(["-m", "venv", text(&home)]));
    run(Command::new(&python).args(["-m", "pip", "install", "-q", "--disable-pip-version-check"]).args(PACKAGES));
    run(Command::new(&python).args(["-c", &imports]));
    python
}

/// Runs a script and returns its standard output; `None` without an interpreter.
fn script(code: &str, args: &[&Path]) -> Option<String> {
    let output = Command::new(python()?).arg("-c").arg(code).args(args).output().unwrap();
    assert!(output.status.success(), "{}", stderr(&output));
    Some(String::from_utf8(output.stdout).unwrap())
}

#[test]
fn embeddings_agree_between_formats_and_shards() {
    let (_, data, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let before = bytes(encoder);
    let at = |name: &str| folder.path().join(name);
    for name in ["a.parquet", "a.npy", "a.csv"] {
        let result = json(&ok(&embed(encoder, data, &at(name), &["--json"])));
        assert_eq!((result["rows"].as_u64(), result["dim"].as_u64()), (Some(60), Some(32)), "{name}");
    }
    for part in ["1/3", "2/3", "3/3"] {
        ok(&embed(encoder, data, &at(&format!("{}.csv", &part[..1])), &["--shard", part]));
    }
    let csv = fs::read_to_string(at("a.csv")).unwrap();
    let part = |i: u32| fs::read_to_string(at(&format!("{i}.csv"))).unwrap();
    let rest = |text: String| text.split_once('\n').unwrap().1.to_owned();
    assert_eq!(csv, part(1) + &rest(part(2)) + &rest(part(3)));
    assert!(csv.lines().nth(1).unwrap().contains("even/000.png,even,"), "{csv}");
    assert_eq!(before, bytes(encoder), "the encoder is unchanged");
    let files: Vec<_> = fs::read_dir(folder.path()).unwrap().flatten().map(|e| e.file_name()).collect();
    assert!(files.iter().all(|n| !n.to_string_lossy().contains("partial")), "{files:?}");
    let code = "
import csv, sys, numpy, polars, pyarrow.parquet
parquet, npy, text = sys.argv[1:]
table = pyarrow.parquet.read_table(parquet)
assert table.column_names == ['path', 'label', 'embedding'], table.column_names
assert b'encoder_sha256' in table.schema.metadata[b'byol']
rows = numpy.stack(table['embedding'].to_numpy())
assert rows.dtype == numpy.float32 and rows.shape == (60, 32), (rows.dtype, rows.shape)
assert (numpy.load(npy) == rows).all()
paths = open(npy.replace('.npy', '.paths.txt')).read().splitlines()
assert paths == table['path'].to_pylist()
assert polars.read_parquet(parquet)['embedding'].to_numpy().shape == (60, 32)
lines = list(csv.reader(open(text)))[1:]
assert numpy.array_equal(numpy.array([l[2:] for l in lines], dtype=numpy.float32), rows)
print('read')
";
    if let Some(output) = script(code, &[&at("a.parquet"), &at("a.npy"), &at("a.csv")]) {
        assert_eq!(output, "read\n");
    }
}

#[test]
fn killed_embed_leaves_no_partial_output_and_resumes() {
    let (_, _, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("e.npy"));
    pictures(&data, 3000);
    let whole = folder.path().join("whole.npy");
    ok(&embed(encoder, &data, &whole, &[]));
    let partial = folder.path().join("e.npy.partial-rows");
    let mut child = byol(&embed(encoder, &data, &out, &["--threads", "1"])).spawn().unwrap();
    let record = 4 + 4 * 32;
    // Wait for some records.
    while fs::metadata(&partial).map_or(0, |m| m.len()) < 600 * record {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be killed");
    }
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(!out.exists());
    // A truncated record is computed again, and so are zeros, which a power failure may leave.
    let length = fs::metadata(&partial).unwrap().len();
    let file = fs::File::options().write(true).open(&partial).unwrap();
    file.set_len(length - 7).unwrap();
    file.set_len(length + 3 * record).unwrap();
    drop(file);
    refused(&embed(encoder, &data, &out, &["--shard", "1/2"]), &["written with another --shard", "partial"]);
    let output = ok(&embed(encoder, &data, &out, &[]));
    assert!(stderr(&output).contains("resuming at image"), "{}", stderr(&output));
    let (a, b) = (fs::read(&out).unwrap(), fs::read(&whole).unwrap());
    assert!(
        a == b,
        "the files differ first at byte {:?} of {} and {}",
        a.iter().zip(&b).position(|(a, b)| a != b),
        a.len(),
        b.len()
    );
    assert!(!partial.exists());
    refused(&embed(encoder, &data, &out, &[]), &["exists", "--overwrite"]);
    ok(&embed(encoder, &data, &out, &["--overwrite"]));
}

#[test]
fn unreadable_images_have_no_row() {
    let (_, _, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let (data, out) = (folder.path().join("data"), folder.path().join("e.csv"));
    pictures(&data, 9);
    fs::write(data.join("even/cut.png"), b"\x89PNG").unwrap();
    let result = json(&ok(&embed(encoder, &data, &out, &["--json"])));
    assert_eq!(result["rows"], 9);
    assert!(result["skipped"][0].as_str().unwrap().contains("cut.png"));
    assert_eq!(fs::read_to_string(&out).unwrap().lines().count(), 10);
}

#[test]
fn search_duplicates_outliers_and_select_agree_on_a_copy() {
    let (_, _, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let (data, e) = (folder.path().join("data"), folder.path().join("e.parquet"));
    pictures(&data, 40);
    let first = data.join("even/000.png");
    fs::copy(&first, data.join("odd/copy.png")).unwrap();
    ok(&embed(encoder, &data, &e, &[]));
    let found = json(&ok(&["search", text(&e), "--image", text(&first), "-k", "3", "--json", "--device", "cpu"]));
    let near = found["neighbors"].as_array().unwrap();
    assert_eq!(near.len(), 3);
    let names: Vec<&str> = near.iter().map(|n| n["path"].as_str().unwrap().rsplit('/').next().unwrap()).collect();
    assert_eq!(names[..2], ["000.png", "copy.png"]);
    assert!(near[1]["cosine"].as_f64().unwrap() > 0.9999);

    let found = json(&ok(&["duplicates", text(&e), "--threshold", "0.1", "--json"]));
    let groups = found["groups"].as_array().unwrap();
    let copies = groups.iter().find(|g| g[0].as_str().unwrap().ends_with("000.png")).unwrap();
    assert!(copies.as_array().unwrap().iter().any(|n| n.as_str().unwrap().ends_with("copy.png")));
    let (other, o) = (folder.path().join("other"), folder.path().join("o.npy"));
    fs::create_dir(&other).unwrap();
    fs::copy(&first, other.join("leaked.png")).unwrap();
    ok(&embed(encoder, &other, &o, &[]));
    let found = json(&ok(&["duplicates", text(&e), text(&o), "--json"]));
    let pair = &found["pairs"][0];
    assert!(pair["second"].as_str().unwrap().ends_with("leaked.png") && pair["share"].as_f64().unwrap() < 0.01);

    let found = json(&ok(&["outliers", text(&e), "-n", "5", "--json"]));
    let scores: Vec<f64> = found["outliers"].as_array().unwrap().iter().map(|o| o["score"].as_f64().unwrap()).collect();
    assert!(scores.len() == 5 && scores.windows(2).all(|w| w[0] >= w[1]));
    let chosen = String::from_utf8(ok(&["select", text(&e), "-n", "7"]).stdout).unwrap();
    let chosen: std::collections::HashSet<&str> = chosen.lines().collect();
    assert_eq!(chosen.len(), 7);

    // The same results as pictures.
    for (args, pictures, words) in [
        (&["outliers", text(&e), "-n", "5"][..], 5, "score "),
        (&["select", text(&e), "-n", "7"], 7, "in order of selection"),
        (&["duplicates", text(&e)], 2, "copy.png"),
        (&["duplicates", text(&e), text(&o)], 2, "leaked.png"),
    ] {
        let page = folder.path().join("page.html");
        let args = [args, &["--html", text(&page)]].concat();
        ok(&args);
        let html = fs::read_to_string(&page).unwrap();
        assert!(html.matches("data:image/png;base64,").count() >= pictures && html.contains(words), "{args:?}");
        refused(&args, &["exists", "--overwrite"]);
        fs::remove_file(&page).unwrap();
    }
    refused(&["outliers", text(&e), "--html", "page.txt"], &["`.html`"]);
}

/// Image `i` of random blocks, 60 × 48 pixels.
fn mosaic(i: u32) -> image::RgbImage {
    image::RgbImage::from_fn(60, 48, |x, y| {
        let mut block = (x / 6) * 31 + (y / 6) * 977 + i * 7919 + 1;
        for _ in 0..3 {
            block = (block ^ (block >> 15)).wrapping_mul(0x2C1B_3C6D);
        }
        image::Rgb([(block >> 24) as u8, (block >> 20) as u8, (block >> 16) as u8])
    })
}

/// Folder of 30 different images, a mirrored and cropped copy of the first and a darker, re-encoded
/// one of the second.
fn mosaics_with_copies(data: &Path) {
    fs::create_dir_all(data).unwrap();
    for i in 0..30 {
        mosaic(i).save(data.join(format!("{i:02}.png"))).unwrap();
    }
    let cropped = image::imageops::crop_imm(&mosaic(0), 5, 4, 50, 40).to_image();
    image::imageops::flip_horizontal(&cropped).save(data.join("copy-of-00.png")).unwrap();
    let mut darker = mosaic(1);
    darker.pixels_mut().for_each(|p| p.0 = p.0.map(|v| v / 3 * 2));
    darker.save(data.join("copy-of-01.jpg")).unwrap();
}

/// Near-duplicates that a page shows.
fn duplicates_of(server: &Server) -> serde_json::Value {
    loop {
        let found: serde_json::Value = serde_json::from_slice(&server.get("/api/duplicates").1).unwrap();
        match found["done"].is_null() {
            true => return found,
            false => std::thread::sleep(std::time::Duration::from_millis(50)),
        }
    }
}

#[test]
fn duplicates_are_confirmed_by_pixels() {
    let (_, _, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let (data, e) = (folder.path().join("data"), folder.path().join("e.parquet"));
    mosaics_with_copies(&data);
    ok(&embed(encoder, &data, &e, &[]));
    let output = ok(&["duplicates", text(&e), "--json"]);
    assert!(!stderr(&output).contains("unverified"), "{}", stderr(&output));
    let found = json(&output);
    let name = |path: &serde_json::Value| path.as_str().unwrap().rsplit('/').next().unwrap().to_owned();
    let groups: Vec<Vec<String>> =
        found["groups"].as_array().unwrap().iter().map(|g| g.as_array().unwrap().iter().map(name).collect()).collect();
    assert_eq!(groups, [["00.png", "copy-of-00.png"], ["01.png", "copy-of-01.jpg"]]);
    assert_eq!((&found["pairs"], &found["unverified"]), (&2.into(), &0.into()));
    let evidence = &found["evidence"][0]["evidence"];
    assert!(evidence["mirrored"] == true && evidence["correlation"].as_f64().unwrap() > 0.95, "{found}");
    assert!(evidence["text"].as_str().unwrap().starts_with("mirrored, common area"), "{found}");
    assert!((evidence["first_area"][0].as_f64().unwrap() - 5.0 / 60.0).abs() < 0.02, "{found}");
    assert_eq!(found["evidence"][1]["evidence"]["mirrored"], false);

    // The same verdict on leakage, in a selection, on the page and in packed data.
    let (other, o) = (folder.path().join("other"), folder.path().join("o.npy"));
    fs::create_dir(&other).unwrap();
    for i in [0, 40, 41] {
        image::imageops::flip_horizontal(&mosaic(i)).save(other.join(format!("{i}.png"))).unwrap();
    }
    ok(&embed(encoder, &other, &o, &[]));
    let leaked = json(&ok(&["duplicates", text(&e), text(&o), "--json"]));
    let pairs = leaked["pairs"].as_array().unwrap();
    assert!(pairs.len() == 2 && pairs.iter().all(|p| name(&p["second"]) == "0.png"), "{leaked}");
    assert!(pairs.iter().all(|p| p["verified"] == true), "{leaked}");
    let output = ok(&["select", text(&e), "-n", "32", "--json"]);
    assert!(stderr(&output).contains("selected 30 images only"), "{}", stderr(&output));
    assert_eq!(json(&output)["left_out"].as_array().unwrap().len(), 2);
    let server = Server::start(&["explore", text(&e), "--port", "0", "--map", "pca"]);
    let shown = duplicates_of(&server);
    assert_eq!((&shown["total"], &shown["unreadable"]), (&2.into(), &0.into()));
    assert!(shown["groups"][0][1]["evidence"]["mirrored"] == true && shown["groups"][0][1]["verified"] == true);
    assert!(shown["groups"][0][0]["evidence"].is_null());
    let (shards, s) = (folder.path().join("shards"), folder.path().join("s.csv"));
    ok(&["pack", text(&data), "-o", text(&shards)]);
    ok(&embed(encoder, &shards, &s, &[]));
    let packed = json(&ok(&["duplicates", text(&s), "--json"]));
    assert_eq!((&packed["pairs"], &packed["unverified"]), (&2.into(), &0.into()));

    // Without the images, the embeddings alone decide, and the output says so.
    let moved = folder.path().join("moved");
    fs::rename(&data, &moved).unwrap();
    let output = ok(&["duplicates", text(&e), "--json", "--threshold", "0.9"]);
    assert!(stderr(&output).contains("unverified") && stderr(&output).contains("`--data`"), "{}", stderr(&output));
    let found = json(&output);
    assert_eq!(found["unverified"], found["pairs"]);
    assert!(found["evidence"].as_array().unwrap().iter().all(|p| p["verified"] == false), "{found}");
    let found = json(&ok(&["duplicates", text(&e), "--json", "--data", text(&moved)]));
    assert_eq!((&found["pairs"], &found["unverified"]), (&2.into(), &0.into()));
    let leaked = json(&ok(&["duplicates", text(&e), text(&o), "--json", "--data", text(&moved)]));
    assert_eq!((leaked["pairs"].as_array().unwrap().len(), &leaked["unverified"]), (2, &0.into()));
}

#[test]
fn hub_folder_is_an_encoder_with_a_model_card() {
    let (_, data, small) = trained();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let (run, hub) = (at("run"), at("my-model"));
    let flags = ["--width", "1", "--size", "32", "--set", "encoder.stem=imagenet", "--epochs", "1"];
    ok(&pretrain(data, &run, &[&flags[..], &["--warmup-epochs", "0"]].concat()));
    ok(&["eval", "knn", text(&run), text(data), "--device", "cpu"]);
    let export = ["export", text(&run), "--format", "hf", "-o", text(&hub)];
    ok(&export);
    refused(&export, &["exists", "--overwrite"]);
    let card = fs::read_to_string(hub.join("README.md")).unwrap();
    for words in
        ["library_name: timm", "local-dir:my-model", "| epochs | 1 of 1 |", "| knn | data | kNN accuracy, k = 20 |"]
    {
        assert!(card.contains(words), "{words}: {card}");
    }
    let [own, exported] = [(&run, "own.npy"), (&hub, "hub.npy")].map(|(encoder, out)| {
        ok(&embed(encoder, data, &at(out), &[]));
        fs::read(at(out)).unwrap()
    });
    assert!(own == exported);
    refused(&["export", text(small), "--format", "hf", "-o", text(&at("x"))], &["width 0.0625", "NAME.safetensors"]);
    refused(&["export", text(small), "--format", "onnx", "-o", "x.bin"], &["`.onnx`"]);
}

#[test]
fn exports_compute_the_same_features_in_other_tools() {
    let (_, _, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    for (name, flags) in [("a.onnx", &[][..]), ("b.onnx", &["--normalized-input"]), ("a.safetensors", &[])] {
        let out = at(name);
        let args = [&["export", text(encoder), "-o", text(&out), "--json"], flags].concat();
        let result = json(&ok(&args));
        assert!(result["largest_difference"].as_f64().unwrap() < 1e-4, "{name} {result}");
        refused(&args, &["exists", "--overwrite"]);
    }
    let code = "
import json, sys, numpy, onnxruntime
a, b = [onnxruntime.InferenceSession(p, providers=['CPUExecutionProvider']) for p in sys.argv[1:3]]
meta = a.get_modelmeta().custom_metadata_map
n = json.loads(meta['normalization'])
mean, std = [numpy.array(n[k], dtype=numpy.float32).reshape(1, 3, 1, 1) for k in ('mean', 'std')]
for batch in (1, 5):
    side = a.get_inputs()[0].shape[2]
    x = numpy.random.default_rng(batch).random((batch, 3, side, side), dtype=numpy.float32)
    (f,), (g,) = a.run(None, {'images': x}), b.run(None, {'images': (x - mean) / std})
    assert f.shape == (batch, 32), f.shape
    assert abs(f - g).max() < 1e-4 * abs(f).max()
print(meta['largest difference from byol'])
";
    if let Some(output) = script(code, &[&at("a.onnx"), &at("b.onnx")]) {
        assert!(output.contains("images"), "{output}");
    }
}

/// Whether the interpreter has torchvision: at 5 GB it is only used from `BYOL_PYTHON`, never
/// installed.
fn has_torchvision() -> bool {
    let Some(python) = python() else { return false };
    let import = Command::new(python).args(["-c", "import torch, torchvision"]).output();
    let found = import.is_ok_and(|o| o.status.success());
    if !found {
        skip("torchvision is not installed; set BYOL_PYTHON to an interpreter that has it");
    }
    found
}

#[test]
fn torchvision_checkpoint_round_trips() {
    if !has_torchvision() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let code = "
import sys, torch, torchvision
torch.manual_seed(0)
model = torchvision.models.resnet50()
model.train()
with torch.no_grad():
    model(torch.rand(4, 3, 64, 64))
torch.save({'epoch': 3, 'state_dict': {'module.backbone.' + k: v for k, v in model.state_dict().items()}}, sys.argv[1])
torch.save(model.state_dict(), sys.argv[2])
";
    script(code, &[&at("a.pth"), &at("b.pth")]).unwrap();
    for name in ["a", "b"] {
        let (encoder, onnx) = (at(&format!("{name}.safetensors")), at(&format!("{name}.onnx")));
        ok(&["import", text(&at(&format!("{name}.pth"))), "-o", text(&encoder), "--size", "64"]);
        ok(&["export", text(&encoder), "-o", text(&onnx), "--normalized-input"]);
    }
    let code = "
import sys, numpy, onnxruntime, torch, torchvision
model = torchvision.models.resnet50()
model.load_state_dict(torch.load(sys.argv[1]))
model.fc = torch.nn.Identity()
model.eval()
x = torch.rand(3, 3, 64, 64)
with torch.no_grad():
    want = model(x).numpy()
for path in sys.argv[2:4]:
    (got,) = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider']).run(None, {'images': x.numpy()})
    assert abs(got - want).max() < 1e-4 * abs(want).max(), abs(got - want).max()
# And back: strict except for the classifier.
from safetensors.torch import load_file
model = torchvision.models.resnet50()
state = load_file(sys.argv[4])
missing, unexpected = model.load_state_dict(state, strict=False)
assert set(missing) == {'fc.weight', 'fc.bias'} and not unexpected, (missing, unexpected)
print('same')
";
    let args = ["b.pth", "a.onnx", "b.onnx", "a.safetensors"].map(at);
    let output = script(code, &args.each_ref().map(|p| p.as_path())).unwrap();
    assert_eq!(output, "same\n");
}

#[test]
fn foreign_resnets_can_be_imported_and_initialize_runs() {
    let (_, data, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    // Our file without its metadata, under solo-learn's names.
    let own = bytes(encoder);
    let n = u64::from_le_bytes(own[..8].try_into().unwrap()) as usize;
    let mut head: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(&own[8..8 + n]).unwrap();
    head.remove("__metadata__");
    let renamed: serde_json::Map<_, _> =
        head.into_iter().map(|(k, v)| (format!("state_dict.backbone.{k}"), v)).collect();
    let head = serde_json::to_vec(&renamed).unwrap();
    let foreign = at("foreign.safetensors");
    fs::write(&foreign, [&(head.len() as u64).to_le_bytes()[..], &head, &own[8 + n..]].concat()).unwrap();
    refused(&["eval", "knn", text(&foreign), text(data)], &["byol import"]);
    let imported = at("imported.safetensors");
    let spec = json(&ok(&["import", text(&foreign), "-o", text(&imported), "--size", "16", "--json"]));
    assert_eq!((spec["encoder"]["architecture"].as_str(), spec["features"].as_u64()), (Some("resnet18"), Some(32)));
    let (a, b) = (at("a.npy"), at("b.npy"));
    let norm = ["--mean", "0.4914,0.4822,0.4465", "--std", "0.2470,0.2435,0.2616", "--overwrite"];
    ok(&[&["import", text(&foreign), "-o", text(&imported), "--size", "16"][..], &norm].concat());
    ok(&embed(encoder, data, &a, &[]));
    ok(&embed(&imported, data, &b, &[]));
    let (a, b) = (fs::read(a).unwrap(), fs::read(b).unwrap());
    assert_eq!(a.len(), b.len());
    let out = at("run");
    ok(&pretrain(data, &out, &["--init", text(&foreign), "--epochs", "2"]));
    let plan = fs::read_to_string(out.join("plan.toml")).unwrap();
    assert!(plan.contains("foreign.safetensors"), "{plan}");
    // `auto` adopts the architecture of the file.
    let auto = at("auto");
    ok(&["pretrain", text(data), "--out", text(&auto), "--init", text(&foreign), "--epochs", "1", "--hidden", "16"]);
    assert!(fs::read_to_string(auto.join("plan.toml")).unwrap().contains("width = 0.0625"));
    let other = at("other");
    refused(&pretrain(data, &other, &["--init", text(&foreign), "--width", "0.125"]), &["width 0.0625", "--init"]);
    assert!(!other.exists());
    // A pickle that runs a program when loaded is read without running it.
    let evil = at("evil.pth");
    let ran = at("ran");
    let pickle = format!("cos\nsystem\n(S'touch {}'\ntR.", ran.display());
    fs::write(&evil, pickle).unwrap();
    refused(&["import", text(&evil), "-o", text(&at("x.safetensors"))], &["cannot import", "evil.pth"]);
    assert!(!ran.exists() && !at("x.safetensors").exists());
}

#[test]
fn explore_serves_only_this_machine() {
    let (_, _, encoder) = trained();
    let server = Server::start(&["explore", text(encoder), "--port", "0", "--device", "cpu"]);
    let json = |path: &str| -> serde_json::Value {
        let (status, body) = server.get(path);
        assert_eq!(status, 200, "{path}");
        serde_json::from_slice(&body).unwrap_or_else(|e| panic!("{path}: {e}: {}", String::from_utf8_lossy(&body)))
    };
    for (path, words) in [("/", "<title>byol explore"), ("/page.js", "webgl"), ("/page.css", "--ink")] {
        let (status, body) = server.get(path);
        assert!(status == 200 && String::from_utf8_lossy(&body).contains(words), "{path}");
    }
    let info = json("/api/info");
    let n = info["images"].as_u64().unwrap() as usize;
    assert!(n == 60 && info["classes"].as_array().unwrap().len() == 2, "{info}");
    let (_, points) = server.get("/api/points");
    assert_eq!(points.len(), 12 * n);
    assert_eq!(server.get("/api/scores").1.len(), 4 * n);
    assert_eq!(json("/api/paths")["paths"].as_array().unwrap().len(), n);
    assert_eq!(json("/api/neighbors/3?n=5").as_array().unwrap().len(), 5);
    assert_eq!(json("/api/outliers?n=7").as_array().unwrap().len(), 7);
    assert!(duplicates_of(&server)["groups"].is_array());
    assert_eq!(json("/api/clusters")["clusters"].as_array().unwrap().len(), n);
    assert!(json("/api/curves")["epochs"].as_array().unwrap().len() > 1);
    let (status, png) = server.get("/thumb/0?px=64");
    assert!(status == 200 && png.starts_with(b"\x89PNG"));
    let ask = |body: &str, headers: &[&str]| {
        let length = format!("Content-Length: {}", body.len());
        let host = server.host();
        let all = [&[host.as_str(), "Content-Type: application/json", &length], headers].concat();
        server.ask("POST /api/probe", &all, body.as_bytes())
    };
    let (status, _, body) = ask("{\"rows\":[[0,0],[30,1]]}", &[]);
    let answer: serde_json::Value = serde_json::from_slice(&body).unwrap();
    assert!(status == 200 && answer["predictions"].as_array().unwrap().len() == n && answer["predictions"][30] == 1);

    // Only images of the embeddings, only files in the data folder.
    for path in [
        "/thumb/60",
        "/thumb/-1",
        "/thumb/..%2f..%2fetc%2fpasswd",
        "/thumb/../plan.toml",
        "/etc/passwd",
        "/..%2fplan.toml",
    ] {
        let (status, body) = server.get(path);
        assert!((400..500).contains(&status), "{path}: {status}");
        assert!(!String::from_utf8_lossy(&body).contains("recipe"), "{path}");
    }
    // Other host names and cross-site requests.
    let foreign = format!("Host: evil.example:{}", server.port);
    assert_eq!(server.ask("GET /api/info", &[&foreign], b"").0, 403);
    assert_eq!(server.ask("GET /api/info", &[], b"").0 / 100, 4);
    assert_eq!(server.ask("GET /thumb/0", &[&server.host(), "Sec-Fetch-Site: cross-site"], b"").0, 403);
    assert_eq!(ask("{\"rows\":[[0,0]]}", &["Origin: http://evil.example"]).0, 403);
    // A port forwarded by SSH, and another page of this machine.
    let forwarded = "Host: localhost:9999";
    assert_eq!(server.ask("GET /api/info", &[forwarded, "Origin: http://localhost:9999"], b"").0, 200);
    assert_eq!(server.ask("GET /api/info", &[forwarded, "Origin: http://localhost:3000"], b"").0, 403);
    assert_eq!(server.ask("GET /api/info", &["Host: localhost.evil.example"], b"").0, 403);
    // Requests that are too large or invalid.
    assert_eq!(ask(&format!("{{\"rows\":[{}[0,0]]}}", "[0,0],".repeat(300_000)), &[]).0, 413);
    assert_eq!(ask("{\"rows\":[[999,0]]}", &[]).0, 400);
    let (_, head, _) = server.ask("GET /", &[&server.host()], b"");
    assert!(head.to_ascii_lowercase().contains("content-security-policy"), "{head}");
    // The port is in use.
    refused(&["explore", text(encoder), "--port", &server.port.to_string()], &["cannot listen", "--port"]);
    // The embeddings and the map are saved in the run.
    let saved = fs::read_dir(encoder.join("explore")).unwrap().count();
    assert_eq!(saved, 2, "embeddings and map");
}

#[test]
fn explore_serves_no_files_outside_the_data() {
    let (_, _, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let (data, e) = (folder.path().join("data"), folder.path().join("e.npy"));
    pictures(&data, 20);
    ok(&embed(encoder, &data, &e, &[]));
    // A list of paths with one outside of the data.
    let secret = folder.path().join("secret.png");
    fs::copy(data.join("even/000.png"), &secret).unwrap();
    let list = folder.path().join("e.paths.txt");
    let paths = fs::read_to_string(&list).unwrap();
    let first = paths.lines().next().unwrap().to_owned();
    fs::write(&list, paths.replacen(&first, text(&secret), 1)).unwrap();
    let server = Server::start(&["explore", text(&e), "--port", "0", "--map", "pca"]);
    assert_eq!((server.get("/thumb/0").0, server.get("/thumb/1").0), (404, 200));
}

#[test]
fn report_is_a_self_contained_file() {
    let (_, data, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("report.html");
    ok(&["eval", "knn", text(encoder), text(data), "--device", "cpu"]);
    let args = ["report", text(encoder), "-o", text(&out), "--device", "cpu", "--json"];
    assert_eq!(json(&ok(&args))["images"], 60);
    refused(&args, &["exists", "--overwrite"]);
    let html = fs::read_to_string(&out).unwrap();
    for words in [
        "<h2>Summary</h2>",
        "data:image/png;base64,",
        "<polyline",
        "kNN accuracy, k = 20",
        "plan.toml",
        "<circle",
        "<h2>Near-duplicates</h2>",
    ] {
        assert!(html.contains(words), "{words}");
    }
    for external in ["http://", "https://", "src=\"/", "href="] {
        let found = html.replace("http://www.w3.org/2000/svg", "").contains(external);
        assert!(!found, "{external} is in the file");
    }
    refused(&["report", text(data)], &["plan.toml"]);
}

#[test]
fn rejects_invalid_embeddings() {
    let (_, data, encoder) = trained();
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let e = at("e.parquet");
    ok(&embed(encoder, data, &e, &[]));
    let image = data.join("even/000.png");
    let search = |e: &Path, more: &[&str]| -> Vec<String> {
        let args = [&["search", text(e), "--image", text(&image), "--device", "cpu"], more].concat();
        args.into_iter().map(str::to_owned).collect()
    };
    let refuse = |args: &[String], words: &[&str]| {
        refused(&args.iter().map(String::as_str).collect::<Vec<_>>(), words);
    };
    refuse(&search(&at("none.parquet"), &[]), &["cannot read", "none.parquet"]);
    let cut = at("cut.parquet");
    let whole = fs::read(&e).unwrap();
    fs::write(&cut, &whole[..whole.len() / 2]).unwrap();
    refuse(&search(&cut, &[]), &["cut.parquet", "invalid embeddings"]);
    let text_file = at("a.txt");
    fs::write(&text_file, "x").unwrap();
    refuse(&search(&text_file, &[]), &[".parquet, .npy or .csv"]);
    // A different encoder.
    let out = at("run");
    ok(&pretrain(data, &out, &["--seed", "9", "--epochs", "1", "--warmup-epochs", "0"]));
    refuse(&search(&e, &["--encoder", text(&out)]), &["another encoder"]);
    let o = at("o.parquet");
    ok(&embed(&out, data, &o, &[]));
    refused(&["duplicates", text(&e), text(&o)], &["different encoders"]);
    // A missing query image, a deleted encoder, an empty folder.
    refused(&["search", text(&e), "--image", "none.png"], &["none.png"]);
    fs::remove_dir_all(&out).unwrap();
    refuse(&search(&o, &[]), &["cannot read encoder", "--encoder"]);
    let empty = at("empty");
    fs::create_dir(&empty).unwrap();
    refused(&embed(encoder, &empty, &at("x.npy"), &[]), &["no images in"]);
    refused(&embed(encoder, data, &at("x.npy"), &["--shard", "3/2"]), &["invalid shard `3/2`", "1 to N"]);
    refused(&embed(encoder, data, &at("x.txt"), &[]), &[".parquet, .npy or .csv"]);
    refused(&["select", text(&e), "-n", "1000"], &["`-n` must be from 1 to 60"]);
    assert!(!run(&["duplicates", text(&e), "--threshold", "7"]).status.success());
}
