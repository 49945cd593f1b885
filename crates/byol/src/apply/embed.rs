//! Embedding data sets of any size: batch by batch, with the results on disk, so that an
//! interrupted job resumes where it stopped.
//!
//! During the job `FILE.partial-rows` holds a header line that identifies the job, followed by one
//! record per image: its embedding as f32 and a checksum that also marks unusable images,
//! little-endian. `FILE` itself is written once all records are complete.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write},
    ops::Range,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use burn::tensor::{Tensor, TensorData};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::embeddings::{self, Origin, Rows, Writer};
use crate::{
    data::{self, Dataset, Images, Levels},
    eval::batch_size,
    image::Image,
    nn::{Encoder, tree::host, weights},
};

/// Error of an embedding job.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The output cannot be written.
    #[error(transparent)]
    Output(#[from] embeddings::Error),
    /// The data cannot be used.
    #[error(transparent)]
    Data(#[from] data::Error),
    /// The partial file belongs to a different job.
    #[error("{} was written with {difference}\nhint: delete it, or finish the earlier command first", path.display())]
    Partial {
        /// `FILE.partial-rows`.
        path: PathBuf,
        /// Setting that differs.
        difference: String,
    },
    /// Another process writes the partial file.
    #[error("{} is in use by another byol process\nhint: wait for it to finish, or choose another `-o`", .0.display())]
    Busy(PathBuf),
    /// The encoder outputs NaN or infinity.
    #[error(
        "encoder {encoder} outputs {value}: its training has diverged\n\
         hint: use an earlier checkpoint, e.g. `best.safetensors`"
    )]
    NonFinite {
        /// Encoder file.
        encoder: String,
        /// First value that is not finite.
        value: f32,
    },
    /// The shard does not exist.
    #[error(
        "invalid shard {shard}/{count} of {images} images\n\
         hint: use I/N with I from 1 to N and N at most the number of images"
    )]
    Shard {
        /// Shard number, from 1.
        shard: usize,
        /// Number of shards.
        count: usize,
        /// Number of images in the data set.
        images: usize,
    },
}

/// Images of a data set in a fixed order: training, validation, test.
#[derive(Debug, Clone)]
pub struct Items {
    splits: Vec<(&'static str, Images)>,
    classes: Vec<String>,
    /// Image column of Parquet files, if it was chosen.
    column: Option<String>,
    /// Mapping of file values to pixels.
    levels: Levels,
}

/// Split of a data set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// All images.
    All,
    /// Training images.
    Train,
    /// The data's `val` split, or `test` if there is none.
    Val,
    /// The data's `test` split, or `val` if there is none.
    Test,
}

impl Items {
    /// Lists the images of a split.
    pub fn new(dataset: Dataset, split: Split) -> Items {
        let levels = dataset.levels();
        let Dataset { train, held_out, test, classes, column, .. } = dataset;
        // A data set with a single other split has it as both `held_out` and `test`.
        let val = held_out.filter(|v| test.as_ref().is_none_or(|t| t.fingerprint() != v.fingerprint()));
        let splits: Vec<_> = match split {
            Split::Train => vec![("train", Some(train))],
            Split::Val => vec![("val", val.or(test))],
            Split::Test => vec![("test", test.or(val))],
            Split::All => vec![("train", Some(train)), ("val", val), ("test", test)],
        };
        let splits = splits.into_iter().filter_map(|(name, images)| Some((name, images?))).collect();
        Items { splits, classes, column, levels }
    }

    /// Keeps a stratified random sample of `n` images per split; 0 keeps all.
    pub fn limit(mut self, n: usize) -> Items {
        self.splits.iter_mut().for_each(|(_, images)| *images = images.sample_random(n));
        self
    }

    /// Number of images.
    pub fn len(&self) -> usize {
        self.splits.iter().map(|(_, images)| images.len()).sum()
    }

    /// Returns true if there are no images.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Split of image `i` and its index there.
    fn locate(&self, i: usize) -> (&'static str, &Images, usize) {
        let mut i = i;
        for (split, images) in &self.splits {
            if i < images.len() {
                return (split, images, i);
            }
            i -= images.len();
        }
        panic!("image index out of range")
    }

    /// Decodes image `i`.
    ///
    /// # Errors
    /// [`data::Error::Image`].
    pub fn get(&self, i: usize) -> Result<std::sync::Arc<Image>, data::Error> {
        let (_, images, i) = self.locate(i);
        images.get(i)
    }

    /// File of image `i`; `None` for an image inside a packed file.
    pub fn path(&self, i: usize) -> Option<&Path> {
        let (_, images, i) = self.locate(i);
        images.path(i)
    }

    /// Path of image `i`; split and number for an image inside a packed file.
    pub fn name(&self, i: usize) -> String {
        let (split, images, i) = self.locate(i);
        if images.path(i).is_some() { images.name(i) } else { format!("{split} {}", images.name(i)) }
    }

    /// Class name of image `i`.
    pub fn label(&self, i: usize) -> Option<&str> {
        let (_, images, i) = self.locate(i);
        images.label(i).map(|class| self.classes[class].as_str())
    }

    /// Returns true if at least one image has a label.
    pub(crate) fn has_labels(&self) -> bool {
        (0..self.len()).any(|i| self.label(i).is_some())
    }

    /// Latest modification time of the image files, in milliseconds since 1970; 0 if the images are
    /// not files.
    pub fn modified_ms(&self) -> u64 {
        let modified_ms = |path: &Path| {
            let since = path.metadata().ok()?.modified().ok()?.duration_since(std::time::UNIX_EPOCH).ok()?;
            u64::try_from(since.as_millis()).ok()
        };
        (0..self.len()).filter_map(|i| modified_ms(self.path(i)?)).max().unwrap_or(0)
    }

    /// Hash of the images' names, sizes and order.
    pub fn fingerprint(&self) -> String {
        self.splits.iter().map(|(_, images)| images.fingerprint()).collect::<Vec<_>>().join("-")
    }
}

impl Origin {
    /// Describes embeddings of `items` by the encoder file `encoder`.
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
            column: items.column.clone(),
            levels: items.levels.clone(),
        })
    }
}

/// Embedding job.
///
/// # Examples
///
/// ```no_run
/// use std::{path::Path, sync::atomic::AtomicBool};
///
/// use byol::{
///     Dataset, Encoder,
///     apply::{embed::{Items, Job, Outcome, Split}, embeddings::Origin},
/// };
///
/// let (file, data) = (Path::new("byol-runs/photos/encoder.safetensors"), Path::new("photos"));
/// let encoder = Encoder::open(file)?;
/// let items = Items::new(Dataset::open(data)?, Split::All);
/// let origin = Origin::new(file, data, &items, None)?;
/// let job = Job { encoder: &encoder, items: &items, origin, out: Path::new("photos.parquet") };
/// if let Outcome::Finished { rows, skipped } = job.run(&AtomicBool::new(false), |_, _| ())? {
///     println!("{rows} rows, {} images skipped", skipped.len());
/// }
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Job<'a> {
    /// The encoder.
    pub encoder: &'a Encoder,
    /// The images, of which [`Origin::shard`] selects a part.
    pub items: &'a Items,
    /// Description stored with the embeddings.
    pub origin: Origin,
    /// Output file.
    pub out: &'a Path,
}

/// Outcome of [`Job::run`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The output file is complete.
    Finished {
        /// Rows written.
        rows: usize,
        /// Skipped images with the reason, one line each.
        skipped: Vec<String>,
    },
    /// Stopped by the flag after this number of images; the next run resumes there.
    Stopped(usize),
}

/// Opened partial file.
struct Partial {
    file: File,
    /// Length of the header line in bytes.
    header_len: u64,
    /// Number of complete records.
    complete: usize,
    /// Complete records of unusable images.
    unusable: Vec<usize>,
}

/// Header line of the partial file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Header {
    origin: Origin,
    dim: usize,
    /// [`Items::modified_ms`].
    #[serde(rename = "changed")]
    modified_ms: u64,
}

/// Batches that are decoded and written together: enough work for all threads.
const BATCHES: usize = 2;

/// Rows copied into the output file at a time.
const COPY_ROWS: usize = 4096;

impl Job<'_> {
    /// Indices of the images of this job: all, or the contiguous range of its shard.
    ///
    /// # Errors
    /// [`Error::Shard`].
    fn range(&self) -> Result<Range<usize>, Error> {
        let n = self.items.len();
        match self.origin.shard {
            None => Ok(0..n),
            Some([shard, count]) if shard == 0 || shard > count || count > n => {
                Err(Error::Shard { shard, count, images: n })
            }
            Some([shard, count]) => Ok((shard - 1) * n / count..shard * n / count),
        }
    }

    /// Embeds the images that are not in the partial file yet, then writes the output file.
    /// `on_progress` receives the number of images done and their total.
    ///
    /// # Errors
    /// Any [`Error`].
    pub fn run(&self, stop: &AtomicBool, mut on_progress: impl FnMut(usize, usize)) -> Result<Outcome, Error> {
        embeddings::output_files(self.out)?;
        for (_, images) in &self.items.splits {
            images.ensure_input(self.encoder.spec.channels, &self.encoder.spec.levels)?;
        }
        let range = self.range()?;
        if range.is_empty() {
            return Err(data::Error::Empty(PathBuf::from(&self.origin.data)).into());
        }
        let dim = self.encoder.features();
        let mut name = self.out.as_os_str().to_owned();
        name.push(".partial-rows");
        let path = PathBuf::from(name);
        let write_error = |source| embeddings::Error::Write { path: path.clone(), source };
        let Partial { mut file, header_len, complete, unusable } = self.open_partial(&path, dim)?;
        let size = self.encoder.spec.size;
        // Images that were unusable are retried: the disk may have been at fault.
        for i in unusable {
            let record = self.records(range.start + i..range.start + i + 1)?;
            if is_embedding(&record) {
                let offset = header_len + (i * record_len(dim)) as u64;
                file.seek(SeekFrom::Start(offset)).and_then(|_| file.write_all(&record)).map_err(write_error)?;
            }
        }
        file.seek(SeekFrom::Start(header_len + (complete * record_len(dim)) as u64)).map_err(write_error)?;
        let mut done = complete;
        on_progress(done, range.len());
        while done < range.len() {
            if stop.load(Ordering::Relaxed) {
                return Ok(Outcome::Stopped(done));
            }
            let next = (done + BATCHES * batch_size(size)).min(range.len());
            let records = self.records(range.start + done..range.start + next)?;
            file.write_all(&records).map_err(write_error)?;
            done = next;
            on_progress(done, range.len());
        }
        file.sync_all().map_err(write_error)?;
        let outcome = self.finish(file, &path, dim, range);
        // If most images are bad, the data must be fixed, which invalidates the records.
        if matches!(outcome, Ok(_) | Err(Error::Data(data::Error::MostlyBad { .. }))) {
            fs::remove_file(&path).map_err(write_error)?;
        }
        outcome
    }

    /// Opens or creates the partial file and truncates it after its last complete record.
    fn open_partial(&self, path: &Path, dim: usize) -> Result<Partial, Error> {
        let write_error = |source| embeddings::Error::Write { path: path.to_owned(), source };
        let header = Header { origin: self.origin.clone(), dim, modified_ms: self.items.modified_ms() };
        let mut line = serde_json::to_string(&header).expect("a header serializes");
        line.push('\n');
        let mut file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(write_error)?;
        if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
            return Err(Error::Busy(path.to_owned()));
        }
        let file_len = file.metadata().map_err(write_error)?.len();
        if file_len == 0 {
            file.write_all(line.as_bytes()).map_err(write_error)?;
            return Ok(Partial { file, header_len: line.len() as u64, complete: 0, unusable: Vec::new() });
        }
        let mismatch = |difference: &str| Error::Partial { path: path.to_owned(), difference: difference.to_owned() };
        let mut first = String::new();
        // The limit bounds the read if the file does not start with a line.
        BufReader::new(&file).take(1 << 20).read_line(&mut first).map_err(|_| mismatch("different contents"))?;
        let existing: Header = serde_json::from_str(&first).map_err(|_| mismatch("different contents"))?;
        if existing != header {
            let (a, b) = (&existing.origin, &header.origin);
            return Err(mismatch(if a.encoder_sha256 != b.encoder_sha256 {
                "another encoder"
            } else if a.shard != b.shard {
                "another --shard"
            } else if a.version != b.version {
                "another version of byol"
            } else {
                "different images"
            }));
        }
        // Records are valid up to the first that is truncated or fails its checksum; a power
        // failure can leave zeros.
        let header_len = first.len() as u64;
        let mut reader = BufReader::new(&file);
        reader.seek(SeekFrom::Start(header_len)).map_err(write_error)?;
        let (mut record, mut complete, mut unusable) = (vec![0u8; record_len(dim)], 0, Vec::new());
        while reader.read_exact(&mut record).is_ok() && (is_embedding(&record) || is_unusable(&record)) {
            if is_unusable(&record) {
                unusable.push(complete);
            }
            complete += 1;
        }
        drop(reader);
        file.set_len(header_len + (complete * record_len(dim)) as u64).map_err(write_error)?;
        Ok(Partial { file, header_len, complete, unusable })
    }

    /// Embeds a range of images and encodes their records.
    fn records(&self, range: Range<usize>) -> Result<Vec<u8>, Error> {
        let (spec, dim) = (&self.encoder.spec, self.encoder.features());
        let load_view = |i: usize| match self.items.get(i) {
            Ok(image) => Ok(Some(spec.evaluation_view(&image).interleaved())),
            Err(data::Error::Image { .. }) => Ok(None),
            Err(other) => Err(other),
        };
        let views: Vec<Option<Vec<f32>>> = range.into_par_iter().map(load_view).collect::<Result<_, _>>()?;
        let usable: Vec<&Vec<f32>> = views.iter().flatten().collect();
        let mut rows = Vec::with_capacity(usable.len() * dim);
        for batch in usable.chunks(batch_size(spec.size)) {
            let values: Vec<f32> = batch.iter().flat_map(|v| v.iter().copied()).collect();
            let x = TensorData::new(values, [batch.len(), spec.size, spec.size, spec.channels]);
            let x = Tensor::from_data(x, &self.encoder.device());
            rows.extend(host(self.encoder.embed(x)));
        }
        if let Some(v) = rows.iter().find(|v| !v.is_finite()) {
            return Err(Error::NonFinite { encoder: self.origin.encoder.clone(), value: *v });
        }
        let (mut records, mut rows) = (Vec::with_capacity(views.len() * record_len(dim)), rows.chunks_exact(dim));
        let zeros = vec![0.0f32; dim];
        for view in &views {
            let row = view.as_ref().and_then(|_| rows.next());
            let values: Vec<u8> = row.unwrap_or(&zeros).iter().flat_map(|v| v.to_le_bytes()).collect();
            records.extend(&values);
            records.extend(checksum(&values, row.is_some()).to_le_bytes());
        }
        Ok(records)
    }

    /// Copies the records into the output file.
    fn finish(&self, mut file: File, path: &Path, dim: usize, range: Range<usize>) -> Result<Outcome, Error> {
        let read_error = |source| embeddings::Error::Read { path: path.to_owned(), source };
        let first_record = |file: &mut File| -> io::Result<BufReader<File>> {
            file.seek(SeekFrom::Start(0))?;
            let mut reader = BufReader::with_capacity(1 << 20, file.try_clone()?);
            reader.read_line(&mut String::new())?;
            Ok(reader)
        };
        let mut record = vec![0u8; record_len(dim)];
        let mut reader = first_record(&mut file).map_err(read_error)?;
        let mut usable = Vec::with_capacity(range.len());
        for _ in range.clone() {
            reader.read_exact(&mut record).map_err(read_error)?;
            usable.push(is_embedding(&record));
        }
        let bad: Vec<usize> = range.clone().filter(|i| !usable[i - range.start]).collect();
        let reason = |i: &usize| self.items.get(*i).err().map_or_else(|| self.items.name(*i), |e| first_line(&e));
        let skipped: Vec<String> = bad.iter().map(reason).collect();
        let n = range.len() - bad.len();
        if 2 * bad.len() > range.len() {
            let root = PathBuf::from(&self.origin.data);
            let first = skipped.first().cloned().unwrap_or_default();
            return Err(data::Error::MostlyBad { root, bad: bad.len(), all: range.len(), first }.into());
        }
        let labeled = self.items.has_labels();
        let mut writer = Writer::new(self.out, self.origin.clone(), n, dim, labeled)?;
        let mut reader = first_record(&mut file).map_err(read_error)?;
        let indices: Vec<usize> = range.collect();
        for block in indices.chunks(COPY_ROWS) {
            let (mut paths, mut labels, mut values) = (Vec::new(), Vec::new(), Vec::with_capacity(block.len() * dim));
            for i in block {
                reader.read_exact(&mut record).map_err(read_error)?;
                if is_embedding(&record) {
                    paths.push(self.items.name(*i));
                    labels.push(self.items.label(*i).map(str::to_owned));
                    let bytes = record[..4 * dim].chunks_exact(4);
                    values.extend(bytes.map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])));
                }
            }
            writer.push(Rows { paths: &paths, labels: labeled.then_some(&labels), values: &values })?;
        }
        writer.finish()?;
        Ok(Outcome::Finished { rows: n, skipped })
    }
}

/// Message of an error without its hint.
fn first_line(error: &data::Error) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}

/// Checksum of a record's embedding; unusable images have a different one.
fn checksum(values: &[u8], usable: bool) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(values);
    crc.sum() ^ if usable { 0 } else { 0xBAD }
}

/// Returns true if a record is intact and holds an embedding.
fn is_embedding(record: &[u8]) -> bool {
    let (values, sum) = record.split_at(record.len() - 4);
    sum == checksum(values, true).to_le_bytes()
}

/// Returns true if a record is intact and marks an unusable image.
fn is_unusable(record: &[u8]) -> bool {
    let (values, sum) = record.split_at(record.len() - 4);
    sum == checksum(values, false).to_le_bytes()
}

/// Length of a record in bytes.
fn record_len(dim: usize) -> usize {
    4 + 4 * dim
}
