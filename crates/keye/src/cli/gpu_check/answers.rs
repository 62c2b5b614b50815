//! A whole model: what keye-nano says about pictures on the GPU and on the CPU.

use std::time::Instant;

use anyhow::Result;

use super::report::Checked;

/// Pictures, each with a question, and clips of a few frames; then all at once.
#[cfg(feature = "nano")]
const PICTURES: u64 = 6;
#[cfg(feature = "nano")]
const CLIPS: u64 = 2;

/// Nothing where the program has no model inside.
#[cfg(not(feature = "nano"))]
pub fn compare(_: usize, _: &mut dyn FnMut(Checked) -> Result<()>) -> Result<()> {
    let _ = Instant::now();
    Ok(())
}

#[cfg(feature = "nano")]
pub fn compare(device: usize, add: &mut dyn FnMut(Checked) -> Result<()>) -> Result<()> {
    use keye::{Device, DeviceOptions, Keye, KvDtype, LoadOptions};

    let begin = Instant::now();
    let load = |device: Device| {
        let device = DeviceOptions { device, ..DeviceOptions::default() };
        let options =
            LoadOptions { device, max_model_len: Some(4096), kv_dtype: KvDtype::Bf16, ..LoadOptions::default() };
        Keye::load(keye::NANO, options)
    };
    let questions = questions();
    let expected = together(&load(Device::Cpu)?, &questions)?;
    let gpu = load(Device::Cuda(device))?;
    let alone = questions.iter().map(|question| together(&gpu, std::slice::from_ref(question)));
    let alone: Vec<String> = alone.collect::<Result<Vec<_>>>()?.concat();
    let batched = together(&gpu, &questions)?;
    let mut failed = Vec::new();
    for (i, question) in questions.iter().enumerate() {
        if alone[i] != expected[i] {
            failed.push(format!("{}: {:?} on the CPU, {:?} on the GPU", question.1, expected[i], alone[i]));
        }
        if batched[i] != alone[i] {
            failed.push(format!("{}: {:?} alone, {:?} among others", question.1, alone[i], batched[i]));
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    add(Checked { name: "answers of keye-nano".into(), count: 2 * questions.len(), failed, seconds })
}

/// Media and what is asked about it.
#[cfg(feature = "nano")]
type Question = (keye_media::MediaItem, String);

#[cfg(feature = "nano")]
fn questions() -> Vec<Question> {
    use keye_media::{FrameItem, ItemOptions, MediaItem, MediaKind, Source};
    use keye_world::{Split, World};

    let world = World::new(Split::Test);
    let picture = |clip: &keye_world::Clip, frame: u32| {
        Source::Bytes(bitmap(clip.width() as usize, clip.height() as usize, &clip.frame(frame)).into())
    };
    let stills = (0..PICTURES).map(|i| world.still(i)).filter_map(|sample| {
        let clip = sample.media.first()?.1.clip().clone();
        let source = picture(&clip, 0);
        let item = MediaItem { kind: MediaKind::Image, source, options: ItemOptions::default() };
        Some((item, sample.turns.first()?.question.clone()))
    });
    let clips = (0..CLIPS).map(|i| world.clip(i)).filter_map(|sample| {
        let clip = sample.media.first()?.1.clip().clone();
        let step = (clip.len() / 6).max(1) as usize;
        let frames = (0..clip.len()).step_by(step).map(|i| FrameItem { source: picture(&clip, i), options: None });
        let source = Source::Frames(frames.collect());
        let item = MediaItem { kind: MediaKind::Video, source, options: ItemOptions::default() };
        Some((item, sample.turns.first()?.question.clone()))
    });
    stills.chain(clips).collect()
}

/// Greedy answers to questions that are asked at the same time.
#[cfg(feature = "nano")]
fn together(keye: &keye::Keye, questions: &[Question]) -> Result<Vec<String>> {
    use keye::{EngineError, Event, Request, SamplingParams};
    use keye_processor::Conversation;

    let mut streams = Vec::new();
    for (media, question) in questions {
        let mut conversation = Conversation::new();
        conversation.push_user(vec![media.clone()], question.as_str());
        let sampling = SamplingParams { max_tokens: 64, ..SamplingParams::default() };
        streams.push(keye.submit(Request { conversation, sampling, ..Request::default() })?);
    }
    let answer = |stream| {
        for event in stream {
            match event {
                Event::Finished { text, .. } => return Ok(text),
                Event::Failed(error) => return Err(error.into()),
                Event::Stage(_) | Event::Thinking | Event::Token { .. } => {}
            }
        }
        Err(EngineError::Stopped.into())
    };
    streams.into_iter().map(answer).collect()
}

/// A picture file (BMP, 24 bits, from the top) of RGB bytes.
#[cfg(feature = "nano")]
fn bitmap(width: usize, height: usize, rgb: &[u8]) -> Vec<u8> {
    const HEAD: usize = 54;
    let row = (3 * width).next_multiple_of(4);
    let mut out = Vec::with_capacity(HEAD + row * height);
    out.extend(b"BM");
    for word in [HEAD + row * height, 0, HEAD, 40, width] {
        out.extend((word as u32).to_le_bytes());
    }
    // A negative height: the first row is the uppermost. One plane of 24 bits; the rest is zero.
    out.extend((-(height as i32)).to_le_bytes());
    out.extend([1, 0, 24, 0]);
    out.resize(HEAD, 0);
    for pixels in rgb.chunks_exact(3 * width) {
        out.extend(pixels.chunks_exact(3).flat_map(|pixel| [pixel[2], pixel[1], pixel[0]]));
        out.resize(out.len() + row - 3 * width, 0);
    }
    out
}

#[cfg(all(test, feature = "nano"))]
mod tests {
    use super::*;

    #[test]
    fn nano_is_asked_about_pictures_and_frames() {
        let questions = questions();
        assert_eq!(questions.len() as u64, PICTURES + CLIPS);
        let options = keye::LoadOptions { max_model_len: Some(4096), ..keye::LoadOptions::default() };
        let keye = keye::Keye::load(keye::NANO, options).unwrap();
        let answers = together(&keye, &questions[PICTURES as usize - 1..]).unwrap();
        assert!(answers.iter().all(|answer| !answer.is_empty()), "{answers:?}");
    }
}
