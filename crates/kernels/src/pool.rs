//! Pooling, channels last: the largest value of each window, and the mean of a map; forward and backward.

use std::mem::MaybeUninit;

use rayon::prelude::*;

use crate::{
    isa::Isa,
    memory::{unwritten, written},
};

/// Windows over maps `[n, h, w, c]`; the result is `[n, h_out, w_out, c]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Images.
    pub n: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Channels.
    pub c: usize,
    /// Side of a window.
    pub kernel: usize,
    /// From one window to the next.
    pub stride: usize,
    /// Pixels on every side that are not there and never the largest; less than `kernel`.
    pub padding: usize,
}

impl Windows {
    /// Rows of the result.
    pub fn h_out(&self) -> usize {
        (self.h + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Columns of the result.
    pub fn w_out(&self) -> usize {
        (self.w + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Values of an image, and of its result.
    fn image(&self) -> [usize; 2] {
        [self.h * self.w * self.c, self.h_out() * self.w_out() * self.c]
    }

    fn check(&self, x: usize) {
        // A map without a pixel has windows without one, of which nothing would be written.
        assert!(self.h > 0 && self.w > 0, "{self:?}");
        assert!(self.padding < self.kernel && self.stride > 0 && self.c > 0, "{self:?}");
        assert!(self.kernel <= self.h.min(self.w) + 2 * self.padding, "{self:?}");
        assert_eq!(x, self.n * self.image()[0], "{self:?}");
    }

    /// The part of a window that is on the map, along one side of `length` pixels.
    #[inline(always)]
    fn reach(&self, at: usize, length: usize) -> std::ops::Range<usize> {
        let first = at * self.stride;
        first.saturating_sub(self.padding)..(first + self.kernel - self.padding).min(length)
    }
}

/// The largest value of each window.
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn max(isa: &Isa, s: &Windows, x: &[f32]) -> Vec<f32> {
    s.check(x.len());
    let [image, of_out] = s.image();
    let row = s.w_out() * s.c;
    let mut out = unwritten(s.n * of_out);
    out.par_chunks_mut(row).enumerate().for_each(|(i, out)| {
        let (n, y) = (i / s.h_out(), i % s.h_out());
        // SAFETY: the processor has this instruction set, or it would not be in the table.
        unsafe { (isa.max_row)(s, &x[n * image..(n + 1) * image], y, out) };
    });
    // SAFETY: each row is written whole.
    unsafe { written(out) }
}

/// One row of the result. Writes every value of `out`.
#[inline(always)]
pub(crate) fn max_row(s: &Windows, x: &[f32], y: usize, out: &mut [MaybeUninit<f32>]) {
    let line = s.w * s.c;
    for (i, out) in out.chunks_exact_mut(s.c).enumerate() {
        for (j, row) in s.reach(y, s.h).enumerate() {
            for (k, col) in s.reach(i, s.w).enumerate() {
                let x = &x[row * line + col * s.c..][..s.c];
                if (j, k) == (0, 0) {
                    out.write_copy_of_slice(x);
                } else {
                    for (o, x) in out.iter_mut().zip(x) {
                        // SAFETY: the window's first pixel has been written.
                        let most = unsafe { o.assume_init() };
                        // A NaN stays.
                        o.write(if *x <= most { most } else { *x });
                    }
                }
            }
        }
    }
}

/// dx from dout: each value's gradient goes to the first pixel of its window that has it. `out` is what [`max`] made of `x`.
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn max_backward(isa: &Isa, s: &Windows, x: &[f32], out: &[f32], dout: &[f32]) -> Vec<f32> {
    s.check(x.len());
    let [image, of_out] = s.image();
    assert_eq!([out.len(), dout.len()], [s.n * of_out; 2], "{s:?}");
    let mut dx = vec![0.0f32; x.len()];
    let images = dx.par_chunks_mut(image).zip(x.par_chunks(image));
    images.zip(out.par_chunks(of_out).zip(dout.par_chunks(of_out))).for_each(|((dx, x), (out, dout))| {
        // SAFETY: the processor has this instruction set, or it would not be in the table.
        unsafe { (isa.max_backward)(s, x, [out, dout], dx) };
    });
    dx
}

/// One image. Adds to `dx`.
#[inline(always)]
pub(crate) fn max_backward_loop(s: &Windows, x: &[f32], [out, dout]: [&[f32]; 2], dx: &mut [f32]) {
    let line = s.w * s.c;
    let mut left = vec![0.0f32; s.c];
    for (i, (out, dout)) in out.chunks_exact(s.c).zip(dout.chunks_exact(s.c)).enumerate() {
        left.copy_from_slice(dout);
        for row in s.reach(i / s.w_out(), s.h) {
            for col in s.reach(i % s.w_out(), s.w) {
                let at = row * line + col * s.c;
                let pixel = dx[at..at + s.c].iter_mut().zip(&x[at..at + s.c]);
                for (((dx, x), out), left) in pixel.zip(out).zip(left.iter_mut()) {
                    // Who has the value takes all that is left; nothing is left for the next.
                    let taken = if x == out { *left } else { 0.0 };
                    *dx += taken;
                    *left -= taken;
                }
            }
        }
    }
}

/// The mean of each channel over the pixels of each of `n` maps: `[n, pixels, c]` → `[n, c]`.
///
/// # Panics
/// If `x` is not `n` maps of whole pixels.
pub fn mean(x: &[f32], n: usize, c: usize) -> Vec<f32> {
    let image = x.len() / n.max(1);
    assert!(
        n * image == x.len() && c > 0 && image.is_multiple_of(c),
        "{n} maps of {c} channels are not {} values",
        x.len()
    );
    let mut out = vec![0.0f32; n * c];
    out.par_chunks_mut(c).zip(x.par_chunks(image.max(1))).for_each(|(out, x)| {
        for pixel in x.chunks_exact(c) {
            out.iter_mut().zip(pixel).for_each(|(o, v)| *o += v);
        }
        out.iter_mut().for_each(|o| *o /= (image / c) as f32);
    });
    out
}

/// dx of [`mean`] from dout `[n, c]`.
///
/// # Panics
/// If `dout` is not whole pixels.
pub fn mean_backward(dout: &[f32], pixels: usize, c: usize) -> Vec<f32> {
    assert!(c > 0 && dout.len().is_multiple_of(c), "{} values are not pixels of {c} channels", dout.len());
    let mut dx = unwritten(dout.len() * pixels);
    dx.par_chunks_mut((pixels * c).max(1)).zip(dout.par_chunks(c)).for_each(|(dx, dout)| {
        for pixel in dx.chunks_exact_mut(c) {
            for (d, v) in pixel.iter_mut().zip(dout) {
                d.write(v / pixels as f32);
            }
        }
    });
    // SAFETY: each image is written whole.
    unsafe { written(dx) }
}
