//! ARCHITECTURE.md and CONTRIBUTING.md against the tree: imports go one way, and every place that
//! the pages name exists.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Rust files below `folder`, with their module paths: `nn/mod.rs` is `["nn"]`.
fn modules(folder: &Path) -> BTreeMap<Vec<String>, PathBuf> {
    let mut all = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(current) = folders.pop() {
        for entry in fs::read_dir(current).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == "rs") {
                let relative = path.strip_prefix(folder).unwrap().with_extension("");
                let mut name: Vec<String> = relative.iter().map(|part| part.to_str().unwrap().to_owned()).collect();
                if name.last().is_some_and(|last| last == "mod" || last == "lib" || last == "main") {
                    name.pop();
                }
                all.insert(name, path);
            }
        }
    }
    all
}

/// Code without comments and without the unit tests at the end of a file.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap();
    let text = text.split("#[cfg(test)]\nmod ").next().unwrap();
    text.lines().map(|line| line.split("//").next().unwrap()).collect::<Vec<_>>().join("\n")
}

/// Splits at top-level commas: `a, b::{c, d}` is `a` and `b::{c, d}`.
fn split_list(list: &str) -> Vec<&str> {
    let (mut parts, mut depth, mut start) = (Vec::new(), 0, 0);
    for (i, c) in list.char_indices() {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&list[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&list[start..]);
    parts.into_iter().map(str::trim).filter(|part| !part.is_empty()).collect()
}

/// Expands `a::{b, c::d}` to the paths `a::b` and `a::c::d`.
fn expand(tree: &str, prefix: &[String], paths: &mut Vec<Vec<String>>) {
    let tree = tree.trim();
    match tree.split_once('{') {
        Some((head, list)) => {
            let mut prefix = prefix.to_vec();
            prefix.extend(head.split("::").map(str::trim).filter(|s| !s.is_empty()).map(str::to_owned));
            let list = list.trim_end().strip_suffix('}').expect("balanced braces");
            split_list(list).into_iter().for_each(|part| expand(part, &prefix, paths));
        }
        None => {
            let tree = tree.split(" as ").next().unwrap();
            let path = tree.split("::").map(|s| s.trim().to_owned());
            paths.push(prefix.iter().cloned().chain(path).collect());
        }
    }
}

/// Absolute paths within the crate that a file imports or names with `crate::` or `super::`.
fn imports(module: &[String], path: &Path) -> Vec<Vec<String>> {
    let code = code(path);
    let mut paths = Vec::new();
    for start in ["use crate::", "use super::", "use self::"] {
        for (at, _) in code.match_indices(start) {
            let statement = code[at + 4..].split(';').next().unwrap();
            expand(statement, &[], &mut paths);
        }
    }
    for start in ["crate::", "super::"] {
        for (at, _) in code.match_indices(start) {
            let path = code[at..].split(|c: char| !(c.is_alphanumeric() || c == '_' || c == ':')).next().unwrap();
            paths.push(path.trim_end_matches(':').split("::").map(str::to_owned).collect());
        }
    }
    let resolve = |path: Vec<String>| {
        let mut base = match path[0].as_str() {
            "crate" => Vec::new(),
            _ => module.to_vec(),
        };
        let mut rest = path.iter().peekable();
        while let Some(part) = rest.next_if(|part| ["crate", "super", "self"].contains(&part.as_str())) {
            if part == "super" {
                base.pop();
            }
        }
        base.extend(rest.filter(|part| !["self", "*"].contains(&part.as_str())).cloned());
        base
    };
    paths.into_iter().map(resolve).collect()
}

/// The longest prefix of a path that is a module.
fn module_of(path: &[String], modules: &BTreeMap<Vec<String>, PathBuf>) -> Option<Vec<String>> {
    (1..=path.len()).rev().map(|n| path[..n].to_vec()).find(|prefix| modules.contains_key(prefix))
}

/// Layers of a crate in ARCHITECTURE.md, bottom first: the lines of the block after `marker`.
fn layers(marker: &str) -> Vec<Vec<String>> {
    let page = fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let block = page.split(marker).nth(1).unwrap_or_else(|| panic!("ARCHITECTURE.md lacks {marker}"));
    let block = block.split("```").nth(1).unwrap();
    let lines = block.lines().skip(1).filter(|line| !line.trim().is_empty());
    lines.map(|line| line.split_whitespace().map(str::to_owned).collect()).collect()
}

/// Asserts that every import goes to a lower layer or stays within its module.
fn assert_one_way(folder: &str, marker: &str) {
    let modules = modules(&root().join(folder));
    let layers = layers(marker);
    let layer_of = |name: &str| layers.iter().position(|layer| layer.iter().any(|n| n == name));
    let mut violations = BTreeSet::new();
    for (module, path) in &modules {
        // The crate root re-exports from everywhere.
        let Some(own) = module.first() else { continue };
        let own_layer = layer_of(own).unwrap_or_else(|| panic!("ARCHITECTURE.md does not list the module `{own}`"));
        for import in imports(module, path) {
            let Some(target) = import.first().filter(|name| modules.contains_key(&vec![(*name).clone()])) else {
                continue;
            };
            if target != own && layer_of(target).is_none_or(|layer| layer >= own_layer) {
                violations.insert(format!("{} imports {target}", module.join("/")));
            }
        }
    }
    assert!(violations.is_empty(), "imports against the order of ARCHITECTURE.md: {violations:#?}");
    let listed: BTreeSet<_> = layers.iter().flatten().collect();
    let existing: BTreeSet<_> = modules.keys().filter_map(|module| module.first()).collect();
    assert_eq!(listed, existing, "modules listed in ARCHITECTURE.md and modules of the crate");
}

/// Asserts that the files of a crate have no import cycle. A module and its submodules count as one
/// where one contains the other, since a parent re-exports its children.
fn assert_no_cycles(folder: &str) {
    let modules = modules(&root().join(folder));
    let is_family = |a: &[String], b: &[String]| a.starts_with(b) || b.starts_with(a);
    let mut edges: BTreeMap<Vec<String>, BTreeSet<Vec<String>>> = BTreeMap::new();
    for (module, path) in modules.iter().filter(|(module, _)| !module.is_empty()) {
        let targets = imports(module, path).into_iter().filter_map(|import| module_of(&import, &modules));
        let targets = targets.filter(|target| !is_family(module, target));
        edges.insert(module.clone(), targets.collect());
    }
    fn visit(
        at: &Vec<String>,
        edges: &BTreeMap<Vec<String>, BTreeSet<Vec<String>>>,
        trail: &mut Vec<Vec<String>>,
        done: &mut BTreeSet<Vec<String>>,
    ) -> Option<Vec<Vec<String>>> {
        if let Some(start) = trail.iter().position(|t| t == at) {
            return Some(trail[start..].to_vec());
        }
        if !done.insert(at.clone()) {
            return None;
        }
        trail.push(at.clone());
        let found = edges[at].iter().find_map(|next| visit(next, edges, trail, done));
        trail.pop();
        found
    }
    let mut done = BTreeSet::new();
    for module in edges.keys() {
        let cycle = visit(module, &edges, &mut Vec::new(), &mut done);
        assert!(cycle.is_none(), "import cycle in {folder}: {cycle:?}");
    }
}

#[test]
fn library_imports_go_one_way() {
    assert_one_way("crates/byol/src", "<!-- layers: byol -->");
}

#[test]
fn files_have_no_import_cycles() {
    assert_no_cycles("crates/byol/src");
    assert_no_cycles("crates/kernels/src");
}

#[test]
fn import_parser_sees_nested_lists_and_paths() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("b.rs");
    let text = "use crate::{a::{self, X}, c};\nuse super::d::Y;\nfn f() { crate::e::g(); } // crate::no\n";
    fs::write(&file, text).unwrap();
    let found: BTreeSet<String> =
        imports(&["m".into(), "b".into()], &file).iter().map(|path| path.join("::")).collect();
    for path in ["a", "a::X", "c", "m::d::Y", "e::g"] {
        assert!(found.contains(path), "{path} in {found:?}");
    }
    assert!(!found.iter().any(|path| path.contains("no")), "{found:?}");
}

/// Number of `pub fn` that the documentation shows, in `file` and the modules below it.
fn documented_functions(file: &Path) -> usize {
    let text = code(file);
    let lines: Vec<&str> = text.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let is_hidden = |i: usize| i > 0 && lines[i - 1] == "#[doc(hidden)]";
    let is_function = |line: &str| line.starts_with("pub fn ") || line.starts_with("pub const fn ");
    let own = lines.iter().enumerate().filter(|(i, line)| is_function(line) && !is_hidden(*i)).count();
    let folder = match file.file_stem().and_then(|stem| stem.to_str()) {
        Some("lib" | "mod") => file.parent().unwrap().to_owned(),
        _ => file.with_extension(""),
    };
    let shown = lines.iter().enumerate().filter_map(|(i, line)| {
        let name = line.strip_prefix("pub mod ").or_else(|| line.strip_prefix("mod "))?.strip_suffix(';')?;
        (!is_hidden(i)).then_some(name)
    });
    let path = |name: &str| match folder.join(format!("{name}.rs")) {
        path if path.exists() => path,
        _ => folder.join(name).join("mod.rs"),
    };
    own + shown.map(|name| documented_functions(&path(name))).sum::<usize>()
}

const LIMIT: usize = 345;

/// A larger number is a decision: raise the limit in the commit that needs it, or use `pub(crate)`,
/// or `#[doc(hidden)]` on a module that only the command uses.
#[test]
fn documented_library_stays_small() {
    let n = documented_functions(&root().join("crates/byol/src/lib.rs"));
    assert!((200..=LIMIT).contains(&n), "{n} documented functions, at most {LIMIT}");
}

/// Code spans of a Markdown text.
fn code_spans(text: &str) -> Vec<&str> {
    text.split('`').skip(1).step_by(2).collect()
}

#[test]
fn contributing_names_places_that_exist() {
    let page = fs::read_to_string(root().join("CONTRIBUTING.md")).unwrap();
    let table = page.split("## Where a change goes").nth(1).expect("the table").split("\n## ").next().unwrap();
    let rows: Vec<&str> = table.lines().filter(|line| line.starts_with("| ")).skip(1).collect();
    for kind in ["augmentation", "optimizer", "evaluation", "data format", "command", "instruction set"] {
        assert!(rows.iter().any(|row| row.split('|').nth(1).unwrap().contains(kind)), "no row for {kind}");
    }
    let mut paths = 0;
    for row in rows {
        // Names stand before the file that has them: "a field of `Policy`,
        // `crates/byol/src/views/mod.rs`".
        let mut names: Vec<&str> = Vec::new();
        for span in code_spans(row) {
            if span.contains('/') {
                // A new file stands in a folder that exists.
                let is_new = span.contains("NAME");
                let path = root().join(if is_new { Path::new(span).parent().unwrap() } else { Path::new(span) });
                assert!(path.exists(), "CONTRIBUTING.md names {span}, which does not exist");
                paths += 1;
                if !is_new {
                    let text = fs::read_to_string(&path).unwrap();
                    for name in names.drain(..) {
                        assert!(
                            text.contains(name),
                            "CONTRIBUTING.md names `{name}` in {span}, which does not have it"
                        );
                    }
                }
            } else if span.chars().all(|c| c.is_alphanumeric() || c == '_' || c == ':') {
                names.push(span.rsplit("::").next().unwrap());
            }
        }
        assert!(names.is_empty(), "CONTRIBUTING.md names {names:?} without a file");
    }
    assert!(paths >= 20, "only {paths} paths in the table");
}
