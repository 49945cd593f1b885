//! `byol explore RUN|EMBEDDINGS`: what is needed is embedded and placed once, stored, and then served to a browser on this machine.

mod server;

use std::{
    fs,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use byol::{
    apply::{
        embed::{Items, Job, Outcome, Split},
        embeddings::{Embeddings, Origin},
        map::{self, Method},
        search::Index,
    },
    data::Dataset,
    device::Choice,
    files,
    nn::weights,
    train::run::read_plan,
};

use super::INTERRUPTED;
use crate::report::{self, Result};

/// Look at all images as a map in the browser
///
/// Opens a page on this machine alone: a map of all images on which like ones lie together, neighbours, near-duplicates, outliers, labelling
/// by clicks, and the curves of the run. Everything is inside the program; nothing is fetched from a network.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The folder of a run, or what `byol embed` wrote
    what: PathBuf,
    /// tsne (neighbours stay neighbours) or pca (quick)
    #[arg(long, default_value = "tsne", value_parser = ["tsne", "pca"])]
    map: String,
    /// Take N images at most, evenly spread (0: all). Of a run
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    limit: usize,
    /// Where to listen on 127.0.0.1; 0: any free port
    #[arg(long, default_value_t = 7878)]
    port: u16,
    /// Threads [default: one a core]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// auto, cpu, vulkan, metal, wgpu, cuda or rocm
    #[arg(long, default_value = "auto")]
    device: Choice,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    super::set_threads_apart(args.threads)?;
    // Before the work, so that a port in use is said at once.
    let listener = std::net::TcpListener::bind(("127.0.0.1", args.port)).map_err(|e| {
        let port = args.port;
        format!("cannot listen on 127.0.0.1:{port}: {e}; choose another --port, or 0 for any that is free")
    })?;
    if args.what.extension().is_some_and(|e| e == "safetensors") {
        let what = args.what.display();
        return Err(format!("{what} is an encoder; give a run's folder, or what `byol embed` wrote").into());
    }
    let run = args.what.is_dir().then(|| args.what.clone());
    let file = match &run {
        Some(run) => match embedded(args, run)? {
            Some(file) => file,
            None => return Ok(ExitCode::from(INTERRUPTED)),
        },
        None => args.what.clone(),
    };
    super::stop_at_once();
    let found = Embeddings::open(&file)?;
    let Embeddings { origin, paths, labels, features, .. } = found;
    let index = Index::new(features);
    let method = if args.map == "pca" { Method::Pca } else { Method::Tsne };
    let places = placed(&file, &index, method)?;
    let root = origin.as_ref().map(|o| PathBuf::from(&o.data));
    let state = server::State::new(server::Shown { index, paths, labels, places, method, root, run });
    let address = listener.local_addr()?;
    if let Some(missing) = state.first_without_image() {
        report::warning(format!(
            "{missing} is not to be found below the data's folder; such images have no picture here. If they were moved, embed them again where they are now; links to files outside of that folder are not followed"
        ));
    }
    report::note(format!("open http://{address} in a browser; Ctrl-C ends it"));
    server::serve(listener, Arc::new(state))?;
    Ok(ExitCode::SUCCESS)
}

/// The embeddings of a run's images by its encoder, made where there are none; none if it was stopped.
fn embedded(args: &Args, run: &Path) -> Result<Option<PathBuf>> {
    let plan = read_plan(run)?;
    let items = Items::of(Dataset::open(&plan.data)?.limit(args.limit), Split::Train);
    let origin = Origin::new(&weights::resolve(run), &plan.data, &items, None)?;
    let folder = run.join("explore");
    // Another encoder, or another number of images, is another file; the images may have changed since it was written.
    let file = folder.join(format!("{}-{}.parquet", &origin.encoder_sha256[..12], args.limit));
    let same = |e: Embeddings| e.origin.is_some_and(|o| o == origin);
    let written = file.metadata().and_then(|m| m.modified()).ok();
    let written = written.and_then(|at| at.duration_since(std::time::UNIX_EPOCH).ok()).map_or(0, |at| at.as_millis());
    let newer = written > u128::from(items.changed());
    if newer && Embeddings::open(&file).is_ok_and(same) {
        return Ok(Some(file));
    }
    fs::create_dir_all(&folder)
        .map_err(|e| format!("cannot make {}: {e}; check that you may write there", folder.display()))?;
    let opened = super::open(args.device)?;
    let encoder = super::encoder(run, &opened.device)?;
    let job = Job { encoder: &encoder, items: &items, origin, out: &file };
    let outcome = report::counted("embedding", |progress| {
        job.run(&super::stop_flag(), |done, all| progress(done as u64, all as u64))
    });
    match outcome? {
        Outcome::Finished { .. } => Ok(Some(file)),
        Outcome::Stopped(_) => Ok(None),
    }
}

/// The map of some embeddings, stored beside them.
fn placed(file: &Path, index: &Index, method: Method) -> Result<Vec<[f32; 2]>> {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{}.map", method.name()));
    let stored = PathBuf::from(name);
    let newer = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    let fresh = newer(&stored) >= newer(file);
    if let Some(bytes) = fs::read(&stored).ok().filter(|b| fresh && b.len() == 8 * index.len()) {
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let places: Vec<[f32; 2]> = bytes.chunks_exact(8).map(|b| [value(&b[..4]), value(&b[4..])]).collect();
        if places.iter().flatten().all(|v| v.is_finite()) {
            return Ok(places);
        }
    }
    let places = report::counted("placing", |progress| map::places(index, method, progress));
    let bytes: Vec<u8> = places.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    if let Err(e) = files::write_whole(&stored, &bytes) {
        report::warning(format!(
            "the map could not be stored in {}: {e}; next time it is made again",
            stored.display()
        ));
    }
    Ok(places)
}
