//! What a device computes of Burn's own operations: views finished on it, norms over several ranks, 16 bits. On the CPU as far as its
//! tensors go, and with `BYOL_TEST_DEVICE=wgpu` on a GPU.

mod common;

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
};

use burn::tensor::{FloatDType, Tensor, TensorData};
use byol::{
    data::{Loader, prefetch::Request, synthetic},
    device::{self, Precision},
    finish::finish,
    nn::{
        Leaf, Mode, NormConfig, Pass, Statistics, Tree,
        conv_norm_act::{ConvNorm, Then, composed},
        tree::host,
    },
    optim::LossScale,
    random::{self, uniform},
    ranks::{Ranks, threads},
    train::{Event, Place, Plan, Prepared, Recipe, Run, feed, recipe::Draft, run::tensors},
    views::Policy,
};
use common::device;

fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = random::stream(&[seed]);
    (0..n).map(|_| uniform(&mut rng) as f32).collect()
}

fn farthest(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn plan(more: &[&str]) -> (Plan, Prepared) {
    let recipe = Recipe::default();
    let data = Prepared::new(synthetic::dataset(3, 64, 48), 0, &recipe.health, 1 << 30, &|_| ()).unwrap();
    let mut draft = Draft::from_recipe("auto").unwrap();
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
    settings.iter().chain(more).for_each(|s| draft.set(s).unwrap());
    let plan = Plan::new("test", draft.over(&Recipe::default()).unwrap(), &data, "cpu").unwrap();
    (plan, data)
}

fn loader(plan: &Plan, data: &Prepared, last: u64) -> Loader {
    let place = Place::alone(device(), 2);
    Loader::start(Request { last, ..feed::request(plan, &data.train, &place) })
}

#[test]
fn views_finished_on_the_device_are_those_of_the_host() {
    // Blur is of one pixel to each side at 32 px, of two at 48; grey images have no hue.
    for (size, more) in [(32, "views.first.jitter=1"), (48, "views.second.blur=0.5"), (16, "views.second.grey=0.5")] {
        let size = format!("views.size={size}");
        let batches = ["cpu", "device"].map(|whose| {
            let (plan, data) = plan(&[&size, more, &format!("views.finish={whose}")]);
            let batch = loader(&plan, &data, 1).next_batch().unwrap();
            assert_eq!(batch.rest.is_some(), whose == "device");
            let (v, v2) = tensors(batch, &device());
            [host(v), host(v2)]
        });
        let [on_host, on_device] = batches;
        for (a, b) in on_host.iter().zip(&on_device) {
            assert!(farthest(a, b) < 1e-4, "{size}: {}", farthest(a, b));
        }
    }
}

#[test]
fn images_that_draw_nothing_stay() {
    let crops = noise(1, 2 * 3 * 32 * 32);
    let mut rng = random::stream(&[2]);
    let policy = Policy { flip: 0.0, ..Policy::crop_and_flip() };
    let draws = [0, 1].map(|_| policy.draw(&mut rng, 40, 40));
    let x = Tensor::from_data(TensorData::new(crops.clone(), [2, 3, 32, 32]), &device());
    assert_eq!(host(finish(x, &draws)), crops);
}

/// y and the gradients by x, γ and β of Σ y · t, of the rows that this rank has.
fn norm(ranks: Ranks, x: &[f32], t: &[f32], c: usize) -> [Vec<f32>; 4] {
    let (device, config) = (device(), NormConfig::default());
    let matrix = |v: &[f32]| Tensor::<2>::from_data(TensorData::new(v.to_vec(), [v.len() / c, c]), &device);
    let mut params = Tree::new();
    params.insert("bn.weight", Leaf::new(noise(5, c), &[c], &device));
    params.insert("bn.bias", Leaf::new(noise(6, c), &[c], &device));
    let params = params.tracked();
    let mut statistics = Statistics::new([("bn", c)], &device);
    let mode = Mode::Train(&mut statistics, ranks);
    let mut pass = Pass { params: &params, norm: &config, precision: Precision::F32, mode };
    let x = matrix(x).autodiff().require_grad();
    let y = pass.batch_norm("bn", x.clone());
    let mut grads = (y.clone() * matrix(t).autodiff()).sum().backward();
    let of_weights = params.gradients(&mut grads);
    let of = |name: &str| of_weights.leaf(name).unwrap().to_vec();
    let dx = x.grad_remove(&mut grads).unwrap();
    [host(y), host(dx), of("bn.weight"), of("bn.bias")]
}

#[test]
fn a_norm_over_two_ranks_is_that_of_all_rows() {
    const C: usize = 3;
    let (x, t) = (noise(3, 8 * C), noise(4, 8 * C));
    let [y, dx, dgamma, dbeta] = norm(Ranks::ALONE, &x, &t, C);
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
    assert!(farthest(&y, &joined(0)) < 1e-5);
    assert!(farthest(&dx, &joined(1)) < 1e-5, "{dx:?} and {:?}", joined(1));
    assert!(farthest(&dgamma, &summed(2)) < 1e-5 && farthest(&dbeta, &summed(3)) < 1e-5);
}

/// The precisions of 16 bits that the device under test has.
fn of_16_bits() -> Vec<Precision> {
    let all = [Precision::Bf16, Precision::F16];
    match device::has_kernels(&device()) {
        true => all.to_vec(), // its tensors have both, its kernels the one at most
        false => all.into_iter().filter(|p| device::check(&device(), *p).is_ok()).collect(),
    }
}

#[test]
fn a_layer_of_16_bits_keeps_them_and_norms_in_f32() {
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
        let mode = Mode::Train(&mut statistics, Ranks::ALONE);
        let mut pass = Pass { params: &params, norm: &config, precision, mode };
        let x = Tensor::from_data(TensorData::new(noise(2, 4 * 6 * 6 * 8), [4, 6, 6, 8]), &device);
        let y = composed(&mut pass, &layer, x, Then::Relu);
        assert_eq!(FloatDType::from(y.dtype()), precision.dtype());
        let running = statistics.get("bn").clone();
        assert_eq!(FloatDType::from(running.var.dtype()), FloatDType::F32);
        (host(y.cast(FloatDType::F32)), host(running.mean))
    };
    let (exact, mean) = forward(Precision::F32);
    for precision in of_16_bits() {
        let (coarse, of_batch) = forward(precision);
        // Values up to about 4, of 72 products; some devices round their sums too.
        let (off, least) = (farthest(&exact, &coarse), if precision == Precision::F16 { 2e-2 } else { 8e-2 });
        assert!(off < least, "{precision:?}: {off}");
        assert!(off > 0.0 && farthest(&mean, &of_batch) < least, "{precision:?} is not f32");
    }
}

/// Loss and gradient of a batch on a device without kernels, as a whole network gives them.
#[test]
fn a_step_of_16_bits_points_where_that_of_f32_does() {
    if device::has_kernels(&device()) {
        return; // its kernels have tests of their own (tests/method.rs)
    }
    let gradient = |precision: Precision| {
        let (plan, data) = plan(&[&format!("train.precision={}", precision.name()), "views.finish=device"]);
        let mut byol = plan.start(&device());
        assert_eq!(byol.scale.is_some(), precision == Precision::F16);
        let (v, v2) = tensors(loader(&plan, &data, 1).next_batch().unwrap(), &device());
        let before = byol.online.params.norm();
        // With f16 the scale of the loss begins too high on purpose, and comes down by a half a step.
        let gradient = loop {
            let gradient = byol.gradient(v.clone(), v2.clone(), |_| ());
            if !byol.update(&gradient).skipped {
                break gradient;
            }
            assert!(precision == Precision::F16 && byol.k < 12, "{precision:?}: no gradient is finite");
            assert_eq!(byol.online.params.norm(), before);
        };
        println!("{precision:?}: loss {}, scale {:?} after {} steps", gradient.loss, byol.scale, byol.k);
        assert!(byol.online.params.norm() != before, "{precision:?} moves");
        let all: Vec<f32> = gradient.grads.iter().flat_map(|(_, leaf)| leaf.to_vec()).collect();
        (gradient.loss, all)
    };
    let (loss, exact) = gradient(Precision::F32);
    let tested = of_16_bits();
    println!("precisions of this device: {tested:?}");
    for precision in tested {
        let (coarse_loss, coarse) = gradient(precision);
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let cosine = dot(&exact, &coarse) / (dot(&exact, &exact) * dot(&coarse, &coarse)).sqrt();
        assert!((loss - coarse_loss).abs() < 0.02 * loss, "{precision:?}: loss {coarse_loss}, of f32 {loss}");
        println!("{precision:?}: cosine {cosine}");
        // A fresh network turns roundings into much: with exact sums bf16 has 0.90 and f16 0.99 (docs/how-to/devices.md).
        assert!(cosine > 0.85, "{precision:?}: cosine {cosine}");
    }
}

#[test]
fn a_gradient_beyond_f16_leaves_the_weights() {
    let (plan, _) = plan(&["train.precision=f16"]);
    let mut byol = plan.start(&device());
    let before = byol.online.params.iter().next().unwrap().1.to_vec();
    let grads = byol.online.params.map(|_, w| w.full_like(f32::INFINITY));
    let report = byol.update(&byol::byol::Gradient { loss: 1.0, grads });
    assert!(report.skipped);
    assert_eq!((byol.k, byol.optimizer.t), (1, 0));
    assert_eq!(byol.scale, Some(LossScale { factor: 32_768.0, steady: 0 }));
    assert_eq!(byol.online.params.iter().next().unwrap().1.to_vec(), before);
}

#[test]
fn a_run_with_views_on_the_device_goes_on_where_it_was() {
    let f16 = of_16_bits().contains(&Precision::F16) && !device::has_kernels(&device());
    let precision = if f16 { "train.precision=f16" } else { "train.precision=f32" };
    let (plan, data) = plan(&["views.finish=device", "train.batch=16", "train.epochs=2", "health.images=0", precision]);
    let (folder, place) = (tempfile::tempdir().unwrap(), Place::alone(device(), 1));
    let walk = |name: &str, until: u64| {
        let folder = folder.path().join(name);
        let mut run = match folder.exists() {
            true => Run::resume(&folder, plan.clone(), &data, place.clone()).unwrap(),
            false => Run::create(&folder, plan.clone(), &data, place.clone(), false).unwrap(),
        };
        let (stop, mut losses) = (AtomicBool::new(false), Vec::new());
        let outcome = run.go(&stop, |event| {
            if let Event::Step { step, report, .. } = event {
                losses.push((report.loss, report.skipped));
                stop.store(step == until, Ordering::Relaxed);
            }
        });
        outcome.unwrap();
        (losses, run.byol.scale)
    };
    let total = plan.schedule.total;
    let (whole, scale) = walk("whole", total);
    let mut parts = walk("parts", 3).0;
    let (rest, scale_of_parts) = walk("parts", total);
    parts.extend(rest);
    assert_eq!((whole.len() as u64, scale), (total, scale_of_parts));
    assert_eq!(scale.is_some(), f16);
    assert_eq!(whole, parts, "to the bit");
}
