//! Max pooling and global average pooling, channels last, forward and backward.

use rayon::prelude::*;

pub use crate::loops::pool::PoolShape;
use crate::{
    isa::Isa,
    memory::{assume_init_vec, uninit_vec},
    storage::Storage,
};

/// Number of values in an image and in its output.
fn image_lengths(s: &PoolShape) -> [usize; 2] {
    [s.h * s.w * s.c, s.h_out() * s.w_out() * s.c]
}

/// Panics unless `s` is a valid shape for an input of `x_len` values.
fn check(s: &PoolShape, x_len: usize) {
    // A map without pixels would have windows without pixels, and their outputs stay unwritten.
    assert!(s.h > 0 && s.w > 0, "{s:?}");
    assert!(s.padding < s.kernel && s.stride > 0 && s.c > 0, "{s:?}");
    assert!(s.kernel <= s.h.min(s.w) + 2 * s.padding, "{s:?}");
    assert_eq!(x_len, s.n * image_lengths(s)[0], "{s:?}");
}

/// Computes the maximum of each window: `[n, h, w, c]` → `[n, h_out, w_out, c]`.
///
/// # Panics
///
/// If the length of `x` does not match `s`.
pub fn max<T: Storage>(isa: &Isa, s: &PoolShape, x: &[T]) -> Vec<T> {
    check(s, x.len());
    let [image, image_out] = image_lengths(s);
    let row_out = s.w_out() * s.c;
    let mut out = uninit_vec(s.n * image_out);
    out.par_chunks_mut(row_out).enumerate().for_each(|(i, out)| {
        let (n, y) = (i / s.h_out(), i % s.h_out());
        // SAFETY: an `Isa` exists only for an instruction set of this processor.
        unsafe { (T::loops(isa).max_pool_row)(s, &x[n * image..(n + 1) * image], y, out) };
    });
    // SAFETY: every row has been written as a whole.
    unsafe { assume_init_vec(out) }
}

/// Computes dx of [`max`] from dout. The gradient of a window goes to the first pixel that holds
/// its maximum. `out` is the output of [`max`] for `x`.
///
/// # Panics
///
/// If the length of a slice does not match `s`.
pub fn max_backward<T: Storage>(isa: &Isa, s: &PoolShape, x: &[T], out: &[T], dout: &[T]) -> Vec<T> {
    check(s, x.len());
    let [image, image_out] = image_lengths(s);
    assert_eq!([out.len(), dout.len()], [s.n * image_out; 2], "{s:?}");
    let mut dx = uninit_vec(x.len());
    let images = dx.par_chunks_mut(image).zip(x.par_chunks(image));
    let images = images.zip(out.par_chunks(image_out).zip(dout.par_chunks(image_out)));
    images.for_each_init(
        || (Vec::new(), Vec::new()),
        |(sums, buffer), ((dx, x), (out, dout))| {
            // Windows overlap: their gradients are added in f32.
            sums.clear();
            sums.resize(image, 0.0);
            let dout = T::load(isa, dout, buffer);
            // SAFETY: an `Isa` exists only for an instruction set of this processor.
            unsafe { (T::loops(isa).max_pool_backward)(s, x, out, dout, sums) };
            T::narrow(isa, sums, dx);
        },
    );
    // SAFETY: every image has been written as a whole.
    unsafe { assume_init_vec(dx) }
}

/// Computes the mean of each channel over the pixels of each of `n` maps: `[n, pixels, c]` →
/// `[n, c]`.
///
/// # Panics
///
/// If `x` is not `n` maps of whole pixels.
pub fn mean<T: Storage>(isa: &Isa, x: &[T], n: usize, c: usize) -> Vec<f32> {
    let image = x.len() / n.max(1);
    assert!(
        n * image == x.len() && c > 0 && image.is_multiple_of(c),
        "{} values are not {n} maps of {c} channels",
        x.len()
    );
    let mut out = vec![0.0f32; n * c];
    out.par_chunks_mut(c).zip(x.par_chunks(image.max(1))).for_each(|(out, x)| {
        let mut buffer = Vec::new();
        for pixel in T::load(isa, x, &mut buffer).chunks_exact(c) {
            out.iter_mut().zip(pixel).for_each(|(o, v)| *o += v);
        }
        out.iter_mut().for_each(|o| *o /= (image / c) as f32);
    });
    out
}

/// Computes dx of [`mean`], `[n, pixels, c]`, from dout, `[n, c]`.
///
/// # Panics
///
/// If `dout` is not whole pixels.
pub fn mean_backward<T: Storage>(isa: &Isa, dout: &[f32], pixels: usize, c: usize) -> Vec<T> {
    assert!(c > 0 && dout.len().is_multiple_of(c), "{} values are not pixels of {c} channels", dout.len());
    let mut dx = uninit_vec(dout.len() * pixels);
    dx.par_chunks_mut((pixels * c).max(1)).zip(dout.par_chunks(c)).for_each(|(dx, dout)| {
        let shared: Vec<f32> = dout.iter().map(|v| v / pixels as f32).collect();
        dx.chunks_exact_mut(c).for_each(|pixel| T::narrow(isa, &shared, pixel));
    });
    // SAFETY: every image has been written as a whole.
    unsafe { assume_init_vec(dx) }
}
