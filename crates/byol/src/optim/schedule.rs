//! Learning rate η and target decay τ as functions of the step k, from 0. Source: deepmind-research
//! `byol/utils/schedules.py`.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

/// The schedules of η and τ.
///
/// # Examples
///
/// ```
/// use byol::optim::Schedule;
///
/// // Batch 512 and base rate 0.2: peak 0.4 after 10 of 100 steps.
/// let schedule = Schedule { peak: 0.4, warmup: 10, total: 100, tau_base: 0.996, constant_tau: false };
/// assert_eq!([schedule.eta(0), schedule.eta(5), schedule.eta(10)], [0.0, 0.2, 0.4]);
/// assert_eq!(schedule.tau(0), 0.996);
/// assert_eq!(schedule.tau(100), 1.0);
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Schedule {
    /// Peak learning rate, at the end of the warmup: base rate × batch / 256.
    pub peak: f64,
    /// Steps of linear warmup from 0; less than `total`.
    pub warmup: u64,
    /// K: total number of steps.
    pub total: u64,
    /// τ at step 0.
    pub tau_base: f64,
    /// Keep τ at `tau_base`; otherwise it increases to 1 along half a cosine.
    #[serde(default, alias = "tau_stays")]
    pub constant_tau: bool,
}

impl Schedule {
    /// Half a cosine down from `peak`, without warmup: the schedule of the evaluations.
    pub fn cosine(peak: f64, total: u64) -> Schedule {
        Schedule { peak, warmup: 0, total, tau_base: 1.0, constant_tau: true }
    }

    /// Learning rate: linear from 0 to the peak, then half a cosine down to 0 at K. The first
    /// update has η = 0.
    pub fn eta(&self, k: u64) -> f64 {
        if k < self.warmup {
            self.peak * k as f64 / self.warmup as f64
        } else {
            self.peak * half_cosine(k - self.warmup, self.total.saturating_sub(self.warmup))
        }
    }

    /// Target decay: 1 − (1 − τ_base)·(1 + cos(π k / K)) / 2, or the constant τ_base.
    pub fn tau(&self, k: u64) -> f64 {
        if self.constant_tau {
            return self.tau_base;
        }
        1.0 - (1.0 - self.tau_base) * half_cosine(k, self.total)
    }
}

/// Half a cosine from 1 at k = 0 to 0 at k ≥ span. With a span of 0 it is 0.
fn half_cosine(k: u64, span: u64) -> f64 {
    if k >= span { 0.0 } else { 0.5 * (1.0 + (PI * k as f64 / span as f64).cos()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warmup_of_all_steps_is_finite() {
        let s = Schedule { peak: 1.0, warmup: 10, total: 10, tau_base: 0.9, constant_tau: false };
        assert!((0..20).all(|k| s.eta(k).is_finite() && s.tau(k).is_finite()));
    }

    #[test]
    fn reads_plans_of_earlier_versions() {
        let text = "peak = 1.0\nwarmup = 1\ntotal = 10\ntau_base = 0.9\ntau_stays = true\n";
        assert!(toml::from_str::<Schedule>(text).unwrap().constant_tau);
    }
}
