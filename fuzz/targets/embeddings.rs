//! Files of embeddings: an error, or as many paths as rows, all of them numbers. The first byte says which format.
#![no_main]

use byol::apply::embeddings::Embeddings;

/// A panic of the Parquet library becomes an error; any other is a finding.
static HOOK: std::sync::Once = std::sync::Once::new();

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    HOOK.call_once(|| {
        let abort = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !byol::guarded::is_guarded() {
                abort(panic);
            }
        }));
    });
    let Some((which, bytes)) = bytes.split_first() else { return };
    let ending = ["parquet", "npy", "csv"][usize::from(*which) % 3];
    let path = std::env::temp_dir().join(format!("byol-fuzz-{}.{ending}", std::process::id()));
    std::fs::write(&path, bytes).expect("there is room for a small file");
    // A .npy wants its paths beside it: one.
    std::fs::write(path.with_extension("paths.txt"), "a.png\n").expect("there is room for a small file");
    if let Ok(found) = Embeddings::open(&path) {
        assert_eq!((found.paths.len(), found.features.values.len()), (found.features.n, found.features.n * found.features.dim));
        assert!(found.features.values.iter().all(|v| v.is_finite()));
    }
});
