//! Arguments, images and messages that `byol search`, `duplicates`, `outliers`, `select` and
//! `explore` share.

use std::path::{Path, PathBuf};

use byol::{
    apply::{
        duplicates::Pair,
        embeddings::Embeddings,
        neighbors,
        row_images::{Access, RowImages, Signatures},
        same_image::{Match, Signature},
    },
    data::OpenOptions,
};
use serde_json::{Value, json};

use crate::terminal::{self, Result, plural};

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

/// Images of embeddings, read from where they were embedded, or from `moved`, their new folder.
pub fn row_images(embeddings: &Embeddings, moved: Option<&Path>, access: Access) -> Result<RowImages> {
    let Some(origin) = &embeddings.origin else {
        if moved.is_some() {
            return Err(format!(
                "{} does not record the folder of its images, so that they cannot be found in another one\n\
                 hint: run `byol embed` again",
                embeddings.file.display()
            )
            .into());
        }
        return Ok(RowImages::new(embeddings.paths.clone(), None, OpenOptions::default(), access));
    };
    let recorded = Path::new(&origin.data);
    let relocated = |path: &String| match (moved, Path::new(path).strip_prefix(recorded)) {
        (Some(moved), Ok(relative)) => moved.join(relative).display().to_string(),
        _ => path.clone(),
    };
    let paths = embeddings.paths.iter().map(relocated).collect();
    let options = OpenOptions { column: origin.column.clone(), ..OpenOptions::as_trained(origin.levels.clone()) };
    Ok(RowImages::new(paths, Some(moved.unwrap_or(recorded).to_owned()), options, access))
}

/// Reduces the images of embeddings to compare their pixels. Warns if some cannot be read. `flag`
/// is the one that sets the folder of moved images.
pub fn read_signatures(images: &RowImages, flag: &str) -> Result<Vec<Option<Signature>>> {
    let Signatures { rows, first_unreadable } = with_share("reading images", |done| images.signatures(done))?;
    if let Some(first) = first_unreadable {
        let missing = rows.iter().filter(|signature| signature.is_none()).count();
        terminal::warning(format!(
            "{missing} of {} cannot be read, and their pairs are unverified (first: {})\n\
             hint: if the images were moved, pass their new folder with `{flag}`",
            plural(rows.len(), "image"),
            first.lines().next().unwrap_or_default()
        ));
    }
    Ok(rows)
}

/// JSON object of a pair of near-duplicates: paths and evidence.
pub fn pair_json(pair: &Pair, first: &str, second: &str) -> Value {
    let mut object = json!({ "first": first, "second": second, "share": pair.relative_distance });
    object["verified"] = pair.evidence.is_some().into();
    if let Some(evidence) = &pair.evidence {
        object["evidence"] = evidence_json(evidence);
    }
    object
}

/// JSON object of the evidence that two images are copies.
pub fn evidence_json(evidence: &Match) -> Value {
    let round = |v: f32| (1e3 * f64::from(v)).round() / 1e3;
    json!({
        "correlation": round(evidence.correlation),
        "detail": round(evidence.detail),
        "mirrored": evidence.mirrored,
        "first_area": evidence.areas[0].map(round),
        "second_area": evidence.areas[1].map(round),
        "text": evidence.describe(),
    })
}
