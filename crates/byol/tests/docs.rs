//! The reference pages say what the program does.

use byol::train::recipe::{Recipe, known_keys};

#[test]
fn the_recipe_page_lists_every_key_with_its_default() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/recipe.md");
    let page = std::fs::read_to_string(path).unwrap();
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
    let known = known_keys();
    assert_eq!(rows.iter().map(|(k, _)| k).collect::<Vec<_>>().len(), known.len());
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
fn the_environment_page_lists_every_variable() {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let page = std::fs::read_to_string(format!("{root}/docs/reference/environment.md")).unwrap();
    let mut folders =
        vec![format!("{root}/crates/byol/src"), format!("{root}/crates/cli/src"), format!("{root}/crates/kernels/src")];
    let mut found = std::collections::BTreeSet::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().flatten() {
            let path = entry.path();
            if path.is_dir() {
                folders.push(path.to_str().unwrap().to_owned());
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                let names = text.split('"').filter(|word| word.starts_with("BYOL_") && !word.starts_with("BYOL_TEST"));
                let is_name = |word: &&str| word.bytes().all(|b| b.is_ascii_uppercase() || b == b'_');
                found.extend(names.filter(is_name).map(str::to_owned));
            }
        }
    }
    assert!(found.contains("BYOL_ISA"), "{found:?}");
    let missing: Vec<_> = found.iter().filter(|name| !page.contains(&format!("`{name}`"))).collect();
    assert!(missing.is_empty(), "the page lacks {missing:?}");
}
