//! Shards: an error, or images that can be requested. The first byte selects tar or Parquet.
#![no_main]

use byol::data::Dataset;

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
    let extension = ["tar", "parquet"][usize::from(*format) % 2];
    let path = std::env::temp_dir().join(format!("byol-fuzz-shard-{}.{extension}", std::process::id()));
    std::fs::write(&path, bytes).expect("the temporary folder is writable");
    if let Ok(dataset) = Dataset::open(&path) {
        assert!(!dataset.train.is_empty());
        for i in 0..dataset.train.len().min(8) {
            let _ = dataset.train.get(i);
        }
    }
});
