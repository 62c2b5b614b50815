//! Which demuxer may read a file, told by its first bytes.
//!
//! `ffmpeg` left to itself would believe a crafted file that it is a playlist (HLS, concat, DASH, SDP, image pattern) and
//! open whatever that names. So the demuxer is chosen here, from formats that hold their video themselves, and passed on
//! with `-f`; everything else is refused before any program runs. Names and extensions are never looked at.

/// Bytes that [`demuxer`] wants to see; fewer only when the file is shorter.
pub(crate) const HEAD: usize = 4096;

/// The name of ffmpeg's demuxer for a file that starts with `head`, or why there is none.
pub(crate) fn demuxer(head: &[u8]) -> Result<&'static str, String> {
    if head.is_empty() {
        return Err("the file is empty".into());
    }
    if let Some(reason) = unread_picture(head) {
        return Err(reason);
    }
    if let Some(picture) = still_picture(head) {
        return Err(format!("a still picture ({picture}), not a video: give it as an image or in a list of frames"));
    }
    if let Some(reason) = page_or_drawing(head) {
        return Err(reason);
    }
    if let Some(list) = playlist(head) {
        return Err(format!("{list}, which only names other files: give the file that holds the video itself"));
    }
    if let Some(audio) = audio(head) {
        return Err(format!("an audio file ({audio}): there is no video in it"));
    }
    container(head).ok_or_else(|| unknown(head))
}

/// What is read, for messages.
const KNOWN: &str = "expected a picture (PNG, JPEG, WebP, GIF, BMP, TIFF) or a clip (MP4/MOV, Matroska/WebM, AVI, MPEG-TS, \
                     MPEG-PS, FLV, GIF, Ogg, ASF/WMV)";

/// XML that names no other file and text of web pages, which are what often comes of an address.
fn page_or_drawing(head: &[u8]) -> Option<String> {
    let text = plain_start(head).to_ascii_lowercase();
    let begins = |tags: &[&str]| tags.iter().any(|tag| text.starts_with(tag.as_bytes()));
    let has = |tag: &[u8]| text.windows(tag.len()).any(|window| window == tag);
    let xml = begins(&["<?xml", "<!--", "<!doctype"]);
    if begins(&["<svg"]) || (xml && has(b"<svg")) {
        return Some("a drawing (SVG), not a picture of pixels; convert it to PNG".into());
    }
    if begins(&["<!doctype html", "<html", "<head", "<body"]) || (xml && has(b"<html")) {
        return Some(format!("this is HTML, not a picture or clip: is the address a page's? {}", capital(KNOWN)));
    }
    None
}

/// The reason for a file of no known kind.
fn unknown(head: &[u8]) -> String {
    let what = match () {
        () if at(head, 0, b"%PDF") => "this is a PDF document, not a picture or clip; export its pages as PNG",
        () if at(head, 0, b"PK\x03\x04") => "this is a ZIP archive or a document, not a picture or clip; unpack it",
        () if at(head, 0, b"\x1F\x8B") => "this is compressed (gzip), not a picture or clip; unpack it",
        () if at(head, 0, b"version https://git-lfs") => {
            "this is a pointer of Git LFS, not the file itself; fetch it by git lfs pull"
        }
        () if is_text(head) && plain_start(head).starts_with(b"{") => {
            "this is JSON, not a picture or clip: is it an error of the server that it came from?"
        }
        () if is_text(head) => "this is text, not a picture or clip",
        () => return format!("no picture or clip of a kind that is known: {KNOWN}"),
    };
    let stop = if what.ends_with('?') { " " } else { ". " };
    format!("{what}{stop}{}", capital(KNOWN))
}

fn capital(text: &str) -> String {
    let mut letters = text.chars();
    letters.next().map_or_else(String::new, |first| first.to_ascii_uppercase().to_string() + letters.as_str())
}

/// Without what may stand in front of text.
fn plain_start(head: &[u8]) -> &[u8] {
    head.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(head).trim_ascii_start()
}

fn is_text(head: &[u8]) -> bool {
    let whole = match std::str::from_utf8(head) {
        Ok(_) => true,
        // The head may end inside of a letter.
        Err(error) => error.error_len().is_none() && error.valid_up_to() > 0,
    };
    // One letter is no text yet.
    whole && head.len() > 1 && head.iter().all(|b| (*b >= b' ' && *b != 0x7F) || b"\t\n\r\x0C".contains(b))
}

fn at(head: &[u8], offset: usize, magic: &[u8]) -> bool {
    head.get(offset..).is_some_and(|rest| rest.starts_with(magic))
}

fn container(head: &[u8]) -> Option<&'static str> {
    const MOV_ATOMS: [&[u8; 4]; 10] =
        [b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"styp", b"uuid"];
    const ASF: [u8; 8] = [0x30, 0x26, 0xB2, 0x75, 0x8E, 0x66, 0xCF, 0x11];
    if MOV_ATOMS.iter().any(|atom| at(head, 4, *atom)) {
        return Some("mov");
    }
    if at(head, 0, &[0x1A, 0x45, 0xDF, 0xA3]) {
        return Some("matroska");
    }
    if at(head, 0, b"RIFF") && at(head, 8, b"AVI") {
        return Some("avi");
    }
    if at(head, 0, b"FLV\x01") {
        return Some("flv");
    }
    if at(head, 0, b"GIF87a") || at(head, 0, b"GIF89a") {
        return Some("gif");
    }
    if at(head, 0, b"OggS") {
        return Some("ogg");
    }
    if at(head, 0, &ASF) {
        return Some("asf");
    }
    if at(head, 0, &[0, 0, 1, 0xBA]) {
        return Some("mpeg");
    }
    // A transport stream: sync bytes at packet distance, with four more bytes per packet on Blu-ray (m2ts).
    let synced = |first: usize, packet: usize| {
        (0..5).map(|i| first + i * packet).take_while(|o| *o < head.len()).all(|o| head[o] == 0x47)
            && head.len() > first + packet
    };
    (synced(0, 188) || synced(4, 192)).then_some("mpegts")
}

/// What to do with a picture in a format that is known by name only.
pub(crate) fn unread_picture(head: &[u8]) -> Option<String> {
    const BRANDS: [(&[u8; 4], &str); 10] = [
        (b"avif", "AVIF"),
        (b"avis", "AVIF"),
        (b"heic", "HEIF"),
        (b"heix", "HEIF"),
        (b"heim", "HEIF"),
        (b"heis", "HEIF"),
        (b"hevc", "HEIF"),
        (b"hevx", "HEIF"),
        (b"mif1", "HEIF"),
        (b"msf1", "HEIF"),
    ];
    const MAGICS: [(&[u8], &str); 5] = [
        (b"\xFF\x0A", "JPEG XL"),
        (b"\0\0\0\x0CJXL ", "JPEG XL"),
        (b"\0\0\0\x0CjP  ", "JPEG 2000"),
        (b"\xFF\x4F\xFF\x51", "JPEG 2000"),
        (b"8BPS", "PSD"),
    ];
    let brand = BRANDS.iter().find(|(brand, _)| at(head, 4, b"ftyp") && at(head, 8, *brand)).map(|(_, name)| name);
    let name = brand.or_else(|| MAGICS.iter().find(|(magic, _)| at(head, 0, magic)).map(|(_, name)| name))?;
    Some(format!("a picture in the format {name}, which is not read; convert it to PNG or JPEG"))
}

/// The name of a picture's format that is read.
fn still_picture(head: &[u8]) -> Option<&'static str> {
    if at(head, 0, b"RIFF") && at(head, 8, b"WEBP") {
        return Some("WebP");
    }
    let magics: [(&[u8], &str); 4] =
        [(b"\x89PNG\r\n\x1a\n", "PNG"), (b"\xFF\xD8\xFF", "JPEG"), (b"II*\0", "TIFF"), (b"MM\0*", "TIFF")];
    let found = magics.iter().find(|(magic, _)| at(head, 0, magic)).map(|(_, name)| *name);
    // "BM" alone is too short to tell: the two reserved words of a bitmap are zero.
    found.or_else(|| (at(head, 0, b"BM") && at(head, 6, &[0; 4])).then_some("BMP"))
}

fn playlist(head: &[u8]) -> Option<&'static str> {
    let text = plain_start(head);
    let starts = |magic: &[u8]| text.len() >= magic.len() && text[..magic.len()].eq_ignore_ascii_case(magic);
    if starts(b"#EXTM3U") {
        return Some("an HLS or M3U playlist");
    }
    if starts(b"ffconcat") || starts(b"file ") || starts(b"# ffconcat") {
        return Some("an ffconcat list");
    }
    if starts(b"v=0") {
        return Some("an SDP session");
    }
    if starts(b"<?xml") || starts(b"<MPD") || starts(b"<smil") || starts(b"<asx") {
        return Some("an XML manifest (DASH or alike)");
    }
    if starts(b"[playlist]") || starts(b"[reference]") || starts(b"rtsp") || starts(b"http") {
        return Some("a playlist");
    }
    None
}

fn audio(head: &[u8]) -> Option<&'static str> {
    if at(head, 0, b"RIFF") && at(head, 8, b"WAVE") {
        return Some("WAV");
    }
    let magics: [(&[u8], &str); 5] =
        [(b"ID3", "MP3"), (b"\xFF\xFB", "MP3"), (b"fLaC", "FLAC"), (b"FORM", "AIFF"), (b"#!AMR", "AMR")];
    magics.iter().find(|(magic, _)| at(head, 0, magic)).map(|(_, name)| *name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn containers_are_told_by_content() {
        let mut ts = vec![0; 2000];
        (0..2000).step_by(188).for_each(|i| ts[i] = 0x47);
        let mut m2ts = vec![0; 2000];
        (4..2000).step_by(192).for_each(|i| m2ts[i] = 0x47);
        let cases: [(&[u8], &str); 9] = [
            (b"\0\0\0\x20ftypisom", "mov"),
            (b"\0\0\0\x08wide\0\0\0\0mdat", "mov"),
            (b"\x1A\x45\xDF\xA3", "matroska"),
            (b"RIFF\0\0\0\0AVI LIST", "avi"),
            (b"GIF89a", "gif"),
            (b"OggS", "ogg"),
            (b"\0\0\x01\xBA", "mpeg"),
            (&ts, "mpegts"),
            (&m2ts, "mpegts"),
        ];
        for (head, name) in cases {
            assert_eq!(demuxer(head).as_deref(), Ok(name));
        }
    }

    #[test]
    fn what_names_other_files_is_refused() {
        for head in [
            &b"#EXTM3U\n#EXTINF:1,\n/etc/passwd\n"[..],
            b"\xEF\xBB\xBF\n#EXTM3U",
            b"ffconcat version 1.0\nfile '/etc/passwd'\n",
            b"file '/etc/passwd'\n",
            b"<?xml version=\"1.0\"?><MPD/>",
            b"v=0\no=- 0 0 IN IP4 127.0.0.1\n",
        ] {
            let reason = demuxer(head).unwrap_err();
            assert!(reason.contains("only names other files"), "{reason}");
        }
    }

    #[test]
    fn everything_else_says_what_it_is() {
        for (head, word) in [
            (&b""[..], "empty"),
            (b"\x89PNG\r\n\x1a\n", "a still picture (PNG)"),
            (b"\xFF\xD8\xFF\xE0", "a still picture (JPEG)"),
            (b"\0\0\0\x20ftypavif", "the format AVIF, which is not read; convert"),
            (b"\0\0\0\x20ftypheic", "the format HEIF, which is not read; convert"),
            (b"RIFF\0\0\0\0WEBPVP8 ", "a still picture (WebP)"),
            (b"RIFF\0\0\0\0WAVEfmt ", "an audio file (WAV)"),
            (b"\x7FELF", "of a kind that is known: expected a picture (PNG, JPEG"),
            (b"G", "or a clip (MP4/MOV, Matroska/WebM"),
            (b"<!DOCTYPE html>\n<title>x", "this is HTML, not a picture or clip: is the address a page's? Expected a"),
            (b"\xEF\xBB\xBF\n<HTML lang=en>", "this is HTML"),
            (b"<?xml version='1.0'?>\n<!DOCTYPE html PUBLIC>\n<html>", "this is HTML"),
            (b"<svg xmlns=\"x\">", "a drawing (SVG), not a picture of pixels; convert it to PNG"),
            (b"<?xml version=\"1.0\"?>\n<!-- x -->\n<svg>", "a drawing (SVG)"),
            (b"%PDF-1.7\n%\xE2\xE3", "a PDF document, not a picture or clip; export its pages as PNG. Expected"),
            (b"{\"error\": \"not found\"}", "this is JSON, not a picture or clip: is it an error of the server"),
            ("Caf\u{e9}\n".as_bytes(), "this is text, not a picture or clip. Expected a picture (PNG"),
            (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
            (b"PK\x03\x04\x14", "a ZIP archive"),
        ] {
            let reason = demuxer(head).unwrap_err();
            assert!(reason.contains(word), "{reason}");
        }
    }
}
