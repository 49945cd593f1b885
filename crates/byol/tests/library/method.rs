//! Properties of the method: gradients against finite differences, a frozen target, overfitting,
//! fused against composed layers.

use burn::tensor::{Device, Tensor, TensorData};
use byol::{
    byol::{Byol, StepStats},
    data::{Loader, prefetch::Request, synthetic},
    device,
    nn::{
        ForwardContext, Leaf, Mode, Precision, Tree,
        conv_norm_act::{ConvNorm, Epilogue, composed, conv_norm_act, up_conv_norm_act},
        forward_context::{NormConfig, Statistics},
        tree::host,
    },
    ranks::Ranks,
    train::{Plan, PrepareOptions, Recipe, RecipeOverrides, TrainingData, batch::to_device, step::Stepper},
};

fn small(n: usize, set: &[&str]) -> (Plan, TrainingData) {
    let options = PrepareOptions { monitoring_images: 0, ..PrepareOptions::default() };
    let data = TrainingData::prepare(synthetic::dataset(3, n, 0), options, &|_| ()).unwrap();
    let mut overrides = RecipeOverrides::from_recipe("cifar10").unwrap();
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
        overrides.set(text).unwrap();
    }
    let plan = Plan::new("test", overrides.apply_to(&Recipe::default()).unwrap(), &data, "cpu").unwrap();
    (plan, data)
}

fn loader(plan: &Plan, data: &TrainingData) -> Loader {
    Loader::start(Request {
        part: [0, 1],
        buffer: 1,
        augmentation: None,
        crop_only: false,
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

fn step(byol: &mut Byol, loader: &Loader) -> StepStats {
    let (v, v2) = to_device(loader.next_batch().unwrap(), &byol.device());
    byol.step(|byol| Ok::<_, ()>(byol.loss_and_gradient(v, v2))).unwrap()
}

/// The tree with `by` added to one element of a leaf.
fn perturbed(tree: &Tree, name: &str, at: usize, by: f32) -> Tree {
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
fn gradient_matches_finite_differences_and_the_target_has_none() {
    let (plan, data) = small(8, &[]);
    let device = Device::flex();
    let byol = plan.initial_state(&device);
    let (v, v2) = to_device(loader(&plan, &data).next_batch().unwrap(), &device);
    let at = |params: Tree| {
        let mut byol = byol.clone();
        byol.online.params = params;
        byol.loss_and_gradient(v.clone(), v2.clone())
    };
    let (_, grads) = at(byol.online.params.clone());
    // Along the gradient the derivative is the gradient's norm. Central differences in f32.
    let norm = grads.norm();
    let step = 2e-3 / norm;
    let along = |sign: f64| byol.online.params.zip(&grads, |_, w, g| w + g.mul_scalar(sign * step / norm));
    let slope = (at(along(1.0)).0 - at(along(-1.0)).0) / (2.0 * step);
    assert!((slope - norm).abs() < 0.03 * norm, "slope {slope}, gradient {norm}");
    // Single parameters. A larger step would cross kinks of the ReLUs, a smaller one vanish in the
    // f32 rounding of the loss (about 3e-4 here).
    for name in ["predictor.fc2.weight", "projector.bn.weight", "layer4.1.bn2.weight"] {
        let g = f64::from(grads.leaf(name).unwrap().to_vec()[1]);
        let h = 1e-3f32;
        let up = at(perturbed(&byol.online.params, name, 1, h)).0;
        let down = at(perturbed(&byol.online.params, name, 1, -h)).0;
        let slope = (up - down) / (2.0 * f64::from(h));
        assert!((slope - g).abs() < 1e-3 + 0.02 * g.abs(), "{name}: slope {slope}, gradient {g}");
    }
    // The gradient has the names of θ; ξ has neither predictor nor gradient.
    assert!(byol.target.params.leaf("predictor.fc1.weight").is_none());
    assert_eq!(grads.len(), byol.online.params.len());
}

#[test]
fn tau_one_freezes_the_target() {
    let (plan, data) = small(16, &["target.tau=1.0"]);
    let device = Device::flex();
    let mut byol = plan.initial_state(&device);
    let before: Vec<Vec<f32>> = byol.target.params.iter().map(|(_, l)| l.to_vec()).collect();
    let theta = byol.online.params.leaf("conv1.weight").unwrap().to_vec();
    let loader = loader(&plan, &data);
    for _ in 0..4 {
        step(&mut byol, &loader);
    }
    let after: Vec<Vec<f32>> = byol.target.params.iter().map(|(_, l)| l.to_vec()).collect();
    assert!(before == after, "ξ is bit-identical");
    assert_ne!(theta, byol.online.params.leaf("conv1.weight").unwrap().to_vec(), "θ is updated");
}

#[test]
fn accumulating_equal_micro_batches_matches_one_step() {
    let (plan, data) = small(16, &[]);
    let device = Device::flex();
    let batch = loader(&plan, &data).next_batch().unwrap();
    let step = |n: usize| {
        let mut byol: Byol = plan.initial_state(&device);
        byol.k = 5; // the first step of the warmup has rate 0
        let next_views = || Ok::<_, ()>(to_device(batch.clone(), &device));
        let mut stepper = Stepper { micro_batches: n, ..Stepper::default() };
        let (stats, _) = stepper.step(&mut byol, next_views, |_| ()).unwrap();
        (stats.loss, byol.online.params.leaf("layer2.0.conv1.weight").unwrap().to_vec())
    };
    let ((one, w), (four, w4)) = (step(1), step(4));
    assert!((one - four).abs() < 1e-6);
    assert!(w.iter().zip(&w4).all(|(a, b)| (a - b).abs() < 1e-6));
}

/// Random weights map all images to nearly the same representation, and the norms of the heads
/// amplify the differences, including rounding.
#[test]
fn bf16_gradient_matches_f32_within_rounding() {
    if device::kernels(Precision::Bf16).is_err() {
        crate::common::skip("bf16_gradient_matches_f32_within_rounding", "this processor has no bf16 instructions");
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
        let mut byol = plan.initial_state(&device);
        let (v, v2) = to_device(loader(&plan, &data).next_batch().unwrap(), &device);
        let (loss, grads) = byol.loss_and_gradient(v, v2);
        (loss, grads.iter().flat_map(|(_, leaf)| leaf.to_vec()).collect::<Vec<f32>>())
    };
    let ((loss, g), (bf16_loss, h)) = (at("train.precision=f32"), at("train.precision=bf16"));
    assert!((loss - bf16_loss).abs() < 0.01 * loss, "{loss} and {bf16_loss}");
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let cosine = dot(&g, &h) / (dot(&g, &g) * dot(&h, &h)).sqrt();
    println!("loss {loss} and {bf16_loss}, cosine of the gradients {cosine}");
    assert!(cosine > 0.9, "the gradients' cosine is {cosine}");
    assert!(g != h, "bf16 was not used");
}

#[test]
fn overfits_64_images() {
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
    let mut byol = plan.initial_state(&device);
    let loader = loader(&plan, &data);
    let mut losses = Vec::new();
    while byol.k < plan.schedule.total {
        losses.push(step(&mut byol, &loader).loss);
    }
    let mean = |part: &[f64]| part.iter().sum::<f64>() / part.len() as f64;
    let (first, last) = (mean(&losses[..4]), mean(&losses[losses.len() - 10..]));
    assert!((3.0..5.0).contains(&first), "the loss of unrelated directions is near 4, not {first}");
    assert!(last < 0.5 * first, "from {first} to {last}");
}

fn noise(n: usize, seed: u64) -> Vec<f32> {
    let mut rng = byol::random::stream(&[seed]);
    (0..n).map(|_| byol::random::normal(&mut rng) as f32).collect()
}

#[test]
fn fused_layer_matches_composed() {
    let device = Device::flex();
    // Kernel, stride, dilation, height, width, with a skip.
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
        let compute = |fused: bool| {
            let tracked = params.tracked();
            let mut statistics = Statistics::new([("bn0", 5), ("bn1", 6)], &device);
            let mut ctx =
                ForwardContext::new(&tracked, &norm, Precision::F32, Mode::Train(&mut statistics, Ranks::SINGLE));
            let tensor = |values, shape: [usize; 4]| {
                Tensor::<4>::from_data(TensorData::new(values, shape), &device).autodiff().require_grad()
            };
            let x = tensor(noise(3 * h * w * 5, 4), [3, h, w, 5]);
            let skip = tensor(noise(3 * h_out * w_out * 6, 5), [3, h_out, w_out, 6]);
            let epilogue = if with_skip { Epilogue::AddRelu(skip.clone().into()) } else { Epilogue::Relu };
            let chain = |ctx: &mut ForwardContext, x: Tensor<4>, epilogue: Epilogue| match fused {
                true => {
                    let inner = conv_norm_act(ctx, &first, x, Epilogue::Relu);
                    conv_norm_act(ctx, &layer, inner, epilogue).into_tensor()
                }
                false => {
                    let inner = composed(ctx, &first, x, Epilogue::Relu);
                    composed(ctx, &layer, inner, epilogue)
                }
            };
            let y = chain(&mut ctx, x.clone(), epilogue);
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
            // Evaluation with the running statistics of the pass above.
            let plain = |values, shape: [usize; 4]| Tensor::<4>::from_data(TensorData::new(values, shape), &device);
            let mut ctx = ForwardContext::new(&params, &norm, Precision::F32, Mode::Eval(&statistics));
            let skip = plain(noise(3 * h_out * w_out * 6, 5), [3, h_out, w_out, 6]);
            let epilogue = if with_skip { Epilogue::AddRelu(skip.into()) } else { Epilogue::None };
            all.push(host(chain(&mut ctx, plain(noise(3 * h * w * 5, 4), [3, h, w, 5]), epilogue)));
            all
        };
        for (i, (a, b)) in compute(true).iter().zip(&compute(false)).enumerate() {
            let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert!(
                a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 + 1e-4 * largest),
                "kernel {kernel}: output {i}"
            );
        }
    }
}

#[test]
fn up_convolution_matches_convolution_of_upsampled_map() {
    let device = Device::flex();
    let (n, h, w, c_in, c_out) = (2, 3, 5, 4, 6);
    let layer = ConvNorm { conv: "conv".into(), norm: "bn".into(), c_in, c_out, kernel: 5, stride: 1, dilation: 1 };
    let mut params = Tree::new();
    params.insert("conv.weight", Leaf::new(noise(c_out * c_in * 25, 1), &[c_out, c_in, 5, 5], &device));
    params.insert("bn.weight", Leaf::new(noise(c_out, 2), &[c_out], &device));
    params.insert("bn.bias", Leaf::new(noise(c_out, 3), &[c_out], &device));
    let upsample_with_zeros = |x: Tensor<4>| {
        let x = x.reshape([n * h, w, 1, c_in]);
        let x = Tensor::cat(vec![x.clone(), x.zeros_like()], 2).reshape([n, h, 1, 2 * w * c_in]);
        Tensor::cat(vec![x.clone(), x.zeros_like()], 2).reshape([n, 2 * h, 2 * w, c_in])
    };
    let norm = NormConfig::default();
    // up_conv_norm_act, and a plain layer on the map with zeros.
    let compute = |direct: bool, relu: bool| {
        let epilogue = if relu { Epilogue::Relu } else { Epilogue::None };
        let forward = |ctx: &mut ForwardContext, x: Tensor<4>| match direct {
            true => up_conv_norm_act(ctx, &layer, x, relu).into_tensor(),
            false => composed(ctx, &layer, upsample_with_zeros(x), epilogue.clone()),
        };
        let tracked = params.tracked();
        let mut statistics = Statistics::new([("bn", c_out)], &device);
        let mode = Mode::Train(&mut statistics, Ranks::SINGLE);
        let mut ctx = ForwardContext::new(&tracked, &norm, Precision::F32, mode);
        let x = Tensor::<4>::from_data(TensorData::new(noise(n * h * w * c_in, 4), [n, h, w, c_in]), &device);
        let leaf = x.clone().autodiff().require_grad();
        let y = forward(&mut ctx, leaf.clone());
        let dy = Tensor::<4>::from_data(TensorData::new(noise(n * 4 * h * w * c_out, 5), y.dims()), &device);
        let mut grads = (y.clone() * dy.autodiff()).sum().backward();
        let mut all = vec![host(y), host(leaf.grad_remove(&mut grads).unwrap())];
        all.extend(tracked.gradients(&mut grads).iter().map(|(_, l)| l.to_vec()));
        all.push(host(statistics.get("bn").mean.clone()));
        all.push(host(statistics.get("bn").var.clone()));
        // In evaluation: folded, and composed for tracked weights.
        for params in [&params, &tracked] {
            let mode = Mode::Eval(&statistics);
            let mut ctx = ForwardContext::new(params, &norm, Precision::F32, mode);
            let x = if params.get::<1>("bn.bias").is_autodiff() { x.clone().autodiff() } else { x.clone() };
            all.push(host(forward(&mut ctx, x)));
        }
        all
    };
    for relu in [true, false] {
        for (i, (a, b)) in compute(true, relu).iter().zip(&compute(false, relu)).enumerate() {
            let largest = b.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            assert_eq!(a.len(), b.len(), "output {i}");
            assert!(a.iter().zip(b).all(|(a, b)| (a - b).abs() <= 1e-5 + 1e-4 * largest), "output {i}, relu: {relu}");
        }
    }
}
