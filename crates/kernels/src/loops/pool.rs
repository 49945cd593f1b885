//! The loops of max pooling.

use std::mem::MaybeUninit;

/// Shape of a pooling over maps `[n, h, w, c]`; the output is `[n, h_out, w_out, c]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PoolShape {
    /// Number of images.
    pub n: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Channels.
    pub c: usize,
    /// Side of a window, in pixels.
    pub kernel: usize,
    /// Distance between windows, in pixels.
    pub stride: usize,
    /// Pixels on every side that lie outside the map and are never the maximum; less than `kernel`.
    pub padding: usize,
}

impl PoolShape {
    /// Rows of the output.
    pub fn h_out(&self) -> usize {
        (self.h + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Columns of the output.
    pub fn w_out(&self) -> usize {
        (self.w + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Pixels of the window at `index` that lie on the map, along one side of `length` pixels.
    #[inline(always)]
    fn window(&self, index: usize, length: usize) -> std::ops::Range<usize> {
        let first = index * self.stride;
        first.saturating_sub(self.padding)..(first + self.kernel - self.padding).min(length)
    }
}

/// Writes row `y` of the output of image `x` to every value of `out`. Every window must have a
/// pixel.
#[inline(always)]
pub(crate) fn max_row<T: Copy + PartialOrd>(s: &PoolShape, x: &[T], y: usize, out: &mut [MaybeUninit<T>]) {
    let row_len = s.w * s.c;
    for (i, out) in out.chunks_exact_mut(s.c).enumerate() {
        for (j, row) in s.window(y, s.h).enumerate() {
            for (k, col) in s.window(i, s.w).enumerate() {
                let x = &x[row * row_len + col * s.c..][..s.c];
                if (j, k) == (0, 0) {
                    out.write_copy_of_slice(x);
                } else {
                    for (o, x) in out.iter_mut().zip(x) {
                        // SAFETY: the window's first pixel has initialized it.
                        let max = unsafe { o.assume_init() };
                        // The comparison is false for a NaN, so a NaN replaces the maximum; a later
                        // value replaces the NaN.
                        o.write(if *x <= max { max } else { *x });
                    }
                }
            }
        }
    }
}

/// Adds the gradient of one image to `dx`, given its output and the output's gradient. A window's
/// gradient goes to the first pixel that holds its maximum.
#[inline(always)]
pub(crate) fn max_backward<T: Copy + PartialEq>(s: &PoolShape, x: &[T], out: &[T], dout: &[f32], dx: &mut [f32]) {
    let row_len = s.w * s.c;
    let mut remaining = vec![0.0f32; s.c];
    for (i, (out, dout)) in out.chunks_exact(s.c).zip(dout.chunks_exact(s.c)).enumerate() {
        remaining.copy_from_slice(dout);
        for row in s.window(i / s.w_out(), s.h) {
            for col in s.window(i % s.w_out(), s.w) {
                let at = row * row_len + col * s.c;
                let pixel = dx[at..at + s.c].iter_mut().zip(&x[at..at + s.c]);
                for (((dx, x), out), remaining) in pixel.zip(out).zip(remaining.iter_mut()) {
                    // The first pixel that equals the maximum takes the gradient and leaves 0 for
                    // the others: no branch, no index per window.
                    let taken = if x == out { *remaining } else { 0.0 };
                    *dx += taken;
                    *remaining -= taken;
                }
            }
        }
    }
}
