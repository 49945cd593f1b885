//! `--html FILE` of `byol duplicates`, `outliers` and `select`: the images of the results in one
//! self-contained HTML file.

use std::path::{Path, PathBuf};

use byol::apply::{
    chart::escape_html,
    row_images::RowImages,
    sheet::{self, Tile},
};
use rayon::prelude::*;

use super::{report::picture, write_file};
use crate::terminal::{self, Result, plural};

/// Flags of a command that can write a gallery.
#[derive(Debug, clap::Args)]
pub struct GalleryArgs {
    /// Also write the images of the results to an HTML file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Overwrite the HTML file if it exists
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
        if file.exists() && !self.overwrite {
            let hint = "choose another `--html`, or pass `--overwrite`";
            return Err(format!("{} already exists\nhint: {hint}", file.display()).into());
        }
        Ok(())
    }

    /// Writes the gallery, if it was requested. `summary` is the sentence below the title.
    pub fn write<'a>(&self, title: &str, summary: &str, groups: impl FnOnce() -> Vec<Group<'a>>) -> Result<()> {
        let Some(file) = &self.html else { return Ok(()) };
        let mut groups = groups();
        let all = groups.len();
        let mut pictures = 0;
        groups.retain_mut(|group| {
            group.images.truncate(MAX_PICTURES - pictures);
            pictures += group.images.len();
            !group.images.is_empty()
        });
        let rest = match all - groups.len() {
            0 => String::new(),
            _ => format!(" Only the first {} of {all} groups are shown.", groups.len()),
        };
        if let Some((images, row)) = groups.first().and_then(|group| group.images.first()) {
            // Opens packed data once, rather than on several threads.
            let _ = images.get(*row);
        }
        let figures: Vec<(String, usize)> = groups.par_iter().map(figure).collect();
        let unreadable: usize = figures.iter().map(|(_, unreadable)| unreadable).sum();
        let figures: String = figures.into_iter().map(|(html, _)| html).collect();
        let (title, summary) = (escape_html(title), escape_html(summary));
        let html = format!(
            "<!doctype html><html lang=\"en\"><head><meta charset=\"utf-8\">\
             <meta name=\"viewport\" content=\"width=device-width\"><title>byol: {title}</title>\
             <style>{STYLE}</style></head><body>\n<h1>{title}</h1>\n<p>{summary}.{rest}</p>\n\
             <div class=\"gallery\">\n{figures}</div>\n</body></html>\n"
        );
        write_file(file, html.as_bytes())?;
        if unreadable > 0 {
            terminal::warning(format!(
                "{unreadable} of {} cannot be read\n\
                 hint: if the images were moved, pass their new folder with `--data`",
                plural(pictures, "picture")
            ));
        }
        terminal::note(format!("wrote {} ({})", file.display(), plural(pictures, "picture")));
        Ok(())
    }
}

/// The images of a group side by side, their paths and the caption. Also returns the number of
/// images that cannot be read.
fn figure(group: &Group) -> (String, usize) {
    let (mut html, mut unreadable) = ("<figure>".to_owned(), 0);
    for (images, row) in &group.images {
        html += &match images.get(*row) {
            Ok(image) => picture(&relative(images, *row), &sheet::png(&[vec![Tile::image(&image, SIDE)]], SIDE)),
            Err(_) => {
                unreadable += 1;
                "<span class=\"missing\">cannot be read</span>\n".into()
            }
        };
    }
    let paths = group.images.iter().map(|(images, row)| escape_html(&relative(images, *row)));
    let lines: Vec<String> = paths.chain([escape_html(&group.caption)]).filter(|line| !line.is_empty()).collect();
    html += &format!("<figcaption class=\"dim\">{}</figcaption></figure>\n", lines.join("<br>"));
    (html, unreadable)
}

/// Path of an image, relative to its data set if it is inside.
fn relative(images: &RowImages, row: usize) -> String {
    let path = &images.paths()[row];
    let inside = images.root().and_then(|root| Path::new(path).strip_prefix(root).ok());
    inside.map_or_else(|| path.clone(), |inside| inside.display().to_string())
}
