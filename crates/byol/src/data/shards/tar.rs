//! Tar files in WebDataset's layout: the members of a sample are consecutive and share their name
//! up to the first dot.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use super::{Entry, Index, MAX_CLASSES, OpenUnit, Unit};
use crate::data::folder::is_image_extension;

/// Member of a tar file.
struct Member {
    /// Path up to the first dot of the file name.
    key: String,
    extension: String,
    offset: u64,
    len: u64,
}

/// Size of the end-of-archive marker: two empty blocks.
const END: u64 = 1024;

/// Lists the members of a tar file, in order.
///
/// # Errors
/// A damaged or truncated file.
fn members(file: &File) -> io::Result<Vec<Member>> {
    let length = file.metadata()?.len();
    let mut members = Vec::new();
    let mut end = 0;
    for entry in ::tar::Archive::new(file).entries_with_seek().map_err(broken)? {
        let entry = entry.map_err(broken)?;
        let (offset, len) = (entry.raw_file_position(), entry.size());
        // Written so that no value in a header can overflow.
        if offset > length || len > length - offset {
            return Err(truncated());
        }
        end = offset + len.next_multiple_of(512);
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path().map_err(broken)?.to_string_lossy().into_owned();
        let name = path.rfind('/').map_or(0, |slash| slash + 1);
        let (key, extension) = match path[name..].find('.') {
            Some(dot) => (&path[..name + dot], &path[name + dot + 1..]),
            None => (&path[..], ""),
        };
        members.push(Member { key: key.to_owned(), extension: extension.to_ascii_lowercase(), offset, len });
    }
    if length < end + END {
        return Err(truncated());
    }
    Ok(members)
}

fn broken(error: io::Error) -> io::Error {
    io::Error::other(format!("not a complete tar file ({error})"))
}

fn truncated() -> io::Error {
    io::Error::other("the file is truncated\nhint: copy it again")
}

/// Reads the location of each image, and the class of each if all have one.
fn samples(file: &File) -> io::Result<(Vec<Entry>, Option<Vec<usize>>)> {
    let (mut entries, mut labels, mut is_unlabeled) = (Vec::new(), Vec::new(), false);
    let members = members(file)?;
    for sample in members.chunk_by(|a, b| a.key == b.key) {
        let is_image = |m: &&Member| is_image_extension(m.extension.rsplit('.').next().unwrap_or_default());
        let Some(image) = sample.iter().find(is_image) else { continue };
        let len = u32::try_from(image.len).map_err(|_| io::Error::other(format!("{} is too large", image.key)))?;
        entries.push(Entry { name: format!("{}.{}", image.key, image.extension).into(), offset: image.offset, len });
        match sample.iter().find(|m| m.extension == "cls").map(|m| parse_class(file, m)) {
            Some(Ok(Some(label))) => labels.push(label),
            Some(Err(error)) => return Err(error),
            Some(Ok(None)) | None => is_unlabeled = true,
        }
    }
    Ok((entries, (!is_unlabeled).then_some(labels)))
}

/// Parses a member's text as a class number; `None` if it is not one.
fn parse_class(mut file: &File, member: &Member) -> io::Result<Option<usize>> {
    let mut text = vec![0; member.len.min(32) as usize];
    file.seek(SeekFrom::Start(member.offset))?;
    file.read_exact(&mut text)?;
    let class = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
    Ok(class.filter(|class| *class < MAX_CLASSES))
}

/// Indexes a tar file, which is one unit.
pub(super) fn index(path: &Path) -> io::Result<Index> {
    let (entries, labels) = samples(&File::open(path)?)?;
    Ok(Index { units: vec![Unit { path: path.to_owned(), group: None, images: entries.len(), remote: None }], labels })
}

/// Opens a tar file.
pub(super) fn open(path: &Path) -> io::Result<OpenUnit> {
    let file = File::open(path)?;
    let (entries, _) = samples(&file)?;
    Ok(OpenUnit { file, entries })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rejects_member_sizes_beyond_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.tar");
        for size in [2000, 1 << 40, i64::MAX as u64, u64::MAX] {
            let mut header = ::tar::Header::new_gnu();
            header.set_path("a.jpg").unwrap();
            header.set_size(size);
            header.set_cksum();
            std::fs::write(&path, [&header.as_bytes()[..], &[0; 1024]].concat()).unwrap();
            assert!(index(&path).is_err(), "{size}");
        }
    }
}
