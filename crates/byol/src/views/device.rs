//! Augmentations after the crop, as tensor operations over a batch: for devices that need views
//! faster than the host's cores make them. Draws are those of the host ([`crate::views`]), and the
//! views are equal up to rounding.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::{
    image::CHANNELS,
    views::{Draw, View, blur, channel_drop, jitter::Jitter, spectrum},
};

/// Applies flips, rotation, color jitter, grayscale, blur, solarization and channel drop to crops,
/// each by its own draw.
///
/// # Shapes
/// `crops`: planes `[N, C, S, S]` in 0..1. `draws`: N. Returns views of the same shape and range.
pub fn augment(crops: Tensor<4>, draws: &[Draw]) -> Tensor<4> {
    // Fails to compile when `Draw` gets a field, as a reminder to apply it here. The crop is done.
    let _ = |d: &Draw| {
        let Draw {
            window: _,
            flip: _,
            jitter: _,
            gray: _,
            blur: _,
            solarize: _,
            flip_vertical: _,
            quarter_turns: _,
            channel_drop: _,
            spectrogram: _,
        } = d;
    };
    let x = apply_where(crops, draws, |d| d.flip, |x, _| x.flip([3]));
    let x = apply_where(x, draws, |d| d.flip_vertical, |x, _| x.flip([2]));
    let x = apply_grouped(x, draws, |d| d.quarter_turns, |x, turns, _| rotate(x, turns));
    let x = (0..4).fold(x, |x, position| {
        let operation = |d: &Draw| d.jitter.as_ref().map(|j| j.order[position]);
        apply_grouped(x, draws, operation, |x, op, draws| match op {
            None => x,
            Some(op) => {
                let value = |j: &Jitter| j.values[op];
                let values = draws.iter().map(|d| d.jitter.as_ref().map_or(0.0, value)).collect();
                let values = per_image(values, &x.device());
                match op {
                    0 => brightness(x, values),
                    1 => contrast(x, values),
                    2 => saturation(x, values),
                    _ => hue(x, values),
                }
            }
        })
    });
    let x = apply_where(x, draws, |d| d.gray, |x, _| grayscale(x));
    let sigmas = |draws: &[&Draw]| draws.iter().map(|d| d.blur.unwrap_or(1.0)).collect::<Vec<_>>();
    let x = apply_where(x, draws, |d| d.blur.is_some(), |x, draws| gaussian(x, &sigmas(draws)));
    let x = apply_where(x, draws, |d| d.solarize, |x, _| solarize(x));
    apply_where(x, draws, |d| d.channel_drop.is_some(), drop_channels)
}

/// See `views::flip`.
fn rotate(x: Tensor<4>, quarter_turns: usize) -> Tensor<4> {
    match quarter_turns {
        0 => x,
        1 => x.swap_dims(2, 3).flip([2]),
        2 => x.flip([2, 3]),
        _ => x.swap_dims(2, 3).flip([3]),
    }
}

/// Groups the images by `key` and applies `f` to each group, so that an operation is computed only
/// for the images that drew it.
fn apply_grouped<K: Ord + Copy>(
    x: Tensor<4>,
    draws: &[Draw],
    key: impl Fn(&Draw) -> K,
    f: impl Fn(Tensor<4>, K, &[&Draw]) -> Tensor<4>,
) -> Tensor<4> {
    let device = x.device();
    let index_tensor = |indices: &[usize]| {
        let indices: Vec<i32> = indices.iter().map(|i| *i as i32).collect();
        Tensor::<1, Int>::from_data(TensorData::from(indices.as_slice()), &device)
    };
    let mut keys: Vec<K> = draws.iter().map(&key).collect();
    keys.sort_unstable();
    keys.dedup();
    if let [only] = keys[..] {
        return f(x, only, &draws.iter().collect::<Vec<_>>());
    }
    let (mut parts, mut order) = (Vec::new(), Vec::new());
    for group in keys {
        let members: Vec<usize> = (0..draws.len()).filter(|i| key(&draws[*i]) == group).collect();
        let member_draws: Vec<&Draw> = members.iter().map(|i| &draws[*i]).collect();
        parts.push(f(x.clone().select(0, index_tensor(&members)), group, &member_draws));
        order.extend(members);
    }
    let mut rows = vec![0; order.len()];
    order.iter().enumerate().for_each(|(row, image)| rows[*image] = row);
    Tensor::cat(parts, 0).select(0, index_tensor(&rows))
}

/// Applies `f` to the images whose draw satisfies `condition`.
fn apply_where(
    x: Tensor<4>,
    draws: &[Draw],
    condition: impl Fn(&Draw) -> bool,
    f: impl Fn(Tensor<4>, &[&Draw]) -> Tensor<4>,
) -> Tensor<4> {
    apply_grouped(x, draws, condition, |x, applies, draws| if applies { f(x, draws) } else { x })
}

/// Returns one value per image as `[N, 1, 1, 1]`.
fn per_image(values: Vec<f32>, device: &Device) -> Tensor<4> {
    let n = values.len();
    Tensor::from_data(TensorData::new(values, [n, 1, 1, 1]), device)
}

fn brightness(x: Tensor<4>, delta: Tensor<4>) -> Tensor<4> {
    (x + delta).clamp(0.0, 1.0)
}

fn contrast(x: Tensor<4>, factor: Tensor<4>) -> Tensor<4> {
    let mean = x.clone().mean_dim(3).mean_dim(2);
    ((x - mean.clone()) * factor + mean).clamp(0.0, 1.0)
}

/// Lower bound of the divisor max − min. Where max = min, the quotient is only multiplied by 0.
const MIN_RANGE: f32 = 1e-30;

/// See `views::jitter` and `views::spectrum`.
fn saturation(x: Tensor<4>, factor: Tensor<4>) -> Tensor<4> {
    if x.dims()[1] != CHANNELS {
        let mean = x.clone().mean_dim(1);
        return (mean.clone() + (x - mean) * factor).clamp(0.0, 1.0);
    }
    let v = x.clone().max_dim(1);
    let range = v.clone() - x.clone().min_dim(1);
    let scale = factor.expand(v.dims()).min_pair(v.clone() / range.clamp_min(MIN_RANGE));
    (v.clone() - (v - x) * scale).clamp(0.0, 1.0)
}

/// See `views::jitter` and `views::spectrum`.
fn hue(x: Tensor<4>, delta: Tensor<4>) -> Tensor<4> {
    let (device, c) = (x.device(), x.dims()[1]);
    if c != CHANNELS {
        let Some(plane) = spectrum::hue_plane(c) else { return x };
        let [u, v] = plane.map(|wave| Tensor::<4>::from_data(TensorData::new(wave, [1, c, 1, 1]), &device));
        let [a, b] = [&u, &v].map(|wave| (x.clone() * wave.clone()).sum_dim(1));
        let angle = delta.mul_scalar(std::f32::consts::TAU);
        let (sin, cos) = (angle.clone().sin(), angle.cos() - 1.0);
        let da = a.clone() * cos.clone() - b.clone() * sin.clone();
        let db = a * sin + b * cos;
        return (x + da * u + db * v).clamp(0.0, 1.0);
    }
    let channel = |k: usize| x.clone().narrow(1, k, 1);
    let [r, g, b] = [channel(0), channel(1), channel(2)];
    let v = x.clone().max_dim(1);
    let range = v.clone() - x.clone().min_dim(1);
    let sixths = |from: &Tensor<4>, to: &Tensor<4>, at: f32| {
        (from.clone() - to.clone()) / range.clone().clamp_min(MIN_RANGE) + at
    };
    // Ties prefer red, then green.
    let not_red = sixths(&r, &g, 4.0).mask_where(g.clone().equal(v.clone()), sixths(&b, &r, 2.0));
    let h = not_red.mask_where(r.equal(v.clone()), sixths(&g, &b, 0.0)) + delta.mul_scalar(6.0);
    let offsets = Tensor::<4>::from_data(TensorData::new(vec![5.0f32, 3.0, 1.0], [1, 3, 1, 1]), &device);
    let k = h + offsets;
    let k = k.clone() - k.div_scalar(6.0).floor().mul_scalar(6.0);
    let weight = k.clone().min_pair(k.neg() + 4.0).clamp(0.0, 1.0);
    (v - range * weight).clamp(0.0, 1.0)
}

fn grayscale(x: Tensor<4>) -> Tensor<4> {
    let c = x.dims()[1];
    if c != CHANNELS {
        return x.mean_dim(1).repeat_dim(1, c);
    }
    let weights = TensorData::new(vec![0.2989f32, 0.5870, 0.1140], [1, c, 1, 1]);
    let weights = Tensor::<4>::from_data(weights, &x.device());
    (x * weights).sum_dim(1).repeat_dim(1, 3)
}

/// See `views::blur`. A blur along an axis is a product with a band matrix, which suits devices.
fn gaussian(x: Tensor<4>, sigmas: &[f64]) -> Tensor<4> {
    let ([n, c, side, _], device) = (x.dims(), x.device());
    let radius = blur::radius(side);
    if radius == 0 {
        return x;
    }
    // −(i − j)² / 2, and far below 0 outside the radius.
    let exponent = |(i, j): (usize, usize)| {
        let offset = i.abs_diff(j);
        if offset <= radius { -((offset * offset) as f32) / 2.0 } else { -1e9 }
    };
    let band: Vec<f32> = (0..side).flat_map(|i| (0..side).map(move |j| (i, j))).map(exponent).collect();
    let band = Tensor::<4>::from_data(TensorData::new(band, [1, 1, side, side]), &device);
    let inverse_variance = per_image(sigmas.iter().map(|s| (1.0 / (s * s)) as f32).collect(), &device);
    let center_tap = per_image(sigmas.iter().map(|s| blur::taps(radius, *s)[radius]).collect(), &device);
    // The center tap is exp(0) / sum, so it is the normalization factor.
    let taps = ((band * inverse_variance).exp() * center_tap).expand([n, c, side, side]);
    taps.clone().matmul(x).matmul(taps)
}

/// See `views::channel_drop`.
fn drop_channels(x: Tensor<4>, draws: &[&Draw]) -> Tensor<4> {
    let c = x.dims()[1];
    let kept = draws.iter().flat_map(|d| {
        let mut ones = View { height: 1, width: 1, channels: c, pixels: vec![1.0; c] };
        d.channel_drop.into_iter().for_each(|seed| channel_drop::drop_channels(&mut ones, seed));
        ones.pixels
    });
    let kept = TensorData::new(kept.collect::<Vec<f32>>(), [draws.len(), c, 1, 1]);
    let kept = Tensor::<4>::from_data(kept, &x.device());
    x * kept
}

fn solarize(x: Tensor<4>) -> Tensor<4> {
    let below_half = x.clone().lower_scalar(0.5);
    (x.clone().neg() + 1.0).mask_where(below_half, x)
}
