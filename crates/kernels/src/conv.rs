//! Convolution as a matrix product: the input pixels that one output pixel reads are laid out as a row (`im2col`), tile by tile, so that
//! a tile stays in cache. A 1×1 convolution of stride 1 needs no layout at all.
//!
//! Threads share out groups of images. A group is fixed by the shape, so the order of sums is too.

use rayon::prelude::*;

use crate::matrix::{Matrix, multiply};

/// Shapes of one convolution. Input `[n, h, w, c_in]`, weight `[c_out, c_in, kernel, kernel]`, output `[n, h_out, w_out, c_out]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Images.
    pub n: usize,
    /// Rows.
    pub h: usize,
    /// Columns.
    pub w: usize,
    /// Input channels.
    pub c_in: usize,
    /// Output channels.
    pub c_out: usize,
    /// Side of the kernel.
    pub kernel: usize,
    /// Step in both directions.
    pub stride: usize,
    /// Zeros on every side.
    pub padding: usize,
}

/// Values of a tile's layout: 1 MiB / 4, the second-level cache of one core.
const TILE_VALUES: usize = 1 << 16;

/// Output pixels that a thread takes at least, so that the matrix product has rows to work on.
const GROUP_PIXELS: usize = 512;

/// Partial sums of a weight gradient, in values, over all groups.
const PARTIAL_VALUES: usize = 1 << 24;

impl Shape {
    /// Rows of the output.
    pub fn h_out(&self) -> usize {
        (self.h + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Columns of the output.
    pub fn w_out(&self) -> usize {
        (self.w + 2 * self.padding - self.kernel) / self.stride + 1
    }

    /// Values of the input, the weight and the output.
    pub fn lengths(&self) -> [usize; 3] {
        let pixels_out = self.n * self.h_out() * self.w_out();
        [self.n * self.h * self.w * self.c_in, self.c_out * self.patch(), pixels_out * self.c_out]
    }

    /// Values that one output pixel reads.
    fn patch(&self) -> usize {
        self.kernel * self.kernel * self.c_in
    }

    fn is_pointwise(&self) -> bool {
        self.kernel == 1 && self.stride == 1 && self.padding == 0
    }

    /// Images a task.
    fn group(&self) -> usize {
        GROUP_PIXELS.div_ceil(self.h_out() * self.w_out()).clamp(1, self.n.max(1))
    }

    /// Output rows a tile.
    fn tile_rows(&self) -> usize {
        (TILE_VALUES / (self.w_out() * self.patch()).max(1)).max(1)
    }

    fn check(&self, x: &[f32], w: &[f32]) {
        assert!(self.h + 2 * self.padding >= self.kernel && self.w + 2 * self.padding >= self.kernel, "{self:?}");
        let [of_x, of_w, _] = self.lengths();
        assert_eq!((x.len(), w.len()), (of_x, of_w), "{self:?}");
    }
}

/// `[c_out, c_in, k, k]` → `[k, k, c_in, c_out]`: the matrix that a layout row is multiplied by.
fn pack(s: &Shape, w: &[f32]) -> Vec<f32> {
    let kk = s.kernel * s.kernel;
    let mut packed = vec![0.0; w.len()];
    for (o, of_output) in w.chunks_exact(s.patch()).enumerate() {
        for (c, of_input) in of_output.chunks_exact(kk).enumerate() {
            for (t, v) in of_input.iter().enumerate() {
                packed[(t * s.c_in + c) * s.c_out + o] = *v;
            }
        }
    }
    packed
}

/// The inverse of [`pack`].
fn unpack(s: &Shape, packed: &[f32]) -> Vec<f32> {
    let kk = s.kernel * s.kernel;
    let mut w = vec![0.0; packed.len()];
    for (o, of_output) in w.chunks_exact_mut(s.patch()).enumerate() {
        for (c, of_input) in of_output.chunks_exact_mut(kk).enumerate() {
            for (t, v) in of_input.iter_mut().enumerate() {
                *v = packed[(t * s.c_in + c) * s.c_out + o];
            }
        }
    }
    w
}

/// The runs of kernel columns that lie in the image for output column `ox`: (first kernel column, how many, first input column).
fn run(s: &Shape, ox: usize) -> (usize, usize, usize) {
    let left = ox * s.stride;
    let first = s.padding.saturating_sub(left);
    let end = (s.w + s.padding).saturating_sub(left).min(s.kernel);
    (first, end.saturating_sub(first), (left + first).saturating_sub(s.padding))
}

/// The input row that kernel row `ky` of output row `oy` reads, where it lies in the image.
fn input_row(s: &Shape, oy: usize, ky: usize) -> Option<usize> {
    (oy * s.stride + ky).checked_sub(s.padding).filter(|y| *y < s.h)
}

/// Lays out output rows `rows` of one image: `[rows, w_out, k, k, c_in]`.
fn im2col(s: &Shape, image: &[f32], rows: std::ops::Range<usize>, out: &mut [f32]) {
    let (row, c) = (s.w_out() * s.patch(), s.c_in);
    for (oy, out) in rows.zip(out.chunks_exact_mut(row)) {
        for (ox, pixel) in out.chunks_exact_mut(s.patch()).enumerate() {
            let (first, n, x) = run(s, ox);
            for (ky, line) in pixel.chunks_exact_mut(s.kernel * c).enumerate() {
                match input_row(s, oy, ky) {
                    Some(y) if n > 0 => {
                        line[..first * c].fill(0.0);
                        line[first * c..(first + n) * c].copy_from_slice(&image[(y * s.w + x) * c..][..n * c]);
                        line[(first + n) * c..].fill(0.0);
                    }
                    _ => line.fill(0.0),
                }
            }
        }
    }
}

/// Adds a layout's values back to the pixels they came from: the adjoint of [`im2col`].
fn col2im(s: &Shape, columns: &[f32], rows: std::ops::Range<usize>, image: &mut [f32]) {
    let (row, c) = (s.w_out() * s.patch(), s.c_in);
    for (oy, columns) in rows.zip(columns.chunks_exact(row)) {
        for (ox, pixel) in columns.chunks_exact(s.patch()).enumerate() {
            let (first, n, x) = run(s, ox);
            for (ky, line) in pixel.chunks_exact(s.kernel * c).enumerate() {
                if let Some(y) = input_row(s, oy, ky).filter(|_| n > 0) {
                    let to = &mut image[(y * s.w + x) * c..][..n * c];
                    for (t, v) in to.iter_mut().zip(&line[first * c..(first + n) * c]) {
                        *t += v;
                    }
                }
            }
        }
    }
}

/// Tiles of output rows of an image.
fn tiles(s: &Shape) -> impl Iterator<Item = std::ops::Range<usize>> {
    let (h_out, step) = (s.h_out(), s.tile_rows());
    (0..h_out).step_by(step).map(move |y| y..(y + step).min(h_out))
}

/// Whether a tile is a whole image or less: then several images share one layout, and small maps still give tall matrices.
fn images_a_layout(s: &Shape) -> usize {
    if s.tile_rows() >= s.h_out() { (s.tile_rows() / s.h_out()).max(1) } else { 1 }
}

/// y = conv(x, w).
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn forward(s: &Shape, x: &[f32], w: &[f32]) -> Vec<f32> {
    s.check(x, w);
    let weights = pack(s, w);
    let weights = Matrix::new(&weights, s.patch(), s.c_out);
    let mut y = vec![0.0; s.lengths()[2]];
    let (image_in, image_out) = (s.h * s.w * s.c_in, s.h_out() * s.w_out() * s.c_out);
    let group = s.group();
    let tasks = y.par_chunks_mut(group * image_out).zip(x.par_chunks(group * image_in));
    tasks.for_each_init(Vec::new, |layout: &mut Vec<f32>, (y, x)| {
        if s.is_pointwise() {
            return multiply(y, Matrix::new(x, x.len() / s.c_in, s.c_in), weights, false);
        }
        for_layouts(s, x, layout, |pixels, columns| {
            let y = &mut y[pixels.start * s.c_out..pixels.end * s.c_out];
            multiply(y, Matrix::new(columns, pixels.len(), s.patch()), weights, false);
        });
    });
    y
}

/// Lays out the images of a group, tile by tile; `f` gets the output pixels of the group that a tile covers, and its layout.
fn for_layouts(s: &Shape, x: &[f32], layout: &mut Vec<f32>, mut f: impl FnMut(std::ops::Range<usize>, &mut [f32])) {
    let (image_in, pixels_out, together) = (s.h * s.w * s.c_in, s.h_out() * s.w_out(), images_a_layout(s));
    for (i, images) in x.chunks(together * image_in).enumerate() {
        let n = images.len() / image_in;
        if n > 1 || s.tile_rows() >= s.h_out() {
            let one = pixels_out * s.patch();
            layout.resize(n * one, 0.0);
            for (image, out) in images.chunks_exact(image_in).zip(layout.chunks_exact_mut(one)) {
                im2col(s, image, 0..s.h_out(), out);
            }
            let first = i * together * pixels_out;
            f(first..first + n * pixels_out, layout);
        } else {
            for rows in tiles(s) {
                let pixels = rows.start * s.w_out()..rows.end * s.w_out();
                layout.resize(pixels.len() * s.patch(), 0.0);
                im2col(s, images, rows, layout);
                f(i * pixels_out + pixels.start..i * pixels_out + pixels.end, layout);
            }
        }
    }
}

/// dx from dy.
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn backward_data(s: &Shape, w: &[f32], dy: &[f32]) -> Vec<f32> {
    let [of_x, of_w, of_y] = s.lengths();
    assert_eq!((w.len(), dy.len()), (of_w, of_y), "{s:?}");
    let weights = pack(s, w);
    let weights = Matrix::new(&weights, s.patch(), s.c_out).transposed();
    let mut dx = vec![0.0; of_x];
    let (image_in, pixels_out) = (s.h * s.w * s.c_in, s.h_out() * s.w_out());
    let (image_out, group) = (pixels_out * s.c_out, s.group());
    let tasks = dx.par_chunks_mut(group * image_in).zip(dy.par_chunks(group * image_out));
    tasks.for_each_init(Vec::new, |columns: &mut Vec<f32>, (dx, dy)| {
        if s.is_pointwise() {
            return multiply(dx, Matrix::new(dy, dy.len() / s.c_out, s.c_out), weights, false);
        }
        let together = images_a_layout(s);
        for (dx, dy) in dx.chunks_mut(together * image_in).zip(dy.chunks(together * image_out)) {
            let n = dx.len() / image_in;
            if n > 1 || s.tile_rows() >= s.h_out() {
                let one = pixels_out * s.patch();
                columns.resize(n * one, 0.0);
                multiply(columns, Matrix::new(dy, n * pixels_out, s.c_out), weights, false);
                for (dx, columns) in dx.chunks_exact_mut(image_in).zip(columns.chunks_exact(one)) {
                    col2im(s, columns, 0..s.h_out(), dx);
                }
            } else {
                for rows in tiles(s) {
                    let pixels = rows.start * s.w_out()..rows.end * s.w_out();
                    columns.resize(pixels.len() * s.patch(), 0.0);
                    let dy = &dy[pixels.start * s.c_out..pixels.end * s.c_out];
                    multiply(columns, Matrix::new(dy, pixels.len(), s.c_out), weights, false);
                    col2im(s, columns, rows, dx);
                }
            }
        }
    });
    dx
}

/// dw from x and dy, in the weight's own layout.
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn backward_weight(s: &Shape, x: &[f32], dy: &[f32]) -> Vec<f32> {
    let [of_x, of_w, of_y] = s.lengths();
    assert_eq!((x.len(), dy.len()), (of_x, of_y), "{s:?}");
    let (image_in, image_out) = (s.h * s.w * s.c_in, s.h_out() * s.w_out() * s.c_out);
    // Enough parts for many threads, few enough for memory; by the shape alone.
    let parts = (PARTIAL_VALUES / of_w.max(1)).clamp(2, 32).min(s.n.div_ceil(s.group()).max(1));
    let group = s.n.div_ceil(parts).max(1);
    let tasks = x.par_chunks((group * image_in).max(1)).zip(dy.par_chunks((group * image_out).max(1)));
    let partial: Vec<Vec<f32>> = tasks
        .map(|(x, dy)| {
            let (mut dw, mut layout) = (vec![0.0; of_w], Vec::new());
            if s.is_pointwise() {
                let pixels = x.len() / s.c_in;
                let columns = Matrix::new(x, pixels, s.c_in).transposed();
                multiply(&mut dw, columns, Matrix::new(dy, pixels, s.c_out), false);
            } else {
                for_layouts(s, x, &mut layout, |pixels, columns| {
                    let columns = Matrix::new(columns, pixels.len(), s.patch()).transposed();
                    let dy = &dy[pixels.start * s.c_out..pixels.end * s.c_out];
                    multiply(&mut dw, columns, Matrix::new(dy, pixels.len(), s.c_out), true);
                });
            }
            dw
        })
        .collect();
    let mut sum = vec![0.0; of_w];
    for part in partial {
        for (s, p) in sum.iter_mut().zip(part) {
            *s += p;
        }
    }
    unpack(s, &sum)
}
