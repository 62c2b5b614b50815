//! Clips that are not whole: cut short on their way, or with damaged bytes. What can be decoded of them is used, as players
//! do, so whoever asked has to be told that it is not all.
//!
//! Nobody is warned on suspicion. That frames end early is said when the file itself is known to be short or damaged, or
//! when its packets promise frames that do not come: a container's length alone says nothing, since sound may be longer
//! than the picture. Transport streams, MPEG-PS, Ogg and GIF have no mark of their length, so a cut one looks whole.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// What a clip is known to lack before its frames come.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Promise {
    /// Seconds that its video lasts, as the container has it.
    pub seconds: Option<f64>,
    /// When its first packet is shown, in seconds on the clock of a decoder.
    pub first: Option<f64>,
    /// What the demuxer or the decoder found damaged, in its words.
    pub damage: Option<String>,
}

/// What the frames turned out to be.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Frames {
    /// Seconds from the first to the end of the last, by the clip's clock.
    pub end: f64,
    /// Seconds of a frame, on average.
    pub gap: f64,
    /// Where the packets said that the last one would end, if fewer came.
    pub promised: Option<f64>,
}

/// What is to be said of a clip, if it is not whole. `wanted` is the end of the part that was asked for.
pub(crate) fn warning(cut: Option<Cut>, promise: &Promise, frames: &Frames, wanted: Option<f64>) -> Option<String> {
    // The last frames of whole clips may be shown for a moment longer, or be fields of one frame.
    let slack = (3.0 * frames.gap).max(0.25);
    let known = match cut {
        Some(Cut::OfSeconds(seconds)) => Some(seconds),
        Some(Cut::OfUnknown) => None,
        Some(Cut::AsTold) => promise.seconds,
        None => promise.seconds.filter(|_| promise.damage.is_some()),
    };
    let longest =
        [known, frames.promised].into_iter().flatten().fold(None, |a: Option<f64>, b| Some(a.map_or(b, |a| a.max(b))));
    let asked = wanted.is_none_or(|wanted| wanted > frames.end);
    let end = frames.end;
    if cut == Some(Cut::OfUnknown) {
        return asked.then(|| format!("frames end at {end:.1} s, where the file breaks off: it seems cut short"));
    }
    if let Some(whole) = longest.filter(|whole| end + slack < *whole) {
        let said = || format!("frames end at {end:.1} s of {whole:.1} s: the file seems cut short or damaged");
        return asked.then(said);
    }
    let damage = promise.damage.as_ref()?;
    Some(format!("the file seems damaged, frames may be missing or look wrong: {damage}"))
}

/// The first of a child's messages that tells of damaged bytes. Whole files give other errors too: recordings that begin
/// between two whole pictures, references to frames before a cut, clocks that jump.
pub(crate) fn told(messages: &str, codec: &str) -> Option<String> {
    const DAMAGE: [&str; 17] = [
        "error while decoding MB",
        "Error at MB",
        "damaged at",
        "Invalid NAL unit size",
        "Error splitting the input into NAL units",
        "CABAC_MAX_BIN",
        "Invalid number of merging MVP candidates",
        "Invalid mb type",
        "Unknown OBU type",
        "partial file",
        "File ended prematurely",
        "invalid as first byte of an EBML number",
        "asf bad header",
        "CRC mismatch",
        "could not find sync byte",
        "LZW decode failed",
        "invalid block label",
    ];
    // These begin with a whole picture in every container, and say nothing else.
    let plain = matches!(codec, "av1" | "vp9").then_some("Invalid data found when processing input");
    let line = messages.lines().find(|line| DAMAGE.iter().chain(&plain).any(|words| line.contains(words)))?;
    // The object that speaks has a different address every time.
    let line = line.split_once("] ").map_or(line, |(_, rest)| rest).trim();
    Some(line.chars().take(120).collect())
}

/// A file that ends before the container says.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Cut {
    /// How long it would be is what the container says.
    AsTold,
    /// It would be so long, in seconds.
    OfSeconds(f64),
    /// Nobody knows: its parts tell of themselves only.
    OfUnknown,
}

/// Whether a file is shorter than its own container says.
pub(crate) fn cut_short(file: &File, demuxer: &str) -> Option<Cut> {
    let length = file.metadata().ok()?.len();
    match demuxer {
        "mov" => mov(file, length),
        "matroska" => matroska(file, length),
        "avi" => avi(file, length),
        "asf" => asf(file, length),
        "flv" => flv(file, length),
        _ => None,
    }
}

fn bytes<const N: usize>(file: &File, at: u64) -> Option<[u8; N]> {
    let mut bytes = [0; N];
    file.read_exact_at(&mut bytes, at).ok().map(|()| bytes)
}

/// Boxes follow each other, and each has its size. In a fragmented file each fragment has an index of its own.
fn mov(file: &File, length: u64) -> Option<Cut> {
    // A crafted file has boxes of eight bytes.
    const MOST_BOXES: usize = 100_000;
    let (mut at, mut fragments) = (0u64, false);
    for _ in 0..MOST_BOXES {
        let head: [u8; 8] = bytes(file, at)?;
        let [a, b, c, d, name @ ..] = head;
        let size = match u32::from_be_bytes([a, b, c, d]) {
            // Up to the end of the file.
            0 => return None,
            1 => u64::from_be_bytes(bytes(file, at + 8)?),
            size => u64::from(size),
        };
        fragments |= &name == b"moof";
        let end = at.checked_add(size).filter(|_| size >= 8)?;
        if end > length {
            // What else may stand behind the data is no loss.
            let data = matches!(&name, b"mdat" | b"moof");
            return data.then_some(if fragments { Cut::OfUnknown } else { Cut::AsTold });
        }
        at = end;
    }
    None
}

/// The size of a matroska element at `at`, and where its content begins. The size is `None` where it was not known when it was
/// written.
fn element_size(file: &File, at: u64) -> Option<(Option<u64>, u64)> {
    let first = bytes::<1>(file, at)?[0];
    let width = first.leading_zeros() as u64 + 1;
    if width > 8 {
        return None;
    }
    let mut value = u64::from(first) & ((1 << (8 - width)) - 1);
    for i in 1..width {
        value = value << 8 | u64::from(bytes::<1>(file, at + i)?[0]);
    }
    let unknown = (1 << (7 * width)) - 1;
    Some(((value != unknown).then_some(value), at + width))
}

/// A head, and one segment with everything else.
fn matroska(file: &File, length: u64) -> Option<Cut> {
    let (head, content) = element_size(file, 4)?;
    let segment = content.checked_add(head?)?;
    if bytes(file, segment)? != [0x18, 0x53, 0x80, 0x67] {
        return None;
    }
    let (size, content) = element_size(file, segment + 4)?;
    (content.checked_add(size?)? > length).then_some(Cut::AsTold)
}

/// RIFF lists, one for each gigabyte or so.
fn avi(file: &File, length: u64) -> Option<Cut> {
    let mut at = 0u64;
    loop {
        let [r, i, f, g, a, b, c, d] = bytes(file, at)?;
        let size = u64::from(u32::from_le_bytes([a, b, c, d]));
        // Without a size it was never finished, which players have to live with.
        if [r, i, f, g] != *b"RIFF" || size == 0 {
            return None;
        }
        if at + 8 + size > length {
            return Some(Cut::AsTold);
        }
        at += 8 + size + size % 2;
    }
}

/// The header's "file properties" have size and duration, unless it is a broadcast.
fn asf(file: &File, length: u64) -> Option<Cut> {
    const FILE_PROPERTIES: [u8; 16] =
        [0xA1, 0xDC, 0xAB, 0x8C, 0x47, 0xA9, 0xCF, 0x11, 0x8E, 0xE4, 0x00, 0xC0, 0x0C, 0x20, 0x53, 0x65];
    let mut head = vec![0; length.min(64 << 10) as usize];
    file.read_exact_at(&mut head, 0).ok()?;
    let at = head.windows(16).position(|window| window == FILE_PROPERTIES)?;
    let number = |offset: usize| {
        let field: [u8; 8] = head.get(at + offset..at + offset + 8)?.try_into().ok()?;
        Some(u64::from_le_bytes(field))
    };
    let (size, hundreds_of_ns, preroll_ms, flags) = (number(40)?, number(64)?, number(80)?, number(88)?);
    let broadcast = flags & 1 == 1;
    let seconds = hundreds_of_ns as f64 / 1e7 - preroll_ms as f64 / 1e3;
    (!broadcast && size > length).then_some(Cut::OfSeconds(seconds))
}

/// Most zeros behind the last tag that are looked at.
const FLV_PADDING: u64 = 4096;

/// Every tag is followed by its size, the last one too.
fn flv(file: &File, length: u64) -> Option<Cut> {
    let whole = |length: u64| {
        let size = u64::from(u32::from_be_bytes(bytes(file, length.checked_sub(4)?)?));
        let tag = (length - 4).checked_sub(size).and_then(|at| bytes::<4>(file, at));
        let whole = tag.is_some_and(|[kind, a, b, c]| {
            matches!(kind & 0x1F, 8 | 9 | 18) && u64::from(u32::from_be_bytes([0, a, b, c])) + 11 == size
        });
        whole.then_some(())
    };
    // Zeros behind the last tag are padding; the tag's own size may end with some of them.
    let zeros = (1..=FLV_PADDING.min(length)).take_while(|back| bytes(file, length - back) == Some([0])).count() as u64;
    let padded = || (1..=3.min(zeros)).chain([0]).any(|own| whole(length - zeros + own).is_some());
    (whole(length).is_none() && !padded()).then_some(Cut::AsTold)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const FRAMES: Frames = Frames { end: 4.2, gap: 0.04, promised: None };

    fn promise(seconds: Option<f64>, damage: Option<&str>) -> Promise {
        Promise { seconds, first: None, damage: damage.map(str::to_owned) }
    }

    #[test]
    fn a_length_alone_is_no_reason() {
        let long = promise(Some(10.0), None);
        assert_eq!(warning(None, &long, &FRAMES, None), None, "sound that is longer than the picture");
        let ends = "frames end at 4.2 s of 10.0 s: the file seems cut short or damaged";
        assert_eq!(warning(Some(Cut::AsTold), &long, &FRAMES, None).unwrap(), ends);
        assert_eq!(warning(None, &promise(Some(10.0), Some("x")), &FRAMES, None).unwrap(), ends);
        let fewer = Frames { promised: Some(10.0), ..FRAMES };
        assert_eq!(warning(None, &promise(None, None), &fewer, None).unwrap(), ends);
        // Of the part that was asked for nothing is missing.
        assert_eq!(warning(Some(Cut::AsTold), &long, &FRAMES, Some(4.0)), None);
        assert_eq!(warning(Some(Cut::AsTold), &promise(Some(10.0), Some("x")), &FRAMES, Some(4.0)), None);
        assert_eq!(warning(Some(Cut::AsTold), &long, &FRAMES, Some(5.0)).unwrap(), ends);
        // Only what stands behind the frames is missing.
        assert_eq!(warning(Some(Cut::AsTold), &promise(Some(4.4), None), &FRAMES, None), None);
        let breaks = warning(Some(Cut::OfUnknown), &promise(Some(4.4), Some("x")), &fewer, None).unwrap();
        assert_eq!(breaks, "frames end at 4.2 s, where the file breaks off: it seems cut short");
        let wrong = warning(None, &promise(Some(4.2), Some("Error at MB: 7")), &FRAMES, None).unwrap();
        assert_eq!(wrong, "the file seems damaged, frames may be missing or look wrong: Error at MB: 7");
    }

    #[test]
    fn only_words_of_damage_count() {
        let mid = "[h264 @ 0x5] non-existing PPS 0 referenced\n[h264 @ 0x5] no frame!\n\
                   Error while decoding stream #0:0: Invalid data found when processing input\n";
        assert_eq!(told(mid, "h264"), None, "a recording that begins anywhere");
        assert_eq!(
            told(mid, "vp9").as_deref(),
            Some("Error while decoding stream #0:0: Invalid data found when processing input")
        );
        let damaged = format!("{mid}[h264 @ 0x5] error while decoding MB 1 2, bytestream -3\n");
        assert_eq!(told(&damaged, "h264").as_deref(), Some("error while decoding MB 1 2, bytestream -3"));
    }

    fn of(demuxer: &str, bytes: &[u8]) -> Option<Cut> {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        cut_short(&file, demuxer)
    }

    #[test]
    fn hostile_sizes_lead_nowhere() {
        for demuxer in ["mov", "matroska", "avi", "asf", "mpegts"] {
            assert_eq!(of(demuxer, b""), None, "{demuxer}");
            assert_eq!(of(demuxer, &[0; 64]), None, "{demuxer}");
        }
        let box_of = |size: u32, name: &[u8; 4]| [&size.to_be_bytes()[..], name].concat();
        assert_eq!(of("mov", &box_of(7, b"mdat")), None);
        assert_eq!(of("mov", &box_of(0, b"mdat")), None);
        assert_eq!(of("mov", &box_of(100, b"free")), None);
        assert_eq!(of("mov", &box_of(100, b"mdat")), Some(Cut::AsTold));
        assert_eq!(of("mov", &[box_of(8, b"moof"), box_of(9, b"mdat")].concat()), Some(Cut::OfUnknown));
        let large = [&box_of(1, b"mdat")[..], &u64::MAX.to_be_bytes()].concat();
        assert_eq!(of("mov", &[box_of(8, b"free"), large.clone()].concat()), None, "beyond all numbers");
        assert_eq!(of("mov", &large), Some(Cut::AsTold));
        let unknown = b"\x1A\x45\xDF\xA3\x80\x18\x53\x80\x67\x01\xFF\xFF\xFF\xFF\xFF\xFF\xFF";
        assert_eq!(of("matroska", unknown), None, "a live recording");
        assert_eq!(of("matroska", b"\x1A\x45\xDF\xA3\x80\x18\x53\x80\x67\x82x"), Some(Cut::AsTold));
        assert_eq!(of("matroska", b"\x1A\x45\xDF\xA3\x80\x18\x53\x80\x67\x81x"), None);
        assert_eq!(of("avi", b"RIFF\x01\0\0\0xpRIFF\0\0\0\0"), None);
        assert_eq!(of("avi", b"RIFF\x02\0\0\0xxRIFF\xFF\xFF\xFF\xFF"), Some(Cut::AsTold));
    }
}
