//! Recipe files, and the complete recipes stored in run folders.
#![no_main]

use byol::train::recipe::{Recipe, RecipeOverrides, parse_complete};

libfuzzer_sys::fuzz_target!(|text: &str| {
    if let Ok(recipe) = RecipeOverrides::from_text("fuzz", text).and_then(|overrides| overrides.apply_to(&Recipe::default())) {
        assert_eq!(parse_complete(&recipe.to_toml()).as_ref(), Ok(&recipe));
    }
    let _ = parse_complete(text);
});
