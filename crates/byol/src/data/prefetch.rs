//! Worker threads that decode images and make views ahead of the training step.

use std::{
    cell::RefCell,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc::{Receiver, RecvTimeoutError, sync_channel},
    },
    thread,
    time::{Duration, Instant},
};

use rayon::prelude::*;

use super::{Error, Image, Images, reads};
use crate::views::{self, Augmentation, Draw, Policy, Scratch};

/// Two views of each image of a micro-batch.
///
/// Either augmented views, `[n, size, size, channels]` in 0..1, or crops, `[n, channels, size,
/// size]` in 0..1, that the device still has to augment.
#[derive(Debug, Clone, PartialEq)]
pub struct MicroBatch {
    /// Number of images.
    pub n: usize,
    /// Side of a view in pixels.
    pub size: usize,
    /// Values per pixel.
    pub channels: usize,
    /// Views of the first policy.
    pub v: Vec<f32>,
    /// Views of the second policy.
    pub v2: Vec<f32>,
    /// Augmentations that the device still has to apply to the crops `v` and `v2`, per image;
    /// `None` if the views are augmented.
    pub draws: Option<[Vec<Draw>; 2]>,
}

/// Micro-batches that a loader makes.
#[derive(Debug, Clone)]
pub struct Request {
    /// Training images.
    pub images: Images,
    /// Policies of the two views, T and T′.
    pub policies: [Policy; 2],
    /// User-defined augmentation of both views, applied after the built-in ones. Requires
    /// `crop_only: false`.
    pub augmentation: Option<Arc<dyn Augmentation>>,
    /// Side of a view in pixels.
    pub size: usize,
    /// Crop only and leave the other augmentations to the device.
    pub crop_only: bool,
    /// Images per micro-batch, over all ranks.
    pub n: usize,
    /// Rank and world size: this loader makes one of `part[1]` equal parts of each micro-batch,
    /// counted from 0.
    pub part: [usize; 2],
    /// Size of the shuffle buffer in images, for data in shards.
    pub buffer: usize,
    /// Seed of the order and of every draw.
    pub seed: u64,
    /// First micro-batch, counted from 0.
    pub first: u64,
    /// End of the range of micro-batches, exclusive.
    pub last: u64,
    /// Worker threads, at least 1.
    pub threads: usize,
}

/// Loader of the micro-batches `first..last` in order, made ahead of time by worker threads.
#[derive(Debug)]
pub struct Loader {
    batches: Receiver<Result<MicroBatch, Error>>,
    /// Received by [`Loader::wait`].
    received: RefCell<Option<Result<MicroBatch, Error>>>,
}

/// Longest time that a stop waits for a micro-batch.
const STOP_TIMEOUT: Duration = Duration::from_secs(3);

/// Finished micro-batches that wait in the queue. Two even out variable decoding times.
const QUEUE: usize = 2;

impl Loader {
    /// Starts the workers. They stop when the loader is dropped.
    ///
    /// # Panics
    /// If the system cannot start a thread, a micro-batch does not divide into equal parts, or a
    /// request has both `augmentation` and `crop_only`.
    pub fn start(request: Request) -> Loader {
        assert!(request.n.is_multiple_of(request.part[1]), "a micro-batch must divide into equal parts");
        let on_host = request.augmentation.is_none() || !request.crop_only;
        assert!(on_host, "a user-defined augmentation requires the augmentation placement `cpu`");
        let (send, batches) = sync_channel(QUEUE);
        let work = move || {
            let pool = rayon::ThreadPoolBuilder::new()
                .num_threads(request.threads)
                .thread_name(|i| format!("views-{i}"))
                .start_handler(|_| reads::read_ahead())
                .build()
                .expect("the system starts threads");
            let mut order = request.images.order(request.seed, request.buffer);
            // A clone runs ahead for prefetching: an order caches one epoch at a time.
            let (mut ahead, lookahead) = (order.clone(), request.images.lookahead() as u64);
            let (mut announced, end) = (request.first * request.n as u64, request.last * request.n as u64);
            let request = Arc::new(request);
            for m in request.first..request.last {
                let [part, parts] = request.part.map(|p| p as u64);
                let n = request.n as u64 / parts;
                let start = m * request.n as u64 + part * n;
                while lookahead > 0 && announced < (start + n + lookahead).min(end) {
                    request.images.prefetch(ahead.at(announced).1);
                    announced += 1;
                }
                let items: Vec<(u64, usize)> = (0..n).map(|i| order.at(start + i)).collect();
                let batch = pool.install(|| make_batch(&request, &items));
                let failed = batch.is_err();
                if send.send(batch).is_err() || failed {
                    return; // the loader was dropped, or the error has been delivered
                }
            }
        };
        thread::Builder::new().name("loader".into()).spawn(work).expect("the system starts threads");
        Loader { batches, received: RefCell::new(None) }
    }

    /// Waits for the next micro-batch. Returns false if `stop` is set and the micro-batch does not
    /// arrive within a few seconds, for example because a network drive does not answer.
    pub fn wait(&self, stop: &AtomicBool) -> bool {
        let (mut received, mut stopped) = (self.received.borrow_mut(), None);
        while received.is_none() {
            match self.batches.recv_timeout(Duration::from_millis(200)) {
                Ok(batch) => *received = Some(batch),
                Err(RecvTimeoutError::Disconnected) => return true,
                Err(RecvTimeoutError::Timeout) if stop.load(Ordering::Relaxed) => {
                    if stopped.get_or_insert_with(Instant::now).elapsed() >= STOP_TIMEOUT {
                        return false;
                    }
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        true
    }

    /// Returns the next micro-batch.
    ///
    /// # Errors
    /// [`Error::Image`] if an image that was readable when the run began no longer is.
    ///
    /// # Panics
    /// If called after the last micro-batch or after an error.
    pub fn next_batch(&self) -> Result<MicroBatch, Error> {
        let _reading = reads::start();
        let received = self.received.borrow_mut().take().map_or_else(|| self.batches.recv(), Ok);
        received.expect("the loader sends a micro-batch per step, or an error")
    }
}

/// Draws the parameters of view `key` of `image`, image `i` of `images`, with another of them as
/// background if the policy mixes them.
///
/// # Errors
/// Those of reading the background.
pub fn draw(images: &Images, i: usize, policy: &Policy, image: &Image, key: [u64; 4]) -> Result<Draw, Error> {
    let mut draw = views::draw_for(policy, image, key);
    if let Some(seed) = draw.background_seed().filter(|_| images.len() > 1) {
        let other = (seed % (images.len() as u64 - 1)) as usize;
        draw.set_background(images.get_or_next(if other < i { other } else { other + 1 })?);
    }
    Ok(draw)
}

/// Makes both views of each (epoch, image) in `items`.
fn make_batch(request: &Request, items: &[(u64, usize)]) -> Result<MicroBatch, Error> {
    let channels = request.images.n_channels();
    let view_len = request.size * request.size * channels;
    let (mut v, mut v2) = (vec![0.0; items.len() * view_len], vec![0.0; items.len() * view_len]);
    let outputs = v.par_chunks_exact_mut(view_len).zip(v2.par_chunks_exact_mut(view_len)).zip(items.par_iter());
    let draws = outputs.map_init(Scratch::default, |scratch, ((v, v2), &(epoch, index))| {
        let (image, size) = (request.images.get_or_next(index)?, request.size);
        let mut draws = Vec::new();
        for (which, (out, policy)) in [v, v2].into_iter().zip(&request.policies).enumerate() {
            let key = [request.seed, epoch, index as u64, which as u64];
            let draw = draw(&request.images, index, policy, &image, key)?;
            match request.crop_only {
                true => {
                    views::crop_into(&draw, &image, size, scratch, out);
                    draws.push(draw);
                }
                false => {
                    let augmentation = request.augmentation.as_deref();
                    views::view_into(&draw, augmentation, &image, size, key, scratch, out);
                }
            }
        }
        Ok(<[Draw; 2]>::try_from(draws).ok())
    });
    let draws = draws.collect::<Result<Vec<_>, Error>>()?;
    let draws = request.crop_only.then(|| draws.into_iter().flatten().map(|[first, second]| (first, second)).unzip());
    let draws = draws.map(|(first, second)| [first, second]);
    Ok(MicroBatch { n: items.len(), size: request.size, channels, v, v2, draws })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        data::synthetic,
        random::uniform,
        views::{ChaCha8Rng, View},
    };

    /// Four micro-batches of four images.
    fn request(images: Images) -> Request {
        Request {
            images,
            policies: [Policy::default(), Policy::second()],
            augmentation: None,
            size: 16,
            crop_only: false,
            n: 4,
            part: [0, 1],
            buffer: 1,
            seed: 7,
            first: 0,
            last: 4,
            threads: 2,
        }
    }

    fn batches(augmentation: Option<Arc<dyn Augmentation>>, threads: usize) -> Vec<MicroBatch> {
        let images = synthetic::dataset(1, 12, 0).train;
        let loader = Loader::start(Request { augmentation, threads, ..request(images) });
        (0..4).map(|_| loader.next_batch().unwrap()).collect()
    }

    /// Shifts the first channel by a random offset.
    fn shift_red(view: &mut View, rng: &mut ChaCha8Rng) {
        let offset = uniform(rng) as f32;
        let plane = view.height * view.width;
        view.pixels[..plane].iter_mut().for_each(|v| *v += offset);
    }

    #[test]
    fn user_defined_augmentation_follows_the_built_in_ones() {
        let (plain, shifted) = (batches(None, 2), batches(Some(Arc::new(shift_red)), 2));
        for (plain, shifted) in plain.iter().zip(&shifted) {
            for (plain, shifted) in [(&plain.v, &shifted.v), (&plain.v2, &shifted.v2)] {
                let pairs = || plain.as_chunks::<3>().0.iter().zip(shifted.as_chunks::<3>().0);
                assert!(pairs().all(|(p, s)| p[0] <= s[0] && s[0] <= 1.0 && p[1..] == s[1..]));
                assert!(pairs().any(|(p, s)| p[0] < s[0]));
            }
            assert_ne!(shifted.v, shifted.v2);
        }
    }

    #[test]
    fn user_defined_augmentation_is_deterministic_for_any_thread_count() {
        let augmentation = || Some(Arc::new(shift_red) as Arc<dyn Augmentation>);
        assert_eq!(batches(augmentation(), 1), batches(augmentation(), 3));
    }

    #[test]
    fn built_in_draws_do_not_depend_on_a_user_defined_augmentation() {
        let consume = |_: &mut View, rng: &mut ChaCha8Rng| {
            let _ = uniform(rng);
        };
        assert_eq!(batches(None, 2), batches(Some(Arc::new(consume)), 2));
    }

    #[test]
    #[should_panic(expected = "placement `cpu`")]
    fn user_defined_augmentation_is_refused_with_crops_only() {
        let images = synthetic::dataset(1, 2, 0).train;
        Loader::start(Request { augmentation: Some(Arc::new(shift_red)), crop_only: true, ..request(images) });
    }

    #[cfg(unix)]
    #[test]
    fn a_stop_does_not_wait_for_an_image_that_never_arrives() {
        let folder = tempfile::tempdir().unwrap();
        for i in 0..4 {
            let path = folder.path().join(format!("{i}.png"));
            image::RgbImage::new(8, 8).save(&path).unwrap();
        }
        let images = crate::data::Dataset::open(folder.path()).unwrap().train;
        // Stands for a drive that does not answer.
        let pipe = folder.path().join("2.png");
        std::fs::remove_file(&pipe).unwrap();
        assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
        let loader = Loader::start(request(images));
        assert!(!loader.wait(&AtomicBool::new(true)));
        // Ends the read.
        std::fs::write(&pipe, b"no image").unwrap();
        assert!(loader.wait(&AtomicBool::new(true)));
        assert!(loader.next_batch().is_err());
    }
}
