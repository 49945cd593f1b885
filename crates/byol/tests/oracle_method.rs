//! The oracle for the method: schedules, optimisers, loss, batch norm, networks, six whole steps. Golden values of an independent
//! double-precision implementation, `golden/` in the repository's root.

mod common;

use burn::tensor::{Tensor, TensorData};
use byol::{
    byol::{Byol, Objective, distance, negatives},
    nn::{
        Init, Leaf, Mlp, Mode, Network, NormConfig, Normalization, Pass, Precision, Running, Statistics, Tree, Weights,
        resnet::{Architecture, Block, ResNet, Stem},
        tree::host,
    },
    optim::{AdamW, Lars, Optimizer, Rule, Schedule, Sgd},
    ranks::Ranks,
};
use common::{Case, case, cases, close, device};

/// Batch norm by the fixtures' convention: averages from 0 and 1 with momentum 0.1, not debiased.
fn plain_norm() -> NormConfig {
    NormConfig { debias: false, ..NormConfig::default() }
}

/// The leaves `PREFIX NAME` of a case for these names and shapes.
fn tree(case: &Case, prefix: &str, shapes: &[(String, Vec<usize>)]) -> Tree {
    let mut tree = Tree::new();
    for (name, shape) in shapes {
        let key = format!("{prefix}{name}");
        assert_eq!(case.shape(&key), shape, "{key}");
        tree.insert(name, Leaf::new(case.f32(&key), shape, &device()));
    }
    tree
}

#[test]
fn schedules() {
    for case in cases("schedule_") {
        let s = Schedule {
            peak: case.number("base_lr") * case.number("batch") / 256.0,
            warmup: case.number("warmup_steps") as u64,
            total: case.number("total_steps") as u64,
            tau_base: case.number("base_tau"),
            tau_stays: false,
        };
        let steps = case.f64("step");
        case.check("lr", &steps.iter().map(|k| s.eta(*k as u64)).collect::<Vec<_>>());
        case.check("tau", &steps.iter().map(|k| s.tau(*k as u64)).collect::<Vec<_>>());
    }
}

/// Runs an optimiser over a case's gradients and compares parameters and, at the end, the state.
fn check_optimizer(case: &Case, rule: Rule, steps: usize, eta: impl Fn(usize) -> f64, slots: &[&str]) {
    let names: Vec<String> = case.keys().filter_map(|k| k.strip_prefix("p0.").map(str::to_owned)).collect();
    let read = |prefix: &str| {
        let mut tree = Tree::new();
        for name in &names {
            let key = format!("{prefix}{name}");
            // The small cases call a weight `w` and a bias `b`; nothing is excluded in them.
            tree.insert(name, Leaf::new(case.f32(&key), case.shape(&key), &device()));
        }
        tree
    };
    let mut params = read("p0.");
    let mut optimizer = Optimizer::new(rule, &params);
    for step in 0..steps {
        (params, _) = optimizer.step(&params, &Tree::new(), &read(&format!("g{step}.")), eta(step), 1.0);
        for (name, leaf) in params.iter() {
            let key = format!("p{}.{name}", step + 1);
            if case.has(&key) {
                case.check(&key, &leaf.to_vec());
            }
        }
    }
    for (slot, state) in slots.iter().zip(&optimizer.state) {
        for (name, leaf) in state.iter() {
            let key = format!("{slot}{steps}.{name}");
            if case.has(&key) {
                case.check(&key, &leaf.to_vec());
            }
        }
    }
}

#[test]
fn lars() {
    for case in cases("lars_") {
        let rule = Lars {
            momentum: case.number("momentum"),
            weight_decay: case.number("weight_decay"),
            trust: case.number("eta"),
            clip_lr: false,
        };
        let lr = case.f64("lr").to_vec();
        check_optimizer(&case, Rule::Lars(rule), 5, |k| lr[k], &["v"]);
    }
}

#[test]
fn sgd() {
    for case in cases("sgd_") {
        let rule = Sgd {
            momentum: case.number("momentum"),
            weight_decay: case.number("weight_decay"),
            nesterov: case.flag("nesterov"),
        };
        check_optimizer(&case, Rule::Sgd(rule), 3, |_| case.number("lr"), &["v"]);
    }
}

#[test]
fn adamw() {
    for case in cases("adamw_") {
        let rule = AdamW {
            beta1: case.number("beta1"),
            beta2: case.number("beta2"),
            eps: case.number("eps"),
            weight_decay: case.number("weight_decay"),
        };
        check_optimizer(&case, Rule::Adamw(rule), 3, |_| case.number("lr"), &["m", "v"]);
    }
}

#[test]
fn moving_average() {
    for case in cases("ema_") {
        let read = |key: &str| {
            let mut tree = Tree::new();
            tree.insert("w", Leaf::new(case.f32(key), case.shape(key), &device()));
            tree
        };
        // A step of 0: θ stays, and ξ moves towards it.
        let (theta, still) = (read("online"), Sgd { momentum: 0.0, weight_decay: 0.0, nesterov: false });
        let mut optimizer = Optimizer::new(Rule::Sgd(still), &theta);
        let (_, xi) = optimizer.step(&theta, &read("target"), &theta, 0.0, case.number("tau"));
        case.check("new_target", &xi.leaf("w").unwrap().to_vec());
    }
}

#[test]
fn loss_and_its_gradient() {
    for case in cases("regression_") {
        let device = device();
        let q = case.tensor::<2>("prediction", &device).autodiff().require_grad();
        let loss = distance(q.clone(), case.tensor::<2>("target", &device).autodiff());
        case.check("loss", &host(loss.clone()));
        let mut grads = (loss * case.tensor::<1>("upstream", &device).autodiff()).sum().backward();
        let got = host(q.grad_remove(&mut grads).unwrap());
        // Two rows have gradients of order 1e6, so row by row.
        let d = case.shape("prediction")[1];
        for (row, (g, w)) in got.chunks(d).zip(case.f64("grad_prediction").chunks(d)).enumerate() {
            close(&format!("{} gradient, row {row}", case.name), g, w, case.rtol, case.atol);
        }
    }
    let case = case("byol_symmetric");
    let device = device();
    let constant = |key: &str| case.tensor::<2>(key, &device).autodiff();
    let tracked = |key: &str| constant(key).require_grad();
    let (q, q2, z, z2) = (tracked("p1"), tracked("p2"), constant("z1"), constant("z2"));
    let loss = (distance(q.clone(), z2.clone()) + distance(q2.clone(), z.clone())).mean();
    case.check("loss", &host(loss.clone()));
    let mut grads = loss.backward();
    case.check("grad_p1", &host(q.grad_remove(&mut grads).unwrap()));
    case.check("grad_p2", &host(q2.grad_remove(&mut grads).unwrap()));
}

/// The two-parameter loss: as in the paper's appendix; and with nothing but the projections on both sides, SimCLR's.
#[test]
fn negatives_of_the_batch() {
    let device = device();
    for case in cases("info_nce_") {
        let read = |key: &str| case.tensor::<2>(key, &device);
        let [q, q2, z, z2] = ["phi_v", "phi_w", "psi_v", "psi_w"].map(read);
        let mean = |t: Tensor<1>| f64::from(t.mean().into_scalar::<f32>());
        let side = |q: &Tensor<2>, z: &Tensor<2>, z2: &Tensor<2>| {
            let more = mean(negatives(q.clone(), z.clone(), z2.clone(), case.number("alpha")));
            // The objective, to be maximised: 2 cos − β · …, and the distance is 2 − 2 cos.
            2.0 - mean(distance(q.clone(), z2.clone())) - case.number("beta") * more
        };
        let (forward, backward) = (side(&q, &z, &z2), side(&q2, &z2, &z));
        case.check("forward", &[forward]);
        case.check("backward", &[backward]);
        case.check("symmetric", &[0.5 * (forward + backward)]);
    }
    for case in cases("nt_xent_") {
        let alpha = case.number("temperature");
        let read = |key: &str| case.tensor::<2>(key, &device).autodiff().require_grad();
        let (z, z2) = (read("z1"), read("z2"));
        let side = |a: &Tensor<2>, b: &Tensor<2>| {
            distance(a.clone(), b.clone()) + negatives(a.clone(), a.clone(), b.clone(), alpha)
        };
        let l = (side(&z, &z2) + side(&z2, &z)).mean();
        // Each side is 2 + 2α times NT-Xent of its anchors.
        let scaled = (l - 4.0).div_scalar(4.0 * alpha);
        case.check("loss", &host(scaled.clone()));
        let mut grads = scaled.backward();
        case.check("grad_z1", &host(z.grad_remove(&mut grads).unwrap()));
        case.check("grad_z2", &host(z2.grad_remove(&mut grads).unwrap()));
    }
}

#[test]
fn batch_norm() {
    let device = device();
    let one = |c: usize| Statistics::new([("bn", c)], &device);
    for name in ["bn_rows", "bn_pair", "bn_image", "bn_single_image", "bn_offset", "bn_wide"] {
        let case = case(name);
        let c = case.shape("gamma")[0];
        let rows = case.f64("x").len() / c;
        // Channel last to Burn's channel second: [rows, C] is both.
        let flat = |key: &str| Tensor::<2>::from_data(TensorData::new(case.f32(key), [rows, c]), &device);
        let mut params = Tree::new();
        params.insert("bn.weight", Leaf::new(case.f32("gamma"), &[c], &device));
        params.insert("bn.bias", Leaf::new(case.f32("beta"), &[c], &device));
        let params = params.tracked();
        let (mut statistics, norm) = (one(c), plain_norm());
        let x = flat("x").autodiff().require_grad();
        let mut pass = Pass {
            params: &params,
            norm: &norm,
            precision: Precision::F32,
            mode: Mode::Train(&mut statistics, Ranks::ALONE),
        };
        let y = pass.batch_norm("bn", x.clone());
        case.check("y", &host(y.clone()));
        let mut grads = (y * flat("dy").autodiff()).sum().backward();
        case.check("dx", &host(x.grad_remove(&mut grads).unwrap()));
        let g = params.gradients(&mut grads);
        case.check("dgamma", &g.leaf("bn.weight").unwrap().to_vec());
        case.check("dbeta", &g.leaf("bn.bias").unwrap().to_vec());
        case.check("running_mean", &host(statistics.get("bn").mean.clone()));
        case.check("running_var_biased", &host(statistics.get("bn").var.clone()));
    }

    let case_ = case("bn_debiased_ema");
    let (mut statistics, norm) = (one(3), NormConfig::default());
    let mut params = Tree::new();
    params.insert("bn.weight", Leaf::new(vec![1.0; 3], &[3], &device));
    params.insert("bn.bias", Leaf::new(vec![0.0; 3], &[3], &device));
    for t in 1..=3 {
        let mut pass = Pass {
            params: &params,
            norm: &norm,
            precision: Precision::F32,
            mode: Mode::Train(&mut statistics, Ranks::ALONE),
        };
        pass.batch_norm("bn", case_.tensor::<2>(&format!("x{t}"), &device));
        case_.check(&format!("mean{t}"), &host(statistics.get("bn").mean.clone()));
        case_.check(&format!("var{t}"), &host(statistics.get("bn").var.clone()));
    }

    let case = case("bn_eval");
    let mut params = Tree::new();
    params.insert("bn.weight", Leaf::new(case.f32("gamma"), &[4], &device));
    params.insert("bn.bias", Leaf::new(case.f32("beta"), &[4], &device));
    let mut statistics = Statistics::default();
    statistics
        .insert("bn", Running { mean: case.tensor("mean", &device), var: case.tensor("var", &device), batches: 1 });
    let mut pass = Pass { params: &params, norm: &norm, precision: Precision::F32, mode: Mode::Eval(&statistics) };
    let y = pass.batch_norm("bn", case.tensor::<4>("x", &device).permute([0, 3, 1, 2]));
    case.check("y", &host(y.permute([0, 2, 3, 1])));
}

fn check_resnet(name: &str, net: &ResNet) {
    let (case, device, norm) = (case(name), device(), plain_norm());
    let params = tree(&case, "param.", &net.shapes()).tracked();
    let mut statistics = net.statistics(&device);
    let nchw = case.tensor::<4>("x", &device).autodiff().require_grad();
    let x = nchw.clone().permute([0, 2, 3, 1]);
    let mut pass = Pass {
        params: &params,
        norm: &norm,
        precision: Precision::F32,
        mode: Mode::Train(&mut statistics, Ranks::ALONE),
    };
    let y = net.forward(&mut pass, x.clone());
    case.check("features_train", &host(y.clone()));

    let mut grads = (y * case.tensor::<2>("dfeatures", &device).autodiff()).sum().backward();
    case.check("grad_input", &host(nchw.grad_remove(&mut grads).unwrap()));
    let mut compared = 0;
    for (name, leaf) in params.gradients(&mut grads).iter() {
        let g = leaf.to_vec();
        let norm = g.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        case.check(&format!("grad_norm.{name}"), &[norm]);
        if case.has(&format!("grad.{name}")) {
            case.check(&format!("grad.{name}"), &g);
        } else {
            let some: Vec<f32> = g.iter().step_by(13).copied().collect();
            case.check(&format!("grad_every13.{name}"), &some);
        }
        compared += 1;
    }
    assert_eq!(compared, net.shapes().len());

    for (name, r) in statistics.iter() {
        case.check(&format!("stats.{name}.running_mean"), &host(r.mean.clone()));
        case.check(&format!("stats.{name}.running_var_biased"), &host(r.var.clone()));
    }
    let mut pass = Pass { params: &params, norm: &norm, precision: Precision::F32, mode: Mode::Eval(&statistics) };
    case.check("features_eval_biased", &host(net.forward(&mut pass, x)));
}

#[test]
fn resnet18_with_the_cifar_stem() {
    check_resnet("resnet18_cifar_w025", &ResNet::new(Architecture::Resnet18, 0.25, Stem::Cifar, 3));
}

#[test]
fn resnet50_with_the_imagenet_stem() {
    check_resnet("resnet50_imagenet_w0125", &ResNet::new(Architecture::Resnet50, 0.125, Stem::Imagenet, 3));
}

#[test]
fn parameter_counts() {
    let case = case("parameter_counts");
    for row in case.f64("rows").chunks(7) {
        let [depth, width, own, features, encoder, projector, predictor] = row else { panic!("seven columns") };
        let architecture = Architecture::ALL.into_iter().find(|a| a.name() == format!("resnet{depth}")).unwrap();
        let net = ResNet::new(architecture, *width, Stem::Imagenet, 3);
        let count =
            |shapes: Vec<(String, Vec<usize>)>| shapes.iter().map(|(_, s)| s.iter().product::<usize>()).sum::<usize>();
        let mlp = |d_in| Mlp { name: "mlp", d_in, hidden: 4096, d_out: 256, init: Init::Reference };
        assert_eq!(net.features(), *features as usize);
        assert_eq!(count(mlp(net.features()).shapes()), *projector as usize);
        assert_eq!(count(mlp(256).shapes()), *predictor as usize);
        // Rows of the reference's own projection in the first group differ from torchvision's for basic blocks.
        if *own == 0.0 || *depth >= 50.0 {
            assert_eq!(count(net.shapes()), *encoder as usize, "resnet{depth} {width}x");
        }
    }
}

#[test]
fn six_steps_of_training() {
    let (case, device) = (case("byol_trajectory"), device());
    let encoder = ResNet::custom(Block::Basic, [1, 1, 1, 1], [8, 16, 16, 32], Stem::Cifar, 3);
    let mlp = |name, d_in| {
        let shape = case.shape(&format!("online0.{name}.fc1.weight"));
        let d_out = case.shape(&format!("online0.{name}.fc2.weight"))[0];
        assert_eq!(shape[1], d_in);
        Mlp { name, d_in, hidden: shape[0], d_out, init: Init::Reference }
    };
    let projector = mlp("projector", encoder.features());
    let predictor = mlp("predictor", projector.d_out);
    let network = Network {
        projector,
        predictor,
        encoder,
        normalization: Normalization::default(),
        norm: plain_norm(),
        precision: Precision::F32,
        ranks: Ranks::ALONE,
    };

    let of_encoder = [network.encoder.shapes(), network.projector.shapes()].concat();
    let all = [of_encoder.clone(), network.predictor.shapes()].concat();
    let mut online = network.init(0, "online", true, &device);
    let mut target = network.init(0, "target", false, &device);
    online.params = tree(&case, "online0.", &all);
    target.params = tree(&case, "target0.", &of_encoder);
    let rule = Lars {
        momentum: case.number("momentum"),
        weight_decay: case.number("weight_decay"),
        trust: case.number("eta"),
        clip_lr: false,
    };
    let schedule = Schedule {
        peak: case.number("base_lr") * case.number("batch") / 256.0,
        warmup: case.number("warmup") as u64,
        total: case.number("steps") as u64,
        tau_base: case.number("base_tau"),
        tau_stays: false,
    };
    let optimizer = Optimizer::new(Rule::Lars(rule), &online.params);
    let mut byol = Byol {
        network,
        objective: Objective::default(),
        online,
        target,
        optimizer,
        schedule,
        k: 0,
        ranks: Ranks::ALONE,
        scale: None,
    };

    let [steps, _, n, h, w, c] = *case.shape("views") else { panic!("six axes") };
    let views: Vec<f32> = case.f32("views").iter().map(|v| v / 255.0).collect();
    let view = |step: usize, which: usize| {
        let size = n * h * w * c;
        let from = (2 * step + which) * size;
        Tensor::<4>::from_data(TensorData::new(views[from..from + size].to_vec(), [n, h, w, c]), &device)
    };
    let (mut loss, mut eta, mut tau) = (vec![], vec![], vec![]);
    for step in 0..steps {
        let gradient = byol.gradient(view(step, 0), view(step, 1), |_| ());
        if step == 0 {
            for (name, leaf) in gradient.grads.iter() {
                case.check(&format!("grad0.{name}"), &leaf.to_vec());
            }
        }
        let report = byol.update(&gradient);
        loss.push(report.loss);
        eta.push(report.eta);
        tau.push(report.tau);
    }
    case.check("loss", &loss);
    case.check("lr", &eta);
    case.check("tau", &tau);
    let check = |prefix: &str, tree: &Tree| {
        for (name, leaf) in tree.iter() {
            case.check(&format!("{prefix}{name}"), &leaf.to_vec());
        }
    };
    check("online_final.", &byol.online.params);
    check("target_final.", &byol.target.params);
    for (prefix, weights) in [("online_stats.", &byol.online), ("target_stats.", &byol.target)] {
        for (name, r) in Weights::clone(weights).statistics.iter() {
            case.check(&format!("{prefix}{name}.running_mean"), &host(r.mean.clone()));
            case.check(&format!("{prefix}{name}.running_var_biased"), &host(r.var.clone()));
        }
    }
}
