//! Tar files in WebDataset's layout: the files of a sample follow each other and share a name up to the first dot.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use super::{Entry, Indexed, MOST_CLASSES, Open, Unit};
use crate::data::folder::is_image_name;

/// A file in a tar file.
struct Member {
    /// Up to the first dot of the last part.
    key: String,
    extension: String,
    at: u64,
    len: u64,
}

/// The end of a tar file: two empty blocks.
const END: u64 = 1024;

/// The files in a tar file, in order; refuses one that is cut off.
fn members(file: &File) -> io::Result<Vec<Member>> {
    let length = file.metadata()?.len();
    let mut all = Vec::new();
    let mut end = 0;
    for entry in ::tar::Archive::new(file).entries_with_seek().map_err(broken)? {
        let entry = entry.map_err(broken)?;
        let (at, len) = (entry.raw_file_position(), entry.size());
        // Whatever a header says: no sum of the two is too large for its type.
        if at > length || len > length - at {
            return Err(cut_off());
        }
        end = at + len.next_multiple_of(512);
        if !entry.header().entry_type().is_file() {
            continue;
        }
        let path = entry.path().map_err(broken)?.to_string_lossy().into_owned();
        let name = path.rfind('/').map_or(0, |slash| slash + 1);
        let (key, extension) = match path[name..].find('.') {
            Some(dot) => (&path[..name + dot], &path[name + dot + 1..]),
            None => (&path[..], ""),
        };
        all.push(Member { key: key.to_owned(), extension: extension.to_ascii_lowercase(), at, len });
    }
    if length < end + END {
        return Err(cut_off());
    }
    Ok(all)
}

fn broken(error: io::Error) -> io::Error {
    io::Error::other(format!("it is no whole tar file ({error})"))
}

fn cut_off() -> io::Error {
    io::Error::other("it is cut off: it has no end; copy it again")
}

fn samples(file: &File) -> io::Result<(Vec<Entry>, Option<Vec<usize>>)> {
    let (mut entries, mut labels, mut unlabelled) = (Vec::new(), Vec::new(), false);
    let members = members(file)?;
    for sample in members.chunk_by(|a, b| a.key == b.key) {
        let last = |m: &&Member| is_image_name(m.extension.rsplit('.').next().unwrap_or_default());
        let Some(image) = sample.iter().find(last) else { continue };
        let len = u32::try_from(image.len).map_err(|_| io::Error::other(format!("{} is too large", image.key)))?;
        entries.push(Entry { name: format!("{}.{}", image.key, image.extension).into(), at: image.at, len });
        match sample.iter().find(|m| m.extension == "cls").map(|m| number(file, m)) {
            Some(Ok(Some(label))) => labels.push(label),
            Some(Err(error)) => return Err(error),
            Some(Ok(None)) | None => unlabelled = true,
        }
    }
    Ok((entries, (!unlabelled).then_some(labels)))
}

/// A member's text as a number.
fn number(mut file: &File, member: &Member) -> io::Result<Option<usize>> {
    let mut text = vec![0; member.len.min(32) as usize];
    file.seek(SeekFrom::Start(member.at))?;
    file.read_exact(&mut text)?;
    let number = std::str::from_utf8(&text).ok().and_then(|text| text.trim().parse().ok());
    Ok(number.filter(|class| *class < MOST_CLASSES))
}

/// What a tar file holds: one unit.
pub(super) fn index(path: &Path) -> io::Result<Indexed> {
    let (entries, labels) = samples(&File::open(path)?)?;
    Ok(Indexed {
        units: vec![Unit { path: path.to_owned(), group: None, images: entries.len(), remote: None }],
        labels,
    })
}

/// Opens it.
pub(super) fn open(path: &Path) -> io::Result<Open> {
    let file = File::open(path)?;
    let (entries, _) = samples(&file)?;
    Ok(Open { file, entries })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_beyond_the_file_is_refused_however_large() {
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
