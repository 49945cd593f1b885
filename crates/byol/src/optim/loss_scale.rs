//! Dynamic loss scale for gradients in f16 (Micikevicius et al. 2018, arXiv:1710.03740, §3.2), with
//! the schedule of PyTorch's `GradScaler`.

use serde::{Deserialize, Serialize};

/// Factor on the loss during the backward pass: as large as the range of f16 allows, so that small
/// gradients do not underflow.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    /// A power of two.
    pub factor: f64,
    /// Steps since the factor last changed.
    pub steady: u64,
}

/// Steps without overflow after which the factor doubles.
const INTERVAL: u64 = 2000;

impl Default for LossScale {
    fn default() -> Self {
        LossScale { factor: 65_536.0, steady: 0 }
    }
}

impl LossScale {
    /// Returns the scale for the next step. `finite`: all gradients of this step were finite.
    pub fn after(self, finite: bool) -> LossScale {
        match finite {
            false => LossScale { factor: (self.factor / 2.0).max(f64::MIN_POSITIVE), steady: 0 },
            true if self.steady + 1 == INTERVAL => LossScale { factor: self.factor * 2.0, steady: 0 },
            true => LossScale { steady: self.steady + 1, ..self },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_on_overflow_and_doubles_after_an_interval_without() {
        let mut scale = LossScale::default().after(false);
        assert_eq!(scale, LossScale { factor: 32_768.0, steady: 0 });
        for _ in 0..INTERVAL - 1 {
            scale = scale.after(true);
        }
        assert_eq!(scale.factor, 32_768.0);
        assert_eq!(scale.after(true), LossScale { factor: 65_536.0, steady: 0 });
    }
}
