//! Helpers that run the real binary.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::TcpStream,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::OnceLock,
};

use image::{Rgb, RgbImage};
use tempfile::TempDir;

pub fn byol(args: &[&str]) -> Command {
    let mut command = Command::new(program());
    command.args(args);
    command
}

/// The program of this build, or the one that `BYOL_TEST_PROGRAM` names.
fn program() -> PathBuf {
    std::env::var_os("BYOL_TEST_PROGRAM").map_or_else(|| env!("CARGO_BIN_EXE_byol").into(), PathBuf::from)
}

pub fn run(args: &[&str]) -> Output {
    byol(args).output().expect("the binary runs")
}

/// Reports that a test cannot run here. Written past libtest's capture, so that a skip is always
/// visible; with `BYOL_REQUIRE_ALL` set, the test fails instead.
pub fn skip(reason: &str) {
    let test = std::thread::current().name().unwrap_or("test").to_owned();
    assert!(std::env::var_os("BYOL_REQUIRE_ALL").is_none(), "{test} cannot run: {reason}");
    let _ = std::io::stderr().write_all(format!("SKIPPED {test}: {reason}\n").as_bytes());
}

pub fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Runs a command that must succeed.
pub fn ok(args: &[&str]) -> Output {
    let output = run(args);
    assert!(output.status.success(), "{args:?}: {}", stderr(&output));
    output
}

/// Runs a command that must fail with an error, hint included, that contains all of `words`.
/// Returns the error line.
pub fn refused(args: &[&str], words: &[&str]) -> String {
    let output = run(args);
    assert!(!output.status.success(), "{args:?} succeeds");
    let text = stderr(&output);
    let line =
        text.lines().find(|l| l.starts_with("error:")).unwrap_or_else(|| panic!("{args:?} printed no error: {text}"));
    let message = &text[text.find("error:").unwrap_or_default()..];
    for word in words {
        assert!(message.contains(word), "`{word}` is not in: {message}");
    }
    assert!(!text.contains("panicked"), "{text}");
    line.to_owned()
}

pub fn json(output: &Output) -> serde_json::Value {
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(text.trim()).unwrap_or_else(|e| panic!("one JSON object on standard output, not {text}: {e}"))
}

/// Writes `n` small images into two class folders. The contents depend only on the index.
pub fn pictures(folder: &Path, n: u32) {
    for i in 0..n {
        let class = folder.join(if i % 2 == 0 { "even" } else { "odd" });
        std::fs::create_dir_all(&class).unwrap();
        let picture = RgbImage::from_fn(20, 16, |x, y| {
            let v = |k: u32| ((x * (3 + i % 5) + y * (2 + i % 7) * k + i * 37 * k) % 256) as u8;
            Rgb([v(1), v(2), v(3)])
        });
        picture.save(class.join(format!("{i:03}.png"))).unwrap();
    }
}

/// Flags of a run that takes a second or two.
pub const SMALL: [&str; 20] = [
    "--encoder",
    "resnet18",
    "--width",
    "0.0625",
    "--size",
    "16",
    "--batch",
    "8",
    "--epochs",
    "3",
    "--hidden",
    "16",
    "--projection",
    "8",
    "--warmup-epochs",
    "1",
    "--device",
    "cpu",
    // Not measured: either precision may be faster for so small a network.
    "--precision",
    "f32",
];

pub fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are text")
}

pub fn bytes(run: &Path) -> Vec<u8> {
    std::fs::read(run.join("encoder.safetensors")).expect("the run has an encoder")
}

/// Tensors of the latest checkpoint.
pub fn newest_state(run: &Path) -> Vec<u8> {
    let mut all: Vec<PathBuf> =
        std::fs::read_dir(run.join("checkpoints")).unwrap().map(|e| e.unwrap().path()).collect();
    all.sort();
    std::fs::read(all.last().expect("a checkpoint").join("state.safetensors")).unwrap()
}

/// Writes `n` scenes of a green field below a blue sky, with their masks; one pixel of each is
/// void.
pub fn masked(folder: &Path, n: u32) {
    use image::{GrayImage, Luma};
    for sub in ["images", "masks"] {
        std::fs::create_dir_all(folder.join(sub)).unwrap();
    }
    for i in 0..n {
        let border = 10 + i % 20;
        let noise = |x: u32, y: u32| ((x * 7 + y * 13 + i * 5) % 40) as u8;
        let scene = RgbImage::from_fn(48, 40, |x, y| {
            if y < border { Rgb([60, 90, 200 + noise(x, y)]) } else { Rgb([40 + noise(x, y), 180, 40]) }
        });
        let mask = GrayImage::from_fn(48, 40, |x, y| Luma([if x == 0 && y == 0 { 2 } else { u8::from(y >= border) }]));
        scene.save(folder.join(format!("images/{i:02}.png"))).unwrap();
        mask.save(folder.join(format!("masks/{i:02}.png"))).unwrap();
    }
    std::fs::write(folder.join("classes.txt"), "sky\nfield\nVoid\n").unwrap();
}

/// Arguments of `byol pretrain DATA --out OUT` with the flags of [`SMALL`] and `more`.
pub fn pretrain<'a>(data: &'a Path, out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    [&["pretrain", text(data), "--out", text(out)], &SMALL[..], more].concat()
}

/// A folder of images and a run on them, of a few steps: (folder that holds both, data, run).
pub fn trained() -> &'static (TempDir, PathBuf, PathBuf) {
    static TRAINED: OnceLock<(TempDir, PathBuf, PathBuf)> = OnceLock::new();
    TRAINED.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let (data, out) = (folder.path().join("data"), folder.path().join("run"));
        pictures(&data, 60);
        ok(&pretrain(&data, &out, &[]));
        (folder, data, out)
    })
}

pub fn embed<'a>(encoder: &'a Path, data: &'a Path, out: &'a Path, more: &[&'a str]) -> Vec<&'a str> {
    [&["embed", text(encoder), text(data), "-o", text(out), "--device", "cpu"][..], more].concat()
}

/// A `byol explore` process that is killed when dropped.
pub struct Server {
    child: Child,
    pub port: u16,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Server {
    pub fn start(args: &[&str]) -> Server {
        let mut child = byol(args).stderr(Stdio::piped()).spawn().unwrap();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let port = lines.map_while(Result::ok).find_map(|line| {
            let (_, rest) = line.split_once("http://127.0.0.1:")?;
            rest.split(' ').next()?.parse().ok()
        });
        Server { child, port: port.expect("the server prints its address") }
    }

    /// See [`ask`].
    pub fn ask(&self, first: &str, headers: &[&str], body: &[u8]) -> (u16, String, Vec<u8>) {
        ask(self.port, first, headers, body)
    }

    pub fn get(&self, path: &str) -> (u16, Vec<u8>) {
        let (status, _, body) = self.ask(&format!("GET {path}"), &[&self.host()], b"");
        (status, body)
    }

    pub fn host(&self) -> String {
        format!("Host: 127.0.0.1:{}", self.port)
    }
}

/// Sends a request with these lines; returns status, head and body of the response.
pub fn ask(port: u16, first: &str, headers: &[&str], body: &[u8]) -> (u16, String, Vec<u8>) {
    let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let head = format!("{first} HTTP/1.1\r\n{}\r\nConnection: close\r\n\r\n", headers.join("\r\n"));
    stream.write_all(head.as_bytes()).unwrap();
    // The server may refuse before it has read the whole body.
    let _ = stream.write_all(body);
    stream.set_read_timeout(Some(std::time::Duration::from_secs(60))).unwrap();
    // Up to the announced length: some servers keep the connection open.
    let (mut answer, mut some) = (Vec::new(), [0u8; 1 << 16]);
    let whole = |answer: &[u8]| {
        let end = answer.windows(4).position(|w| w == b"\r\n\r\n")?;
        let head = String::from_utf8_lossy(&answer[..end]).to_ascii_lowercase();
        let length = head.lines().find_map(|l| l.strip_prefix("content-length:")?.trim().parse::<usize>().ok())?;
        Some(end + 4 + length)
    };
    while whole(&answer).is_none_or(|n| answer.len() < n) {
        match stream.read(&mut some) {
            Ok(n) if n > 0 => answer.extend(&some[..n]),
            _ => break,
        }
    }
    let end = answer.windows(4).position(|w| w == b"\r\n\r\n").unwrap_or(answer.len());
    let head = String::from_utf8_lossy(&answer[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|s| s.parse().ok()).unwrap_or(0);
    (status, head, answer.split_off((end + 4).min(answer.len())))
}
