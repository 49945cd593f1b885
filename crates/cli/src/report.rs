//! What the user sees: errors in one line, a progress bar on a terminal, plain lines elsewhere. All of it goes to standard error;
//! standard output is for results.

use std::{
    error::Error,
    fmt::Display,
    io::{self, IsTerminal, Write},
    path::Path,
    sync::OnceLock,
    time::{Duration, Instant},
};

use byol::{
    ranks::Ranks,
    train::{Event, Plan, metrics::Split},
};
use console::style;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// What every command returns.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// A line on standard output. A reader that has seen enough (`| head`) ends the program quietly, as it does others.
macro_rules! out {
    ($($arg:tt)*) => { crate::report::line(format_args!($($arg)*)) };
}
pub(crate) use out;

pub fn line(text: std::fmt::Arguments) {
    use std::io::{self, Write};
    match writeln!(io::stdout(), "{text}") {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => std::process::exit(0),
        Err(e) => {
            error(&io::Error::new(
                e.kind(),
                format!("cannot write to standard output: {e}; free some space or give it another place"),
            ));
            std::process::exit(1);
        }
    }
}

/// Which of several processes this is; the first alone talks, all say what is wrong with them.
static RANKS: OnceLock<Ranks> = OnceLock::new();

/// From now on speaks as one of these.
pub fn tell_as(ranks: Ranks) {
    RANKS.get_or_init(|| ranks);
}

fn talks() -> bool {
    RANKS.get().is_none_or(|ranks| ranks.leads())
}

/// `error: what, where, remedy`, on one line.
pub fn error(error: &dyn Error) {
    let text = error.to_string().replace('\n', " ");
    let who = RANKS.get().filter(|ranks| ranks.count() > 1).map_or(String::new(), |r| format!("rank {}: ", r.rank()));
    say(format!("{} {who}{text}", style("error:").red().bold().for_stderr()));
}

/// A line on standard error, in one write: what other processes say there may come between two.
fn say(mut line: String) {
    line.push('\n');
    // Nobody can be told that nobody can be told.
    let _ = io::stderr().write_all(line.as_bytes());
}

/// Something the user should know that does not stop anything.
pub fn warning(text: impl Display) {
    if !talks() {
        return;
    }
    say(format!("{} {text}", style("warning:").yellow().bold().for_stderr()));
}

/// A path as text, whatever its bytes: JSON has text alone.
pub fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// A name on one line, whatever characters it has: lists of names are read line by line, and a terminal obeys some of them.
pub fn plain(name: &str) -> String {
    name.chars().flat_map(|c| if c.is_control() { c.escape_default().collect() } else { vec![c] }).collect()
}

/// `1 group`, `2 groups`.
pub fn counted_noun(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// A line of talk.
pub fn note(text: impl Display) {
    if talks() {
        say(text.to_string());
    }
}

/// Hours, minutes or seconds, whichever says most.
pub fn duration(seconds: f64) -> String {
    let s = seconds.max(0.0).round() as u64;
    match s {
        0..60 => format!("{s} s"),
        60..3600 => format!("{} min {:02} s", s / 60, s % 60),
        3600..86_400 => format!("{} h {:02} min", s / 3600, s / 60 % 60),
        _ => format!("{} days {} h", s / 86_400, s / 3600 % 24),
    }
}

/// 0.1234 as `12.3 %`.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

/// A bar that counts, on a terminal; nothing elsewhere.
pub fn counter(what: &str, n: u64) -> ProgressBar {
    let bar = ProgressBar::with_draw_target(Some(n), target());
    bar.set_style(
        ProgressStyle::with_template(&format!("{what} {{wide_bar:.cyan/dim}} {{pos}}/{{len}}"))
            .expect("the template is fixed")
            .progress_chars("━━─"),
    );
    bar
}

/// Does some work behind such a bar; the work says what is done of how much.
pub fn counted<T>(what: &str, work: impl FnOnce(&mut dyn FnMut(u64, u64)) -> T) -> T {
    let bar = counter(what, 0);
    let result = work(&mut |done, all| {
        bar.set_length(all);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    result
}

fn target() -> ProgressDrawTarget {
    if std::io::stderr().is_terminal() && talks() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() }
}

/// Shows a run as it goes.
pub struct Progress {
    bar: ProgressBar,
    total: u64,
    first: u64,
    batch: f64,
    epochs: u64,
    began: Option<(Instant, u64)>,
    split: Split,
    seen: u64,
    said_estimate: bool,
    last_line: Instant,
}

/// Steps that warm up before the time is taken, and steps it is taken over.
const WARM_STEPS: u64 = 2;
const TIMED_STEPS: u64 = 4;

impl Progress {
    pub fn new(plan: &Plan, first: u64) -> Progress {
        let total = plan.schedule.total;
        let bar = ProgressBar::with_draw_target(Some(total), target());
        let template = "{wide_bar:.cyan/dim} {pos}/{len}  {msg}";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is fixed").progress_chars("━━─"));
        bar.set_position(first);
        Progress {
            bar,
            total,
            first,
            batch: plan.recipe.train.batch as f64,
            epochs: plan.recipe.train.epochs,
            began: None,
            split: Split::default(),
            seen: 0,
            said_estimate: false,
            last_line: Instant::now(),
        }
    }

    /// Shows an event.
    pub fn show(&mut self, event: &Event) {
        match event {
            Event::Step { step, epoch, report, split } => self.step(*step, *epoch, report.loss, split),
            Event::Epoch { epoch, loss, health, collapse } => {
                let mut line = format!("epoch {epoch}/{}", self.epochs);
                if let Some(loss) = loss {
                    line += &format!("  loss {loss:.4}");
                }
                if let Some(h) = health {
                    if let Some(knn) = h.knn {
                        line += &format!("  kNN {}", percent(knn));
                    }
                    line += &format!(
                        "  RankMe {:.1}  projections: std {:.4} (spread out {:.4}), cosine {:.3}",
                        h.rankme, h.projection_std, h.projection_std_ideal, h.projection_cosine
                    );
                }
                self.line(line);
                if let Some(why) = collapse {
                    let head = style("FAILED:").red().bold().for_stderr();
                    self.line(format!("{head} {why}"));
                }
            }
            Event::Rollback { from, to, peak, .. } => {
                self.line(format!("back from step {from} to {to}, on with half the learning rate (peak {peak:.4})"));
                self.bar.set_position(*to);
                (self.began, self.seen) = (None, 0);
            }
            Event::PassedOver(n, first) => {
                let head = style("warning:").yellow().bold().for_stderr();
                self.line(format!(
                    "{head} {n} images cannot be used and were passed over, see skipped.txt; the first: {first}"
                ));
            }
            Event::Checkpoint(_) => {}
        }
    }

    fn step(&mut self, step: u64, epoch: f64, loss: f64, split: &Split) {
        self.seen += 1;
        if self.seen == WARM_STEPS {
            self.began = Some((Instant::now(), step));
        }
        for (sum, one) in [
            (&mut self.split.data, split.data),
            (&mut self.split.forward, split.forward),
            (&mut self.split.backward, split.backward),
            (&mut self.split.exchange, split.exchange),
            (&mut self.split.update, split.update),
        ] {
            *sum += one;
        }
        self.bar.set_position(step);
        let Some((began, from)) = self.began.filter(|(_, from)| step > *from) else { return };
        let seconds = began.elapsed().as_secs_f64() / (step - from) as f64;
        let left = duration(seconds * (self.total - step) as f64);
        if !self.said_estimate && step - from >= TIMED_STEPS {
            self.said_estimate = true;
            self.line(format!("about {left} for {} steps, by the first {}", self.total - step, step - self.first));
        }
        let s = &self.split;
        let share = |part: f64| format!("{:.0}", 100.0 * part / s.total().max(1e-9));
        let message = format!(
            "epoch {epoch:.1}/{}  loss {loss:.3}  {:.1} images/s  {left} left  data/forward/backward{}/update {}/{}/{}{}/{} %",
            self.epochs,
            self.batch / seconds,
            if s.exchange > 0.0 { "/exchange" } else { "" },
            share(s.data),
            share(s.forward),
            share(s.backward),
            if s.exchange > 0.0 { format!("/{}", share(s.exchange)) } else { String::new() },
            share(s.update),
        );
        if self.bar.is_hidden() && self.last_line.elapsed() > Duration::from_secs(30) {
            self.last_line = Instant::now();
            note(format!("step {step}/{}  {message}", self.total));
        }
        self.bar.set_message(message);
    }

    fn line(&self, text: String) {
        if self.bar.is_hidden() { note(text) } else { self.bar.println(text) }
    }

    /// Takes the bar away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
