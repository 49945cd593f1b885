//! What the processor could do at most: the yardstick of a benchmark.

use std::{hint::black_box, time::Instant};

use rayon::prelude::*;

use crate::{isa::Isa, tile::CHAINS};

/// At most, with all threads of the pool.
#[derive(Debug, Clone, Copy)]
pub struct Peak {
    /// f32 multiply-adds by this instruction set, two operations each, in 10⁹ a second.
    pub gflops: f64,
    /// Bytes read and written by copies larger than any cache, in 10⁹ a second.
    pub gigabytes: f64,
}

/// The best of some tries, in seconds.
fn best(tries: usize, work: impl Fn()) -> f64 {
    let once = |_| {
        let began = Instant::now();
        work();
        began.elapsed().as_secs_f64()
    };
    (0..tries).map(once).fold(f64::INFINITY, f64::min)
}

/// Measures for about half a second.
pub fn measure(isa: &Isa) -> Peak {
    const STEPS: usize = 5_000_000;
    const VALUES: usize = 1 << 25;
    let threads = rayon::current_num_threads();
    let seconds = best(5, || {
        (0..threads).into_par_iter().for_each(|_| {
            // SAFETY: an instruction set in the table is one of this processor.
            black_box(unsafe { (isa.fma_chains)(black_box(STEPS), black_box(0.999)) });
        });
    });
    let operations = (2 * threads * STEPS * CHAINS * isa.lanes) as f64;
    let from = vec![1.0f32; VALUES];
    let mut to = vec![0.0f32; VALUES];
    let cell = std::sync::Mutex::new(&mut to);
    let copied = best(5, || {
        let mut to = cell.lock().expect("nobody panics in a copy");
        let part = VALUES.div_ceil(threads);
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
    });
    Peak { gflops: operations / seconds / 1e9, gigabytes: (2 * 4 * VALUES) as f64 / copied / 1e9 }
}
