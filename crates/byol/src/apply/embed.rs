//! Embedding a folder of any size: batch by batch, with what is done on disk, so that a killed run goes on where it was.
//!
//! While it works, `FILE.partial-rows` holds a line that says what it is of, and then a record an image: its numbers as f32, and a checksum, which
//! says too whether the image could be used; little-endian. Only when all are there, `FILE` itself is written.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::embeddings::{self, Origin, Rows, Writer};
use crate::{
    data::{self, CHANNELS, Dataset, Images},
    eval::batch_for,
    nn::{Encoder, weights},
    views::evaluation_view,
};

/// Why embedding stops.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The output.
    #[error(transparent)]
    Output(#[from] embeddings::Error),
    /// The data.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// What is on disk of an earlier run is of something else.
    #[error("{} is of an earlier run with {what}; remove it, or run the earlier command to its end", path.display())]
    Partial {
        /// `FILE.partial-rows`.
        path: PathBuf,
        /// What differs.
        what: String,
    },
    /// Another process writes it.
    #[error("{} is being written by another byol; wait for it, or choose another -o", .0.display())]
    Busy(PathBuf),
    /// The encoder computes no numbers.
    #[error(
        "{encoder} gives {value}: its weights are of a run that has diverged; use an earlier one, such as best.safetensors"
    )]
    NoNumbers {
        /// Which.
        encoder: String,
        /// What it gave.
        value: f32,
    },
    /// No such part.
    #[error("shard {part} of {of} of {images} images; choose a part from 1 to N, and N of at most the images")]
    Shard {
        /// Which.
        part: usize,
        /// Of how many.
        of: usize,
        /// All images.
        images: usize,
    },
}

/// All images of a data set in its order: training, validation, test.
#[derive(Debug, Clone)]
pub struct Items {
    splits: Vec<(&'static str, Images)>,
    classes: Vec<String>,
}

/// Which split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// All of them.
    All,
    /// What is trained on.
    Train,
    /// The data's own `test`, else `val`.
    Test,
}

impl Items {
    /// The images of these data.
    pub fn of(dataset: Dataset, split: Split) -> Items {
        let Dataset { train, held_out, test, classes, .. } = dataset;
        // A set with one other split has it twice.
        let val = held_out.filter(|v| test.as_ref().is_none_or(|t| t.fingerprint() != v.fingerprint()));
        let splits: Vec<_> = match split {
            Split::Train => vec![("train", Some(train))],
            Split::Test => vec![("test", test.or(val))],
            Split::All => vec![("train", Some(train)), ("val", val), ("test", test)],
        };
        let splits = splits.into_iter().filter_map(|(name, images)| Some((name, images?))).collect();
        Items { splits, classes }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.splits.iter().map(|(_, images)| images.len()).sum()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn at(&self, i: usize) -> (&'static str, &Images, usize) {
        let mut i = i;
        for (split, images) in &self.splits {
            if i < images.len() {
                return (split, images, i);
            }
            i -= images.len();
        }
        panic!("there is no such image")
    }

    /// Image `i`, decoded.
    ///
    /// # Errors
    /// [`data::Error::Image`].
    pub fn get(&self, i: usize) -> Result<std::sync::Arc<data::Image>, data::Error> {
        let (_, images, i) = self.at(i);
        images.get(i)
    }

    /// The file of image `i`, where it is one.
    pub fn path(&self, i: usize) -> Option<&Path> {
        let (_, images, i) = self.at(i);
        images.path(i)
    }

    /// Its path; of an image that is no file its split and number.
    pub fn name(&self, i: usize) -> String {
        let (split, images, i) = self.at(i);
        if images.path(i).is_some() { images.name(i) } else { format!("{split} {}", images.name(i)) }
    }

    /// Its class.
    pub fn label(&self, i: usize) -> Option<&str> {
        let (_, images, i) = self.at(i);
        images.labels().map(|l| self.classes[l[i]].as_str())
    }

    /// Whether all have one.
    pub fn labelled(&self) -> bool {
        !self.is_empty() && self.splits.iter().all(|(_, images)| images.labels().is_some())
    }

    /// When the newest of the files was changed, in milliseconds since 1970; 0 where images are no files.
    pub fn changed(&self) -> u64 {
        let of = |path: &Path| {
            let since = path.metadata().ok()?.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
            u64::try_from(since.as_millis()).ok()
        };
        (0..self.len()).filter_map(|i| of(self.path(i)?)).max().unwrap_or(0)
    }

    /// A hash of names, sizes and order.
    pub fn fingerprint(&self) -> String {
        self.splits.iter().map(|(_, images)| images.fingerprint()).collect::<Vec<_>>().join("-")
    }
}

impl Origin {
    /// Of these images by the encoder in this file.
    ///
    /// # Errors
    /// [`weights::Error::Read`].
    pub fn new(
        encoder: &Path,
        data: &Path,
        items: &Items,
        shard: Option<[usize; 2]>,
    ) -> Result<Origin, weights::Error> {
        Ok(Origin {
            version: env!("CARGO_PKG_VERSION").into(),
            encoder_sha256: weights::sha256(encoder)?,
            encoder: encoder.display().to_string(),
            data: data.display().to_string(),
            fingerprint: items.fingerprint(),
            shard,
        })
    }
}

/// What is embedded, and where to.
#[derive(Debug)]
pub struct Job<'a> {
    /// By what.
    pub encoder: &'a Encoder,
    /// The images.
    pub items: &'a Items,
    /// Says what all this is.
    pub origin: Origin,
    /// The file to write.
    pub out: &'a Path,
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All of it: rows written, and images that could not be used, with the reasons.
    Finished {
        /// Rows.
        rows: usize,
        /// One line each.
        skipped: Vec<String>,
    },
    /// Stopped by the flag after so many images; the same command goes on.
    Stopped(usize),
}

/// What is there of an earlier run.
struct Begun {
    file: File,
    /// Bytes of the first line.
    head: u64,
    /// Whole records.
    whole: usize,
    /// Those of images that could not be used.
    unusable: Vec<usize>,
}

/// The first line of `FILE.partial-rows`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    origin: Origin,
    dim: usize,
    /// [`Items::changed`]
    changed: u64,
}

/// Batches that are decoded and written together: enough work for all threads.
const BATCHES: usize = 2;

/// Rows that are copied into the final file at a time.
const ROWS: usize = 4096;

impl Job<'_> {
    /// The images of this job: all, or those of its shard, which lie together.
    ///
    /// # Errors
    /// [`Error::Shard`].
    fn range(&self) -> Result<std::ops::Range<usize>, Error> {
        let n = self.items.len();
        match self.origin.shard {
            None => Ok(0..n),
            Some([part, of]) if part == 0 || part > of || of > n => Err(Error::Shard { part, of, images: n }),
            Some([part, of]) => Ok((part - 1) * n / of..part * n / of),
        }
    }

    /// Embeds what is not yet on disk, then writes the file. `done` gets the number of images done so far, of how many.
    ///
    /// # Errors
    /// Any [`Error`].
    pub fn run(&self, stop: &AtomicBool, mut done: impl FnMut(usize, usize)) -> Result<Outcome, Error> {
        embeddings::files(self.out)?;
        let range = self.range()?;
        if range.is_empty() {
            return Err(data::Error::Empty(PathBuf::from(&self.origin.data)).into());
        }
        let dim = self.encoder.features();
        let mut name = self.out.as_os_str().to_owned();
        name.push(".partial-rows");
        let path = PathBuf::from(name);
        let write = |source| embeddings::Error::Write { path: path.clone(), source };
        let Begun { mut file, head, whole: mut next, unusable } = self.begin(&path, dim)?;
        let size = self.encoder.spec.size;
        // What could not be used before may have been the disk's fault.
        for i in unusable {
            let again = self.records(range.start + i..range.start + i + 1)?;
            if is_good(&again) {
                let at = head + (i * record(dim)) as u64;
                file.seek(SeekFrom::Start(at)).and_then(|_| file.write_all(&again)).map_err(write)?;
            }
        }
        file.seek(SeekFrom::Start(head + (next * record(dim)) as u64)).map_err(write)?;
        done(next, range.len());
        while next < range.len() {
            if stop.load(Ordering::Relaxed) {
                return Ok(Outcome::Stopped(next));
            }
            let some = next..(next + BATCHES * batch_for(size)).min(range.len());
            let records = self.records(range.start + some.start..range.start + some.end)?;
            file.write_all(&records).map_err(write)?;
            next = some.end;
            done(next, range.len());
        }
        file.sync_all().map_err(write)?;
        let outcome = self.finish(file, &path, dim, range);
        // Data of which most cannot be used have to change, and with them these records.
        if matches!(outcome, Ok(_) | Err(Error::Data(data::Error::MostlyBad { .. }))) {
            fs::remove_file(&path).map_err(write)?;
        }
        outcome
    }

    /// Opens the partial file, cut behind its last whole record.
    fn begin(&self, path: &Path, dim: usize) -> Result<Begun, Error> {
        let write = |source| embeddings::Error::Write { path: path.to_owned(), source };
        let head = Head { origin: self.origin.clone(), dim, changed: self.items.changed() };
        let mut line = serde_json::to_string(&head).expect("a head is plain data");
        line.push('\n');
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(write)?;
        if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
            return Err(Error::Busy(path.to_owned()));
        }
        let length = file.metadata().map_err(write)?.len();
        if length == 0 {
            file.write_all(line.as_bytes()).map_err(write)?;
            return Ok(Begun { file, head: line.len() as u64, whole: 0, unusable: Vec::new() });
        }
        let mut first = String::new();
        // A line is short; what is not one ends the reading too.
        BufReader::new(&file).take(1 << 20).read_line(&mut first).map_err(|_| self.other(path, "other contents"))?;
        let found: Head = serde_json::from_str(&first).map_err(|_| self.other(path, "other contents"))?;
        if found != head {
            let (a, b) = (&found.origin, &head.origin);
            let what = if a.encoder_sha256 != b.encoder_sha256 {
                "another encoder"
            } else if a.shard != b.shard {
                "another --shard"
            } else if a.version != b.version {
                "another version of byol"
            } else {
                "other images"
            };
            return Err(self.other(path, what));
        }
        // Up to the first that is cut off or not whole: a system that lost its power leaves zeros.
        let head = first.len() as u64;
        let mut reader = BufReader::new(&file);
        reader.seek(SeekFrom::Start(head)).map_err(write)?;
        let (mut one, mut whole, mut unusable) = (vec![0u8; record(dim)], 0, Vec::new());
        while reader.read_exact(&mut one).is_ok() && (is_good(&one) || is_unusable(&one)) {
            if is_unusable(&one) {
                unusable.push(whole);
            }
            whole += 1;
        }
        drop(reader);
        file.set_len(head + (whole * record(dim)) as u64).map_err(write)?;
        Ok(Begun { file, head, whole, unusable })
    }

    fn other(&self, path: &Path, what: &str) -> Error {
        Error::Partial { path: path.to_owned(), what: what.to_owned() }
    }

    /// The records of some images.
    fn records(&self, some: std::ops::Range<usize>) -> Result<Vec<u8>, Error> {
        let (spec, dim) = (&self.encoder.spec, self.encoder.features());
        let look = |i: usize| match self.items.get(i) {
            Ok(image) => Ok(Some(evaluation_view(&image, spec.size, spec.center).interleaved())),
            Err(data::Error::Image { .. }) => Ok(None),
            Err(other) => Err(other),
        };
        let views: Vec<Option<Vec<f32>>> = some.into_par_iter().map(look).collect::<Result<_, _>>()?;
        let good: Vec<&Vec<f32>> = views.iter().flatten().collect();
        let mut rows = Vec::with_capacity(good.len() * dim);
        for batch in good.chunks(batch_for(spec.size)) {
            let values: Vec<f32> = batch.iter().flat_map(|v| v.iter().copied()).collect();
            let x = TensorData::new(values, [batch.len(), spec.size, spec.size, CHANNELS]);
            let x = Tensor::from_data(x, &self.encoder.device());
            rows.extend(crate::nn::tree::host(self.encoder.embed(x)));
        }
        if let Some(v) = rows.iter().find(|v| !v.is_finite()) {
            return Err(Error::NoNumbers { encoder: self.origin.encoder.clone(), value: *v });
        }
        let (mut records, mut rows) = (Vec::with_capacity(views.len() * record(dim)), rows.chunks_exact(dim));
        let none = vec![0.0f32; dim];
        for view in &views {
            let row = view.as_ref().and_then(|_| rows.next());
            let values: Vec<u8> = row.unwrap_or(&none).iter().flat_map(|v| v.to_le_bytes()).collect();
            records.extend(&values);
            records.extend(checksum(&values, row.is_some()).to_le_bytes());
        }
        Ok(records)
    }

    /// Copies the records into the file that was asked for.
    fn finish(&self, mut file: File, path: &Path, dim: usize, range: std::ops::Range<usize>) -> Result<Outcome, Error> {
        let read = |source| embeddings::Error::Read { path: path.to_owned(), source };
        let rewind = |file: &mut File| -> io::Result<BufReader<File>> {
            file.seek(SeekFrom::Start(0))?;
            let mut reader = BufReader::with_capacity(1 << 20, file.try_clone()?);
            reader.read_line(&mut String::new())?;
            Ok(reader)
        };
        let mut one = vec![0u8; record(dim)];
        let mut reader = rewind(&mut file).map_err(read)?;
        let mut good = Vec::with_capacity(range.len());
        for _ in range.clone() {
            reader.read_exact(&mut one).map_err(read)?;
            good.push(is_good(&one));
        }
        let bad: Vec<usize> = range.clone().filter(|i| !good[i - range.start]).collect();
        let reason = |i: &usize| self.items.get(*i).err().map_or_else(|| self.items.name(*i), |e| e.to_string());
        let skipped: Vec<String> = bad.iter().map(reason).collect();
        let n = range.len() - bad.len();
        if 2 * bad.len() > range.len() {
            let root = PathBuf::from(&self.origin.data);
            let first = skipped.first().cloned().unwrap_or_default();
            return Err(data::Error::MostlyBad { root, bad: bad.len(), all: range.len(), first }.into());
        }
        let labelled = self.items.labelled();
        let mut writer = Writer::new(self.out, self.origin.clone(), n, dim, labelled)?;
        let mut reader = rewind(&mut file).map_err(read)?;
        let all: Vec<usize> = range.collect();
        for some in all.chunks(ROWS) {
            let (mut paths, mut labels, mut values) = (Vec::new(), Vec::new(), Vec::with_capacity(some.len() * dim));
            for i in some {
                reader.read_exact(&mut one).map_err(read)?;
                if is_good(&one) {
                    paths.push(self.items.name(*i));
                    labels.extend(self.items.label(*i).map(str::to_owned));
                    values.extend(one[..4 * dim].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
                }
            }
            writer.push(Rows { paths: &paths, labels: labelled.then_some(&labels), values: &values })?;
        }
        writer.finish()?;
        Ok(Outcome::Finished { rows: n, skipped })
    }
}

/// What a record ends with.
fn checksum(values: &[u8], good: bool) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(values);
    crc.sum() ^ if good { 0 } else { 0xBAD }
}

/// Whether a record is whole, and of an image that could be used.
fn is_good(record: &[u8]) -> bool {
    let (values, sum) = record.split_at(record.len() - 4);
    sum == checksum(values, true).to_le_bytes()
}

/// Whether a record is whole, and of an image that could not be used.
fn is_unusable(record: &[u8]) -> bool {
    let (values, sum) = record.split_at(record.len() - 4);
    sum == checksum(values, false).to_le_bytes()
}

/// Bytes of a record.
fn record(dim: usize) -> usize {
    4 + 4 * dim
}
