//! Conversion between f32 and bf16.

use std::mem::MaybeUninit;

use crate::simd::Bf16;

/// Converts each value of `from` into `to`, exactly.
#[inline(always)]
pub(crate) fn widen(from: &[Bf16], to: &mut [MaybeUninit<f32>]) {
    assert_eq!(from.len(), to.len());
    for (to, from) in to.iter_mut().zip(from) {
        to.write(from.to_f32());
    }
}

/// Rounds each value of `from` into `to`.
#[inline(always)]
pub(crate) fn narrow(from: &[f32], to: &mut [MaybeUninit<Bf16>]) {
    assert_eq!(from.len(), to.len());
    for (to, from) in to.iter_mut().zip(from) {
        to.write(Bf16::round(*from));
    }
}

/// Rounds each value of `from` into `to`.
///
/// # Panics
///
/// If the lengths differ.
#[inline(always)]
pub(crate) fn round(from: &[f32], to: &mut [Bf16]) {
    assert_eq!(from.len(), to.len());
    to.iter_mut().zip(from).for_each(|(to, from)| *to = Bf16::round(*from));
}

/// Rounds rows of `width` values and interleaves each two rows: value j of the first row and value
/// j of the second become neighbors. A last row without a partner is paired with zeros.
#[inline(always)]
pub(crate) fn interleave_pairs(from: &[f32], width: usize, to: &mut [Bf16]) {
    for (from, to) in from.chunks(2 * width).zip(to.chunks_exact_mut(2 * width)) {
        let (first, second) = from.split_at(width);
        let to = to.as_chunks_mut::<2>().0;
        if second.is_empty() {
            to.iter_mut().zip(first).for_each(|(to, a)| *to = [Bf16::round(*a), Bf16::default()]);
        } else {
            to.iter_mut()
                .zip(first.iter().zip(second))
                .for_each(|(to, (a, b))| *to = [Bf16::round(*a), Bf16::round(*b)]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn odd_last_row_is_paired_with_zeros() {
        let mut to = [Bf16::round(7.0); 8];
        interleave_pairs(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2, &mut to);
        assert_eq!(to.map(Bf16::to_f32), [1.0, 3.0, 2.0, 4.0, 5.0, 0.0, 6.0, 0.0]);
    }
}
