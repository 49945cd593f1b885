//! Terminal output: errors, warnings, notes and progress bars. All of it goes to standard error;
//! standard output is reserved for results.

use std::{
    error::Error,
    fmt::Display,
    io::{self, IsTerminal, Write},
    path::Path,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use byol::{
    ranks::Ranks,
    train::{Event, Plan, metrics::PhaseSeconds},
};
use console::{StyledObject, measure_text_width, strip_ansi_codes, style};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle, WeakProgressBar};

/// Result of every command.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Prints a line to standard output. A closed pipe (`| head`) ends the program quietly.
macro_rules! out {
    ($($arg:tt)*) => { crate::terminal::line(format_args!($($arg)*)) };
}
pub(crate) use out;

pub fn line(text: std::fmt::Arguments) {
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => {
            error(&io::Error::new(
                e.kind(),
                format!(
                    "cannot write to standard output: {e}\n\
                     hint: free some disk space or redirect the output elsewhere"
                ),
            ));
            std::process::exit(1);
        }
    }
}

/// Ranks of the MPI job. Only rank 0 prints progress; every rank prints its own errors.
static RANKS: OnceLock<Ranks> = OnceLock::new();

/// Sets the ranks of the job, once.
pub fn set_ranks(ranks: Ranks) {
    RANKS.get_or_init(|| ranks);
}

/// Amount of output besides results, warnings and errors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verbosity {
    /// None.
    Quiet,
    /// Notes and progress.
    Normal,
    /// Details as well.
    Verbose,
}

static VERBOSITY: OnceLock<Verbosity> = OnceLock::new();

/// Sets the verbosity, once.
pub fn set_verbosity(verbosity: Verbosity) {
    VERBOSITY.get_or_init(|| verbosity);
}

/// Returns true if output of this verbosity is shown.
fn shows(verbosity: Verbosity) -> bool {
    is_root() && verbosity <= *VERBOSITY.get().unwrap_or(&Verbosity::Normal)
}

/// Prints a detail, with `--verbose` only.
pub fn detail(text: impl Display) {
    detail_with(|| text);
}

/// [`detail`] of a text that takes time to compute.
pub fn detail_with<T: Display>(text: impl FnOnce() -> T) {
    if shows(Verbosity::Verbose) {
        print(format!("{} {}", style("detail:").dim().for_stderr(), text()));
    }
}

fn is_root() -> bool {
    RANKS.get().is_none_or(|ranks| ranks.is_root())
}

/// Prefix `rank N: ` of messages in a multi-rank job.
fn rank_prefix() -> String {
    RANKS.get().filter(|ranks| ranks.world_size() > 1).map_or(String::new(), |ranks| format!("rank {}: ", ranks.rank()))
}

/// Separator between a message and its remedy.
const HINT: &str = "\nhint: ";

/// A message and its remedy, each on one line.
pub fn split_hint(text: &str) -> (String, Option<String>) {
    let mut parts = text.split(HINT).map(|part| part.trim().replace('\n', " "));
    (parts.next().unwrap_or_default(), parts.next())
}

/// The message of an error with another remedy.
pub fn with_hint(error: impl Display, hint: impl Display) -> String {
    format!("{}{HINT}{hint}", split_hint(&error.to_string()).0)
}

/// `LABEL MESSAGE`, then a blank line and `hint: REMEDY` if the text has one.
fn labeled(label: StyledObject<&str>, prefix: &str, text: &str) -> String {
    let (message, hint) = split_hint(text);
    let hint = hint.map(|hint| format!("\n\n{} {prefix}{hint}", style("hint:").cyan().bold().for_stderr()));
    format!("{label} {prefix}{message}{}", hint.unwrap_or_default())
}

/// Prints an error.
pub fn error(error: &dyn Error) {
    print(labeled(style("error:").red().bold().for_stderr(), &rank_prefix(), &error.to_string()));
}

/// Prints a line to standard error in one write, so that other processes cannot interleave.
fn print(mut line: String) {
    line.push('\n');
    // A failure to report has nowhere to be reported.
    let _ = io::stderr().write_all(line.as_bytes());
}

fn warning_text(text: impl Display) -> String {
    labeled(style("warning:").yellow().bold().for_stderr(), "", &text.to_string())
}

/// Prints a warning.
pub fn warning(text: impl Display) {
    if is_root() {
        print(warning_text(text));
    }
}

/// Prints a note: progress, or a result of no machine-readable form. Long lines are wrapped.
pub fn note(text: impl Display) {
    if shows(Verbosity::Normal) {
        print(wrap(&text.to_string()));
    }
}

/// Columns of a line.
const COLUMNS: usize = 80;

/// Breaks lines at spaces to [`COLUMNS`]; commands in backticks and longer words, such as paths,
/// stay whole. Continuation lines start below the text that follows a short label, such as `plan:`.
pub fn wrap(text: &str) -> String {
    text.lines().map(wrap_line).collect::<Vec<String>>().join("\n")
}

fn wrap_line(line: &str) -> String {
    let text = line.trim_start();
    let margin = line.len() - text.len();
    let label = text.split(' ').next().map(strip_ansi_codes).filter(|word| word.ends_with(':') && word.len() < 8);
    let indent = match label {
        Some(label) => margin + label.len() + 1,
        None if margin == 0 => 2,
        None => margin,
    };
    let (mut wrapped, mut column) = (" ".repeat(margin), margin);
    for (i, part) in unbreakable(text).into_iter().enumerate() {
        let (width, space) = (measure_text_width(&part), usize::from(i > 0));
        if i > 0 && column + 1 + width > COLUMNS && column > indent {
            if part.is_empty() {
                continue; // of a run of spaces
            }
            wrapped.truncate(wrapped.trim_end().len());
            wrapped += &format!("\n{}{part}", " ".repeat(indent));
            column = indent + width;
        } else {
            wrapped += &format!("{}{part}", &" "[..space]);
            column += space + width;
        }
    }
    wrapped
}

/// The words of a line. A command in backticks is one word, and so is a number with its percent
/// sign.
fn unbreakable(text: &str) -> Vec<String> {
    let mut parts: Vec<String> = Vec::new();
    let mut is_open = false;
    for word in text.split(' ') {
        match parts.last_mut() {
            Some(part) if is_open || word.starts_with('%') => *part += &format!(" {word}"),
            _ => parts.push(word.to_owned()),
        }
        is_open ^= word.matches('`').count() % 2 == 1;
    }
    parts
}

/// A path as text, lossy, for JSON.
pub fn display_path(path: &Path) -> String {
    path.display().to_string()
}

/// A file name with its control characters escaped: lists of names are read line by line, and
/// terminals interpret some of them.
pub fn escape_control(name: &str) -> String {
    name.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// `1 group`, `2 groups`.
pub fn plural(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// Seconds as `12 s`, `3 min 05 s`, `2 h 10 min` or `3 days 4 h`.
pub fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {:02} min", s / 3600, s / 60 % 60),
        _ => format!("{} {} h", plural((s / 86_400) as usize, "day"), s / 3600 % 24),
    }
}

/// 0.1234 as `12.3 %`.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A progress bar of `n` units. Unless standard error is a terminal, it is hidden, and a line is
/// printed now and then.
pub fn progress_bar(label: &str, n: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(n), target());
    let template = format!("{label} {{wide_bar:.cyan/dim}} {{pos}}/{{len}}  {{per_sec}}  {{eta}} left");
    bar.set_style(ProgressStyle::with_template(&template).expect("the template is fixed").progress_chars("━━─"));
    if bar.is_hidden() && shows(Verbosity::Normal) {
        print_lines(label.to_owned(), bar.downgrade());
    }
    bar
}

/// Prints a line every [`LINE_EVERY`] until the bar is finished.
fn print_lines(label: String, bar: WeakProgressBar) {
    // Without the thread, the work is done without these lines.
    let _ = thread::Builder::new().name("progress".into()).spawn(move || {
        loop {
            thread::sleep(LINE_EVERY);
            let Some(bar) = bar.upgrade().filter(|bar| !bar.is_finished()) else { return };
            let (done, all) = (bar.position(), bar.length().unwrap_or(0));
            if done > 0 {
                let time_left = bar.elapsed().as_secs_f64() / done as f64 * all.saturating_sub(done) as f64;
                note(format!("{label}: {done}/{all}, {} left", duration(time_left)));
            }
        }
    });
}

/// Runs `work` behind a progress bar; `work` calls back with the units done and their total.
pub fn with_progress<T>(label: &str, work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T) -> T {
    let bar = progress_bar(label, 0);
    let result = work(&mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    result
}

fn target() -> ProgressDrawTarget {
    if io::stderr().is_terminal() && shows(Verbosity::Normal) {
        ProgressDrawTarget::stderr()
    } else {
        ProgressDrawTarget::hidden()
    }
}

/// Progress of a training run.
pub struct Progress {
    bar: ProgressBar,
    total_steps: u64,
    first_step: u64,
    batch: f64,
    epochs: u64,
    /// Start of the timed steps; restarts after a rollback.
    timed_from: Option<(Instant, u64)>,
    phases: PhaseSeconds,
    steps_seen: u64,
    printed_estimate: bool,
    printed_reference: bool,
    last_line: Instant,
}

/// Untimed steps at the start.
const WARM_STEPS: u64 = 2;

/// Steps before the remaining time is estimated.
const TIMED_STEPS: u64 = 4;

/// Time between two lines where there is no progress bar.
const LINE_EVERY: Duration = Duration::from_secs(30);

impl Progress {
    pub fn new(plan: &Plan, first_step: u64) -> Progress {
        let total_steps = plan.schedule.total;
        let bar = ProgressBar::with_draw_target(Some(total_steps), target());
        let template = "{wide_bar:.cyan/dim} {pos}/{len}  {msg}";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is fixed").progress_chars("━━─"));
        bar.set_position(first_step);
        Progress {
            bar,
            total_steps,
            first_step,
            batch: plan.recipe.train.batch as f64,
            epochs: plan.recipe.train.epochs,
            timed_from: None,
            phases: PhaseSeconds::default(),
            steps_seen: 0,
            printed_estimate: false,
            printed_reference: false,
            last_line: Instant::now(),
        }
    }

    /// Shows an event.
    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Step { step, epoch, stats, seconds, .. } => self.step(*step, *epoch, stats.loss, seconds),
            Event::Epoch { epoch, loss, health, collapse } => {
                let mut line = format!("epoch {epoch}/{}", self.epochs);
                if let Some(loss) = loss {
                    line += &format!("  loss {loss:.4}");
                }
                if let Some(health) = health {
                    self.reference(health.projection_std_ideal);
                    if let Some(knn) = health.knn {
                        line += &format!("  kNN {}", percent(knn));
                    }
                    line += &format!(
                        "  RankMe {:.1}  std {:.4}  cosine {:.3}",
                        health.rankme, health.projection_std, health.projection_cosine
                    );
                }
                self.line(line);
                if let Some(why) = collapse {
                    self.line(labeled(style("failed:").red().bold().for_stderr(), "", why));
                }
            }
            Event::Rollback { from, to, peak, .. } => {
                self.line(format!("rolled back from step {from} to {to}; peak learning rate halved to {peak:.4}"));
                self.bar.set_position(*to);
                (self.timed_from, self.steps_seen) = (None, 0);
            }
            Event::Skipped(n, first) => self.line(warning_text(format!(
                "skipped {}, listed in skipped.txt (first: {first})",
                plural(*n, "unreadable image"),
                first = split_hint(first).0
            ))),
            Event::Checkpoint(path) => {
                let phases = shares(&self.phases);
                self.detail(format!("checkpoint {}; {phases}", path.display()));
            }
        }
    }

    /// Explains the columns of the epoch lines, once.
    fn reference(&mut self, uniform_std: f64) {
        if !self.printed_reference {
            self.printed_reference = true;
            self.line(format!(
                "std and cosine: of the projections ({uniform_std:.4} and 0 for a uniform distribution)"
            ));
        }
    }

    fn step(&mut self, step: u64, epoch: f64, loss: f64, phases: &PhaseSeconds) {
        self.steps_seen += 1;
        if self.steps_seen == WARM_STEPS {
            self.timed_from = Some((Instant::now(), step));
        }
        for (sum, seconds) in [
            (&mut self.phases.data, phases.data),
            (&mut self.phases.forward, phases.forward),
            (&mut self.phases.backward, phases.backward),
            (&mut self.phases.exchange, phases.exchange),
            (&mut self.phases.update, phases.update),
        ] {
            *sum += seconds;
        }
        self.bar.set_position(step);
        let Some((start, from)) = self.timed_from.filter(|(_, from)| step > *from) else { return };
        let seconds = start.elapsed().as_secs_f64() / (step - from) as f64;
        let left = self.total_steps - step;
        let time_left = duration(seconds * left as f64);
        if !self.printed_estimate && step - from >= TIMED_STEPS {
            self.printed_estimate = true;
            self.line(format!(
                "estimated time left: {time_left} for {} (measured over the first {})",
                plural(left as usize, "step"),
                step - self.first_step
            ));
        }
        let message = format!(
            "epoch {epoch:.1}/{}  loss {loss:.3}  {:.1} images/s  {time_left} left",
            self.epochs,
            self.batch / seconds
        );
        if self.bar.is_hidden() && self.last_line.elapsed() > LINE_EVERY {
            self.last_line = Instant::now();
            note(format!("step {step}/{}  {message}", self.total_steps));
        }
        self.bar.set_message(message);
    }

    fn detail(&self, text: String) {
        self.bar.suspend(|| detail(text));
    }

    fn line(&self, text: String) {
        if self.bar.is_hidden() { note(text) } else { self.bar.println(wrap(&text)) }
    }

    /// Removes the progress bar.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

/// Share of the time of each phase: `data/forward/backward/update 1/40/50/9 %`.
fn shares(seconds: &PhaseSeconds) -> String {
    let mut phases = vec![("data", seconds.data), ("forward", seconds.forward), ("backward", seconds.backward)];
    if seconds.exchange > 0.0 {
        phases.push(("exchange", seconds.exchange));
    }
    phases.push(("update", seconds.update));
    let total = seconds.total().max(1e-9);
    let names: Vec<&str> = phases.iter().map(|(name, _)| *name).collect();
    let shares: Vec<String> = phases.iter().map(|(_, s)| format!("{:.0}", 100.0 * s / total)).collect();
    format!("{} {} %", names.join("/"), shares.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hint_is_separated_from_the_message() {
        assert_eq!(split_hint("no images in a"), ("no images in a".into(), None));
        assert_eq!(split_hint("no images\nhint: add some"), ("no images".into(), Some("add some".into())));
        assert_eq!(split_hint("two\nlines\nhint: a\nhint: b"), ("two lines".into(), Some("a".into())));
        assert_eq!(with_hint("gone\nhint: a", "b"), "gone\nhint: b");
    }

    #[test]
    fn errors_put_the_hint_after_a_blank_line() {
        let label = || style("error:").force_styling(false);
        console::set_colors_enabled_stderr(false);
        assert_eq!(labeled(label(), "rank 1: ", "gone\nhint: look"), "error: rank 1: gone\n\nhint: rank 1: look");
        assert_eq!(labeled(label(), "", "gone"), "error: gone");
    }

    #[test]
    fn long_lines_break_at_words() {
        let words = |n: usize| vec!["seven77"; n].join(" ");
        assert_eq!(wrap(&words(10)), words(10));
        assert_eq!(wrap(&words(12)), format!("{}\n  {}", words(10), words(2)));
        let plan = wrap(&format!("  plan: {}\nnext", words(12)));
        assert_eq!(plan, format!("  plan: {}\n        {}\nnext", words(9), words(3)));
        let path = "a/".repeat(60);
        assert_eq!(wrap(&path), path);
        assert_eq!(wrap(&format!("output: {path}")), format!("output: {path}"));
        assert_eq!(wrap("epoch 1/2  loss 0.5"), "epoch 1/2  loss 0.5");
        assert_eq!(wrap(&format!("{} `byol resume x`.", words(9))), format!("{}\n  `byol resume x`.", words(9)));
        assert_eq!(wrap(&format!("{}  next", words(10))), format!("{}\n  next", words(10)));
        assert_eq!(wrap(&format!("{} 1234567 %", words(9))), format!("{}\n  1234567 %", words(9)));
        assert_eq!(wrap(&format!("  {}", words(10))), format!("  {}\n  seven77", words(9)));
    }

    #[test]
    fn durations_and_plurals_agree() {
        assert_eq!(duration(59.4), "59 s");
        assert_eq!(duration(185.0), "3 min 05 s");
        assert_eq!(duration(7_800.0), "2 h 10 min");
        assert_eq!(duration(100_000.0), "1 day 3 h");
        assert_eq!((plural(1, "image"), plural(2, "image")), ("1 image".into(), "2 images".into()));
    }
}
