//! Checkpoints: the complete training state on disk.
//!
//! `checkpoints/step-0000000123/` holds `state.safetensors` (θ, ξ, running statistics, optimizer
//! state) and `state.json` (version, counters, checksum). A checkpoint is written under a temporary
//! name, synced and renamed, so that a crash leaves the last complete one.

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
    atomic_write::{self, hex},
    byol::Byol,
    nn::{
        Leaf, RunningStats, Statistics, Tree,
        tree::host,
        weights::{from_bytes, serialize, to_bytes},
    },
    optim::LossScale,
    ranks::Ranks,
};

/// Version of the layout on disk.
pub const VERSION: u32 = 1;

/// Errors of a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The folder has no checkpoint.
    #[error("no checkpoint in {}\nhint: start the run again with `byol pretrain`", .0.display())]
    None(PathBuf),
    /// The checkpoint cannot be read.
    #[error("cannot read the checkpoint {}: {source}\nhint: {}", path.display(), remedy(previous))]
    Read {
        /// Path of the checkpoint.
        path: PathBuf,
        /// Cause.
        source: io::Error,
        /// Latest intact checkpoint before it.
        previous: Option<PathBuf>,
    },
    /// The checksum or content does not match what was written.
    #[error("the checkpoint {} is damaged ({reason})\nhint: {}", path.display(), remedy(previous))]
    Damaged {
        /// Path of the checkpoint.
        path: PathBuf,
        /// Cause.
        reason: String,
        /// Latest intact checkpoint before it.
        previous: Option<PathBuf>,
    },
    /// The checkpoint belongs to a different run or version.
    #[error("the checkpoint {} belongs to a different run ({reason})\nhint: {}", path.display(), remedy(previous))]
    Foreign {
        /// Path of the checkpoint.
        path: PathBuf,
        /// Difference.
        reason: String,
        /// Latest intact checkpoint before it.
        previous: Option<PathBuf>,
    },
    /// The checkpoint cannot be written. Earlier ones are intact.
    #[error("cannot write the checkpoint {}: {source}\nhint: {}, then `byol resume` from the checkpoint before it", path.display(), atomic_write::remedy(source))]
    Write {
        /// Path of the checkpoint.
        path: PathBuf,
        /// Cause.
        source: io::Error,
    },
}

fn remedy(previous: &Option<PathBuf>) -> String {
    match previous {
        Some(path) => format!("remove it to resume from the intact checkpoint {}", path.display()),
        None => "no earlier checkpoint is intact; start the run again".into(),
    }
}

/// Counters of a checkpoint (`state.json`).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct State {
    /// Layout version, [`VERSION`].
    pub version: u32,
    /// Completed steps.
    pub step: u64,
    /// Completed optimizer updates.
    pub updates: u64,
    /// Batches seen by each norm layer, by name (`online.…`, `target.…`).
    pub batches: BTreeMap<String, u64>,
    /// Length of `metrics.jsonl`, in bytes.
    pub metrics_bytes: u64,
    /// Sum of the losses of the current epoch, for its mean.
    pub loss_sum: f64,
    /// Number of losses in `loss_sum`.
    pub loss_count: u64,
    /// Number of rollbacks, each of which halved the learning rate.
    #[serde(default)]
    pub halvings: u32,
    /// Loss scale, with f16.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scale: Option<LossScale>,
    /// SHA-256 of `plan.toml`.
    pub plan: String,
    /// SHA-256 of `state.safetensors`.
    pub sha256: String,
}

/// Counters of a run that are not part of [`Byol`].
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
    /// As `scale` in [`State`].
    pub loss_scale: Option<LossScale>,
}

/// Hash of the text of `plan.toml`, which ties a checkpoint to its run. It is computed from the
/// file, since a later version may write the same plan differently.
pub fn plan_hash(text: &str) -> String {
    hex(&Sha256::digest(text.as_bytes()))
}

/// Step of a checkpoint, from its name.
fn step_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_prefix("step-")?.parse().ok()
}

/// Step of the latest checkpoint.
///
/// # Errors
/// [`Error::None`].
pub(crate) fn newest_step(folder: &Path) -> Result<u64, Error> {
    list(folder).last().and_then(|path| step_of(path)).ok_or_else(|| Error::None(folder.to_owned()))
}

/// Latest checkpoint of step `step` or before.
pub(crate) fn newest_until(folder: &Path, step: u64) -> Option<PathBuf> {
    list(folder).into_iter().rfind(|path| step_of(path).is_some_and(|s| s <= step))
}

/// Checkpoints of a folder, oldest first. Incomplete ones have other names.
pub fn list(folder: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut all: Vec<PathBuf> = entries.flatten().map(|e| e.path()).filter(|p| step_of(p).is_some()).collect();
    all.sort();
    all
}

/// Writes a checkpoint into `folder` and removes the oldest beyond `keep`, except the latest ones
/// up to each step of `healthy`, which a rollback needs. `plan` is the hash of the plan. Returns
/// the path.
///
/// # Errors
/// [`Error::Write`]; earlier checkpoints are unchanged.
pub fn save(
    folder: &Path,
    byol: &Byol,
    counters: Counters,
    plan: &str,
    keep: usize,
    healthy: [u64; 2],
) -> Result<PathBuf, Error> {
    let path = folder.join(format!("step-{:010}", byol.k));
    let temporary = atomic_write::temporary_name(&path);
    let write = |source| Error::Write { path: path.clone(), source };
    let (state, bytes) = serialize_state(byol, counters, plan);
    let json = serde_json::to_vec_pretty(&state).expect("counters are plain data");
    let existing = fs::read(path.join("state.json")).ok().and_then(|old| serde_json::from_slice::<State>(&old).ok());
    let written = (|| {
        if existing.is_some_and(|old| old.sha256 == state.sha256) {
            // After a rollback: the same tensors with new counters. This may be the only
            // checkpoint, so it must stay readable throughout.
            return atomic_write::write_whole(&path.join("state.json"), &json);
        }
        remove_leftovers(folder)?;
        fs::create_dir_all(&temporary)?;
        atomic_write::write_whole(&temporary.join("state.safetensors"), &bytes)?;
        atomic_write::write_whole(&temporary.join("state.json"), &json)?;
        remove(&path)?;
        fs::rename(&temporary, &path)?;
        atomic_write::sync_folder(Some(folder))
    })();
    if let Err(source) = written {
        let _ = remove_if_exists(&temporary); // the first error is the one to report
        return Err(write(source));
    }
    let all = list(folder);
    let needed = healthy.map(|step| newest_until(folder, step));
    for old in all[..all.len().saturating_sub(keep)].iter().filter(|path| !needed.contains(&Some((*path).clone()))) {
        remove(old).map_err(write)?;
    }
    Ok(path)
}

fn serialize_state(byol: &Byol, counters: Counters, plan: &str) -> (State, Vec<u8>) {
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
        scale: counters.loss_scale,
        plan: plan.to_owned(),
        sha256: hex(&Sha256::digest(&bytes)),
    };
    (state, bytes)
}

/// Broadcasts the state of rank 0 to all ranks, so that only rank 0 needs the files.
pub fn share(ranks: Ranks, byol: &mut Byol, counters: Counters, plan: &str, device: &Device) -> Counters {
    if ranks == Ranks::SINGLE {
        return counters;
    }
    let own = ranks.is_root().then(|| serialize_state(byol, counters, plan));
    let (state, bytes) = own.map_or((None, Vec::new()), |(state, bytes)| (Some(state), bytes));
    let (state, bytes) = (ranks.broadcast_value(state), ranks.broadcast(bytes));
    let state = state.expect("rank 0 has a state");
    if ranks.is_root() {
        return counters;
    }
    restore(byol, state, &bytes, device).expect("all ranks run the same program")
}

/// Removes the checkpoints after `step`, provided that one of `step` or before remains.
///
/// # Errors
/// [`Error::Write`].
pub(crate) fn remove_after(folder: &Path, step: u64) -> Result<(), Error> {
    let all = list(folder);
    if all.first().and_then(|path| step_of(path)).is_some_and(|first| first <= step) {
        for path in all.iter().filter(|path| step_of(path).is_some_and(|s| s > step)) {
            remove(path).map_err(|source| Error::Write { path: path.clone(), source })?;
        }
    }
    Ok(())
}

/// Renames, then deletes a checkpoint, so that a crash never leaves a partial one.
fn remove(path: &Path) -> io::Result<()> {
    let renamed_path = path.with_extension("removed");
    remove_if_exists(&renamed_path)?;
    match fs::rename(path, &renamed_path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        renamed => renamed
            .and_then(|()| atomic_write::sync_folder(path.parent()))
            .and_then(|()| remove_if_exists(&renamed_path)),
    }
}

/// Removes leftovers of interrupted writes and removals.
fn remove_leftovers(folder: &Path) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == "partial" || e == "removed") {
            remove_if_exists(&path)?;
        }
    }
    Ok(())
}

fn remove_if_exists(path: &Path) -> io::Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

type NamedTensors = Vec<(String, Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(byol: &Byol) -> NamedTensors {
    let mut all = NamedTensors::new();
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

/// Loads the latest checkpoint into `byol`, as made by
/// [`Plan::initial_state`](super::Plan::initial_state). `plans` are the hashes of the plan and, if
/// the run was extended, of its earlier plans.
///
/// # Errors
/// All but [`Error::Write`]. The error of a damaged checkpoint names the last intact one.
pub(crate) fn load_newest(
    folder: &Path,
    byol: &mut Byol,
    plans: &[String],
    device: &Device,
) -> Result<(PathBuf, Counters), Error> {
    let all = list(folder);
    let (newest, older) = all.split_last().ok_or_else(|| Error::None(folder.to_owned()))?;
    let last_intact = || older.iter().rev().find(|p| read(p, plans, None).is_ok()).cloned();
    let (state, bytes) = read(newest, plans, Some(&last_intact))?;
    let damaged = |reason: String| Error::Damaged { path: newest.clone(), reason, previous: last_intact() };
    let counters = restore(byol, state, &bytes, device).map_err(damaged)?;
    Ok((newest.clone(), counters))
}

/// Restores tensors and counters into `byol`. Returns a description of the first mismatch as error.
fn restore(byol: &mut Byol, state: State, bytes: &[u8], device: &Device) -> Result<Counters, String> {
    let file = SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let leaf = |name: String, shape: &[usize]| -> Result<Leaf, String> {
        let tensor = file.tensor(&name).map_err(|_| format!("tensor {name} is missing"))?;
        if tensor.dtype() != Dtype::F32 || tensor.shape() != shape {
            return Err(format!("{name} is {:?} {:?} (expected f32 {shape:?})", tensor.dtype(), tensor.shape()));
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
            let batches = *batches.ok_or_else(|| format!("counter of {who}.{name} is missing"))?;
            statistics.insert(name, RunningStats { mean: one("running_mean")?, var: one("running_var")?, batches });
        }
        weights.statistics = statistics;
    }
    let slots = byol.optimizer.rule.slots();
    let states = slots.iter().zip(&byol.optimizer.state).map(|(slot, old)| tree(&format!("optimizer.{slot}."), old));
    byol.optimizer.state = states.collect::<Result<_, _>>()?;
    byol.optimizer.t = state.updates;
    byol.k = state.step;
    let State { metrics_bytes, loss_sum, loss_count, halvings, scale: loss_scale, .. } = state;
    Ok(Counters { metrics_bytes, loss_sum, loss_count, halvings, loss_scale })
}

/// Reads and verifies a checkpoint against its checksum and the hashes of the plans. `last_intact`
/// finds the one to suggest instead.
fn read(
    path: &Path,
    plans: &[String],
    last_intact: Option<&dyn Fn() -> Option<PathBuf>>,
) -> Result<(State, Vec<u8>), Error> {
    let previous = || last_intact.and_then(|find| find());
    let load = |name: &str| {
        fs::read(path.join(name)).map_err(|source| Error::Read { path: path.join(name), source, previous: previous() })
    };
    let damaged = |reason: String| Error::Damaged { path: path.to_owned(), reason, previous: previous() };
    let foreign = |reason: String| Error::Foreign { path: path.to_owned(), reason, previous: previous() };
    let state: State = serde_json::from_slice(&load("state.json")?).map_err(|e| damaged(format!("state.json: {e}")))?;
    if state.version != VERSION {
        return Err(foreign(format!("layout version {}, expected {VERSION}", state.version)));
    }
    if !plans.contains(&state.plan) {
        return Err(foreign("its plan.toml differs".into()));
    }
    let bytes = load("state.safetensors")?;
    if hex(&Sha256::digest(&bytes)) != state.sha256 {
        return Err(damaged("checksum mismatch".into()));
    }
    Ok((state, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::synthetic,
        train::{Plan, PrepareOptions, Recipe, TrainingData},
    };

    fn new_state() -> Byol {
        let mut recipe = Recipe::default();
        (recipe.encoder.width, recipe.heads.hidden, recipe.heads.projection) = (0.0625, 8, 4);
        (recipe.train.batch, recipe.views.size) = (4, 8);
        let options = PrepareOptions { monitoring_images: 0, ..PrepareOptions::default() };
        let data = TrainingData::prepare(synthetic::dataset(1, 10, 0), options, &|_| ()).unwrap();
        Plan::new("test", recipe, &data, "cpu").unwrap().initial_state(&Device::flex())
    }

    #[test]
    fn saving_a_step_again_replaces_its_counters_only() {
        let folder = tempfile::tempdir().unwrap();
        let mut byol = new_state();
        let save = |byol: &Byol, halvings| {
            let counters = Counters { halvings, ..Counters::default() };
            super::save(folder.path(), byol, counters, "plan", 3, [0; 2]).unwrap()
        };
        let path = save(&byol, 0);
        let tensors = path.join("state.safetensors");
        let written = fs::metadata(&tensors).unwrap().modified().unwrap();
        // Leftovers of a killed process.
        for name in ["step-0000000007.partial", "step-0000000003.removed"] {
            fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        assert_eq!(save(&byol, 1), path);
        assert_eq!(fs::metadata(&tensors).unwrap().modified().unwrap(), written, "the tensors are not rewritten");
        let mut other = new_state();
        let (_, counters) = load_newest(folder.path(), &mut other, &["plan".into()], &Device::flex()).unwrap();
        assert_eq!(counters.halvings, 1);
        byol.k = 1;
        save(&byol, 1);
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
        assert!(matches!(
            load_newest(folder.path(), &mut other, &["different plan".into()], &Device::flex()),
            Err(Error::Foreign { .. })
        ));
    }
}
