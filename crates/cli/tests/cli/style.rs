//! Style of everything a user reads: help texts, error messages, README and docs (docs/style.md).

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::common::ok;

/// Widest first line of a help text.
const MAX_SUMMARY: usize = 80;

/// Widest line of a help text.
const MAX_LINE: usize = 100;

/// Phrases that no text may contain, in lower case. A phrase matches whole words; a final `*`
/// matches any ending.
const BANNED: &[&str] = &[
    // Unidiomatic phrases.
    "a kill leaves none",
    "all that a run is",
    "another byol is training",
    "is of use",
    "never stopped",
    "proves itself",
    "spread out",
    "takes images as they come",
    "the way of",
    "views of your own",
    "watches itself",
    "what is kept",
    "what it tells the others",
    "where it stands",
    "whoever keeps the time",
    "a line each",
    "a vector an image",
    "apart at most",
    "are no",
    "before it begins",
    "as was said",
    "finds alike",
    "finished views",
    "does not belong here",
    "go on with",
    "goes on",
    "going on after",
    "goes on where",
    "gone on with",
    "hardly a",
    "held out to watch",
    "how many there are",
    "images a batch",
    "images a step",
    "images an update",
    "in plain words",
    "is full from",
    "is no",
    "is worth",
    "let it see",
    "million millions",
    "more than needed",
    "names the random",
    "no number any more",
    "no numbers any more",
    "not numbers any more",
    "no plan can hold",
    "of several",
    "of the cases",
    "of which",
    "one a core",
    "passed over",
    "reckon*",
    "report card",
    "said",
    "say without",
    "so many",
    "somebody",
    "someone else",
    "evenly spread over",
    "spread out would",
    "takes the place of",
    "that others have trained",
    "to the bit",
    "trying a few steps",
    "unrelated directions",
    "views are finished",
    "walk as one",
    "watched image*",
    "what came of",
    "what is multiplied",
    "what it is shown",
    "where to:",
    "who shares",
    // British spelling.
    "artefact*",
    "behaviour*",
    "centre*",
    "colour*",
    "favour*",
    "grey*",
    "labelled",
    "labelling",
    "licence*",
    "metre*",
    "millimetre*",
    "neighbour*",
    "normalis*",
    "optimis*",
];

/// Idiomatic phrases that contain a banned one.
const ALLOWED: &[&str] = &[
    "there are no ",
    "are no longer ",
    "there is no ",
    "is no longer ",
    "one of several ",
    "is no better ",
    "is no worse ",
    "is no more ",
    "optimistic",
];

/// Lower case, with single spaces and without the allowed phrases.
fn normalized(text: &str) -> String {
    let text = text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    ALLOWED.iter().fold(text, |text, phrase| text.replace(phrase, ". "))
}

/// Banned phrases of a text.
fn banned_phrases(text: &str) -> Vec<&'static str> {
    let text = normalized(text);
    let is_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
    let contains = |phrase: &str| {
        let (phrase, any_ending) = phrase.strip_suffix('*').map_or((phrase, false), |prefix| (prefix, true));
        text.match_indices(phrase).any(|(at, _)| {
            let (before, after) = (&text[..at], &text[at + phrase.len()..]);
            !is_word(before.chars().next_back()) && (any_ending || !is_word(after.chars().next()))
        })
    };
    BANNED.iter().copied().filter(|phrase| contains(phrase)).collect()
}

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

/// Files with this extension below a folder, sorted.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
        match entry.is_dir() {
            true => found.extend(files(&entry, extension)),
            false if entry.extension().is_some_and(|e| e == extension) => found.push(entry),
            false => {}
        }
    }
    found.sort();
    found
}

/// Help text of a command, as printed.
fn help(command: &[String], flag: &str) -> String {
    let args: Vec<&str> = command.iter().map(String::as_str).chain([flag]).collect();
    String::from_utf8(ok(&args).stdout).unwrap()
}

/// Subcommands that a help text lists.
fn subcommands(help: &str) -> Vec<String> {
    let listed = help.lines().skip_while(|line| *line != "Commands:").skip(1).take_while(|line| !line.is_empty());
    let names = listed.filter(|line| line.starts_with("  ") && !line.starts_with("   "));
    names.filter_map(|line| line.split_whitespace().next()).filter(|name| *name != "help").map(str::to_owned).collect()
}

/// Every command, as its arguments, with its long and short help.
fn commands() -> Vec<(Vec<String>, [String; 2])> {
    let mut all = Vec::new();
    let mut pending = vec![Vec::new()];
    while let Some(command) = pending.pop() {
        let texts = [help(&command, "--help"), help(&command, "-h")];
        for name in subcommands(&texts[0]) {
            pending.push([&command[..], &[name]].concat());
        }
        all.push((command, texts));
    }
    all
}

#[test]
fn help_follows_the_style_guide() {
    let commands = commands();
    let names: BTreeSet<String> = commands.iter().map(|(command, _)| command.join(" ")).collect();
    for name in ["pretrain", "eval label-free", "bench kernels", "completions", "man"] {
        assert!(names.contains(name), "{name} is not in {names:?}");
    }
    let mut faults = Vec::new();
    for (command, texts) in &commands {
        let name = command.join(" ");
        for text in texts {
            let summary = text.lines().next().unwrap_or_default();
            if !summary.starts_with(char::is_uppercase) || summary.ends_with('.') {
                faults.push(format!("`{name}`: `{summary}` is not a capitalized phrase without a period"));
            }
            if summary.chars().count() > MAX_SUMMARY {
                faults.push(format!("`{name}`: `{summary}` is wider than {MAX_SUMMARY} columns"));
            }
            for line in text.lines().filter(|line| line.chars().count() > MAX_LINE) {
                faults.push(format!("`{name}`: `{line}` is wider than {MAX_LINE} columns"));
            }
            for phrase in banned_phrases(text) {
                faults.push(format!("`{name}`: the help contains `{phrase}`"));
            }
        }
        // In the short help, the description of a flag is on its line or the next.
        let mut lines = texts[1].lines().peekable();
        while let Some(line) = lines.next() {
            let flag = line.trim_start();
            // Wrapped descriptions are indented further.
            if !flag.starts_with('-') || line.len() - flag.len() > 6 {
                continue;
            }
            let same_line = flag.split_once("  ").map(|(_, description)| description.trim());
            let description = same_line.unwrap_or_else(|| lines.peek().map_or("", |next| next.trim()));
            if !description.starts_with(char::is_uppercase) || description.ends_with('.') {
                faults.push(format!("`{name}`: `{flag}` has no capitalized description without a period"));
            }
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// Markdown without inline code, which quotes names rather than prose.
fn without_inline_code(markdown: &str) -> String {
    let lines = markdown.lines().map(|line| match line.starts_with("```") {
        true => String::new(),
        false => line.split('`').step_by(2).collect::<Vec<_>>().join(" `code` "),
    });
    lines.collect::<Vec<_>>().join("\n")
}

#[test]
fn documents_and_page_contain_no_banned_phrases() {
    let root = repository();
    let docs = root.join("docs");
    let excluded = [docs.join("log"), docs.join("decisions"), docs.join("style.md")];
    let pages = files(&docs, "md").into_iter().filter(|path| !excluded.iter().any(|other| path.starts_with(other)));
    let mut faults = Vec::new();
    let others = ["README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", "SECURITY.md", "CHANGELOG.md"];
    let others = others.iter().map(|name| root.join(name));
    let page = ["page.html", "page.js"].map(|name| root.join("crates/cli/src/commands/explore").join(name));
    for path in pages.chain(others).chain(page) {
        let text = fs::read_to_string(&path).unwrap();
        for phrase in banned_phrases(&without_inline_code(&text)) {
            faults.push(format!("{}: `{phrase}`", path.strip_prefix(&root).unwrap().display()));
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// String literal of Rust code.
#[derive(Debug, PartialEq)]
struct Literal {
    line: usize,
    /// Format string of an error.
    is_error: bool,
    /// Contents. Escapes stay as they are in the source, except that line continuations are
    /// removed.
    text: String,
}

/// String literals of Rust code, without comments.
fn string_literals(code: &str) -> Vec<Literal> {
    let chars: Vec<char> = code.chars().collect();
    let at = |i: usize, text: &str| text.chars().enumerate().all(|(k, c)| chars.get(i + k) == Some(&c));
    let is_identifier = |i: usize| chars.get(i).is_some_and(|c| c.is_alphanumeric() || *c == '_');
    let (mut literals, mut line, mut before, mut i) = (Vec::new(), 1, String::new(), 0);
    while i < chars.len() {
        if at(i, "//") {
            i += chars[i..].iter().take_while(|c| **c != '\n').count();
            continue;
        }
        if let Some(length) = char_literal(&chars[i..]) {
            i += length;
            continue;
        }
        let hashes = chars[i + 1..].iter().take_while(|c| **c == '#').count();
        let is_raw = chars[i] == 'r' && at(i + 1 + hashes, "\"") && !(i > 0 && is_identifier(i - 1));
        if !is_raw && chars[i] != '"' {
            line += usize::from(chars[i] == '\n');
            if !chars[i].is_whitespace() {
                before.push(chars[i]);
            }
            i += 1;
            continue;
        }
        let is_error = ["#[error(", "Err(format!("].iter().any(|head| before.ends_with(head));
        let (start, end) = (line, if is_raw { format!("\"{}", "#".repeat(hashes)) } else { "\"".to_owned() });
        i += if is_raw { 2 + hashes } else { 1 };
        let mut text = String::new();
        while i < chars.len() && !at(i, &end) {
            if !is_raw && at(i, "\\\n") {
                let skipped = 2 + chars[i + 2..].iter().take_while(|c| c.is_whitespace()).count();
                line += chars[i..i + skipped].iter().filter(|c| **c == '\n').count();
                i += skipped;
                continue;
            }
            let length = if !is_raw && chars[i] == '\\' { 2 } else { 1 };
            line += usize::from(chars[i] == '\n');
            text.extend(&chars[i..i + length]);
            i += length;
        }
        i += end.chars().count();
        before.clear();
        literals.push(Literal { line: start, is_error, text });
    }
    literals
}

/// Length of the character literal at the start, if there is one; a lifetime is not.
fn char_literal(chars: &[char]) -> Option<usize> {
    match chars {
        ['\'', '\\', _, rest @ ..] => Some(4 + rest.iter().take_while(|c| **c != '\'').count()),
        ['\'', _, '\'', ..] => Some(3),
        _ => None,
    }
}

/// Whether a sentence starts with a capital letter that is not part of an acronym or a name such as
/// `BYOL_ISA`.
fn is_capitalized(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(char::is_uppercase) && chars.next().is_some_and(char::is_lowercase)
}

/// Verbs of remedies, which belong into the hint.
const IMPERATIVES: [&str; 12] =
    ["add", "check", "choose", "give", "install", "pass", "put", "remove", "run", "set", "try", "use"];

#[test]
fn messages_follow_the_style_guide() {
    let root = repository();
    let sources = ["kernels", "byol", "cli"].map(|name| files(&root.join("crates").join(name).join("src"), "rs"));
    let mut faults = Vec::new();
    for path in sources.iter().flatten() {
        let name = path.strip_prefix(&root).unwrap().display();
        // Shorter literals are keys and names.
        let literals = string_literals(&fs::read_to_string(path).unwrap());
        for Literal { line, is_error, text } in literals.into_iter().filter(|l| l.text.split_whitespace().count() > 2) {
            let prose = without_inline_code(&text.replace("\\n", " "));
            for phrase in banned_phrases(&prose) {
                faults.push(format!("{name}:{line}: `{phrase}` in `{text}`"));
            }
            if text.contains("docs/") {
                faults.push(format!("{name}:{line}: `{text}` names a file that a binary's users do not have"));
            }
            let (message, hint) = text.split_once("\\nhint: ").map_or((text.as_str(), None), |(m, h)| (m, Some(h)));
            if is_error && let Some(verb) = IMPERATIVES.iter().find(|verb| message.contains(&format!("; {verb} "))) {
                faults.push(format!("{name}:{line}: `; {verb}` in `{text}` should be a hint"));
            }
            for part in hint.into_iter().chain((is_error || hint.is_some()).then_some(message)) {
                if is_capitalized(part) || part.ends_with('.') {
                    faults.push(format!("{name}:{line}: `{part}` should be in lower case, without a period"));
                }
            }
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

#[test]
fn string_literals_are_found_in_code() {
    let code = concat!(
        "Err(format!(\"one \\\"two\\\" \\\n   three\")); // \"no\"\n",
        "let b = ('\"', '\\'', r#\"raw \" four\"#, \"five\");"
    );
    let literal = |line, is_error, text: &str| Literal { line, is_error, text: text.to_owned() };
    let expected =
        [literal(1, true, "one \\\"two\\\" three"), literal(3, false, "raw \" four"), literal(3, false, "five")];
    assert_eq!(string_literals(code), expected);
}

#[test]
fn banned_phrases_match_whole_words() {
    assert_eq!(banned_phrases("The colours: someone  else's; there is no file"), ["someone else", "colour*"]);
    assert_eq!(banned_phrases("It is no file"), ["is no"]);
    assert_eq!(banned_phrases("as he said."), ["said"]);
    assert!(banned_phrases("said_by unsaid, regreyed, no longer").is_empty());
}

#[test]
fn comments_are_at_most_100_columns_wide() {
    let root = repository();
    let mut faults = Vec::new();
    for path in files(&root.join("crates"), "rs") {
        // Examples in doc comments are as wide as code.
        let mut is_example = false;
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let Some(comment) = line.trim_start().strip_prefix("//") else {
                is_example = false;
                continue;
            };
            if comment.trim_start_matches(['/', '!', ' ']).starts_with("```") {
                is_example = !is_example;
            } else if !is_example && line.chars().count() > 100 {
                faults.push(format!("{}:{}", path.strip_prefix(&root).unwrap().display(), number + 1));
            }
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}

/// Files of the repository outside build outputs, hidden folders other than `.ci` and `.github`.
fn repository_files(extensions: &[&str]) -> Vec<PathBuf> {
    let root = repository();
    let folders = ["docs", "crates", "recipes", "benches", "fuzz", "cloud-test", "golden", ".github"];
    let below = folders.iter().map(|folder| root.join(folder)).filter(|folder| folder.exists());
    let nested = |folder: PathBuf| extensions.iter().flat_map(move |e| files(&folder, e)).collect::<Vec<_>>();
    let at_root = fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().path());
    let has_extension = |path: &PathBuf| path.extension().is_some_and(|e| extensions.iter().any(|x| e == *x));
    below.flat_map(nested).chain(at_root.filter(|path| path.is_file() && has_extension(path))).collect()
}

#[test]
fn markdown_and_script_comments_are_at_most_100_columns_wide() {
    let root = repository();
    let mut faults = Vec::new();
    let mut check = |path: &Path, number: usize, line: &str| {
        if line.chars().count() > 100 {
            faults.push(format!("{}:{number}", path.strip_prefix(&root).unwrap().display()));
        }
    };
    for path in repository_files(&["md"]) {
        let mut is_code = false;
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            let text = line.trim_start();
            is_code ^= text.starts_with("```");
            // Tables and single links cannot be wrapped.
            if !is_code && !text.starts_with('|') && !text.starts_with("- [") && !text.starts_with("![") {
                check(&path, number + 1, line);
            }
        }
    }
    let scripts = fs::read_dir(root.join(".ci")).unwrap().map(|entry| entry.unwrap().path());
    for path in repository_files(&["toml", "sh", "yml"]).into_iter().chain(scripts) {
        for (number, line) in fs::read_to_string(&path).unwrap().lines().enumerate() {
            if line.trim_start().starts_with("# ") && !line.contains("://") {
                check(&path, number + 1, line);
            }
        }
    }
    assert!(faults.is_empty(), "\n{}", faults.join("\n"));
}
