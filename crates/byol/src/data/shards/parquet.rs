//! Parquet files with an image column as written by Hugging Face: a struct of `bytes` and `path`,
//! or plain bytes. A unit is a row group. Opening it writes its images to a temporary file, so they
//! are on disk and not in memory.
//!
//! The image column is the chosen one, `image`, `img`, or the only one with images
//! ([`find_column`]). A row without bytes may name a file beside the Parquet file.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use arrow_array::{
    Array, BinaryArray, LargeBinaryArray, RecordBatch, StringArray, StructArray,
    cast::AsArray,
    types::{
        ArrowPrimitiveType, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
    },
};
use arrow_schema::{DataType, Field, Schema};
use parquet::{
    arrow::{
        ProjectionMask,
        arrow_reader::{ArrowReaderMetadata, ArrowReaderOptions, ParquetRecordBatchReaderBuilder},
    },
    errors::ParquetError,
    file::metadata::{ColumnChunkMetaData, ParquetMetaData},
};

use super::{Content, Entry, MAX_CLASSES, Notes, OpenUnit, ShardIndex, Unit, damaged, no_images};
use crate::{catch_panic::catch_panic, data::decode};

/// Names of image columns of plain bytes.
const IMAGES: [&str; 5] = ["image", "img", "jpg", "png", "bytes"];

/// Names of label columns.
const LABELS: [&str; 4] = ["label", "labels", "fine_label", "cls"];

/// Rows with bytes that are examined to tell whether a column has images.
const EXAMINED: usize = 16;

/// Rows that are read at once.
const BATCH: usize = 8;

fn broken(error: impl std::fmt::Display) -> io::Error {
    damaged(format!("not a complete Parquet file ({error})"))
}

/// Error of the Parquet library; those of the machine keep their kind.
fn parquet_error(error: ParquetError) -> io::Error {
    let ParquetError::External(inner) = error else { return broken(error) };
    match inner.downcast::<io::Error>() {
        Ok(error) if error.raw_os_error().is_some() => *error,
        Ok(error) => broken(error),
        Err(other) => broken(other),
    }
}

fn is_binary(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Binary | DataType::LargeBinary)
}

/// Opens a reader that uses Parquet's types and ignores the writer's in-memory types (large lists,
/// dictionaries).
fn reader(path: &Path) -> io::Result<ParquetRecordBatchReaderBuilder<File>> {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    ParquetRecordBatchReaderBuilder::try_new_with_options(File::open(path)?, options).map_err(parquet_error)
}

/// Opens another reader of the same file.
fn reader_with(path: &Path, metadata: ArrowReaderMetadata) -> io::Result<ParquetRecordBatchReaderBuilder<File>> {
    Ok(ParquetRecordBatchReaderBuilder::new_with_metadata(File::open(path)?, metadata))
}

/// True if the type of a column permits images.
fn permits_images(field: &Field) -> bool {
    match field.data_type() {
        DataType::Struct(fields) => fields.iter().any(|f| f.name() == "bytes" && is_binary(f.data_type())),
        other => is_binary(other),
    }
}

/// Contents of a column, from its first rows.
#[derive(Debug, Clone, Default)]
struct Sample {
    /// True if some have images in a supported format, false if none has; `None` if no row has
    /// bytes.
    has_images: Option<bool>,
    /// First path of a row without bytes.
    path: Option<String>,
}

/// Finds the image column: `chosen`, else `image`, `img`, or the only one with images. `sample`
/// reads the first rows of a column.
///
/// # Errors
/// [`no_images`] if there is none; another error if several have images, or `chosen` has none.
fn find_column(
    schema: &Schema,
    chosen: Option<&str>,
    sample: impl Fn(usize) -> io::Result<Sample>,
) -> io::Result<usize> {
    let names =
        |columns: &[usize]| columns.iter().map(|c| schema.field(*c).name().as_str()).collect::<Vec<_>>().join(", ");
    let all: Vec<usize> = (0..schema.fields().len()).collect();
    let permitted: Vec<usize> = all.iter().copied().filter(|c| permits_images(schema.field(*c))).collect();
    if let Some(chosen) = chosen {
        let column = permitted.iter().find(|c| schema.field(**c).name() == chosen);
        return column.copied().ok_or_else(|| match permitted[..] {
            [] => no_images(format!("it has no image column `{chosen}` (its columns are {})", names(&all))),
            _ => io::Error::other(format!(
                "it has no image column `{chosen}`\nhint: choose one of its columns {} with `--column`",
                names(&permitted)
            )),
        });
    }
    let is_struct = |c: &usize| matches!(schema.field(*c).data_type(), DataType::Struct(_));
    let is_named = |c: &usize| IMAGES.contains(&schema.field(*c).name().as_str());
    let candidates: Vec<usize> = permitted.iter().copied().filter(|c| is_struct(c) || is_named(c)).collect();
    let by_name = |name: &str| candidates.iter().find(|c| schema.field(**c).name().eq_ignore_ascii_case(name)).copied();
    if let Some(column) = by_name("image").or_else(|| by_name("img")) {
        return Ok(column);
    }
    let candidates = match candidates[..] {
        [] => {
            let hint = match permitted.first() {
                Some(_) => format!("\nhint: if {} has images, choose it with `--column`", names(&permitted)),
                None => String::new(),
            };
            return Err(no_images(format!(
                "it has no image column (expected a struct with `bytes`, or bytes named {}; its columns are {}){hint}",
                IMAGES.join(", "),
                names(&all)
            )));
        }
        [column] if is_named(&column) => return Ok(column),
        _ => candidates,
    };
    let samples: Vec<Sample> = candidates.iter().map(|c| sample(*c)).collect::<io::Result<_>>()?;
    let select = |has_images: Option<bool>| -> Vec<usize> {
        candidates.iter().zip(&samples).filter(|(_, s)| s.has_images == has_images).map(|(c, _)| *c).collect()
    };
    let with_images = if select(Some(true)).is_empty() { select(None) } else { select(Some(true)) };
    match with_images[..] {
        [column] => Ok(column),
        [] => Err(no_images(format!(
            "it has no image column (the first rows of {} are not JPEG, PNG, WebP, BMP, GIF or TIFF files)",
            names(&candidates)
        ))),
        _ => Err(io::Error::other(format!(
            "it has several image columns\nhint: choose one of {} with `--column`",
            names(&with_images)
        ))),
    }
}

/// Indexes a file, with one unit per row group.
pub(super) fn index(path: &Path, column: Option<&str>) -> io::Result<ShardIndex> {
    catch_panic(|| index_may_panic(path, column)).map_err(broken)?
}

/// Opens a row group. `is_local` permits images in files of their own.
pub(super) fn open(path: &Path, group: usize, column: usize, is_local: bool) -> io::Result<OpenUnit> {
    catch_panic(|| open_may_panic(path, group, column, is_local)).map_err(broken)?
}

fn index_may_panic(path: &Path, chosen: Option<&str>) -> io::Result<ShardIndex> {
    let builder = reader(path)?;
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let metadata = ArrowReaderMetadata::try_new(builder.metadata().clone(), options).map_err(parquet_error)?;
    // Damage shows when the images are read.
    let sample = |column| match catch_panic(|| sample(path, &metadata, column)) {
        Ok(sample) => sample,
        Err(_) => Ok(Sample::default()),
    };
    let column = find_column(builder.schema(), chosen, sample)?;
    must_have_images(path, builder.metadata(), builder.schema().field(column).name(), || sample(column))?;
    // Every image takes at least a byte, so a larger number of rows is invalid.
    let length = path.metadata()?.len();
    let mut units = Vec::new();
    for (group, metadata) in builder.metadata().row_groups().iter().enumerate() {
        let rows = u64::try_from(metadata.num_rows()).ok().filter(|rows| *rows <= length);
        let images = rows.ok_or_else(|| broken(format!("a row group of {} rows", metadata.num_rows())))? as usize;
        units.push(Unit { path: path.to_owned(), group: Some(group), column, images, remote: None });
    }
    let fields = builder.schema().fields();
    let (mut labels, mut names, mut notes) = (Vec::new(), Vec::new(), Notes::default());
    if let Some(at) = fields.iter().position(|f| LABELS.contains(&f.name().as_str())) {
        let name = fields[at].name();
        names = class_names(builder.metadata(), name);
        let note = format!("column `{name}`");
        if fields[at].data_type().is_integer() {
            labels = read_classes(builder, at, &note, &mut notes)?;
        } else {
            let rows = units.iter().map(|unit| unit.images).sum();
            notes.add_to_split(note, "its values are not integers, so they are not used as classes", rows);
        }
    }
    Ok(ShardIndex { units, labels, names, notes })
}

/// Refuses a file whose images are all in other files, which do not exist.
fn must_have_images(
    path: &Path,
    metadata: &ParquetMetaData,
    column: &str,
    sample: impl Fn() -> io::Result<Sample>,
) -> io::Result<()> {
    let chunks = metadata.row_groups().iter().flat_map(|group| group.columns());
    let mut bytes_chunks = chunks.filter(|chunk| chunk.column_path().parts() == [column, "bytes"]).peekable();
    // Without statistics the rows tell.
    let is_null = |chunk: &ColumnChunkMetaData| {
        let nulls = chunk.statistics().and_then(|statistics| statistics.null_count_opt());
        nulls.is_none_or(|n| i64::try_from(n).is_ok_and(|n| n >= chunk.num_values()))
    };
    if bytes_chunks.peek().is_none() || !bytes_chunks.all(is_null) {
        return Ok(());
    }
    let Sample { has_images: None, path: Some(first) } = sample()? else { return Ok(()) };
    match image_file(path, &first) {
        Some(_) => Ok(()),
        None => Err(io::Error::other(format!(
            "its column `{column}` has only the paths of images, and {first} does not exist\n\
             hint: put the image files beside it, or write it with the images included"
        ))),
    }
}

/// Reads the first rows of a column.
fn sample(path: &Path, metadata: &ArrowReaderMetadata, column: usize) -> io::Result<Sample> {
    let builder = reader_with(path, metadata.clone())?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), [column]);
    let rows = builder.with_projection(mask).with_batch_size(BATCH).build().map_err(parquet_error)?;
    let (mut sample, mut examined) = (Sample::default(), 0);
    for batch in rows {
        // Damage shows when the images are read.
        let Ok(batch) = batch else { break };
        let Some(images) = ImageColumn::new(batch.column(0).as_ref()) else { break };
        for i in 0..batch.num_rows() {
            match images.bytes(i) {
                Some(bytes) => {
                    examined += 1;
                    sample.has_images = Some(decode::is_supported(bytes) || sample.has_images == Some(true));
                }
                None => sample.path = sample.path.or_else(|| images.path(i).map(str::to_owned)),
            }
        }
        if examined >= EXAMINED || sample.has_images == Some(true) {
            break;
        }
    }
    Ok(sample)
}

/// Names of the classes in the metadata of Hugging Face.
fn class_names(metadata: &ParquetMetaData, column: &str) -> Vec<String> {
    let names = || -> Option<Vec<String>> {
        let values = metadata.file_metadata().key_value_metadata()?;
        let text = values.iter().find(|entry| entry.key == "huggingface")?.value.as_deref()?;
        let json: serde_json::Value = serde_json::from_str(text).ok()?;
        let names = json.get("info")?.get("features")?.get(column)?.get("names")?.as_array()?;
        names.iter().map(|name| name.as_str().map(str::to_owned)).collect()
    };
    names().unwrap_or_default()
}

/// Reads the class of each row. Values that are not classes are counted in `notes`.
fn read_classes(
    builder: ParquetRecordBatchReaderBuilder<File>,
    column: usize,
    note: &str,
    notes: &mut Notes,
) -> io::Result<Vec<Option<usize>>> {
    let mask = ProjectionMask::roots(builder.parquet_schema(), [column]);
    let (mut classes, mut below, mut above) = (Vec::new(), 0, 0);
    for batch in builder.with_projection(mask).build().map_err(parquet_error)? {
        for value in integers(&batch.map_err(broken)?) {
            below += usize::from(value.is_some_and(|v| v < 0));
            above += usize::from(value.is_some_and(|v| v >= MAX_CLASSES as i128));
            let class = value.and_then(|v| usize::try_from(v).ok()).filter(|class| *class < MAX_CLASSES);
            classes.push(class);
        }
    }
    for (n, reason) in [(below, "values below 0 are not classes"), (above, "values above 65535 are not classes")] {
        if n > 0 {
            notes.add_to_split(note.to_owned(), reason, n);
        }
    }
    Ok(classes)
}

/// Values of the first column, which is of an integer type.
fn integers(batch: &RecordBatch) -> Vec<Option<i128>> {
    fn values<T: ArrowPrimitiveType<Native: Into<i128>>>(column: &dyn Array) -> Vec<Option<i128>> {
        column.as_primitive::<T>().iter().map(|value| value.map(Into::into)).collect()
    }
    let column = batch.column(0);
    match column.data_type() {
        DataType::Int64 => values::<Int64Type>(column),
        DataType::Int32 => values::<Int32Type>(column),
        DataType::Int16 => values::<Int16Type>(column),
        DataType::Int8 => values::<Int8Type>(column),
        DataType::UInt64 => values::<UInt64Type>(column),
        DataType::UInt32 => values::<UInt32Type>(column),
        DataType::UInt16 => values::<UInt16Type>(column),
        DataType::UInt8 => values::<UInt8Type>(column),
        _ => vec![None; batch.num_rows()],
    }
}

/// Image column of a batch.
struct ImageColumn<'a> {
    bytes: &'a dyn Array,
    paths: Option<&'a StringArray>,
}

impl<'a> ImageColumn<'a> {
    fn new(column: &'a dyn Array) -> Option<ImageColumn<'a>> {
        let Some(image) = column.as_any().downcast_ref::<StructArray>() else {
            return Some(ImageColumn { bytes: column, paths: None });
        };
        let paths = image.column_by_name("path").and_then(|paths| paths.as_any().downcast_ref::<StringArray>());
        Some(ImageColumn { bytes: image.column_by_name("bytes")?.as_ref(), paths })
    }

    /// Bytes of row `i`; `None` if it is null.
    fn bytes(&self, i: usize) -> Option<&'a [u8]> {
        if self.bytes.is_null(i) {
            return None;
        }
        let bytes = self.bytes.as_any();
        match (bytes.downcast_ref::<BinaryArray>(), bytes.downcast_ref::<LargeBinaryArray>()) {
            (Some(binary), _) => Some(binary.value(i)),
            (_, Some(binary)) => Some(binary.value(i)),
            _ => None,
        }
    }

    /// Path of row `i`.
    fn path(&self, i: usize) -> Option<&'a str> {
        self.paths.filter(|paths| paths.is_valid(i)).map(|paths| paths.value(i))
    }
}

/// File of an image that a Parquet file names: relative to its folder or the one above, or
/// absolute.
fn image_file(parquet: &Path, name: &str) -> Option<PathBuf> {
    let folder = parquet.parent()?;
    let folders = [Some(folder), folder.parent()];
    // Reading a device or a pipe could wait forever.
    folders.into_iter().flatten().map(|folder| folder.join(name)).find(|file| file.is_file())
}

/// Error of a temporary file. It concerns the machine and not an image.
fn temporary_file_error(error: &io::Error) -> io::Error {
    let kind = if super::super::is_image_error(error) { io::ErrorKind::Other } else { error.kind() };
    let folder = std::env::temp_dir();
    io::Error::new(
        kind,
        format!(
            "cannot write a temporary file in {}: {error}\nhint: set TMPDIR to a folder with enough space",
            folder.display()
        ),
    )
}

fn open_may_panic(path: &Path, group: usize, column: usize, is_local: bool) -> io::Result<OpenUnit> {
    let builder = reader(path)?;
    let metadata = builder.metadata().clone();
    let has_column = builder.schema().fields().get(column).is_some_and(|field| permits_images(field));
    if group >= metadata.num_row_groups() || !has_column {
        return Err(damaged("it has changed"));
    }
    let n_rows = |group: usize| usize::try_from(metadata.row_group(group).num_rows()).unwrap_or(0);
    let first_row: usize = (0..group).map(n_rows).fold(0, usize::saturating_add);
    let mask = ProjectionMask::roots(builder.parquet_schema(), [column]);
    let rows = builder.with_projection(mask).with_row_groups(vec![group]).with_batch_size(64).build();
    let mut file = tempfile::tempfile().map_err(|e| temporary_file_error(&e))?;
    let (mut entries, mut offset) = (Vec::new(), 0);
    let mut rows = rows.map_err(parquet_error)?;
    let damage = loop {
        let batch = match catch_panic(|| rows.next()) {
            Ok(None) => break "it ends early".to_owned(),
            Ok(Some(Ok(batch))) => batch,
            Ok(Some(Err(error))) => break error.to_string(),
            Err(panic) => break panic,
        };
        let Some(images) = ImageColumn::new(batch.column(0).as_ref()) else { return Err(damaged("it has changed")) };
        for i in 0..batch.num_rows() {
            let row = first_row + entries.len();
            let external = || images.path(i).and_then(|name| image_file(path, name)).filter(|_| is_local);
            let content = match (images.bytes(i), images.path(i)) {
                (Some(bytes), _) => {
                    file.write_all(bytes).map_err(|e| temporary_file_error(&e))?;
                    let len = u32::try_from(bytes.len()).map_err(broken)?;
                    offset += u64::from(len);
                    Content::Span { offset: offset - u64::from(len), len }
                }
                (None, Some(name)) => match external() {
                    Some(file) => Content::File(file.into()),
                    None => Content::Missing(format!("no image in row {row}: the file {name} does not exist").into()),
                },
                (None, None) => Content::Missing(format!("no image in row {row}").into()),
            };
            let name = images.path(i).map_or_else(|| format!("group {group}, row {}", entries.len()), str::to_owned);
            entries.push(Entry { name: name.into(), content });
        }
    };
    if entries.len() < n_rows(group) {
        must_be_readable(path, &metadata, group)?;
    }
    for k in entries.len()..n_rows(group) {
        let reason = format!("no image in row {}: the row group is damaged ({damage})", first_row + k);
        entries
            .push(Entry { name: format!("group {group}, row {k}").into(), content: Content::Missing(reason.into()) });
    }
    Ok(OpenUnit { file, entries })
}

/// Reads the bytes of a row group. The Parquet library does not tell apart damaged bytes and bytes
/// that the machine cannot read.
fn must_be_readable(path: &Path, metadata: &ParquetMetaData, group: usize) -> io::Result<()> {
    let mut file = File::open(path)?;
    for chunk in metadata.row_group(group).columns() {
        let (start, length) = chunk.byte_range();
        file.seek(SeekFrom::Start(start))?;
        io::copy(&mut (&mut file).take(length), &mut io::sink())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Int64Array};
    use arrow_schema::{Field, Fields};
    use parquet::{
        arrow::ArrowWriter,
        file::{metadata::KeyValue, properties::WriterProperties},
    };

    use super::*;
    use crate::data::{Dataset, Error, OpenOptions};

    fn png(gray: u8) -> Vec<u8> {
        let mut bytes = io::Cursor::new(Vec::new());
        image::RgbImage::from_pixel(2, 3, image::Rgb([gray; 3])).write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    }

    /// Writes `n` images of different gray values, nested or as plain bytes, in row groups of four.
    fn write_file(path: &Path, n: usize, nested: bool, column: &str) {
        let encoded: Vec<Vec<u8>> = (0..n).map(|i| png(i as u8)).collect();
        let bytes: ArrayRef = Arc::new(BinaryArray::from_iter_values(&encoded));
        let names: ArrayRef = Arc::new(StringArray::from_iter_values((0..n).map(|i| format!("{i}.png"))));
        let labels: ArrayRef = Arc::new(Int64Array::from_iter_values((0..n).map(|i| i as i64 % 3)));
        let fields: Fields = vec![
            Arc::new(Field::new("bytes", DataType::Binary, true)),
            Arc::new(Field::new("path", DataType::Utf8, true)),
        ]
        .into();
        let images: ArrayRef =
            if nested { Arc::new(StructArray::new(fields, vec![bytes, names], None)) } else { bytes };
        let batch = RecordBatch::try_from_iter([(column, images), ("label", labels)]).unwrap();
        let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), None).unwrap();
        for first in (0..n).step_by(4) {
            writer.write(&batch.slice(first, 4.min(n - first))).unwrap();
            writer.flush().unwrap();
        }
        writer.close().unwrap();
    }

    #[test]
    fn reads_images_labels_and_names_in_both_forms() {
        let folder = tempfile::tempdir().unwrap();
        write_file(&folder.path().join("train-00000-of-00002.parquet"), 10, true, "image");
        write_file(&folder.path().join("train-00001-of-00002.parquet"), 3, false, "img");
        write_file(&folder.path().join("test-00000-of-00001.parquet"), 5, true, "image");
        let data = Dataset::open(folder.path()).unwrap();
        assert_eq!((data.train.len(), data.test.as_ref().unwrap().len()), (13, 5));
        assert_eq!(data.train.labels().unwrap(), [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 0, 1, 2]);
        assert_eq!(data.classes, ["0", "1", "2"]);
        for i in [12, 0, 9, 4, 11] {
            let image = data.train.get(i).unwrap();
            assert_eq!(
                (image.height, image.width, image.pixels.to_u8()[0]),
                (3, 2, if i < 10 { i } else { i - 10 } as u8)
            );
        }
        assert_eq!(data.train.name(5), "train-00000-of-00002.parquet/5.png");
        assert_eq!(data.train.name(10), "train-00001-of-00002.parquet/group 0, row 0");
    }

    #[test]
    fn rejects_files_without_images_and_truncated_files() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        write_file(&path, 4, false, "sound");
        let Err(Error::Shard { reason, .. }) = Dataset::open(&path) else { panic!("expected a shard error") };
        assert!(reason.contains("sound, label") && reason.contains("--column"), "{reason}");
        let options = OpenOptions { column: Some("sound".into()), ..OpenOptions::default() };
        assert_eq!(Dataset::open_with(&path, &options).unwrap().train.len(), 4);
        write_file(&path, 4, true, "image");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
        assert!(matches!(Dataset::open(&path), Err(Error::Shard { .. })));
    }

    /// The Parquet library panics on some damaged pages (found by fuzzing).
    #[test]
    fn damaged_pages_do_not_panic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        write_file(&path, 8, true, "image");
        let intact = std::fs::read(&path).unwrap();
        for at in (4..intact.len() - 8).step_by(3) {
            for flip in [0x01, 0x80] {
                let mut bytes = intact.clone();
                bytes[at] ^= flip;
                std::fs::write(&path, bytes).unwrap();
                if let Ok(data) = Dataset::open(&path) {
                    (0..data.train.len().min(8)).for_each(|i| drop(data.train.get(i)));
                }
            }
        }
    }

    /// Column of structs of `bytes` and `path`.
    fn structs(bytes: &[Option<Vec<u8>>], paths: &[Option<&str>]) -> ArrayRef {
        let fields: Fields = vec![
            Arc::new(Field::new("bytes", DataType::Binary, true)),
            Arc::new(Field::new("path", DataType::Utf8, true)),
        ]
        .into();
        let bytes: ArrayRef = Arc::new(BinaryArray::from_iter(bytes.iter().map(|b| b.as_deref())));
        let paths: ArrayRef = Arc::new(StringArray::from_iter(paths.iter().copied()));
        Arc::new(StructArray::new(fields, vec![bytes, paths], None))
    }

    fn pngs(gray: u8) -> ArrayRef {
        structs(&[Some(png(gray)), Some(png(gray))], &[None, None])
    }

    fn sounds() -> ArrayRef {
        structs(&[Some(b"RIFF....WAVE".to_vec()), Some(b"RIFF....WAVE".to_vec())], &[Some("a.wav"), None])
    }

    fn write_columns(path: &Path, columns: Vec<(&str, ArrayRef)>, huggingface: Option<&str>) {
        let batch = RecordBatch::try_from_iter(columns).unwrap();
        let pair = huggingface.map(|json| KeyValue::new("huggingface".to_owned(), json.to_owned()));
        let properties = WriterProperties::builder().set_key_value_metadata(pair.map(|pair| vec![pair])).build();
        let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    #[test]
    fn image_column_is_chosen_by_name_and_content() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        let open = |columns: Vec<(&str, ArrayRef)>, column: Option<&str>| {
            write_columns(&path, columns, None);
            let options = OpenOptions { column: column.map(str::to_owned), ..OpenOptions::default() };
            Dataset::open_with(&path, &options).map(|data| data.train.get(1).unwrap().pixels.to_u8()[0])
        };
        let reason = |outcome: Result<u8, Error>| match outcome {
            Err(Error::Shard { reason, .. }) => reason,
            other => panic!("expected a shard error, not {other:?}"),
        };
        assert_eq!(open(vec![("annotation", pngs(1)), ("image", pngs(2))], None).unwrap(), 2);
        assert_eq!(open(vec![("mask", pngs(1)), ("img", pngs(2)), ("depth", pngs(3))], None).unwrap(), 2);
        assert_eq!(open(vec![("audio", sounds()), ("photo", pngs(2))], None).unwrap(), 2);
        assert_eq!(open(vec![("photo", pngs(2)), ("other", sounds())], None).unwrap(), 2);
        assert_eq!(open(vec![("photo", pngs(2))], None).unwrap(), 2);
        assert_eq!(open(vec![("image", pngs(1)), ("annotation", pngs(2))], Some("annotation")).unwrap(), 2);
        let several = reason(open(vec![("left", pngs(1)), ("audio", sounds()), ("right", pngs(2))], None));
        assert!(several.contains("left, right") && several.contains("--column"), "{several}");
        let wrong = reason(open(vec![("left", pngs(1)), ("image", pngs(2))], Some("rihgt")));
        assert!(wrong.contains("`rihgt`") && wrong.contains("left, image"), "{wrong}");
        assert!(reason(open(vec![("audio", sounds())], None)).contains("no image column"));
    }

    #[test]
    fn images_in_files_of_their_own_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data/a.parquet");
        std::fs::create_dir(folder.path().join("data")).unwrap();
        let images =
            || structs(&[None, None, Some(png(3)), None], &[Some("0.png"), Some("x/1.png"), Some("2.png"), None]);
        write_columns(&path, vec![("image", images())], None);
        std::fs::write(folder.path().join("data/0.png"), png(7)).unwrap();
        let data = Dataset::open(&path).unwrap();
        let gray = |i: usize| data.train.get(i).map(|image| image.pixels.to_u8()[0]).map_err(|e| e.to_string());
        assert_eq!((gray(0), gray(2)), (Ok(7), Ok(3)));
        assert!(gray(1).unwrap_err().contains("no image in row 1: the file x/1.png does not exist"));
        assert!(gray(3).unwrap_err().contains("no image in row 3"));
        std::fs::create_dir(folder.path().join("x")).unwrap();
        std::fs::write(folder.path().join("x/1.png"), png(8)).unwrap();
        assert_eq!(Dataset::open(&path).unwrap().train.get(1).unwrap().pixels.to_u8()[0], 8);
        // Without any of them.
        write_columns(&path, vec![("image", structs(&[None, None], &[Some("8.png"), Some("9.png")]))], None);
        let error = Dataset::open(&path).unwrap_err().to_string();
        assert!(error.contains("only the paths") && error.contains("8.png"), "{error}");
    }

    #[test]
    fn class_names_and_missing_labels_of_hugging_face() {
        let folder = tempfile::tempdir().unwrap();
        let labels = |values: [Option<i64>; 2]| -> ArrayRef { Arc::new(Int64Array::from_iter(values)) };
        let json = r#"{"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}"#;
        let write = |name: &str, values| {
            let columns = vec![("image", pngs(1)), ("label", labels(values))];
            write_columns(&folder.path().join(name), columns, Some(json));
        };
        write("train-0.parquet", [Some(1), Some(0)]);
        write("test-0.parquet", [Some(-1), Some(-1)]);
        let data = Dataset::open(folder.path()).unwrap();
        assert_eq!((data.classes.clone(), data.train.labels()), (vec!["cat".into(), "dog".into()], Some(&[1, 0][..])));
        assert!(data.test.unwrap().labels().is_none());
        let unused = data.unused[0].to_string();
        assert!(unused.starts_with("column `label` of the test split (2): values below 0"), "{unused}");
        write("train-1.parquet", [None, Some(1)]);
        let data = Dataset::open(folder.path()).unwrap();
        assert_eq!((0..4).map(|i| data.train.label(i)).collect::<Vec<_>>(), [Some(1), Some(0), None, Some(1)]);
        let text: ArrayRef = Arc::new(StringArray::from_iter_values(["a", "b"]));
        write_columns(&folder.path().join("val.parquet"), vec![("image", pngs(1)), ("label", text)], None);
        let unused = Dataset::open(folder.path()).unwrap().unused;
        assert!(unused.iter().any(|u| u.name == "column `label` of the val split" && u.count == 2), "{unused:?}");
    }

    /// Damage in one row group leaves the others readable, and does not end the command.
    #[test]
    fn rows_of_a_damaged_row_group_are_unreadable_images() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        write_file(&path, 8, true, "image");
        let mut bytes = std::fs::read(&path).unwrap();
        let start = reader(&path).unwrap().metadata().row_group(1).column(0).byte_range().0 as usize;
        bytes[start..start + 16].fill(0xFF);
        std::fs::write(&path, bytes).unwrap();
        let data = Dataset::open(&path).unwrap();
        assert!((0..4).all(|i| data.train.get(i).is_ok()));
        assert!((4..8).all(|i| matches!(data.train.get(i), Err(Error::Image { .. }))));
    }
}
