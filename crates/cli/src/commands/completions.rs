//! `byol completions SHELL`

use std::process::ExitCode;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::terminal::{Result, out};

/// Print a shell completion script
///
/// For example: `byol completions bash > ~/.local/share/bash-completion/completions/byol`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Shell of the script
    shell: Shell,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::Cli::command(), "byol", &mut script);
    out!("{}", String::from_utf8(script)?.trim_end());
    Ok(ExitCode::SUCCESS)
}
