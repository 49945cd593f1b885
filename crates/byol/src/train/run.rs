//! The loop: step after step, with metrics, health and checkpoints, until the plan is done or somebody says stop.
//!
//! A run's folder: `plan.toml`, `metrics.jsonl`, `skipped.txt`, `checkpoints/`, `encoder.safetensors`, `best.safetensors`.

use std::{
    collections::HashSet,
    fs::{self, File, OpenOptions},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::Instant,
};

use burn::tensor::{Device, Tensor, TensorData};

use super::{
    Error, Plan,
    checkpoint::{self, Counters},
    feed::{self, Feed},
    health::{self, Failure, Health, Kind, Watch},
    metrics::{self, History, Line, Metrics, Split},
    recipe::{HealthConfig, OnCollapse},
    tensorboard::EventFile,
};
use crate::{
    byol::{Byol, Phase, Report},
    data::{Dataset, Images, Loader, MicroBatch, prefetch::Request},
    device, files,
    finish::finish,
    nn::weights,
    ranks::Ranks,
    views::Draw,
};

/// Data ready for a run: what is trained on, what is watched.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// As given.
    pub root: PathBuf,
    /// In words.
    pub kind: String,
    /// Names of the classes; empty without labels.
    pub classes: Vec<String>,
    /// Training images.
    pub train: Images,
    /// Watched images; none where health is switched off.
    pub held_out: Option<Images>,
    /// `path: reason` a line.
    pub skipped: Vec<String>,
}

impl Prepared {
    /// Takes `limit` training images and `health.images` to watch, decodes each once and leaves out what cannot be used. `looked_at`
    /// hears of each image with the number of all.
    ///
    /// # Errors
    /// [`Error::Data`].
    pub fn new(
        dataset: Dataset,
        limit: usize,
        health: &HealthConfig,
        keep_bytes: usize,
        looked_at: &(dyn Fn(usize) + Sync),
    ) -> Result<Prepared, Error> {
        let dataset = dataset.limit(limit);
        // Of one image there is no figure.
        let held_out = dataset.held_out.as_ref().filter(|h| health.images > 0 && h.len() > 1);
        let held_out = held_out.map(|h| h.some(health.images));
        let dataset = Dataset { held_out, test: None, ..dataset };
        let all = dataset.n_images();
        let Dataset { root, kind, classes, train, held_out, mut skipped, .. } =
            dataset.check_to_train(keep_bytes, &|| looked_at(all))?;
        let (train, held_out) = match held_out {
            Some(own) => (train, Some(own)),
            None => match health.images.min(train.len() / 10) {
                0 | 1 => (train, None),
                n => {
                    let (rest, out) = train.hold_out(n);
                    let (out, bad) = out.usable();
                    skipped.extend(bad);
                    (rest, (out.len() > 1).then_some(out))
                }
            },
        };
        let skipped = skipped.into_iter().map(|s| format!("{}: {}", s.what, s.why)).collect();
        Ok(Prepared { root, kind, classes, train, held_out, skipped })
    }

    /// What a run of this plan looks at after every epoch; none where nothing is held out.
    pub fn watch(&self, plan: &Plan) -> Option<Watch> {
        let held_out = self.held_out.clone()?;
        let config = plan.recipe.health.clone();
        let labelled = held_out.labels().is_some() && self.train.labels().is_some();
        let bank = labelled.then(|| self.train.sample(config.bank));
        let views = &plan.recipe.views;
        Some(Watch {
            bank,
            classes: self.classes.len(),
            config,
            spec: plan.encoder.clone(),
            policies: [views.first.clone(), views.second.clone()],
            size: views.size,
            seed: plan.recipe.seed,
            // A training image goes forward four times and backward twice; a watched one forward four times.
            card: (self.train.len() / 48).clamp(16, 128).min(held_out.len()),
            held_out,
        })
    }
}

/// How many bytes of decoded images may stay in memory: a quarter of what is free, at most 8 GiB.
pub fn keep_bytes(free_mb: u64) -> usize {
    usize::try_from((free_mb << 20) / 4).unwrap_or(usize::MAX).min(8 << 30)
}

/// What a run tells whoever watches it.
#[derive(Debug)]
pub enum Event<'a> {
    /// A step is done.
    Step {
        /// Steps done.
        step: u64,
        /// Epochs done, with the part of the running one.
        epoch: f64,
        /// Loss, η and τ.
        report: &'a Report,
        /// Where the step's time went.
        split: Split,
    },
    /// An epoch is done; 0 is before the first step.
    Epoch {
        /// Epochs done.
        epoch: u64,
        /// Mean loss; none for epoch 0.
        loss: Option<f64>,
        /// Figures on the held-out images.
        health: Option<&'a Health>,
        /// Why it looks collapsed, if it does.
        collapse: Option<&'a str>,
    },
    /// So many more images of shards cannot be used and were passed over; the first as `path: reason`. All are in `skipped.txt`.
    PassedOver(usize, &'a str),
    /// A checkpoint is on disk.
    Checkpoint(&'a Path),
    /// The run went back, to learn on with half the learning rate.
    Rollback {
        /// From after this step.
        from: u64,
        /// To after this one.
        to: u64,
        /// The peak of the learning rate from now on.
        peak: f64,
        /// What had gone wrong.
        why: &'a Failure,
    },
}

/// How a run ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// Somebody said stop; the checkpoint is where to go on from.
    Stopped(PathBuf),
}

/// A run, ready to go on.
#[derive(Debug)]
pub struct Run {
    /// Its folder.
    pub folder: PathBuf,
    /// What it does.
    pub plan: Plan,
    /// Where it stands.
    pub byol: Byol,
    /// What was measured to settle where views are finished, where the recipe left that open.
    pub fed: Option<Feed>,
    images: Images,
    watch: Option<Watch>,
    device: Device,
    /// Of the rank that writes.
    metrics: Option<Metrics>,
    events: Option<EventFile>,
    loss_sum: f64,
    loss_count: u64,
    /// How often the learning rate has been halved.
    halvings: u32,
    /// The figures before the first step.
    start: Option<Health>,
    /// Where it was well, where it failed.
    history: History,
    /// The best score without labels so far.
    best: Option<f64>,
    threads: usize,
    /// Images that could not be used, of those that nobody had looked through.
    passed_over: usize,
    started: Instant,
    /// Whether nothing has been written to `metrics.jsonl`.
    fresh: bool,
    ranks: Ranks,
    /// Of `plan.toml` as it stands; on other ranks than the first of nothing.
    plan_hash: String,
    /// Held while the run is open, so that no second program writes into its folder. Of the rank that writes.
    _lock: Option<File>,
}

/// Where a run computes.
#[derive(Debug, Clone)]
pub struct Place {
    /// Where the weights live.
    pub device: Device,
    /// That make views, at least 1.
    pub threads: usize,
    /// Who shares each batch. Only rank 0 writes.
    pub ranks: Ranks,
}

impl Place {
    /// A device of one process.
    pub fn alone(device: Device, threads: usize) -> Place {
        Place { device, threads, ranks: Ranks::ALONE }
    }
}

/// How often a run goes back before it gives up.
const ROLLBACKS: u32 = 5;

/// How a stretch of a run ended.
enum Way {
    Ended(Outcome),
    Failed(Failure),
}

/// The learning rate's peak after so many halvings.
fn halved(peak: f64, times: u32) -> f64 {
    peak * 0.5f64.powi(times as i32)
}

/// The file names of a run.
fn plan_file(folder: &Path) -> PathBuf {
    folder.join("plan.toml")
}

fn checkpoints(folder: &Path) -> PathBuf {
    folder.join("checkpoints")
}

/// Refuses a folder that holds anything.
///
/// # Errors
/// [`Error::Occupied`].
pub fn must_be_free(folder: &Path) -> Result<(), Error> {
    let path = folder.to_owned();
    if plan_file(folder).exists() {
        return Err(Error::Occupied { path, what: "another run" });
    }
    if folder.is_file() || fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()) {
        return Err(Error::Occupied { path, what: "something that is not a run" });
    }
    Ok(())
}

/// The plan of a run's folder.
///
/// # Errors
/// [`Error::Read`], [`Error::BadPlan`].
pub fn read_plan(folder: &Path) -> Result<Plan, Error> {
    Plan::parse(&plan_text(folder)?, &plan_file(folder))
}

fn plan_text(folder: &Path) -> Result<String, Error> {
    let path = plan_file(folder);
    fs::read_to_string(&path).map_err(|source| Error::Read { path, source })
}

/// Takes the folder for this program until it ends; the system lets go of it then, however that comes. Where folders cannot be locked, as on some
/// network drives, there is no guard.
fn lock(folder: &Path) -> Result<File, Error> {
    let path = folder.join("lock");
    let open = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
    let file = open.map_err(|source| Error::Write { path, source })?;
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => Err(Error::Busy(folder.to_owned())),
        _ => Ok(file),
    }
}

impl Run {
    /// Makes the folder of a new run: plan, skipped images, checkpoint 0.
    ///
    /// # Errors
    /// [`Error::Occupied`], [`Error::Write`], [`Error::Checkpoint`], [`Error::Ranks`], [`Error::Device`], [`Error::Data`].
    pub fn create(
        folder: &Path,
        mut plan: Plan,
        data: &Prepared,
        place: Place,
        tensorboard: bool,
    ) -> Result<Run, Error> {
        device::check(&place.device, plan.recipe.train.precision)?;
        plan.check_ranks(place.ranks)?;
        if !place.ranks.leads() {
            let byol = plan.start(&place.device);
            let fed = feed::settle(&mut plan, &data.train, &place, &byol)?;
            let run = Run::assemble(folder, plan, byol, data, place, Counters::default(), false)?;
            return Ok(Run { fed, ..run });
        }
        must_be_free(folder)?;
        // Before anything is measured or written: the weights to start with may not fit.
        let byol = plan.begin(&place.device)?;
        let fed = feed::settle(&mut plan, &data.train, &place, &byol)?;
        let write = |path: &Path, source| Error::Write { path: path.to_owned(), source };
        fs::create_dir_all(checkpoints(folder)).map_err(|e| write(folder, e))?;
        let lock = lock(folder)?;
        let text = plan.to_toml();
        files::write_whole(&plan_file(folder), text.as_bytes()).map_err(|e| write(&plan_file(folder), e))?;
        if !data.skipped.is_empty() {
            let path = folder.join("skipped.txt");
            let text = data.skipped.join("\n") + "\n";
            files::write_whole(&path, text.as_bytes()).map_err(|e| write(&path, e))?;
        }
        let plan_hash = checkpoint::plan_hash(&text);
        let keep = plan.recipe.checkpoint.keep;
        checkpoint::save(&checkpoints(folder), &byol, Counters::default(), &plan_hash, keep, [0; 2])?;
        let run = Run::assemble(folder, plan, byol, data, place, Counters::default(), tensorboard)?;
        Ok(Run { fed, plan_hash, _lock: Some(lock), ..run })
    }

    /// Goes back to the newest checkpoint of a folder, with as many ranks as there are now.
    ///
    /// # Errors
    /// [`Error::DataChanged`], [`Error::Busy`], [`Error::Checkpoint`], [`Error::Write`], [`Error::Ranks`].
    pub fn resume(folder: &Path, plan: Plan, data: &Prepared, place: Place) -> Result<Run, Error> {
        device::check(&place.device, plan.recipe.train.precision)?;
        plan.check_ranks(place.ranks)?;
        let changed = |reason: String| Error::DataChanged { root: plan.data.clone(), reason };
        if data.train.len() != plan.images {
            return Err(changed(format!("{} usable training images, not {}", data.train.len(), plan.images)));
        }
        if data.train.fingerprint() != plan.fingerprint {
            return Err(changed("a name or size differs".into()));
        }
        if let Some(held_out) = &data.held_out
            && plan.held_out_fingerprint.as_ref().is_some_and(|print| *print != held_out.fingerprint())
        {
            return Err(changed("of the watched ones, a name or size differs".into()));
        }
        let mut byol = plan.start(&place.device);
        if !place.ranks.leads() {
            return Run::assemble(folder, plan, byol, data, place, Counters::default(), false);
        }
        let lock = lock(folder)?;
        let plan_hash = checkpoint::plan_hash(&plan_text(folder)?);
        let (_, counters) = checkpoint::load_newest(&checkpoints(folder), &mut byol, &plan_hash, &place.device)?;
        let tensorboard = folder.join("tensorboard").is_dir();
        let run = Run::assemble(folder, plan, byol, data, place, counters, tensorboard)?;
        Ok(Run { plan_hash, _lock: Some(lock), ..run })
    }

    fn assemble(
        folder: &Path,
        plan: Plan,
        mut byol: Byol,
        data: &Prepared,
        place: Place,
        counters: Counters,
        tensorboard: bool,
    ) -> Result<Run, Error> {
        let Place { device, threads, ranks } = place;
        byol.ranks = ranks;
        byol.network.ranks = if plan.recipe.train.sync_bn { ranks } else { Ranks::ALONE };
        let counters = checkpoint::share(ranks, &mut byol, counters, "", &device);
        byol.schedule.peak = halved(plan.schedule.peak, counters.halvings);
        let path = folder.join("metrics.jsonl");
        let write = |path: PathBuf| move |source| Error::Write { path, source };
        let open = || Metrics::open(&path, counters.metrics_bytes).map_err(write(path.clone()));
        let metrics = ranks.leads().then(open).transpose()?;
        let board = folder.join("tensorboard");
        let events = tensorboard.then(|| EventFile::create(&board)).transpose().map_err(write(board))?;
        let figures = metrics::figures(&path);
        let start = figures.first().cloned();
        let history = metrics::history(&path);
        let best = figures.iter().skip(1).filter_map(|h| h.card).map(|card| card.score()).reduce(f64::max);
        Ok(Run {
            folder: folder.to_owned(),
            halvings: counters.halvings,
            start,
            best,
            history,
            watch: ranks.leads().then(|| data.watch(&plan)).flatten(),
            images: data.train.clone(),
            loss_sum: counters.loss_sum,
            loss_count: counters.loss_count,
            passed_over: 0,
            started: Instant::now(),
            fresh: counters.metrics_bytes == 0,
            ranks,
            plan,
            byol,
            device,
            metrics,
            events,
            threads,
            fed: None,
            plan_hash: String::new(),
            _lock: None,
        })
    }

    /// The loop. `stop` is looked at after every step.
    ///
    /// # Errors
    /// [`Error::Collapsed`], [`Error::Diverged`], [`Error::Data`], [`Error::Write`], [`Error::Checkpoint`]; the last checkpoint is whole
    /// after each.
    pub fn go(&mut self, stop: &AtomicBool, mut tell: impl FnMut(Event)) -> Result<Outcome, Error> {
        if self.byol.k == 0 && self.fresh {
            self.end_of_epoch(0, &mut tell)?;
        }
        loop {
            match self.go_on(stop, &mut tell)? {
                Way::Ended(outcome) => return Ok(outcome),
                Way::Failed(failure) => self.roll_back(&failure, &mut tell)?,
            }
        }
    }

    /// To the end, or to a failure that is to be undone.
    fn go_on(&mut self, stop: &AtomicBool, tell: &mut impl FnMut(Event)) -> Result<Way, Error> {
        let total = self.plan.schedule.total;
        let on_collapse = self.plan.recipe.health.on_collapse;
        let loader = self.loader();
        let mut saved = Instant::now();
        while self.byol.k < total {
            let mut stepped = match self.step(&loader, tell) {
                // Of this rank alone: the others are where they do not hear of it.
                Err(e) if !e.is_of_all_ranks() => return Err(e),
                stepped => stepped,
            };
            let k = self.byol.k;
            let [before, epochs] = [k - 1, k].map(|k| self.plan.epochs_done(k));
            let config = &self.plan.recipe.checkpoint;
            let due = match config.every_steps {
                0 => epochs > before,
                every => k.is_multiple_of(every) || k == total,
            };
            // All ranks have to know, because they look at the weights together.
            let late = self.ranks.any(saved.elapsed().as_secs_f64() > 60.0 * config.every_minutes);
            let stopping = self.ranks.any(stop.load(Ordering::Relaxed)) && k < total;
            if stepped.is_ok() && (epochs > before || due || late || stopping) {
                stepped = self.check_weights();
            }
            match stepped {
                Err(Error::Diverged { what, value, step, .. }) if on_collapse == OnCollapse::Rollback => {
                    let why = format!("the {what} is {value} at step {step}");
                    return Ok(Way::Failed(Failure { kind: Kind::Diverged, why }));
                }
                Err(e @ (Error::Diverged { .. } | Error::Overflow { .. })) => {
                    self.write(&Line::Failed { step: self.byol.k, why: e.to_string() })?;
                    return Err(e);
                }
                other => other?,
            }
            for epoch in before + 1..=epochs {
                let Some(failure) = self.end_of_epoch(epoch, tell)? else {
                    self.history.was_well(k);
                    continue;
                };
                match on_collapse {
                    OnCollapse::GoOn => {}
                    OnCollapse::Rollback => return Ok(Way::Failed(failure)),
                    OnCollapse::Stop => {
                        return Err(Error::Collapsed {
                            step: k,
                            failure,
                            kept: self.last_good(self.history.healthy[0]),
                        });
                    }
                }
            }
            if due || late || stopping {
                let path = self.checkpoint()?;
                saved = Instant::now();
                tell(Event::Checkpoint(&path));
                if stopping {
                    return Ok(Way::Ended(Outcome::Stopped(path)));
                }
            }
        }
        self.save_encoder()?;
        Ok(Way::Ended(Outcome::Finished))
    }

    /// Views from the next step on.
    fn loader(&self) -> Loader {
        let accumulate = self.plan.recipe.train.accumulate as u64;
        let (first, last) = (self.byol.k * accumulate, self.plan.schedule.total * accumulate);
        let place = Place { device: self.device.clone(), threads: self.threads, ranks: self.ranks };
        Loader::start(Request { first, last, ..feed::request(&self.plan, &self.images, &place) })
    }

    /// Writes down which images could not be used on any rank, where nobody had looked through them before.
    fn note_passed_over(&mut self, tell: &mut impl FnMut(Event)) -> Result<(), Error> {
        let passed = self.images.passed_over();
        let new = &passed[self.passed_over.min(passed.len())..];
        let own: String = new.iter().map(|skipped| format!("{}: {}\n", skipped.what, skipped.why)).collect();
        self.passed_over = passed.len();
        let of_all: Vec<u8> = self.ranks.gather(own.as_bytes()).concat();
        if of_all.is_empty() || !self.ranks.leads() {
            return Ok(());
        }
        let path = self.folder.join("skipped.txt");
        let mut text = fs::read_to_string(&path).unwrap_or_default();
        let mut known: HashSet<String> = text.lines().map(str::to_owned).collect();
        let of_all = String::from_utf8_lossy(&of_all);
        let new: Vec<&str> = of_all.lines().filter(|line| known.insert((*line).to_owned())).collect();
        if let Some(first) = new.first() {
            text.extend(new.iter().map(|line| format!("{line}\n")));
            files::write_whole(&path, text.as_bytes()).map_err(|source| Error::Write { path, source })?;
            tell(Event::PassedOver(new.len(), first));
        }
        Ok(())
    }

    /// Back to the last healthy checkpoint, with half the learning rate; where the way from there has failed before, to the one before it: its
    /// network may have been ill already. The lines of `metrics.jsonl` stay, with one more that says why.
    fn roll_back(&mut self, why: &Failure, tell: &mut impl FnMut(Event)) -> Result<(), Error> {
        let from = self.byol.k;
        if self.halvings == ROLLBACKS {
            return Err(Error::Collapsed {
                step: from,
                failure: why.clone(),
                kept: self.last_good(self.history.healthy[0]),
            });
        }
        let folder = checkpoints(&self.folder);
        let mut counters = Counters::default();
        self.history.failed(from);
        if self.ranks.leads() {
            // Checkpoints between two ends of epochs may already be of a failing network.
            checkpoint::remove_after(&folder, self.history.healthy[0])?;
            (_, counters) = checkpoint::load_newest(&folder, &mut self.byol, &self.plan_hash, &self.device)?;
        }
        let counters = checkpoint::share(self.ranks, &mut self.byol, counters, &self.plan_hash, &self.device);
        (self.loss_sum, self.loss_count) = (counters.loss_sum, counters.loss_count);
        self.halvings += 1;
        self.byol.schedule.peak = halved(self.plan.schedule.peak, self.halvings);
        let (to, peak) = (self.byol.k, self.byol.schedule.peak);
        self.write(&Line::Rollback { from, to, peak, why: why.to_string() })?;
        self.checkpoint()?;
        tell(Event::Rollback { from, to, peak, why });
        Ok(())
    }

    fn step(&mut self, loader: &Loader, tell: &mut impl FnMut(Event)) -> Result<(), Error> {
        let (mut split, mut lap) = (Split::default(), Instant::now());
        let device = self.device.clone();
        let views = || loader.next_batch().map(|batch| tensors(batch, &device));
        let report = self.byol.step(self.plan.recipe.train.accumulate, views, |phase| {
            let seconds = lap.elapsed().as_secs_f64();
            lap = Instant::now();
            *match phase {
                Phase::Data => &mut split.data,
                Phase::Forward => &mut split.forward,
                Phase::Backward => &mut split.backward,
                Phase::Exchange => &mut split.exchange,
                Phase::Update => &mut split.update,
            } += seconds;
        })?;
        let step = self.byol.k;
        if !report.loss.is_finite() {
            let f16 = self.byol.scale.is_some();
            return Err(Error::Diverged { what: "loss", value: report.loss, step, f16, kept: self.last_good(step) });
        }
        if let Some(scale) = self.byol.scale.filter(|scale| report.skipped && scale.factor < 1.0) {
            return Err(Error::Overflow { step, factor: scale.factor, kept: self.last_good(step) });
        }
        self.loss_sum += report.loss;
        self.loss_count += 1;
        let batch = self.plan.recipe.train.batch as f64;
        let epoch = step as f64 * batch / self.plan.images as f64;
        let Report { loss, eta, tau, skipped } = report;
        let images_per_second = batch / split.total();
        self.write(&Line::Step { step, epoch, loss, eta, tau, skipped, images_per_second, seconds: split })?;
        self.scalars(&[
            ("loss", loss),
            ("learning rate", eta),
            ("tau", tau),
            ("images per second", images_per_second),
        ])?;
        tell(Event::Step { step, epoch, report: &report, split });
        Ok(())
    }

    /// That θ has no NaN or infinity in it: an update can bring one though its loss was a number, and what is written down must be fit to go on from.
    fn check_weights(&self) -> Result<(), Error> {
        let norm = self.byol.online.params.norm();
        if norm.is_finite() {
            return Ok(());
        }
        let step = self.byol.k;
        let (f16, kept) = (self.byol.scale.is_some(), self.last_good(step));
        Err(Error::Diverged { what: "norm of the weights", value: norm, step, f16, kept })
    }

    /// Measures, writes, tells; what has gone wrong, if anything. Rank 0 does, and all learn of it.
    fn end_of_epoch(&mut self, epoch: u64, tell: &mut impl FnMut(Event)) -> Result<Option<Failure>, Error> {
        self.note_passed_over(tell)?;
        let loss = (self.loss_count > 0).then(|| self.loss_sum / self.loss_count as f64);
        (self.loss_sum, self.loss_count) = (0.0, 0);
        let failure = if self.ranks.leads() { self.measure(epoch, loss, tell)? } else { None };
        Ok(self.ranks.agree(failure))
    }

    fn measure(
        &mut self,
        epoch: u64,
        loss: Option<f64>,
        tell: &mut impl FnMut(Event),
    ) -> Result<Option<Failure>, Error> {
        let measure = |watch: &Watch| health::measure(&self.byol, watch, &self.device);
        let (health, seconds) = self.watch.as_ref().map(measure).transpose()?.unzip();
        let step = self.byol.k;
        if epoch == 0 {
            self.start.clone_from(&health);
        }
        // What chance gives is known for BYOL's loss alone.
        let of_byol = loss.filter(|_| self.plan.recipe.method.beta == 0.0);
        let failure = health.as_ref().and_then(|h| h.failure(self.start.as_ref(), of_byol, step));
        let collapse = failure.as_ref().map(Failure::to_string);
        let elapsed_s = self.started.elapsed().as_secs_f64();
        let (figures, why) = (health.clone(), collapse.clone());
        self.write(&Line::Epoch { epoch, step, loss, health: figures, collapse: why, seconds, elapsed_s })?;
        if let Some(h) = &health {
            let mut values = vec![
                ("health/projection std", h.projection_std),
                ("health/projection cosine", h.projection_cosine),
                ("health/RankMe", h.rankme),
            ];
            values.extend(h.knn.map(|knn| ("health/kNN accuracy", knn)));
            self.scalars(&values)?;
        }
        // The encoder that scores best without labels; of a failing network no figure counts.
        let score = health.as_ref().and_then(|h| h.card).map(|card| card.score()).filter(|_| failure.is_none());
        if let Some(score) = score.filter(|score| epoch > 0 && self.best.is_none_or(|best| *score > best)) {
            self.best = Some(score);
            self.save_as("best.safetensors")?;
        }
        tell(Event::Epoch { epoch, loss, health: health.as_ref(), collapse: collapse.as_deref() });
        Ok(failure)
    }

    /// Writes a checkpoint, and the encoder as it is now; its path. Rank 0 does.
    fn checkpoint(&mut self) -> Result<PathBuf, Error> {
        let Some(metrics) = &mut self.metrics else { return Ok(checkpoints(&self.folder)) };
        let path = self.folder.join("metrics.jsonl");
        metrics.sync().map_err(|source| Error::Write { path, source })?;
        let (metrics_bytes, halvings) = (metrics.bytes(), self.halvings);
        let counters = Counters { metrics_bytes, loss_sum: self.loss_sum, loss_count: self.loss_count, halvings };
        let keep = self.plan.recipe.checkpoint.keep;
        let folder = checkpoints(&self.folder);
        let path = checkpoint::save(&folder, &self.byol, counters, &self.plan_hash, keep, self.history.healthy)?;
        self.save_encoder()?;
        Ok(path)
    }

    fn save_encoder(&self) -> Result<(), Error> {
        self.save_as("encoder.safetensors")
    }

    fn save_as(&self, name: &str) -> Result<(), Error> {
        if !self.ranks.leads() {
            return Ok(());
        }
        Ok(weights::save(&self.folder.join(name), &self.plan.encoder, &self.byol.online)?)
    }

    fn write(&mut self, line: &Line) -> Result<(), Error> {
        let path = self.folder.join("metrics.jsonl");
        let write = |metrics: &mut Metrics| metrics.write(line).map_err(|source| Error::Write { path, source });
        self.metrics.as_mut().map_or(Ok(()), write)
    }

    fn scalars(&mut self, values: &[(&str, f64)]) -> Result<(), Error> {
        let path = self.folder.join("tensorboard");
        match &mut self.events {
            Some(events) => events.scalars(self.byol.k, values).map_err(|source| Error::Write { path, source }),
            None => Ok(()),
        }
    }

    /// Which checkpoint of step `until` or before is kept, in words.
    fn last_good(&self, until: u64) -> String {
        match checkpoint::newest_until(&checkpoints(&self.folder), until) {
            Some(path) => format!("the last good checkpoint is kept: {}", path.display()),
            None => "there is no checkpoint yet".into(),
        }
    }
}

/// A micro-batch on the device, its views finished: `[N, H, W, C]` each.
pub fn tensors(batch: MicroBatch, device: &Device) -> (Tensor<4>, Tensor<4>) {
    let MicroBatch { n, size, channels, v, v2, rest } = batch;
    let tensor = |values, shape: [usize; 4]| Tensor::from_data(TensorData::new(values, shape), device);
    let Some([first, second]) = rest else {
        let shape = [n, size, size, channels];
        return (tensor(v, shape), tensor(v2, shape));
    };
    let planes = [n, channels, size, size];
    let view = |crops, draws: &[Draw]| finish(tensor(crops, planes), draws).permute([0, 2, 3, 1]);
    (view(v, &first), view(v2, &second))
}
