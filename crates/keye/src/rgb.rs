//! Pictures whose pixels are in memory already.

use keye_media::{MediaError, Source};

/// Bytes in front of the pixels.
const HEAD: usize = 54;

/// The source of a picture, `[height, width, 3]` bytes in red, green, blue: for an image, or for each frame of
/// [`Source::Frames`]. It goes through the same reading as a picture file, which loses nothing.
///
/// # Errors
/// Another number of bytes than the size says, or more than 4 GiB of them.
pub fn rgb_source(width: u32, height: u32, rgb: &[u8]) -> Result<Source, MediaError> {
    let wrong = |reason| MediaError::Unreadable { input: format!("a picture of {width}x{height} pixels"), reason };
    let expected = (u64::from(width) * u64::from(height)).saturating_mul(3);
    if expected == 0 || expected != rgb.len() as u64 {
        return Err(wrong(format!("expected {expected} bytes of red, green and blue, found {}", rgb.len())));
    }
    // A BMP file: rows of 24 bits a pixel, padded to words, from the top.
    let line = 3 * width as usize;
    let row = line.next_multiple_of(4);
    let size = u32::try_from(HEAD + row * height as usize).ok();
    let (Some(size), Ok(down)) = (size, i32::try_from(height)) else {
        return Err(wrong("it takes more than 4 GiB".to_owned()));
    };
    let mut out = Vec::with_capacity(size as usize);
    out.extend(b"BM");
    for word in [size, 0, HEAD as u32, 40, width] {
        out.extend(word.to_le_bytes());
    }
    // A negative height: the first row is the uppermost. One plane of 24 bits; the rest is zero.
    out.extend((-down).to_le_bytes());
    out.extend([1, 0, 24, 0]);
    out.resize(HEAD, 0);
    for pixels in rgb.chunks_exact(line) {
        out.extend(pixels.as_chunks::<3>().0.iter().flat_map(|[red, green, blue]| [blue, green, red]));
        out.resize(out.len() + row - line, 0);
    }
    Ok(Source::Bytes(out.into()))
}

#[cfg(test)]
mod tests {
    use keye_media::{ItemOptions, Loader, MediaItem, MediaKind};
    use keye_processor::{Overrides, Processor};

    use super::*;

    #[test]
    fn pixels_come_through_as_they_are() {
        let files = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures/keye-1_5-tiny/model");
        let loader = Loader::new(Processor::load(&files, &Overrides::default()).unwrap().media);
        // An odd width: rows are padded.
        let (width, height) = (75, 61);
        let rgb: Vec<u8> = (0..width * height * 3).map(|i| (i * 37 % 251) as u8).collect();
        let options = ItemOptions::default();
        let source = rgb_source(width, height, &rgb).unwrap();
        let item = MediaItem { kind: MediaKind::Image, source, options: options.clone() };
        let found = loader.load(&item, &mut |_| true).unwrap();
        let expected = loader.load_rgb("pixels", (height, width), rgb, &options).unwrap();
        assert_eq!(found.patches, expected.patches);
    }

    #[test]
    fn sizes_that_do_not_fit_the_bytes_are_refused() {
        for (width, height, bytes) in [(2, 2, 11), (0, 7, 0), (u32::MAX, u32::MAX, 3)] {
            let error = rgb_source(width, height, &vec![0; bytes]).unwrap_err().to_string();
            assert!(error.contains(&format!("{width}x{height}")) && error.contains("expected"), "{error}");
        }
    }
}
