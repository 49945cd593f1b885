//! Convolution and its two gradients, channels last.
//!
//! Two algorithms behind one door: [`direct`] for every shape, and [`winograd`], which needs a quarter of the multiplications, for 3x3 with
//! stride 1. Which one is a function of the shape alone. Both multiply f32, or bf16 where the instruction set's table says so
//! ([`crate::isa::halves_of`]); what they take and give, and their sums, are f32.

mod direct;
mod tiles;
mod winograd;

use std::mem::MaybeUninit;

use crate::{
    factor::{Bf16, Factor},
    isa::Isa,
    norm::Pending,
};

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

impl Input<'_> {
    /// The same as factors; `unrounded` is for values between norm and rounding.
    fn factors<F: Factor>(&self, isa: &Isa, from: usize, to: &mut [F], unrounded: &mut Vec<f32>) {
        if let Some(to) = F::as_values(to) {
            self.copy(isa, from, to);
        } else if self.pending.is_none() {
            F::round(isa, &self.values[from..from + to.len()], to);
        } else {
            unrounded.resize(to.len(), 0.0);
            self.copy(isa, from, unrounded);
            F::round(isa, unrounded, to);
        }
    }
}

/// Written values as such that may be overwritten, by who writes numbers alone.
fn as_unwritten<F: Factor>(values: &mut [F]) -> &mut [MaybeUninit<F>] {
    // SAFETY: the layouts are the same; who gets it in this crate writes numbers, never less.
    unsafe { &mut *(std::ptr::from_mut(values) as *mut [MaybeUninit<F>]) }
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

/// Whether a sum over so many channels multiplies pairs of bf16: an odd number (that of colours) stays f32.
fn pairs(isa: &Isa, channels: usize) -> bool {
    isa.halves.is_some() && channels.is_multiple_of(2)
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
    match (winograd::Tiling::of(s), pairs(isa, s.c_in)) {
        (Some(tiling), false) => winograd::forward::<f32, _>(isa, s, &tiling, w, x, false, finish),
        (Some(tiling), true) => winograd::forward::<Bf16, _>(isa, s, &tiling, w, x, false, finish),
        (None, false) => direct::forward::<f32, _>(isa, s, w, x, finish),
        (None, true) => direct::forward::<Bf16, _>(isa, s, w, x, finish),
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
    match (winograd::Tiling::of(s), pairs(isa, s.c_out)) {
        (Some(tiling), false) => winograd::forward::<f32, _>(isa, s, &tiling.turned(), w, dy.into(), true, finish),
        (Some(tiling), true) => winograd::forward::<Bf16, _>(isa, s, &tiling.turned(), w, dy.into(), true, finish),
        (None, false) => direct::backward_data::<f32, _>(isa, s, w, dy, finish),
        (None, true) => direct::backward_data::<Bf16, _>(isa, s, w, dy, finish),
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
    // Pixels are paired here, not channels.
    let sum = match (winograd::Tiling::of(s), pairs(isa, 2)) {
        (Some(tiling), false) => winograd::backward_weight::<f32>(isa, s, &tiling, x, dy),
        (Some(tiling), true) => winograd::backward_weight::<Bf16>(isa, s, &tiling, x, dy),
        (None, false) => direct::backward_weight::<f32>(isa, s, x, dy),
        (None, true) => direct::backward_weight::<Bf16>(isa, s, x, dy),
    };
    tiles::unpacked(isa, s, &sum)
}
