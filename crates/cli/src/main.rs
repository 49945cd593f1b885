//! The `byol` command: parses arguments, calls the library and prints results.

mod commands;
mod terminal;

use std::process::ExitCode;

use byol_kernels::memory::Recycler;
use clap::Parser;

#[global_allocator]
static MEMORY: Recycler = Recycler::new();

fn main() -> ExitCode {
    silence_caught_panics();
    let outcome = commands::Cli::parse().run();
    outcome.unwrap_or_else(|error| {
        terminal::error(&*error);
        ExitCode::FAILURE
    })
}

/// Suppresses the report of panics that `catch_panic` turns into errors.
fn silence_caught_panics() {
    let print_panic = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !byol::catch_panic::is_catching() {
            print_panic(panic);
        }
    }));
}
