//! Computations by Burn's operations: augmentation on the device, batch norm across ranks,
//! 16-bit precision. On the CPU as far as its tensors support them, and on a GPU with
//! `BYOL_TEST_DEVICE=wgpu`.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use crate::common::device;
use burn::tensor::{FloatDType, Tensor, TensorData};
use byol::{
    Image,
    data::{Loader, prefetch::Request, synthetic},
    device::{self, Precision},
    nn::{
        ForwardContext, Leaf, Mode, NormConfig, Statistics, Tree,
        conv_norm_act::{ConvNorm, Epilogue, composed},
        tree::host,
    },
    optim::LossScale,
    random::{self, uniform},
    ranks::{Ranks, threads},
    train::{
        Event, Plan, PrepareOptions, Recipe, RecipeOverrides, Run, RunContext, TrainingData,
        batch::{self, to_device},
        step::Stepper,
    },
    views::{Draw, Policy, device::augment, resize},
};

fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = random::stream(&[seed]);
    (0..n).map(|_| uniform(&mut rng) as f32).collect()
}

fn max_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn plan(more: &[&str]) -> (Plan, TrainingData) {
    let recipe = Recipe::default();
    let options = PrepareOptions { cache_bytes: 1 << 30, ..PrepareOptions::from(&recipe) };
    let data = TrainingData::prepare(synthetic::dataset(3, 64, 48), options, &|_| ()).unwrap();
    let mut overrides = RecipeOverrides::from_recipe("auto").unwrap();
    let settings = [
        "encoder.architecture=resnet18",
        "encoder.width=0.125",
        "views.size=32",
        "heads.hidden=32",
        "heads.projection=16",
        "train.batch=32",
        "train.epochs=2",
        "train.warmup_epochs=0",
        "optimizer.kind=sgd",
        "optimizer.lr=0.02",
    ];
    settings.iter().chain(more).for_each(|s| overrides.set(s).unwrap());
    let plan = Plan::new("test", overrides.apply_to(&Recipe::default()).unwrap(), &data, "cpu").unwrap();
    (plan, data)
}

fn loader(plan: &Plan, data: &TrainingData, last: u64) -> Loader {
    let context = RunContext::single_process(device(), 2);
    Loader::start(Request { last, ..batch::request(plan, &data.train, &context) })
}

#[test]
fn augmentation_on_the_device_matches_the_cpu() {
    // The radius of the blur is 1 pixel at 32 px and 2 pixels at 48 px; gray images have no hue.
    for (size, more) in [
        (32, "views.first.jitter=1"),
        (48, "views.second.blur=0.5"),
        (16, "views.second.gray=0.5"),
        (24, "views.first.flip_vertical=0.5"),
        (24, "views.second.rotate=0.75"),
    ] {
        let size = format!("views.size={size}");
        let batches = ["cpu", "device"].map(|placement| {
            let (plan, data) = plan(&[&size, more, &format!("views.placement={placement}")]);
            let batch = loader(&plan, &data, 1).next_batch().unwrap();
            assert_eq!(batch.draws.is_some(), placement == "device");
            let (v, v2) = to_device(batch, &device());
            [host(v), host(v2)]
        });
        let [on_cpu, on_device] = batches;
        for (a, b) in on_cpu.iter().zip(&on_device) {
            assert!(max_difference(a, b) < 1e-4, "{size}: {}", max_difference(a, b));
        }
    }
}

#[test]
fn augmentation_of_other_channels_on_the_device_matches_the_cpu() {
    let policy = Policy {
        area: [1.0, 1.0],
        aspect: [1.0, 1.0],
        jitter: 1.0,
        gray: 0.3,
        blur: 0.5,
        solarize: 0.5,
        channel_drop: 0.5,
        ..Policy::default()
    };
    let (n, side) = (12, 24);
    for channels in [1, 2, 4, 13] {
        let pixels: Vec<u16> = noise(7, side * side * channels).iter().map(|v| (v.abs() * 60_000.0) as u16).collect();
        let image = Image { height: side, width: side, channels, pixels: pixels.into() };
        let mut rng = random::stream(&[3]);
        let draws: Vec<Draw> = (0..n).map(|_| policy.draw(&mut rng, side, side)).collect();
        let on_cpu: Vec<f32> = draws.iter().flat_map(|draw| draw.apply(&image, side).pixels).collect();
        let crop = |draw: &Draw| resize::crop_resize(&image, draw.window, side, side).pixels;
        let crops: Vec<f32> = draws.iter().flat_map(crop).collect();
        let crops = Tensor::<4>::from_data(TensorData::new(crops, [n, channels, side, side]), &device());
        let difference = max_difference(&on_cpu, &host(augment(crops, &draws)));
        assert!(difference < 1e-4, "{channels} channels: {difference}");
    }
}

#[test]
fn images_without_augmentation_are_unchanged() {
    let crops = noise(1, 2 * 3 * 32 * 32);
    let mut rng = random::stream(&[2]);
    let policy = Policy { flip: 0.0, ..Policy::crop_and_flip() };
    let draws = [0, 1].map(|_| policy.draw(&mut rng, 40, 40));
    let x = Tensor::from_data(TensorData::new(crops.clone(), [2, 3, 32, 32]), &device());
    assert_eq!(host(augment(x, &draws)), crops);
}

/// Batch norm y of the rows of this rank, and the gradients of Σ y · t by x, γ and β.
fn norm(ranks: Ranks, x: &[f32], t: &[f32], c: usize) -> [Vec<f32>; 4] {
    let (device, config) = (device(), NormConfig::default());
    let matrix = |v: &[f32]| Tensor::<2>::from_data(TensorData::new(v.to_vec(), [v.len() / c, c]), &device);
    let mut params = Tree::new();
    params.insert("bn.weight", Leaf::new(noise(5, c), &[c], &device));
    params.insert("bn.bias", Leaf::new(noise(6, c), &[c], &device));
    let params = params.tracked();
    let mut statistics = Statistics::new([("bn", c)], &device);
    let mode = Mode::Train(&mut statistics, ranks);
    let mut ctx = ForwardContext::new(&params, &config, Precision::F32, mode);
    let x = matrix(x).autodiff().require_grad();
    let y = ctx.batch_norm("bn", x.clone());
    let mut grads = (y.clone() * matrix(t).autodiff()).sum().backward();
    let params_grads = params.gradients(&mut grads);
    let grad = |name: &str| params_grads.leaf(name).unwrap().to_vec();
    let dx = x.grad_remove(&mut grads).unwrap();
    [host(y), host(dx), grad("bn.weight"), grad("bn.bias")]
}

#[test]
fn synchronized_batch_norm_matches_the_whole_batch() {
    const C: usize = 3;
    let (x, t) = (noise(3, 8 * C), noise(4, 8 * C));
    let [y, dx, dgamma, dbeta] = norm(Ranks::SINGLE, &x, &t, C);
    let halves: Vec<[Vec<f32>; 4]> = thread::scope(|scope| {
        let start = |(rank, (x, t))| {
            scope.spawn(move || {
                let rank: threads::Thread = rank;
                norm(Ranks::new(Box::leak(Box::new(rank))), x, t, C)
            })
        };
        let parts = x.chunks(4 * C).zip(t.chunks(4 * C));
        let started: Vec<_> = threads::ranks(2).into_iter().zip(parts).map(start).collect();
        started.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let joined = |k: usize| halves.iter().flat_map(|half| half[k].clone()).collect::<Vec<_>>();
    let summed = |k: usize| halves[0][k].iter().zip(&halves[1][k]).map(|(a, b)| a + b).collect::<Vec<_>>();
    assert!(max_difference(&y, &joined(0)) < 1e-5);
    assert!(max_difference(&dx, &joined(1)) < 1e-5, "{dx:?} and {:?}", joined(1));
    assert!(max_difference(&dgamma, &summed(2)) < 1e-5 && max_difference(&dbeta, &summed(3)) < 1e-5);
}

/// The 16-bit precisions that the device under test supports.
fn half_precisions() -> Vec<Precision> {
    let all = [Precision::Bf16, Precision::F16];
    match device::has_kernels(&device()) {
        true => all.to_vec(), // CPU tensors support both, the kernels at most bf16
        false => all.into_iter().filter(|p| device::check(&device(), *p).is_ok()).collect(),
    }
}

#[test]
fn half_precision_layer_computes_norms_in_f32() {
    let device = device();
    let layer =
        ConvNorm { conv: "conv".into(), norm: "bn".into(), c_in: 8, c_out: 16, kernel: 3, stride: 1, dilation: 1 };
    let mut params = Tree::new();
    let w = noise(1, 16 * 8 * 9).into_iter().map(|v| v - 0.5).collect();
    params.insert("conv.weight", Leaf::new(w, &[16, 8, 3, 3], &device));
    params.insert("bn.weight", Leaf::new(vec![1.0; 16], &[16], &device));
    params.insert("bn.bias", Leaf::new(vec![0.5; 16], &[16], &device));
    let config = NormConfig::default();
    let forward = |precision: Precision| {
        let mut statistics = Statistics::new([("bn", 16)], &device);
        let mode = Mode::Train(&mut statistics, Ranks::SINGLE);
        let mut ctx = ForwardContext::new(&params, &config, precision, mode);
        let x = Tensor::from_data(TensorData::new(noise(2, 4 * 6 * 6 * 8), [4, 6, 6, 8]), &device);
        let y = composed(&mut ctx, &layer, x, Epilogue::Relu);
        assert_eq!(FloatDType::from(y.dtype()), precision.dtype());
        let running = statistics.get("bn").clone();
        assert_eq!(FloatDType::from(running.var.dtype()), FloatDType::F32);
        (host(y.cast(FloatDType::F32)), host(running.mean))
    };
    let (exact, mean) = forward(Precision::F32);
    for precision in half_precisions() {
        let (rounded, rounded_mean) = forward(precision);
        // Values up to about 4, sums of 72 products; some devices round the sums as well.
        let tolerance = if precision == Precision::F16 { 2e-2 } else { 8e-2 };
        let error = max_difference(&exact, &rounded);
        assert!(error < tolerance, "{precision:?}: {error}");
        assert!(error > 0.0, "{precision:?} was not used");
        assert!(max_difference(&mean, &rounded_mean) < tolerance, "{precision:?}: the norm is not in f32");
    }
}

/// Loss and gradient of the whole network, on devices without kernels.
#[test]
fn half_precision_gradient_matches_f32_in_direction() {
    if device::has_kernels(&device()) {
        return; // method.rs tests the kernels
    }
    let gradient = |precision: Precision| {
        let (plan, data) = plan(&[&format!("train.precision={}", precision.name()), "views.placement=device"]);
        let (mut byol, mut stepper) = (plan.initial_state(&device()), plan.stepper());
        assert_eq!(stepper.loss_scale.is_some(), precision == Precision::F16);
        let (v, v2) = to_device(loader(&plan, &data, 1).next_batch().unwrap(), &device());
        let before = byol.online.params.norm();
        // The initial loss scale of f16 is too high on purpose, and halves at every overflow.
        let gradient = loop {
            let mut probe = byol.clone();
            let scale = stepper.loss_scale.map_or(1.0, |scale| scale.factor);
            let loss = probe.loss(v.clone(), v2.clone());
            let gradient = (loss.to_f64(), loss.gradient(scale));
            let views = || Ok::<_, ()>((v.clone(), v2.clone()));
            if !stepper.step(&mut byol, views, |_| ()).unwrap().1 {
                break gradient;
            }
            assert!(precision == Precision::F16 && byol.k < 12, "{precision:?}: the gradient is never finite");
            assert_eq!(byol.online.params.norm(), before);
        };
        println!("{precision:?}: loss {}, scale {:?} after {} steps", gradient.0, stepper.loss_scale, byol.k);
        assert!(byol.online.params.norm() != before, "{precision:?}: the weights are unchanged");
        (gradient.0, gradient.1.iter().flat_map(|(_, leaf)| leaf.to_vec()).collect::<Vec<f32>>())
    };
    let (loss, exact) = gradient(Precision::F32);
    let precisions = half_precisions();
    println!("precisions of this device: {precisions:?}");
    for precision in precisions {
        let (rounded_loss, rounded) = gradient(precision);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let cosine = dot(&exact, &rounded) / (dot(&exact, &exact) * dot(&rounded, &rounded)).sqrt();
        assert!((loss - rounded_loss).abs() < 0.02 * loss, "{precision:?}: loss {rounded_loss}, f32 {loss}");
        println!("{precision:?}: cosine {cosine}");
        // An untrained network amplifies rounding: with exact sums bf16 has 0.90 and f16 0.99
        // (docs/how-to/devices.md).
        assert!(cosine > 0.85, "{precision:?}: cosine {cosine}");
    }
}

#[test]
fn overflow_skips_the_update() {
    let (plan, data) = plan(&[]);
    let mut byol = plan.initial_state(&device());
    let before = byol.online.params.iter().next().unwrap().1.to_vec();
    // With this scale the loss itself overflows.
    let loss_scale = Some(LossScale { factor: 2.0f64.powi(127), steady: 0 });
    let mut stepper = Stepper { loss_scale, ..plan.stepper() };
    let views = || Ok::<_, ()>(to_device(loader(&plan, &data, 1).next_batch().unwrap(), &device()));
    let (_, skipped) = stepper.step(&mut byol, views, |_| ()).unwrap();
    assert!(skipped);
    assert_eq!((byol.k, byol.optimizer.t), (1, 0));
    assert_eq!(stepper.loss_scale, Some(LossScale { factor: 2.0f64.powi(126), steady: 0 }));
    assert_eq!(byol.online.params.iter().next().unwrap().1.to_vec(), before);
}

#[test]
fn resume_with_augmentation_on_the_device_is_bit_identical() {
    let f16 = half_precisions().contains(&Precision::F16) && !device::has_kernels(&device());
    let precision = if f16 { "train.precision=f16" } else { "train.precision=f32" };
    let (plan, data) =
        plan(&["views.placement=device", "train.batch=16", "train.epochs=2", "health.images=0", precision]);
    let (folder, context) = (tempfile::tempdir().unwrap(), RunContext::single_process(device(), 1));
    let train = |name: &str, until: u64| {
        let folder = folder.path().join(name);
        let mut run = match folder.exists() {
            true => Run::resume(&folder, plan.clone(), &data, context.clone()).unwrap(),
            false => Run::create(&folder, plan.clone(), &data, context.clone(), false).unwrap(),
        };
        let (stop, mut losses) = (AtomicBool::new(false), Vec::new());
        let outcome = run.run(&stop, |event| {
            if let Event::Step { step, stats, skipped, .. } = event {
                losses.push((stats.loss, skipped));
                stop.store(step == until, Ordering::Relaxed);
            }
        });
        outcome.unwrap();
        (losses, run.loss_scale())
    };
    let total = plan.schedule.total;
    let (whole, scale) = train("whole", total);
    let mut parts = train("parts", 3).0;
    let (rest, resumed_scale) = train("parts", total);
    parts.extend(rest);
    assert_eq!((whole.len() as u64, scale), (total, resumed_scale));
    assert_eq!(scale.is_some(), f16);
    assert_eq!(whole, parts, "bit-identical losses");
}
