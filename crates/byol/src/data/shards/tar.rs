//! Tar files in WebDataset's layout: the members of a sample are consecutive and share their name
//! up to the first dot. Files whose names merely contain dots are samples of their own
//! ([`is_several`]).

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io::{self, Read, Seek, SeekFrom},
    path::Path,
};

use super::{Content, Entry, MAX_CLASSES, Notes, OpenUnit, ShardIndex, Unit, damaged};
use crate::data::folder::is_image_extension;

/// Extensions of images in formats that are not read.
const UNREAD: [&str; 24] = [
    "heic", "heif", "avif", "jxl", "jp2", "j2k", "svg", "psd", "tga", "ppm", "pgm", "pbm", "pnm", "exr", "hdr", "dcm",
    "dng", "cr2", "cr3", "nef", "arw", "raf", "orf", "rw2",
];

/// Size of the end-of-archive marker: two empty blocks.
const END: u64 = 1024;

/// Member of a tar file.
#[derive(Debug)]
struct Member {
    /// Path in the archive.
    path: Vec<u8>,
    /// Position of the first dot of the file name; the end of the path without one.
    first_dot: usize,
    /// Position of the last dot of the file name; the end of the path without one.
    last_dot: usize,
    offset: u64,
    len: u64,
}

impl Member {
    fn new(path: Vec<u8>, offset: u64, len: u64) -> Member {
        let name = file_name_start(&path);
        let first_dot = path[name..].iter().position(|b| *b == b'.').map_or(path.len(), |dot| name + dot);
        let last_dot = path[name..].iter().rposition(|b| *b == b'.').map_or(path.len(), |dot| name + dot);
        Member { path, first_dot, last_dot, offset, len }
    }

    /// Path up to the first dot of the file name, which WebDataset's samples share.
    fn key(&self) -> &[u8] {
        &self.path[..self.first_dot]
    }

    /// Path up to the last dot of the file name.
    fn stem(&self) -> &[u8] {
        &self.path[..self.last_dot]
    }

    /// Part of the file name between its first and its last dot: a field of a sample, or a part of
    /// its name. Empty in `NAME.jpg`.
    fn field(&self) -> &[u8] {
        self.path.get(self.first_dot + 1..self.last_dot).unwrap_or_default()
    }

    /// True if [`Member::field`] can be the name of a field: letters, digits, `_` and `-` after a
    /// letter.
    fn has_word_field(&self) -> bool {
        let is_word = |b: &u8| b.is_ascii_alphanumeric() || [b'_', b'-'].contains(b);
        self.field().first().is_some_and(u8::is_ascii_alphabetic) && self.field().iter().all(is_word)
    }

    /// Text after the last dot of the file name, in lower case.
    fn extension(&self) -> String {
        let extension = self.path.get(self.last_dot + 1..).unwrap_or_default();
        String::from_utf8_lossy(extension).to_ascii_lowercase()
    }

    fn is_image(&self) -> bool {
        is_image_extension(&self.extension())
    }

    /// Path with the extension in lower case.
    fn name(&self) -> String {
        match self.extension().as_str() {
            "" => String::from_utf8_lossy(&self.path).into_owned(),
            extension => format!("{}.{extension}", String::from_utf8_lossy(self.stem())),
        }
    }

    /// Kind of file in its sample, such as `NAME.mask.png`.
    fn pattern(&self) -> String {
        match (self.field(), self.has_word_field()) {
            ([], _) => format!("NAME.{}", self.extension()),
            (field, true) => format!("NAME.{}.{}", String::from_utf8_lossy(field), self.extension()),
            (_, false) => format!("NAME.*.{}", self.extension()),
        }
    }
}

fn file_name_start(path: &[u8]) -> usize {
    path.iter().rposition(|b| *b == b'/').map_or(0, |slash| slash + 1)
}

/// True for the attributes that macOS stores beside each file.
fn is_apple_double(path: &[u8]) -> bool {
    path[file_name_start(path)..].starts_with(b"._") || path.split(|b| *b == b'/').any(|part| part == b"__MACOSX")
}

/// True if the name of the file or of a folder starts with a dot.
fn is_hidden(path: &[u8]) -> bool {
    path.split(|b| *b == b'/').any(|part| part.starts_with(b".") && part != b"." && part != b"..")
}

/// Lists the members of a tar file, in order.
///
/// # Errors
/// A damaged or truncated file.
fn members(file: &File, notes: &mut Notes) -> io::Result<Vec<Member>> {
    let length = file.metadata()?.len();
    let mut members = Vec::new();
    let mut end = 0;
    // The marker of the end is followed by more members in archives that were appended to others.
    let mut archive = ::tar::Archive::new(file);
    archive.set_ignore_zeros(true);
    for entry in archive.entries_with_seek().map_err(broken)? {
        let entry = match entry {
            Ok(entry) => entry,
            Err(error) => {
                if is_end_marker(file, end, length)? {
                    notes.add("data after the end of the archive", "not part of a tar file", String::new());
                    break;
                }
                return Err(if end == 0 { compressed(file)?.unwrap_or(broken(error)) } else { broken(error) });
            }
        };
        let (offset, len) = (entry.raw_file_position(), entry.size());
        // Written so that no value in a header can overflow.
        if offset > length || len > length - offset {
            return Err(truncated());
        }
        end = offset + len.next_multiple_of(512);
        let member = Member::new(entry.path_bytes().into_owned(), offset, len);
        let kind = entry.header().entry_type();
        if kind.is_dir() || is_apple_double(&member.path) {
            continue;
        }
        if !kind.is_file() && !kind.is_contiguous() {
            if member.is_image() {
                notes.add("images that are links or sparse", "only plain files are read", member.name());
            }
        } else if is_hidden(&member.path) {
            if member.is_image() {
                notes.add("hidden images", "their names start with a dot", member.name());
            }
        } else {
            members.push(member);
        }
    }
    if length < end + END {
        return Err(truncated());
    }
    Ok(members)
}

/// True if the marker of the end of the archive is at this position.
fn is_end_marker(mut file: &File, at: u64, length: u64) -> io::Result<bool> {
    if at == 0 || length < at + END {
        return Ok(false);
    }
    let mut marker = [0; END as usize];
    file.seek(SeekFrom::Start(at))?;
    file.read_exact(&mut marker)?;
    Ok(marker.iter().all(|b| *b == 0))
}

/// Error for a file whose first bytes are those of a compressed file.
fn compressed(mut file: &File) -> io::Result<Option<io::Error>> {
    const FORMATS: [(&[u8], &str); 5] = [
        (b"\x1f\x8b", "gzip"),
        (b"\x28\xb5\x2f\xfd", "Zstandard"),
        (b"BZh", "bzip2"),
        (b"\xfd7zXZ", "xz"),
        (b"PK", "ZIP"),
    ];
    let mut head = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.take(8).read_to_end(&mut head)?;
    let format = FORMATS.iter().find(|(magic, _)| head.starts_with(magic));
    Ok(format.map(|(_, name)| damaged(format!("it is compressed ({name})\nhint: unpack it"))))
}

/// Error of the tar library; those of the machine keep their kind.
fn broken(error: io::Error) -> io::Error {
    use io::ErrorKind::{InvalidData, InvalidInput, Other, UnexpectedEof};
    match error.kind() {
        InvalidData | InvalidInput | Other | UnexpectedEof => damaged(format!("not a complete tar file ({error})")),
        _ => error,
    }
}

fn truncated() -> io::Error {
    damaged("the file is truncated\nhint: copy it again")
}

/// Images of a tar file, with the class of each.
#[derive(Debug, Default)]
struct Samples {
    entries: Vec<Entry>,
    labels: Vec<Option<usize>>,
    notes: Notes,
}

/// Reads the location of each image, and its class.
fn samples(file: &File) -> io::Result<Samples> {
    let mut samples = Samples::default();
    let members = members(file, &mut samples.notes)?;
    let groups: Vec<&[Member]> = members.chunk_by(|a, b| a.key() == b.key()).collect();
    let are_fields = are_words_fields(&groups);
    let mut parts: Vec<Vec<&Member>> = Vec::new();
    for group in groups {
        if !is_several(group, are_fields) {
            parts.push(group.iter().collect());
            continue;
        }
        let mut sample_by_stem = HashMap::new();
        for member in group {
            let part = *sample_by_stem.entry(member.stem()).or_insert_with(|| {
                parts.push(Vec::new());
                parts.len() - 1
            });
            parts[part].push(member);
        }
    }
    let (with_image, without): (Vec<_>, Vec<_>) = parts.into_iter().partition(|part| part.iter().any(|m| m.is_image()));
    // Classes of samples whose members are not consecutive.
    let mut apart: HashMap<&[u8], &Member> = HashMap::new();
    for part in &without {
        apart.extend(part.iter().filter(|m| m.extension() == "cls").map(|m| (m.stem(), *m)));
    }
    for part in &with_image {
        let image = choose(part, &mut samples.notes);
        let len = u32::try_from(image.len).map_err(|_| damaged(format!("{} is too large", image.name())))?;
        let content = Content::Span { offset: image.offset, len };
        samples.entries.push(Entry { name: image.name().into(), content });
        let is_class = |m: &&&Member| m.extension() == "cls" && (m.field().is_empty() || m.stem() == image.stem());
        let class = part.iter().find(is_class).copied();
        let class = class.or_else(|| apart.remove(image.stem()).or_else(|| apart.remove(image.key())));
        let label = class.map(|class| parse_class(file, class)).transpose()?.flatten();
        if let Some(class) = class.filter(|_| label.is_none()) {
            samples.notes.add(class.pattern(), "not a class number from 0 to 65535", class.name());
        }
        samples.labels.push(label);
    }
    for part in &without {
        match part.iter().find(|m| UNREAD.contains(&m.extension().as_str())) {
            Some(image) => samples.notes.add(image.pattern(), "this format is not read", image.name()),
            // All classes of images have been removed from `apart`.
            None if part.iter().all(|m| m.extension() == "cls" && !apart.contains_key(m.stem())) => {}
            None => samples.notes.add("samples without an image", "only images are used", part[0].name()),
        }
    }
    Ok(samples)
}

/// True if the words between the first and the last dot of images' names are fields, as in
/// `000.left.jpg` and `000.right.jpg`: they recur, so there are at most as many as samples.
fn are_words_fields(groups: &[&[Member]]) -> bool {
    let (mut words, mut n_groups) = (HashSet::new(), 0);
    for group in groups {
        let images = || group.iter().filter(|m| m.is_image());
        if images().any(|m| Some(m.stem()) != images().next().map(Member::stem)) {
            n_groups += 1;
            words.extend(images().filter(|m| m.has_word_field()).map(Member::field));
        }
    }
    words.len() <= n_groups
}

/// True if members that share their name up to the first dot are several samples, each with the
/// name up to its last dot.
///
/// They are one sample in WebDataset's layout: with a file `KEY.cls`, `KEY.json` or the like, or if
/// the images are told apart by names of fields. `img_0.5_scale.1.jpg` and `img_0.5_scale.2.jpg`
/// are two images.
fn is_several(group: &[Member], are_words_fields: bool) -> bool {
    let images = || group.iter().filter(|m| m.is_image());
    if images().all(|m| Some(m.stem()) == images().next().map(Member::stem)) {
        return false;
    }
    let classes = || group.iter().filter(|m| m.extension() == "cls");
    let stems: HashSet<&[u8]> = images().map(Member::stem).collect();
    if classes().all(|m| !m.field().is_empty()) && classes().any(|m| stems.contains(m.stem())) {
        return true;
    }
    if group.iter().any(|m| !m.is_image() && m.field().is_empty()) {
        return false;
    }
    let is_main = |m: &Member| [&b""[..], b"image", b"img"].contains(&m.field());
    let are_words = images().all(|m| m.field().is_empty() || m.has_word_field());
    !are_words || !(are_words_fields || images().any(is_main))
}

/// Chooses the image of a sample: `NAME.image.*`, `NAME.img.*`, `NAME.*`, or the first. Counts the
/// others.
fn choose<'a>(sample: &[&'a Member], notes: &mut Notes) -> &'a Member {
    let rank = |m: &Member| match m.field() {
        b"image" => 0,
        b"img" => 1,
        b"" => 2,
        _ => 3,
    };
    let images: Vec<&Member> = sample.iter().copied().filter(|m| m.is_image()).collect();
    let chosen = *images.iter().min_by_key(|m| (rank(m), m.len == 0)).expect("a sample with an image");
    for other in images.into_iter().filter(|m| m.offset != chosen.offset) {
        let reason = format!("second images of samples; {} is used", chosen.pattern());
        notes.add(other.pattern(), &reason, other.name());
    }
    chosen
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
pub(super) fn index(path: &Path) -> io::Result<ShardIndex> {
    let Samples { entries, labels, notes } = samples(&File::open(path)?)?;
    let units = vec![Unit { path: path.to_owned(), group: None, column: 0, images: entries.len(), remote: None }];
    Ok(ShardIndex { units, labels, names: Vec::new(), notes })
}

/// Opens a tar file.
pub(super) fn open(path: &Path) -> io::Result<OpenUnit> {
    let file = File::open(path)?;
    let entries = samples(&file)?.entries;
    Ok(OpenUnit { file, entries })
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::data::Dataset;

    /// Writes a tar file; images are those of [`png`], other files contain their text.
    fn write_tar(folder: &Path, members: &[(&[u8], &[u8])]) -> PathBuf {
        let path = folder.join("a.tar");
        let mut tar = ::tar::Builder::new(File::create(&path).unwrap());
        for (name, bytes) in members {
            let mut header = ::tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name);
            header.set_size(bytes.len() as u64);
            header.set_cksum();
            tar.append(&header, *bytes).unwrap();
        }
        tar.finish().unwrap();
        path
    }

    /// Names of the images, with their classes, and what is not used.
    fn read(names: &[&str]) -> (Vec<(String, Option<usize>)>, Vec<String>) {
        let folder = tempfile::tempdir().unwrap();
        let class = |name: &&str| if name.ends_with(".cls") { b"7".to_vec() } else { b"bytes".to_vec() };
        let contents: Vec<Vec<u8>> = names.iter().map(class).collect();
        let members: Vec<(&[u8], &[u8])> = names.iter().zip(&contents).map(|(n, c)| (n.as_bytes(), &c[..])).collect();
        let path = write_tar(folder.path(), &members);
        let Samples { entries, labels, notes } = samples(&File::open(path).unwrap()).unwrap();
        let images = entries.iter().map(|e| e.name.to_string()).zip(labels).collect();
        (images, notes.into_unused().iter().map(|unused| unused.to_string()).collect())
    }

    fn images(names: &[&str]) -> Vec<String> {
        read(names).0.into_iter().map(|(name, _)| name).collect()
    }

    #[test]
    fn names_with_dots_are_images_of_their_own() {
        for names in [
            &["2023.05.01-0.jpg", "2023.05.01-1.jpg", "2023.05.02-2.jpg"][..],
            &["img_0.5_scale.1.jpg", "img_0.5_scale.2.jpg", "img_1.5_scale.1.jpg", "img_1.5_scale.2.jpg"],
            &["cat.0.jpg", "cat.1.jpg", "dog.0.jpg", "dog.1.jpg"],
            &["trip.beach.jpg", "trip.forest.jpg", "trip.lake.png"],
            &["a/v1.0/x.jpg", "a/v1.0/y.jpg", "b.2/x.jpg"],
        ] {
            assert_eq!(images(names), names);
        }
        // Classes beside the complete names.
        let (labeled, unused) = read(&["b.1.cls", "b.1.jpg", "b.2.cls", "b.2.jpg", "c.x.jpg", "c.x.cls", "c.y.jpg"]);
        let expected = [("b.1.jpg", Some(7)), ("b.2.jpg", Some(7)), ("c.x.jpg", Some(7)), ("c.y.jpg", None)];
        assert_eq!(labeled, expected.map(|(name, class)| (name.to_owned(), class)));
        assert!(unused.is_empty(), "{unused:?}");
    }

    #[test]
    fn samples_of_several_files_have_one_image() {
        for (names, expected) in [
            (&["0.input.jpg", "0.cls", "1.input.jpg", "1.cls"][..], &["0.input.jpg", "1.input.jpg"][..]),
            (&["0.0.jpg", "0.1.jpg", "0.json", "1.0.jpg", "1.1.jpg", "1.txt"], &["0.0.jpg", "1.0.jpg"]),
            (
                &["0.left.jpg", "0.right.jpg", "1.left.jpg", "1.right.jpg", "2.left.jpg"],
                &["0.left.jpg", "1.left.jpg", "2.left.jpg"],
            ),
            (&["0.mask.png", "0.JPG", "1.mask.png", "1.JPG"], &["0.jpg", "1.jpg"]),
            (&["0.depth.png", "0.image.jpg", "0.jpg"], &["0.image.jpg"]),
            (&["0.img.png", "0.png"], &["0.img.png"]),
        ] {
            assert_eq!(images(names), expected);
        }
        let (_, unused) = read(&["0.mask.png", "0.jpg", "1.jpg", "1.mask.png"]);
        assert_eq!(unused, ["NAME.mask.png (2): second images of samples; NAME.jpg is used (first: 0.mask.png)"]);
    }

    #[test]
    fn ignores_macos_resource_forks() {
        let names =
            ["./._0.cls", "./0.cls", "./._0.jpg", "./0.jpg", "__MACOSX/0.jpg", "./1.cls", "./._1.jpg", "./1.jpg"];
        let (labeled, unused) = read(&names);
        assert_eq!(labeled, [("./0.jpg".to_owned(), Some(7)), ("./1.jpg".to_owned(), Some(7))]);
        assert!(unused.is_empty(), "{unused:?}");
    }

    #[test]
    fn files_that_are_not_used_are_counted() {
        let (labeled, unused) =
            read(&["0.jpg", "1.jpg", "0.cls", ".h.jpg", ".DS_Store", "2.heic", "3.heic", "3.json", "4.txt", "5.jpg"]);
        // The class of a sample whose files are not consecutive is found.
        let expected = [("0.jpg", Some(7)), ("1.jpg", None), ("5.jpg", None)];
        assert_eq!(labeled, expected.map(|(name, class)| (name.to_owned(), class)));
        assert_eq!(
            unused,
            [
                "hidden images (1): their names start with a dot (first: .h.jpg)",
                "NAME.heic (2): this format is not read (first: 2.heic)",
                "samples without an image (1): only images are used (first: 4.txt)",
            ]
        );
    }

    #[test]
    fn names_that_are_not_utf8_stay_apart() {
        let folder = tempfile::tempdir().unwrap();
        let path = write_tar(folder.path(), &[(b"\xfe.jpg", b"a"), (b"\xff.jpg", b"b"), (b"c.jpg", b"c")]);
        let data = Dataset::open(path).unwrap();
        assert_eq!((data.train.len(), data.train.name(1)), (3, "a.tar/\u{fffd}.jpg".into()));
    }

    #[test]
    fn archives_appended_to_others_are_read_and_compressed_ones_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = write_tar(folder.path(), &[(b"a.jpg", b"a")]);
        let first = std::fs::read(&path).unwrap();
        write_tar(folder.path(), &[(b"b.jpg", b"b")]);
        let second = std::fs::read(&path).unwrap();
        std::fs::write(&path, [&first[..], &second].concat()).unwrap();
        assert_eq!(Dataset::open(&path).unwrap().train.len(), 2);
        std::fs::write(&path, [&first[..], &[1; 700]].concat()).unwrap();
        let data = Dataset::open(&path).unwrap();
        assert_eq!((data.train.len(), data.unused.len()), (1, 1));
        std::fs::write(&path, b"\x1f\x8b\x08\0 and more, but no tar file").unwrap();
        assert!(index(&path).err().unwrap().to_string().contains("gzip"));
    }

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
