//! η and τ as pure functions of the step k, counted from 0. Source: deepmind-research `byol/utils/schedules.py`.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// The two schedules of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// η at the end of the warm-up: base rate × batch / 256.
    pub peak: f64,
    /// Steps of linear warm-up from 0; fewer than `total`.
    pub warmup: u64,
    /// K: all steps.
    pub total: u64,
    /// τ at step 0.
    pub tau_base: f64,
    /// Whether τ stays there; else it rises to 1 on half a cosine.
    #[serde(default)]
    pub tau_stays: bool,
}

impl Schedule {
    /// Half a cosine down from `peak`, without warm-up or target: what the evaluations train with.
    pub fn cosine(peak: f64, total: u64) -> Schedule {
        Schedule { peak, warmup: 0, total, tau_base: 1.0, tau_stays: true }
    }

    /// Learning rate: k/warmup of the peak, then half a cosine down to 0 at K. So the very first update has η = 0.
    pub fn eta(&self, k: u64) -> f64 {
        if k < self.warmup {
            self.peak * k as f64 / self.warmup as f64
        } else {
            self.peak * half_cosine(k - self.warmup, self.total.saturating_sub(self.warmup))
        }
    }

    /// Target decay: 1 − (1 − τ_base)·(1 + cos(π k / K)) / 2, or τ_base throughout.
    pub fn tau(&self, k: u64) -> f64 {
        if self.tau_stays {
            return self.tau_base;
        }
        1.0 - (1.0 - self.tau_base) * half_cosine(k, self.total)
    }
}

/// 1 at k = 0, 0 from k = span on. A span of 0 has no room for a fall: 0 throughout.
fn half_cosine(k: u64, span: u64) -> f64 {
    if k >= span { 0.0 } else { 0.5 * (1.0 + (PI * k as f64 / span as f64).cos()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warmup_of_all_steps_divides_by_nothing() {
        let s = Schedule { peak: 1.0, warmup: 10, total: 10, tau_base: 0.9, tau_stays: false };
        assert!((0..20).all(|k| s.eta(k).is_finite() && s.tau(k).is_finite()));
    }
}
