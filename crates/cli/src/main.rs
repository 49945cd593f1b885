//! The program `byol`.

use std::process::ExitCode;

fn main() -> ExitCode {
    byol_cli::silence_caught_panics();
    byol_cli::run(std::env::args_os())
}
