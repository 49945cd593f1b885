//! The scale of the loss for gradients in f16 (Micikevicius et al. 2018, arXiv:1710.03740, §3.2), moved as PyTorch's `GradScaler` does.

use serde::{Deserialize, Serialize};

/// What the loss is multiplied by while it is differentiated: as large as the range of f16 allows, so that small gradients are not lost.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScale {
    /// A power of two.
    pub factor: f64,
    /// Steps since it last moved.
    pub steady: u64,
}

/// Steps without overflow after which it doubles.
const INTERVAL: u64 = 2000;

impl Default for LossScale {
    fn default() -> Self {
        LossScale { factor: 65_536.0, steady: 0 }
    }
}

impl LossScale {
    /// The scale for the next step, after one whose gradients were all finite, or not.
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
    fn halves_at_an_overflow_and_doubles_after_a_steady_stretch() {
        let mut scale = LossScale::default().after(false);
        assert_eq!(scale, LossScale { factor: 32_768.0, steady: 0 });
        for _ in 0..INTERVAL - 1 {
            scale = scale.after(true);
        }
        assert_eq!(scale.factor, 32_768.0);
        assert_eq!(scale.after(true), LossScale { factor: 65_536.0, steady: 0 });
    }
}
