//! Arguments and messages that `byol search`, `duplicates`, `outliers` and `select` share.

use std::path::PathBuf;

use byol::apply::{embeddings::Embeddings, neighbors};

use crate::terminal::{self, Result};

/// The embeddings to work on.
#[derive(Debug, clap::Args)]
pub struct EmbeddingsArgs {
    /// Embeddings written by `byol embed`
    #[arg(value_name = "EMBEDDINGS")]
    pub path: PathBuf,
}

impl EmbeddingsArgs {
    /// Sets the number of threads and reads the embeddings.
    pub fn read(&self, threads: usize) -> Result<Embeddings> {
        super::set_threads(threads)?;
        Ok(Embeddings::open(&self.path)?)
    }
}

/// Runs `work` behind a progress bar; `work` calls back with the share done, from 0 to 1.
pub fn with_share<T>(label: &str, work: impl FnOnce(&mut dyn FnMut(f64)) -> T) -> T {
    terminal::with_progress(label, |progress| work(&mut |share| progress((1000.0 * share) as u64, 1000)))
}

/// Notes that a search among `bank` rows is approximate, if it is.
pub fn note_if_approximate(bank: usize, queries: usize) {
    if neighbors::is_approximate(bank, queries) {
        terminal::note("over 10¹² comparisons: using approximate search (HNSW), which may miss some pairs");
    }
}
