//! `byol devices`

use std::process::ExitCode;

use byol::device::{self, DeviceChoice, Kind};

use crate::terminal::{Result, out, plural};

const EXAMPLES: &str = "\
Examples:
  byol devices  List the devices of this machine and build";

/// List the compute devices of this machine
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Print the results as one JSON object
    #[arg(long)]
    json: bool,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let (machine, devices) = (device::machine(), device::list());
    let auto = device::open(DeviceChoice::Auto)?.info;
    let features = [("gpu", cfg!(feature = "gpu")), ("cuda", cfg!(feature = "cuda")), ("rocm", cfg!(feature = "rocm"))];
    if args.json {
        let enabled: Vec<&str> = features.iter().filter(|(_, enabled)| *enabled).map(|(name, _)| *name).collect();
        let result = serde_json::json!({
            "machine": machine, "devices": devices, "auto": auto.choice, "features": enabled,
        });
        out!("{result}");
        return Ok(ExitCode::SUCCESS);
    }
    out!(
        "{}, {}, {}{}, {} MiB of memory ({} MiB free)",
        machine.cpu,
        plural(machine.cores, "core"),
        machine.isa,
        match (machine.amx, machine.bf16) {
            (true, _) => " with AMX",
            (false, true) => " with bf16",
            (false, false) => "",
        },
        machine.memory_mb,
        machine.free_mb
    );
    for device in &devices {
        let kind = match device.kind {
            Kind::Cpu => "CPU",
            Kind::Gpu => "GPU",
            Kind::Software => "software driver, for tests only",
        };
        let mark = if device.choice == auto.choice && device.name == auto.name { "  <- auto" } else { "" };
        out!("  --device {:<7} {} ({kind}){mark}", device.choice, device.name);
    }
    for (name, enabled) in features {
        if !enabled {
            out!("  not in this build: {name} (build with `--features {name}`)");
        }
    }
    Ok(ExitCode::SUCCESS)
}
