//! Parquet files with an image column, as Hugging Face writes them: a struct of `bytes` and `path`, or plain bytes. A unit is a row group; when
//! it is opened its images are laid into a temporary file, so that they are on disk and not in memory.

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

use super::{Entry, Indexed, MOST_CLASSES, Open, Unit};
use crate::guarded::guarded;

/// Names that a column of images may have, where it is plain bytes.
const IMAGES: [&str; 5] = ["image", "img", "jpg", "png", "bytes"];

/// Names that a column of classes may have.
const LABELS: [&str; 4] = ["label", "labels", "fine_label", "cls"];

fn broken(error: impl std::fmt::Display) -> io::Error {
    io::Error::other(format!("it is no whole Parquet file ({error})"))
}

fn is_bytes(of: &DataType) -> bool {
    matches!(of, DataType::Binary | DataType::LargeBinary)
}

/// A reader of a file, by Parquet's own types: those that its writer had in memory (large lists, dictionaries) do not matter.
fn reader(path: &Path) -> io::Result<ParquetRecordBatchReaderBuilder<File>> {
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    ParquetRecordBatchReaderBuilder::try_new_with_options(File::open(path)?, options).map_err(broken)
}

/// The column of images.
fn image_column(schema: &Schema) -> io::Result<usize> {
    let fits = |of: &DataType, name: &str| match of {
        DataType::Struct(fields) => fields.iter().any(|f| f.name() == "bytes" && is_bytes(f.data_type())),
        of => is_bytes(of) && IMAGES.contains(&name),
    };
    let found = schema.fields().iter().position(|f| fits(f.data_type(), f.name()));
    found.ok_or_else(|| {
        let names: Vec<&str> = schema.fields().iter().map(|f| f.name().as_str()).collect();
        io::Error::other(format!(
            "it has no column of images, which is a struct with `bytes`, or bytes named {}; its columns are {}",
            IMAGES.join(", "),
            names.join(", ")
        ))
    })
}

/// What a file holds: a unit a row group.
pub(super) fn index(path: &Path) -> io::Result<Indexed> {
    guarded(|| index_of(path)).map_err(broken)?
}

/// Opens a row group.
pub(super) fn open(path: &Path, group: usize) -> io::Result<Open> {
    guarded(|| open_of(path, group)).map_err(broken)?
}

fn index_of(path: &Path) -> io::Result<Indexed> {
    let builder = reader(path)?;
    image_column(builder.schema())?;
    // An image is a byte at least: a file that says it has more is broken, and is not believed.
    let length = path.metadata()?.len();
    let mut units = Vec::new();
    for (group, of) in builder.metadata().row_groups().iter().enumerate() {
        let rows = u64::try_from(of.num_rows()).ok().filter(|rows| *rows <= length);
        let images = rows.ok_or_else(|| broken(format!("a group of {} rows", of.num_rows())))? as usize;
        units.push(Unit { path: path.to_owned(), group: Some(group), images, remote: None });
    }
    let label = builder.schema().fields().iter().position(|f| LABELS.contains(&f.name().as_str()));
    let labels = match label {
        None => None,
        Some(column) => {
            let mask = ProjectionMask::roots(builder.parquet_schema(), [column]);
            let mut all = Vec::new();
            let mut whole = true;
            for batch in builder.with_projection(mask).build().map_err(broken)? {
                let some = classes(&batch.map_err(broken)?);
                whole &= some.is_some();
                all.extend(some.unwrap_or_default());
            }
            whole.then_some(all)
        }
    };
    Ok(Indexed { units, labels })
}

/// The only column as classes; none where it is of another type, or one is missing, below 0 or no number of a class.
fn classes(batch: &RecordBatch) -> Option<Vec<usize>> {
    fn whole<T: ArrowPrimitiveType<Native: TryInto<usize>>>(column: &dyn Array) -> Option<Vec<usize>> {
        column.as_primitive::<T>().iter().map(|class| class?.try_into().ok().filter(|c| *c < MOST_CLASSES)).collect()
    }
    let column = batch.column(0);
    match column.data_type() {
        DataType::Int64 => whole::<Int64Type>(column),
        DataType::Int32 => whole::<Int32Type>(column),
        DataType::Int16 => whole::<Int16Type>(column),
        DataType::Int8 => whole::<Int8Type>(column),
        DataType::UInt64 => whole::<UInt64Type>(column),
        DataType::UInt32 => whole::<UInt32Type>(column),
        DataType::UInt16 => whole::<UInt16Type>(column),
        DataType::UInt8 => whole::<UInt8Type>(column),
        _ => None,
    }
}

fn open_of(path: &Path, group: usize) -> io::Result<Open> {
    let builder = reader(path)?;
    let column = image_column(builder.schema())?;
    let mask = ProjectionMask::roots(builder.parquet_schema(), [column]);
    let rows =
        builder.with_projection(mask).with_row_groups(vec![group]).with_batch_size(64).build().map_err(broken)?;
    let mut file = tempfile::tempfile()?;
    let (mut entries, mut at) = (Vec::new(), 0);
    for batch in rows {
        let batch = batch.map_err(broken)?;
        let column = batch.column(0);
        let (images, names) = match column.as_any().downcast_ref::<StructArray>() {
            Some(of) => (of.column_by_name("bytes").ok_or_else(|| broken("no bytes"))?, of.column_by_name("path")),
            None => (column, None),
        };
        let names = names.and_then(|names| names.as_any().downcast_ref::<StringArray>());
        for i in 0..batch.num_rows() {
            let bytes = bytes_of(images.as_ref(), i);
            let name = names.filter(|names| names.is_valid(i)).map(|names| names.value(i).to_owned());
            file.write_all(bytes)?;
            let len = u32::try_from(bytes.len()).map_err(broken)?;
            let name = name.unwrap_or_else(|| format!("group {group}, row {}", entries.len()));
            entries.push(Entry { name: name.into(), at, len });
            at += u64::from(len);
        }
    }
    Ok(Open { file, entries })
}

/// A row's bytes; none where it is empty.
fn bytes_of(of: &dyn Array, i: usize) -> &[u8] {
    if of.is_null(i) {
        return &[];
    }
    let of = of.as_any();
    match (of.downcast_ref::<BinaryArray>(), of.downcast_ref::<LargeBinaryArray>()) {
        (Some(of), _) => of.value(i),
        (_, Some(of)) => of.value(i),
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

    fn png(shade: u8) -> Vec<u8> {
        let mut bytes = io::Cursor::new(Vec::new());
        image::RgbImage::from_pixel(2, 3, image::Rgb([shade; 3]))
            .write_to(&mut bytes, image::ImageFormat::Png)
            .unwrap();
        bytes.into_inner()
    }

    /// `n` images, each of its own grey, in the nested form or as plain bytes; a row group has four.
    fn file(path: &Path, n: usize, nested: bool, column: &str) {
        let all: Vec<Vec<u8>> = (0..n).map(|i| png(i as u8)).collect();
        let bytes: ArrayRef = Arc::new(BinaryArray::from_iter_values(&all));
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
    fn images_labels_and_names_come_back_in_both_forms() {
        let folder = tempfile::tempdir().unwrap();
        file(&folder.path().join("train-00000-of-00002.parquet"), 10, true, "image");
        file(&folder.path().join("train-00001-of-00002.parquet"), 3, false, "img");
        file(&folder.path().join("test-00000-of-00001.parquet"), 5, true, "image");
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
    fn a_file_without_images_names_its_columns_and_a_torn_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        file(&path, 4, false, "sound");
        let Err(Error::Shard { reason, .. }) = Dataset::open(&path) else { panic!("it has no images") };
        assert!(reason.contains("sound, label"), "{reason}");
        file(&path, 4, true, "image");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 9]).unwrap();
        assert!(matches!(Dataset::open(&path), Err(Error::Shard { .. })));
    }

    /// The library panics at some broken pages; found by the fuzz target.
    #[test]
    fn a_damaged_page_is_an_error_wherever_it_is_damaged() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.parquet");
        file(&path, 8, true, "image");
        let whole = std::fs::read(&path).unwrap();
        for at in (4..whole.len() - 8).step_by(3) {
            for flip in [0x01, 0x80] {
                let mut bytes = whole.clone();
                bytes[at] ^= flip;
                std::fs::write(&path, bytes).unwrap();
                if let Ok(data) = Dataset::open(&path) {
                    (0..data.train.len().min(8)).for_each(|i| drop(data.train.get(i)));
                }
            }
        }
    }
}
