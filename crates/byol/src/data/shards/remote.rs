//! Shards in an object store (S3, GCS, Azure, HTTP). A shard is fetched as a whole at its first
//! image, into a cache folder of bounded size that all processes of a machine share, and the next
//! ones are prefetched. A broken download resumes where it broke.
//!
//! Credentials and endpoints come from the environment, under their usual names
//! (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`,
//! `AZURE_STORAGE_ACCOUNT_KEY`, …).

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, SystemTime},
};

use futures_util::StreamExt;
use object_store::{Error, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt, path::Path as Key};
use sha2::{Digest, Sha256};
use tokio::runtime::Runtime;
use url::Url;

use super::{ShardIndex, Unit};
use crate::{
    atomic_write::hex,
    data::pack::{MANIFEST, Manifest},
};

/// Remote shard.
#[derive(Debug)]
pub(super) struct Remote {
    url: String,
    store: Arc<dyn ObjectStore>,
    key: Key,
    bytes: u64,
    /// ETag, which changes with the content.
    tag: Option<String>,
}

/// Default size of the cache in GB (`BYOL_CACHE_GB`).
const CACHE_GB: f64 = 32.0;

/// Consecutive retries without progress before a download fails: 100 seconds of waiting in total.
const MAX_RETRIES: u32 = 10;

/// Maximum number of concurrent metadata requests.
const MAX_REQUESTS: usize = 16;

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).thread_name("remote").enable_all().build().expect("the system starts threads")
    })
}

/// Error of the store as one sentence with a hint.
fn store_error(url: &str, error: &Error) -> io::Error {
    let text = error.to_string();
    // Listings report the status in the message only.
    let is_denied = matches!(error, Error::PermissionDenied { .. } | Error::Unauthenticated { .. })
        || ["401 Unauthorized", "403 Forbidden"].iter().any(|code| text.contains(code));
    io::Error::other(match error {
        _ if is_denied => {
            let hint = "set the credentials of the store in the environment (AWS_ACCESS_KEY_ID, …)";
            format!("access to {url} was denied\nhint: {hint}")
        }
        Error::NotFound { .. } => format!("{url} does not exist"),
        Error::Precondition { .. } => format!("{url} has changed since the run began\nhint: start a new run"),
        _ => {
            let first: String = text.lines().next().unwrap_or_default().chars().take(300).collect();
            format!("cannot read {url} ({first})\nhint: check the address and the network")
        }
    })
}

/// True if a retry may succeed.
fn is_transient(error: &Error) -> bool {
    !matches!(
        error,
        Error::NotFound { .. }
            | Error::PermissionDenied { .. }
            | Error::Unauthenticated { .. }
            | Error::Precondition { .. }
            | Error::InvalidPath { .. }
            | Error::NotSupported { .. }
            | Error::UnknownConfigurationKey { .. }
    )
}

/// Parses an address into its store and the key in it.
fn store(url: &str) -> io::Result<(Arc<dyn ObjectStore>, Key)> {
    let parsed = Url::parse(url).map_err(|e| io::Error::other(format!("invalid address {url}: {e}")))?;
    let environment = std::env::vars().map(|(name, value)| (name.to_ascii_lowercase(), value));
    let (store, key) = object_store::parse_url_opts(&parsed, environment).map_err(|e| store_error(url, &e))?;
    Ok((store.into(), key))
}

/// Finds the shards at these addresses, or below a single one.
///
/// # Errors
/// The error of the store.
pub(super) fn find(urls: &[String], is_shard: impl Fn(&Path) -> bool) -> io::Result<Vec<Remote>> {
    let Some(first) = urls.first() else { return Ok(Vec::new()) };
    let (store, key) = store(first)?;
    let base = first.strip_suffix(key.as_ref()).unwrap_or(first).to_owned();
    let remote = |meta: ObjectMeta| Remote {
        url: format!("{base}{}", meta.location),
        store: store.clone(),
        key: meta.location,
        bytes: meta.size,
        tag: meta.e_tag,
    };
    if urls.len() == 1 && !is_shard(Path::new(key.as_ref())) {
        let objects = runtime().block_on(store.list(Some(&key)).collect::<Vec<_>>());
        let objects: Vec<ObjectMeta> =
            objects.into_iter().collect::<Result<_, _>>().map_err(|e| store_error(first, &e))?;
        let mut shards: Vec<Remote> =
            objects.into_iter().filter(|meta| is_shard(Path::new(meta.location.as_ref()))).map(remote).collect();
        shards.sort_by(|a, b| a.key.cmp(&b.key));
        return Ok(shards);
    }
    let keys: Vec<Key> = urls
        .iter()
        .map(|url| {
            let (_, key) = self::store(url)?;
            if url.strip_suffix(key.as_ref()).is_some_and(|own| own != base) {
                return Err(io::Error::other(format!(
                    "{url} and {first} are in different stores (expected one store per run)"
                )));
            }
            Ok(key)
        })
        .collect::<io::Result<_>>()?;
    let heads = futures_util::stream::iter(&keys).map(|key| store.head(key)).buffered(MAX_REQUESTS).collect::<Vec<_>>();
    let heads = runtime().block_on(heads);
    heads.into_iter().zip(urls).map(|(head, url)| head.map(&remote).map_err(|e| store_error(url, &e))).collect()
}

/// Loads the manifest of `byol pack` beside a shard, if there is one.
pub(super) fn manifest(shard: &Remote) -> Option<Manifest> {
    let folder = shard.key.as_ref().rsplit_once('/').map_or("", |(folder, _)| folder);
    let key = Key::from(format!("{folder}/{MANIFEST}"));
    let bytes = runtime().block_on(async { shard.store.get(&key).await?.bytes().await }).ok()?;
    serde_json::from_slice(&bytes).ok()
}

impl Remote {
    /// Address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Size in bytes.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Path in the cache, whether it exists or not.
    fn cache_path(&self) -> io::Result<PathBuf> {
        let mut hash = Sha256::new();
        for part in [&self.url, self.tag.as_deref().unwrap_or_default(), &self.bytes.to_string()] {
            hash.update(part);
            hash.update([0]);
        }
        let name = hex(&hash.finalize()[..12]);
        let extension = Path::new(&self.url).extension().unwrap_or_default();
        Ok(cache()?.join(name).with_extension(extension))
    }

    /// True if the complete shard is in the cache.
    pub(crate) fn is_cached(&self) -> bool {
        let metadata = self.cache_path().and_then(|path| path.metadata());
        metadata.is_ok_and(|m| m.len() == self.bytes)
    }

    /// Returns the file in the cache, fetched first if necessary.
    ///
    /// # Errors
    /// The error of the store or the disk.
    pub fn file(&self) -> io::Result<PathBuf> {
        self.fetched(true)
    }

    /// Fetches the shard if the cache has space for it, for the downloads in progress and for one
    /// more.
    pub(crate) fn fetch_ahead(&self) {
        // An error here comes up again, and is reported, when the shard is needed.
        let _ = self.fetched(false);
    }

    /// Fetches the shard unless it is cached. `required` is false for prefetching.
    fn fetched(&self, required: bool) -> io::Result<PathBuf> {
        // An error of the system concerns the cache, an error of the store names its address.
        self.fetch_into_cache(required).map_err(|error| match error.raw_os_error() {
            Some(_) => cache().map_or_else(|e| e, |cache| cache_error(&cache, &error)),
            None => error,
        })
    }

    fn fetch_into_cache(&self, required: bool) -> io::Result<PathBuf> {
        let path = self.cache_path()?;
        let is_cached = || path.metadata().is_ok_and(|m| m.len() == self.bytes);
        if !is_cached() {
            fs::create_dir_all(cache()?)?;
            // One process fetches; the others wait for it.
            let lock = File::create(path.with_extension("lock"))?;
            lock.lock()?;
            if !is_cached() {
                let partial = path.with_extension(format!("{}.{PARTIAL}", self.bytes));
                if !make_room(&partial, self.bytes, required)? {
                    return Err(io::Error::other("the cache has no space for prefetching"));
                }
                self.fetch(&partial)?;
                fs::rename(&partial, &path)?;
            }
            let _ = fs::remove_file(path.with_extension("lock")); // waiting processes have it open
        }
        let touched = File::options().append(true).open(&path).and_then(|file| file.set_modified(SystemTime::now()));
        let _ = touched; // a failure only means earlier eviction
        Ok(path)
    }

    /// Downloads the shard to `to`, resuming after the bytes that are already there.
    fn fetch(&self, to: &Path) -> io::Result<()> {
        let mut file = OpenOptions::new().append(true).create(true).open(to)?;
        let mut received = file.metadata()?.len();
        if received > self.bytes {
            file.set_len(0)?;
            received = 0;
        }
        let mut retries = 0;
        while received < self.bytes {
            let before = received;
            let outcome = runtime().block_on(async {
                let range = Some(GetRange::Offset(received));
                let options = GetOptions { range, if_match: self.tag.clone(), ..GetOptions::default() };
                let mut parts = self.store.get_opts(&self.key, options).await?.into_stream();
                while let Some(part) = parts.next().await {
                    let part = part?;
                    file.write_all(&part).map_err(|e| Error::Generic { store: "cache", source: e.into() })?;
                    received += part.len() as u64;
                }
                Ok(())
            });
            match outcome {
                // A response that ends early without an error is a broken connection.
                Ok(()) if received >= self.bytes => break,
                Err(Error::Generic { store: "cache", source }) => {
                    return Err(cache_error(to, &source));
                }
                Err(error) if !is_transient(&error) => return Err(store_error(&self.url, &error)),
                _ if received > before => retries = 0,
                Err(error) if retries == MAX_RETRIES => return Err(store_error(&self.url, &error)),
                Ok(()) if retries == MAX_RETRIES => {
                    return Err(io::Error::other(format!(
                        "{} ends after {received} of {} bytes",
                        self.url, self.bytes
                    )));
                }
                _ => {
                    thread::sleep(Duration::from_millis(100) * 2u32.pow(retries));
                    retries += 1;
                }
            }
        }
        file.sync_data()
    }

    /// Indexes the shard, fetched first if necessary.
    ///
    /// # Errors
    /// Those of [`Remote::file`], and those of an invalid shard.
    pub fn index(self: &Arc<Self>, read: impl Fn(&Path) -> io::Result<ShardIndex>) -> io::Result<ShardIndex> {
        let index = read(&self.file()?)?;
        let into_remote = |unit| Unit { remote: Some(self.clone()), path: self.url.clone().into(), ..unit };
        Ok(ShardIndex { units: index.units.into_iter().map(into_remote).collect(), ..index })
    }
}

/// Error of a file or folder in the cache.
fn cache_error(path: &Path, error: &dyn std::fmt::Display) -> io::Error {
    io::Error::other(format!(
        "cannot write {}: {error}\nhint: free some space, or set BYOL_CACHE to another folder",
        path.display()
    ))
}

/// Folder of fetched shards: `BYOL_CACHE`, else below the user's cache folder.
fn cache() -> io::Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let user =
        || variable("XDG_CACHE_HOME").or_else(|| Some(variable("HOME")?.join(".cache"))).map(|p| p.join("byol/shards"));
    variable("BYOL_CACHE")
        .or_else(user)
        .ok_or_else(|| io::Error::other("no cache folder for fetched shards\nhint: set BYOL_CACHE to a folder"))
}

/// Extension of a shard that is being fetched, after its final size.
const PARTIAL: &str = "partial";

/// Evicts the least recently used shards until one of `bytes` fits beside the downloads in
/// progress, and creates `partial` for it. A prefetch (not `required`) needs space for one more
/// shard; returns false if that does not fit.
fn make_room(partial: &Path, bytes: u64, required: bool) -> io::Result<bool> {
    let limit = match std::env::var("BYOL_CACHE_GB") {
        Err(_) => CACHE_GB,
        Ok(text) => text.parse().ok().filter(|gb: &f64| *gb > 0.0 && gb.is_finite()).ok_or_else(|| {
            io::Error::other(format!("invalid BYOL_CACHE_GB {text:?} (expected a number of gigabytes above 0)"))
        })?,
    };
    let limit = (limit * 1e9) as u64;
    // One process at a time.
    let lock = File::create(cache()?.join("room.lock"))?;
    lock.lock()?;
    let mut total = bytes + if required { 0 } else { bytes };
    let mut removable: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for entry in fs::read_dir(cache()?)?.flatten() {
        let path = entry.path();
        let extension = path.extension().unwrap_or_default();
        // A listed file may have been renamed since.
        let Ok(meta) = entry.metadata() else { continue };
        if extension == "lock" || path == partial {
            continue;
        }
        if extension == PARTIAL {
            // A download in progress counts with its final size.
            let complete = path.with_extension("");
            let final_size = complete.extension().and_then(|n| n.to_str()?.parse().ok()).unwrap_or(0);
            let lock = File::open(complete.with_extension("lock"));
            if lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock))) {
                total += final_size;
                continue;
            }
        }
        total += meta.len();
        removable.push((meta.modified()?, meta.len(), path));
    }
    removable.sort();
    for (_, size, path) in removable {
        if total <= limit {
            break;
        }
        // Processes that have it open can still read it. Another process may have removed it
        // already.
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => total = total.saturating_sub(size),
        }
    }
    if total > limit && !required {
        return Ok(false);
    }
    OpenOptions::new().append(true).create(true).open(partial)?;
    Ok(true)
}
