//! Embedding files, one row per image: `.parquet` (columns `path`, `label` if there are labels,
//! `embedding`), `.npy` (with `NAME.paths.txt` and `NAME.labels.txt`) or `.csv` (`path`, `label`,
//! one column per dimension). Their origin is stored in the Parquet metadata under `byol`, for the
//! other formats in `FILE.byol.json`.

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
use arrow_schema::{DataType, Field, Schema};
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

use crate::{
    atomic_write,
    catch_panic::catch_panic,
    data::{Levels, decode::npy},
    eval::Features,
};

/// Error of reading or writing embeddings.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The input has a different extension.
    #[error("{} is not a .parquet, .npy or .csv file\nhint: pass a file written by `byol embed`", .0.display())]
    NotEmbeddings(PathBuf),
    /// The output has a different extension.
    #[error("invalid output name {} (expected .parquet, .npy or .csv)", .0.display())]
    Name(PathBuf),
    /// The file cannot be read.
    #[error("cannot read {}: {source}\nhint: pass a file written by `byol embed`", path.display())]
    Read {
        /// File.
        path: PathBuf,
        /// I/O error.
        source: io::Error,
    },
    /// The file cannot be written.
    #[error("cannot write {}: {source}\nhint: {}", path.display(), atomic_write::remedy(source))]
    Write {
        /// File.
        path: PathBuf,
        /// I/O error.
        source: io::Error,
    },
    /// The contents are invalid.
    #[error("invalid embeddings in {}: {reason}\nhint: recreate the file with `byol embed`, or copy it again", path.display())]
    Format {
        /// File.
        path: PathBuf,
        /// Defect.
        reason: String,
    },
    /// There are no rows.
    #[error("{} contains no embeddings\nhint: embed at least one image", .0.display())]
    Empty(PathBuf),
}

/// Origin of a set of embeddings.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Origin {
    /// Version of byol.
    pub version: String,
    /// Encoder file.
    pub encoder: String,
    /// SHA-256 of the encoder file, in hexadecimal.
    pub encoder_sha256: String,
    /// Data set.
    pub data: String,
    /// [`crate::data::Images::fingerprint`] of the images.
    pub fingerprint: String,
    /// Shard number, from 1, and number of shards; `None` for all images.
    pub shard: Option<[usize; 2]>,
    /// Image column of Parquet files, if it was chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub column: Option<String>,
    /// Mapping of file values to pixels.
    #[serde(default, skip_serializing_if = "is_default")]
    pub levels: Levels,
}

fn is_default(levels: &Levels) -> bool {
    *levels == Levels::default()
}

/// Embeddings in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Embeddings {
    /// File they were read from.
    pub file: PathBuf,
    /// Origin, if the file states it.
    pub origin: Option<Origin>,
    /// Path of each image.
    pub paths: Vec<String>,
    /// Class name of each image that has one; `None` if the file has no labels.
    pub labels: Option<Vec<Option<String>>>,
    /// Embeddings, `[N, F]`.
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

/// Lists the files that embeddings named `path` consist of.
///
/// # Errors
/// [`Error::Name`].
pub fn output_files(path: &Path) -> Result<Vec<PathBuf>, Error> {
    let main = path.to_owned();
    Ok(match format(path)? {
        Format::Parquet => vec![main],
        Format::Npy => vec![main, paths_file(path), labels_file(path), origin_file(path)],
        Format::Csv => vec![main, origin_file(path)],
    })
}

/// Key of the origin in the Parquet metadata.
const ORIGIN_KEY: &str = "byol";

/// Rows per Parquet row group.
const ROW_GROUP: usize = 1 << 14;

fn paths_file(path: &Path) -> PathBuf {
    path.with_extension("paths.txt")
}

fn labels_file(path: &Path) -> PathBuf {
    path.with_extension("labels.txt")
}

/// Appended to the full name, because a set may be written in two formats.
fn origin_file(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".byol.json");
    PathBuf::from(name)
}

/// Escapes line breaks.
fn escape(name: &str) -> String {
    name.replace('\\', "\\\\").replace('\n', "\\n").replace('\r', "\\r")
}

/// Inverse of [`escape`].
fn unescape(line: &str) -> String {
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

/// Writer of embeddings, row by row. The files get their final names in [`Writer::finish`].
pub struct Writer {
    path: PathBuf,
    origin: Origin,
    dim: usize,
    sink: Sink,
    _temporary: TemporaryFiles,
}

enum Sink {
    Parquet { writer: Box<ArrowWriter<File>>, schema: Arc<Schema>, labeled: bool },
    Npy { rows: npyz::NpyWriter<f32, BufWriter<File>>, paths: BufWriter<File>, labels: Option<BufWriter<File>> },
    Csv(Box<csv::Writer<File>>),
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        f.debug_struct("Writer").field("path", &self.path).field("dim", &self.dim).finish_non_exhaustive()
    }
}

/// Block of `n` rows.
#[derive(Debug, Clone, Copy)]
pub struct Rows<'a> {
    /// Path of each image.
    pub paths: &'a [String],
    /// Class name of each image that has one, if the set has labels.
    pub labels: Option<&'a [Option<String>]>,
    /// Embeddings, `[n, F]`, row-major.
    pub values: &'a [f32],
}

impl Writer {
    /// Creates the temporary files for `n` rows of `dim` values.
    ///
    /// # Errors
    /// [`Error::Name`], [`Error::Write`].
    pub fn new(path: &Path, origin: Origin, n: usize, dim: usize, labeled: bool) -> Result<Writer, Error> {
        let write_error = |source| Error::Write { path: path.to_owned(), source };
        let create = |path: &Path| File::create(atomic_write::temporary_name(path));
        if path.is_dir() {
            return Err(write_error(io::ErrorKind::IsADirectory.into()));
        }
        let _temporary = TemporaryFiles(output_files(path)?);
        let sink = match format(path)? {
            Format::Parquet => {
                let item = Arc::new(Field::new("item", DataType::Float32, false));
                let mut fields = vec![Field::new("path", DataType::Utf8, false)];
                if labeled {
                    fields.push(Field::new("label", DataType::Utf8, true));
                }
                let length = i32::try_from(dim).expect("fewer than 2^31 features");
                fields.push(Field::new("embedding", DataType::FixedSizeList(item, length), false));
                let json = serde_json::to_string(&origin).expect("an origin serializes");
                // In both places: pyarrow shows the schema's metadata, other readers the file's.
                let metadata = HashMap::from([(ORIGIN_KEY.to_owned(), json.clone())]);
                let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
                // Embeddings neither repeat nor compress.
                let properties = WriterProperties::builder()
                    .set_dictionary_enabled(false)
                    .set_max_row_group_row_count(Some(ROW_GROUP))
                    .set_key_value_metadata(Some(vec![KeyValue::new(ORIGIN_KEY.into(), json)]))
                    .build();
                let file = create(path).map_err(write_error)?;
                let writer = ArrowWriter::try_new(file, schema.clone(), Some(properties))
                    .map_err(|e| write_error(parquet_io_error(e)))?;
                Sink::Parquet { writer: Box::new(writer), schema, labeled }
            }
            Format::Npy => {
                let create_buffered = |path: &Path| create(path).map(BufWriter::new);
                let rows = npyz::WriteOptions::new()
                    .default_dtype()
                    .shape(&[n as u64, dim as u64])
                    .writer(create_buffered(path).map_err(write_error)?)
                    .begin_nd()
                    .map_err(write_error)?;
                let paths = create_buffered(&paths_file(path)).map_err(write_error)?;
                let labels = labeled.then(|| create_buffered(&labels_file(path))).transpose().map_err(write_error)?;
                Sink::Npy { rows, paths, labels }
            }
            Format::Csv => {
                let mut writer = csv::Writer::from_writer(create(path).map_err(write_error)?);
                let header = std::iter::once("path".to_owned())
                    .chain(labeled.then(|| "label".to_owned()))
                    .chain((0..dim).map(|i| format!("v{i}")));
                writer.write_record(header).map_err(|e| write_error(e.into()))?;
                Sink::Csv(Box::new(writer))
            }
        };
        Ok(Writer { path: path.to_owned(), origin, dim, sink, _temporary })
    }

    /// Appends a block of rows.
    ///
    /// # Errors
    /// [`Error::Write`].
    pub fn push(&mut self, block: Rows) -> Result<(), Error> {
        let path = self.path.clone();
        let write_error = |source| Error::Write { path: path.clone(), source };
        match &mut self.sink {
            Sink::Parquet { writer, schema, labeled } => {
                let DataType::FixedSizeList(item, length) = schema.field(schema.fields().len() - 1).data_type() else {
                    unreachable!("the last column holds lists")
                };
                let values = Arc::new(Float32Array::from(block.values.to_vec()));
                let mut columns: Vec<ArrayRef> = vec![Arc::new(StringArray::from_iter_values(block.paths))];
                if *labeled {
                    columns.push(Arc::new(StringArray::from_iter(block.labels.unwrap_or_default())));
                }
                let list = FixedSizeListArray::try_new(item.clone(), *length, values, None);
                columns.push(Arc::new(list.map_err(|e| write_error(io::Error::other(e)))?));
                let batch =
                    RecordBatch::try_new(schema.clone(), columns).map_err(|e| write_error(io::Error::other(e)))?;
                writer.write(&batch).map_err(|e| write_error(parquet_io_error(e)))
            }
            Sink::Npy { rows, paths, labels } => {
                rows.extend(block.values.iter().copied()).map_err(write_error)?;
                block.paths.iter().try_for_each(|p| writeln!(paths, "{}", escape(p))).map_err(write_error)?;
                let Some(labels) = labels else { return Ok(()) };
                let block_labels = block.labels.unwrap_or_default();
                let text = |label: &Option<String>| label.as_deref().map(escape).unwrap_or_default();
                block_labels.iter().try_for_each(|label| writeln!(labels, "{}", text(label))).map_err(write_error)
            }
            Sink::Csv(writer) => {
                for (i, (path, row)) in block.paths.iter().zip(block.values.chunks_exact(self.dim)).enumerate() {
                    let label = block.labels.map(|l| l[i].clone().unwrap_or_default());
                    let record = std::iter::once(path.clone()).chain(label).chain(row.iter().map(|v| v.to_string()));
                    writer.write_record(record).map_err(|e| write_error(e.into()))?;
                }
                Ok(())
            }
        }
    }

    /// Syncs the files to disk, then renames them to their final names, the main file last:
    /// embeddings never appear next to the paths of another set.
    ///
    /// # Errors
    /// [`Error::Write`]; no file is left behind.
    pub fn finish(self) -> Result<(), Error> {
        let Writer { path, origin, sink, _temporary, .. } = self;
        let write_error = |source| Error::Write { path: path.clone(), source };
        let into_file = |writer: BufWriter<File>| writer.into_inner().map_err(io::IntoInnerError::into_error);
        let mut sidecars = Vec::new();
        if !matches!(sink, Sink::Parquet { .. }) {
            let json = serde_json::to_vec_pretty(&origin).expect("an origin serializes");
            let name = origin_file(&path);
            let file = File::create(atomic_write::temporary_name(&name))
                .and_then(|mut file| file.write_all(&json).map(|()| file));
            sidecars.push((file.map_err(write_error)?, name));
        }
        let mut stale = None;
        let file = match sink {
            Sink::Parquet { writer, .. } => writer.into_inner().map_err(|e| write_error(parquet_io_error(e)))?,
            Sink::Npy { rows, paths, labels } => {
                sidecars.push((into_file(paths).map_err(write_error)?, paths_file(&path)));
                match labels {
                    Some(labels) => sidecars.push((into_file(labels).map_err(write_error)?, labels_file(&path))),
                    // Labels of a set that this one replaces.
                    None => stale = Some(labels_file(&path)),
                }
                rows.finish().map_err(write_error)?;
                File::options().write(true).open(atomic_write::temporary_name(&path)).map_err(write_error)?
            }
            Sink::Csv(writer) => writer.into_inner().map_err(|e| write_error(e.into_error()))?,
        };
        sidecars.iter().map(|(file, _)| file).chain([&file]).try_for_each(File::sync_all).map_err(write_error)?;
        let remove = |path: &Path| match fs::remove_file(path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        };
        if !sidecars.is_empty() {
            remove(&path).map_err(write_error)?;
        }
        stale.map_or(Ok(()), |path| remove(&path)).map_err(write_error)?;
        let rename = |path: &Path| fs::rename(atomic_write::temporary_name(path), path);
        sidecars
            .iter()
            .map(|(_, path)| path.as_path())
            .chain([path.as_path()])
            .try_for_each(rename)
            .map_err(write_error)?;
        atomic_write::sync_folder(path.parent()).map_err(write_error)
    }
}

/// Temporary files of a [`Writer`], removed on drop.
struct TemporaryFiles(Vec<PathBuf>);

impl Drop for TemporaryFiles {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = fs::remove_file(atomic_write::temporary_name(path)); // usually already renamed
        }
    }
}

fn parquet_io_error(error: ParquetError) -> io::Error {
    match error {
        ParquetError::External(inner) => match inner.downcast::<io::Error>() {
            Ok(inner) => *inner,
            Err(other) => io::Error::other(other),
        },
        other => io::Error::other(other),
    }
}

impl Embeddings {
    /// Reads a file written by [`Writer`], or a file of the same layout.
    ///
    /// # Errors
    /// Any [`Error`] but [`Error::Name`] and [`Error::Write`].
    pub fn open(path: &Path) -> Result<Embeddings, Error> {
        let file = File::open(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
        let format = format(path).map_err(|_| Error::NotEmbeddings(path.to_owned()))?;
        let invalid = |reason: String| Error::Format { path: path.to_owned(), reason };
        let mut embeddings = match format {
            Format::Parquet => catch_panic(|| read_parquet(file)).flatten().map_err(invalid)?,
            Format::Npy => read_npy(file, path).map_err(invalid)?,
            Format::Csv => read_csv(file).map_err(invalid)?,
        };
        if format != Format::Parquet
            && let Ok(json) = fs::read(origin_file(path))
        {
            let origin = serde_json::from_slice(&json).map_err(|e| Error::Format {
                path: origin_file(path),
                reason: format!("not written by `byol embed`: {e}"),
            });
            embeddings.origin = Some(origin?);
        }
        embeddings.file = path.to_owned();
        let Embeddings { paths, labels, features, .. } = &embeddings;
        if features.n == 0 || features.dim == 0 {
            return Err(Error::Empty(path.to_owned()));
        }
        let counts = [paths.len(), labels.as_ref().map_or(paths.len(), Vec::len)];
        if counts != [features.n; 2] {
            let labels = labels.as_ref().map_or(String::new(), |l| format!(" and {} labels", l.len()));
            return Err(invalid(format!("{} rows, but {} paths{labels}", features.n, paths.len())));
        }
        if let Some(i) = features.values.iter().position(|v| !v.is_finite()) {
            return Err(invalid(format!("row {} contains {}", i / features.dim, features.values[i])));
        }
        Ok(embeddings)
    }

    fn new(paths: Vec<String>, labels: Option<Vec<Option<String>>>, dim: usize, values: Vec<f32>) -> Embeddings {
        let features = Features { n: values.len().checked_div(dim).unwrap_or(0), dim, values };
        Embeddings { file: PathBuf::new(), origin: None, paths, labels, features }
    }
}

fn read_parquet(file: File) -> Result<Embeddings, String> {
    // By Parquet's own types: the Arrow schemas of other writers can ask for large lists or
    // dictionaries.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let builder = ParquetRecordBatchReaderBuilder::try_new_with_options(file, options).map_err(|e| e.to_string())?;
    let entries = builder.metadata().file_metadata().key_value_metadata();
    let origin = entries.and_then(|all| all.iter().find(|kv| kv.key == ORIGIN_KEY)).and_then(|kv| kv.value.clone());
    let parse =
        |json: String| serde_json::from_str(&json).map_err(|e| format!("invalid metadata entry `{ORIGIN_KEY}`: {e}"));
    let origin = origin.map(parse).transpose()?;
    let schema = builder.schema().clone();
    let column = |name: &str| schema.index_of(name).ok();
    let (Some(path), Some(embedding)) = (column("path"), column("embedding")) else {
        let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        return Err(format!("columns `path` and `embedding` expected, found {}", names.join(", ")));
    };
    let label = column("label");
    let (mut paths, mut labels, mut values, mut dim) = (Vec::new(), label.map(|_| Vec::new()), Vec::new(), 0);
    for batch in builder.build().map_err(|e| e.to_string())? {
        let batch = batch.map_err(|e| e.to_string())?;
        let strings = |i: usize| -> Result<Vec<Option<String>>, String> {
            let column = batch.column(i).as_any().downcast_ref::<StringArray>();
            let column = column.ok_or_else(|| format!("column `{}` is not text", schema.field(i).name()))?;
            Ok(column.iter().map(|text| text.map(str::to_owned)).collect())
        };
        for path in strings(path)? {
            paths.push(path.ok_or("column `path` contains nulls")?);
        }
        if let (Some(labels), Some(label)) = (&mut labels, label) {
            labels.extend(strings(label)?);
        }
        for row in 0..batch.num_rows() {
            let row = list_values(batch.column(embedding), row)?;
            if dim == 0 {
                dim = row.len();
            }
            if row.len() != dim {
                return Err(format!(
                    "row {} has {} values, the first row has {dim}",
                    values.len() / dim.max(1),
                    row.len()
                ));
            }
            values.extend(row);
        }
    }
    Ok(Embeddings { origin, ..Embeddings::new(paths, labels, dim, values) })
}

/// Values of one row of a list column.
fn list_values(column: &ArrayRef, row: usize) -> Result<Vec<f32>, String> {
    if column.is_null(row) {
        return Err("column `embedding` contains nulls".into());
    }
    let any = column.as_any();
    let list = any.downcast_ref::<FixedSizeListArray>().map(|c| c.value(row));
    let list = list.or_else(|| any.downcast_ref::<ListArray>().map(|c| c.value(row)));
    let list = list.ok_or("column `embedding` does not contain lists")?;
    if list.null_count() > 0 {
        return Err("column `embedding` contains lists with nulls".into());
    }
    if let Some(values) = list.as_any().downcast_ref::<Float32Array>() {
        return Ok(values.values().to_vec());
    }
    match list.as_any().downcast_ref::<Float64Array>() {
        Some(values) => Ok(values.values().iter().map(|v| *v as f32).collect()),
        None => Err(format!("column `embedding` contains {}, not floats", list.data_type())),
    }
}

/// See [`npy::header`].
fn check_header(file: &mut File) -> Result<(), String> {
    let mut start = Vec::new();
    (&mut *file).take(npy::MAX_HEADER as u64).read_to_end(&mut start).map_err(|e| e.to_string())?;
    file.rewind().map_err(|e| e.to_string())?;
    npy::header(&start).map(|_| ())
}

fn read_npy(mut file: File, path: &Path) -> Result<Embeddings, String> {
    check_header(&mut file)?;
    let file_len = file.metadata().map_err(|e| e.to_string())?.len();
    let npy = npyz::NpyFile::new(BufReader::new(file)).map_err(|e| e.to_string())?;
    let &[n, dim] = npy.shape() else { return Err(format!("shape [N, F] expected, found {:?}", npy.shape())) };
    if npy.order() != npyz::Order::C {
        return Err("Fortran order is not supported, save it in C order".into());
    }
    if npy.dtype().descr() != "'<f4'" {
        return Err(format!("dtype '<f4' expected, found {}; save it with .astype('float32')", npy.dtype().descr()));
    }
    // The header is not trusted: no more is allocated than the file can hold.
    if n.checked_mul(dim).is_none_or(|values| values > file_len / 4) {
        return Err(format!("{n} rows of {dim} values expected, but the file has {file_len} bytes"));
    }
    let values: Vec<f32> = match npy.try_data::<f32>() {
        Ok(data) => data.collect::<io::Result<_>>().map_err(|e| e.to_string())?,
        Err(npy) => return Err(format!("dtype '<f4' expected, found {}", npy.dtype().descr())),
    };
    let lines = |path: PathBuf| -> Result<Option<Vec<String>>, String> {
        match File::open(&path) {
            Ok(file) => {
                let lines = BufReader::new(file).lines().map(|l| l.map(|l| unescape(&l)));
                lines.collect::<io::Result<_>>().map(Some).map_err(|e| format!("{}: {e}", path.display()))
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(format!("{}: {e}", path.display())),
        }
    };
    let paths = lines(paths_file(path))?;
    let paths = paths.ok_or_else(|| format!("the file of image paths, {}, is missing", paths_file(path).display()))?;
    let labels = lines(labels_file(path))?.map(|labels| labels.into_iter().map(non_empty).collect());
    Ok(Embeddings::new(paths, labels, dim as usize, values))
}

/// Label in a text file; `None` if it is empty.
fn non_empty(label: String) -> Option<String> {
    Some(label).filter(|label| !label.is_empty())
}

fn read_csv(mut file: File) -> Result<Embeddings, String> {
    // A truncated number still parses, so the last line must be complete.
    let mut last = [0];
    let end = file.seek(SeekFrom::End(-1)).and_then(|_| file.read_exact(&mut last)).and_then(|()| file.rewind());
    if end.is_ok() && last != *b"\n" {
        return Err("the last line is incomplete".into());
    }
    file.rewind().map_err(|e| e.to_string())?;
    let mut reader = csv::Reader::from_reader(BufReader::new(file));
    let header = reader.headers().map_err(|e| e.to_string())?.clone();
    if header.get(0) != Some("path") {
        return Err("the first column is not `path`".into());
    }
    let labeled = header.get(1) == Some("label");
    let first = 1 + usize::from(labeled);
    let (mut paths, mut labels, mut values) = (Vec::new(), labeled.then(Vec::new), Vec::new());
    for (i, record) in reader.records().enumerate() {
        let record = record.map_err(|e| e.to_string())?;
        paths.push(record[0].to_owned());
        if let Some(labels) = &mut labels {
            labels.push(non_empty(record[1].to_owned()));
        }
        for text in record.iter().skip(first) {
            values.push(text.parse::<f32>().map_err(|_| format!("row {i}: `{text}` is not a number"))?);
        }
    }
    Ok(Embeddings::new(paths, labels, header.len() - first, values))
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
            column: Some("image".into()),
            levels: Levels::uniform(0.0, 4095.0),
        }
    }

    fn write_sample(path: &Path, labeled: bool) -> (Vec<String>, Vec<Option<String>>, Vec<f32>) {
        let paths: Vec<String> = (0..5).map(|i| format!("a, \"{i}\"\n\\n/ü.png")).collect();
        let labels: Vec<Option<String>> = (0..5).map(|i| (i != 3).then(|| format!("class {}", i % 2))).collect();
        let values: Vec<f32> = (0..15).map(|i| (i as f32 - 7.0) / 3.0).collect();
        let existed = path.exists();
        let mut writer = Writer::new(path, origin(), 5, 3, labeled).unwrap();
        for rows in [0..2, 2..5] {
            let (labels, values) = (&labels[rows.clone()], &values[3 * rows.start..3 * rows.end]);
            writer.push(Rows { paths: &paths[rows], labels: labeled.then_some(labels), values }).unwrap();
        }
        assert_eq!(path.exists(), existed);
        writer.finish().unwrap();
        (paths, labels, values)
    }

    #[test]
    fn round_trips_in_every_format() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.parquet", "a.npy", "a.csv"] {
            for labeled in [true, false] {
                let path = folder.path().join(format!("{labeled}-{name}"));
                let (paths, labels, values) = write_sample(&path, labeled);
                let read = Embeddings::open(&path).unwrap();
                assert_eq!((read.origin.unwrap(), read.paths), (origin(), paths), "{name}");
                assert_eq!((read.labels, read.features.values), (labeled.then_some(labels), values), "{name}");
            }
        }
        let files = fs::read_dir(folder.path()).unwrap().flatten();
        assert!(files.map(|e| e.file_name()).all(|n| !n.to_string_lossy().contains("partial")));
    }

    #[test]
    fn rejects_truncated_files() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["a.parquet", "a.npy"] {
            let path = folder.path().join(name);
            write_sample(&path, true);
            let bytes = fs::read(&path).unwrap();
            for n in [0, 3, 11, bytes.len() / 2, bytes.len() - 1] {
                fs::write(&path, &bytes[..n]).unwrap();
                assert!(matches!(Embeddings::open(&path), Err(Error::Format { .. })), "{name} truncated to {n}");
            }
        }
    }

    #[test]
    fn rejects_npy_headers_that_stall_the_parser() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        let open = |dictionary: &str| {
            let bytes =
                [b"\x93NUMPY\x01\x00", &(dictionary.len() as u16).to_le_bytes()[..], dictionary.as_bytes()].concat();
            fs::write(&path, bytes).unwrap();
            Embeddings::open(&path).unwrap_err().to_string()
        };
        assert!(open(&format!("{}{}\n", "[".repeat(40), "]".repeat(40))).contains("header"));
        assert!(open(&format!("{{'shape': {}", "(".repeat(60_000))).contains("header"));
        let huge = "{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775808, 4), }\n";
        assert!(open(huge).contains("shape"));
    }

    #[test]
    fn overwriting_removes_stale_labels() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.npy");
        write_sample(&path, true);
        write_sample(&path, false);
        assert_eq!(Embeddings::open(&path).unwrap().labels, None);
    }

    #[test]
    fn rejects_invalid_files_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let open_error = |name: &str, text: &str| {
            let path = folder.path().join(name);
            fs::write(&path, text).unwrap();
            Embeddings::open(&path).unwrap_err().to_string()
        };
        assert!(open_error("a.txt", "").contains(".parquet, .npy or .csv"));
        assert!(open_error("a.csv", "x,y\n1,2\n").contains("not `path`"));
        assert!(open_error("b.csv", "path,v0\na,one\n").contains("`one`"));
        assert!(open_error("c.csv", "path,v0\n").contains("no embeddings"));
        assert!(open_error("d.csv", "path,v0\na,nan\n").contains("NaN"));
    }
}
