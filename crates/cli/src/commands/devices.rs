//! `byol devices`

use std::process::ExitCode;

use byol::device::{self, Choice, Kind};

use crate::report::{Result, out};

/// List the devices of this machine
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Print one JSON object with the results
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let (machine, devices) = (device::machine(), device::list());
    let auto = device::open(Choice::Auto)?.found;
    let built = [("gpu", cfg!(feature = "gpu")), ("cuda", cfg!(feature = "cuda")), ("rocm", cfg!(feature = "rocm"))];
    if args.json {
        let features: Vec<&str> = built.iter().filter(|(_, on)| *on).map(|(name, _)| *name).collect();
        let result = serde_json::json!({
            "machine": machine, "devices": devices, "auto": auto.choice, "features": features,
        });
        out!("{result}");
        return Ok(ExitCode::SUCCESS);
    }
    out!(
        "{}, {} cores, {}{}, {} MiB of memory ({} free)",
        machine.cpu,
        machine.cores,
        machine.isa,
        if machine.bf16 { " with bf16" } else { "" },
        machine.memory_mb,
        machine.free_mb
    );
    for found in &devices {
        let kind = match found.kind {
            Kind::Cpu => "processor",
            Kind::Gpu => "GPU",
            Kind::Software => "software driver, for tests only",
        };
        let mark = if found.choice == auto.choice && found.name == auto.name { "  <- auto" } else { "" };
        out!("  --device {:<7} {} ({kind}){mark}", found.choice, found.name);
    }
    for (name, on) in built {
        if !on {
            out!("  not in this build: {name} (cargo build --release --features {name})");
        }
    }
    Ok(ExitCode::SUCCESS)
}
