//! The command `byol`: parses, calls the library, prints.

mod commands;
mod report;

use std::process::ExitCode;

use byol_kernels::memory::Recycler;
use clap::Parser;

#[global_allocator]
static MEMORY: Recycler = Recycler::new();

fn main() -> ExitCode {
    let outcome = commands::Cli::parse().run();
    outcome.unwrap_or_else(|error| {
        report::error(&*error);
        ExitCode::FAILURE
    })
}
