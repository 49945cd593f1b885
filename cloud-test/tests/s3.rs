//! `byol pretrain s3://…` against an S3 server, with connections that break, a bucket that refuses, and a cache that is too small.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
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

/// A server, and a way to it that breaks each of the first connections after some bytes.
struct Server {
    runtime: Runtime,
    port: u16,
    breaks: Arc<AtomicUsize>,
    sent: Arc<AtomicU64>,
}

/// Bytes after which a connection breaks.
const BREAKS_AFTER: usize = 150_000;

impl Server {
    fn start(root: &Path) -> Server {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let mut service = S3ServiceBuilder::new(FileSystem::new(root).unwrap());
        service.set_auth(SimpleAuth::from_single("key", "secret"));
        let service = service.build();
        let listen = || runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
        let (behind, front) = (listen(), listen());
        let (to, port) = (behind.local_addr().unwrap(), front.local_addr().unwrap().port());
        runtime.spawn(async move {
            loop {
                let (socket, _) = behind.accept().await.unwrap();
                let service = service.clone();
                tokio::spawn(async move {
                    let _ = Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(socket), service).await;
                });
            }
        });
        let (breaks, sent) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicU64::new(0)));
        let (left, count) = (breaks.clone(), sent.clone());
        runtime.spawn(async move {
            loop {
                let (client, _) = front.accept().await.unwrap();
                let server = TcpStream::connect(to).await.unwrap();
                let (left, count) = (left.clone(), count.clone());
                tokio::spawn(async move {
                    let (mut from_client, mut to_client) = client.into_split();
                    let (mut from_server, mut to_server) = server.into_split();
                    tokio::spawn(async move {
                        let _ = tokio::io::copy(&mut from_client, &mut to_server).await;
                    });
                    let (mut some, mut passed) = (vec![0; 1 << 14], 0);
                    while let Ok(n @ 1..) = from_server.read(&mut some).await {
                        count.fetch_add(n as u64, Ordering::Relaxed);
                        passed += n;
                        let one_less = |left: usize| left.checked_sub(1);
                        if passed > BREAKS_AFTER && left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, one_less).is_ok() {
                            return;
                        }
                        if to_client.write_all(&some[..n]).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Server { runtime, port, breaks, sent }
    }

    /// The program, with an environment that leads to this server and a cache of its own.
    fn byol(&self, cache: &Path, args: &[&str]) -> Output {
        let port = self.port;
        byol(args)
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"))
            .envs([("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "us-east-1")])
            .envs([("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")])
            .env("BYOL_CACHE", cache)
            .output()
            .unwrap()
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
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{said}");
    said
}

fn refused(output: Output, words: &[&str]) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success(), "{said}");
    let lines: Vec<&str> = said.lines().filter(|line| line.starts_with("error:")).collect();
    assert!(lines.len() == 1 && words.iter().all(|word| lines[0].contains(word)), "{said}");
}

/// `n` noisy pictures in two classes, in shards of a megabyte, in the bucket `bucket` of the server's folder.
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

fn size(folder: &Path) -> u64 {
    fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[test]
fn streamed_shards_train_the_same_encoder_whatever_breaks() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let shards = bucket(folder.path(), 200);
    let files = fs::read_dir(&shards).unwrap().filter(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "tar"));
    assert!(files.count() >= 5);
    let server = Server::start(&at("root"));
    ok(byol(&pretrain(text(&shards), text(&at("local")))).output().unwrap());

    server.breaks.store(12, Ordering::SeqCst);
    ok(server.byol(&at("cache"), &pretrain("s3://bucket/shards", text(&at("remote")))));
    assert_eq!(server.breaks.load(Ordering::SeqCst), 0, "connections were broken");
    assert!(encoder(&at("local")) == encoder(&at("remote")), "the same bits as from the disk");
    let once = server.sent.load(Ordering::Relaxed);

    // Again, from the cache; by a pattern, whose order of shards is the same.
    let pattern = format!("s3://bucket/shards/train-{{000000..{:06}}}.tar", 5);
    ok(server.byol(&at("cache"), &pretrain("s3://bucket/shards", text(&at("again")))));
    assert!(server.sent.load(Ordering::Relaxed) - once < once / 10, "a second run fetches nothing");
    ok(server.byol(&at("cache"), &pretrain(&pattern, text(&at("pattern")))));

    // A cache of two and a half shards is never larger, and gives the same bits.
    let small = at("small");
    let args = pretrain("s3://bucket/shards", text(&at("bounded")).to_owned().leak());
    let output = {
        let port = server.port;
        byol(&args)
            .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"))
            .envs([("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "us-east-1"), ("BYOL_CACHE_GB", "0.0027")])
            .envs([("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "secret")])
            .env("BYOL_CACHE", &small)
            .output()
            .unwrap()
    };
    ok(output);
    assert!(size(&small) <= 2_700_000, "{}", size(&small));
    assert!(encoder(&at("local")) == encoder(&at("bounded")));

    // Labels come with the manifest.
    let run = at("remote");
    let said = ok(server.byol(&at("cache"), &["eval", "knn", text(&run), "s3://bucket/shards", "--k", "1", "--device", "cpu"]));
    assert!(!said.contains("no labels"), "{said}");
    drop(server.runtime);
}

#[test]
fn shards_without_a_manifest_are_looked_into_once() {
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
fn what_a_store_refuses_is_said_in_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    bucket(folder.path(), 20);
    let server = Server::start(&at("root"));
    let out = at("out");
    refused(server.byol(&at("cache"), &pretrain("s3://nobucket/shards/{000000..000001}.tar", text(&out))), &["there is no"]);
    refused(server.byol(&at("cache"), &pretrain("s3://bucket/nothing", text(&out))), &["no .tar or .parquet"]);
    let two = pretrain("s3://{bucket,other}/shards/train-000000.tar", text(&out));
    refused(server.byol(&at("cache"), &two), &["s3://other", "another store"]);
    let port = server.port;
    let wrong = byol(&pretrain("s3://bucket/shards", text(&out)))
        .env("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{port}"))
        .envs([("AWS_ALLOW_HTTP", "true"), ("AWS_REGION", "us-east-1")])
        .envs([("AWS_ACCESS_KEY_ID", "key"), ("AWS_SECRET_ACCESS_KEY", "wrong")])
        .env("BYOL_CACHE", at("cache"))
        .output()
        .unwrap();
    refused(wrong, &["refused", "AWS_ACCESS_KEY_ID"]);
    assert!(!out.exists());
}
