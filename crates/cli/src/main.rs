//! The command `byol`: parses, calls the library, prints.

mod commands;
mod report;

use std::process::ExitCode;

use byol_kernels::memory::Recycler;
use clap::Parser;

#[global_allocator]
static MEMORY: Recycler = Recycler::new();

fn main() -> ExitCode {
    // What is guarded becomes an error, which is told in a line.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !byol::guarded::is_guarded() {
            report(panic);
        }
    }));
    let outcome = commands::Cli::parse().run();
    outcome.unwrap_or_else(|error| {
        report::error(&*error);
        ExitCode::FAILURE
    })
}
