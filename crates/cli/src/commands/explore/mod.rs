//! `byol explore RUN|EMBEDDINGS`: embeds the images and computes the map once, caches both, and
//! serves them to a browser on this machine.

mod server;

use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::UNIX_EPOCH,
};

use byol::{
    apply::{
        embed::{self, Items, Job, Outcome, Split},
        embeddings::{Embeddings, Origin},
        map::{self, Method},
        row_images::Access,
        search::Index,
    },
    atomic_write,
    device::DeviceChoice,
    nn::weights,
    train::run::read_plan,
};

use super::{INTERRUPTED, data_args, embeddings_args};
use crate::terminal::{self, Result};

const EXAMPLES: &str = "\
Examples:
  byol explore byol-runs/photos            Explore a run, also while it trains
  byol explore photos.parquet --port 8080  Explore embeddings on another port";

/// Explore images as an interactive map in the browser
///
/// Serves a page to this machine only: a map on which similar images lie close together, nearest
/// neighbors, near-duplicates, outliers, labeling by clicks, and the training curves of the run.
/// The page is part of this program: nothing is fetched from a network.
#[derive(Debug, clap::Args)]
#[command(after_long_help = EXAMPLES)]
pub struct Args {
    /// Run folder, or embeddings file written by `byol embed`
    #[arg(value_name = "RUN|EMBEDDINGS")]
    input: PathBuf,
    /// Folder of the images, if they were moved since the run or the embeddings were computed
    #[arg(long, value_name = "DATA")]
    data: Option<PathBuf>,
    /// Map layout: tsne (preserves neighborhoods) or pca (fast)
    #[arg(long, default_value = "tsne", value_parser = ["tsne", "pca"])]
    map: String,
    /// Maximum number of images of a run, sampled evenly (0: all)
    #[arg(long, value_name = "N", default_value_t = 20_000)]
    limit: usize,
    /// Port on 127.0.0.1 (0: any free port)
    #[arg(long, default_value_t = 7878)]
    port: u16,
    /// Number of threads [default: number of cores]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    threads: usize,
    /// Compute device: auto, cpu, vulkan, metal, wgpu, cuda or rocm
    #[arg(long, default_value = "auto")]
    device: DeviceChoice,
}

pub fn run(args: &Args) -> Result<ExitCode> {
    super::set_worker_threads(args.threads)?;
    // Bound before the long work, so that a port in use is reported at once.
    let listener = TcpListener::bind(("127.0.0.1", args.port)).map_err(|e| {
        let port = args.port;
        format!("cannot listen on 127.0.0.1:{port}: {e}\nhint: choose another `--port`, or 0 for any free port")
    })?;
    if args.input.extension().is_some_and(|e| e == "safetensors") {
        let input = args.input.display();
        return Err(format!(
            "{input} is an encoder\nhint: pass its run folder, or an embeddings file written by `byol embed`"
        )
        .into());
    }
    let run = args.input.is_dir().then(|| args.input.clone());
    let file = match &run {
        Some(run) => match embed_run(args, run)? {
            Some(file) => file,
            None => return Ok(ExitCode::from(INTERRUPTED)),
        },
        None => args.input.clone(),
    };
    super::exit_on_ctrl_c();
    let embeddings = Embeddings::open(&file)?;
    // Only images inside the data folder are shown, whatever the file lists.
    let images = embeddings_args::row_images(&embeddings, args.data.as_deref(), Access::InsideData)?;
    let Embeddings { labels, features, .. } = embeddings;
    let index = Index::new(features);
    let method = if args.map == "pca" { Method::Pca } else { Method::Tsne };
    let coordinates = cached_map(&file, &index, method)?;
    let hand_labels = match &run {
        Some(run) => run.join("labels.csv"),
        None => {
            let mut name = file.into_os_string();
            name.push(".labels.csv");
            name.into()
        }
    };
    let collection = server::Collection { index, images, labels, coordinates, method, run, hand_labels };
    let state = server::AppState::new(collection);
    let address = listener.local_addr()?;
    if let Some(missing) = state.first_missing_image() {
        terminal::warning(format!(
            "cannot load {missing} from the data folder; such images are shown without a picture (links that leave the \
             folder are not followed)\nhint: if the images were moved, pass their new folder with `--data`"
        ));
    }
    terminal::note(format!("serving on http://{address} (press Ctrl-C to stop)"));
    server::serve(listener, Arc::new(state))?;
    Ok(ExitCode::SUCCESS)
}

/// Returns the embeddings file of a run's training images, computing it if it is missing or out of
/// date; `None` if interrupted.
fn embed_run(args: &Args, run: &Path) -> Result<Option<PathBuf>> {
    let plan = read_plan(run)?;
    let data = args.data.as_ref().unwrap_or(&plan.data);
    let items = Items::new(data_args::open_moved(data, &plan)?.limit(args.limit), Split::Train);
    let origin = Origin::new(&weights::resolve(run), data, &items, None)?;
    let folder = run.join("explore");
    // One file per encoder and limit. The images themselves may have changed since it was written.
    let file = folder.join(format!("{}-{}.parquet", &origin.encoder_sha256[..12], args.limit));
    let has_same_origin = |e: Embeddings| e.origin.is_some_and(|o| o == origin);
    let written = file.metadata().and_then(|m| m.modified()).ok();
    let written_ms = written.and_then(|at| at.duration_since(UNIX_EPOCH).ok()).map_or(0, |at| at.as_millis());
    let is_newer = written_ms > u128::from(items.modified_ms());
    if is_newer && Embeddings::open(&file).is_ok_and(has_same_origin) {
        return Ok(Some(file));
    }
    fs::create_dir_all(&folder).map_err(|e| {
        format!("cannot create {}: {e}\nhint: check the permissions of the run folder", folder.display())
    })?;
    let opened = super::open_device(args.device)?;
    let encoder = super::load_encoder(run, &opened.device)?;
    let job = Job { encoder: &encoder, items: &items, origin, out: &file };
    let stop = super::stop_soon_flag();
    let embed = || {
        terminal::with_progress("embedding", |progress| {
            job.run(&stop, |done, total| progress(done as u64, total as u64))
        })
    };
    let outcome = match embed() {
        // An earlier computation of other images was interrupted. The folder is a cache.
        Err(embed::Error::Partial { path, .. }) => {
            fs::remove_file(&path).map_err(|e| format!("cannot delete {}: {e}", path.display()))?;
            embed()
        }
        outcome => outcome,
    };
    match outcome? {
        Outcome::Finished { .. } => Ok(Some(file)),
        Outcome::Stopped(_) => Ok(None),
    }
}

/// Returns the map of an embeddings file, cached beside it as `FILE.METHOD.map`: x and y of each
/// row as little-endian f32.
fn cached_map(file: &Path, index: &Index, method: Method) -> Result<Vec<[f32; 2]>> {
    let mut name = file.as_os_str().to_owned();
    name.push(format!(".{}.map", method.name()));
    let cache = PathBuf::from(name);
    let modified = |path: &Path| path.metadata().and_then(|m| m.modified()).ok();
    let is_fresh = modified(&cache) >= modified(file);
    if let Some(bytes) = fs::read(&cache).ok().filter(|b| is_fresh && b.len() == 8 * index.len()) {
        let value = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
        let coordinates: Vec<[f32; 2]> = bytes.chunks_exact(8).map(|b| [value(&b[..4]), value(&b[4..])]).collect();
        if coordinates.iter().flatten().all(|v| v.is_finite()) {
            return Ok(coordinates);
        }
    }
    let coordinates = terminal::with_progress("computing map", |progress| map::layout(index, method, progress));
    let bytes: Vec<u8> = coordinates.iter().flatten().flat_map(|v| v.to_le_bytes()).collect();
    if let Err(e) = atomic_write::write_whole(&cache, &bytes) {
        terminal::warning(format!("cannot cache the map in {}: {e}; it will be recomputed next time", cache.display()));
    }
    Ok(coordinates)
}
