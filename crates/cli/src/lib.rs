//! The command `byol`: parses arguments, calls the library and prints results. It is a library so
//! that the Python package can contain it.

mod commands;
mod terminal;

use std::{
    ffi::OsString,
    io,
    process::{self, ExitCode},
    sync::OnceLock,
};

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

static PROGRAM: OnceLock<Vec<OsString>> = OnceLock::new();

/// Sets the command that starts this program, if that is not the executable of the process.
pub fn set_program(command: Vec<OsString>) {
    PROGRAM.get_or_init(|| command);
}

/// A command that starts this program.
fn program() -> io::Result<process::Command> {
    match PROGRAM.get().map(Vec::as_slice) {
        Some([program, args @ ..]) => {
            let mut command = process::Command::new(program);
            command.args(args);
            Ok(command)
        }
        _ => Ok(process::Command::new(std::env::current_exe()?)),
    }
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
