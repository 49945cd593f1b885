//! The training loop: steps with metrics, health checks and checkpoints, until the plan is complete
//! or a stop is requested.
//!
//! A run folder holds `plan.toml`, `metrics.jsonl`, `skipped.txt`, `checkpoints/`,
//! `encoder.safetensors` and `best.safetensors`.

use std::{
    collections::HashSet,
    fmt,
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Instant,
};

use burn::tensor::Device;

use super::{
    Error, Plan, TrainingData,
    augment_placement::{self, AugmentTiming},
    batch,
    checkpoint::{self, Counters},
    health::{self, Failure, FailureKind, Health, Monitor},
    metrics::{self, History, MetricsFile, PhaseSeconds, Record},
    recipe::OnCollapse,
    step::{Phase, Stepper},
    tensorboard::EventFile,
};
use crate::{
    atomic_write,
    byol::{Byol, StepStats},
    data::{Images, Loader, prefetch::Request},
    device,
    nn::weights,
    optim::LossScale,
    ranks::Ranks,
    views::Augmentation,
};

/// Progress of a run, as passed to the callback of [`Run::run`].
#[derive(Debug)]
pub enum Event<'a> {
    /// End of a step.
    Step {
        /// Completed steps.
        step: u64,
        /// Completed epochs, with the fraction of the current one.
        epoch: f64,
        /// Loss, η and τ.
        stats: &'a StepStats,
        /// The update was skipped because the gradient exceeds the range of f16.
        skipped: bool,
        /// Wall-clock time by phase.
        seconds: PhaseSeconds,
    },
    /// End of an epoch. Epoch 0 is before the first step.
    Epoch {
        /// Completed epochs.
        epoch: u64,
        /// Mean loss of the epoch; `None` for epoch 0.
        loss: Option<f64>,
        /// Metrics on the monitoring images.
        health: Option<&'a Health>,
        /// Failure that the health check detected, in words.
        collapse: Option<&'a str>,
    },
    /// Images of shards that were skipped since the last such event: their number, and the first as
    /// `path: reason`. `skipped.txt` lists all.
    Skipped(usize, &'a str),
    /// A checkpoint was written.
    Checkpoint(&'a Path),
    /// Rollback to an earlier checkpoint, with half the learning rate.
    Rollback {
        /// Step of the failure.
        from: u64,
        /// Step of the checkpoint.
        to: u64,
        /// Peak learning rate from here on.
        peak: f64,
        /// The failure.
        why: &'a Failure,
    },
}

impl fmt::Display for Event<'_> {
    /// One line in words.
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Event::Step { step, stats, .. } => write!(f, "step {step}: loss {:.4}", stats.loss),
            Event::Epoch { epoch, loss, health, collapse } => {
                write!(f, "epoch {epoch}")?;
                if let Some(loss) = loss {
                    write!(f, ": loss {loss:.4}")?;
                }
                if let Some(knn) = health.and_then(|health| health.knn) {
                    write!(f, ", kNN {:.1} %", 100.0 * knn)?;
                }
                if let Some(health) = health {
                    write!(f, ", RankMe {:.1}", health.rankme)?;
                }
                collapse.map_or(Ok(()), |failure| write!(f, ", failed: {failure}"))
            }
            Event::Skipped(n, first) => {
                write!(f, "skipped {n} unreadable image{} (first: {first})", if *n == 1 { "" } else { "s" })
            }
            Event::Checkpoint(path) => write!(f, "checkpoint {}", path.display()),
            Event::Rollback { from, to, peak, why } => {
                write!(f, "rolled back from step {from} to {to}, peak learning rate {peak:.4}: {why}")
            }
        }
    }
}

/// Outcome of [`Run::run`].
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All steps are complete.
    Finished,
    /// A stop was requested. The checkpoint is the one to resume from.
    Stopped(PathBuf),
}

/// A run that is ready to train. [`Pretraining`](crate::Pretraining) creates and resumes runs with
/// less code; this is the loop itself, with the state in reach.
///
/// # Examples
///
/// ```no_run
/// use std::sync::atomic::AtomicBool;
///
/// use byol::{Dataset, DeviceChoice, Recipe, Run, device, train};
///
/// let recipe = Recipe::named("cifar10")?.epochs(10).check()?;
/// let data = train::TrainingData::prepare(Dataset::folder("photos")?, (&recipe).into(), &|_| ())?;
/// let opened = device::open(DeviceChoice::Cpu)?;
/// let plan = train::Plan::new("cifar10", recipe, &data, opened.info.choice)?;
/// let context = train::RunContext::single_process(opened.device, 2);
///
/// let mut run = Run::create("out".as_ref(), plan.clone(), &data, context.clone(), false)?;
/// let outcome = run.run(&AtomicBool::new(false), |event| println!("{event}"))?;
/// if let train::Outcome::Stopped(_) = outcome {
///     drop(run);
///     Run::resume("out".as_ref(), plan, &data, context)?;
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Run {
    /// Run folder.
    pub folder: PathBuf,
    /// The plan.
    pub plan: Plan,
    /// Training state.
    pub byol: Byol,
    /// Timing that chose the augmentation placement, where the recipe left it open.
    pub timing: Option<AugmentTiming>,
    stepper: Stepper,
    context: RunContext,
    images: Images,
    monitor: Option<Monitor>,
    /// `None` unless this is rank 0.
    metrics: Option<MetricsFile>,
    events: Option<EventFile>,
    loss_sum: f64,
    loss_count: u64,
    /// Number of rollbacks, each of which halved the learning rate.
    halvings: u32,
    /// Health before the first step.
    initial_health: Option<Health>,
    history: History,
    /// Best label-free score so far.
    best_score: Option<f64>,
    /// Skipped images that have been recorded.
    skipped: usize,
    started: Instant,
    /// `metrics.jsonl` is empty.
    fresh: bool,
    /// Hash of `plan.toml` on disk, then those of the earlier plans of an extended run; empty
    /// unless this is rank 0.
    plan_hashes: Vec<String>,
    /// Keeps other processes from writing into the folder; `None` unless this is rank 0.
    _lock: Option<File>,
}

/// Device, threads and ranks of a run.
#[derive(Debug, Clone)]
pub struct RunContext {
    /// Device of the weights.
    pub device: Device,
    /// Threads that make views, at least 1.
    pub threads: usize,
    /// Data-parallel ranks. Only rank 0 writes.
    pub ranks: Ranks,
    /// User-defined augmentation of both views, on the CPU. It is not part of the plan: a run must
    /// be resumed with the same one.
    pub augmentation: Option<Arc<dyn Augmentation>>,
}

impl RunContext {
    /// One process on one device.
    pub fn single_process(device: Device, threads: usize) -> RunContext {
        RunContext { device, threads, ranks: Ranks::SINGLE, augmentation: None }
    }
}

/// Rollbacks before a run gives up.
const MAX_ROLLBACKS: u32 = 5;

/// End of a stretch of training without rollback.
enum Stretch {
    Ended(Outcome),
    Failed(Failure),
}

/// Peak learning rate after `times` rollbacks.
fn halved(peak: f64, times: u32) -> f64 {
    peak * 0.5f64.powi(times as i32)
}

fn plan_file(folder: &Path) -> PathBuf {
    folder.join("plan.toml")
}

fn checkpoints(folder: &Path) -> PathBuf {
    folder.join("checkpoints")
}

/// Checks that the folder is empty or absent.
///
/// # Errors
/// [`Error::Occupied`].
pub fn ensure_empty(folder: &Path) -> Result<(), Error> {
    let path = folder.to_owned();
    if plan_file(folder).exists() {
        return Err(Error::Occupied { path, run: true });
    }
    if folder.is_file() || fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::Occupied { path, run: false });
    }
    Ok(())
}

/// Reads the plan of a run folder.
///
/// # Errors
/// [`Error::Read`], [`Error::BadPlan`].
pub fn read_plan(folder: &Path) -> Result<Plan, Error> {
    Plan::parse(&read_plan_text(folder)?, &plan_file(folder))
}

fn read_plan_text(folder: &Path) -> Result<String, Error> {
    let path = plan_file(folder);
    fs::read_to_string(&path).map_err(|source| Error::Read { path, source })
}

/// Reads the plan of a run, finished or not, and changes its number of epochs. η and τ continue
/// from where a run of `epochs` with the same recipe would be, and jump if the earlier schedule was
/// different. [`Run::resume`] writes the new plan.
///
/// # Errors
/// [`Error::Extend`], if `epochs` are complete already; [`Error::Recipe`], [`Error::Read`],
/// [`Error::BadPlan`], [`Error::Checkpoint`].
pub fn extend_plan(folder: &Path, epochs: u64) -> Result<Plan, Error> {
    let text = read_plan_text(folder)?;
    let plan = Plan::parse(&text, &plan_file(folder))?;
    if epochs == plan.recipe.train.epochs {
        return Ok(plan);
    }
    let step = checkpoint::newest_step(&checkpoints(folder))?;
    plan.extend(epochs, step, checkpoint::plan_hash(&text))
}

/// Locks the folder for this process. The OS releases the lock on exit, even after a crash. Some
/// network drives do not support locks; there the folder is unprotected.
fn lock(folder: &Path) -> Result<File, Error> {
    let path = folder.join("lock");
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = open.map_err(|source| Error::Write { path, source })?;
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => Err(Error::Busy(folder.to_owned())),
        _ => Ok(file),
    }
}

/// Checks that the data are those of the plan.
fn ensure_same_data(plan: &Plan, data: &TrainingData) -> Result<(), Error> {
    let changed = |reason: String| Err(Error::DataChanged { root: data.root.clone(), reason });
    if data.train.len() != plan.images {
        return changed(format!("{} usable training images instead of {}", data.train.len(), plan.images));
    }
    if data.train.fingerprint() != plan.fingerprint {
        return changed("a name or size differs".into());
    }
    if let Some(held_out) = &data.held_out
        && plan.held_out_fingerprint.as_ref().is_some_and(|print| *print != held_out.fingerprint())
    {
        return changed("a name or size of a monitoring image differs".into());
    }
    Ok(())
}

impl Run {
    /// Creates the folder of a new run with its plan, the list of skipped images and checkpoint 0.
    ///
    /// # Errors
    /// [`Error::Occupied`], [`Error::Write`], [`Error::Checkpoint`], [`Error::Ranks`],
    /// [`Error::Device`], [`Error::Data`].
    pub fn create(
        folder: &Path,
        mut plan: Plan,
        data: &TrainingData,
        context: RunContext,
        tensorboard: bool,
    ) -> Result<Run, Error> {
        device::check(&context.device, plan.recipe.train.precision)?;
        plan.check_ranks(context.ranks)?;
        if !context.ranks.is_root() {
            let byol = plan.initial_state(&context.device);
            let timing = augment_placement::choose(&mut plan, data, &context, &byol)?;
            let run = Run::assemble(folder, plan, byol, data, context, Counters::default(), false)?;
            return Ok(Run { timing, ..run });
        }
        ensure_empty(folder)?;
        // Before anything is measured or written: pretrained weights may not fit.
        let byol = plan.pretrained_state(&context.device)?;
        let timing = augment_placement::choose(&mut plan, data, &context, &byol)?;
        let write = |path: &Path, source| Error::Write { path: path.to_owned(), source };
        fs::create_dir_all(checkpoints(folder)).map_err(|e| write(folder, e))?;
        let lock = lock(folder)?;
        let text = plan.to_toml();
        atomic_write::write_whole(&plan_file(folder), text.as_bytes()).map_err(|e| write(&plan_file(folder), e))?;
        if !data.skipped.is_empty() || !data.unused.is_empty() {
            let path = folder.join("skipped.txt");
            let text: String = data.unused.iter().chain(&data.skipped).map(|line| format!("{line}\n")).collect();
            atomic_write::write_whole(&path, text.as_bytes()).map_err(|e| write(&path, e))?;
        }
        let plan_hash = checkpoint::plan_hash(&text);
        let counters = Counters { loss_scale: plan.stepper().loss_scale, ..Counters::default() };
        let keep = plan.recipe.checkpoint.keep;
        // There is no checkpoint before it to resume from.
        checkpoint::save(&checkpoints(folder), &byol, counters, &plan_hash, keep, [0; 2]).map_err(|e| match e {
            checkpoint::Error::Write { path, source } => write(&path, source),
            e => e.into(),
        })?;
        let mut run = Run::assemble(folder, plan, byol, data, context, counters, tensorboard)?;
        run.log(|events, step| events.text(step, "plan", &format!("```toml\n{text}```\n")))?;
        Ok(Run { timing, plan_hashes: vec![plan_hash], _lock: Some(lock), ..run })
    }

    /// Opens a run at its latest checkpoint. The number of ranks may differ from before. Writes
    /// `plan` if it is an extension of the run's ([`extend_plan`]).
    ///
    /// # Errors
    /// [`Error::DataChanged`], [`Error::Busy`], [`Error::Checkpoint`], [`Error::Write`],
    /// [`Error::BadPlan`], [`Error::Ranks`].
    pub fn resume(folder: &Path, plan: Plan, data: &TrainingData, context: RunContext) -> Result<Run, Error> {
        device::check(&context.device, plan.recipe.train.precision)?;
        plan.check_ranks(context.ranks)?;
        ensure_same_data(&plan, data)?;
        let mut byol = plan.initial_state(&context.device);
        if !context.ranks.is_root() {
            return Run::assemble(folder, plan, byol, data, context, Counters::default(), false);
        }
        let lock = lock(folder)?;
        let (path, text) = (plan_file(folder), read_plan_text(folder)?);
        let (hash, on_disk) = (checkpoint::plan_hash(&text), Plan::parse(&text, &path)?);
        let is_extension = plan.extended.last().is_some_and(|last| last.plan == hash);
        if !is_extension && plan.extended != on_disk.extended {
            return Err(Error::BadPlan { path, reason: "it has changed since it was read".into() });
        }
        let mut plan_hashes = vec![hash];
        plan_hashes.extend(on_disk.extended.iter().rev().map(|extension| extension.plan.clone()));
        let (_, counters) = checkpoint::load_newest(&checkpoints(folder), &mut byol, &plan_hashes, &context.device)?;
        if is_extension {
            // Checkpoints of the earlier plan stay valid, so that this write is all that happens.
            let text = plan.to_toml();
            atomic_write::write_whole(&path, text.as_bytes()).map_err(|source| Error::Write { path, source })?;
            plan_hashes.insert(0, checkpoint::plan_hash(&text));
        }
        let tensorboard = folder.join("tensorboard").is_dir();
        let run = Run::assemble(folder, plan, byol, data, context, counters, tensorboard)?;
        Ok(Run { plan_hashes, _lock: Some(lock), ..run })
    }

    fn assemble(
        folder: &Path,
        plan: Plan,
        mut byol: Byol,
        data: &TrainingData,
        context: RunContext,
        counters: Counters,
        tensorboard: bool,
    ) -> Result<Run, Error> {
        let ranks = context.ranks;
        byol.network.ranks = if plan.recipe.train.sync_bn { ranks } else { Ranks::SINGLE };
        let counters = checkpoint::share(ranks, &mut byol, counters, "", &context.device);
        byol.schedule.peak = halved(plan.schedule.peak, counters.halvings);
        let path = folder.join("metrics.jsonl");
        let write = |path: PathBuf| move |source| Error::Write { path, source };
        let open = || MetricsFile::open(&path, counters.metrics_bytes).map_err(write(path.clone()));
        let metrics = ranks.is_root().then(open).transpose()?;
        let board = folder.join("tensorboard");
        let events = tensorboard.then(|| EventFile::create(&board)).transpose().map_err(write(board))?;
        let health = metrics::read_health(&path);
        let scores = health.iter().skip(1).filter_map(|h| h.label_free).map(|metrics| metrics.score());
        Ok(Run {
            folder: folder.to_owned(),
            stepper: Stepper { ranks, loss_scale: counters.loss_scale, ..plan.stepper() },
            halvings: counters.halvings,
            initial_health: health.first().cloned(),
            best_score: scores.reduce(f64::max),
            history: metrics::read_history(&path),
            monitor: if ranks.is_root() { data.monitor(&plan)? } else { None },
            images: data.train.clone(),
            loss_sum: counters.loss_sum,
            loss_count: counters.loss_count,
            skipped: 0,
            started: Instant::now(),
            fresh: counters.metrics_bytes == 0,
            plan,
            byol,
            context,
            metrics,
            events,
            timing: None,
            plan_hashes: Vec::new(),
            _lock: None,
        })
    }

    /// Current loss scale; `None` unless gradients are f16.
    pub fn loss_scale(&self) -> Option<LossScale> {
        self.stepper.loss_scale
    }

    /// Trains until the plan is complete or `stop` is set, which is checked after every step.
    ///
    /// # Errors
    /// [`Error::Collapsed`], [`Error::Diverged`], [`Error::Data`], [`Error::Write`],
    /// [`Error::Checkpoint`]. The last checkpoint stays intact in each case.
    pub fn run(&mut self, stop: &AtomicBool, mut on_event: impl FnMut(Event)) -> Result<Outcome, Error> {
        if self.byol.k == 0 && self.fresh {
            self.end_of_epoch(0, &mut on_event)?;
        }
        loop {
            match self.train_until_failure(stop, &mut on_event)? {
                Stretch::Ended(outcome) => return Ok(outcome),
                Stretch::Failed(failure) => self.roll_back(&failure, &mut on_event)?,
            }
        }
    }

    /// Trains to the end, or to a failure to recover from by rollback.
    fn train_until_failure(&mut self, stop: &AtomicBool, on_event: &mut impl FnMut(Event)) -> Result<Stretch, Error> {
        let ranks = self.context.ranks;
        let total = self.plan.schedule.total;
        let on_collapse = self.plan.recipe.health.on_collapse;
        let loader = self.loader();
        let mut saved = Instant::now();
        while self.byol.k < total {
            let began = Instant::now();
            // Ranks stop together, so only a single process can stop here.
            if ranks.world_size() == 1 && !loader.wait(stop) {
                let path = self.save_checkpoint()?;
                on_event(Event::Checkpoint(&path));
                return Ok(Stretch::Ended(Outcome::Stopped(path)));
            }
            let mut stepped = match self.step(&loader, began, on_event) {
                // An error of this rank alone. The others wait where they cannot learn of it.
                Err(e) if !e.is_collective() => return Err(e),
                stepped => stepped,
            };
            let k = self.byol.k;
            let [before, epochs] = [k - 1, k].map(|k| self.plan.epochs_done(k));
            let config = &self.plan.recipe.checkpoint;
            let due = match config.every_steps {
                0 => epochs > before,
                every => k.is_multiple_of(every) || k == total,
            };
            // All ranks must agree, because they check the weights together.
            let late = ranks.any(saved.elapsed().as_secs_f64() > 60.0 * config.every_minutes);
            let stopping = ranks.any(stop.load(Ordering::Relaxed)) && k < total;
            if stepped.is_ok() && (epochs > before || due || late || stopping) {
                stepped = self.check_weights();
            }
            match stepped {
                Err(Error::Diverged { what, value, step, .. }) if on_collapse == OnCollapse::Rollback => {
                    let why = format!("the {what} is {value} at step {step}");
                    return Ok(Stretch::Failed(Failure { kind: FailureKind::Diverged, why }));
                }
                Err(e @ (Error::Diverged { .. } | Error::Overflow { .. })) => {
                    let why = e.to_string().replace('\n', " ");
                    self.record(&Record::Failed { step: self.byol.k, why })?;
                    return Err(e);
                }
                other => other?,
            }
            for epoch in before + 1..=epochs {
                let Some(failure) = self.end_of_epoch(epoch, on_event)? else {
                    self.history.healthy_at(k);
                    continue;
                };
                match on_collapse {
                    OnCollapse::Continue => {}
                    OnCollapse::Rollback => return Ok(Stretch::Failed(failure)),
                    OnCollapse::Stop => return Err(self.collapsed(failure)),
                }
            }
            if due || late || stopping {
                let path = self.save_checkpoint()?;
                saved = Instant::now();
                on_event(Event::Checkpoint(&path));
                if stopping {
                    return Ok(Stretch::Ended(Outcome::Stopped(path)));
                }
            }
        }
        self.save_encoder("encoder.safetensors")?;
        Ok(Stretch::Ended(Outcome::Finished))
    }

    /// Loader of the remaining steps.
    fn loader(&self) -> Loader {
        let micro_batches = self.plan.recipe.train.accumulate as u64;
        let (first, last) = (self.byol.k * micro_batches, self.plan.schedule.total * micro_batches);
        Loader::start(Request { first, last, ..batch::request(&self.plan, &self.images, &self.context) })
    }

    fn step(&mut self, loader: &Loader, began: Instant, on_event: &mut impl FnMut(Event)) -> Result<(), Error> {
        let (mut seconds, mut lap) = (PhaseSeconds::default(), began);
        let device = self.context.device.clone();
        let next_views = || loader.next_batch().map(|batch| batch::to_device(batch, &device));
        let on_phase = |phase| {
            let elapsed = lap.elapsed().as_secs_f64();
            lap = Instant::now();
            *match phase {
                Phase::Data => &mut seconds.data,
                Phase::Forward => &mut seconds.forward,
                Phase::Backward => &mut seconds.backward,
                Phase::Exchange => &mut seconds.exchange,
                Phase::Update => &mut seconds.update,
            } += elapsed;
        };
        let (stats, skipped) = self.stepper.step(&mut self.byol, next_views, on_phase)?;
        let StepStats { loss, eta, tau } = stats;
        let step = self.byol.k;
        if !loss.is_finite() {
            return Err(self.diverged("loss", loss));
        }
        if let Some(scale) = self.stepper.loss_scale.filter(|scale| skipped && scale.factor < 1.0) {
            return Err(Error::Overflow { step, factor: scale.factor, kept: self.last_checkpoint(step) });
        }
        self.loss_sum += loss;
        self.loss_count += 1;
        let batch = self.plan.recipe.train.batch as f64;
        let epoch = step as f64 * batch / self.plan.images as f64;
        let images_per_second = batch / seconds.total();
        self.record(&Record::Step { step, epoch, loss, eta, tau, skipped, images_per_second, seconds })?;
        self.log_scalars(&[
            ("loss", loss),
            ("learning rate", eta),
            ("tau", tau),
            ("images per second", images_per_second),
        ])?;
        on_event(Event::Step { step, epoch, stats: &stats, skipped, seconds });
        Ok(())
    }

    /// Checks that θ is finite: an update can produce NaN from a finite loss, and a checkpoint must
    /// be fit to resume from.
    fn check_weights(&self) -> Result<(), Error> {
        let norm = self.byol.online.params.norm();
        if norm.is_finite() { Ok(()) } else { Err(self.diverged("norm of the weights", norm)) }
    }

    /// Evaluates, records and reports the end of an epoch on rank 0. Returns the failure, if any,
    /// on all ranks.
    fn end_of_epoch(&mut self, epoch: u64, on_event: &mut impl FnMut(Event)) -> Result<Option<Failure>, Error> {
        self.record_skipped(on_event)?;
        let loss = (self.loss_count > 0).then(|| self.loss_sum / self.loss_count as f64);
        (self.loss_sum, self.loss_count) = (0.0, 0);
        let ranks = self.context.ranks;
        let failure = if ranks.is_root() { self.evaluate(epoch, loss, on_event)? } else { None };
        Ok(ranks.broadcast_value(failure))
    }

    fn evaluate(
        &mut self,
        epoch: u64,
        loss: Option<f64>,
        on_event: &mut impl FnMut(Event),
    ) -> Result<Option<Failure>, Error> {
        let evaluate = |monitor: &Monitor| health::evaluate(&self.byol, monitor, &self.context.device);
        let (health, seconds) = self.monitor.as_ref().map(evaluate).transpose()?.unzip();
        let step = self.byol.k;
        if epoch == 0 {
            self.initial_health.clone_from(&health);
        }
        // The chance level is known for BYOL's loss only.
        let byol_loss = loss.filter(|_| self.plan.recipe.method.beta == 0.0);
        let failure = health.as_ref().and_then(|h| h.failure(self.initial_health.as_ref(), byol_loss, step));
        let collapse = failure.as_ref().map(Failure::to_string);
        let elapsed_s = self.started.elapsed().as_secs_f64();
        let (metrics, why) = (health.clone(), collapse.clone());
        self.record(&Record::Epoch { epoch, step, loss, health: metrics, collapse: why, seconds, elapsed_s })?;
        if let Some(h) = &health {
            let mut values = vec![
                ("health/projection std".to_owned(), h.projection_std),
                ("health/projection cosine".to_owned(), h.projection_cosine),
                ("health/RankMe".to_owned(), h.rankme),
            ];
            values.extend(h.knn.map(|knn| ("health/kNN accuracy".to_owned(), knn)));
            let label_free = h.label_free.iter().flat_map(|metrics| metrics.named_values());
            values.extend(label_free.map(|(name, value, _)| (format!("label-free/{name}"), value)));
            let finite = values.iter().filter(|(_, value)| value.is_finite());
            let values: Vec<(&str, f64)> = finite.map(|(name, value)| (name.as_str(), *value)).collect();
            self.log_scalars(&values)?;
        }
        // A failing network is never the best, whatever its score.
        let score = health.as_ref().and_then(|h| h.label_free).map(|metrics| metrics.score());
        let score = score.filter(|_| failure.is_none() && epoch > 0);
        if let Some(score) = score.filter(|score| self.best_score.is_none_or(|best| *score > best)) {
            self.best_score = Some(score);
            self.save_encoder("best.safetensors")?;
        }
        on_event(Event::Epoch { epoch, loss, health: health.as_ref(), collapse: collapse.as_deref() });
        Ok(failure)
    }

    /// Returns to the last healthy checkpoint, with half the learning rate. If training from there
    /// has failed before, returns to the one before it, since its network may have been failing
    /// already. `metrics.jsonl` keeps its lines and gets one with the reason.
    fn roll_back(&mut self, why: &Failure, on_event: &mut impl FnMut(Event)) -> Result<(), Error> {
        let from = self.byol.k;
        if self.halvings == MAX_ROLLBACKS {
            return Err(self.collapsed(why.clone()));
        }
        let (folder, RunContext { device, ranks, .. }) = (checkpoints(&self.folder), self.context.clone());
        let mut counters = Counters::default();
        self.history.failed_at(from);
        if ranks.is_root() {
            // Checkpoints between two epochs may already be of a failing network.
            checkpoint::remove_after(&folder, self.history.healthy[0])?;
            (_, counters) = checkpoint::load_newest(&folder, &mut self.byol, &self.plan_hashes, &device)?;
        }
        let hash = self.plan_hash().to_owned();
        let counters = checkpoint::share(ranks, &mut self.byol, counters, &hash, &device);
        (self.loss_sum, self.loss_count) = (counters.loss_sum, counters.loss_count);
        self.stepper.loss_scale = counters.loss_scale;
        self.halvings += 1;
        self.byol.schedule.peak = halved(self.plan.schedule.peak, self.halvings);
        let (to, peak) = (self.byol.k, self.byol.schedule.peak);
        self.record(&Record::Rollback { from, to, peak, why: why.to_string() })?;
        self.save_checkpoint()?;
        on_event(Event::Rollback { from, to, peak, why });
        Ok(())
    }

    /// Records images of shards that any rank has skipped since the last call.
    fn record_skipped(&mut self, on_event: &mut impl FnMut(Event)) -> Result<(), Error> {
        let skipped = self.images.skipped();
        let new = &skipped[self.skipped.min(skipped.len())..];
        let own: String = new.iter().map(|image| format!("{image}\n")).collect();
        self.skipped = skipped.len();
        let all: Vec<u8> = self.context.ranks.all_gather(own.as_bytes()).concat();
        if all.is_empty() || !self.context.ranks.is_root() {
            return Ok(());
        }
        let path = self.folder.join("skipped.txt");
        let mut text = fs::read_to_string(&path).unwrap_or_default();
        let mut known: HashSet<String> = text.lines().map(str::to_owned).collect();
        let all = String::from_utf8_lossy(&all);
        let new: Vec<&str> = all.lines().filter(|line| known.insert((*line).to_owned())).collect();
        if let Some(first) = new.first() {
            text.extend(new.iter().map(|line| format!("{line}\n")));
            atomic_write::write_whole(&path, text.as_bytes()).map_err(|source| Error::Write { path, source })?;
            on_event(Event::Skipped(new.len(), first));
        }
        Ok(())
    }

    /// Writes a checkpoint and the current encoder, on rank 0. Returns the path of the checkpoint.
    fn save_checkpoint(&mut self) -> Result<PathBuf, Error> {
        let Some(metrics) = &mut self.metrics else { return Ok(checkpoints(&self.folder)) };
        let path = self.folder.join("metrics.jsonl");
        metrics.sync().map_err(|source| Error::Write { path, source })?;
        let counters = Counters {
            metrics_bytes: metrics.bytes(),
            loss_sum: self.loss_sum,
            loss_count: self.loss_count,
            halvings: self.halvings,
            loss_scale: self.stepper.loss_scale,
        };
        let keep = self.plan.recipe.checkpoint.keep;
        let folder = checkpoints(&self.folder);
        let path = checkpoint::save(&folder, &self.byol, counters, self.plan_hash(), keep, self.history.healthy)?;
        self.save_encoder("encoder.safetensors")?;
        Ok(path)
    }

    fn save_encoder(&self, name: &str) -> Result<(), Error> {
        if !self.context.ranks.is_root() {
            return Ok(());
        }
        Ok(weights::save(&self.folder.join(name), &self.plan.encoder, &self.byol.online)?)
    }

    fn record(&mut self, record: &Record) -> Result<(), Error> {
        let path = self.folder.join("metrics.jsonl");
        let write = |file: &mut MetricsFile| file.write(record).map_err(|source| Error::Write { path, source });
        self.metrics.as_mut().map_or(Ok(()), write)
    }

    fn log_scalars(&mut self, values: &[(&str, f64)]) -> Result<(), Error> {
        self.log(|events, step| events.scalars(step, values))
    }

    /// Writes into the TensorBoard event file, if there is one. `write` receives it with the step.
    ///
    /// # Errors
    /// [`Error::Write`].
    #[doc(hidden)]
    pub fn log(&mut self, write: impl FnOnce(&mut EventFile, u64) -> io::Result<()>) -> Result<(), Error> {
        let path = self.folder.join("tensorboard");
        match &mut self.events {
            Some(events) => write(events, self.byol.k).map_err(|source| Error::Write { path, source }),
            None => Ok(()),
        }
    }

    /// Hash of the current plan.
    fn plan_hash(&self) -> &str {
        self.plan_hashes.first().map_or("", String::as_str)
    }

    fn diverged(&self, what: &'static str, value: f64) -> Error {
        let step = self.byol.k;
        let f16 = self.stepper.loss_scale.is_some();
        Error::Diverged { what, value, step, f16, kept: self.last_checkpoint(step) }
    }

    fn collapsed(&self, failure: Failure) -> Error {
        Error::Collapsed { step: self.byol.k, failure, kept: self.last_checkpoint(self.history.healthy[0]) }
    }

    /// Latest checkpoint of step `until` or before, in words.
    fn last_checkpoint(&self, until: u64) -> String {
        match checkpoint::newest_until(&checkpoints(&self.folder), until) {
            Some(path) => format!("the last good checkpoint is {}", path.display()),
            None => "there is no checkpoint yet".into(),
        }
    }
}
