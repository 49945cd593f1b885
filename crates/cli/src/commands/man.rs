//! `byol man -o DIR`

use std::{fs, path::PathBuf, process::ExitCode};

use clap::CommandFactory;

use crate::terminal::{self, Result};

const EXAMPLES: &str = "\
Examples:
  byol man -o ~/.local/share/man/man1  Install the man pages for this user";

/// Write the manual pages, one per command
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Folder for the pages
    #[arg(short, long, value_name = "DIR", default_value = "man")]
    out: PathBuf,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    let folder = args.out.display();
    fs::create_dir_all(&args.out)
        .and_then(|()| clap_mangen::generate_to(super::Cli::command(), &args.out))
        .map_err(|e| format!("cannot write manual pages into {folder}: {e}\nhint: choose another `--out`"))?;
    terminal::note(format!("wrote manual pages into {folder}"));
    Ok(ExitCode::SUCCESS)
}
