//! The part of a view that follows the crop, as tensor operations over a batch: for devices that the host's cores cannot feed. What was
//! drawn for each image is the same as on the host ([`crate::views`]), and so is what comes out, but for rounding.

use burn::tensor::{Device, Int, Tensor, TensorData};

use crate::views::{Draw, blur, jitter::Jitter};

/// Flip, colour jitter, greyscale, blur and solarisation of crops, each by its own draw.
///
/// # Shapes
/// `crops`: planes `[N, 3, S, S]` in 0..1, `draws`: N; returns views of the same shape and range.
pub fn finish(crops: Tensor<4>, draws: &[Draw]) -> Tensor<4> {
    // Names all that can be drawn, so that nothing new is forgotten here: the window is the crop, which has been taken.
    let _ = |Draw { window: _, flip: _, jitter: _, grey: _, blur: _, solarize: _ }: &Draw| ();
    let x = where_so(crops, draws, |d| d.flip, |x, _| x.flip([3]));
    let x = (0..4).fold(x, |x, turn| {
        let operation = |d: &Draw| d.jitter.as_ref().map(|j| j.order[turn]);
        by_kind(x, draws, operation, |x, op, draws| match op {
            None => x,
            Some(op) => {
                let value = |j: &Jitter| j.values[op];
                let values = draws.iter().map(|d| d.jitter.as_ref().map_or(0.0, value)).collect();
                let values = a_number_each(values, &x.device());
                match op {
                    0 => brightness(x, values),
                    1 => contrast(x, values),
                    2 => saturation(x, values),
                    _ => hue(x, values),
                }
            }
        })
    });
    let x = where_so(x, draws, |d| d.grey, |x, _| greyscale(x));
    let sigmas = |draws: &[&Draw]| draws.iter().map(|d| d.blur.unwrap_or(1.0)).collect::<Vec<_>>();
    let x = where_so(x, draws, |d| d.blur.is_some(), |x, draws| gaussian(x, &sigmas(draws)));
    where_so(x, draws, |d| d.solarize, |x, _| solarize(x))
}

/// `f` of the images of each kind together: an operation is computed for those images alone that it was drawn for.
fn by_kind<K: Ord + Copy>(
    x: Tensor<4>,
    draws: &[Draw],
    kind: impl Fn(&Draw) -> K,
    f: impl Fn(Tensor<4>, K, &[&Draw]) -> Tensor<4>,
) -> Tensor<4> {
    let device = x.device();
    let indices = |of: &[usize]| {
        let of: Vec<i32> = of.iter().map(|i| *i as i32).collect();
        Tensor::<1, Int>::from_data(TensorData::from(of.as_slice()), &device)
    };
    let mut kinds: Vec<K> = draws.iter().map(&kind).collect();
    kinds.sort_unstable();
    kinds.dedup();
    if let [only] = kinds[..] {
        return f(x, only, &draws.iter().collect::<Vec<_>>());
    }
    let (mut parts, mut order) = (Vec::new(), Vec::new());
    for one in kinds {
        let who: Vec<usize> = (0..draws.len()).filter(|i| kind(&draws[*i]) == one).collect();
        let of_them: Vec<&Draw> = who.iter().map(|i| &draws[*i]).collect();
        parts.push(f(x.clone().select(0, indices(&who)), one, &of_them));
        order.extend(who);
    }
    let mut row_of = vec![0; order.len()];
    order.iter().enumerate().for_each(|(row, image)| row_of[*image] = row);
    Tensor::cat(parts, 0).select(0, indices(&row_of))
}

fn where_so(
    x: Tensor<4>,
    draws: &[Draw],
    so: impl Fn(&Draw) -> bool,
    f: impl Fn(Tensor<4>, &[&Draw]) -> Tensor<4>,
) -> Tensor<4> {
    by_kind(x, draws, so, |x, so, draws| if so { f(x, draws) } else { x })
}

/// `[N, 1, 1, 1]`
fn a_number_each(values: Vec<f32>, device: &Device) -> Tensor<4> {
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

/// A range of values that is never 0; where it would be, what it divides is 0 too.
const LEAST_RANGE: f32 = 1e-30;

/// As `views::jitter` has it.
fn saturation(x: Tensor<4>, factor: Tensor<4>) -> Tensor<4> {
    let v = x.clone().max_dim(1);
    let range = v.clone() - x.clone().min_dim(1);
    let by = factor.expand(v.dims()).min_pair(v.clone() / range.clamp_min(LEAST_RANGE));
    (v.clone() - (v - x) * by).clamp(0.0, 1.0)
}

/// As `views::jitter` has it.
fn hue(x: Tensor<4>, delta: Tensor<4>) -> Tensor<4> {
    let device = x.device();
    let channel = |k: usize| x.clone().narrow(1, k, 1);
    let [r, g, b] = [channel(0), channel(1), channel(2)];
    let v = x.clone().max_dim(1);
    let range = v.clone() - x.clone().min_dim(1);
    let sixths = |from: &Tensor<4>, to: &Tensor<4>, at: f32| {
        (from.clone() - to.clone()) / range.clone().clamp_min(LEAST_RANGE) + at
    };
    // Ties prefer red, then green.
    let of_green = sixths(&r, &g, 4.0).mask_where(g.clone().equal(v.clone()), sixths(&b, &r, 2.0));
    let h = of_green.mask_where(r.equal(v.clone()), sixths(&g, &b, 0.0)) + delta.mul_scalar(6.0);
    let turns = Tensor::<4>::from_data(TensorData::new(vec![5.0f32, 3.0, 1.0], [1, 3, 1, 1]), &device);
    let k = h + turns;
    let k = k.clone() - k.div_scalar(6.0).floor().mul_scalar(6.0);
    let up = k.clone().min_pair(k.neg() + 4.0).clamp(0.0, 1.0);
    (v - range * up).clamp(0.0, 1.0)
}

fn greyscale(x: Tensor<4>) -> Tensor<4> {
    let weights = TensorData::new(vec![0.2989f32, 0.5870, 0.1140], [1, 3, 1, 1]);
    let weights = Tensor::<4>::from_data(weights, &x.device());
    (x * weights).sum_dim(1).repeat_dim(1, 3)
}

/// As `views::blur` has it. A blur along an axis is a product with a band matrix, which devices are made for.
fn gaussian(x: Tensor<4>, sigmas: &[f64]) -> Tensor<4> {
    let ([n, c, side, _], device) = (x.dims(), x.device());
    let radius = blur::radius(side);
    if radius == 0 {
        return x;
    }
    // −(i − j)² / 2, and far below where no tap reaches.
    let exponent = |(i, j): (usize, usize)| {
        let apart = i.abs_diff(j);
        if apart <= radius { -((apart * apart) as f32) / 2.0 } else { -1e9 }
    };
    let band: Vec<f32> = (0..side).flat_map(|i| (0..side).map(move |j| (i, j))).map(exponent).collect();
    let band = Tensor::<4>::from_data(TensorData::new(band, [1, 1, side, side]), &device);
    let narrow = a_number_each(sigmas.iter().map(|s| (1.0 / (s * s)) as f32).collect(), &device);
    let share = a_number_each(sigmas.iter().map(|s| blur::taps(radius, *s)[radius]).collect(), &device);
    // The tap in the middle is exp(0) over the sum of all.
    let taps = ((band * narrow).exp() * share).expand([n, c, side, side]);
    taps.clone().matmul(x).matmul(taps)
}

fn solarize(x: Tensor<4>) -> Tensor<4> {
    let stays = x.clone().lower_scalar(0.5);
    (x.clone().neg() + 1.0).mask_where(stays, x)
}
