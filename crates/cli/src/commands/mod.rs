//! One file per command, or a folder for a family of subcommands. A new command is a file, a
//! variant of [`Command`] and a line in [`Command::run_single`].

mod ablate;
mod bench;
mod completions;
mod data_args;
mod demo;
mod devices;
mod duplicates;
mod embed;
mod embeddings_args;
mod eval;
mod explore;
mod export;
mod gallery;
mod import;
mod man;
mod mpi_job;
mod outliers;
mod pack;
mod plan;
mod pretrain;
mod recipe;
mod recipe_args;
mod report;
mod resume;
mod runs;
mod search;
mod select;
mod views;

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use byol::{
    data::{Dataset, longest_read},
    device::{self, DeviceChoice, Kind, OpenedDevice},
    eval::label_free::Comparison,
    nn::{Encoder, weights},
    train::{
        Event, Outcome, Plan, Recipe, Run, TrainingData,
        data::{PrepareOptions, cache_bytes},
        health::Verdict,
        metrics,
    },
};
use clap::{Parser, Subcommand};
use rayon::ThreadPoolBuilder;

use crate::terminal::{self, Progress, Result, Verbosity, out};

/// Pretrain image encoders without labels, with Bootstrap Your Own Latent
#[derive(Debug, Parser)]
#[command(
    name = "byol",
    version,
    propagate_version = true,
    max_term_width = 100,
    args_override_self = true,
    after_help = AFTER_HELP
)]
pub struct Cli {
    /// Print no notes and no progress, only results, warnings and errors
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    quiet: bool,
    /// Also print details: machine, memory, data cache, checkpoints, time by phase
    #[arg(short, long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    command: Command,
}

const AFTER_HELP: &str = "\
Examples:
  byol demo                                    Train on synthetic images in a few minutes
  byol pretrain photos                         Train an encoder on a folder of images
  byol resume byol-runs/photos                 Continue a stopped run
  byol eval knn byol-runs/photos labeled       Evaluate the encoder on labeled images
  byol embed byol-runs/photos photos -o e.npy  Compute the embeddings of all images
  byol explore byol-runs/photos                Browse the images in the web browser

Run `byol help COMMAND` for the details of a command. Guides and a reference are in the folder
`docs` of the source code.";

// The help of each command is the doc comment of its `Args`; a comment here would override it.
#[derive(Debug, Subcommand)]
enum Command {
    Pretrain(Box<pretrain::Args>),
    Resume(resume::Args),
    Eval(eval::Args),
    Embed(embed::Args),
    Explore(explore::Args),
    Report(report::Args),
    Search(search::Args),
    Duplicates(duplicates::Args),
    Outliers(outliers::Args),
    Select(select::Args),
    Export(export::Args),
    Import(import::Args),
    Ablate(Box<ablate::Args>),
    Plan(plan::Args),
    Runs(runs::Args),
    Recipe(recipe::Args),
    Pack(pack::Args),
    Views(views::Args),
    Demo(demo::Args),
    Bench(Box<bench::Args>),
    Devices(devices::Args),
    Completions(completions::Args),
    Man(man::Args),
}

impl Cli {
    /// Runs the command.
    pub fn run(self) -> Result<ExitCode> {
        terminal::set_verbosity(match (self.quiet, self.verbose) {
            (true, _) => Verbosity::Quiet,
            (false, false) => Verbosity::Normal,
            (false, true) => Verbosity::Verbose,
        });
        let start = Instant::now();
        let result = match self.command {
            Command::Pretrain(args) => mpi_job::run(|job| {
                describe_machine();
                pretrain::run(&args, job)
            }),
            Command::Resume(args) => mpi_job::run(|job| {
                describe_machine();
                resume::run(&args, job)
            }),
            single => {
                describe_machine();
                single.run_single()
            }
        };
        let memory = peak_memory_mb().map_or(String::new(), |mb| format!(", peak memory {mb:.0} MiB"));
        terminal::detail(format!("took {}{memory}", terminal::duration(start.elapsed().as_secs_f64())));
        result
    }
}

/// Prints the machine, with `--verbose`.
fn describe_machine() {
    terminal::detail_with(|| {
        let machine = device::machine();
        let (cores, free) = (terminal::plural(machine.cores, "core"), machine.free_mb);
        let version = env!("CARGO_PKG_VERSION");
        format!("byol {version}, {}, {cores}, {}, {free} MiB free", machine.cpu, machine.isa)
    });
}

impl Command {
    /// Runs a command of a single process.
    fn run_single(self) -> Result<ExitCode> {
        mpi_job::require_single_process()?;
        match self {
            Command::Pretrain(_) | Command::Resume(_) => unreachable!("run by `Cli::run`"),
            Command::Eval(args) => eval::run(&args),
            Command::Embed(args) => embed::run(&args),
            Command::Explore(args) => explore::run(&args),
            Command::Report(args) => report::run(&args),
            Command::Search(args) => search::run(&args),
            Command::Duplicates(args) => duplicates::run(&args),
            Command::Outliers(args) => outliers::run(&args),
            Command::Select(args) => select::run(&args),
            Command::Export(args) => export::run(&args),
            Command::Import(args) => import::run(&args),
            Command::Ablate(args) => ablate::run(&args),
            Command::Plan(args) => plan::run(&args),
            Command::Runs(args) => runs::run(&args),
            Command::Recipe(args) => recipe::run(&args),
            Command::Pack(args) => pack::run(&args),
            Command::Views(args) => views::run(&args),
            Command::Demo(args) => demo::run(&args),
            Command::Bench(args) => bench::run(&args),
            Command::Devices(args) => devices::run(&args),
            Command::Completions(args) => completions::run(&args),
            Command::Man(args) => man::run(&args),
        }
    }
}

/// Flags of commands that compute on the CPU.
#[derive(Debug, Clone, clap::Args)]
struct CpuArgs {
    /// Number of threads [default: number of cores]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

/// Flags of commands that compute with an encoder.
#[derive(Debug, Clone, clap::Args)]
struct ComputeArgs {
    /// Number of threads [default: number of cores]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Compute device: auto, cpu, vulkan, metal, wgpu, cuda or rocm
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

impl ComputeArgs {
    /// Sets the number of threads and loads an encoder onto the device.
    fn load_encoder(&self, path: &Path) -> Result<Encoder> {
        set_threads(self.threads)?;
        load_encoder(path, &open_device(self.device)?.device)
    }
}

/// Flags of commands that evaluate an encoder.
#[derive(Debug, Clone, clap::Args)]
struct EvalFlags {
    /// Random seed
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    compute: ComputeArgs,
}

/// Refuses to overwrite an existing file without `--overwrite`.
fn must_be_new(path: &Path, overwrite: bool) -> Result<()> {
    if path.exists() && !overwrite {
        let path = path.display();
        return Err(format!("{path} already exists\nhint: choose another `--out`, or pass `--overwrite`").into());
    }
    Ok(())
}

/// Exit code of a run interrupted by Ctrl-C, by the convention of shells.
const INTERRUPTED: u8 = 130;

/// Sets the number of threads, 0 for one per core, and returns it. The calling thread, which must
/// be the one that computes, is one of them: it works where it would wait, and starting a layer
/// wakes no other thread.
fn set_threads(threads: usize) -> Result<usize> {
    build_pool(threads, |pool| pool.use_current_thread())
}

/// Sets the number of threads of a program that computes on several threads of its own, such as a
/// server: the calling thread is not one of them.
fn set_worker_threads(threads: usize) -> Result<usize> {
    build_pool(threads, |pool| pool)
}

fn build_pool(threads: usize, configure: fn(ThreadPoolBuilder) -> ThreadPoolBuilder) -> Result<usize> {
    let n = if threads == 0 { device::machine().cores } else { threads };
    configure(ThreadPoolBuilder::new().num_threads(n)).build_global()?;
    Ok(n)
}

/// Opens the device; warns about software drivers.
fn open_device(choice: DeviceChoice) -> Result<OpenedDevice> {
    open_nth_device(choice, 0)
}

/// Opens the device of the `nth` process on this machine.
fn open_nth_device(choice: DeviceChoice, nth: usize) -> Result<OpenedDevice> {
    let opened = device::open_nth(choice, nth)?;
    if opened.info.kind == Kind::Software {
        terminal::warning(format!("{} is a software driver, for tests only", opened.info.name));
    }
    Ok(opened)
}

/// Loads an encoder onto a device.
fn load_encoder(path: &Path, device: &burn::tensor::Device) -> Result<Encoder> {
    let has = |file: &str| path.join(file).exists();
    if path.is_dir() && !["encoder.safetensors", "model.safetensors", "plan.toml"].into_iter().any(has) {
        let hint = "pass a run or an encoder file; it comes before the images, as in `byol embed RUN DATA`";
        return Err(format!(
            "{} is not the folder of a run: it has no encoder.safetensors\nhint: {hint}",
            path.display()
        )
        .into());
    }
    Ok(weights::load(path, device)?)
}

/// Warns about images that were left out, if any.
fn warn_skipped(skipped: &[String]) {
    if let Some(first) = skipped.first() {
        let images = terminal::plural(skipped.len(), "unreadable image");
        terminal::warning(format!("skipped {images} (first: {})", terminal::split_hint(first).0));
    }
}

/// Decodes every image once, and reports the images that were skipped. `processes` of this machine
/// share its memory.
fn load_training_data(dataset: Dataset, recipe: &Recipe, processes: usize) -> Result<TrainingData> {
    let bar = terminal::progress_bar("checking images", 0);
    let cache_bytes = cache_bytes(device::machine().free_mb / processes as u64);
    terminal::detail(format!("cache of decoded images: at most {} MiB", cache_bytes >> 20));
    let options = PrepareOptions { cache_bytes, ..PrepareOptions::from(recipe) };
    let data = TrainingData::prepare(dataset, options, &|total| {
        bar.set_length(total as u64);
        bar.inc(1);
    });
    bar.finish_and_clear();
    let data = data?;
    let labels = match data.classes.len() {
        0 => "no labels".into(),
        1 => "1 class".into(),
        n => format!("{n} classes"),
    };
    terminal::note(format!(
        "{}: {}, {}, {}, {labels}",
        data.root.display(),
        data.kind,
        terminal::plural(data.train.len(), "training image"),
        terminal::plural(data.held_out.as_ref().map_or(0, byol::data::Images::len), "monitoring image"),
    ));
    warn_skipped(&data.skipped);
    Ok(data)
}

/// Makes Ctrl-C end the program immediately, where the flag of [`stop_flag`] is no longer read.
static EXIT_ON_CTRL_C: AtomicBool = AtomicBool::new(false);

/// Makes Ctrl-C end the program immediately from now on.
fn exit_on_ctrl_c() {
    EXIT_ON_CTRL_C.store(true, Ordering::Relaxed);
}

/// Longest time that a stop waits for one image, or for work that the same command continues.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);

/// A flag set by Ctrl-C. A second Ctrl-C ends the program immediately; so does an image that does
/// not arrive, since the last checkpoint stays valid.
fn stop_flag() -> Arc<AtomicBool> {
    stop_flag_that_calls(|| exit_unless_stopped(|_| longest_read().is_some_and(|read| read >= STOP_TIMEOUT)))
}

/// [`stop_flag`] of work that the same command continues: it ends after a few seconds at the
/// latest.
fn stop_soon_flag() -> Arc<AtomicBool> {
    stop_flag_that_calls(|| exit_unless_stopped(|since| since >= STOP_TIMEOUT))
}

/// Ends the program once `is_overdue`, which gets the time since the stop.
fn exit_unless_stopped(is_overdue: fn(Duration) -> bool) {
    let stopped = Instant::now();
    while !is_overdue(stopped.elapsed()) {
        std::thread::sleep(Duration::from_millis(200));
    }
    eprintln!("stopped before the current step finished");
    std::process::exit(i32::from(INTERRUPTED));
}

/// A flag set by Ctrl-C, which also starts a thread with `then`.
fn stop_flag_that_calls(then: fn()) -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let set = stop.clone();
    // Clusters send SIGUSR1 shortly before the time limit, and launchers pass it on.
    #[cfg(unix)]
    let _ = signal_hook::flag::register(signal_hook::consts::SIGUSR1, stop.clone());
    // Without a handler Ctrl-C ends the program immediately: the last checkpoint is still valid.
    let _ = ctrlc::set_handler(move || {
        mpi_job::exit_if_ranks_were_lost();
        if set.swap(true, Ordering::Relaxed) || EXIT_ON_CTRL_C.load(Ordering::Relaxed) {
            std::process::exit(i32::from(INTERRUPTED));
        }
        eprintln!("stopping; press Ctrl-C again to exit immediately");
        // Without the thread, a second Ctrl-C still ends the program.
        let _ = std::thread::Builder::new().name("stop".into()).spawn(then);
    });
    stop
}

/// Trains a run to its end with a progress bar, and prints the result.
fn train(mut run: Run, json: bool, stop: &AtomicBool, job: &mpi_job::MpiJob) -> Result<ExitCode> {
    let (start, first_step) = (Instant::now(), run.byol.k);
    let mut progress = Progress::new(&run.plan, first_step);
    let mut last_epoch: Option<serde_json::Value> = None;
    let mut knn_before = None;
    let outcome = run.run(stop, |event| {
        if let Event::Epoch { epoch, loss, health, collapse } = &event {
            if *epoch == 0 {
                knn_before = health.and_then(|h| h.knn);
            }
            last_epoch = Some(serde_json::json!({
                "epoch": epoch, "loss": loss, "health": health, "collapse": collapse,
            }));
        }
        progress.show(&event);
    });
    progress.finish();
    let outcome = outcome?;
    job.print_comm_stats(run.byol.k - first_step, start.elapsed().as_secs_f64());
    let folder = &run.folder;
    let encoder = folder.join("encoder.safetensors");
    let mut verdict = None;
    match &outcome {
        Outcome::Finished => {
            terminal::note(format!("finished: {}", encoder.display()));
            verdict = print_verdict(folder, &run.plan);
        }
        Outcome::Stopped(checkpoint) => {
            terminal::note(format!("stopped; saved {}", checkpoint.display()));
            terminal::note(format!("resume with: `byol resume {}`", folder.display()));
        }
    }
    let finished = outcome == Outcome::Finished;
    if json && job.ranks.is_root() {
        let stats = job.ranks.comm_stats();
        let result = serde_json::json!({
            "run": terminal::display_path(folder), "encoder": terminal::display_path(&encoder),
            "finished": finished, "steps": run.byol.k, "total_steps": run.plan.schedule.total,
            "knn_before": knn_before, "last_epoch": last_epoch, "verdict": verdict,
            "ranks": job.ranks.world_size(), "seconds": start.elapsed().as_secs_f64(),
            "exchange": { "messages": stats.messages, "bytes": stats.bytes, "seconds": stats.seconds },
        });
        out!("{result}");
    }
    Ok(if finished { ExitCode::SUCCESS } else { ExitCode::from(INTERRUPTED) })
}

/// Prints what a finished run has learned, as a warning if it is worse. Returns the text.
fn print_verdict(run: &Path, plan: &Plan) -> Option<String> {
    let Verdict { comparison, text } = metrics::read_verdict(run, plan)?;
    match comparison {
        Comparison::Better | Comparison::Same | Comparison::Mixed => terminal::note(&text),
        Comparison::Worse | Comparison::Collapsed => terminal::warning(format!(
            "{text}\nhint: train for more epochs or on more images, or start from pretrained weights with `--init`"
        )),
    }
    Some(text)
}

/// Peak memory of this process in MiB; `None` where the system does not report it.
fn peak_memory_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? / 1024.0)
}

/// The first of `NAME`, `NAME-2`, `NAME-3`, … that does not exist.
fn free_folder(name: &str) -> PathBuf {
    let free = |path: &PathBuf| !path.exists();
    let numbered = (2..).map(|i| PathBuf::from(format!("{name}-{i}")));
    std::iter::once(PathBuf::from(name)).chain(numbered).find(free).expect("numbers do not end")
}

/// Writes a file atomically, replacing an existing one.
fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    byol::atomic_write::write_whole(path, bytes)
        .map_err(|e| format!("cannot write {}: {e}\nhint: {}", path.display(), byol::atomic_write::remedy(&e)).into())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    /// Checks the examples of a command and of its subcommands. Returns the number of examples.
    fn check_examples(command: &clap::Command) -> usize {
        let help = command.get_after_long_help().or(command.get_after_help());
        let text = help.map(ToString::to_string).unwrap_or_default();
        let examples = text.lines().filter_map(|line| line.strip_prefix("  byol "));
        let mut n = 0;
        for example in examples {
            let typed = example.split("  ").next().unwrap_or_default();
            let words = typed.split_whitespace().take_while(|word| *word != ">");
            if let Err(error) = Cli::try_parse_from(["byol"].into_iter().chain(words)) {
                panic!("`byol {typed}`: {error}");
            }
            n += 1;
        }
        n + command.get_subcommands().map(check_examples).sum::<usize>()
    }

    #[test]
    fn commands_have_examples_that_parse() {
        let cli = Cli::command();
        for command in cli.get_subcommands() {
            let name = command.get_name();
            assert!(check_examples(command) > 0 || name == "help", "`byol {name} --help` has no example");
        }
        assert!(check_examples(&cli) > 30);
    }
}
