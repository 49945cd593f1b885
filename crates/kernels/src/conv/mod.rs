//! Convolution and its two gradients, channels last.
//!
//! Two algorithms behind one door: [`direct`] for every shape, and [`winograd`], which needs a quarter of the multiplications, for 3x3 with
//! stride 1. Which one is a function of the shape alone.

mod direct;
mod tiles;
mod winograd;

use std::mem::MaybeUninit;

use crate::{isa::Isa, norm::Pending};

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
    /// Distance of taps in both directions.
    pub dilation: usize,
}

impl Shape {
    fn reach(&self) -> usize {
        self.dilation * (self.kernel - 1) + 1
    }

    /// Rows of the output.
    pub fn h_out(&self) -> usize {
        (self.h + 2 * self.padding - self.reach()) / self.stride + 1
    }

    /// Columns of the output.
    pub fn w_out(&self) -> usize {
        (self.w + 2 * self.padding - self.reach()) / self.stride + 1
    }

    /// Values of the input, the weight and the output.
    pub fn lengths(&self) -> [usize; 3] {
        let pixels_out = self.n * self.h_out() * self.w_out();
        let weight = self.c_out * self.c_in * self.kernel * self.kernel;
        [self.n * self.h * self.w * self.c_in, weight, pixels_out * self.c_out]
    }

    /// Multiply-adds of one direction.
    pub fn products(&self) -> usize {
        self.n * self.h_out() * self.w_out() * self.c_out * self.c_in * self.kernel * self.kernel
    }

    fn check(&self) {
        assert!(self.kernel > 0 && self.stride > 0 && self.dilation > 0, "{self:?}");
        assert!(self.h + 2 * self.padding >= self.reach() && self.w + 2 * self.padding >= self.reach(), "{self:?}");
    }
}

/// What a convolution reads: finished values, or a convolution's output whose norm and ReLU are still to come.
#[derive(Debug, Clone, Copy)]
pub struct Input<'a> {
    /// `[n, h, w, c_in]`.
    pub values: &'a [f32],
    /// What is still to be done to each value that is read.
    pub pending: Option<&'a Pending>,
}

impl<'a> From<&'a [f32]> for Input<'a> {
    fn from(values: &'a [f32]) -> Self {
        Input { values, pending: None }
    }
}

impl Input<'_> {
    /// Finished values, from the pixel at `from` on.
    fn copy(&self, isa: &Isa, from: usize, to: &mut [f32]) {
        let values = &self.values[from..from + to.len()];
        match self.pending {
            None => to.copy_from_slice(values),
            Some(pending) => pending.apply(isa, values, as_unwritten(to)),
        }
    }
}

/// Written values as such that may be overwritten, by who writes numbers alone.
fn as_unwritten(values: &mut [f32]) -> &mut [MaybeUninit<f32>] {
    // SAFETY: the layouts are the same; who gets it in this crate writes numbers, never less.
    unsafe { &mut *(std::ptr::from_mut(values) as *mut [MaybeUninit<f32>]) }
}

/// A map of pixels.
#[derive(Debug, Clone, Copy)]
struct Map {
    h: usize,
    w: usize,
    c: usize,
}

impl Map {
    /// Values of one image.
    fn len(self) -> usize {
        self.h * self.w * self.c
    }
}

/// y = conv(x, w). `finish` gets each finished part of y with its offset, in whole pixels, while it is in the cache; what it returns
/// comes back in the order of the parts, which depends on the shape alone.
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn forward_then<T: Send>(
    isa: &Isa,
    s: &Shape,
    x: Input,
    w: &[f32],
    finish: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    s.check();
    let [of_x, of_w, _] = s.lengths();
    assert_eq!((x.values.len(), w.len()), (of_x, of_w), "{s:?}");
    match winograd::Tiling::of(s) {
        Some(tiling) => winograd::forward(isa, s, &tiling, w, x, false, finish),
        None => direct::forward(isa, s, w, x, finish),
    }
}

/// y = conv(x, w).
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn forward(isa: &Isa, s: &Shape, x: &[f32], w: &[f32]) -> Vec<f32> {
    forward_then(isa, s, x.into(), w, |_, _| ()).0
}

/// dx from dy; `finish` as in [`forward_then`].
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn backward_data_then<T: Send>(
    isa: &Isa,
    s: &Shape,
    w: &[f32],
    dy: &[f32],
    finish: impl Fn(usize, &mut [f32]) -> T + Sync,
) -> (Vec<f32>, Vec<T>) {
    s.check();
    let [_, of_w, of_y] = s.lengths();
    assert_eq!((w.len(), dy.len()), (of_w, of_y), "{s:?}");
    match winograd::Tiling::of(s) {
        Some(tiling) => winograd::forward(isa, s, &tiling.turned(), w, dy.into(), true, finish),
        None => direct::backward_data(isa, s, w, dy, finish),
    }
}

/// dx from dy.
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn backward_data(isa: &Isa, s: &Shape, w: &[f32], dy: &[f32]) -> Vec<f32> {
    backward_data_then(isa, s, w, dy, |_, _| ()).0
}

/// dw from x and dy, in the weight's own layout.
///
/// # Panics
/// If a slice has not the length that `s` says.
pub fn backward_weight(isa: &Isa, s: &Shape, x: Input, dy: &[f32]) -> Vec<f32> {
    s.check();
    let [of_x, _, of_y] = s.lengths();
    assert_eq!((x.values.len(), dy.len()), (of_x, of_y), "{s:?}");
    let sum = match winograd::Tiling::of(s) {
        Some(tiling) => winograd::backward_weight(isa, s, &tiling, x, dy),
        None => direct::backward_weight(isa, s, x, dy),
    };
    tiles::unpacked(isa, s, &sum)
}
