//! The tutorial, command by command: its output must be what the program prints, numbers aside.
//!
//! The test runs on small data. With `BYOL_TUTORIAL=FOLDER`, where FOLDER contains
//! `cifar-10-batches-bin`, it runs the commands there as they are written, and writes their output
//! into the page.

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::Stdio,
};

use crate::common::byol;

const PAGE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/tutorial/first-encoder.md");

/// Commands that are not run on small data: `demo` and `plan` have tests of their own, which call
/// [`assert_output_is_documented`], and `devices` depends on the machine.
const RUN_ELSEWHERE: [&str; 3] = ["demo", "plan", "devices"];

/// A command of the page and the output below it.
struct Step<'a> {
    command: &'a str,
    output: Vec<&'a str>,
}

impl Step<'_> {
    /// Arguments of `byol`.
    fn args(&self) -> Vec<&str> {
        self.command.strip_prefix("byol ").expect("a command of byol").split_whitespace().collect()
    }
}

/// Commands of the `console` blocks of a page. They begin with `$ `.
fn steps(page: &str) -> Vec<Step<'_>> {
    let (mut steps, mut is_console) = (Vec::<Step>::new(), false);
    for line in page.lines() {
        match (line.strip_prefix("```"), line.strip_prefix("$ "), steps.last_mut()) {
            (Some(language), ..) => is_console = language == "console",
            (None, Some(command), _) if is_console => steps.push(Step { command, output: Vec::new() }),
            (None, None, Some(step)) if is_console => step.output.push(line),
            _ => {}
        }
    }
    steps
}

/// Runs a command in `folder` and returns the lines that it prints to either stream. With
/// `interrupt`, it receives Ctrl-C once it has estimated the time left. A server is stopped once it
/// has printed its address.
fn output(folder: &Path, args: &[&str], interrupt: bool) -> Vec<String> {
    let (reader, writer) = std::io::pipe().unwrap();
    let mut command = byol(args);
    command.current_dir(folder).env("NO_COLOR", "1").stdin(Stdio::null());
    command.stdout(writer.try_clone().unwrap()).stderr(writer);
    let mut child = command.spawn().unwrap();
    drop(command); // with its ends of the pipe
    let mut lines = Vec::new();
    for line in BufReader::new(reader).lines().map(Result::unwrap) {
        let is_served = line.contains("press Ctrl-C to stop");
        if is_served || interrupt && line.starts_with("estimated time left") {
            std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
        }
        lines.push(line);
        if is_served {
            break;
        }
    }
    let status = child.wait().unwrap();
    let last = lines.last().map_or("", String::as_str);
    assert!(status.success() || interrupt || last.contains("press Ctrl-C"), "{args:?}: {}", lines.join("\n"));
    lines
}

/// Lines without the path of `folder`, which differs from machine to machine.
fn without_path(lines: impl IntoIterator<Item = String>, folder: &Path) -> Vec<String> {
    let above = format!("{}/", folder.canonicalize().unwrap().display());
    lines.into_iter().map(|line| line.replace(&above, "…/")).collect()
}

/// Joins the lines that the program has broken: the next word would have ended beyond column 80.
fn unwrapped<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<String> {
    // A table may begin below a long line, too; its header is further to the right.
    let indents = 2..=10;
    let (mut joined, mut columns) = (Vec::<String>::new(), 0);
    for line in lines {
        // Not broken: a command in backticks, a number and its percent sign.
        let text = line.trim_start();
        let end = match text.strip_prefix('`') {
            Some(command) => command.find('`').map_or(text.len(), |end| end + 2),
            None => text.find(' ').unwrap_or(text.len()),
        };
        let end = if text[end..].starts_with(" %") { end + 2 } else { end };
        let word = &text[..end];
        match joined.last_mut() {
            Some(last)
                if indents.contains(&(line.len() - line.trim_start().len()))
                    && columns + 1 + word.chars().count() > 80 =>
            {
                *last += &format!(" {}", line.trim_start());
            }
            _ => joined.push(line.to_owned()),
        }
        columns = line.chars().count();
    }
    joined
}

/// A line without what depends on data and machine: numbers, durations and the name of the
/// processor. `None` for lines that are not always printed.
fn shape(line: &str, processor: &str) -> Option<String> {
    let line = line.replace(processor, "CPU").replace("Intel Xeon", "CPU").replace("bf16", "f32");
    let sometimes =
        ["", "…", "warning:", "hint:", "step", "checking", "embedding", "embedding:", "computing", "reading"];
    // The demo has a test of its own.
    let is_demo = line.starts_with("byol-runs/demo");
    let first = line.split_whitespace().next().unwrap_or_default();
    // A verdict depends on the results, the precision on the processor.
    let precision = line.trim_start().starts_with("auto: f32");
    if precision || is_demo || sometimes.contains(&first) || line.contains(" against ") || line.starts_with("better") {
        return None;
    }
    let line = line.split(", roughly ").next().unwrap_or_default().replace(" million", "").replace("threads", "thread");
    let mut words: Vec<String> = Vec::new();
    for word in line.split_whitespace() {
        let mut number = String::new();
        for c in word.chars() {
            match c {
                '0'..='9' if number.ends_with('0') => {}
                '0'..='9' => number.push('0'),
                '.' if number.ends_with('0') => {}
                c => number.push(c),
            }
        }
        let number = number.strip_prefix('-').filter(|rest| rest.starts_with('0')).unwrap_or(&number).to_owned();
        let is_unit_of_time = ["s", "min", "h", "day", "days"].contains(&number.trim_end_matches([';', ',']));
        match words.last_mut() {
            Some(last) if is_unit_of_time && last == "0" => *last = "TIME".into(),
            _ => words.push(number),
        }
    }
    // Some encoders of a table have the width 1, which is not printed.
    let words = words.join(" ").replace(" of width 0", "");
    let mut words: Vec<String> = words.split(' ').map(str::to_owned).collect();
    words.dedup_by(|word, before| word == "TIME" && before == "TIME");
    Some(words.join(" "))
}

fn shapes<'a>(lines: impl Iterator<Item = &'a str>) -> BTreeSet<String> {
    let processor = byol::device::machine().cpu;
    lines.filter_map(|line| shape(line, &processor)).collect()
}

/// Asserts that the page shows the output of a command of the same name.
pub fn assert_output_is_documented(subcommand: &str, output: &str) {
    let page = fs::read_to_string(PAGE).unwrap();
    let steps = steps(&page);
    let step = steps.iter().find(|step| step.args()[0] == subcommand).expect("the page has the command");
    assert_same(step, unwrapped(output.lines()).iter().map(String::as_str));
}

fn assert_same<'a>(step: &Step, actual: impl Iterator<Item = &'a str>) {
    let page = unwrapped(step.output.iter().copied());
    let (page, actual) = (shapes(page.iter().map(String::as_str)), shapes(actual));
    let only = |a: &BTreeSet<String>, b: &BTreeSet<String>| a.difference(b).cloned().collect::<Vec<_>>().join("\n  ");
    assert!(
        page == actual,
        "the tutorial and the output of `{}` differ (record it again: see this file)\nonly in the tutorial:\n  {}\nonly \
         in the output:\n  {}",
        step.command,
        only(&page, &actual),
        only(&actual, &page)
    );
}

/// Writes images of CIFAR-10's format: horizontal or vertical stripes of a color per class.
fn write_small_cifar(folder: &Path, [training, test]: [usize; 2]) {
    fs::create_dir_all(folder).unwrap();
    let images = |first: usize, n: usize| -> Vec<u8> {
        let image = |i: usize| {
            let (class, phase) = (i % 10, i / 10);
            let stripe = move |at: usize| ((at + phase) / (2 + class % 4)).is_multiple_of(2);
            let pixel = move |at: usize| {
                let (channel, y, x) = (at / 1024, at / 32 % 32, at % 32);
                let bright = if class < 5 { stripe(x) } else { stripe(y) };
                (60 + 120 * usize::from(bright) + 30 * ((channel + class) % 3) + (at * 7 + i) % 9) as u8
            };
            std::iter::once(class as u8).chain((0..3072).map(pixel))
        };
        (first..first + n).flat_map(image).collect()
    };
    for part in 0..5 {
        let name = format!("data_batch_{}.bin", part + 1);
        fs::write(folder.join(name), images(part * training / 5, training / 5)).unwrap();
    }
    fs::write(folder.join("test_batch.bin"), images(training, test)).unwrap();
}

#[test]
fn tutorial_shows_the_output_of_its_commands() {
    let page = fs::read_to_string(PAGE).unwrap();
    if let Some(folder) = std::env::var_os("BYOL_TUTORIAL") {
        return record(&page, Path::new(&folder));
    }
    let folder = tempfile::tempdir().unwrap();
    write_small_cifar(&folder.path().join("cifar-10-batches-bin"), [500, 100]);
    for step in steps(&page) {
        let mut args = step.args();
        match args[0] {
            name if RUN_ELSEWHERE.contains(&name) => continue,
            "pretrain" => args.extend(["--set", "health.images=128"]),
            "explore" => args.extend(["--port", "0"]),
            _ => {}
        }
        let actual = output(folder.path(), &args, is_interrupted(&step));
        let actual = without_path(unwrapped(actual.iter().map(String::as_str)), folder.path());
        assert_same(&step, actual.iter().map(String::as_str));
    }
}

/// Whether the page shows that Ctrl-C was pressed.
fn is_interrupted(step: &Step) -> bool {
    step.output.iter().any(|line| line.starts_with("stopping; press Ctrl-C"))
}

/// Replaces the output on the page by that of the commands, run in `folder`.
fn record(page: &str, folder: &Path) {
    let outputs: Vec<Vec<String>> = steps(page)
        .iter()
        .map(|step| shortened(without_path(output(folder, &step.args(), is_interrupted(step)), folder)))
        .collect();
    let (mut text, mut outputs, mut is_console, mut is_output) = (String::new(), outputs.iter(), false, false);
    for line in page.lines() {
        if let Some(language) = line.strip_prefix("```") {
            (is_console, is_output) = (language == "console", false);
        }
        let is_command = is_console && line.starts_with("$ ");
        if is_output && !is_command {
            continue;
        }
        text += &format!("{line}\n");
        if is_command {
            is_output = true;
            outputs.next().unwrap().iter().for_each(|line| text += &format!("{line}\n"));
        }
    }
    fs::write(PAGE, text).unwrap();
}

/// Leaves out progress, and the middle of many lines of a kind.
fn shortened(lines: Vec<String>) -> Vec<String> {
    const SHOWN: [usize; 2] = [3, 2];
    let progress = ["step ", "embedding", "checking ", "computing ", "reading "];
    let is_progress = |line: &str| progress.iter().any(|start| line.starts_with(start));
    let lines: Vec<String> = lines.into_iter().filter(|line| !is_progress(line)).collect();
    let same = |a: &String, b: &String| shape(a, "Intel Xeon") == shape(b, "Intel Xeon");
    let short = |group: &[String]| match group.len() {
        n if n > SHOWN[0] + SHOWN[1] + 5 => [&group[..SHOWN[0]], &["…".to_owned()], &group[n - SHOWN[1]..]].concat(),
        _ => group.to_vec(),
    };
    lines.chunk_by(same).flat_map(short).collect()
}

#[test]
fn broken_lines_are_joined() {
    let words = ["seven77"; 10].join(" ");
    let lines = [words.as_str(), "  next", "  table  1", words.as_str(), "new"];
    assert_eq!(unwrapped(lines.into_iter()), [&format!("{words} next"), "  table  1", &words, "new"]);
    let lines = ["seven77 ".repeat(9) + "on", "  12.5 %, `a b`".into()];
    assert_eq!(unwrapped(lines.iter().map(String::as_str)), [format!("{}on 12.5 %, `a b`", "seven77 ".repeat(9))]);
}

#[test]
fn shapes_ignore_numbers_and_durations() {
    let shape = |line| shape(line, "Some CPU").unwrap_or_default();
    assert_eq!(shape("epoch 12/24  loss 0.5951"), shape("epoch 1/4 loss 2"));
    assert_ne!(shape("epoch 12/24  loss 0.5951"), shape("epoch 12/24  Loss 0.5951"));
    assert_eq!(shape("took 1 h 12 min for 3 steps"), shape("took 40.1 s for 33 steps"));
    assert_eq!(shape("finished in 1 min 12 s; next"), shape("finished in 40 s; next"));
    assert_eq!(shape("Some CPU, 2 threads"), shape("Intel Xeon, 1 thread"));
    assert_eq!(shape("α-ReQ  -1.5"), shape("α-ReQ 2"));
    assert_eq!(shape("warning: few images"), "");
}
