//! Recipe files, and the complete ones that a run stores.
#![no_main]

use byol::train::recipe::{Draft, Recipe, parse_complete};

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(recipe) = Draft::from_text("fuzz", text).and_then(|draft| draft.over(&Recipe::default())) {
        assert_eq!(parse_complete(&recipe.to_toml()).as_ref(), Ok(&recipe));
    }
    let _ = parse_complete(text);
});
