//! `byol pretrain s3://…` against an S3 server, with broken and stalled connections, refused
//! requests and a cache smaller than the data.

use std::{
    fs,
    os::unix::process::ExitStatusExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use s3s_fs::FileSystem;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
};

/// An S3 server behind a proxy that can break connections.
struct Server {
    runtime: Runtime,
    /// Port of the proxy.
    port: u16,
    /// Number of connections still to break.
    breaks: Arc<AtomicUsize>,
    /// Bytes after which the proxy forwards nothing more and keeps the connections open.
    stalls_at: Arc<AtomicU64>,
    /// Bytes sent by the server.
    sent: Arc<AtomicU64>,
}

/// Bytes after which the proxy breaks a connection.
const BREAKS_AFTER: usize = 150_000;

impl Server {
    fn start(root: &Path) -> Server {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut service = S3ServiceBuilder::new(FileSystem::new(root).unwrap());
        service.set_auth(SimpleAuth::from_single("key", "secret"));
        let service = service.build();
        let listen = || runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let (backend, proxy) = (listen(), listen());
        let (backend_address, port) = (backend.local_addr().unwrap(), proxy.local_addr().unwrap().port());
        runtime.spawn(async move {
            loop {
                let (socket, _) = backend.accept().await.unwrap();
                let service = service.clone();
                tokio::spawn(async move {
                    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        let (breaks, sent) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        let stalls_at = Arc::new(AtomicU64::new(u64::MAX));
        let (breaks_left, bytes_sent, limit) = (breaks.clone(), sent.clone(), stalls_at.clone());
        runtime.spawn(async move {
            loop {
                let (client, _) = proxy.accept().await.unwrap();
                let server = TcpStream::connect(backend_address).await.unwrap();
                let (breaks_left, bytes_sent, limit) = (breaks_left.clone(), bytes_sent.clone(), limit.clone());
                tokio::spawn(async move {
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = server.into_split();
                    tokio::spawn(async move {
                        let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
                    });
                    let (mut buffer, mut forwarded) = (vec![0; 1 << 14], 0);
                    while let Ok(n @ 1..) = from_server.read(&mut buffer).await {
                        while bytes_sent.load(Ordering::Relaxed) >= limit.load(Ordering::Relaxed) {
                            tokio::time::sleep(Duration::from_millis(20)).await;
                        }
                        bytes_sent.fetch_add(n as u64, Ordering::Relaxed);
                        forwarded += n;
                        let decrement = |left: usize| left.checked_sub(1);
                        let take_break = || breaks_left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, decrement);
                        if forwarded > BREAKS_AFTER && take_break().is_ok() {
                            return;
                        }
                        if to_client.write_all(&buffer[..n]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Server { runtime, port, breaks, stalls_at, sent }
    }

    /// Runs `byol` with this server as the S3 endpoint and its own cache folder.
    fn byol(&self, cache: &Path, args: &[&str]) -> Output {
        self.command(cache, args).output().unwrap()
    }

    /// [`Server::byol`] to start.
    fn command(&self, cache: &Path, args: &[&str]) -> Command {
        let mut command = byol(args);
        command
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.port))
            .envs([("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "us-east-1")])
            .envs([("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")])
            .env("BYOL_CACHE", cache);
        command
    }
}

fn byol(args: &[&str]) -> Command {
    let program = std::env::var_os("BYOL").map_or_else(|| PathBuf::from("../target/debug/byol"), PathBuf::from);
    let mut command = Command::new(program);
    command.args(args);
    command
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn ok(output: Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    stderr
}

/// Requires a failure with one error message, hint included, that contains all of `words`.
fn refused(output: Output, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{stderr}");
    assert_eq!(stderr.lines().filter(|line| line.starts_with("error:")).count(), 1, "{stderr}");
    let message = &stderr[stderr.find("error:").unwrap()..];
    assert!(words.iter().all(|word| message.contains(word)), "{stderr}");
}

/// Packs `n` noise images of two classes into shards of 1 MB in the bucket `bucket` below
/// `folder/root`. Returns the folder of the shards.
fn bucket(folder: &Path, n: u32) -> PathBuf {
    let data = folder.join("data");
    for i in 0..n {
        let class = data.join(if i % 2 == 0 { "even" } else { "odd" });
        fs::create_dir_all(&class).unwrap();
        let mut state = u64::from(i) + 1;
        let noise = image::RgbImage::from_fn(96, 96, |_, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            image::Rgb([(state >> 33) as u8, (state >> 41) as u8, (state >> 49) as u8])
        });
        noise.save(class.join(format!("{i:03}.png"))).unwrap();
    }
    let shards = folder.join("root/bucket/shards");
    fs::create_dir_all(folder.join("root/bucket")).unwrap();
    ok(byol(&["pack", text(&data), "-o", text(&shards), "--shard-mb", "1"]).output().unwrap());
    shards
}

/// `BYOL_CACHE_GB` of two and a half shards.
const SMALL_CACHE: &str = "0.0027";

const FLAGS: [&str; 20] = [
    "--encoder", "resnet18", "--width", "0.0625", "--size", "16", "--batch", "8", "--epochs", "2", "--hidden", "16",
    "--projection", "8", "--warmup-epochs", "1", "--device", "cpu", "--set", "train.shuffle=40",
];

fn pretrain<'a>(data: &'a str, out: &'a str) -> Vec<&'a str> {
    [&["pretrain", data, "--out", out][..], &FLAGS].concat()
}

fn encoder(run: &Path) -> Vec<u8> {
    fs::read(run.join("encoder.safetensors")).unwrap()
}

fn folder_size(folder: &Path) -> u64 {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn streamed_shards_train_the_same_encoder_despite_broken_connections() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let shards = bucket(folder.path(), 200);
    let files = fs::read_dir(&shards).unwrap().filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "tar"));
    assert!(files.count() >= 5);
    let server = Server::start(&at("root"));
    ok(byol(&pretrain(text(&shards), text(&at("local")))).output().unwrap());

    server.breaks.store(12, Ordering::SeqCst);
    ok(server.byol(&at("cache"), &pretrain("s3://bucket/shards", text(&at("remote")))));
    assert_eq!(server.breaks.load(Ordering::SeqCst), 0, "all planned breaks happened");
    assert!(encoder(&at("local")) == encoder(&at("remote")), "bit-identical to training from disk");
    let first_run = server.sent.load(Ordering::Relaxed);

    // Again from the cache, and with a brace pattern that lists the shards in the same order.
    let pattern = format!("s3://bucket/shards/train-{{000000..{:06}}}.tar", 5);
    ok(server.byol(&at("cache"), &pretrain("s3://bucket/shards", text(&at("again")))));
    assert!(server.sent.load(Ordering::Relaxed) - first_run < first_run / 10, "the second run reads from the cache");
    ok(server.byol(&at("cache"), &pretrain(&pattern, text(&at("pattern")))));

    // A cache limited to two and a half shards keeps its limit and gives the same bits.
    let (small, bounded) = (at("small"), at("bounded"));
    let mut command = server.command(&small, &pretrain("s3://bucket/shards", text(&bounded)));
    ok(command.env("BYOL_CACHE_GB", SMALL_CACHE).output().unwrap());
    assert!(folder_size(&small) <= 2_700_000, "{}", folder_size(&small));
    assert!(encoder(&at("local")) == encoder(&at("bounded")));

    // Labels are read from the manifest.
    let run = at("remote");
    let stderr = ok(server.byol(&at("cache"), &["eval", "knn", text(&run), "s3://bucket/shards", "--k", "1", "--device", "cpu"]));
    assert!(!stderr.contains("no labels"), "{stderr}");
    drop(server.runtime);
}

#[test]
fn shards_without_a_manifest_can_be_trained_on_and_resumed() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let shards = bucket(folder.path(), 80);
    fs::remove_file(shards.join("manifest.json")).unwrap();
    let server = Server::start(&at("root"));
    ok(byol(&pretrain(text(&shards), text(&at("local")))).output().unwrap());
    ok(server.byol(&at("cache"), &pretrain("s3://bucket/shards/", text(&at("remote")))));
    assert!(encoder(&at("local")) == encoder(&at("remote")));
    ok(server.byol(&at("cache"), &["resume", text(&at("remote"))]));
}

#[test]
fn a_signal_ends_a_run_whose_server_does_not_answer() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    bucket(folder.path(), 200);
    let server = Server::start(&at("root"));
    let out = at("run");
    // More than the manifest and less than the first shard.
    server.stalls_at.store(500_000, Ordering::Relaxed);
    let mut command = server.command(&at("cache"), &pretrain("s3://bucket/shards", text(&out)));
    let mut process = command.stderr(Stdio::piped()).spawn().unwrap();
    wait(|| server.sent.load(Ordering::Relaxed) >= 500_000);
    std::thread::sleep(Duration::from_secs(1));
    assert!(process.try_wait().unwrap().is_none(), "the run waits for the server");
    let pid = process.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    wait(|| process.try_wait().unwrap().is_some());
    let output = process.wait_with_output().unwrap();
    // Before training starts, the signal itself ends the program.
    let is_stopped = output.status.code() == Some(130) || output.status.signal() == Some(15);
    assert!(is_stopped, "{:?}: {}", output.status, String::from_utf8_lossy(&output.stderr));
}

/// Waits until `is_done` returns true, for two minutes at the most.
fn wait(mut is_done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_done() {
        assert!(start.elapsed() < Duration::from_secs(120), "no result after two minutes");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn rejects_missing_data_mixed_stores_and_wrong_credentials() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    bucket(folder.path(), 20);
    let server = Server::start(&at("root"));
    let out = at("out");
    refused(server.byol(&at("cache"), &pretrain("s3://nobucket/shards/{000000..000001}.tar", text(&out))), &["does not exist"]);
    refused(server.byol(&at("cache"), &pretrain("s3://bucket/nothing", text(&out))), &["no .tar or .parquet"]);
    let two = pretrain("s3://{bucket,other}/shards/train-000000.tar", text(&out));
    refused(server.byol(&at("cache"), &two), &["s3://other", "different stores"]);
    let mut command = server.command(&at("cache"), &pretrain("s3://bucket/shards", text(&out)));
    let wrong_secret = command.env("AWS_SECRET_ACCESS_KEY", "wrong").output().unwrap();
    refused(wrong_secret, &["denied", "AWS_ACCESS_KEY_ID"]);
    assert!(!out.exists());
}
