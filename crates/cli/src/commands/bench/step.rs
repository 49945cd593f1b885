//! `byol bench`: complete training steps, or forward passes of the encoder.

use std::{hint::black_box, time::Instant};

use burn::tensor::{Device, Tensor, TensorData};
use byol::{
    byol::Byol,
    data::{CHANNELS, Dataset, Levels, MAX_CHANNELS, synthetic},
    device::{self, DeviceChoice},
    nn::{Encoder, ResNet},
    random,
    train::{
        Plan, PrepareOptions, TrainingData,
        step::{Phase, Stepper},
    },
};
use byol_kernels::{
    isa,
    roofline::{self, Roofline},
};
use serde_json::{Map, Value, json};

use super::{NetworkArgs, median};
use crate::{
    commands::{open_device, peak_memory_mb, set_threads},
    terminal::{Result, out, percent},
};

#[derive(Debug, clap::Args)]
pub struct StepArgs {
    /// Batch size
    #[arg(long, value_name = "N", default_value_t = 128)]
    batch: usize,
    /// Hidden units of projector and predictor
    #[arg(long, value_name = "N", default_value_t = 4096)]
    hidden: usize,
    /// Output dimension of projector and predictor
    #[arg(long, value_name = "N", default_value_t = 256)]
    projection: usize,
    /// Channels of the images
    #[arg(long, value_name = "N", default_value_t = CHANNELS, value_parser = channel_count)]
    channels: usize,
    /// Number of steps to measure, after two warm-up steps
    #[arg(long, value_name = "N", default_value_t = 5)]
    steps: usize,
    /// Measure only the encoder's forward pass, in evaluation mode and f32
    #[arg(long, conflicts_with = "precision")]
    forward_only: bool,
    /// Compute device: auto, cpu, vulkan, metal, wgpu, cuda or rocm
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
    #[command(flatten)]
    network: NetworkArgs,
}

fn channel_count(text: &str) -> std::result::Result<usize, String> {
    let range = format!("expected 1 to {MAX_CHANNELS}");
    text.parse().ok().filter(|n| (1..=MAX_CHANNELS).contains(n)).ok_or(range)
}

/// Unmeasured steps at the start.
const WARM_STEPS: usize = 2;

/// Steps after which an f16 loss scale has settled.
const MAX_SCALING_STEPS: u64 = 40;

pub fn run(args: &StepArgs) -> Result<()> {
    if args.steps == 0 {
        return Err("`--steps` must be at least 1".into());
    }
    let threads = set_threads(args.network.threads)?;
    let opened = open_device(args.device)?;
    let recipe = args.network.recipe(&[
        format!("train.batch={}", args.batch),
        format!("heads.hidden={}", args.hidden),
        format!("heads.projection={}", args.projection),
        "health.images=0".into(),
    ])?;
    device::check(&opened.device, recipe.train.precision)?;
    let on_cpu = device::has_kernels(&opened.device);
    let isa = if on_cpu { device::kernels(recipe.train.precision)? } else { isa::choose()? };
    let train = synthetic::with_channels(args.batch, args.channels, &Levels::default());
    let dataset = Dataset { train, ..synthetic::dataset(0, 1, 0) };
    let data = TrainingData::prepare(dataset, PrepareOptions::from(&recipe), &|_| ())?;
    let plan = Plan::new("bench", recipe, &data, opened.info.choice)?;
    let times = Bench::new(args, &plan, &opened.device).measure()?;
    let peak_mb = peak_memory_mb();
    let benchmark = StepBenchmark {
        args,
        threads,
        device: (opened.info.choice, &opened.info.name),
        isa: isa.name,
        peak_mb,
        // After the memory of the steps has been read: its buffers are large.
        roofline: on_cpu.then(|| roofline::measure(isa)),
        operations: Operations::count(args, &plan.encoder.resnet()),
        times,
    };
    match args.network.json {
        true => out!("{}", benchmark.json()),
        false => benchmark.print(),
    }
    Ok(())
}

/// Floating-point operations, two per multiply-add.
struct Operations {
    /// Encoder features of a batch.
    features: f64,
    /// Forward part of a training step.
    forward: f64,
    /// Backward part of a training step.
    backward: f64,
}

impl Operations {
    fn count(args: &StepArgs, resnet: &ResNet) -> Operations {
        let images = args.batch as f64;
        let encoder = resnet.multiply_adds(args.network.size) as f64;
        let head = |d_in: usize| (d_in * args.hidden + args.hidden * args.projection) as f64;
        let (projector, predictor) = (head(resnet.features()), head(args.projection));
        Operations {
            features: 2.0 * images * encoder,
            // Two views, in the online network with predictor and in the target network without.
            forward: 2.0 * images * 2.0 * (2.0 * (encoder + projector) + predictor),
            // Twice the forward work of the online network.
            backward: 2.0 * images * 4.0 * (encoder + projector + predictor),
        }
    }
}

/// Networks and images of the benchmark.
struct Bench<'a> {
    args: &'a StepArgs,
    byol: Byol,
    stepper: Stepper,
    encoder: Encoder,
    views: [Tensor<4>; 2],
}

/// Measured times in seconds.
struct Times {
    step: Vec<f64>,
    /// Forward, backward, update.
    phases: [Vec<f64>; 3],
    /// Large allocations from the system during the measured steps.
    allocations: u64,
}

impl<'a> Bench<'a> {
    fn new(args: &'a StepArgs, plan: &Plan, device: &Device) -> Bench<'a> {
        let byol = plan.initial_state(device);
        Bench {
            args,
            stepper: plan.stepper(),
            encoder: Encoder::new(plan.encoder.clone(), byol.online.clone()),
            byol,
            views: [1, 2]
                .map(|seed| noise([args.batch, args.network.size, args.network.size, args.channels], seed, device)),
        }
    }

    fn measure(mut self) -> Result<Times> {
        self.settle_loss_scale()?;
        let mut times = Times { step: Vec::new(), phases: [const { Vec::new() }; 3], allocations: 0 };
        for _ in 0..WARM_STEPS {
            self.timed_step()?;
        }
        let allocations = crate::MEMORY.system_allocations();
        for _ in 0..self.args.steps {
            let (step, phases) = self.timed_step()?;
            times.step.push(step);
            times.phases.iter_mut().zip(phases).for_each(|(all, seconds)| all.push(seconds));
        }
        times.allocations = crate::MEMORY.system_allocations() - allocations;
        Ok(times)
    }

    /// An f16 loss scale starts too high, and the first steps skip their update.
    fn settle_loss_scale(&mut self) -> Result<()> {
        let mut skipped = self.stepper.loss_scale.is_some();
        while skipped && self.byol.k < MAX_SCALING_STEPS {
            skipped = self.step(|_| ())?;
        }
        Ok(())
    }

    /// One step; returns whether its update was skipped.
    fn step(&mut self, on_phase: impl FnMut(Phase)) -> Result<bool> {
        let [v, v2] = self.views.clone();
        let mut views = Some((v, v2));
        let next_views = || views.take().ok_or("a step has one micro-batch");
        let (_, skipped) = self.stepper.step(&mut self.byol, next_views, on_phase)?;
        Ok(skipped)
    }

    /// Seconds of one step, and of its phases.
    fn timed_step(&mut self) -> Result<(f64, [f64; 3])> {
        let start = Instant::now();
        let mut phases = [0.0; 3];
        if self.args.forward_only {
            black_box(self.encoder.embed(self.views[0].clone()).into_data());
            return Ok((start.elapsed().as_secs_f64(), phases));
        }
        let mut last = 0.0;
        self.step(|phase| {
            let now = start.elapsed().as_secs_f64();
            let index = match phase {
                Phase::Data | Phase::Exchange => None,
                Phase::Forward => Some(0),
                Phase::Backward => Some(1),
                Phase::Update => Some(2),
            };
            if let Some(index) = index {
                phases[index] += now - last;
            }
            last = now;
        })?;
        // An asynchronous device has finished when a value can be read.
        black_box(self.byol.online.params.iter().next().map(|(_, leaf)| leaf.to_vec()));
        Ok((start.elapsed().as_secs_f64(), phases))
    }
}

/// Images of uniform noise, `[n, size, size, C]`.
fn noise(shape: [usize; 4], seed: u64, device: &Device) -> Tensor<4> {
    let mut rng = random::stream(&[seed]);
    let values = (0..shape.iter().product()).map(|_| random::uniform(&mut rng) as f32).collect::<Vec<_>>();
    Tensor::from_data(TensorData::new(values, shape), device)
}

/// Results with what they were measured on.
struct StepBenchmark<'a> {
    args: &'a StepArgs,
    threads: usize,
    /// Choice and name.
    device: (&'a str, &'a str),
    isa: &'a str,
    /// Peak memory of the steps in MiB, if the system reports it.
    peak_mb: Option<f64>,
    /// `None` unless the device has CPU kernels.
    roofline: Option<Roofline>,
    operations: Operations,
    times: Times,
}

/// Time and floating-point operations of a phase.
struct PhaseTime {
    name: &'static str,
    seconds: f64,
    operations: f64,
}

impl PhaseTime {
    fn gflop_per_second(&self) -> f64 {
        self.operations / self.seconds / 1e9
    }
}

impl StepBenchmark<'_> {
    /// Median seconds of a step.
    fn seconds(&self) -> f64 {
        median(self.times.step.clone())
    }

    /// Images per second: median and best.
    fn images_per_second(&self) -> [f64; 2] {
        let best = self.times.step.iter().copied().fold(f64::INFINITY, f64::min);
        [self.seconds(), best].map(|seconds| self.args.batch as f64 / seconds)
    }

    fn gflop_per_second(&self) -> f64 {
        let operations = match self.args.forward_only {
            true => self.operations.features,
            false => self.operations.forward + self.operations.backward,
        };
        operations / 1e9 / self.seconds()
    }

    fn share_of_peak(&self) -> Option<f64> {
        self.roofline.map(|roofline| self.gflop_per_second() / roofline.gflops)
    }

    /// Median times of forward, backward and update.
    fn phases(&self) -> [PhaseTime; 3] {
        let [forward, backward, update] = self.times.phases.clone().map(median);
        [
            PhaseTime { name: "forward", seconds: forward, operations: self.operations.forward },
            PhaseTime { name: "backward", seconds: backward, operations: self.operations.backward },
            PhaseTime { name: "update", seconds: update, operations: 0.0 },
        ]
    }

    fn json(&self) -> Value {
        let (args, network) = (self.args, &self.args.network);
        let [images_per_second, best] = self.images_per_second();
        let mut result = json!({
            "what": if args.forward_only { "forward" } else { "step" },
            "encoder": network.encoder, "width": network.width, "size": network.size, "channels": args.channels, "batch": args.batch,
            "precision": network.precision, "threads": self.threads, "device": self.device.0, "isa": self.isa,
            "images_per_second": images_per_second, "images_per_second_best": best,
            "step_ms": self.seconds() * 1e3, "gflop_per_second": self.gflop_per_second(),
            "peak_gflop_per_second": self.roofline.map(|roofline| roofline.gflops),
            "share_of_peak": self.share_of_peak(),
            "bandwidth_gb_per_second": self.roofline.map(|roofline| roofline.gb_per_second),
            "peak_mb": self.peak_mb, "fresh_blocks": self.times.allocations,
        });
        if !args.forward_only {
            let phases = self.phases();
            let ms: Map<_, _> = phases.iter().map(|p| (p.name.into(), json!(p.seconds * 1e3))).collect();
            let speed: Map<_, _> = phases[..2].iter().map(|p| (p.name.into(), json!(p.gflop_per_second()))).collect();
            result["split_ms"] = ms.into();
            result["split_gflop_per_second"] = speed.into();
        }
        result
    }

    fn print(&self) {
        let (args, network) = (self.args, &self.args.network);
        out!(
            "{} of width {} at {} px, batch {}, {} threads, {}, {}",
            network.encoder,
            network.width,
            network.size,
            args.batch,
            self.threads,
            self.device.1,
            self.isa
        );
        let ([images_per_second, best], seconds) = (self.images_per_second(), self.seconds());
        out!(
            "{images_per_second:.1} images/s (best {best:.1}), {:.0} ms per step, {:.1} GFLOP/s",
            seconds * 1e3,
            self.gflop_per_second()
        );
        if let (Some(roofline), Some(share)) = (self.roofline, self.share_of_peak()) {
            out!(
                "{} of the f32 peak of {:.0} GFLOP/s; memory bandwidth {:.1} GB/s",
                percent(share),
                roofline.gflops,
                roofline.gb_per_second
            );
        }
        if !args.forward_only {
            for phase in self.phases() {
                let speed = match phase.operations > 0.0 {
                    true => format!("{:7.1} GFLOP/s", phase.gflop_per_second()),
                    false => String::new(),
                };
                let share = percent(phase.seconds / seconds);
                out!("  {:<9} {:8.1} ms  {share:>6}  {speed}", phase.name, phase.seconds * 1e3);
            }
        }
        if let Some(mb) = self.peak_mb {
            out!("peak memory {mb:.0} MiB; {} large allocations in the measured steps", self.times.allocations);
        }
    }
}
