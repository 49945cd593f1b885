//! All that a run is, on disk: `checkpoints/step-00000123/` with `state.safetensors` (θ, ξ, running statistics, the optimiser's state) and
//! `state.json` (version, counters, checksum). Made under a temporary name, synced, renamed: a crash leaves the last good one.

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    path::{Path, PathBuf},
};

use burn::tensor::Device;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::{
    byol::Byol,
    files::{self, hex},
    nn::{
        Leaf, Running, Statistics, Tree,
        tree::host,
        weights::{from_bytes, serialize, to_bytes},
    },
    optim::LossScale,
    ranks::Ranks,
};

/// Of the layout on disk.
pub const VERSION: u32 = 1;

/// What can be wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none.
    #[error("no checkpoint in {}; start the run again with `byol pretrain`", .0.display())]
    None(PathBuf),
    /// It cannot be read.
    #[error("cannot read the checkpoint {}: {source}{}", path.display(), offer(previous))]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
        /// The good one before it.
        previous: Option<PathBuf>,
    },
    /// It is not what was written.
    #[error("the checkpoint {} is damaged ({reason}){}", path.display(), offer(previous))]
    Damaged {
        /// Which one.
        path: PathBuf,
        /// What is wrong.
        reason: String,
        /// The good one before it.
        previous: Option<PathBuf>,
    },
    /// It is of another run or program.
    #[error("the checkpoint {} does not belong here ({reason}){}", path.display(), offer(previous))]
    Foreign {
        /// Which one.
        path: PathBuf,
        /// What differs.
        reason: String,
        /// The good one before it.
        previous: Option<PathBuf>,
    },
    /// It cannot be written.
    #[error("cannot write the checkpoint {}: {source}; {} (one before it is whole), then `byol resume`", path.display(), files::remedy(source))]
    Write {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

fn offer(previous: &Option<PathBuf>) -> String {
    match previous {
        Some(path) => format!("; the one before it is good: to go on from {}, remove the damaged one", path.display()),
        None => "; there is no good one before it, so the run has to start again".into(),
    }
}

/// The counters beside the tensors.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// [`VERSION`].
    pub version: u32,
    /// Steps done.
    pub step: u64,
    /// The optimiser's updates done.
    pub updates: u64,
    /// Batches each norm layer has seen, online and target, by name.
    pub batches: BTreeMap<String, u64>,
    /// Lines of `metrics.jsonl` that belong to the run so far, in bytes.
    pub metrics_bytes: u64,
    /// Sum of the losses since the last epoch's end, and their number: the next epoch's mean needs them.
    pub loss_sum: f64,
    /// See `loss_sum`.
    pub loss_count: u64,
    /// How often the learning rate has been halved by going back.
    #[serde(default)]
    pub halvings: u32,
    /// The loss's scale, with f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<LossScale>,
    /// SHA-256 of `plan.toml`.
    pub plan: String,
    /// SHA-256 of `state.safetensors`.
    pub sha256: String,
}

/// What a checkpoint adds to the networks.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Counters {
    /// As in [`State`].
    pub metrics_bytes: u64,
    /// As in [`State`].
    pub loss_sum: f64,
    /// As in [`State`].
    pub loss_count: u64,
    /// As in [`State`].
    pub halvings: u32,
}

/// What ties a checkpoint to its run: the hash of `plan.toml` as it stands there, since a later version may write the same plan in other words.
pub fn plan_hash(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

/// The step of a checkpoint, by its name.
fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// The newest checkpoint that is not after `step`, if there is one.
pub fn newest_until(folder: &Path, step: u64) -> Option<PathBuf> {
    list(folder).into_iter().rfind(|path| step_of(path).is_some_and(|s| s <= step))
}

/// The checkpoints in a folder, the oldest first. Half-written ones have other names.
pub fn list(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut all: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| step_of(p).is_some()).collect();
    all.sort();
    all
}

/// Writes a checkpoint into `folder` and removes the oldest beyond `keep`, but for the newest that is not after each of the steps `healthy`: those
/// to go back to. `plan` is the hash of the run's plan. Returns its path.
///
/// # Errors
/// [`Error::Write`]; the checkpoints before it are untouched.
pub fn save(
    folder: &Path,
    byol: &Byol,
    counters: Counters,
    plan: &str,
    keep: usize,
    healthy: [u64; 2],
) -> Result<PathBuf, Error> {
    let path = folder.join(format!("step-{:010}", byol.k));
    let temporary = files::temporary_name(&path);
    let write = |source| Error::Write { path: path.clone(), source };
    let (state, bytes) = packed(byol, counters, plan);
    let json = serde_json::to_vec_pretty(&state).expect("counters are plain data");
    let stands = fs::read(path.join("state.json")).ok().and_then(|old| serde_json::from_slice::<State>(&old).ok());
    let written = (|| {
        if stands.is_some_and(|old| old.sha256 == state.sha256) {
            // A run that went back: the same tensors, other counters. It may be the only checkpoint, so it stays readable throughout.
            return files::write_whole(&path.join("state.json"), &json);
        }
        sweep(folder)?;
        fs::create_dir_all(&temporary)?;
        files::write_whole(&temporary.join("state.safetensors"), &bytes)?;
        files::write_whole(&temporary.join("state.json"), &json)?;
        remove(&path)?;
        fs::rename(&temporary, &path)?;
        files::sync_folder(Some(folder))
    })();
    if let Err(source) = written {
        let _ = remove_if_there(&temporary); // the first error is the one to report
        return Err(write(source));
    }
    let all = list(folder);
    let spared = healthy.map(|step| newest_until(folder, step));
    for old in all[..all.len().saturating_sub(keep)].iter().filter(|path| !spared.contains(&Some((*path).clone()))) {
        remove(old).map_err(write)?;
    }
    Ok(path)
}

fn packed(byol: &Byol, counters: Counters, plan: &str) -> (State, Vec<u8>) {
    let bytes = serialize(&tensors(byol), HashMap::new());
    let mut batches = BTreeMap::new();
    for (who, weights) in [("online", &byol.online), ("target", &byol.target)] {
        batches.extend(weights.statistics.iter().map(|(name, r)| (format!("{who}.{name}"), r.batches)));
    }
    let state = State {
        version: VERSION,
        step: byol.k,
        updates: byol.optimizer.t,
        batches,
        metrics_bytes: counters.metrics_bytes,
        loss_sum: counters.loss_sum,
        loss_count: counters.loss_count,
        halvings: counters.halvings,
        scale: byol.scale,
        plan: plan.to_owned(),
        sha256: hex(&Sha256::digest(&bytes)),
    };
    (state, bytes)
}

/// Gives all ranks the state of rank 0, so that no other needs its files.
pub fn share(ranks: Ranks, byol: &mut Byol, counters: Counters, plan: &str, device: &Device) -> Counters {
    if ranks == Ranks::ALONE {
        return counters;
    }
    let own = ranks.leads().then(|| packed(byol, counters, plan));
    let (state, bytes) = own.map_or((None, Vec::new()), |(state, bytes)| (Some(state), bytes));
    let (state, bytes) = (ranks.agree(state), ranks.broadcast(bytes));
    let state = state.expect("rank 0 has a state");
    if ranks.leads() {
        return counters;
    }
    unpack(byol, state, &bytes, device).expect("rank 0 has packed what this rank unpacks: both run the same program")
}

/// Removes the checkpoints of later steps than `step`, where one of it or before is left.
///
/// # Errors
/// [`Error::Write`].
pub fn remove_after(folder: &Path, step: u64) -> Result<(), Error> {
    let all = list(folder);
    if all.first().and_then(|path| step_of(path)).is_some_and(|first| first <= step) {
        for path in all.iter().filter(|path| step_of(path).is_some_and(|s| s > step)) {
            remove(path).map_err(|source| Error::Write { path: path.clone(), source })?;
        }
    }
    Ok(())
}

/// Removes a checkpoint, which loses its name first: a kill leaves none that is half there.
fn remove(path: &Path) -> io::Result<()> {
    let nameless = path.with_extension("removed");
    remove_if_there(&nameless)?;
    match fs::rename(path, &nameless) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        renamed => renamed.and_then(|()| files::sync_folder(path.parent())).and_then(|()| remove_if_there(&nameless)),
    }
}

/// Removes what a kill has left of checkpoints that were being written or removed.
fn sweep(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "partial" || e == "removed") {
            remove_if_there(&path)?;
        }
    }
    Ok(())
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

type Named = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(byol: &Byol) -> Named {
    let mut all = Named::new();
    let mut add = |prefix: &str, tree: &Tree| {
        for (name, leaf) in tree.iter() {
            all.push((format!("{prefix}{name}"), Dtype::F32, leaf.shape.clone(), to_bytes(&host(leaf.value.clone()))));
        }
    };
    add("online.", &byol.online.params);
    add("target.", &byol.target.params);
    add("online.", &byol.online.statistics.to_tree());
    add("target.", &byol.target.statistics.to_tree());
    for (slot, state) in byol.optimizer.rule.slots().iter().zip(&byol.optimizer.state) {
        add(&format!("optimizer.{slot}."), state);
    }
    all
}

/// The newest checkpoint, put into `byol` (made by [`Plan::start`](super::Plan::start)); `plan` is the hash of the run's plan.
///
/// # Errors
/// Any but [`Error::Write`]; a damaged one names the good one before it.
pub fn load_newest(folder: &Path, byol: &mut Byol, plan: &str, device: &Device) -> Result<(PathBuf, Counters), Error> {
    let all = list(folder);
    let (newest, older) = all.split_last().ok_or_else(|| Error::None(folder.to_owned()))?;
    let good = || older.iter().rev().find(|p| read(p, plan, None).is_ok()).cloned();
    let (state, bytes) = read(newest, plan, Some(&good))?;
    let damaged = |reason: String| Error::Damaged { path: newest.clone(), reason, previous: good() };
    let counters = unpack(byol, state, &bytes, device).map_err(damaged)?;
    Ok((newest.clone(), counters))
}

/// Puts packed tensors and counters into `byol`; what is wrong with them, if anything.
fn unpack(byol: &mut Byol, state: State, bytes: &[u8], device: &Device) -> Result<Counters, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let leaf = |name: String, shape: &[usize]| -> Result<Leaf, String> {
        let tensor = file.tensor(&name).map_err(|_| format!("no tensor {name}"))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
            return Err(format!("{name} is {:?} {:?}, not f32 {shape:?}", tensor.dtype(), tensor.shape()));
        }
        Ok(Leaf::new(from_bytes(tensor.data()), shape, device))
    };
    let tree = |prefix: &str, like: &Tree| -> Result<Tree, String> {
        let mut tree = Tree::new();
        for (name, old) in like.iter() {
            tree.insert(name, leaf(format!("{prefix}{name}"), &old.shape)?);
        }
        Ok(tree)
    };
    for (who, weights) in [("online", &mut byol.online), ("target", &mut byol.target)] {
        weights.params = tree(&format!("{who}."), &weights.params)?;
        let mut statistics = Statistics::default();
        for (name, old) in weights.statistics.iter() {
            let one = |what: &str| leaf(format!("{who}.{name}.{what}"), &old.mean.dims()).map(|l| l.value);
            let batches = state.batches.get(&format!("{who}.{name}"));
            let batches = *batches.ok_or_else(|| format!("no counter of {who}.{name}"))?;
            statistics.insert(name, Running { mean: one("running_mean")?, var: one("running_var")?, batches });
        }
        weights.statistics = statistics;
    }
    let slots = byol.optimizer.rule.slots();
    let states = slots.iter().zip(&byol.optimizer.state).map(|(slot, old)| tree(&format!("optimizer.{slot}."), old));
    byol.optimizer.state = states.collect::<Result<_, _>>()?;
    byol.optimizer.t = state.updates;
    byol.k = state.step;
    byol.scale = state.scale;
    let State { metrics_bytes, loss_sum, loss_count, halvings, .. } = state;
    Ok(Counters { metrics_bytes, loss_sum, loss_count, halvings })
}

/// State and tensors of a checkpoint, checked against its checksum and the plan. `good` finds the one to offer instead.
fn read(path: &Path, plan: &str, good: Option<&dyn Fn() -> Option<PathBuf>>) -> Result<(State, Vec<u8>), Error> {
    let previous = || good.and_then(|good| good());
    let load = |name: &str| {
        fs::read(path.join(name)).map_err(|source| Error::Read { path: path.join(name), source, previous: previous() })
    };
    let damaged = |reason: String| Error::Damaged { path: path.to_owned(), reason, previous: previous() };
    let foreign = |reason: String| Error::Foreign { path: path.to_owned(), reason, previous: previous() };
    let state: State = serde_json::from_slice(&load("state.json")?).map_err(|e| damaged(format!("state.json: {e}")))?;
    if state.version != VERSION {
        return Err(foreign(format!("it has version {}, this byol writes {VERSION}", state.version)));
    }
    if state.plan != plan {
        return Err(foreign("it was written under another plan.toml".into()));
    }
    let bytes = load("state.safetensors")?;
    if hex(&Sha256::digest(&bytes)) != state.sha256 {
        return Err(damaged("its checksum differs".into()));
    }
    Ok((state, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::synthetic,
        train::{Plan, Prepared, Recipe, recipe::HealthConfig},
    };

    fn begun() -> Byol {
        let mut recipe = Recipe::default();
        (recipe.encoder.width, recipe.heads.hidden, recipe.heads.projection) = (0.0625, 8, 4);
        (recipe.train.batch, recipe.views.size) = (4, 8);
        let none = HealthConfig { images: 0, ..HealthConfig::default() };
        let data = Prepared::new(synthetic::dataset(1, 10, 0), 0, &none, 0, &|_| ()).unwrap();
        Plan::new("test", recipe, &data, "cpu").unwrap().start(&Device::flex())
    }

    #[test]
    fn the_same_step_again_gets_new_counters_and_stays_readable() {
        let folder = tempfile::tempdir().unwrap();
        let mut byol = begun();
        let save = |byol: &Byol, halvings| {
            let counters = Counters { halvings, ..Counters::default() };
            super::save(folder.path(), byol, counters, "plan", 3, [0; 2]).unwrap()
        };
        let path = save(&byol, 0);
        let tensors = path.join("state.safetensors");
        let written = fs::metadata(&tensors).unwrap().modified().unwrap();
        // What a kill has left.
        for name in ["step-0000000007.partial", "step-0000000003.removed"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        assert_eq!(save(&byol, 1), path);
        assert_eq!(fs::metadata(&tensors).unwrap().modified().unwrap(), written, "tensors are not written again");
        let mut other = begun();
        let (_, counters) = load_newest(folder.path(), &mut other, "plan", &Device::flex()).unwrap();
        assert_eq!(counters.halvings, 1);
        byol.k = 1;
        save(&byol, 1);
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(matches!(
            load_newest(folder.path(), &mut other, "another plan", &Device::flex()),
            Err(Error::Foreign { .. })
        ));
    }
}
