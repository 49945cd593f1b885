//! Embeddings as files, one row an image: `.parquet` (columns `path`, `label` where there are labels, `embedding`), `.npy` (with
//! `NAME.paths.txt` and `NAME.labels.txt` beside it) or `.csv` (`path`, `label`, one column a number). What they were made by stands in
//! the Parquet file's metadata under `byol`, else in `FILE.byol.json`.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, BufRead, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    sync::Arc,
};

use arrow_array::{
    Array, ArrayRef, FixedSizeListArray, Float32Array, Float64Array, ListArray, RecordBatch, StringArray,
};
use arrow_schema::{ArrowError, DataType, Field, Schema};
use npyz::WriterBuilder;
use parquet::{
    arrow::{
        ArrowWriter,
        arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder},
    },
    errors::ParquetError,
    file::{metadata::KeyValue, properties::WriterProperties},
};
use serde::{Deserialize, Serialize};

use crate::{eval::Features, files, guarded::guarded};

/// What can be wrong with embeddings.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of another kind.
    #[error("{} is not .parquet, .npy or .csv; give a file that `byol embed` wrote", .0.display())]
    NotEmbeddings(PathBuf),
    /// The name has no known ending.
    #[error("{} is not named .parquet, .npy or .csv; name it so", .0.display())]
    Name(PathBuf),
    /// It cannot be read.
    #[error("cannot read {}: {source}; give embeddings that `byol embed` wrote", path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It cannot be written.
    #[error("cannot write {}: {source}; {}", path.display(), files::remedy(source))]
    Write {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not what its name says.
    #[error("{} cannot be used: {reason}; make it again with `byol embed`, or copy it again", path.display())]
    Format {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// There is no row.
    #[error("{} holds no embeddings; embed at least one image", .0.display())]
    Empty(PathBuf),
}

/// What embeddings were made by, and of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Of the program.
    pub version: String,
    /// The encoder file.
    pub encoder: String,
    /// Its SHA-256, in hexadecimal.
    pub encoder_sha256: String,
    /// The images.
    pub data: String,
    /// Of the images: [`crate::data::Images::fingerprint`].
    pub fingerprint: String,
    /// Which part of how many, from 1; none: all.
    pub shard: Option<[usize; 2]>,
}

/// Embeddings in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    /// Where they were read from.
    pub file: PathBuf,
    /// What they were made by, where the file says so.
    pub origin: Option<Origin>,
    /// Path of each image.
    pub paths: Vec<String>,
    /// Class of each image.
    pub labels: Option<Vec<String>>,
    /// `[N, F]`.
    pub features: Features,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Parquet,
    Npy,
    Csv,
}

fn format(path: &Path) -> Result<Format, Error> {
    match path.extension().and_then(|e| e.to_str()).map(str::to_ascii_lowercase).as_deref() {
        Some("parquet") => Ok(Format::Parquet),
        Some("npy") => Ok(Format::Npy),
        Some("csv") => Ok(Format::Csv),
        _ => Err(Error::Name(path.to_owned())),
    }
}

/// All files that embeddings of this name consist of.
///
/// # Errors
/// [`Error::Name`].
pub fn files(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let own = path.to_owned();
    Ok(match format(path)? {
        Format::Parquet => vec![own],
        Format::Npy => vec![own, paths_file(path), labels_file(path), origin_file(path)],
        Format::Csv => vec![own, origin_file(path)],
    })
}

/// The key of the Parquet file's metadata.
const KEY: &str = "byol";

/// Rows of a group of a Parquet file.
const GROUP: usize = 1 << 14;

fn paths_file(path: &Path) -> PathBuf {
    path.with_extension("paths.txt")
}

fn labels_file(path: &Path) -> PathBuf {
    path.with_extension("labels.txt")
}

/// Behind the whole name: a set may be written in two formats.
fn origin_file(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".byol.json");
    PathBuf::from(name)
}

/// A name on one line.
fn one_line(name: &str) -> String {
    name.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r")
}

fn from_one_line(line: &str) -> String {
    let mut name = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => match chars.next() {
                Some('n') => name.push('\n'),
                Some('r') => name.push('\r'),
                Some(other) => name.push(other),
                None => name.push('\\'),
            },
            (c, false) => name.push(c),
        }
    }
    name
}

/// Writes embeddings row by row; nothing stands under the final name before [`Writer::finish`].
pub struct Writer {
    path: PathBuf,
    origin: Origin,
    dim: usize,
    sink: Sink,
    _unfinished: Unfinished,
}

enum Sink {
    Parquet { writer: Box<ArrowWriter<File>>, schema: Arc<Schema>, labelled: bool },
    Npy { rows: npyz::NpyWriter<f32, BufWriter<File>>, paths: BufWriter<File>, labels: Option<BufWriter<File>> },
    Csv(Box<csv::Writer<File>>),
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Writer").field("path", &self.path).field("dim", &self.dim).finish_non_exhaustive()
    }
}

/// Some rows: their paths, their classes where there are any, and `[n, F]` values.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Of each.
    pub paths: &'a [String],
    /// Of each.
    pub labels: Option<&'a [String]>,
    /// Row-major.
    pub values: &'a [f32],
}

impl Writer {
    /// Begins a file of `n` rows of `dim` numbers.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::Write`].
    pub fn new(path: &Path, origin: Origin, n: usize, dim: usize, labelled: bool) -> Result<Writer, Error> {
        let write = |source| Error::Write { path: path.to_owned(), source };
        let create = |path: &Path| File::create(files::temporary_name(path));
        if path.is_dir() {
            return Err(write(io::ErrorKind::IsADirectory.into()));
        }
        let _unfinished = Unfinished(self::files(path)?);
        let sink = match format(path)? {
            Format::Parquet => {
                let item = Arc::new(Field::new("item", DataType::Float32, false));
                let mut fields = vec![Field::new("path", DataType::Utf8, false)];
                if labelled {
                    fields.push(Field::new("label", DataType::Utf8, false));
                }
                let length = i32::try_from(dim).expect("a representation has less than 2^31 numbers");
                fields.push(Field::new("embedding", DataType::FixedSizeList(item, length), false));
                let json = serde_json::to_string(&origin).expect("an origin is plain data");
                // Twice: pyarrow shows the schema's own entries, other readers the file's.
                let entry = HashMap::from([(KEY.to_owned(), json.clone())]);
                let schema = Arc::new(Schema::new_with_metadata(fields, entry));
                // Numbers of this kind neither compress nor repeat.
                let properties = WriterProperties::builder()
                    .set_dictionary_enabled(false)
                    .set_max_row_group_row_count(Some(GROUP))
                    .set_key_value_metadata(Some(vec![KeyValue::new(KEY.into(), json)]))
                    .build();
                let file = create(path).map_err(write)?;
                let writer =
                    ArrowWriter::try_new(file, schema.clone(), Some(properties)).map_err(|e| write(of_parquet(e)))?;
                Sink::Parquet { writer: Box::new(writer), schema, labelled }
            }
            Format::Npy => {
                let begin = |path: &Path| create(path).map(BufWriter::new);
                let rows = npyz::WriteOptions::new()
                    .default_dtype()
                    .shape(&[n as u64, dim as u64])
                    .writer(begin(path).map_err(write)?)
                    .begin_nd()
                    .map_err(write)?;
                let paths = begin(&paths_file(path)).map_err(write)?;
                let labels = labelled.then(|| begin(&labels_file(path))).transpose().map_err(write)?;
                Sink::Npy { rows, paths, labels }
            }
            Format::Csv => {
                let mut writer = csv::Writer::from_writer(create(path).map_err(write)?);
                let head = std::iter::once("path".to_owned())
                    .chain(labelled.then(|| "label".to_owned()))
                    .chain((0..dim).map(|i| format!("v{i}")));
                writer.write_record(head).map_err(|e| write(of_csv(e)))?;
                Sink::Csv(Box::new(writer))
            }
        };
        Ok(Writer { path: path.to_owned(), origin, dim, sink, _unfinished })
    }

    /// Writes some rows.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn push(&mut self, some: Rows) -> Result<(), Error> {
        let path = self.path.clone();
        let write = |source| Error::Write { path: path.clone(), source };
        match &mut self.sink {
            Sink::Parquet { writer, schema, labelled } => {
                let strings =
                    |of: &[String]| Arc::new(StringArray::from_iter_values(of.iter().map(String::as_str))) as ArrayRef;
                let DataType::FixedSizeList(item, length) = schema.field(schema.fields().len() - 1).data_type() else {
                    unreachable!("the schema is made above")
                };
                let values = Arc::new(Float32Array::from(some.values.to_vec()));
                let mut columns = vec![strings(some.paths)];
                if *labelled {
                    columns.push(strings(some.labels.unwrap_or_default()));
                }
                let list = FixedSizeListArray::try_new(item.clone(), *length, values, None);
                columns.push(Arc::new(list.map_err(|e| write(of_arrow(e)))?));
                let batch = RecordBatch::try_new(schema.clone(), columns).map_err(|e| write(of_arrow(e)))?;
                writer.write(&batch).map_err(|e| write(of_parquet(e)))
            }
            Sink::Npy { rows, paths, labels } => {
                rows.extend(some.values.iter().copied()).map_err(write)?;
                some.paths.iter().try_for_each(|p| writeln!(paths, "{}", one_line(p))).map_err(write)?;
                let Some(labels) = labels else { return Ok(()) };
                let of_some = some.labels.unwrap_or_default();
                of_some.iter().try_for_each(|l| writeln!(labels, "{}", one_line(l))).map_err(write)
            }
            Sink::Csv(writer) => {
                for (i, (path, row)) in some.paths.iter().zip(some.values.chunks_exact(self.dim)).enumerate() {
                    let label = some.labels.map(|l| l[i].clone());
                    let record = std::iter::once(path.clone()).chain(label).chain(row.iter().map(|v| v.to_string()));
                    writer.write_record(record).map_err(|e| write(of_csv(e)))?;
                }
                Ok(())
            }
        }
    }

    /// Gives the files their names, once all of them are whole on disk. In between there is none of the main name: vectors never stand
    /// beside the paths of others.
    ///
    /// # Errors
    /// [`Error::Write`]; no file is left behind.
    pub fn finish(self) -> Result<(), Error> {
        let Writer { path, origin, sink, _unfinished, .. } = self;
        let write = |source| Error::Write { path: path.clone(), source };
        let unbuffered = |writer: BufWriter<File>| writer.into_inner().map_err(io::IntoInnerError::into_error);
        let mut beside = Vec::new();
        if !matches!(sink, Sink::Parquet { .. }) {
            let json = serde_json::to_vec_pretty(&origin).expect("an origin is plain data");
            let of = origin_file(&path);
            let file =
                File::create(files::temporary_name(&of)).and_then(|mut file| file.write_all(&json).map(|()| file));
            beside.push((file.map_err(write)?, of));
        }
        let mut unneeded = None;
        let file = match sink {
            Sink::Parquet { writer, .. } => writer.into_inner().map_err(|e| write(of_parquet(e)))?,
            Sink::Npy { rows, paths, labels } => {
                beside.push((unbuffered(paths).map_err(write)?, paths_file(&path)));
                match labels {
                    Some(labels) => beside.push((unbuffered(labels).map_err(write)?, labels_file(&path))),
                    // Those of a set that this one replaces.
                    None => unneeded = Some(labels_file(&path)),
                }
                rows.finish().map_err(write)?;
                File::options().write(true).open(files::temporary_name(&path)).map_err(write)?
            }
            Sink::Csv(writer) => writer.into_inner().map_err(|e| write(e.into_error()))?,
        };
        beside.iter().map(|(file, _)| file).chain([&file]).try_for_each(File::sync_all).map_err(write)?;
        let remove = |path: &Path| match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
        if !beside.is_empty() {
            remove(&path).map_err(write)?;
        }
        unneeded.map_or(Ok(()), |path| remove(&path)).map_err(write)?;
        let place = |path: &Path| fs::rename(files::temporary_name(path), path);
        beside.iter().map(|(_, path)| path.as_path()).chain([path.as_path()]).try_for_each(place).map_err(write)?;
        files::sync_folder(path.parent()).map_err(write)
    }
}

/// The temporary files of a [`Writer`]: those that have not got their names are removed with it.
struct Unfinished(Vec<PathBuf>);

impl Drop for Unfinished {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(files::temporary_name(path)); // most are gone under their own names
        }
    }
}

fn of_parquet(error: ParquetError) -> io::Error {
    match error {
        ParquetError::External(inner) => match inner.downcast::<io::Error>() {
            Ok(inner) => *inner,
            Err(other) => io::Error::other(other),
        },
        other => io::Error::other(other),
    }
}

fn of_arrow(error: ArrowError) -> io::Error {
    io::Error::other(error)
}

fn of_csv(error: csv::Error) -> io::Error {
    error.into()
}

impl Embeddings {
    /// Reads a file whole.
    ///
    /// # Errors
    /// All but [`Error::Write`].
    pub fn open(path: &Path) -> Result<Embeddings, Error> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let file = File::open(path).map_err(read)?;
        let kind = format(path).map_err(|_| Error::NotEmbeddings(path.to_owned()))?;
        let bad = |reason: String| Error::Format { path: path.to_owned(), reason };
        let mut found = match kind {
            Format::Parquet => guarded(|| of_parquet_file(file)).flatten().map_err(bad)?,
            Format::Npy => of_npy_file(file, path).map_err(bad)?,
            Format::Csv => of_csv_file(file).map_err(bad)?,
        };
        if kind != Format::Parquet
            && let Ok(json) = fs::read(origin_file(path))
        {
            let origin = serde_json::from_slice(&json).map_err(|e| Error::Format {
                path: origin_file(path),
                reason: format!("it is not what `byol embed` wrote: {e}"),
            });
            found.origin = Some(origin?);
        }
        found.file = path.to_owned();
        if found.features.n == 0 || found.features.dim == 0 {
            return Err(Error::Empty(path.to_owned()));
        }
        let rows = [found.paths.len(), found.labels.as_ref().map_or(found.paths.len(), Vec::len)];
        if rows != [found.features.n; 2] {
            let labels = found.labels.as_ref().map_or(String::new(), |l| format!(" and {} labels", l.len()));
            return Err(bad(format!("{} rows, but {} paths{labels}", found.features.n, rows[0])));
        }
        if let Some(at) = found.features.values.iter().position(|v| !v.is_finite()) {
            return Err(bad(format!("row {} holds {}", at / found.features.dim, found.features.values[at])));
        }
        Ok(found)
    }

    fn of(paths: Vec<String>, labels: Option<Vec<String>>, dim: usize, values: Vec<f32>) -> Embeddings {
        let features = Features { n: values.len().checked_div(dim).unwrap_or(0), dim, values };
        Embeddings { file: PathBuf::new(), origin: None, paths, labels, features }
    }
}

fn of_parquet_file(file: File) -> Result<Embeddings, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    // By Parquet's own types: other writers have large lists or dictionaries in memory, which do not matter here.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let builder = ParquetRecordBatchReaderBuilder::try_new_with_options(file, options).map_err(|e| text(&e))?;
    let entries = builder.metadata().file_metadata().key_value_metadata();
    let json = entries.and_then(|all| all.iter().find(|kv| kv.key == KEY)).and_then(|kv| kv.value.clone());
    let of_json = |json: String| serde_json::from_str(&json).map_err(|e| format!("its entry `{KEY}` is broken: {e}"));
    let origin = json.map(of_json).transpose()?;
    let schema = builder.schema().clone();
    let column = |name: &str| schema.index_of(name).ok();
    let (Some(path), Some(embedding)) = (column("path"), column("embedding")) else {
        let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        return Err(format!("it has the columns {}, not `path` and `embedding`", names.join(", ")));
    };
    let label = column("label");
    let (mut paths, mut labels, mut values, mut dim) = (Vec::new(), label.map(|_| Vec::new()), Vec::new(), 0);
    for batch in builder.build().map_err(|e| text(&e))? {
        let batch = batch.map_err(|e| text(&e))?;
        let strings = |at: usize| -> Result<Vec<String>, String> {
            let column = batch.column(at).as_any().downcast_ref::<StringArray>();
            let column = column.ok_or_else(|| format!("column `{}` is not text", schema.field(at).name()))?;
            if column.null_count() > 0 {
                return Err(format!("column `{}` has rows without a value", schema.field(at).name()));
            }
            Ok(column.iter().map(|s| s.unwrap_or_default().to_owned()).collect())
        };
        paths.extend(strings(path)?);
        if let (Some(labels), Some(label)) = (&mut labels, label) {
            labels.extend(strings(label)?);
        }
        for row in 0..batch.num_rows() {
            let row = numbers(batch.column(embedding), row)?;
            if dim == 0 {
                dim = row.len();
            }
            if row.len() != dim {
                return Err(format!(
                    "row {} has {} numbers, the first has {dim}",
                    values.len() / dim.max(1),
                    row.len()
                ));
            }
            values.extend(row);
        }
    }
    Ok(Embeddings { origin, ..Embeddings::of(paths, labels, dim, values) })
}

/// The numbers of a row of a column of lists.
fn numbers(column: &ArrayRef, row: usize) -> Result<Vec<f32>, String> {
    if column.is_null(row) {
        return Err("column `embedding` has rows without a value".into());
    }
    let any = column.as_any();
    let list = any.downcast_ref::<FixedSizeListArray>().map(|c| c.value(row));
    let list = list.or_else(|| any.downcast_ref::<ListArray>().map(|c| c.value(row)));
    let list = list.ok_or("column `embedding` is not of lists")?;
    if list.null_count() > 0 {
        return Err("column `embedding` has vectors with numbers missing".into());
    }
    if let Some(values) = list.as_any().downcast_ref::<Float32Array>() {
        return Ok(values.values().to_vec());
    }
    match list.as_any().downcast_ref::<Float64Array>() {
        Some(values) => Ok(values.values().iter().map(|v| *v as f32).collect()),
        None => Err(format!("column `embedding` is of {}, not of numbers", list.data_type())),
    }
}

/// Whether the header of a .npy file is one that the parser behind can be trusted with: short, one dictionary with one shape of two
/// lengths. Deeply nested ones would take it for ever.
fn check_header(file: &mut File) -> Result<(), String> {
    const MOST: usize = 4096;
    let mut head = Vec::new();
    (&mut *file).take(MOST as u64).read_to_end(&mut head).map_err(|e| e.to_string())?;
    file.rewind().map_err(|e| e.to_string())?;
    let short = || "it is not a .npy file".to_owned();
    let rest = head.strip_prefix(b"\x93NUMPY").ok_or_else(short)?;
    let (length, from) = match rest {
        [1, _, a, b, ..] => (usize::from(u16::from_le_bytes([*a, *b])), 10),
        [2 | 3, _, a, b, c, d, ..] => (u32::from_le_bytes([*a, *b, *c, *d]) as usize, 12),
        _ => return Err(short()),
    };
    let text =
        head.get(from..from + length.min(MOST)).ok_or("its header is cut off, or longer than any that is written")?;
    let count = |what: &[u8]| text.iter().filter(|b| what.contains(b)).count();
    if count(b"{") != 1 || count(b"(") != 1 || count(b"[") > 0 {
        return Err("its header is not that of an array of numbers".into());
    }
    let shape =
        text.split(|b| *b == b'(').nth(1).and_then(|rest| rest.split(|b| *b == b')').next()).unwrap_or_default();
    let lengths = String::from_utf8_lossy(shape);
    let mut lengths = lengths.split(',').map(str::trim).filter(|t| !t.is_empty());
    let all = lengths.try_fold(1u64, |all, t| all.checked_mul(t.parse().ok()?));
    all.filter(|n| *n <= u64::MAX / 8)
        .map(|_| ())
        .ok_or_else(|| format!("its shape is ({})", String::from_utf8_lossy(shape)))
}

fn of_npy_file(mut file: File, path: &Path) -> Result<Embeddings, String> {
    check_header(&mut file)?;
    let length = file.metadata().map_err(|e| e.to_string())?.len();
    let npy = npyz::NpyFile::new(BufReader::new(file)).map_err(|e| e.to_string())?;
    let &[n, dim] = npy.shape() else { return Err(format!("its shape is {:?}, not [images, numbers]", npy.shape())) };
    if npy.order() != npyz::Order::C {
        return Err("it is in Fortran order; save it row by row".into());
    }
    if npy.dtype().descr() != "'<f4'" {
        return Err(format!("it holds {}, not f32 ('<f4'): save it with .astype('float32')", npy.dtype().descr()));
    }
    // A header can say anything; memory is asked for what the file holds.
    if n.checked_mul(dim).is_none_or(|values| values > length / 4) {
        return Err(format!("it should hold {n} rows of {dim} numbers, but it is {length} bytes long"));
    }
    let values: Vec<f32> = match npy.try_data::<f32>() {
        Ok(data) => data.collect::<io::Result<_>>().map_err(|e| e.to_string())?,
        Err(npy) => return Err(format!("it holds {}, not f32", npy.dtype().descr())),
    };
    let lines = |path: PathBuf| -> Result<Option<Vec<String>>, String> {
        match File::open(&path) {
            Ok(file) => {
                let lines = BufReader::new(file).lines().map(|l| l.map(|l| from_one_line(&l)));
                lines.collect::<io::Result<_>>().map(Some).map_err(|e| format!("{}: {e}", path.display()))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(format!("{}: {e}", path.display())),
        }
    };
    let paths = lines(paths_file(path))?;
    let paths = paths.ok_or_else(|| format!("there is no {} with its paths", paths_file(path).display()))?;
    Ok(Embeddings::of(paths, lines(labels_file(path))?, dim as usize, values))
}

fn of_csv_file(mut file: File) -> Result<Embeddings, String> {
    // A number that is cut off is still a number.
    let mut last = [0];
    let end = file.seek(SeekFrom::End(-1)).and_then(|_| file.read_exact(&mut last)).and_then(|()| file.rewind());
    if end.is_ok() && last != *b"\n" {
        return Err("it is cut off: its last line has no end".into());
    }
    file.rewind().map_err(|e| e.to_string())?;
    let mut reader = csv::Reader::from_reader(BufReader::new(file));
    let head = reader.headers().map_err(|e| e.to_string())?.clone();
    if head.get(0) != Some("path") {
        return Err("its first column is not `path`".into());
    }
    let labelled = head.get(1) == Some("label");
    let first = 1 + usize::from(labelled);
    let (mut paths, mut labels, mut values) = (Vec::new(), labelled.then(Vec::new), Vec::new());
    for (i, record) in reader.records().enumerate() {
        let record = record.map_err(|e| e.to_string())?;
        paths.push(record[0].to_owned());
        if let Some(labels) = &mut labels {
            labels.push(record[1].to_owned());
        }
        for text in record.iter().skip(first) {
            values.push(text.parse::<f32>().map_err(|_| format!("row {i} holds `{text}`, which is no number"))?);
        }
    }
    Ok(Embeddings::of(paths, labels, head.len() - first, values))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin() -> Origin {
        Origin {
            version: "0".into(),
            encoder: "e".into(),
            encoder_sha256: "00".into(),
            data: "d".into(),
            fingerprint: "f".into(),
            shard: Some([1, 2]),
        }
    }

    fn written(path: &Path, labelled: bool) -> (Vec<String>, Vec<String>, Vec<f32>) {
        let paths: Vec<String> = (0..5).map(|i| format!("a, \"{i}\"\n\\n/ü.png")).collect();
        let labels: Vec<String> = (0..5).map(|i| format!("class {}", i % 2)).collect();
        let values: Vec<f32> = (0..15).map(|i| (i as f32 - 7.0) / 3.0).collect();
        let stood = path.exists();
        let mut writer = Writer::new(path, origin(), 5, 3, labelled).unwrap();
        for rows in [0..2, 2..5] {
            let (labels, values) = (&labels[rows.clone()], &values[3 * rows.start..3 * rows.end]);
            writer.push(Rows { paths: &paths[rows], labels: labelled.then_some(labels), values }).unwrap();
        }
        assert_eq!(path.exists(), stood);
        writer.finish().unwrap();
        (paths, labels, values)
    }

    #[test]
    fn what_is_written_is_read_in_every_format() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.parquet", "a.npy", "a.csv"] {
            for labelled in [true, false] {
                let path = folder.path().join(format!("{labelled}-{name}"));
                let (paths, labels, values) = written(&path, labelled);
                let found = Embeddings::open(&path).unwrap();
                assert_eq!((found.origin.unwrap(), found.paths), (origin(), paths), "{name}");
                assert_eq!((found.labels, found.features.values), (labelled.then_some(labels), values), "{name}");
            }
        }
        let left = fs::read_dir(folder.path()).unwrap().flatten();
        assert!(left.map(|e| e.file_name()).all(|n| !n.to_string_lossy().contains("partial")));
    }

    #[test]
    fn every_cut_of_a_file_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.parquet", "a.npy"] {
            let path = folder.path().join(name);
            written(&path, true);
            let bytes = fs::read(&path).unwrap();
            for n in [0, 3, 11, bytes.len() / 2, bytes.len() - 1] {
                fs::write(&path, &bytes[..n]).unwrap();
                assert!(matches!(Embeddings::open(&path), Err(Error::Format { .. })), "{name} cut to {n}");
            }
        }
    }

    #[test]
    fn headers_that_would_take_the_parser_for_ever_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        let open = |dictionary: &str| {
            let head =
                [b"\x93NUMPY\x01\x00", &(dictionary.len() as u16).to_le_bytes()[..], dictionary.as_bytes()].concat();
            fs::write(&path, head).unwrap();
            Embeddings::open(&path).unwrap_err().to_string()
        };
        assert!(open(&format!("{}{}\n", "[".repeat(40), "]".repeat(40))).contains("header"));
        assert!(open(&format!("{{'shape': {}", "(".repeat(60_000))).contains("header"));
        let huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775808, 4), }\n";
        assert!(open(huge).contains("shape"));
    }

    #[test]
    fn labels_of_a_set_that_is_replaced_go_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        written(&path, true);
        written(&path, false);
        assert_eq!(Embeddings::open(&path).unwrap().labels, None);
    }

    #[test]
    fn other_files_are_refused_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            Embeddings::open(&path).unwrap_err().to_string()
        };
        assert!(file("a.txt", "").contains(".parquet, .npy or .csv"));
        assert!(file("a.csv", "x,y\n1,2\n").contains("not `path`"));
        assert!(file("b.csv", "path,v0\na,one\n").contains("`one`"));
        assert!(file("c.csv", "path,v0\n").contains("no embeddings"));
        assert!(file("d.csv", "path,v0\na,nan\n").contains("NaN"));
    }
}
