//! Convolution and its two gradients, channels last.
//!
//! There are three algorithms. On processors with a matrix unit, `matrix` multiplies bf16 tiles,
//! for every shape. Elsewhere `direct` handles every shape, and `winograd`, which needs a quarter
//! of the multiplications, handles 3x3 kernels with stride 1 and at least 16 channels. The choice
//! depends on the shape and the instruction set alone. `direct` and `winograd` multiply f32, or
//! bf16 where the instruction set's table does ([`with_bf16`](crate::isa::with_bf16)); sums are
//! f32.
//!
//! The `_fused` variants take an [`Epilogue`], which gets the result while it is in the cache. What
//! it computes from each part of the pixels comes back in the order of the parts, which depends on
//! the shape alone.

mod direct;
mod epilogue;
mod gather;
mod input;
mod matrix;
mod operand;
mod shape;
mod tiles;
mod winograd;

pub use epilogue::{AddMap, Epilogue, NoEpilogue, ShiftAct, SumNormGrads, TakeMoments};
pub use input::Input;
use operand::uses_bf16;
pub use shape::Shape;

use crate::{
    isa::Isa,
    simd::Bf16,
    storage::{Storage, Values},
};

/// Computes y = conv(x, w), `[n, h_out, w_out, c_out]`, with an epilogue on y.
///
/// # Panics
///
/// If the length of a slice does not match `s`.
pub fn forward_fused<T: Storage, E: Epilogue<T>>(
    isa: &Isa,
    s: &Shape,
    x: Input,
    w: &[f32],
    epilogue: &E,
) -> (Vec<T>, Vec<E::Part>) {
    s.check();
    let [x_len, w_len, _] = s.lengths();
    assert_eq!((x.values.len(), w.len()), (x_len, w_len), "{s:?}");
    if let Some(loops) = &isa.matrix {
        return matrix::forward((isa, loops), s, w, x, epilogue);
    }
    let epilogue = |at: usize, y: &mut [f32]| epilogue.apply(isa, at, y);
    let mut buffer = Vec::new();
    let x = x.to_f32(isa, &mut buffer);
    let (y, parts) = match (winograd::Tiling::for_shape(s), uses_bf16(isa, s.c_in)) {
        (Some(tiling), false) => winograd::forward::<f32, _>(isa, s, &tiling, w, x, epilogue),
        (Some(tiling), true) => winograd::forward::<Bf16, _>(isa, s, &tiling, w, x, epilogue),
        (None, false) => direct::forward::<f32, _>(isa, s, w, x, epilogue),
        (None, true) => direct::forward::<Bf16, _>(isa, s, w, x, epilogue),
    };
    (T::from_f32(isa, y), parts)
}

/// Computes y = conv(x, w), `[n, h_out, w_out, c_out]`.
///
/// # Panics
///
/// If the length of a slice does not match `s`.
pub fn forward(isa: &Isa, s: &Shape, x: &[f32], w: &[f32]) -> Vec<f32> {
    forward_fused(isa, s, x.into(), w, &NoEpilogue).0
}

/// Computes dx, `[n, h, w, c_in]`, from dy, with an epilogue on dx.
///
/// # Panics
///
/// If the length of a slice does not match `s`.
pub fn backward_data_fused<T: Storage, E: Epilogue<T>>(
    isa: &Isa,
    s: &Shape,
    w: &[f32],
    dy: Values,
    epilogue: &E,
) -> (Vec<T>, Vec<E::Part>) {
    s.check();
    let [_, w_len, y_len] = s.lengths();
    assert_eq!((w.len(), dy.len()), (w_len, y_len), "{s:?}");
    let dy = Input { values: dy, norm: None };
    if let Some(loops) = &isa.matrix {
        return matrix::backward_data((isa, loops), s, w, dy, epilogue);
    }
    let epilogue = |at: usize, dx: &mut [f32]| epilogue.apply(isa, at, dx);
    let mut buffer = Vec::new();
    let dy = dy.to_f32(isa, &mut buffer).values;
    let (dx, parts) = match (winograd::Tiling::for_shape(s), uses_bf16(isa, s.c_out)) {
        (Some(tiling), false) => winograd::backward_data::<f32, _>(isa, s, &tiling, w, dy, epilogue),
        (Some(tiling), true) => winograd::backward_data::<Bf16, _>(isa, s, &tiling, w, dy, epilogue),
        (None, false) => direct::backward_data::<f32, _>(isa, s, w, dy, epilogue),
        (None, true) => direct::backward_data::<Bf16, _>(isa, s, w, dy, epilogue),
    };
    (T::from_f32(isa, dx), parts)
}

/// Computes dx, `[n, h, w, c_in]`, from dy.
///
/// # Panics
///
/// If the length of a slice does not match `s`.
pub fn backward_data(isa: &Isa, s: &Shape, w: &[f32], dy: &[f32]) -> Vec<f32> {
    backward_data_fused(isa, s, w, Values::F32(dy), &NoEpilogue).0
}

/// Computes dw, `[c_out, c_in, kernel, kernel]`, from x and dy.
///
/// # Panics
///
/// If the length of a slice does not match `s`.
pub fn backward_weight(isa: &Isa, s: &Shape, x: Input, dy: Values) -> Vec<f32> {
    s.check();
    let [x_len, _, y_len] = s.lengths();
    assert_eq!((x.values.len(), dy.len()), (x_len, y_len), "{s:?}");
    if let Some(loops) = &isa.matrix {
        return matrix::backward_weight((isa, loops), s, x, dy);
    }
    let [mut x_buffer, mut dy_buffer] = [Vec::new(), Vec::new()];
    let x = x.to_f32(isa, &mut x_buffer);
    let dy = Input { values: dy, norm: None }.to_f32(isa, &mut dy_buffer).values;
    // Pixels are paired here, not channels: the number of channels may be odd.
    let packed = match (winograd::Tiling::for_shape(s), uses_bf16(isa, 2)) {
        (Some(tiling), false) => winograd::backward_weight::<f32>(isa, s, &tiling, x, dy),
        (Some(tiling), true) => winograd::backward_weight::<Bf16>(isa, s, &tiling, x, dy),
        (None, false) => direct::backward_weight::<f32>(isa, s, x, dy),
        (None, true) => direct::backward_weight::<Bf16>(isa, s, x, dy),
    };
    tiles::unpack_weights(isa, s, &packed)
}
