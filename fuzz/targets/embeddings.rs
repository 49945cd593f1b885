//! Embeddings files: an error, or a path for every row and finite values. The first byte selects
//! the format.
#![no_main]

use byol::apply::embeddings::Embeddings;

/// Installs a hook that aborts on panics, except on those of the Parquet library: the reader
/// catches them and returns an error.
static HOOK: std::sync::Once = std::sync::Once::new();

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    HOOK.call_once(|| {
        let abort = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            if !byol::catch_panic::is_catching() {
                abort(panic);
            }
        }));
    });
    let Some((format, bytes)) = bytes.split_first() else { return };
    let extension = ["parquet", "npy", "csv"][usize::from(*format) % 3];
    let path = std::env::temp_dir().join(format!("byol-fuzz-{}.{extension}", std::process::id()));
    std::fs::write(&path, bytes).expect("the temporary folder is writable");
    // The paths of a .npy file are in a text file beside it. Here: a single path.
    std::fs::write(path.with_extension("paths.txt"), "a.png\n").expect("the temporary folder is writable");
    if let Ok(embeddings) = Embeddings::open(&path) {
        let features = &embeddings.features;
        assert_eq!((embeddings.paths.len(), features.values.len()), (features.n, features.n * features.dim));
        assert!(features.values.iter().all(|v| v.is_finite()));
    }
});
