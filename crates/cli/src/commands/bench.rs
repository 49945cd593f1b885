//! `byol bench`: one training step, the views, the kernels.

use std::{hint::black_box, path::PathBuf, process::ExitCode, time::Instant};

use burn::tensor::{Device, Tensor, TensorData};
use byol::{
    byol::Phase,
    data::{CHANNELS, Dataset, synthetic},
    device::{self, Choice},
    nn::{Encoder, ResNet},
    random,
    train::{Plan, Prepared, Recipe, recipe::Draft},
    views::{self, Policy},
};
use byol_kernels::{
    conv::{self, Shape},
    isa, peak,
};
use clap::Subcommand;
use serde_json::json;

use crate::report::{self, Result, out};

/// Measure how fast this machine trains
///
/// Without a subcommand: whole training steps on noise, data loading left out. Every figure is of this moment: close other programs first.
#[derive(Debug, clap::Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    what: Option<What>,
    #[command(flatten)]
    step: Step,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Decode images and make their two views
    Views(Views),
    /// Each shape of convolution and each direction
    Kernels(Kernels),
}

#[derive(Debug, clap::Args)]
struct Step {
    /// resnet18, 34, 50, 101, 152 or 200
    #[arg(long, default_value = "resnet18")]
    encoder: String,
    /// Multiplies the encoder's channels
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    width: f64,
    /// Side of a view in pixels
    #[arg(long, value_name = "PX", default_value_t = 32)]
    size: usize,
    /// Images a step
    #[arg(long, value_name = "N", default_value_t = 128)]
    batch: usize,
    /// Hidden units of projector and predictor
    #[arg(long, value_name = "N", default_value_t = 4096)]
    hidden: usize,
    /// Length of a projection
    #[arg(long, value_name = "N", default_value_t = 256)]
    projection: usize,
    /// Steps to measure, after two to warm up
    #[arg(long, value_name = "N", default_value_t = 5)]
    steps: usize,
    /// Features of the encoder alone, in evaluation mode and f32
    #[arg(long, conflicts_with = "precision")]
    forward_only: bool,
    #[command(flatten)]
    common: Common,
    /// auto, cpu, vulkan, metal, wgpu, cuda or rocm
    #[arg(long, value_name = "DEVICE", default_value = "auto")]
    device: Choice,
}

#[derive(Debug, clap::Args)]
struct Common {
    /// Threads [default: one a core]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// f32; bf16 on a processor with AVX512-BF16, by CUDA or ROCm; or f16 on a GPU
    #[arg(long, value_name = "WHAT", value_parser = ["f32", "bf16", "f16"], default_value = "f32")]
    precision: String,
    /// Print one JSON object with the results
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Views {
    /// Folder of images
    data: PathBuf,
    /// Side of a view in pixels
    #[arg(long, value_name = "PX", default_value_t = 224)]
    size: usize,
    /// Images to take, evenly spread; 0: all
    #[arg(long, value_name = "N", default_value_t = 0)]
    limit: usize,
    /// Threads
    #[arg(long, value_name = "N", default_value_t = 1)]
    threads: usize,
    /// Print one JSON object with the results
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Kernels {
    /// Images a batch
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    /// The encoder whose convolutions to measure
    #[arg(long, default_value = "resnet18")]
    encoder: String,
    /// Multiplies the encoder's channels
    #[arg(long, value_name = "X", default_value_t = 1.0)]
    width: f64,
    /// Side of a view in pixels
    #[arg(long, value_name = "PX", default_value_t = 32)]
    size: usize,
    #[command(flatten)]
    common: Common,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    match &args.what {
        None => step(&args.step)?,
        Some(What::Views(args)) => of_views(args)?,
        Some(What::Kernels(args)) => kernels(args)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Most memory that this process has had, in MiB; none where the system does not say.
fn peak_mb() -> Option<f64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<f64>().ok()? / 1024.0)
}

/// A recipe with these settings.
fn recipe(settings: &[String]) -> Result<Recipe> {
    let mut draft = Draft::from_recipe("cifar10")?;
    for text in settings {
        draft.set(text)?;
    }
    Ok(draft.over(&Recipe::default())?)
}

fn noise(n: usize, size: usize, seed: u64, device: &Device) -> Tensor<4> {
    let mut rng = random::stream(&[seed]);
    let values = (0..n * size * size * CHANNELS).map(|_| random::uniform(&mut rng) as f32).collect::<Vec<_>>();
    Tensor::from_data(TensorData::new(values, [n, size, size, CHANNELS]), device)
}

fn step(args: &Step) -> Result<()> {
    if args.steps == 0 {
        return Err("--steps must be at least 1".into());
    }
    let threads = super::set_threads(args.common.threads)?;
    let opened = super::open(args.device)?;
    let recipe = recipe(&[
        format!("encoder.architecture={}", args.encoder),
        format!("encoder.width={}", args.width),
        format!("views.size={}", args.size),
        format!("train.batch={}", args.batch),
        format!("heads.hidden={}", args.hidden),
        format!("heads.projection={}", args.projection),
        format!("train.precision={}", args.common.precision),
        "health.images=0".into(),
    ])?;
    let (isa, machine) = (isa::choose()?, device::machine());
    let on_cpu = device::has_kernels(&opened.device);
    device::check(&opened.device, recipe.train.precision)?;
    // Before the networks, so that its buffers do not count.
    let peak = on_cpu.then(|| peak::measure(isa));
    let data = Prepared::new(synthetic::dataset(0, args.batch, 0), 0, &recipe.health, 0, &|_| ())?;
    let plan = Plan::new("bench", recipe, &data, opened.found.choice)?;
    let (mut byol, network) = (plan.start(&opened.device), plan.network());
    let (v, v2) = (noise(args.batch, args.size, 1, &opened.device), noise(args.batch, args.size, 2, &opened.device));
    let images = args.batch as f64;

    let convs = network.encoder.products(args.size) as f64;
    let head = |d_in: usize, hidden: usize, d_out: usize| (d_in * hidden + hidden * d_out) as f64;
    let projector = head(network.encoder.features(), args.hidden, args.projection);
    let predictor = head(args.projection, args.hidden, args.projection);
    // Two views: online with the predictor, target without; backward twice the online's work.
    let forward = 2.0 * images * 2.0 * (2.0 * (convs + projector) + predictor);
    let backward = 2.0 * images * 4.0 * (convs + projector + predictor);

    // A scaled loss begins too high: steps without an update are not what is measured.
    while byol.scale.is_some() && byol.optimizer.t == 0 && byol.k < 40 {
        byol.step(1, || Ok::<_, ()>((v.clone(), v2.clone())), |_| ()).expect("views that are there");
    }
    let (mut whole, mut parts) = (Vec::new(), [Vec::new(), Vec::new(), Vec::new()]);
    let encoder = Encoder::new(plan.encoder.clone(), byol.online.clone());
    let mut kept = 0;
    for i in 0..args.steps + 2 {
        if i == 2 {
            kept = crate::MEMORY.fresh();
        }
        let began = Instant::now();
        let mut last = 0.0;
        let mut split = [0.0; 3];
        if args.forward_only {
            black_box(encoder.embed(v.clone()).into_data());
        } else {
            let mut views = Some((v.clone(), v2.clone()));
            let give = || views.take().ok_or("one micro-batch a step");
            byol.step(1, give, |phase| {
                let now = began.elapsed().as_secs_f64();
                let at = match phase {
                    Phase::Data | Phase::Exchange => None,
                    Phase::Forward => Some(0),
                    Phase::Backward => Some(1),
                    Phase::Update => Some(2),
                };
                if let Some(at) = at {
                    split[at] += now - last;
                }
                last = now;
            })?;
            // A device that works on its own has finished when a value can be read.
            black_box(byol.online.params.iter().next().map(|(_, leaf)| leaf.to_vec()));
        }
        if i >= 2 {
            whole.push(began.elapsed().as_secs_f64());
            parts.iter_mut().zip(split).for_each(|(all, s)| all.push(s));
        }
    }
    let fresh = crate::MEMORY.fresh() - kept;
    let best = whole.iter().copied().fold(f64::INFINITY, f64::min);
    let seconds = median(whole);
    let gflop = if args.forward_only { 2.0 * images * convs } else { forward + backward } / 1e9;
    let share = peak.map(|p| gflop / seconds / p.gflops);
    let [f, b, u] = parts.map(median);
    let split = [("forward", f, forward), ("backward", b, backward), ("update", u, 0.0)];
    if args.common.json {
        let split_ms: serde_json::Map<_, _> =
            split.iter().map(|(name, s, _)| ((*name).into(), json!(s * 1e3))).collect();
        let speed: serde_json::Map<_, _> =
            split[..2].iter().map(|(name, s, work)| ((*name).into(), json!(work / s / 1e9))).collect();
        let mut result = json!({
            "what": if args.forward_only { "forward" } else { "step" }, "encoder": args.encoder, "width": args.width,
            "size": args.size, "batch": args.batch, "precision": args.common.precision, "threads": threads, "device": opened.found.choice,
            "isa": machine.isa, "images_per_second": images / seconds, "images_per_second_best": images / best,
            "step_ms": seconds * 1e3, "gflop_per_second": gflop / seconds, "peak_gflop_per_second": peak.map(|p| p.gflops),
            "share_of_peak": share, "bandwidth_gb_per_second": peak.map(|p| p.gigabytes), "peak_mb": peak_mb(),
            "fresh_blocks": fresh,
        });
        if !args.forward_only {
            result["split_ms"] = split_ms.into();
            result["split_gflop_per_second"] = speed.into();
        }
        out!("{result}");
        return Ok(());
    }
    out!(
        "{} of width {} at {} px, batch {}, {threads} threads, {}, {}",
        args.encoder,
        args.width,
        args.size,
        args.batch,
        opened.found.name,
        machine.isa
    );
    out!(
        "{:.1} images/s (best {:.1}), {:.0} ms, {:.1} GFLOP/s",
        images / seconds,
        images / best,
        seconds * 1e3,
        gflop / seconds
    );
    if let (Some(peak), Some(share)) = (peak, share) {
        out!(
            "{} of the peak of {:.0} GFLOP/s; memory copies at {:.1} GB/s",
            report::percent(share),
            peak.gflops,
            peak.gigabytes
        );
    }
    if !args.forward_only {
        for (name, s, work) in split {
            let speed = if work > 0.0 { format!("{:7.1} GFLOP/s", work / s / 1e9) } else { String::new() };
            out!("  {name:<9} {:8.1} ms  {:>6}  {speed}", s * 1e3, report::percent(s / seconds));
        }
    }
    if let Some(mb) = peak_mb() {
        out!("{mb:.0} MiB of memory at most; {fresh} large blocks new to these steps");
    }
    Ok(())
}

fn of_views(args: &Views) -> Result<()> {
    use rayon::prelude::*;
    let threads = super::set_threads(args.threads)?;
    let dataset = Dataset::open(&args.data)?;
    let dataset = if args.limit > 0 { dataset.limit(args.limit) } else { dataset };
    let images = dataset.train;
    // As the recipes have it: no blur on small views.
    let blur = |p: Policy| if args.size <= 64 { Policy { blur: 0.0, ..p } } else { p };
    let policies = [blur(Policy::default()), blur(Policy::second())];
    let one = |i: usize, decode_only: bool| -> std::result::Result<f32, byol::data::Error> {
        let image = images.get(i)?;
        if decode_only {
            return Ok(f32::from(image.pixels[0]));
        }
        let view =
            |which: u64| views::view(&policies[which as usize], &image, args.size, [0, 0, i as u64, which]).pixels[0];
        Ok(view(0) + view(1))
    };
    let time = |decode_only: bool| {
        let began = Instant::now();
        let bad = (0..images.len()).into_par_iter().filter(|i| black_box(one(*i, decode_only)).is_err()).count();
        (began.elapsed().as_secs_f64(), bad)
    };
    time(true); // files into the system's cache
    let (whole, decoding): (Vec<_>, Vec<_>) = (0..3).map(|_| (time(false), time(true))).unzip();
    let bad = whole[0].1;
    let n = (images.len() - bad) as f64;
    let rate = |all: Vec<(f64, usize)>| n / median(all.into_iter().map(|(s, _)| s).collect());
    let (whole, decoding) = (rate(whole), rate(decoding));
    if args.json {
        let result = json!({
            "what": "views", "size": args.size, "images": images.len(), "bad": bad, "threads": threads,
            "images_per_second": whole, "decode_only_images_per_second": decoding,
        });
        out!("{result}");
    } else {
        out!(
            "decode and two views of {} px: {whole:.1} images/s with {threads} threads (decoding alone {decoding:.1})",
            args.size
        );
        if bad > 0 {
            report::warning(format!("{bad} files cannot be decoded and are left out"));
        }
    }
    Ok(())
}

fn kernels(args: &Kernels) -> Result<()> {
    let threads = super::set_threads(args.common.threads)?;
    let peak = peak::measure(isa::choose()?);
    let recipe = recipe(&[
        format!("train.precision={}", args.common.precision),
        format!("encoder.architecture={}", args.encoder),
        format!("encoder.width={}", args.width),
        format!("views.size={}", args.size),
    ])?;
    let (isa, encoder) = (device::kernels(recipe.train.precision)?, recipe.encoder);
    let network = ResNet::new(encoder.architecture, encoder.width, encoder.stem(args.size), CHANNELS);
    let mut shapes: Vec<(Shape, usize)> = Vec::new();
    for (c, side) in network.maps(args.size) {
        let shape = Shape {
            n: args.batch,
            h: side,
            w: side,
            c_in: c.c_in,
            c_out: c.c_out,
            kernel: c.kernel,
            stride: c.stride,
            padding: c.kernel / 2,
            dilation: 1,
        };
        match shapes.iter_mut().find(|(s, _)| *s == shape) {
            Some((_, n)) => *n += 1,
            None => shapes.push((shape, 1)),
        }
    }
    if !args.common.json {
        out!(
            "{} of width {} at {} px, batch {}, {threads} threads, {}, peak {:.0} GFLOP/s",
            args.encoder,
            args.width,
            args.size,
            args.batch,
            isa.name,
            peak.gflops
        );
        out!(
            "kernel  stride  channels      map   layers      forward     by input    by weight  (GFLOP/s, share of the peak)"
        );
    }
    let mut lines = Vec::new();
    for (s, layers) in shapes {
        let [of_x, of_w, of_y] = s.lengths();
        let (x, w, y) = (vec![0.5f32; of_x], vec![0.5f32; of_w], vec![0.5f32; of_y]);
        let work = 2.0 * s.products() as f64 / 1e9;
        let speed = |f: &dyn Fn() -> Vec<f32>| {
            let once = |_| {
                let began = Instant::now();
                black_box(f());
                began.elapsed().as_secs_f64()
            };
            black_box(f());
            work / median((0..5).map(once).collect())
        };
        let all = [
            speed(&|| conv::forward(isa, &s, &x, &w)),
            speed(&|| conv::backward_data(isa, &s, &w, &y)),
            speed(&|| conv::backward_weight(isa, &s, x.as_slice().into(), &y)),
        ];
        if args.common.json {
            lines.push(json!({
                "kernel": s.kernel, "stride": s.stride, "c_in": s.c_in, "c_out": s.c_out, "map": s.h, "layers": layers,
                "forward": all[0], "backward_data": all[1], "backward_weight": all[2],
            }));
        } else {
            let [f, d, w] = all.map(|g| format!("{g:6.1} {:>5}", format!("{:.0} %", 100.0 * g / peak.gflops)));
            let channels = format!("{}>{}", s.c_in, s.c_out);
            out!(
                "{:>6}  {:>6}  {channels:>9}  {:>7}  {layers:>6}  {f}  {d}  {w}",
                s.kernel,
                s.stride,
                format!("{0}x{0}", s.h)
            );
        }
    }
    if args.common.json {
        out!(
            "{}",
            json!({ "isa": isa.name, "threads": threads, "batch": args.batch, "peak_gflop_per_second": peak.gflops, "shapes": lines })
        );
    }
    Ok(())
}
