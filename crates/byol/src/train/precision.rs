//! Choice of the compute precision on the CPU, by measurement.
//!
//! Whether bf16 is faster depends on the processor and on the layers: AMX gains most on wide
//! layers, AMD's AVX512-BF16 less, and Intel's is slower than f32. So the layers of the encoder are
//! timed in both.

use std::{hint::black_box, time::Instant};

use byol_kernels::{
    Bf16,
    conv::{self, Input, NoEpilogue, Shape, TakeMoments},
    isa::{self, Isa},
    norm::{self, Moments, NormBackward, ReluMask},
    spin::KeepAwake,
    storage::Storage,
};

use super::recipe::Recipe;
use crate::{
    data::CHANNELS,
    device::{self, Kind, OpenedDevice, Precision},
    nn::ResNet,
};

/// Multiply-adds of a forward pass that is timed: some ten milliseconds.
const MULTIPLY_ADDS: u64 = 1_000_000_000;

/// Number of times that each layer is timed in either precision. The fastest counts.
const RUNS: usize = 3;

/// Gain in speed from which on bf16 is chosen: f32 is more accurate.
const MIN_GAIN: f64 = 1.03;

/// Speed of training in bf16 relative to f32, given the recipe so far.
pub type Bf16Speed = fn(&Recipe) -> f64;

/// Returns how to determine the speed of bf16 on a device; `None` if it does not support bf16 or
/// only emulates it. A GPU with bf16 units is not measured: its speed is infinite.
pub fn bf16_speed(opened: &OpenedDevice) -> Option<Bf16Speed> {
    if !device::has_bf16_units(opened) {
        return None;
    }
    Some(if opened.info.kind == Kind::Cpu { measure } else { |_| f64::INFINITY })
}

/// Returns `true` if bf16 is enough faster than f32 to be chosen.
pub fn pays(speed: f64) -> bool {
    speed >= MIN_GAIN
}

/// Returns the faster precision for a recipe.
pub fn fastest(opened: &OpenedDevice, recipe: &Recipe) -> Precision {
    match bf16_speed(opened) {
        Some(speed) if pays(speed(recipe)) => Precision::Bf16,
        _ => Precision::F32,
    }
}

/// Measures the speed of the encoder's layers in bf16 relative to f32.
fn measure(recipe: &Recipe) -> f64 {
    let f32_isa = isa::current();
    let Some(bf16_isa) = isa::with_bf16(f32_isa) else { return 0.0 };
    let (encoder, size) = (&recipe.encoder, recipe.views.size);
    let network = ResNet::new(encoder.architecture, encoder.width, encoder.stem(size), CHANNELS);
    let n = (MULTIPLY_ADDS / network.multiply_adds(size).max(1)).clamp(8, 64) as usize;
    let _awake = KeepAwake::new();
    let (mut f32_seconds, mut bf16_seconds) = (0.0, 0.0);
    for (shape, count) in distinct_shapes(&network, size, n) {
        // In turn, so that other work on the machine slows both.
        let (mut f32_best, mut bf16_best) = (f64::INFINITY, f64::INFINITY);
        for _ in 0..RUNS {
            f32_best = seconds::<f32>(f32_isa, &shape).min(f32_best);
            bf16_best = seconds::<Bf16>(bf16_isa, &shape).min(bf16_best);
        }
        f32_seconds += count as f64 * f32_best;
        bf16_seconds += count as f64 * bf16_best;
    }
    f32_seconds / bf16_seconds
}

/// Returns the distinct convolution shapes of a network for `n` images of side `size`, with the
/// number of layers of each.
pub fn distinct_shapes(network: &ResNet, size: usize, n: usize) -> Vec<(Shape, usize)> {
    let mut shapes: Vec<(Shape, usize)> = Vec::new();
    for (layer, side) in network.input_sides(size) {
        let (c_in, c_out, kernel, stride) = (layer.c_in, layer.c_out, layer.kernel, layer.stride);
        let shape = Shape { n, h: side, w: side, c_in, c_out, kernel, stride, padding: kernel / 2, dilation: 1 };
        match shapes.iter_mut().find(|(other, _)| *other == shape) {
            Some((_, count)) => *count += 1,
            None => shapes.push((shape, 1)),
        }
    }
    shapes
}

/// Times a layer forward and backward: convolution, norm and ReLU, with maps stored as `T`.
fn seconds<T: Storage>(isa: &Isa, s: &Shape) -> f64 {
    let values = |n: usize| (0..n).map(|i| ((i * 7919) % 1009) as f32 / 1009.0 - 0.5).collect::<Vec<f32>>();
    let [x_len, w_len, y_len] = s.lengths();
    let (x, w, dout) = (T::from_f32(isa, values(x_len)), values(w_len), T::from_f32(isa, values(y_len)));
    let start = Instant::now();
    let (y, parts) = conv::forward_fused::<T, _>(isa, s, Input::from(&x[..]), &w, &TakeMoments { c: s.c_out });
    let (mean, variance) = Moments::merge(&parts, s.c_out).mean_variance();
    let (gamma, beta, inverse_std) = (vec![1.0; s.c_out], vec![0.0; s.c_out], norm::inverse_std(&variance, 1e-5));
    let (scale, shift) = norm::scale_shift(&gamma, &beta, &mean, &inverse_std);
    black_box(norm::affine_act(isa, &y[..], &scale, &shift, None, true));
    let backward = NormBackward::new(&gamma, &beta, &mean, &inverse_std);
    let dy = norm::backward(isa, &dout[..], ReluMask::FromNorm, &backward, &y[..], |_| ()).dy;
    black_box(conv::backward_weight(isa, s, Input::from(&x[..]), T::values(&dy)));
    black_box(conv::backward_data_fused::<T, _>(isa, s, &w, T::values(&dy), &NoEpilogue).0);
    start.elapsed().as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn measured_speed_is_a_ratio_of_times() {
        let mut recipe = Recipe::default();
        (recipe.encoder.width, recipe.views.size) = (0.0625, 16);
        let speed = measure(&recipe);
        assert!(speed > 0.0 && speed.is_finite(), "{speed}");
    }

    #[test]
    fn bf16_must_be_faster_to_be_chosen() {
        assert!(!pays(0.6) && !pays(1.0) && pays(1.5) && pays(f64::INFINITY));
    }
}
