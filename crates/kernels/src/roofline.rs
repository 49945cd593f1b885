//! Peak arithmetic and memory throughput of the processor, as the yardstick of a benchmark.

use std::{hint::black_box, time::Instant};

use rayon::prelude::*;

use crate::{isa::Isa, loops::roofline::CHAINS};

/// Peak throughput with all threads of the pool.
#[derive(Debug, Clone, Copy)]
pub struct Roofline {
    /// f32 operations of this instruction set, in 10⁹ per second; a multiply-add counts as two.
    pub gflops: f64,
    /// Bytes read and written by copies larger than any cache, in 10⁹ per second.
    pub gb_per_second: f64,
}

/// Returns the shortest of some runs, in seconds.
fn best_of(runs: usize, work: impl Fn()) -> f64 {
    let run = |_| {
        let start = Instant::now();
        work();
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(run).fold(f64::INFINITY, f64::min)
}

/// Measures the peak throughput, for about half a second.
pub fn measure(isa: &Isa) -> Roofline {
    const STEPS: usize = 5_000_000;
    const VALUES: usize = 1 << 25;
    let threads = rayon::current_num_threads();
    let arithmetic = best_of(5, || {
        (0..threads).into_par_iter().for_each(|_| {
            // SAFETY: an `Isa` exists only for an instruction set of this processor.
            black_box(unsafe { (isa.fma_chains)(black_box(STEPS), black_box(0.999)) });
        });
    });
    let operations = (2 * threads * STEPS * CHAINS * isa.lanes) as f64;
    let from = vec![1.0f32; VALUES];
    let mut to = vec![0.0f32; VALUES];
    let cell = std::sync::Mutex::new(&mut to);
    let copy = best_of(5, || {
        let mut to = cell.lock().expect("copies do not panic");
        let part = VALUES.div_ceil(threads);
        to.par_chunks_mut(part).zip(from.par_chunks(part)).for_each(|(to, from)| to.copy_from_slice(from));
    });
    Roofline { gflops: operations / arithmetic / 1e9, gb_per_second: (2 * 4 * VALUES) as f64 / copy / 1e9 }
}
