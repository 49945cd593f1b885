//! Properties of the method: gradients by finite differences, a frozen target, overfitting, the twin of the fused layer.

mod common;

use burn::tensor::{Device, Tensor, TensorData};
use byol::{
    byol::Byol,
    data::{Loader, prefetch::Request, synthetic},
    device,
    nn::{
        Leaf, Mode, Pass, Precision, Tree,
        conv_norm_act::{ConvNorm, Then, composed, conv_norm_act, up_conv_norm_act},
        pass::{NormConfig, Statistics},
        tree::host,
    },
    ranks::Ranks,
    train::{
        Plan, Prepared, Recipe,
        recipe::{Draft, HealthConfig},
        run::tensors,
    },
};

fn small(n: usize, set: &[&str]) -> (Plan, Prepared) {
    let none = HealthConfig { images: 0, ..HealthConfig::default() };
    let data = Prepared::new(synthetic::dataset(3, n, 0), 0, &none, 0, &|_| ()).unwrap();
    let mut draft = Draft::from_recipe("cifar10").unwrap();
    let base = [
        "encoder.width=0.0625",
        "heads.hidden=32",
        "heads.projection=16",
        "views.size=16",
        "train.batch=8",
        "train.epochs=40",
        "train.warmup_epochs=1",
    ];
    for text in base.iter().chain(set) {
        draft.set(text).unwrap();
    }
    let plan = Plan::new("test", draft.over(&Recipe::default()).unwrap(), &data, "cpu").unwrap();
    (plan, data)
}

fn loader(plan: &Plan, data: &Prepared) -> Loader {
    Loader::start(Request {
        part: [0, 1],
        buffer: 1,
        crops: false,
        images: data.train.clone(),
        policies: [plan.recipe.views.first.clone(), plan.recipe.views.second.clone()],
        size: plan.recipe.views.size,
        n: plan.micro_batch(),
        seed: plan.recipe.seed,
        first: 0,
        last: plan.schedule.total * plan.recipe.train.accumulate as u64,
        threads: 2,
    })
}

/// A leaf with one element moved by `by`.
fn moved(tree: &Tree, name: &str, at: usize, by: f32) -> Tree {
    tree.map(|n, value| {
        if n != name {
            return value;
        }
        let mut values = host(value.clone());
        values[at] += by;
        Tensor::from_data(TensorData::new(values, value.dims()), &value.device())
    })
}

#[test]
fn gradients_agree_with_finite_differences_and_the_target_has_none() {
    let (plan, data) = small(8, &[]);
    let device = Device::flex();
    let byol = plan.start(&device);
    let (v, v2) = tensors(loader(&plan, &data).next_batch().unwrap(), &device);
    let at = |params: Tree| {
        let mut moved = byol.clone();
        moved.online.params = params;
        moved.gradient(v.clone(), v2.clone(), |_| ())
    };
    let here = at(byol.online.params.clone());
    // One direction through all parameters at once: its derivative is the gradient's length. Central differences in f32.
    let norm = here.grads.norm();
    let step = 2e-3 / norm;
    let along = |sign: f64| byol.online.params.zip(&here.grads, |_, w, g| w + g.mul_scalar(sign * step / norm));
    let slope = (at(along(1.0)).loss - at(along(-1.0)).loss) / (2.0 * step);
    assert!((slope - norm).abs() < 0.03 * norm, "slope {slope}, gradient {norm}");
    // And some parameters alone. A larger step crosses kinks of the ReLUs, a smaller one drowns in the loss's f32 rounding (about 3e-4 here).
    for name in ["predictor.fc2.weight", "projector.bn.weight", "layer4.1.bn2.weight"] {
        let g = f64::from(here.grads.leaf(name).unwrap().to_vec()[1]);
        let h = 1e-3f32;
        let up = at(moved(&byol.online.params, name, 1, h)).loss;
        let down = at(moved(&byol.online.params, name, 1, -h)).loss;
        let slope = (up - down) / (2.0 * f64::from(h));
        assert!((slope - g).abs() < 1e-3 + 0.02 * g.abs(), "{name}: slope {slope}, gradient {g}");
    }
    // Names of the gradient are those of θ; ξ has no predictor and no gradient.
    assert!(byol.target.params.leaf("predictor.fc1.weight").is_none());
    assert_eq!(here.grads.len(), byol.online.params.len());
}

#[test]
fn the_target_moves_by_the_average_alone() {
    let (plan, data) = small(16, &["target.tau=1.0"]);
    let device = Device::flex();
    let mut byol = plan.start(&device);
    let before: Vec<Vec<f32>> = byol.target.params.iter().map(|(_, l)| l.to_vec()).collect();
    let theta = byol.online.params.leaf("conv1.weight").unwrap().to_vec();
    let loader = loader(&plan, &data);
    for _ in 0..4 {
        byol.step(1, || loader.next_batch().map(|b| tensors(b, &device)), |_| ()).unwrap();
    }
    let after: Vec<Vec<f32>> = byol.target.params.iter().map(|(_, l)| l.to_vec()).collect();
    assert!(before == after, "τ = 1 freezes ξ to the bit");
    assert_ne!(theta, byol.online.params.leaf("conv1.weight").unwrap().to_vec(), "θ moves");
}

#[test]
fn accumulating_equal_micro_batches_is_the_step_of_one() {
    let (plan, data) = small(16, &[]);
    let device = Device::flex();
    let batch = loader(&plan, &data).next_batch().unwrap();
    let step = |n: usize| {
        let mut byol: Byol = plan.start(&device);
        byol.k = 5; // past the warm-up's first step, whose rate is 0
        let views = || Ok::<_, ()>(tensors(batch.clone(), &device));
        let report = byol.step(n, views, |_| ()).unwrap();
        (report.loss, byol.online.params.leaf("layer2.0.conv1.weight").unwrap().to_vec())
    };
    let ((one, w), (four, w4)) = (step(1), step(4));
    assert!((one - four).abs() < 1e-6);
    assert!(w.iter().zip(&w4).all(|(a, b)| (a - b).abs() < 1e-6));
}

/// Random weights make nearly the same of all images, and the heads' norms magnify what differs, rounding too.
#[test]
fn bf16_gives_the_gradient_within_its_rounding() {
    if device::kernels(Precision::Bf16).is_err() {
        eprintln!("this processor has no products of bf16: not tested");
        return;
    }
    let device = Device::flex();
    let at = |precision: &str| {
        let (plan, data) = small(
            64,
            &[
                "train.batch=64",
                "encoder.width=0.25",
                "views.size=32",
                "heads.hidden=512",
                "heads.projection=128",
                precision,
            ],
        );
        let mut byol = plan.start(&device);
        let (v, v2) = tensors(loader(&plan, &data).next_batch().unwrap(), &device);
        let gradient = byol.gradient(v, v2, |_| ());
        let all: Vec<f32> = gradient.grads.iter().flat_map(|(_, leaf)| leaf.to_vec()).collect();
        (gradient.loss, all)
    };
    let ((loss, g), (loss_of_halves, h)) = (at("train.precision=f32"), at("train.precision=bf16"));
    assert!((loss - loss_of_halves).abs() < 0.01 * loss, "{loss} and {loss_of_halves}");
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine = dot(&g, &h) / (dot(&g, &g) * dot(&h, &h)).sqrt();
    eprintln!("loss {loss} and {loss_of_halves}, cosine of the gradients {cosine}");
    assert!(cosine > 0.9, "the gradients' cosine is {cosine}");
    assert!(g != h, "bf16 was not used");
}

#[test]
fn sixty_four_images_can_be_overfitted() {
    let (plan, data) = small(
        64,
        &[
            "train.batch=32",
            "train.epochs=60",
            "train.warmup_epochs=2",
            "target.tau=0.9",
            "views.first.area=[0.6, 1]",
            "views.second.area=[0.6, 1]",
            "views.second.solarize=0",
        ],
    );
    let device = Device::flex();
    let mut byol = plan.start(&device);
    let loader = loader(&plan, &data);
    let mut losses = Vec::new();
    while byol.k < plan.schedule.total {
        let report = byol.step(1, || loader.next_batch().map(|b| tensors(b, &device)), |_| ()).unwrap();
        losses.push(report.loss);
    }
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..4]), mean(&losses[losses.len() - 10..]));
    assert!((3.0..5.0).contains(&first), "unrelated directions have a loss near 4, not {first}");
    assert!(last < 0.5 * first, "from {first} to {last}");
}

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = byol::random::stream(&[seed]);
    (0..n).map(|_| byol::random::normal(&mut rng) as f32).collect()
}

#[test]
fn the_fused_layer_is_the_composed_one() {
    let device = Device::flex();
    // Kernel, stride, dilation, height, width, whether a skip follows.
    let shapes: [(usize, usize, usize, usize, usize, bool); 6] = [
        (3, 1, 1, 5, 7, true),
        (3, 2, 1, 9, 8, false),
        (1, 2, 1, 6, 5, false),
        (7, 2, 1, 15, 13, false),
        (3, 1, 2, 7, 5, true),
        (3, 1, 6, 9, 8, false),
    ];
    for (kernel, stride, dilation, h, w, with_skip) in shapes {
        let first =
            ConvNorm { conv: "conv0".into(), norm: "bn0".into(), c_in: 5, c_out: 5, kernel: 3, stride: 1, dilation: 1 };
        let layer = ConvNorm { conv: "conv1".into(), norm: "bn1".into(), c_in: 5, c_out: 6, kernel, stride, dilation };
        let (h_out, w_out) = (h.div_ceil(stride), w.div_ceil(stride));
        let mut params = Tree::new();
        params.insert("conv0.weight", Leaf::new(noise(25 * 9, 7), &[5, 5, 3, 3], &device));
        params.insert("bn0.weight", Leaf::new(noise(5, 8), &[5], &device));
        params.insert("bn0.bias", Leaf::new(noise(5, 9), &[5], &device));
        params.insert("conv1.weight", Leaf::new(noise(30 * kernel * kernel, 1), &[6, 5, kernel, kernel], &device));
        params.insert("bn1.weight", Leaf::new(noise(6, 2), &[6], &device));
        params.insert("bn1.bias", Leaf::new(noise(6, 3), &[6], &device));
        let norm = NormConfig::default();
        let one = |fused: bool| {
            let tracked = params.tracked();
            let mut statistics = Statistics::new([("bn0", 5), ("bn1", 6)], &device);
            let mut pass = Pass {
                params: &tracked,
                norm: &norm,
                precision: Precision::F32,
                mode: Mode::Train(&mut statistics, Ranks::ALONE),
            };
            let tensor = |values, shape: [usize; 4]| {
                Tensor::<4>::from_data(TensorData::new(values, shape), &device).autodiff().require_grad()
            };
            let x = tensor(noise(3 * h * w * 5, 4), [3, h, w, 5]);
            let skip = tensor(noise(3 * h_out * w_out * 6, 5), [3, h_out, w_out, 6]);
            let then = if with_skip { Then::AddRelu(skip.clone()) } else { Then::Relu };
            let chain = |pass: &mut Pass, x: Tensor<4>, then: Then| match fused {
                true => {
                    let inner = conv_norm_act(pass, &first, x, Then::Relu);
                    conv_norm_act(pass, &layer, inner, then).done()
                }
                false => {
                    let inner = composed(pass, &first, x, Then::Relu);
                    composed(pass, &layer, inner, then)
                }
            };
            let y = chain(&mut pass, x.clone(), then);
            let dy = Tensor::<4>::from_data(TensorData::new(noise(3 * h_out * w_out * 6, 6), y.dims()), &device);
            let mut grads = (y.clone() * dy.autodiff()).sum().backward();
            let mut all = vec![host(y), host(x.grad_remove(&mut grads).unwrap())];
            if with_skip {
                all.push(host(skip.grad_remove(&mut grads).unwrap()));
            }
            all.extend(tracked.gradients(&mut grads).iter().map(|(_, l)| l.to_vec()));
            for norm in ["bn0", "bn1"] {
                all.push(host(statistics.get(norm).mean.clone()));
                all.push(host(statistics.get(norm).var.clone()));
            }
            // The same in evaluation, with the statistics that the pass above left.
            let plain = |values, shape: [usize; 4]| Tensor::<4>::from_data(TensorData::new(values, shape), &device);
            let mut pass =
                Pass { params: &params, norm: &norm, precision: Precision::F32, mode: Mode::Eval(&statistics) };
            let skip = plain(noise(3 * h_out * w_out * 6, 5), [3, h_out, w_out, 6]);
            let then = if with_skip { Then::AddRelu(skip) } else { Then::Nothing };
            all.push(host(chain(&mut pass, plain(noise(3 * h * w * 5, 4), [3, h, w, 5]), then)));
            all
        };
        for (i, (a, b)) in one(true).iter().zip(&one(false)).enumerate() {
            let most = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 + 1e-4 * most), "kernel {kernel}: output {i}");
        }
    }
}

#[test]
fn an_up_projections_convolution_is_that_of_the_map_with_zeros() {
    let device = Device::flex();
    let (n, h, w, c_in, c_out) = (2, 3, 5, 4, 6);
    let layer = ConvNorm { conv: "conv".into(), norm: "bn".into(), c_in, c_out, kernel: 5, stride: 1, dilation: 1 };
    let mut params = Tree::new();
    params.insert("conv.weight", Leaf::new(noise(c_out * c_in * 25, 1), &[c_out, c_in, 5, 5], &device));
    params.insert("bn.weight", Leaf::new(noise(c_out, 2), &[c_out], &device));
    params.insert("bn.bias", Leaf::new(noise(c_out, 3), &[c_out], &device));
    let zeros_between = |x: Tensor<4>| {
        let x = x.reshape([n * h, w, 1, c_in]);
        let x = Tensor::cat(vec![x.clone(), x.zeros_like()], 2).reshape([n, h, 1, 2 * w * c_in]);
        Tensor::cat(vec![x.clone(), x.zeros_like()], 2).reshape([n, 2 * h, 2 * w, c_in])
    };
    let norm = NormConfig::default();
    // By up_conv_norm_act, in its own way and in that of devices without kernels, and by a plain layer on the map with zeros.
    let one = |direct: bool, relu: bool| {
        let then = if relu { Then::Relu } else { Then::Nothing };
        let of = |pass: &mut Pass, x: Tensor<4>| match direct {
            true => up_conv_norm_act(pass, &layer, x, relu).done(),
            false => composed(pass, &layer, zeros_between(x), then.clone()),
        };
        let tracked = params.tracked();
        let mut statistics = Statistics::new([("bn", c_out)], &device);
        let mode = Mode::Train(&mut statistics, Ranks::ALONE);
        let mut pass = Pass { params: &tracked, norm: &norm, precision: Precision::F32, mode };
        let x = Tensor::<4>::from_data(TensorData::new(noise(n * h * w * c_in, 4), [n, h, w, c_in]), &device);
        let leaf = x.clone().autodiff().require_grad();
        let y = of(&mut pass, leaf.clone());
        let dy = Tensor::<4>::from_data(TensorData::new(noise(n * 4 * h * w * c_out, 5), y.dims()), &device);
        let mut grads = (y.clone() * dy.autodiff()).sum().backward();
        let mut all = vec![host(y), host(leaf.grad_remove(&mut grads).unwrap())];
        all.extend(tracked.gradients(&mut grads).iter().map(|(_, l)| l.to_vec()));
        all.push(host(statistics.get("bn").mean.clone()));
        all.push(host(statistics.get("bn").var.clone()));
        // In evaluation: folded, and with weights that are tracked, which is composed.
        for params in [&params, &tracked] {
            let mode = Mode::Eval(&statistics);
            let mut pass = Pass { params, norm: &norm, precision: Precision::F32, mode };
            let x = if params.get::<1>("bn.bias").is_autodiff() { x.clone().autodiff() } else { x.clone() };
            all.push(host(of(&mut pass, x)));
        }
        all
    };
    for relu in [true, false] {
        for (i, (a, b)) in one(true, relu).iter().zip(&one(false, relu)).enumerate() {
            let most = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert_eq!(a.len(), b.len(), "output {i}");
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 + 1e-4 * most), "output {i}, relu: {relu}");
        }
    }
}
