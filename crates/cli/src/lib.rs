//! The command `byol`: parses arguments, calls the library and prints results. It is a library so
//! that the Python package can contain it.

mod commands;
mod terminal;

use std::{ffi::OsString, process::ExitCode};

use byol_kernels::memory::Recycler;
use clap::Parser;

#[global_allocator]
static MEMORY: Recycler = Recycler::new();

/// Runs the command and returns its exit code. `args` begin with the name of the program.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match commands::Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => error.exit(),
    };
    cli.run().unwrap_or_else(|error| {
        terminal::error(&*error);
        ExitCode::FAILURE
    })
}

/// Suppresses the report of panics that `catch_panic` turns into errors.
pub fn silence_caught_panics() {
    let print_panic = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if !byol::catch_panic::is_catching() {
            print_panic(panic);
        }
    }));
}
