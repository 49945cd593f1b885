//! `byol bench kernels`

use std::{hint::black_box, time::Instant};

use byol::{data::CHANNELS, device, nn::ResNet, train::precision};
use byol_kernels::{
    conv::{self, Shape},
    isa::{self, Isa},
    roofline::{self, Roofline},
    storage::Values,
};
use serde_json::{Value, json};

use super::{NetworkArgs, median};
use crate::{
    commands::set_threads,
    terminal::{Result, out},
};

const EXAMPLES: &str = "\
Examples:
  byol bench kernels  Time each convolution of the encoder";

/// Benchmark the convolution kernels
///
/// Measures each convolution shape of the encoder in each direction.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Batch size
    #[arg(long, value_name = "N", default_value_t = 16)]
    batch: usize,
    #[command(flatten)]
    network: NetworkArgs,
}

/// Measured runs of a kernel; the median counts.
const RUNS: usize = 5;

pub fn run(args: &Args) -> Result<()> {
    let threads = set_threads(args.network.threads)?;
    let roofline = roofline::measure(isa::choose()?);
    let recipe = args.network.recipe(&[])?;
    let (isa, encoder) = (device::kernels(recipe.train.precision)?, recipe.encoder);
    let stem = encoder.stem(args.network.size);
    let network = ResNet::new(encoder.architecture, encoder.width, stem, CHANNELS);
    let shapes = precision::distinct_shapes(&network, args.network.size, args.batch);
    let layers = shapes.into_iter().map(|(shape, count)| Layers { shape, count });
    if args.network.json {
        let shapes: Vec<Value> = layers.map(|layer| layer.measure(isa).json()).collect();
        out!(
            "{}",
            json!({
                "isa": isa.name, "threads": threads, "batch": args.batch,
                "peak_gflop_per_second": roofline.gflops, "shapes": shapes,
            })
        );
        return Ok(());
    }
    print_head(args, threads, isa, roofline);
    layers.for_each(|layer| layer.measure(isa).print(roofline));
    Ok(())
}

/// Convolutions of one shape.
struct Layers {
    shape: Shape,
    count: usize,
}

/// Speed of a convolution shape: forward, gradient of the input, gradient of the weight, in
/// GFLOP/s.
struct Speed {
    layers: Layers,
    gflop_per_second: [f64; 3],
}

impl Layers {
    fn measure(self, isa: &Isa) -> Speed {
        let shape = &self.shape;
        let [x, w, dy] = shape.lengths().map(|len| vec![0.5f32; len]);
        let gflop = 2.0 * shape.multiply_adds() as f64 / 1e9;
        let speed = |kernel: &dyn Fn() -> Vec<f32>| {
            let run = |_| {
                let start = Instant::now();
                black_box(kernel());
                start.elapsed().as_secs_f64()
            };
            black_box(kernel());
            gflop / median((0..RUNS).map(run).collect())
        };
        let gflop_per_second = [
            speed(&|| conv::forward(isa, shape, &x, &w)),
            speed(&|| conv::backward_data(isa, shape, &w, &dy)),
            speed(&|| conv::backward_weight(isa, shape, x.as_slice().into(), Values::F32(&dy))),
        ];
        Speed { gflop_per_second, layers: self }
    }
}

fn print_head(args: &Args, threads: usize, isa: &Isa, roofline: Roofline) {
    let network = &args.network;
    out!(
        "{} of width {} at {} px, batch {}, {threads} threads, {}, peak {:.0} GFLOP/s",
        network.encoder,
        network.width,
        network.size,
        args.batch,
        isa.name,
        roofline.gflops
    );
    out!("kernel  stride  channels      map   layers      forward   input grad  weight grad  (GFLOP/s, share of peak)");
}

impl Speed {
    fn json(&self) -> Value {
        let shape = &self.layers.shape;
        let [forward, backward_data, backward_weight] = self.gflop_per_second;
        json!({
            "kernel": shape.kernel, "stride": shape.stride, "c_in": shape.c_in, "c_out": shape.c_out,
            "map": shape.h, "layers": self.layers.count,
            "forward": forward, "backward_data": backward_data, "backward_weight": backward_weight,
        })
    }

    fn print(&self, roofline: Roofline) {
        let Layers { shape, count } = &self.layers;
        let share = |speed: f64| format!("{:.0} %", 100.0 * speed / roofline.gflops);
        let [forward, input, weight] = self.gflop_per_second.map(|speed| format!("{speed:6.1} {:>5}", share(speed)));
        let channels = format!("{}>{}", shape.c_in, shape.c_out);
        let map = format!("{0}x{0}", shape.h);
        out!(
            "{:>6}  {:>6}  {channels:>9}  {map:>7}  {count:>6}  {forward}  {input}  {weight}",
            shape.kernel,
            shape.stride
        );
    }
}
