//! One file a command, or a family of like ones. A new command is a file, a variant here and a line in `run`.

mod ablate;
mod bench;
mod demo;
mod devices;
mod embed;
mod eval;
mod explore;
mod export;
mod html;
mod near;
mod pack;
mod plan;
mod pretrain;
mod ranks;
mod resume;
mod views;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use byol::{
    data::{CHANNELS, Dataset},
    device::{self, Choice, Kind, Opened},
    nn::{Encoder, weights},
    train::{Outcome, Prepared, Run, recipe::HealthConfig, run::keep_bytes},
};
use clap::{Parser, Subcommand};
use rayon::ThreadPoolBuilder;

use crate::report::{self, Progress, Result, out};

/// Pretrain an encoder on a folder of images, without labels, by Bootstrap Your Own Latent.
#[derive(Debug, Parser)]
#[command(name = "byol", version, propagate_version = true, max_term_width = 100, args_override_self = true)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

// What a command says of itself stands at its `Args`; a word here would take its place.
#[derive(Debug, Subcommand)]
enum Command {
    Pretrain(Box<pretrain::Args>),
    Resume(resume::Args),
    Eval(eval::Args),
    Embed(embed::Args),
    Explore(explore::Args),
    Report(html::Args),
    Search(near::Search),
    Duplicates(near::Duplicates),
    Outliers(near::Outliers),
    Select(near::Select),
    Export(export::Export),
    Import(export::Import),
    Ablate(Box<ablate::Args>),
    Plan(plan::Args),
    Pack(pack::Args),
    Views(views::Args),
    Demo(demo::Args),
    Bench(Box<bench::Args>),
    Devices(devices::Args),
}

impl Cli {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Pretrain(args) => ranks::together(|joined| pretrain::run(&args, joined)),
            Command::Resume(args) => ranks::together(|joined| resume::run(&args, joined)),
            other => other.alone(),
        }
    }
}

impl Command {
    /// Runs a command of one process.
    fn alone(self) -> Result<ExitCode> {
        ranks::must_be_alone()?;
        match self {
            Command::Pretrain(_) | Command::Resume(_) => unreachable!("run by `Cli::run`"),
            Command::Eval(args) => eval::run(&args),
            Command::Embed(args) => embed::run(&args),
            Command::Explore(args) => explore::run(&args),
            Command::Report(args) => html::run(&args),
            Command::Search(args) => near::search(&args),
            Command::Duplicates(args) => near::duplicates(&args),
            Command::Outliers(args) => near::outliers(&args),
            Command::Select(args) => near::select(&args),
            Command::Export(args) => export::export(&args),
            Command::Import(args) => export::import(&args),
            Command::Ablate(args) => ablate::run(&args),
            Command::Plan(args) => plan::run(&args),
            Command::Pack(args) => pack::run(&args),
            Command::Views(args) => views::run(&args),
            Command::Demo(args) => demo::run(&args),
            Command::Bench(args) => bench::run(&args),
            Command::Devices(args) => devices::run(&args),
        }
    }
}

/// Flags of everything that works on the processor.
#[derive(Debug, Clone, clap::Args)]
struct Work {
    /// Threads [default: one a core]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Print one JSON object with the results
    #[arg(long)]
    json: bool,
}

/// Flags of everything that computes with an encoder.
#[derive(Debug, Clone, clap::Args)]
struct On {
    /// Threads [default: one a core]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// auto, cpu, vulkan, metal, wgpu, cuda or rocm
    #[arg(long, default_value = "auto")]
    device: Choice,
    /// Print one JSON object with the results
    #[arg(long)]
    json: bool,
}

impl On {
    /// Sets the threads and opens an encoder on its device.
    fn encoder(&self, path: &Path) -> Result<Encoder> {
        set_threads(self.threads)?;
        encoder(path, &open(self.device)?.device)
    }

    /// A second one, where the first is.
    fn encoder_again(&self, path: &Path, beside: &Encoder) -> Result<Encoder> {
        encoder(path, &beside.device())
    }
}

/// Flags of everything that measures.
#[derive(Debug, Clone, clap::Args)]
struct Flags {
    /// Seed of all random draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    on: On,
}

/// Refuses to write over what is there, unless that was asked for.
fn must_be_new(path: &Path, overwrite: bool) -> Result<()> {
    if path.exists() && !overwrite {
        return Err(format!("{} exists; choose another -o or add --overwrite", path.display()).into());
    }
    Ok(())
}

/// The exit code of a run that was stopped by Ctrl-C, as shells have it.
const INTERRUPTED: u8 = 130;

/// Sets the number of threads of this process; 0: one a core. Returns the number. The calling thread, which must be the one that computes,
/// is one of them: it works where it would wait, and a layer begins without waking anybody.
fn set_threads(threads: usize) -> Result<usize> {
    pool(threads, |pool| pool.use_current_thread())
}

/// The same for a program whose other threads ask for work: all threads are apart from the calling one.
fn set_threads_apart(threads: usize) -> Result<usize> {
    pool(threads, |pool| pool)
}

fn pool(threads: usize, of: fn(ThreadPoolBuilder) -> ThreadPoolBuilder) -> Result<usize> {
    let n = if threads == 0 { device::machine().cores } else { threads };
    of(ThreadPoolBuilder::new().num_threads(n)).build_global()?;
    Ok(n)
}

/// Opens the device and says so if it is not what one would think.
fn open(choice: Choice) -> Result<Opened> {
    open_nth(choice, 0)
}

/// The same for one of several processes of this machine.
fn open_nth(choice: Choice, nth: usize) -> Result<Opened> {
    let opened = device::open_nth(choice, nth)?;
    if opened.found.kind == Kind::Software {
        report::warning(format!("{} computes on the processor and is for tests only", opened.found.name));
    }
    Ok(opened)
}

/// Reads an encoder of images as all data are read, onto a device.
fn encoder(path: &Path, device: &burn::tensor::Device) -> Result<Encoder> {
    let encoder = weights::load(path, device)?;
    match encoder.spec.channels {
        CHANNELS => Ok(encoder),
        n => {
            let path = path.display();
            Err(format!(
                "{path} takes images of {n} channels, and all data are read as {CHANNELS}; use another encoder"
            )
            .into())
        }
    }
}

/// Opens the data, decodes every image once, and says what was skipped. `sharers` processes of this machine do so.
fn prepare(dataset: Dataset, limit: usize, health: &HealthConfig, sharers: usize) -> Result<Prepared> {
    let bar = report::counter("checking images", 0);
    let keep = keep_bytes(device::machine().free_mb / sharers as u64);
    let prepared = Prepared::new(dataset, limit, health, keep, &|all| {
        bar.set_length(all as u64);
        bar.inc(1);
    });
    bar.finish_and_clear();
    let prepared = prepared?;
    let labels =
        if prepared.classes.is_empty() { "no labels".into() } else { format!("{} classes", prepared.classes.len()) };
    report::note(format!(
        "{}: {}, {}, {} held out to watch, {labels}",
        prepared.root.display(),
        prepared.kind,
        report::counted_noun(prepared.train.len(), "training image"),
        prepared.held_out.as_ref().map_or(0, byol::data::Images::len),
    ));
    if let Some(first) = prepared.skipped.first() {
        report::warning(format!(
            "{} images cannot be used and are skipped; the first: {first}",
            prepared.skipped.len()
        ));
    }
    Ok(prepared)
}

/// Whether Ctrl-C ends the program at once: nobody looks at the flag of [`stop_flag`] any more.
static AT_ONCE: AtomicBool = AtomicBool::new(false);

/// From now on Ctrl-C ends the program at once.
fn stop_at_once() {
    AT_ONCE.store(true, Ordering::Relaxed);
}

/// A flag that Ctrl-C sets. A second Ctrl-C ends the program at once.
fn stop_flag() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let set = stop.clone();
    // Clusters send SIGUSR1 before the time is up, and launchers pass it on.
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGUSR1, stop.clone());
    // Without a handler Ctrl-C ends the program at once: the last checkpoint still stands.
    let _ = ctrlc::set_handler(move || {
        ranks::say_if_left_alone();
        if set.swap(true, Ordering::Relaxed) || AT_ONCE.load(Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        eprintln!("stopping after this step; once more to stop at once");
    });
    stop
}

/// Runs a run to its end, showing progress, and prints the result.
fn train(mut run: Run, json: bool, stop: &AtomicBool, joined: &ranks::Joined) -> Result<ExitCode> {
    let (began, first) = (std::time::Instant::now(), run.byol.k);
    let mut progress = Progress::new(&run.plan, run.byol.k);
    let mut last: Option<serde_json::Value> = None;
    let mut first_knn = None;
    let outcome = run.go(stop, |event| {
        if let byol::train::Event::Epoch { epoch, loss, health, collapse } = &event {
            let knn = health.and_then(|h| h.knn);
            if *epoch == 0 {
                first_knn = knn;
            }
            last = Some(serde_json::json!({
                "epoch": epoch, "loss": loss, "health": health, "collapse": collapse,
            }));
        }
        progress.show(&event);
    });
    progress.finish();
    let outcome = outcome?;
    joined.report(run.byol.k - first, began.elapsed().as_secs_f64());
    let folder = &run.folder;
    let encoder = folder.join("encoder.safetensors");
    let finished = outcome == Outcome::Finished;
    match &outcome {
        Outcome::Finished => report::note(format!("done: {}", encoder.display())),
        Outcome::Stopped(path) => {
            report::note(format!("stopped; the checkpoint is {}", path.display()));
            report::note(format!("go on with: byol resume {}", folder.display()));
        }
    }
    if json && joined.ranks.leads() {
        let spent = joined.ranks.spent();
        let result = serde_json::json!({
            "run": report::shown(folder), "encoder": report::shown(&encoder), "finished": finished, "steps": run.byol.k,
            "total_steps": run.plan.schedule.total, "knn_before": first_knn, "last_epoch": last,
            "ranks": joined.ranks.count(), "seconds": began.elapsed().as_secs_f64(),
            "exchange": { "messages": spent.messages, "bytes": spent.bytes, "seconds": spent.seconds },
        });
        out!("{result}");
    }
    Ok(if finished { ExitCode::SUCCESS } else { ExitCode::from(INTERRUPTED) })
}

/// `NAME`, or `NAME-2`, `NAME-3`, … : the first that does not exist.
fn free_folder(name: &str) -> PathBuf {
    let free = |path: &PathBuf| !path.exists();
    let numbered = (2..).map(|i| PathBuf::from(format!("{name}-{i}")));
    std::iter::once(PathBuf::from(name)).chain(numbered).find(free).expect("numbers do not end")
}

/// Writes a file that must not exist yet, or whose place nobody cares about.
fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    byol::files::write_whole(path, bytes)
        .map_err(|e| format!("cannot write {}: {e}; {}", path.display(), byol::files::remedy(&e)).into())
}
