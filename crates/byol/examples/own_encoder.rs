//! Trains a custom encoder with BYOL, on synthetic images:
//! `cargo run --release -p byol --example own_encoder`. A few seconds.
//!
//! The encoder is a patch embedding, a hidden layer and a mean over patches. Anything that maps
//! images to vectors works; normalize it with batch norm or layer norm, since BYOL needs some
//! normalization.

use std::{convert::Infallible, error::Error};

use burn::tensor::{Device, Tensor, activation::relu, module::conv2d, ops::ConvOptions};
use byol::{
    Byol, DeviceChoice,
    data::{Loader, prefetch::Request, synthetic},
    device,
    nn::{Backbone, ForwardContext, Leaf, Network, Statistics, Tree, init},
    optim::{AdamW, Rule, Schedule},
    random::{self, Domain},
    train::batch::to_device,
    views::Policy,
};

/// Patches of 4 x 4 pixels → `[F]` features per patch → mean over patches.
#[derive(Debug)]
struct PatchNet {
    features: usize,
}

const PATCH: usize = 4;

impl Backbone for PatchNet {
    fn init(&self, seed: u64, role: &str, device: &Device) -> Tree {
        let mut tree = Tree::new();
        for (name, shape) in [
            ("embed.weight", vec![self.features, 3, PATCH, PATCH]),
            ("mix.weight", vec![self.features, self.features, 1, 1]),
        ] {
            let mut rng = random::named_stream(Domain::Weights, seed, &format!("{role}.{name}"));
            let fan_in = shape[1..].iter().product();
            let values = init::truncated_normal(&mut rng, shape.iter().product(), fan_in);
            tree.insert(name, Leaf::new(values, &shape, device));
        }
        for name in ["bn1", "bn2"] {
            tree.insert(format!("{name}.weight"), Leaf::new(vec![1.0; self.features], &[self.features], device));
            tree.insert(format!("{name}.bias"), Leaf::new(vec![0.0; self.features], &[self.features], device));
        }
        tree
    }

    fn statistics(&self, device: &Device) -> Statistics {
        Statistics::new([("bn1", self.features), ("bn2", self.features)], device)
    }

    fn features(&self) -> usize {
        self.features
    }

    fn forward(&self, ctx: &mut ForwardContext, x: Tensor<4>) -> Tensor<2> {
        let x = x.permute([0, 3, 1, 2]); // Burn's convolutions take [N, C, H, W]
        let patches = ConvOptions::new([PATCH, PATCH], [0, 0], [1, 1], 1);
        let x = conv2d(x, ctx.params.get::<4>("embed.weight"), None, patches);
        let x = relu(ctx.batch_norm("bn1", x));
        let x = conv2d(x, ctx.params.get::<4>("mix.weight"), None, ConvOptions::new([1, 1], [0, 0], [1, 1], 1));
        let x = relu(ctx.batch_norm("bn2", x));
        x.mean_dim(2).mean_dim(3).flatten(1, 3)
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let device = device::open(DeviceChoice::Cpu)?.device;
    let (steps, batch) = (60, 64);
    let network = Network::new(PatchNet { features: 64 }, 128, 32);
    let rule = Rule::Adamw(AdamW { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 1e-4 });
    let schedule = Schedule { peak: 2e-3, warmup: 5, total: steps, tau_base: 0.97, constant_tau: false };
    let mut byol = Byol::new(network, rule, schedule, 0, &device);

    let loader = Loader::start(Request {
        images: synthetic::dataset(0, 512, 0).train,
        policies: [Policy::default(), Policy::second()],
        augmentation: None,
        size: 32,
        crop_only: false,
        n: batch,
        part: [0, 1],
        buffer: 1,
        seed: 0,
        first: 0,
        last: steps,
        threads: device::machine().cores,
    });
    let mut losses = Vec::new();
    while byol.k < steps {
        let (v, v2) = to_device(loader.next_batch()?, &device);
        let Ok(stats) = byol.step(|byol| Ok::<_, Infallible>(byol.loss_and_gradient(v, v2)));
        losses.push(stats.loss);
        if byol.k.is_multiple_of(10) {
            println!("step {}: loss {:.3}", byol.k, stats.loss);
        }
    }
    let mean = |losses: &[f64]| losses.iter().sum::<f64>() / losses.len() as f64;
    let (first, last) = (mean(&losses[..5]), mean(&losses[losses.len() - 5..]));
    println!("mean loss {first:.3} at the start, {last:.3} at the end");
    if last < first { Ok(()) } else { Err("the loss did not fall".into()) }
}
