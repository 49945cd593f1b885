//! Worker threads that decode and make views ahead of the training step.

use std::{
    sync::{
        Arc,
        mpsc::{Receiver, sync_channel},
    },
    thread,
};

use rayon::prelude::*;

use super::{Error, Images};
use crate::views::{self, Draw, Policy, Room};

/// Two views of the same images: `[n, size, size, channels]` each, values in 0..1; or their crops, with what is left to the device.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// Images.
    pub n: usize,
    /// Side of a view.
    pub size: usize,
    /// Values a pixel.
    pub channels: usize,
    /// Views by the first policy.
    pub v: Vec<f32>,
    /// Views by the second policy.
    pub v2: Vec<f32>,
    /// What is still to be done with each image, by the first policy and the second: then the values are crops as planes,
    /// `[n, channels, size, size]`. None: they are finished.
    pub rest: Option<[Vec<Draw>; 2]>,
}

/// What a loader makes.
#[derive(Debug, Clone)]
pub struct Request {
    /// The images.
    pub images: Images,
    /// T and T′.
    pub policies: [Policy; 2],
    /// Side of a view in pixels.
    pub size: usize,
    /// Crop alone, and leave the rest to the device.
    pub crops: bool,
    /// Images a micro-batch, of all ranks together.
    pub n: usize,
    /// Which of how many equal parts of each micro-batch this loader makes, from 0: `[0, 1]` is the whole.
    pub part: [usize; 2],
    /// Images that the buffer mixes, of data in shards.
    pub buffer: usize,
    /// Names the order and every draw.
    pub seed: u64,
    /// The first micro-batch wanted, from 0.
    pub first: u64,
    /// One past the last.
    pub last: u64,
    /// Worker threads, at least 1.
    pub threads: usize,
}

/// Micro-batches `first..last` in their order, made ahead by worker threads.
#[derive(Debug)]
pub struct Loader {
    batches: Receiver<Result<MicroBatch, Error>>,
}

/// Micro-batches that wait, beyond the one in work. Two hide the unevenness of decoding.
const AHEAD: usize = 2;

impl Loader {
    /// Starts the workers. They stop when the loader is dropped.
    ///
    /// # Panics
    /// If the system starts no thread, or the parts of a micro-batch are not equal.
    pub fn start(request: Request) -> Loader {
        assert!(request.n.is_multiple_of(request.part[1]), "equal parts of a micro-batch");
        let (send, batches) = sync_channel(AHEAD);
        let work = move || {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(request.threads)
                .thread_name(|i| format!("views-{i}"))
                .build()
                .expect("the system starts threads");
            let mut order = request.images.order(request.seed, request.buffer);
            // A second one runs ahead: each knows one epoch at a time.
            let (mut ahead, lookahead) = (order.clone(), request.images.lookahead() as u64);
            let (mut told, end) = (request.first * request.n as u64, request.last * request.n as u64);
            let request = Arc::new(request);
            for m in request.first..request.last {
                let [part, parts] = request.part.map(|p| p as u64);
                let n = request.n as u64 / parts;
                let start = m * request.n as u64 + part * n;
                while lookahead > 0 && told < (start + n + lookahead).min(end) {
                    request.images.coming(ahead.at(told).1);
                    told += 1;
                }
                let wanted: Vec<(u64, usize)> = (0..n).map(|i| order.at(start + i)).collect();
                let batch = pool.install(|| make(&request, &wanted));
                let failed = batch.is_err();
                if send.send(batch).is_err() || failed {
                    return; // nobody listens any more, or there is nothing sensible to follow
                }
            }
        };
        thread::Builder::new().name("loader".into()).spawn(work).expect("the system starts threads");
        Loader { batches }
    }

    /// The next micro-batch.
    ///
    /// # Errors
    /// [`Error::Image`] if an image that could be decoded when the run began no longer can.
    ///
    /// # Panics
    /// If asked beyond the last.
    pub fn next_batch(&self) -> Result<MicroBatch, Error> {
        self.batches.recv().expect("the loader has a micro-batch for every step, or said why not")
    }
}

/// Both views of each wanted (epoch, image).
fn make(request: &Request, wanted: &[(u64, usize)]) -> Result<MicroBatch, Error> {
    let channels = super::CHANNELS;
    let view = request.size * request.size * channels;
    let (mut v, mut v2) = (vec![0.0; wanted.len() * view], vec![0.0; wanted.len() * view]);
    let places = v.par_chunks_exact_mut(view).zip(v2.par_chunks_exact_mut(view)).zip(wanted.par_iter());
    let rests = places.map_init(Room::default, |room, ((v, v2), &(epoch, index))| {
        let (image, size) = (request.images.get_or_next(index)?, request.size);
        let mut rest = Vec::new();
        for (which, (out, policy)) in [v, v2].into_iter().zip(&request.policies).enumerate() {
            let name = [request.seed, epoch, index as u64, which as u64];
            match request.crops {
                true => rest.push(views::crop_into(policy, &image, size, name, room, out)),
                false => views::view_into(policy, &image, size, name, room, out),
            }
        }
        Ok(<[Draw; 2]>::try_from(rest).ok())
    });
    let rests = rests.collect::<Result<Vec<_>, Error>>()?;
    let rest = request.crops.then(|| rests.into_iter().flatten().map(|[first, second]| (first, second)).unzip());
    let rest = rest.map(|(first, second)| [first, second]);
    Ok(MicroBatch { n: wanted.len(), size: request.size, channels, v, v2, rest })
}
