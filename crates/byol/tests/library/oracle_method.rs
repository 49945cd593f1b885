//! Golden tests of the method: schedules, optimizers, loss, batch norm, networks and six training
//! steps against an independent double-precision implementation (`golden/`).

use std::sync::Arc;

use crate::common::{Case, case, cases, close, device};
use burn::tensor::{Tensor, TensorData};
use byol::{
    byol::{Byol, regression_loss},
    nn::{
        ForwardContext, Init, Leaf, Mlp, Mode, Network, NormConfig, Normalization, Precision, RunningStats, Statistics,
        Tree, Weights,
        resnet::{Architecture, Block, ResNet, Stem},
        tree::host,
    },
    objective::negatives,
    optim::{AdamW, Lars, Optimizer, Rule, Schedule, Sgd, target},
    ranks::Ranks,
};

/// Batch norm of the fixtures: running averages start at 0 and 1, momentum 0.1, not debiased.
fn plain_norm() -> NormConfig {
    NormConfig { debias: false, ..NormConfig::default() }
}

/// Reads the tensors `PREFIX NAME` of a case for these names and shapes.
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
fn schedules_match_the_oracle() {
    for case in cases("schedule_") {
        let s = Schedule {
            peak: case.number("base_lr") * case.number("batch") / 256.0,
            warmup: case.number("warmup_steps") as u64,
            total: case.number("total_steps") as u64,
            tau_base: case.number("base_tau"),
            constant_tau: false,
        };
        let steps = case.f64("step");
        case.check("lr", &steps.iter().map(|k| s.eta(*k as u64)).collect::<Vec<_>>());
        case.check("tau", &steps.iter().map(|k| s.tau(*k as u64)).collect::<Vec<_>>());
    }
}

/// Runs an optimizer on the gradients of a case. Compares the parameters, and the state at the end.
fn check_optimizer(case: &Case, rule: Rule, steps: usize, eta: impl Fn(usize) -> f64, slots: &[&str]) {
    let names: Vec<String> = case.keys().filter_map(|k| k.strip_prefix("p0.").map(str::to_owned)).collect();
    let read = |prefix: &str| {
        let mut tree = Tree::new();
        for name in &names {
            let key = format!("{prefix}{name}");
            // The small cases have a weight `w` and a bias `b`; neither is excluded.
            tree.insert(name, Leaf::new(case.f32(&key), case.shape(&key), &device()));
        }
        tree
    };
    let mut params = read("p0.");
    let mut optimizer = Optimizer::new(rule, &params);
    for step in 0..steps {
        params = optimizer.step(&params, &read(&format!("g{step}.")), eta(step));
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
fn lars_step_matches_the_oracle() {
    for case in cases("lars_") {
        let rule = Lars {
            momentum: case.number("momentum"),
            weight_decay: case.number("weight_decay"),
            trust_coefficient: case.number("eta"),
            clip_lr: false,
        };
        let lr = case.f64("lr").to_vec();
        check_optimizer(&case, Rule::Lars(rule), 5, |k| lr[k], &["v"]);
    }
}

#[test]
fn sgd_step_matches_the_oracle() {
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
fn adamw_step_matches_the_oracle() {
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
fn moving_average_matches_the_oracle() {
    for case in cases("ema_") {
        let read = |key: &str| {
            let mut tree = Tree::new();
            tree.insert("w", Leaf::new(case.f32(key), case.shape(key), &device()));
            tree
        };
        let xi = target::ema(&read("target"), &read("online"), case.number("tau"));
        case.check("new_target", &xi.leaf("w").unwrap().to_vec());
    }
}

#[test]
fn loss_and_its_gradient_match_the_oracle() {
    for case in cases("regression_") {
        let device = device();
        let q = case.tensor::<2>("prediction", &device).autodiff().require_grad();
        let loss = regression_loss(q.clone(), case.tensor::<2>("target", &device).autodiff());
        case.check("loss", &host(loss.clone()));
        let mut grads = (loss * case.tensor::<1>("upstream", &device).autodiff()).sum().backward();
        let got = host(q.grad_remove(&mut grads).unwrap());
        // Row by row, since two rows have gradients of order 1e6.
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
    let loss = (regression_loss(q.clone(), z2.clone()) + regression_loss(q2.clone(), z.clone())).mean();
    case.check("loss", &host(loss.clone()));
    let mut grads = loss.backward();
    case.check("grad_p1", &host(q.grad_remove(&mut grads).unwrap()));
    case.check("grad_p2", &host(q2.grad_remove(&mut grads).unwrap()));
}

/// The loss with α and β of the paper's appendix, and with projections on both sides that of
/// SimCLR.
#[test]
fn negatives_match_the_oracle() {
    let device = device();
    for case in cases("info_nce_") {
        let read = |key: &str| case.tensor::<2>(key, &device);
        let [q, q2, z, z2] = ["phi_v", "phi_w", "psi_v", "psi_w"].map(read);
        let mean = |t: Tensor<1>| f64::from(t.mean().into_scalar::<f32>());
        let side = |q: &Tensor<2>, z: &Tensor<2>, z2: &Tensor<2>| {
            let negatives = mean(negatives(q.clone(), z.clone(), z2.clone(), case.number("alpha")));
            // The objective to maximize is 2 cos − β · …, and the regression loss 2 − 2 cos.
            2.0 - mean(regression_loss(q.clone(), z2.clone())) - case.number("beta") * negatives
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
            regression_loss(a.clone(), b.clone()) + negatives(a.clone(), a.clone(), b.clone(), alpha)
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
fn batch_norm_matches_the_oracle() {
    let device = device();
    let initial = |c: usize| Statistics::new([("bn", c)], &device);
    for name in ["bn_rows", "bn_pair", "bn_image", "bn_single_image", "bn_offset", "bn_wide"] {
        let case = case(name);
        let c = case.shape("gamma")[0];
        let rows = case.f64("x").len() / c;
        // [rows, C] has the channels both last and second.
        let flat = |key: &str| Tensor::<2>::from_data(TensorData::new(case.f32(key), [rows, c]), &device);
        let mut params = Tree::new();
        params.insert("bn.weight", Leaf::new(case.f32("gamma"), &[c], &device));
        params.insert("bn.bias", Leaf::new(case.f32("beta"), &[c], &device));
        let params = params.tracked();
        let (mut statistics, norm) = (initial(c), plain_norm());
        let x = flat("x").autodiff().require_grad();
        let mut ctx = ForwardContext::new(&params, &norm, Precision::F32, Mode::Train(&mut statistics, Ranks::SINGLE));
        let y = ctx.batch_norm("bn", x.clone());
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
    let (mut statistics, norm) = (initial(3), NormConfig::default());
    let mut params = Tree::new();
    params.insert("bn.weight", Leaf::new(vec![1.0; 3], &[3], &device));
    params.insert("bn.bias", Leaf::new(vec![0.0; 3], &[3], &device));
    for t in 1..=3 {
        let mut ctx = ForwardContext::new(&params, &norm, Precision::F32, Mode::Train(&mut statistics, Ranks::SINGLE));
        ctx.batch_norm("bn", case_.tensor::<2>(&format!("x{t}"), &device));
        case_.check(&format!("mean{t}"), &host(statistics.get("bn").mean.clone()));
        case_.check(&format!("var{t}"), &host(statistics.get("bn").var.clone()));
    }

    let case = case("bn_eval");
    let mut params = Tree::new();
    params.insert("bn.weight", Leaf::new(case.f32("gamma"), &[4], &device));
    params.insert("bn.bias", Leaf::new(case.f32("beta"), &[4], &device));
    let mut statistics = Statistics::default();
    statistics.insert(
        "bn",
        RunningStats { mean: case.tensor("mean", &device), var: case.tensor("var", &device), batches: 1 },
    );
    let mut ctx = ForwardContext::new(&params, &norm, Precision::F32, Mode::Eval(&statistics));
    let y = ctx.batch_norm("bn", case.tensor::<4>("x", &device).permute([0, 3, 1, 2]));
    case.check("y", &host(y.permute([0, 2, 3, 1])));
}

fn check_resnet(name: &str, net: &ResNet) {
    let (case, device, norm) = (case(name), device(), plain_norm());
    let params = tree(&case, "param.", &net.shapes()).tracked();
    let mut statistics = net.statistics(&device);
    let nchw = case.tensor::<4>("x", &device).autodiff().require_grad();
    let x = nchw.clone().permute([0, 2, 3, 1]);
    let mut ctx = ForwardContext::new(&params, &norm, Precision::F32, Mode::Train(&mut statistics, Ranks::SINGLE));
    let y = net.forward(&mut ctx, x.clone());
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
            let every_13th: Vec<f32> = g.iter().step_by(13).copied().collect();
            case.check(&format!("grad_every13.{name}"), &every_13th);
        }
        compared += 1;
    }
    assert_eq!(compared, net.shapes().len());

    for (name, r) in statistics.iter() {
        case.check(&format!("stats.{name}.running_mean"), &host(r.mean.clone()));
        case.check(&format!("stats.{name}.running_var_biased"), &host(r.var.clone()));
    }
    let mut ctx = ForwardContext::new(&params, &norm, Precision::F32, Mode::Eval(&statistics));
    case.check("features_eval_biased", &host(net.forward(&mut ctx, x)));
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
fn parameter_counts_match_the_oracle() {
    let case = case("parameter_counts");
    for row in case.f64("rows").chunks(7) {
        let [depth, width, projection, features, encoder, projector, predictor] = row else { panic!("seven columns") };
        let architecture = Architecture::ALL.into_iter().find(|a| a.name() == format!("resnet{depth}")).unwrap();
        let net = ResNet::new(architecture, *width, Stem::Imagenet, 3);
        let count =
            |shapes: Vec<(String, Vec<usize>)>| shapes.iter().map(|(_, s)| s.iter().product::<usize>()).sum::<usize>();
        let mlp = |d_in| Mlp { name: "mlp", d_in, hidden: 4096, d_out: 256, init: Init::Reference };
        assert_eq!(net.features(), *features as usize);
        assert_eq!(count(mlp(net.features()).shapes()), *projector as usize);
        assert_eq!(count(mlp(256).shapes()), *predictor as usize);
        // With the reference's projection in the first group, basic blocks differ from
        // torchvision's.
        if *projection == 0.0 || *depth >= 50.0 {
            assert_eq!(count(net.shapes()), *encoder as usize, "resnet{depth} {width}x");
        }
    }
}

#[test]
fn six_training_steps_match() {
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
    let encoder_shapes = [encoder.shapes(), projector.shapes()].concat();
    let online_shapes = [encoder_shapes.clone(), predictor.shapes()].concat();
    let network = Network {
        projector,
        predictor,
        encoder: Arc::new(encoder),
        normalization: Normalization::default(),
        norm: plain_norm(),
        precision: Precision::F32,
        ranks: Ranks::SINGLE,
    };

    let mut online = network.init(0, "online", true, &device);
    let mut target = network.init(0, "target", false, &device);
    online.params = tree(&case, "online0.", &online_shapes);
    target.params = tree(&case, "target0.", &encoder_shapes);
    let rule = Lars {
        momentum: case.number("momentum"),
        weight_decay: case.number("weight_decay"),
        trust_coefficient: case.number("eta"),
        clip_lr: false,
    };
    let schedule = Schedule {
        peak: case.number("base_lr") * case.number("batch") / 256.0,
        warmup: case.number("warmup") as u64,
        total: case.number("steps") as u64,
        tau_base: case.number("base_tau"),
        constant_tau: false,
    };
    let optimizer = Optimizer::new(Rule::Lars(rule), &online.params);
    let mut byol = Byol { network, online, target, optimizer, schedule, k: 0 };

    let [steps, _, n, h, w, c] = *case.shape("views") else { panic!("six axes") };
    let views: Vec<f32> = case.f32("views").iter().map(|v| v / 255.0).collect();
    let view = |step: usize, which: usize| {
        let size = n * h * w * c;
        let from = (2 * step + which) * size;
        Tensor::<4>::from_data(TensorData::new(views[from..from + size].to_vec(), [n, h, w, c]), &device)
    };
    let (mut loss, mut eta, mut tau) = (vec![], vec![], vec![]);
    for step in 0..steps {
        let stats = byol.step(|byol| {
            let (loss, grads) = byol.loss_and_gradient(view(step, 0), view(step, 1));
            if step == 0 {
                for (name, leaf) in grads.iter() {
                    case.check(&format!("grad0.{name}"), &leaf.to_vec());
                }
            }
            Ok::<_, ()>((loss, grads))
        });
        let stats = stats.unwrap();
        loss.push(stats.loss);
        eta.push(stats.eta);
        tau.push(stats.tau);
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
