//! Every mode of picture against what Pillow 11.3.0 made of the same bytes: `convert("RGB")` for the rule
//! [`Alpha::Drop`], the white paste of RGBA for [`Alpha::CompositeRgbaOnWhite`]. Part of the library's own tests, since
//! nothing public shows pictures before resizing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::ffmpeg::Watch;
use crate::source::Opened;
use crate::still::{Picture, decode};
use crate::{Alpha, Limits, MediaError, Progress};

fn decoded(bytes: &[u8], alpha: Alpha) -> Result<Picture, MediaError> {
    let (time, mut progress) = (Duration::from_secs(60), |_: Progress| true);
    let deadline = Instant::now() + time;
    let mut watch = Watch { input: "test", deadline, time, progress: &mut progress, done: 0, total: 0 };
    decode(Opened::Bytes(Arc::from(bytes)), &mut watch, alpha, false, &Limits::default())
}

/// Both rules give the same.
fn assert_rgb(name: &str, bytes: &[u8], rgb: &[u8]) {
    for alpha in [Alpha::Drop, Alpha::CompositeRgbaOnWhite] {
        assert_eq!(decoded(bytes, alpha).unwrap().rgb, rgb, "{name} {alpha:?}");
    }
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

fn chunk(kind: &[u8; 4], data: &[u8]) -> Vec<u8> {
    let body = [kind, data].concat();
    [&(data.len() as u32).to_be_bytes()[..], &body, &crc32(&body).to_be_bytes()].concat()
}

/// A PNG of one row.
fn png(width: u32, depth: u8, colour: u8, row: &[u8], extra: &[u8]) -> Vec<u8> {
    let raw = [&[0], row].concat();
    let (a, b) =
        raw.iter().fold((1u32, 0u32), |(a, b), x| ((a + u32::from(*x)) % 65_521, (a + b + u32::from(*x)) % 65_521));
    let len = raw.len() as u16;
    // zlib with one stored block.
    let zlib =
        [&[0x78, 1, 1][..], &len.to_le_bytes(), &(!len).to_le_bytes(), &raw, &((b << 16) | a).to_be_bytes()].concat();
    let header = [&width.to_be_bytes()[..], &1u32.to_be_bytes(), &[depth, colour, 0, 0, 0]].concat();
    let parts = [
        b"\x89PNG\r\n\x1a\n".to_vec(),
        chunk(b"IHDR", &header),
        extra.to_vec(),
        chunk(b"IDAT", &zlib),
        chunk(b"IEND", b""),
    ];
    parts.concat()
}

fn be(values: &[u16]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_be_bytes()).collect()
}

/// An uncompressed TIFF of one row; tag 338 is the kind of an extra sample.
fn tiff(width: u16, bits: &[u16], photometric: u16, data: &[u8]) -> Vec<u8> {
    let samples = bits.len() as u16;
    let entries = 10 + u16::from(samples == 4 && photometric == 2);
    let after = 8 + 2 + u32::from(entries) * 12 + 4;
    let (bits_at, data_at) = (after, after + 2 * u32::from(samples));
    let mut out = [&b"II*\0"[..], &8u32.to_le_bytes(), &entries.to_le_bytes()].concat();
    let mut entry = |tag: u16, kind: u16, count: u32, value: u32| {
        out.extend([&tag.to_le_bytes()[..], &kind.to_le_bytes(), &count.to_le_bytes(), &value.to_le_bytes()].concat());
    };
    entry(256, 3, 1, u32::from(width));
    entry(257, 3, 1, 1);
    entry(258, 3, u32::from(samples), if samples == 1 { u32::from(bits[0]) } else { bits_at });
    entry(259, 3, 1, 1);
    entry(262, 3, 1, u32::from(photometric));
    entry(273, 4, 1, data_at);
    entry(277, 3, 1, u32::from(samples));
    entry(278, 3, 1, 1);
    entry(279, 4, 1, data.len() as u32);
    entry(284, 3, 1, 1);
    if samples == 4 && photometric == 2 {
        entry(338, 3, 1, 2);
    }
    out.extend(0u32.to_le_bytes());
    bits.iter().for_each(|b| out.extend(b.to_le_bytes()));
    out.extend(data);
    out
}

#[test]
fn grey_pngs() {
    let grey = |values: &[u8]| -> Vec<u8> { values.iter().flat_map(|v| [*v; 3]).collect() };
    assert_rgb("1 bit", &png(4, 1, 0, &[0b1010_0000], b""), &grey(&[255, 0, 255, 0]));
    assert_rgb("2 bits", &png(4, 2, 0, &[0b0001_1011], b""), &grey(&[0, 85, 170, 255]));
    assert_rgb("4 bits", &png(2, 4, 0, &[0x1f], b""), &grey(&[17, 255]));
    let row = be(&[0, 200, 256, 65_535]);
    assert_rgb("16 bits are clipped", &png(4, 16, 0, &row, b""), &grey(&[0, 200, 255, 255]));
    let key = chunk(b"tRNS", &be(&[200]));
    assert_rgb("16 bits, keyed", &png(4, 16, 0, &row, &key), &grey(&[0, 200, 255, 255]));
    assert_rgb("8 bits, keyed", &png(2, 8, 0, &[10, 20], &chunk(b"tRNS", &be(&[10]))), &grey(&[10, 20]));
    assert_rgb("8 bits and alpha", &png(2, 8, 4, &[10, 0, 200, 128], b""), &grey(&[10, 200]));
}

#[test]
fn colour_pngs() {
    let row = be(&[0, 255, 256, 65_535, 300, 700]);
    assert_rgb("16 bits", &png(2, 16, 2, &row, b""), &[0, 0, 1, 255, 1, 2]);
    assert_rgb("16 bits, keyed", &png(2, 16, 2, &row, &chunk(b"tRNS", &be(&[0, 255, 256]))), &[0, 0, 1, 255, 1, 2]);
    let key = chunk(b"tRNS", &be(&[1, 2, 3]));
    assert_rgb("8 bits, keyed", &png(2, 8, 2, &[1, 2, 3, 4, 5, 6], &key), &[1, 2, 3, 4, 5, 6]);
    let palette = [chunk(b"PLTE", &[9, 8, 7, 6, 5, 4]), chunk(b"tRNS", &[0, 128])].concat();
    assert_rgb("palette with alpha", &png(2, 8, 3, &[0, 1], &palette), &[9, 8, 7, 6, 5, 4]);
}

#[test]
fn rgba_is_dropped_or_composited_by_the_rule() {
    let rgba = [10, 20, 30, 0, 200, 100, 50, 128];
    let rgba16 = be(&[2560, 5120, 7680, 0, 51_200, 25_600, 12_800, 32_768]);
    let webp = [
        82, 73, 70, 70, 34, 0, 0, 0, 87, 69, 66, 80, 86, 80, 56, 76, 22, 0, 0, 0, 47, 1, 0, 0, 16, 15, 112, 10, 168,
        43, 248, 158, 194, 99, 0, 131, 22, 21, 136, 232, 127, 0,
    ];
    let pictures = [
        ("png", png(2, 8, 6, &rgba, b"")),
        ("png, 16 bits", png(2, 16, 6, &rgba16, b"")),
        ("tiff", tiff(2, &[8; 4], 2, &rgba)),
        ("webp", webp.to_vec()),
    ];
    for (name, bytes) in pictures {
        assert_eq!(decoded(&bytes, Alpha::Drop).unwrap().rgb, [10, 20, 30, 200, 100, 50], "{name}");
        let composite = decoded(&bytes, Alpha::CompositeRgbaOnWhite).unwrap().rgb;
        assert_eq!(composite, [255, 255, 255, 227, 177, 152], "{name}");
    }
    let grey = png(2, 16, 4, &be(&[2560, 0, 51_200, 32_768]), b"");
    assert_eq!(decoded(&grey, Alpha::Drop).unwrap().rgb, [10, 10, 10, 200, 200, 200]);
    assert_eq!(decoded(&grey, Alpha::CompositeRgbaOnWhite).unwrap().rgb, [255, 255, 255, 227, 227, 227]);
}

#[test]
fn the_other_formats() {
    let gif = [
        71, 73, 70, 56, 57, 97, 3, 0, 1, 0, 129, 0, 0, 9, 8, 7, 6, 5, 4, 1, 2, 3, 0, 0, 0, 33, 249, 4, 1, 0, 0, 1, 0,
        44, 0, 0, 0, 0, 3, 0, 1, 0, 0, 8, 6, 0, 1, 4, 16, 16, 16, 0, 59,
    ];
    assert_rgb("gif with a transparent index", &gif, &[9, 8, 7, 6, 5, 4, 1, 2, 3]);
    let bmp = [
        66, 77, 62, 0, 0, 0, 0, 0, 0, 0, 54, 0, 0, 0, 40, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1, 0, 32, 0, 0, 0, 0, 0, 8,
        0, 0, 0, 196, 14, 0, 0, 196, 14, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 30, 20, 10, 0, 50, 100, 200, 128,
    ];
    assert_rgb("bmp of 32 bits", &bmp, &[10, 20, 30, 200, 100, 50]);
    assert_rgb("tiff, grey", &tiff(3, &[8], 1, &[1, 2, 3]), &[1, 1, 1, 2, 2, 2, 3, 3, 3]);
    let words: Vec<u8> = [5u16, 300, 65_535].iter().flat_map(|v| v.to_le_bytes()).collect();
    assert_rgb("tiff, grey of 16 bits", &tiff(3, &[16], 1, &words), &[5, 5, 5, 255, 255, 255, 255, 255, 255]);
    // The decoder rounds the product of CMYK down, Pillow to nearest.
    let cmyk = decoded(&tiff(1, &[8; 4], 5, &[0, 50, 100, 20]), Alpha::Drop).unwrap().rgb;
    assert!(cmyk.iter().zip([235u8, 189, 143]).all(|(got, wanted)| got.abs_diff(wanted) <= 1), "{cmyk:?}");
}
