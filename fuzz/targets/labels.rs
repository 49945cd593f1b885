//! `labels.csv`: an error, or a valid class for every image.
#![no_main]

use std::path::Path;

use byol::data::labels_csv::parse;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    // Every path in the file resolves to one that exists.
    let resolve = |_: &Path| std::env::current_exe().expect("this program has a path");
    if let Ok(data) = parse(Path::new("."), Path::new("labels.csv"), bytes, resolve) {
        let n = data.classes.len();
        if let Some(labels) = data.train.labels() {
            assert!(labels.iter().all(|l| *l < n));
        }
        if let Some(tags) = data.train.tags() {
            assert!(tags.iter().flatten().all(|t| *t < n));
        }
    }
});
