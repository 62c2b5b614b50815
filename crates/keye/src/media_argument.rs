//! A picture or clip as it is named on a command line: `[image:|video:]PATH_OR_URL[#OPTION=VALUE&...]`.

use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use keye_media::{ItemOptions, MediaError, MediaItem, MediaKind, Source};
use serde_json::{Map, Number, Value};

/// Why a medium's name was not understood.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ArgumentError {
    /// The file cannot be read, or a data URL is damaged.
    #[error(transparent)]
    Media(#[from] MediaError),
    /// The options behind `#`.
    #[error("{name}: {reason}")]
    Options {
        /// The argument.
        name: String,
        /// Expected and found.
        reason: String,
    },
    /// A URL that does not say what it is.
    #[error("{0}: its name does not tell picture from clip: write image:{0} or video:{0}")]
    Kind(String),
}

/// Reads `[image:|video:]PATH_OR_URL[#OPTION=VALUE&...]`.
///
/// Without a prefix a local file is told by its first bytes: PNG, JPEG, WebP, BMP, TIFF and GIFs of one picture are images, all
/// else is video; a URL is told by its extension. Options are those of [`ItemOptions`]; `t=START,END` stands for `video_start`
/// and `video_end`, in seconds. A file whose own name has a `#` wins over options.
pub fn media_item(text: &str) -> Result<MediaItem, ArgumentError> {
    let (kind, rest) = match (text.strip_prefix("image:"), text.strip_prefix("video:")) {
        _ if Path::new(text).exists() => (None, text),
        (Some(rest), _) => (Some(MediaKind::Image), rest),
        (_, Some(rest)) => (Some(MediaKind::Video), rest),
        _ => (None, text),
    };
    let (name, options) = match rest.rsplit_once('#') {
        Some((name, fragment)) if !Path::new(rest).exists() => {
            let wrong = |reason| ArgumentError::Options { name: text.to_owned(), reason };
            (name, fragment_options(fragment).map_err(wrong)?)
        }
        _ => (rest, ItemOptions::default()),
    };
    let other = |reason: &str| ArgumentError::Options { name: text.to_owned(), reason: reason.to_owned() };
    if name.is_empty() {
        return Err(other("the name of a picture or clip is expected, found nothing"));
    }
    let source = Source::parse(name)?;
    let is_url = |path: &Path| path.to_str().and_then(|path| path.split_once("://")).is_some_and(|(s, _)| is_scheme(s));
    if matches!(&source, Source::Path(path) if is_url(path) && !path.exists()) {
        return Err(other("http, https, file and data are the kinds of URL that are opened"));
    }
    let found = match &source {
        // Reading the escapes of file:// URLs, and telling about them, is the loader's.
        Source::Path(path) if is_escaped(name) && !path.exists() => kind_of_url(name),
        // A file is looked at in any case, so that a missing one is told before a model is loaded.
        source => kind_of(source, name)?,
    };
    let kind = kind.or(found).ok_or_else(|| ArgumentError::Kind(name.to_owned()))?;
    Ok(MediaItem { kind, source, options })
}

/// A file by its name, which is taken as it is, without prefix and options: one that is not UTF-8 too.
pub fn media_file(path: &Path) -> Result<MediaItem, ArgumentError> {
    let source = Source::Path(path.to_owned());
    let name = path.display().to_string();
    let kind = kind_of(&source, &name)?.ok_or(ArgumentError::Kind(name))?;
    Ok(MediaItem { kind, source, options: ItemOptions::default() })
}

/// A `file://` URL with escapes like `%20`.
fn is_escaped(name: &str) -> bool {
    name.get(..7).is_some_and(|head| head.eq_ignore_ascii_case("file://")) && name.contains('%')
}

/// What a source is; `None` when a URL does not tell. A file that cannot be read is an error.
fn kind_of(source: &Source, name: &str) -> Result<Option<MediaKind>, MediaError> {
    let read = |source| MediaError::Read { input: name.to_owned(), source };
    match source {
        Source::Path(path) => {
            if !std::fs::metadata(path).map_err(read)?.is_file() {
                let reason = "not a regular file: a picture or a clip is expected (a pipe can be given as -)".into();
                return Err(MediaError::Unreadable { input: name.to_owned(), reason });
            }
            let file = File::open(path).map_err(read)?;
            sniff(BufReader::new(file)).map(Some).map_err(read)
        }
        Source::Bytes(bytes) => sniff(Cursor::new(bytes)).map(Some).map_err(read),
        Source::Url(url) => Ok(kind_of_url(url)),
        Source::Frames(_) => Ok(Some(MediaKind::Video)),
    }
}

/// `ftp`, `s3`, `rtsp`.
fn is_scheme(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || "+-.".contains(c))
}

/// Image or video by extension.
fn kind_of_url(url: &str) -> Option<MediaKind> {
    const IMAGES: [&str; 7] = ["png", "jpg", "jpeg", "webp", "bmp", "tif", "tiff"];
    const VIDEOS: [&str; 16] = [
        "mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "m2ts", "mpg", "mpeg", "flv", "ogv", "ogg", "wmv", "asf",
        "gif",
    ];
    let path = url.split(['?', '#']).next().unwrap_or_default();
    let extension = path.rsplit('/').next()?.rsplit_once('.')?.1.to_ascii_lowercase();
    match (IMAGES.contains(&&*extension), VIDEOS.contains(&&*extension)) {
        (true, _) => Some(MediaKind::Image),
        (_, true) => Some(MediaKind::Video),
        _ => None,
    }
}

/// Image or video, told by content as [`media_item`] does.
pub fn kind_of_bytes(bytes: &[u8]) -> MediaKind {
    // Reading from memory does not fail.
    sniff(Cursor::new(bytes)).unwrap_or(MediaKind::Video)
}

/// Image or video by content.
fn sniff(mut input: impl Read + Seek) -> std::io::Result<MediaKind> {
    let mut head = Vec::new();
    input.by_ref().take(16).read_to_end(&mut head)?;
    let starts = |magic: &[u8]| head.starts_with(magic);
    if starts(b"GIF87a") || starts(b"GIF89a") {
        // A file that ends early is left to the decoder.
        return Ok(if gif_pictures(input).unwrap_or(0) > 1 { MediaKind::Video } else { MediaKind::Image });
    }
    let still = starts(b"\x89PNG\r\n\x1a\n")
        || starts(b"\xFF\xD8\xFF")
        || (starts(b"RIFF") && head.get(8..12) == Some(b"WEBP"))
        || (starts(b"BM") && head.get(6..10) == Some(&[0; 4]))
        || starts(b"II*\0")
        || starts(b"MM\0*");
    Ok(if still { MediaKind::Image } else { MediaKind::Video })
}

/// Pictures in a GIF, counted up to 2: logical screen, then blocks that are skipped by their lengths.
fn gif_pictures(mut input: impl Read + Seek) -> std::io::Result<usize> {
    fn byte(input: &mut impl Read) -> std::io::Result<u8> {
        let mut byte = [0];
        input.read_exact(&mut byte)?;
        Ok(byte[0])
    }
    fn skip(input: &mut impl Seek, bytes: i64) -> std::io::Result<u64> {
        input.seek(SeekFrom::Current(bytes))
    }
    /// A color table of 2^(n+1) colors follows when the highest bit is set.
    fn table(flags: u8) -> i64 {
        if flags & 0x80 == 0 { 0 } else { 3 << ((flags & 7) + 1) }
    }
    input.seek(SeekFrom::Start(10))?;
    let flags = byte(&mut input)?;
    skip(&mut input, 2 + table(flags))?;
    let mut pictures = 0;
    loop {
        match byte(&mut input)? {
            0x21 => skip(&mut input, 1)?,
            0x2C => {
                pictures += 1;
                if pictures > 1 {
                    return Ok(pictures);
                }
                skip(&mut input, 8)?;
                let flags = byte(&mut input)?;
                skip(&mut input, table(flags) + 1)?
            }
            _ => return Ok(pictures),
        };
        loop {
            match byte(&mut input)? {
                0 => break,
                length => skip(&mut input, i64::from(length))?,
            };
        }
    }
}

/// `fps=1&max_pixels=200704&t=3,8`.
fn fragment_options(fragment: &str) -> Result<ItemOptions, String> {
    let mut map = Map::new();
    for pair in fragment.split('&').filter(|pair| !pair.is_empty()) {
        let Some((key, value)) = pair.split_once('=') else {
            return Err(format!("behind # options are expected, like fps=1&max_pixels=200704; found {pair:?}"));
        };
        let given = if key == "t" { "video_start" } else { key };
        if map.contains_key(given) || (key == "t" && map.contains_key("video_end")) {
            return Err(format!("option {key} is given twice"));
        }
        let wrong = || format!("option {key}: a number is expected, found {value:?}");
        if key == "t" {
            let (start, end) = value.split_once(',').unwrap_or((value, ""));
            for (name, text) in [("video_start", start), ("video_end", end)] {
                if !text.is_empty() {
                    map.insert(name.into(), number(text).ok_or_else(wrong)?);
                }
            }
        } else if key == "exif" {
            let on = match value {
                "1" | "true" => true,
                "0" | "false" => false,
                _ => return Err(format!("option exif: true or false is expected, found {value:?}")),
            };
            map.insert(key.into(), on.into());
        } else {
            map.insert(key.into(), number(value).ok_or_else(wrong)?);
        }
    }
    // One by one: what is wrong with a value does not name its option.
    for (key, value) in &map {
        let alone = Map::from_iter([(key.clone(), value.clone())]);
        options(alone).map_err(|error| format!("option {key}: {error}"))?;
    }
    let options = options(map).map_err(|error| error.to_string())?;
    match (options.video_start, options.video_end) {
        (Some(start), Some(end)) if end < start => {
            Err(format!("the part to look at ends at {end} s, before it starts at {start} s"))
        }
        _ => Ok(options),
    }
}

fn options(map: Map<String, Value>) -> Result<ItemOptions, serde_json::Error> {
    serde_json::from_value(Value::Object(map))
}

fn number(text: &str) -> Option<Value> {
    let whole = text.parse::<u64>().ok().map(Number::from);
    whole.or_else(|| text.parse::<f64>().ok().and_then(Number::from_f64)).map(Value::Number)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sniffed(bytes: &[u8]) -> MediaKind {
        sniff(Cursor::new(bytes)).unwrap()
    }

    /// A GIF of `pictures` pictures of one pixel, with a color table, a comment and an animation block.
    fn gif(pictures: usize) -> Vec<u8> {
        let mut bytes = b"GIF89a\x01\0\x01\0\x80\0\0".to_vec();
        bytes.extend([0; 6]);
        bytes.extend(b"\x21\xFE\x03abc\0");
        for _ in 0..pictures {
            bytes.extend(b"\x21\xF9\x04\0\0\0\0\0");
            bytes.extend(b"\x2C\0\0\0\0\x01\0\x01\0\0\x02\x02\x44\x01\0");
        }
        bytes.push(0x3B);
        bytes
    }

    #[test]
    fn content_tells_pictures_from_clips() {
        for head in
            [&b"\x89PNG\r\n\x1a\n"[..], b"\xFF\xD8\xFF\xE0", b"RIFF\0\0\0\0WEBPVP8 ", b"BM\0\0\0\0\0\0\0\0", b"II*\0"]
        {
            assert_eq!(sniffed(head), MediaKind::Image, "{head:?}");
        }
        for head in [&b"\0\0\0\x20ftypisom"[..], b"RIFF\0\0\0\0AVI LIST", b"", b"BMabcdefghij"] {
            assert_eq!(sniffed(head), MediaKind::Video, "{head:?}");
        }
        assert_eq!(sniffed(&gif(1)), MediaKind::Image);
        assert_eq!(sniffed(&gif(2)), MediaKind::Video);
        assert_eq!(sniffed(&gif(2)[..30]), MediaKind::Image, "one that is cut is left to the decoder");
    }

    #[test]
    fn urls_are_told_by_extension_or_prefix() {
        let kind = |text: &str| media_item(text).map(|item| (item.kind, item.source));
        let url = |text: &str| Source::Url(text.into());
        assert_eq!(kind("https://x/a.PNG?y=1.mp4").unwrap(), (MediaKind::Image, url("https://x/a.PNG?y=1.mp4")));
        assert_eq!(kind("https://x/a.mp4").unwrap(), (MediaKind::Video, url("https://x/a.mp4")));
        assert_eq!(kind("image:https://x/watch").unwrap(), (MediaKind::Image, url("https://x/watch")));
        let error = kind("https://x/watch").unwrap_err().to_string();
        assert!(error.contains("video:https://x/watch"), "{error}");
    }

    #[test]
    fn fragments_are_options() {
        let item = media_item("https://x/a.mp4#fps=0.5&max_pixels=200704&t=3,8.5").unwrap();
        assert_eq!(item.source, Source::Url("https://x/a.mp4".into()));
        let expected = ItemOptions {
            fps: Some(0.5),
            max_pixels: Some(200_704),
            video_start: Some(3.0),
            video_end: Some(8.5),
            ..ItemOptions::default()
        };
        assert_eq!(item.options, expected);
        assert_eq!(media_item("https://x/a.png#exif=1").unwrap().options.exif, Some(true));
        assert_eq!(media_item("https://x/a.mp4#t=,8").unwrap().options.video_end, Some(8.0));
        for (fragment, named) in [
            ("fps=1&fps=2", "twice"),
            ("t=,8&t=1,2", "twice"),
            ("fsp=1", "fsp"),
            ("fps=fast", "fps"),
            ("fps", "fps"),
            ("max_pixels=1.5", "option max_pixels: "),
            ("fps=1&max_pixels=1e5", "option max_pixels: "),
            ("t=3,8&min_frames=-1", "option min_frames: "),
            ("t=8,3.5", "ends at 3.5 s, before it starts at 8 s"),
            ("video_start=8&video_end=3.5", "ends at 3.5 s, before it starts at 8 s"),
        ] {
            let error = media_item(&format!("https://x/a.mp4#{fragment}")).unwrap_err().to_string();
            assert!(error.starts_with("https://x/a.mp4#") && error.contains(named), "{error}");
        }
    }

    /// The loader knows what escapes stand for.
    #[test]
    fn escaped_file_urls_are_left_to_the_loader() {
        let item = media_item("file:///no/such%20folder/a%20b.png#exif=1").unwrap();
        assert_eq!((item.kind, item.options.exif), (MediaKind::Image, Some(true)));
        assert!(matches!(media_item("file:///no/such%20file"), Err(ArgumentError::Kind(_))));
        assert!(matches!(media_item("file:///no/such.png"), Err(ArgumentError::Media(_))), "told at once");
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a%20b.mp4");
        std::fs::write(&path, b"\x89PNG\r\n\x1a\n").unwrap();
        let item = media_item(&format!("file://{}", path.display())).unwrap();
        assert_eq!(item.kind, MediaKind::Image, "one of that very name is looked at");
    }

    #[test]
    fn a_file_with_a_hash_in_its_name_wins() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a#fps=1");
        std::fs::write(&path, b"\x89PNG\r\n\x1a\n").unwrap();
        let item = media_item(path.to_str().unwrap()).unwrap();
        assert_eq!(
            (item.kind, item.source, item.options),
            (MediaKind::Image, Source::Path(path), ItemOptions::default())
        );
    }
}
