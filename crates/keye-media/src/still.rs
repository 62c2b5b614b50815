//! Still pictures: bytes to RGB to patches (spec §10.1).
//!
//! Formats are told by content: PNG, JPEG, WebP, GIF (first frame), BMP, TIFF. Lossless formats give Pillow's values.
//! JPEG and lossy WebP decoders differ from libjpeg-turbo's and libwebp's by a few levels in some pixels, CMYK by one.
//! Not read: grey float TIFFs.

use std::io::{BufRead, Cursor, Read, Seek, SeekFrom};
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::{ColorType, DynamicImage, ImageDecoder, ImageFormat, ImageReader};

use crate::ffmpeg::Watch;
use crate::resample::{Kernel, Mode, Resizer, Scratch};
use crate::smart_resize::{IMAGE_FACTOR, smart_resize_hub, smart_resize_utils};
use crate::source::Opened;
use crate::{Alpha, ImageConfig, ItemOptions, Limits, MediaError, ProcessorConfig, Resample, huge_pages, sniff};

/// A decoded picture.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Picture {
    /// Height in pixels.
    pub height: u32,
    /// Width in pixels.
    pub width: u32,
    /// Interleaved RGB, `[height, width, 3]`.
    pub rgb: Vec<u8>,
}

/// The limits of the first resizing stage.
#[derive(Debug, Clone, Copy)]
pub(crate) struct PixelRange {
    /// When the options name none.
    pub default: (u64, u64),
    /// For the `resized_height`/`resized_width` pair, which the options do not narrow.
    pub pair: (u64, u64),
}

impl PixelRange {
    /// Of a picture on its own.
    pub(crate) fn of_pictures(config: &ImageConfig) -> Self {
        let range = (config.min_pixels, config.max_pixels);
        Self { default: range, pair: range }
    }
}

/// Decodes a picture as RGB, as Pillow's `convert("RGB")` does it, with the transparency rule of the variant.
///
/// Pillow's rules for the modes that are not plain: 16-bit grey is *clipped* at 255 (mode `I;16`), every other 16-bit
/// sample keeps its high byte; palettes and grey with alpha lose their alpha whatever the rule; 16-bit grey with alpha
/// counts as RGBA.
pub(crate) fn decode(
    mut opened: Opened,
    watch: &mut Watch,
    alpha: Alpha,
    upright: bool,
    limits: &Limits,
) -> Result<Picture, MediaError> {
    let name = watch.input;
    let unreadable = |reason: String| MediaError::Unreadable { input: name.to_owned(), reason };
    let head = opened.head(sniff::HEAD).map_err(|source| MediaError::Read { input: name.to_owned(), source })?;
    let format = still_format(&head).map_err(unreadable)?;
    // Nothing in these formats takes more than 8 bytes a pixel, uncompressed.
    let most = limits.source_pixels.saturating_mul(8).saturating_add(1 << 20).min(limits.bytes);
    let bytes = opened.into_bytes(name, most)?;
    if format == ImageFormat::Jpeg && !jpeg_ends(&bytes) {
        let reason =
            format!("the JPEG picture is cut off: it has no end in its {} bytes; give the whole file", bytes.len());
        return Err(unreadable(reason));
    }

    watch.check()?;
    // Decoders are written for honest files; one that panics on a crafted file must not take the program along.
    let decoded = catch_unwind(AssertUnwindSafe(|| decode_bytes(&bytes, format, watch, upright, limits)));
    let image = decoded.unwrap_or_else(|_| Err(unreadable(format!("the {format:?} decoder gave up on it"))))?;
    watch.check()?;
    let (height, width) = (image.height(), image.width());
    let rgb = to_rgb(image, alpha == Alpha::CompositeRgbaOnWhite && has_mode_rgba(format, &bytes), png_grey16(&bytes));
    Ok(Picture { height, width, rgb })
}

fn still_format(head: &[u8]) -> Result<ImageFormat, String> {
    use ImageFormat::{Bmp, Gif, Jpeg, Png, Tiff, WebP};
    if head.is_empty() {
        return Err("it is empty".into());
    }
    match image::guess_format(head) {
        Ok(format @ (Png | Jpeg | WebP | Gif | Bmp | Tiff)) => Ok(format),
        _ => match (sniff::unread_picture(head), sniff::demuxer(head)) {
            (Some(reason), _) => Err(reason),
            (None, Ok(container)) => {
                Err(format!("it is a video ({container}), expected a picture; give it as a video item"))
            }
            (None, Err(reason)) => Err(reason),
        },
    }
}

/// Whether a JPEG has its end, the marker behind the last scan. The decoder fills what is missing with grey; Pillow refuses
/// such files. What lies inside of segments is skipped with them: thumbnails have ends of their own.
fn jpeg_ends(bytes: &[u8]) -> bool {
    let mut rest = bytes;
    // Up to a marker: 0xFF, any number of times, and a byte that tells which.
    while let Some(at) = rest.iter().position(|byte| *byte == 0xff) {
        rest = &rest[at + 1..];
        rest = match rest {
            [0xd9, ..] => return true,
            // One more of the same.
            [0xff, ..] => continue,
            // A byte of data, or markers without a segment: TEM, restarts, the start of the picture.
            [0x00 | 0x01 | 0xd0..=0xd8, after @ ..] => after,
            [_, high, low, ..] => rest.get(1 + usize::from(u16::from_be_bytes([*high, *low])).max(2)..).unwrap_or(&[]),
            _ => return false,
        };
    }
    false
}

/// A picture's bytes in pieces. Between two of them the caller may stop the decoder, which would not look up otherwise: a
/// small file can have very many pixels.
struct Pieces<'a, 'w> {
    bytes: Cursor<&'a [u8]>,
    /// Bytes of this piece that are read.
    read: usize,
    watch: &'a mut Watch<'w>,
    /// Why decoding was stopped.
    stopped: &'a mut Option<MediaError>,
}

impl BufRead for Pieces<'_, '_> {
    fn fill_buf(&mut self) -> std::io::Result<&[u8]> {
        const PIECE: usize = 64 << 10;
        if self.read >= PIECE && self.stopped.is_none() {
            self.read = 0;
            *self.stopped = self.watch.check().err();
        }
        if self.stopped.is_some() {
            return Err(std::io::Error::other("stopped"));
        }
        let rest = self.bytes.fill_buf()?;
        Ok(&rest[..rest.len().min(PIECE - self.read)])
    }

    fn consume(&mut self, amount: usize) {
        self.read += amount;
        self.bytes.consume(amount);
    }
}

impl Read for Pieces<'_, '_> {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let n = self.fill_buf()?.read(into)?;
        self.consume(n);
        Ok(n)
    }
}

impl Seek for Pieces<'_, '_> {
    fn seek(&mut self, to: SeekFrom) -> std::io::Result<u64> {
        self.bytes.seek(to)
    }
}

fn decode_bytes(
    bytes: &[u8],
    format: ImageFormat,
    watch: &mut Watch,
    upright: bool,
    limits: &Limits,
) -> Result<DynamicImage, MediaError> {
    let (name, mut stopped) = (watch.input, None);
    let pieces = Pieces { bytes: Cursor::new(bytes), read: 0, watch, stopped: &mut stopped };
    let decoded = decode_pieces(pieces, format, name, upright, limits);
    match stopped {
        Some(error) => Err(error),
        None => decoded,
    }
}

fn decode_pieces(
    pieces: Pieces,
    format: ImageFormat,
    name: &str,
    upright: bool,
    limits: &Limits,
) -> Result<DynamicImage, MediaError> {
    let broken = |e: image::ImageError| {
        // Nothing is wrong with it, so there is something to do.
        let remedy = match e {
            image::ImageError::Unsupported(_) => "; convert it to PNG or JPEG",
            _ => "",
        };
        let reason = format!("the {format:?} picture cannot be decoded: {e}{remedy}");
        MediaError::Unreadable { input: name.to_owned(), reason }
    };
    let mut reader = ImageReader::with_format(pieces, format);
    let mut allocation = image::Limits::no_limits();
    allocation.max_alloc = Some(limits.source_pixels.saturating_mul(16).saturating_add(16 << 20));
    reader.limits(allocation);
    let mut decoder = reader.into_decoder().map_err(broken)?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > limits.source_pixels {
        let (what, limit) = ("the number of pixels", limits.source_pixels);
        return Err(MediaError::Limit { input: name.to_owned(), what, found: pixels, limit });
    }
    if pixels == 0 {
        return Err(MediaError::Unreadable { input: name.to_owned(), reason: format!("its size is {width}x{height}") });
    }
    // A broken tag is as good as none.
    let orientation = upright.then(|| decoder.orientation().ok()).flatten();
    let mut image = match decoder.color_type() {
        ColorType::Rgb8 => {
            let mut rgb = huge_pages::zeroed(width as usize * height as usize * 3);
            decoder.read_image(&mut rgb).map_err(broken)?;
            let image = image::RgbImage::from_raw(width, height, rgb);
            DynamicImage::ImageRgb8(image.expect("an RGB8 decoder's bytes are width x height x 3"))
        }
        _ => DynamicImage::from_decoder(decoder).map_err(broken)?,
    };
    if let Some(orientation) = orientation {
        image.apply_orientation(orientation);
    }
    Ok(image)
}

/// Bit depth and colour type of a PNG's header.
fn png_header(bytes: &[u8]) -> Option<(u8, u8)> {
    Some((*bytes.get(24)?, *bytes.get(25)?)).filter(|_| bytes.starts_with(b"\x89PNG"))
}

/// Whether Pillow opens it in mode RGBA. The decoder also gives RGBA for palettes and keyed colours.
fn has_mode_rgba(format: ImageFormat, bytes: &[u8]) -> bool {
    match format {
        ImageFormat::Png => matches!(png_header(bytes), Some((_, 6)) | Some((16, 4))),
        ImageFormat::Gif => false,
        _ => true,
    }
}

/// A PNG of 16-bit grey, which may come with a keyed transparent value.
fn png_grey16(bytes: &[u8]) -> bool {
    png_header(bytes) == Some((16, 0))
}

fn to_rgb(image: DynamicImage, composite: bool, clip_grey: bool) -> Vec<u8> {
    let grey = |v: u8| [v; 3];
    let high = |v: u16| (v >> 8) as u8;
    let clip = |v: u16| v.min(255) as u8;
    let on_white = |[r, g, b, a]: [u8; 4]| match composite {
        true => [r, g, b].map(|c| blend_on_white(c, a)),
        false => [r, g, b],
    };
    match image {
        DynamicImage::ImageRgb8(image) => image.into_raw(),
        DynamicImage::ImageLuma8(image) => image.pixels().flat_map(|p| grey(p.0[0])).collect(),
        DynamicImage::ImageLumaA8(image) => image.pixels().flat_map(|p| grey(p.0[0])).collect(),
        DynamicImage::ImageRgba8(image) => image.pixels().flat_map(|p| on_white(p.0)).collect(),
        DynamicImage::ImageLuma16(image) => image.pixels().flat_map(|p| grey(clip(p.0[0]))).collect(),
        DynamicImage::ImageLumaA16(image) if clip_grey => image.pixels().flat_map(|p| grey(clip(p.0[0]))).collect(),
        DynamicImage::ImageLumaA16(image) => {
            image.pixels().map(|p| p.0.map(high)).flat_map(|[v, a]| on_white([v, v, v, a])).collect()
        }
        DynamicImage::ImageRgb16(image) => image.pixels().flat_map(|p| p.0.map(high)).collect(),
        DynamicImage::ImageRgba16(image) => image.pixels().flat_map(|p| on_white(p.0.map(high))).collect(),
        // Samples are clipped to 0..255 and lose their fraction, Pillow's rule for floats; `as` does both.
        DynamicImage::ImageRgb32F(image) => image.pixels().flat_map(|p| p.0.map(|v| v as u8)).collect(),
        other => other.to_rgb8().into_raw(),
    }
}

/// Pillow's paste through a mask: `(255*(255-a) + c*a) / 255`, rounded by its integer division.
fn blend_on_white(c: u8, a: u8) -> u8 {
    let sum = 255 * (255 - u32::from(a)) + u32::from(c) * u32::from(a) + 128;
    (((sum >> 8) + sum) >> 8) as u8
}

/// The first stage, `fetch_image` of `keye-vl-utils`: to multiples of 28 with Pillow's bicubic filter.
pub(crate) fn first_stage(
    picture: Picture,
    name: &str,
    options: &ItemOptions,
    range: PixelRange,
    limits: &Limits,
) -> Result<Picture, MediaError> {
    let size = match (options.resized_height, options.resized_width) {
        (Some(h), Some(w)) => smart_resize_utils(h, w, IMAGE_FACTOR, range.pair.0, range.pair.1),
        _ => {
            let min = options.min_pixels.unwrap_or(range.default.0);
            let max = options.max_pixels.unwrap_or(range.default.1);
            smart_resize_utils(picture.height, picture.width, IMAGE_FACTOR, min, max)
        }
    };
    resized(picture, size, Kernel::Bicubic, name, limits)
}

/// The second stage, the model's image processor: its own limits and filter. Nothing happens to most pictures.
pub(crate) fn processor_stage(
    picture: Picture,
    name: &str,
    config: &ProcessorConfig,
    limits: &Limits,
) -> Result<Picture, MediaError> {
    if !config.do_resize {
        return Ok(picture);
    }
    let size = smart_resize_hub(picture.height, picture.width, config.factor(), config.min_pixels, config.max_pixels);
    let kernel = match config.resample {
        Resample::Bilinear => Kernel::Bilinear,
        Resample::Bicubic => Kernel::Bicubic,
    };
    resized(picture, size, kernel, name, limits)
}

fn resized(
    picture: Picture,
    size: Result<(u32, u32), String>,
    kernel: Kernel,
    name: &str,
    limits: &Limits,
) -> Result<Picture, MediaError> {
    let (height, width) = size.map_err(|reason| MediaError::Unreadable {
        input: name.to_owned(),
        reason: format!("no size fits: {reason}"),
    })?;
    if (height, width) == (picture.height, picture.width) {
        return Ok(picture);
    }
    // The published patch has a side of 14; before memory is taken for an absurd `min_pixels`.
    let patches = u64::from(height) * u64::from(width) / (14 * 14);
    if patches > limits.patches {
        let (what, limit) = ("the number of patches after resizing", limits.patches);
        return Err(MediaError::Limit { input: name.to_owned(), what, found: patches, limit });
    }
    let mut rgb = Vec::new();
    Resizer::new(picture.height, picture.width, height, width, kernel, Mode::Pil22).run(
        &picture.rgb,
        &mut rgb,
        &mut Scratch::default(),
    );
    Ok(Picture { height, width, rgb })
}
