//! Imports inside the crate go one way, as `lib.rs` describes.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// All modules from the bottom to the top: a module imports earlier ones only.
const ORDER: &[&str] = &[
    "simd",
    "memory",
    "spin",
    "loops::bf16",
    "loops::matrix",
    "loops::block",
    "loops::norm",
    "loops::optimizer_step",
    "loops::pack",
    "loops::pool",
    "loops::roofline",
    "loops::tile",
    "loops::winograd",
    "loops",
    "isa::table",
    "isa::avx2",
    "isa::avx512",
    "isa::amx",
    "isa::neon",
    "isa::portable",
    "isa",
    "storage",
    "norm",
    "pool",
    "optimizer_step",
    "roofline",
    "conv::shape",
    "conv::operand",
    "conv::input",
    "conv::epilogue",
    "conv::gather",
    "conv::tiles",
    "conv::direct",
    "conv::winograd",
    "conv::matrix",
    "conv",
    "matmul",
    "reference",
    "lib",
];

fn source_files(folder: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            files.extend(source_files(&path));
        } else {
            files.push(path);
        }
    }
    files
}

/// Code without comments, white space and the unit tests at the end.
fn code(file: &Path) -> String {
    let text = fs::read_to_string(file).unwrap();
    let text = text.split("#[cfg(test)]\nmod tests").next().unwrap();
    let lines = text.lines().map(|line| line.split("//").next().unwrap());
    lines.collect::<String>().replace(char::is_whitespace, "")
}

/// The path or `use` tree at the beginning of `code`.
fn first_tree(code: &str) -> &str {
    let mut depth = 0;
    let end = code.find(|c: char| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => (),
        }
        depth < 0 || depth == 0 && !(c.is_alphanumeric() || "_:}".contains(c))
    });
    &code[..end.unwrap_or(code.len())]
}

/// The paths of a `use` tree: `a::{b, c::d}` has `a::b` and `a::c::d`.
fn paths(tree: &str) -> Vec<String> {
    let Some((prefix, rest)) = tree.split_once('{') else { return vec![tree.to_string()] };
    let mut depth = 0;
    let branches = rest.strip_suffix('}').unwrap_or(rest).split(|c: char| {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            _ => (),
        }
        depth == 0 && c == ','
    });
    branches.filter(|branch| !branch.is_empty()).flat_map(paths).map(|path| format!("{prefix}{path}")).collect()
}

/// The innermost module of a path.
fn module(path: &str) -> Option<usize> {
    let within = |module: &str| path == module || path.starts_with(&format!("{module}::"));
    (0..ORDER.len()).filter(|i| within(ORDER[*i])).max_by_key(|i| ORDER[*i].len())
}

#[test]
fn imports_go_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let files = source_files(&src);
    assert_eq!(files.len(), ORDER.len(), "every module has a place in the order");
    let mut imports = 0;
    for file in files {
        let relative = file.strip_prefix(&src).unwrap().with_extension("");
        let name = relative.to_str().unwrap().replace(['/', '\\'], "::");
        let name = name.strip_suffix("::mod").unwrap_or(&name);
        let place = ORDER.iter().position(|module| *module == name);
        let place = place.unwrap_or_else(|| panic!("{name} has no place in the order"));
        let parent = name.rsplit_once("::").map_or(String::new(), |(parent, _)| format!("{parent}::"));
        let code = code(&file);
        for (prefix, base) in [("crate::", ""), ("super::", parent.as_str())] {
            for (start, _) in code.match_indices(prefix) {
                for path in paths(first_tree(&code[start + prefix.len()..])) {
                    let path = format!("{base}{path}");
                    let imported = module(&path).unwrap_or_else(|| panic!("{name} imports an unknown {path}"));
                    assert!(imported <= place, "{name} must not import {path}");
                    imports += 1;
                }
            }
        }
    }
    assert!(imports > 60, "only {imports} imports were found");
}
