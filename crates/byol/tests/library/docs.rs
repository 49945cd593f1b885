//! The docs against the code, and their links.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use byol::train::recipe::{Recipe, known_keys};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Files below `folder` with this extension, without build outputs.
fn files(folder: &Path, extension: &str) -> Vec<PathBuf> {
    let (mut all, mut folders) = (Vec::new(), vec![folder.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            let name = entry.file_name();
            if path.is_dir() && name != "target" && name != ".git" {
                folders.push(path);
            } else if path.extension().is_some_and(|e| e == extension) {
                all.push(path);
            }
        }
    }
    all
}

#[test]
fn recipe_page_lists_every_key_with_its_default() {
    let page = fs::read_to_string(root().join("docs/reference/recipe.md")).unwrap();
    let rows: Vec<(String, toml::Value)> = page
        .lines()
        .filter_map(|line| {
            let mut cells = line.split('|').map(|c| c.trim().trim_matches('`'));
            let (key, value) = (cells.nth(1)?, cells.next()?);
            let value = format!("x = {value}").parse::<toml::Table>().ok()?.remove("x")?;
            Some((key.to_owned(), value))
        })
        .collect();
    let defaults = toml::Table::try_from(Recipe::default()).unwrap();
    let lookup = |key: &str| key.split('.').try_fold(toml::Value::Table(defaults.clone()), |v, k| v.get(k).cloned());
    let listed: BTreeSet<String> = rows.iter().map(|(key, _)| key.clone()).collect();
    assert_eq!(listed, known_keys().into_iter().collect());
    assert_eq!(listed.len(), rows.len(), "a key is listed twice");
    for (key, value) in &rows {
        let want = lookup(key).unwrap_or_else(|| panic!("no key {key}"));
        let close = |a: &toml::Value, b: &toml::Value| match (a.as_float(), b.as_float()) {
            (Some(a), Some(b)) => (a - b).abs() <= 1e-6 * b.abs(), // some fields are f32
            _ => a == b,
        };
        let same = match (value.as_array(), want.as_array()) {
            (Some(a), Some(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| close(a, b)),
            _ => close(value, &want),
        };
        assert!(same, "{key}: the page says {value}, the program {want}");
    }
}

#[test]
fn environment_page_lists_every_variable() {
    let page = fs::read_to_string(root().join("docs/reference/environment.md")).unwrap();
    let mut variables = BTreeSet::new();
    for path in ["crates/byol/src", "crates/cli/src", "crates/kernels/src"]
        .map(|folder| files(&root().join(folder), "rs"))
        .concat()
    {
        let text = fs::read_to_string(path).unwrap();
        let names = text.split('"').filter(|word| word.starts_with("BYOL_") && !word.starts_with("BYOL_TEST"));
        let is_name = |word: &&str| word.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
        variables.extend(names.filter(is_name).map(str::to_owned));
    }
    assert!(variables.contains("BYOL_ISA"), "{variables:?}");
    let missing: Vec<_> = variables.iter().filter(|name| !page.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "the page lacks {missing:?}");
}

/// Anchors of a page, as GitHub and mdBook derive them from headings.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut in_code = false;
    let headings = text.lines().filter(|line| {
        in_code ^= line.starts_with("```");
        !in_code && line.starts_with('#')
    });
    let anchor = |heading: &str| {
        let heading = heading.trim_start_matches('#').trim().to_lowercase();
        // Links in a heading count with their text only.
        let mut parts = heading.split("](");
        let mut text = parts.next().unwrap_or_default().to_owned();
        parts.for_each(|part| text.push_str(part.split_once(')').map_or(part, |(_, rest)| rest)));
        let kept = text.chars().filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn markdown_links_resolve() {
    let (mut broken, mut checked) = (Vec::new(), 0);
    for page in files(&root(), "md") {
        let text = fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            // A target may be wrapped over lines by the text around it, but never contains spaces.
            if link.contains("://") || link.starts_with("mailto:") || link.contains(' ') {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if path.is_empty() { page.clone() } else { page.parent().unwrap().join(path) };
            checked += 1;
            let is_anchor = || {
                target.extension().is_none_or(|e| e != "md")
                    || anchors(&fs::read_to_string(&target).unwrap()).contains(anchor)
            };
            if !target.exists() || (!anchor.is_empty() && !is_anchor()) {
                broken.push(format!("{}: {link}", page.strip_prefix(root()).unwrap().display()));
            }
        }
    }
    assert!(checked > 50, "{checked} links");
    assert!(broken.is_empty(), "{broken:#?}");
}

/// The release workflow compares the tag with the first of these.
#[test]
fn version_is_the_same_everywhere() {
    let version = env!("CARGO_PKG_VERSION");
    let read = |name: &str| fs::read_to_string(root().join(name)).unwrap();
    assert!(read("Cargo.toml").contains(&format!("\nversion = \"{version}\"\n")));
    assert!(read("CITATION.cff").contains(&format!("\nversion: {version}\n")));
    let changelog = read("CHANGELOG.md");
    let section = changelog.lines().find_map(|line| line.strip_prefix("## ")).unwrap();
    assert!(section.starts_with(version), "the changelog begins with {section}");
    assert!(read("README.md").contains(&format!("version-{version}-")));
}
