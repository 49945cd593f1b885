//! Parquet files with an image column as written by Hugging Face: a struct of `bytes` and `path`,
//! or plain bytes. A unit is a row group. Opening it writes its images to a temporary file, so they
//! are on disk and not in memory.

use std::{fs::File, io, io::Write, path::Path};

use arrow_array::{
    Array, BinaryArray, LargeBinaryArray, RecordBatch, StringArray, StructArray,
    cast::AsArray,
    types::{
        ArrowPrimitiveType, Int8Type, Int16Type, Int32Type, Int64Type, UInt8Type, UInt16Type, UInt32Type, UInt64Type,
    },
};
use arrow_schema::{DataType, Schema};
use parquet::arrow::{
    ProjectionMask,
    arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReaderBuilder},
};

use super::{Entry, Index, MAX_CLASSES, OpenUnit, Unit};
use crate::catch_panic::catch_panic;

/// Names of image columns of plain bytes.
const IMAGES: [&str; 5] = ["image", "img", "jpg", "png", "bytes"];

/// Names of label columns.
const LABELS: [&str; 4] = ["label", "labels", "fine_label", "cls"];

fn broken(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("not a complete Parquet file ({error})"))
}

fn is_binary(data_type: &DataType) -> bool {
    matches!(data_type, DataType::Binary | DataType::LargeBinary)
}

/// Opens a reader that uses Parquet's types and ignores the writer's in-memory types (large lists,
/// dictionaries).
fn reader(path: &Path) -> io::Result<ParquetRecordBatchReaderBuilder<File>> {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    ParquetRecordBatchReaderBuilder::try_new_with_options(File::open(path)?, options).map_err(broken)
}

/// Finds the image column.
fn image_column(schema: &Schema) -> io::Result<usize> {
    let is_image = |data_type: &DataType, name: &str| match data_type {
        DataType::Struct(fields) => fields.iter().any(|f| f.name() == "bytes" && is_binary(f.data_type())),
        other => is_binary(other) && IMAGES.contains(&name),
    };
    let column = schema.fields().iter().position(|f| is_image(f.data_type(), f.name()));
    column.ok_or_else(|| {
        let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        io::Error::other(format!(
            "it has no image column (expected a struct with `bytes`, or bytes named {}; its columns are {})",
            IMAGES.join(", "),
            names.join(", ")
        ))
    })
}

/// Indexes a file, with one unit per row group.
pub(super) fn index(path: &Path) -> io::Result<Index> {
    catch_panic(|| index_may_panic(path)).map_err(broken)?
}

/// Opens a row group.
pub(super) fn open(path: &Path, group: usize) -> io::Result<OpenUnit> {
    catch_panic(|| open_may_panic(path, group)).map_err(broken)?
}

fn index_may_panic(path: &Path) -> io::Result<Index> {
    let builder = reader(path)?;
    image_column(builder.schema())?;
    // Every image takes at least a byte, so a larger number of rows is invalid.
    let length = path.metadata()?.len();
    let mut units = Vec::new();
    for (group, metadata) in builder.metadata().row_groups().iter().enumerate() {
        let rows = u64::try_from(metadata.num_rows()).ok().filter(|rows| *rows <= length);
        let images = rows.ok_or_else(|| broken(format!("a row group of {} rows", metadata.num_rows())))? as usize;
        units.push(Unit { path: path.to_owned(), group: Some(group), images, remote: None });
    }
    let label_column = builder.schema().fields().iter().position(|f| LABELS.contains(&f.name().as_str()));
    let labels = match label_column {
        None => None,
        Some(column) => {
            let mask = ProjectionMask::roots(builder.parquet_schema(), [column]);
            let mut labels = Vec::new();
            let mut is_complete = true;
            for batch in builder.with_projection(mask).build().map_err(broken)? {
                let classes = parse_classes(&batch.map_err(broken)?);
                is_complete &= classes.is_some();
                labels.extend(classes.unwrap_or_default());
            }
            is_complete.then_some(labels)
        }
    };
    Ok(Index { units, labels })
}

/// Reads the first column as classes; `None` if it is not of an integer type, or a value is missing
/// or out of range.
fn parse_classes(batch: &RecordBatch) -> Option<Vec<usize>> {
    fn parse<T: ArrowPrimitiveType<Native: TryInto<usize>>>(column: &dyn Array) -> Option<Vec<usize>> {
        column.as_primitive::<T>().iter().map(|class| class?.try_into().ok().filter(|c| *c < MAX_CLASSES)).collect()
    }
    let column = batch.column(0);
    match column.data_type() {
        DataType::Int64 => parse::<Int64Type>(column),
        DataType::Int32 => parse::<Int32Type>(column),
        DataType::Int16 => parse::<Int16Type>(column),
        DataType::Int8 => parse::<Int8Type>(column),
        DataType::UInt64 => parse::<UInt64Type>(column),
        DataType::UInt32 => parse::<UInt32Type>(column),
        DataType::UInt16 => parse::<UInt16Type>(column),
        DataType::UInt8 => parse::<UInt8Type>(column),
        _ => None,
    }
}

fn open_may_panic(path: &Path, group: usize) -> io::Result<OpenUnit> {
    let builder = reader(path)?;
    let column = image_column(builder.schema())?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), [column]);
    let rows =
        builder.with_projection(mask).with_row_groups(vec![group]).with_batch_size(64).build().map_err(broken)?;
    let mut file = tempfile::tempfile()?;
    let (mut entries, mut offset) = (Vec::new(), 0);
    for batch in rows {
        let batch = batch.map_err(broken)?;
        let column = batch.column(0);
        let (images, names) = match column.as_any().downcast_ref::<StructArray>() {
            Some(image) => {
                (image.column_by_name("bytes").ok_or_else(|| broken("no bytes"))?, image.column_by_name("path"))
            }
            None => (column, None),
        };
        let names = names.and_then(|names| names.as_any().downcast_ref::<StringArray>());
        for i in 0..batch.num_rows() {
            let bytes = row_bytes(images.as_ref(), i);
            let name = names.filter(|names| names.is_valid(i)).map(|names| names.value(i).to_owned());
            file.write_all(bytes)?;
            let len = u32::try_from(bytes.len()).map_err(broken)?;
            let name = name.unwrap_or_else(|| format!("group {group}, row {}", entries.len()));
            entries.push(Entry { name: name.into(), offset, len });
            offset += u64::from(len);
        }
    }
    Ok(OpenUnit { file, entries })
}

/// Bytes of row `i`; empty if it is null.
fn row_bytes(column: &dyn Array, i: usize) -> &[u8] {
    if column.is_null(i) {
        return &[];
    }
    let column = column.as_any();
    match (column.downcast_ref::<BinaryArray>(), column.downcast_ref::<LargeBinaryArray>()) {
        (Some(binary), _) => binary.value(i),
        (_, Some(binary)) => binary.value(i),
        _ => &[],
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow_array::{ArrayRef, Int64Array};
    use arrow_schema::{Field, Fields};
    use parquet::arrow::ArrowWriter;

    use super::*;
    use crate::data::{Dataset, Error};

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
            assert_eq!((image.height, image.width, image.pixels[0]), (3, 2, if i < 10 { i } else { i - 10 } as u8));
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
        assert!(reason.contains("sound, label"), "{reason}");
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
}
