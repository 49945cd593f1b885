//! Names of the files of an image that has several, such as one per band of a satellite.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
};

use serde::{Deserialize, Serialize};

/// Placeholder for the part of a name that is the same in all files of an image.
const ID: &str = "{id}";

/// Name of one of the files of an image, with `{id}` for the part that differs between images:
/// `{id}_B02.tif`. May begin with folders: `B02/{id}.tif`, `{id}/{id}_B02.tif`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FilePattern {
    /// Texts before, between and after the placeholders.
    texts: Vec<String>,
}

impl FromStr for FilePattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let texts: Vec<String> = text.split(ID).map(str::to_owned).collect();
        // Of Windows, where `/` separates folders as well.
        let is_portable = !text.contains(['\\', ':']);
        let is_relative = text.split('/').all(|part| !matches!(part, "" | "." | ".."));
        if texts.len() < 2 || !is_relative || !is_portable || texts.iter().all(String::is_empty) {
            return Err(format!(
                "invalid file pattern `{text}` (expected a name with {ID}, such as {ID}_B02.tif or B02/{ID}.tif)"
            ));
        }
        Ok(FilePattern { texts })
    }
}

impl TryFrom<String> for FilePattern {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<FilePattern> for String {
    fn from(pattern: FilePattern) -> String {
        pattern.to_string()
    }
}

impl fmt::Display for FilePattern {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.texts.join(ID))
    }
}

impl FilePattern {
    /// Folder that the pattern is relative to, and the part of the path that stands for `{id}`;
    /// `None` for other paths.
    fn parse<'a>(&self, path: &'a Path) -> Option<(&'a Path, String)> {
        let folder = path.ancestors().nth(1 + self.n_folders())?;
        let parts: Option<Vec<&str>> = path.strip_prefix(folder).ok()?.iter().map(|part| part.to_str()).collect();
        let name = parts?.join("/");
        let fixed: usize = self.texts.iter().map(String::len).sum();
        let length = name.len().checked_sub(fixed)? / (self.texts.len() - 1);
        let start = self.texts[0].len();
        let id = name.get(start..start + length)?;
        (!id.is_empty() && !id.contains('/') && self.texts.join(id) == name).then(|| (folder, id.to_owned()))
    }

    /// Number of folders in the pattern.
    pub(super) fn n_folders(&self) -> usize {
        self.texts.iter().map(|text| text.matches('/').count()).sum()
    }

    /// Position of the pattern of a file: the one with the shortest `{id}`, so that `a_nir.tif` is
    /// not the file `{id}.tif` of another image.
    pub(super) fn position(patterns: &[FilePattern], path: &Path) -> Option<usize> {
        let lengths = patterns.iter().enumerate().filter_map(|(i, pattern)| Some((pattern.id(path)?.len(), i)));
        lengths.min().map(|(_, i)| i)
    }

    /// Part of a path that stands for `{id}`; `None` for other paths.
    pub(super) fn id(&self, path: &Path) -> Option<String> {
        self.parse(path).map(|(_, id)| id)
    }

    /// Path of the file of pattern `other` that belongs to the same image as `path`, which has this
    /// pattern.
    pub(crate) fn sibling(&self, path: &Path, other: &FilePattern) -> Option<PathBuf> {
        let (folder, id) = self.parse(path)?;
        Some(folder.join(other.texts.join(&id)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pattern(text: &str) -> FilePattern {
        text.parse().unwrap()
    }

    #[test]
    fn files_of_an_image_share_their_id() {
        for (first, second, path, sibling) in [
            ("{id}_B02.tif", "{id}_B03.tif", "tiles/forest/a_B02.tif", Some("tiles/forest/a_B03.tif")),
            ("B02/{id}.tif", "B03/{id}.tif", "tiles/B02/a.tif", Some("tiles/B03/a.tif")),
            ("{id}/red.png", "{id}/nir/band.png", "tiles/a/red.png", Some("tiles/a/nir/band.png")),
            ("{id}/{id}_1.png", "{id}/{id}_2.png", "tiles/ab/ab_1.png", Some("tiles/ab/ab_2.png")),
            ("{id}/{id}_1.png", "{id}/{id}_2.png", "tiles/ab/ac_1.png", None),
            ("{id}_B02.tif", "{id}_B03.tif", "tiles/a_B03.tif", None),
            ("{id}_B02.tif", "{id}_B03.tif", "tiles/_B02.tif", None),
            ("B02/{id}.tif", "B03/{id}.tif", "tiles/B04/a.tif", None),
            ("B02/{id}.tif", "B03/{id}.tif", "a.tif", None),
        ] {
            let found = pattern(first).sibling(Path::new(path), &pattern(second));
            assert_eq!(found.as_deref(), sibling.map(Path::new), "{first} {path}");
        }
    }

    #[test]
    fn a_file_has_the_pattern_with_the_shortest_id() {
        for texts in [["{id}.tif", "{id}_nir.tif"], ["{id}_nir.tif", "{id}.tif"]] {
            let patterns = texts.map(pattern);
            let of = |path: &str| FilePattern::position(&patterns, Path::new(path)).map(|i| texts[i]);
            assert_eq!([of("a.tif"), of("a_nir.tif"), of("a.png")], [Some("{id}.tif"), Some("{id}_nir.tif"), None]);
        }
    }

    #[test]
    fn patterns_need_an_id_and_stay_in_their_folder() {
        for text in ["", "{id}", "B02.tif", "/a/{id}.tif", "../{id}.tif", "a//{id}.tif", "B02\\{id}.tif", "C:/{id}.tif"]
        {
            assert!(text.parse::<FilePattern>().is_err(), "{text}");
        }
        assert_eq!(pattern("B02/{id}.tif").to_string(), "B02/{id}.tif");
    }
}
