//! Shards: an error, or images that can be asked for. The first byte says whether it is a tar or a Parquet file.
#![no_main]

use byol::data::Dataset;

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
    let ending = ["tar", "parquet"][usize::from(*which) % 2];
    let path = std::env::temp_dir().join(format!("byol-fuzz-shard-{}.{ending}", std::process::id()));
    std::fs::write(&path, bytes).expect("there is room for a small file");
    if let Ok(found) = Dataset::open(&path) {
        assert!(!found.train.is_empty());
        for i in 0..found.train.len().min(8) {
            let _ = found.train.get(i);
        }
    }
});
