//! `--html FILE` of `byol duplicates`, `outliers` and `select`: the images of the results in one
//! self-contained HTML file.

use std::path::{Path, PathBuf};

use byol::apply::{
    chart::escape_html,
    row_images::RowImages,
    sheet::{self, Tile},
};
use rayon::prelude::*;

use super::{must_be_new, report::picture, write_file};
use crate::terminal::{self, Result, plural};

/// Flags of a command that can write a gallery.
#[derive(Debug, clap::Args)]
pub struct GalleryArgs {
    /// Also write the images of the results to an HTML file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Overwrite the file of `--html` if it exists
    #[arg(long, requires = "html")]
    overwrite: bool,
}

/// Images that belong together, such as a group of near-duplicates.
pub struct Group<'a> {
    /// Images, as the row of their source.
    pub images: Vec<(&'a RowImages, usize)>,
    /// Text below them.
    pub caption: String,
}

impl Group<'_> {
    /// A single image.
    pub fn single(images: &RowImages, row: usize, caption: String) -> Group<'_> {
        Group { images: vec![(images, row)], caption }
    }
}

/// Side of a picture in pixels.
const SIDE: u32 = 160;

/// Maximum number of pictures on a page, which keeps it below about 40 MB.
const MAX_PICTURES: usize = 1000;

const STYLE: &str = include_str!("report.css");

impl GalleryArgs {
    /// Checks the output file, before anything is computed.
    pub fn check(&self) -> Result<()> {
        let Some(file) = &self.html else { return Ok(()) };
        if file.extension().is_none_or(|e| !e.eq_ignore_ascii_case("html")) {
            return Err(format!("unsupported output file {}\nhint: use the extension `.html`", file.display()).into());
        }
        must_be_new(file, self.overwrite)
    }

    /// Writes the gallery, if it was requested. `summary` is the sentence below the title.
    pub fn write(&self, title: &str, summary: &str, groups: &[Group]) -> Result<()> {
        let Some(file) = &self.html else { return Ok(()) };
        let mut pictures = 0;
        let shown = groups.iter().take_while(|group| {
            pictures += group.images.len();
            pictures <= MAX_PICTURES
        });
        let shown = shown.count();
        let bodies: Vec<String> = groups[..shown].par_iter().map(figure).collect();
        let rest = match groups.len() - shown {
            0 => String::new(),
            _ => format!(" The first {shown} of {} are shown.", groups.len()),
        };
        let (title, summary) = (escape_html(title), escape_html(summary));
        let html = format!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width\"><title>byol: {title}</title>\
             <style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{summary}.{rest}</p>\n\
             <div class=\"gallery\">\n{}</div>\n</body></html>\n",
            bodies.concat()
        );
        write_file(file, html.as_bytes())?;
        terminal::note(format!("wrote {} ({})", file.display(), plural(pictures_of(&groups[..shown]), "picture")));
        Ok(())
    }
}

fn pictures_of(groups: &[Group]) -> usize {
    groups.iter().map(|group| group.images.len()).sum()
}

/// The images of a group side by side, their paths and the caption.
fn figure(group: &Group) -> String {
    let mut html = "<figure>".to_owned();
    for (images, row) in &group.images {
        let path = &images.paths()[*row];
        html += &match images.get(*row) {
            Ok(image) => picture(path, &sheet::png(&[vec![Tile::image(&image, SIDE)]], SIDE)),
            Err(_) => "<span class=\"missing\">cannot be read</span>\n".into(),
        };
    }
    let paths = group.images.iter().map(|(images, row)| escape_html(&relative(images, *row)));
    let lines: Vec<String> = paths.chain([escape_html(&group.caption)]).filter(|line| !line.is_empty()).collect();
    html + &format!("<figcaption class=\"dim\">{}</figcaption></figure>\n", lines.join("<br>"))
}

/// Path of an image, relative to its data set if it is inside.
fn relative(images: &RowImages, row: usize) -> String {
    let path = &images.paths()[row];
    let inside = images.root().and_then(|root| Path::new(path).strip_prefix(root).ok());
    inside.map_or_else(|| path.clone(), |inside| inside.display().to_string())
}
