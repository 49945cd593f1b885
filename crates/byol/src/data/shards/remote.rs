//! Shards in an object store (S3, GCS, Azure, HTTP): a shard is fetched as a whole when its first image comes up, into a folder of bounded
//! size that all processes of a machine share, and the next ones ahead of time. A connection that breaks goes on where it broke.
//!
//! Credentials and endpoints are those of the environment, under their usual names (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`,
//! `GOOGLE_APPLICATION_CREDENTIALS`, `AZURE_STORAGE_ACCOUNT_KEY`, …).

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

use super::{Indexed, Unit};
use crate::{
    data::pack::{MANIFEST, Manifest},
    files::hex,
};

/// One shard.
#[derive(Debug)]
pub(super) struct Remote {
    url: String,
    store: Arc<dyn ObjectStore>,
    key: Key,
    bytes: u64,
    /// Tells this content from a later one under the same name.
    tag: Option<String>,
}

/// Gigabytes of the cache, unless `BYOL_CACHE_GB` says otherwise.
const CACHE_GB: f64 = 32.0;

/// Tries without a byte in between before a shard is given up: 100 seconds of waiting in all.
const TRIES: u32 = 10;

/// Requests of one listing that go on at the same time.
const TOGETHER: usize = 16;

fn runtime() -> &'static Runtime {
    static RUNTIME: OnceLock<Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).thread_name("remote").enable_all().build().expect("the system starts threads")
    })
}

/// What went wrong, on one line, with what to do.
fn said(url: &str, error: &Error) -> io::Error {
    let text = error.to_string();
    // A listing says it in words alone.
    let refuses = matches!(error, Error::PermissionDenied { .. } | Error::Unauthenticated { .. })
        || ["401 Unauthorized", "403 Forbidden"].iter().any(|code| text.contains(code));
    io::Error::other(match error {
        _ if refuses => {
            let remedy = "set the credentials of its store in the environment (AWS_ACCESS_KEY_ID, …)";
            format!("{url} is refused to you; {remedy}")
        }
        Error::NotFound { .. } => format!("there is no {url}"),
        Error::Precondition { .. } => format!("{url} has changed since the run began; start again"),
        _ => {
            let first: String = text.lines().next().unwrap_or_default().chars().take(300).collect();
            format!("{url} cannot be read ({first}); check the address and the network")
        }
    })
}

/// Whether a later try may do better.
fn may_pass(error: &Error) -> bool {
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

/// The store of an address, and the key in it.
fn store(url: &str) -> io::Result<(Arc<dyn ObjectStore>, Key)> {
    let parsed = Url::parse(url).map_err(|e| io::Error::other(format!("{url} is no address: {e}")))?;
    let environment = std::env::vars().map(|(name, value)| (name.to_ascii_lowercase(), value));
    let (store, key) = object_store::parse_url_opts(&parsed, environment).map_err(|e| said(url, &e))?;
    Ok((store.into(), key))
}

/// The shards of these addresses, or below one.
///
/// # Errors
/// What the store says, on one line.
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
        let all = runtime().block_on(store.list(Some(&key)).collect::<Vec<_>>());
        let all: Vec<ObjectMeta> = all.into_iter().collect::<Result<_, _>>().map_err(|e| said(first, &e))?;
        let mut shards: Vec<Remote> =
            all.into_iter().filter(|meta| is_shard(Path::new(meta.location.as_ref()))).map(remote).collect();
        shards.sort_by(|a, b| a.key.cmp(&b.key));
        return Ok(shards);
    }
    let keys: Vec<Key> = urls
        .iter()
        .map(|url| {
            let (_, key) = self::store(url)?;
            if url.strip_suffix(key.as_ref()).is_some_and(|own| own != base) {
                return Err(io::Error::other(format!("{url} is in another store than {first}; give one store a run")));
            }
            Ok(key)
        })
        .collect::<io::Result<_>>()?;
    let heads = futures_util::stream::iter(&keys).map(|key| store.head(key)).buffered(TOGETHER).collect::<Vec<_>>();
    let heads = runtime().block_on(heads);
    heads.into_iter().zip(urls).map(|(head, url)| head.map(&remote).map_err(|e| said(url, &e))).collect()
}

/// The manifest that `byol pack` has written beside a shard, if it has.
pub(super) fn manifest(beside: &Remote) -> Option<Manifest> {
    let folder = beside.key.as_ref().rsplit_once('/').map_or("", |(folder, _)| folder);
    let key = Key::from(format!("{folder}/{MANIFEST}"));
    let bytes = runtime().block_on(async { beside.store.get(&key).await?.bytes().await }).ok()?;
    serde_json::from_slice(&bytes).ok()
}

impl Remote {
    /// Its address.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Its length.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file that it is, or would be, in the cache.
    fn place(&self) -> io::Result<PathBuf> {
        let mut hash = Sha256::new();
        for part in [&self.url, self.tag.as_deref().unwrap_or_default(), &self.bytes.to_string()] {
            hash.update(part);
            hash.update([0]);
        }
        let name = hex(&hash.finalize()[..12]);
        let ending = Path::new(&self.url).extension().unwrap_or_default();
        Ok(cache()?.join(name).with_extension(ending))
    }

    /// Whether it is in the cache, whole.
    pub fn is_here(&self) -> bool {
        let place = self.place().and_then(|path| path.metadata());
        place.is_ok_and(|m| m.len() == self.bytes)
    }

    /// Its file in the cache, fetched where it is not there.
    ///
    /// # Errors
    /// What the store or the disk says, on one line.
    pub fn file(&self) -> io::Result<PathBuf> {
        self.fetched(true)
    }

    /// Fetches it, if there is room beside what is being fetched and one more.
    pub fn fetch_ahead(&self) {
        // What goes wrong here goes wrong again, and is said, when it is wanted.
        let _ = self.fetched(false);
    }

    fn fetched(&self, wanted: bool) -> io::Result<PathBuf> {
        let place = self.place()?;
        let here = || place.metadata().is_ok_and(|m| m.len() == self.bytes);
        if !here() {
            fs::create_dir_all(cache()?)?;
            // Of several processes one fetches; the others wait for it.
            let lock = File::create(place.with_extension("lock"))?;
            lock.lock()?;
            if !here() {
                let unfinished = place.with_extension(format!("{}.{PARTIAL}", self.bytes));
                if !make_room(&unfinished, self.bytes, wanted)? {
                    return Err(io::Error::other("there is no room to fetch ahead"));
                }
                self.fetch(&unfinished)?;
                fs::rename(&unfinished, &place)?;
            }
            let _ = fs::remove_file(place.with_extension("lock")); // who waits for it holds it open
        }
        let now = File::options().append(true).open(&place).and_then(|file| file.set_modified(SystemTime::now()));
        let _ = now; // an older date means an earlier end in the cache, no more
        Ok(place)
    }

    /// Writes it to `to`, after what is already there.
    fn fetch(&self, to: &Path) -> io::Result<()> {
        let mut file = OpenOptions::new().append(true).create(true).open(to)?;
        let mut have = file.metadata()?.len();
        if have > self.bytes {
            file.set_len(0)?;
            have = 0;
        }
        let mut tries = 0;
        while have < self.bytes {
            let before = have;
            let outcome = runtime().block_on(async {
                let range = Some(GetRange::Offset(have));
                let options = GetOptions { range, if_match: self.tag.clone(), ..GetOptions::default() };
                let mut parts = self.store.get_opts(&self.key, options).await?.into_stream();
                while let Some(part) = parts.next().await {
                    let part = part?;
                    file.write_all(&part).map_err(|e| Error::Generic { store: "cache", source: e.into() })?;
                    have += part.len() as u64;
                }
                Ok(())
            });
            match outcome {
                // A connection that ends early without an error is one that broke.
                Ok(()) if have >= self.bytes => break,
                Err(Error::Generic { store: "cache", source }) => {
                    return Err(io::Error::other(format!(
                        "cannot write {}: {source}; free some space, or set BYOL_CACHE to another folder",
                        to.display()
                    )));
                }
                Err(error) if !may_pass(&error) => return Err(said(&self.url, &error)),
                _ if have > before => tries = 0,
                Err(error) if tries == TRIES => return Err(said(&self.url, &error)),
                Ok(()) if tries == TRIES => {
                    return Err(io::Error::other(format!("{} ends after {have} bytes", self.url)));
                }
                _ => {
                    thread::sleep(Duration::from_millis(100) * 2u32.pow(tries));
                    tries += 1;
                }
            }
        }
        file.sync_data()
    }

    /// What it holds, by looking into it.
    ///
    /// # Errors
    /// As [`Remote::file`]; what is wrong with the shard.
    pub fn index(self: &Arc<Self>, read: impl Fn(&Path) -> io::Result<Indexed>) -> io::Result<Indexed> {
        let found = read(&self.file()?)?;
        let units = found.units.into_iter().map(|unit| Unit {
            remote: Some(self.clone()),
            path: self.url.clone().into(),
            ..unit
        });
        Ok(Indexed { units: units.collect(), labels: found.labels })
    }
}

/// The folder of fetched shards: `BYOL_CACHE`, else below the user's cache.
fn cache() -> io::Result<PathBuf> {
    let named = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let user =
        || named("XDG_CACHE_HOME").or_else(|| Some(named("HOME")?.join(".cache"))).map(|p| p.join("byol/shards"));
    named("BYOL_CACHE")
        .or_else(user)
        .ok_or_else(|| io::Error::other("there is no folder for fetched shards; name one by BYOL_CACHE"))
}

/// The ending of a shard that is being fetched, behind its length to be.
const PARTIAL: &str = "partial";

/// Removes what was used longest ago until a shard of so many bytes fits beside what is being fetched, and makes its place. False if it does
/// not fit and is not `wanted` now: then there has to be room for one more.
fn make_room(unfinished: &Path, bytes: u64, wanted: bool) -> io::Result<bool> {
    let most =
        match std::env::var("BYOL_CACHE_GB") {
            Err(_) => CACHE_GB,
            Ok(text) => text.parse().ok().filter(|gb: &f64| *gb > 0.0 && gb.is_finite()).ok_or_else(|| {
                io::Error::other(format!("BYOL_CACHE_GB is a number of gigabytes above 0, not {text:?}"))
            })?,
        };
    let most = (most * 1e9) as u64;
    // One at a time, of all processes.
    let room = File::create(cache()?.join("room.lock"))?;
    room.lock()?;
    let mut total = bytes + if wanted { 0 } else { bytes };
    let mut removable: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for entry in fs::read_dir(cache()?)?.flatten() {
        let path = entry.path();
        let ending = path.extension().unwrap_or_default();
        // What was there when the folder was listed may have got its name since.
        let Ok(meta) = entry.metadata() else { continue };
        if ending == "lock" || path == unfinished {
            continue;
        }
        if ending == PARTIAL {
            // Its length to be counts, unless nobody fetches it any more.
            let whole = path.with_extension("");
            let to_be = whole.extension().and_then(|n| n.to_str()?.parse().ok()).unwrap_or(0);
            let lock = File::open(whole.with_extension("lock"));
            if lock.is_ok_and(|lock| matches!(lock.try_lock(), Err(fs::TryLockError::WouldBlock))) {
                total += to_be;
                continue;
            }
        }
        total += meta.len();
        removable.push((meta.modified()?, meta.len(), path));
    }
    removable.sort();
    for (_, size, path) in removable {
        if total <= most {
            break;
        }
        // A process that has it open reads on; another may have been faster.
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => total = total.saturating_sub(size),
        }
    }
    if total > most && !wanted {
        return Ok(false);
    }
    OpenOptions::new().append(true).create(true).open(unfinished)?;
    Ok(true)
}
