//! Image formats that are not read. They are recognized, so that a message can name them.

/// Name of the format of files with this extension, if it is an image format that is not read.
pub(crate) fn unread_format(extension: &str) -> Option<&'static str> {
    Some(match extension.to_ascii_lowercase().as_str() {
        "heic" | "heif" | "hif" | "heics" | "heifs" => "HEIC",
        "avif" | "avifs" => "AVIF",
        "jxl" => "JPEG XL",
        "jp2" | "j2k" | "j2c" | "jpc" | "jpf" | "jpx" | "jpm" => "JPEG 2000",
        "jls" => "JPEG-LS",
        "jxr" | "wdp" | "hdp" => "JPEG XR",
        "psd" | "psb" => "PSD",
        "xcf" => "XCF",
        "svg" | "svgz" => "SVG",
        "exr" => "OpenEXR",
        "hdr" => "Radiance HDR",
        "dds" => "DDS",
        "qoi" => "QOI",
        "tga" => "TGA",
        "pcx" => "PCX",
        "ico" | "cur" => "ICO",
        "pbm" | "pgm" | "ppm" | "pnm" | "pam" | "pfm" => "Netpbm",
        "fits" | "fit" | "fts" => "FITS",
        "dcm" | "dicom" => "DICOM",
        "bpg" => "BPG",
        "flif" => "FLIF",
        "dng" => "camera raw (DNG)",
        "nef" => "camera raw (NEF)",
        "nrw" => "camera raw (NRW)",
        "cr2" => "camera raw (CR2)",
        "cr3" => "camera raw (CR3)",
        "crw" => "camera raw (CRW)",
        "arw" => "camera raw (ARW)",
        "sr2" => "camera raw (SR2)",
        "srf" => "camera raw (SRF)",
        "orf" => "camera raw (ORF)",
        "rw2" => "camera raw (RW2)",
        "rwl" => "camera raw (RWL)",
        "raw" => "camera raw (RAW)",
        "raf" => "camera raw (RAF)",
        "pef" => "camera raw (PEF)",
        "srw" => "camera raw (SRW)",
        "3fr" => "camera raw (3FR)",
        "fff" => "camera raw (FFF)",
        "iiq" => "camera raw (IIQ)",
        "mef" => "camera raw (MEF)",
        "mos" => "camera raw (MOS)",
        "mrw" => "camera raw (MRW)",
        "erf" => "camera raw (ERF)",
        "dcr" => "camera raw (DCR)",
        "kdc" => "camera raw (KDC)",
        "gpr" => "camera raw (GPR)",
        "x3f" => "camera raw (X3F)",
        _ => return None,
    })
}

/// Name of the format of a file that starts with these bytes, if it is an image format that is not
/// read. 16 bytes recognize most formats, 32 all.
pub(crate) fn unread_content(head: &[u8]) -> Option<&'static str> {
    if let Some(name) = iso_media(head) {
        return Some(name);
    }
    let starts: [(&[u8], &str); 29] = [
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JPEG XL"),
        (b"\xff\x0a", "JPEG XL"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
        (b"\xff\x4f\xff\x51", "JPEG 2000"),
        (b"\xff\xd8\xff\xf7", "JPEG-LS"),
        (b"II\xbc\x01", "JPEG XR"),
        (b"8BPS", "PSD"),
        (b"gimp xcf", "XCF"),
        (b"<svg", "SVG"),
        (b"\x76\x2f\x31\x01", "OpenEXR"),
        (b"#?RADIANCE", "Radiance HDR"),
        (b"#?RGBE", "Radiance HDR"),
        (b"DDS ", "DDS"),
        (b"qoif", "QOI"),
        (b"P5\n", "Netpbm"),
        (b"P6\n", "Netpbm"),
        (b"P7\n", "Netpbm"),
        (b"SIMPLE  =", "FITS"),
        (b"BPG\xfb", "BPG"),
        (b"FLIF", "FLIF"),
        (b"II*\0\x10\0\0\0CR", "camera raw (CR2)"),
        (b"IIRO", "camera raw (ORF)"),
        (b"IIRS", "camera raw (ORF)"),
        (b"MMOR", "camera raw (ORF)"),
        (b"IIU\0", "camera raw (RW2)"),
        (b"FUJIFILMCCD-RAW", "camera raw (RAF)"),
        (b"II\x1a\0\0\0HEAPCCDR", "camera raw (CRW)"),
        (b"\0MRM", "camera raw (MRW)"),
        (b"FOVb", "camera raw (X3F)"),
    ];
    starts.into_iter().find(|(start, _)| head.starts_with(start)).map(|(_, name)| name)
}

/// Name of the format of an ISO media file, by its brands: the main one, and the compatible ones.
fn iso_media(head: &[u8]) -> Option<&'static str> {
    if head.get(4..8)? != b"ftyp" {
        return None;
    }
    let length = u32::from_be_bytes(head[..4].try_into().ok()?) as usize;
    let main = head.get(8..12)?;
    let others = head.get(16..head.len().min(length)).unwrap_or_default().chunks_exact(4);
    let mut is_heif = false;
    for brand in std::iter::once(main).chain(others) {
        match brand {
            b"avif" | b"avis" => return Some("AVIF"),
            b"crx " => return Some("camera raw (CR3)"),
            b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"hevx" => return Some("HEIC"),
            b"jxl " => return Some("JPEG XL"),
            b"mif1" | b"mif2" | b"msf1" | b"miaf" => is_heif = true,
            _ => {}
        }
    }
    is_heif.then_some("HEIC")
}

/// A name with its article.
pub(super) fn with_article(name: &str) -> String {
    let vowel = name.starts_with(['A', 'I', 'O', 'X']) || ["SVG", "FITS"].contains(&name);
    format!("{} {name}", if vowel { "an" } else { "a" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_formats_by_extension() {
        assert_eq!(unread_format("HEIC"), Some("HEIC"));
        assert_eq!(unread_format("nef"), Some("camera raw (NEF)"));
        for extension in ["jpg", "jpeg", "png", "tif", "tiff", "webp", "bmp", "gif", "txt", "", "parquet", "tar"] {
            assert_eq!(unread_format(extension), None, "{extension}");
        }
    }

    #[test]
    fn names_formats_by_their_first_bytes() {
        for (head, name) in [
            (&b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"[..], "HEIC"),
            (b"\0\0\0\x18ftypheic", "HEIC"),
            (b"\0\0\0\x1cftypmif1\0\0\0\0mif1miafMA1B", "HEIC"),
            (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
            (b"\0\0\0\x20ftypavif\0\0\0\0avifmif1", "AVIF"),
            (b"\0\0\0\x18ftypcrx \0\0\0\x01crx isom", "camera raw (CR3)"),
            (b"\0\0\0\x0cJXL \r\n\x87\n\0\0\0\x14", "JPEG XL"),
            (b"\xff\x0a\xfa\x1f", "JPEG XL"),
            (b"\0\0\0\x0cjP  \r\n\x87\n", "JPEG 2000"),
            (b"8BPS\0\x01", "PSD"),
            (b"II*\0\x10\0\0\0CR\x02\0", "camera raw (CR2)"),
        ] {
            assert_eq!(unread_content(head), Some(name), "{}", head.escape_ascii());
        }
        let others = [
            &b"\0\0\0\x18ftypmp42\0\0\0\0isommp42"[..],
            b"\xff\xd8\xff\xe0",
            b"\x89PNG\r\n\x1a\n",
            b"II*\0\x08\0\0\0",
            b"",
        ];
        for head in others {
            assert_eq!(unread_content(head), None, "{}", head.escape_ascii());
        }
    }
}
