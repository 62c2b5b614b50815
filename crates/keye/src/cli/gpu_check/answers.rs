//! A whole model: what keye-nano says about pictures on the GPU and on the CPU.

use anyhow::Result;

use super::report::Checked;

/// Pictures, each with a question, and clips of a few frames; then all at once.
#[cfg(feature = "nano")]
const PICTURES: u64 = 6;
#[cfg(feature = "nano")]
const CLIPS: u64 = 2;

/// `None` where the program has no model inside.
#[cfg(not(feature = "nano"))]
pub fn compare(_: usize) -> Result<Option<Checked>> {
    Ok(None)
}

#[cfg(feature = "nano")]
pub fn compare(device: usize) -> Result<Option<Checked>> {
    use keye::{Device, DeviceOptions, Keye, KvDtype, LoadOptions};

    let begin = std::time::Instant::now();
    let load = |device: Device| {
        let device = DeviceOptions { device, ..DeviceOptions::default() };
        let options =
            LoadOptions { device, max_model_len: Some(4096), kv_dtype: KvDtype::Bf16, ..LoadOptions::default() };
        Keye::load(keye::NANO, options)
    };
    let questions = questions()?;
    let on_cpu = together(&load(Device::Cpu)?, &questions)?;
    let gpu = load(Device::Cuda(device))?;
    let alone = questions.iter().map(|question| together(&gpu, std::slice::from_ref(question)));
    let alone: Vec<String> = alone.collect::<Result<Vec<_>>>()?.concat();
    let batched = together(&gpu, &questions)?;
    let answers = questions.iter().zip(&on_cpu).zip(alone.iter().zip(&batched));
    let answers =
        answers.map(|((question, on_cpu), (alone, batched))| Answers { question: &question.1, on_cpu, alone, batched });
    Ok(Some(judge(&answers.collect::<Vec<_>>(), begin.elapsed().as_secs_f64())))
}

/// What was said to one question.
#[cfg(feature = "nano")]
struct Answers<'a> {
    question: &'a str,
    on_cpu: &'a str,
    /// On the GPU, with nothing else in the batch.
    alone: &'a str,
    /// On the GPU, among the others.
    batched: &'a str,
}

/// A GPU's rows may not depend on other rows. From the CPU's they differ: products round activations to bf16 here, and where two
/// tokens are nearly equal that decides. That no answer at all is the CPU's is beyond rounding.
#[cfg(feature = "nano")]
fn judge(answers: &[Answers<'_>], seconds: f64) -> Checked {
    let (mut failed, mut differs) = (Vec::new(), Vec::new());
    for Answers { question, on_cpu, alone, batched } in answers {
        if alone != on_cpu {
            differs.push(format!("{question}: {on_cpu:?} on the CPU, {alone:?} on the GPU"));
        }
        if batched != alone {
            failed.push(format!("{question}: {alone:?} alone, {batched:?} among others"));
        }
    }
    let equal = answers.len() - differs.len();
    if equal == 0 {
        failed.push("no answer is the CPU's".into());
    }
    let name = format!("keye-nano: {equal} of {} answers are the CPU's", answers.len());
    Checked { name, count: 2 * answers.len(), failed, differs, seconds }
}

/// Media and what is asked about it.
#[cfg(feature = "nano")]
type Question = (keye_media::MediaItem, String);

#[cfg(feature = "nano")]
fn questions() -> Result<Vec<Question>> {
    use keye::{FrameItem, ItemOptions, MediaItem, MediaKind, Source, rgb_source};
    use keye_world::{Split, World};

    let world = World::new(Split::Test);
    let picture = |clip: &keye_world::Clip, frame: u32| rgb_source(clip.width(), clip.height(), &clip.frame(frame));
    let ask = |kind, source, sample: &keye_world::Sample| {
        let item = MediaItem { kind, source, options: ItemOptions::default() };
        Some((item, sample.turns.first()?.question.clone()))
    };
    let mut questions = Vec::new();
    for sample in (0..PICTURES).map(|i| world.still(i)) {
        let Some((_, medium)) = sample.media.first() else { continue };
        questions.extend(ask(MediaKind::Image, picture(medium.clip(), 0)?, &sample));
    }
    for sample in (0..CLIPS).map(|i| world.clip(i)) {
        let Some((_, medium)) = sample.media.first() else { continue };
        let clip = medium.clip();
        let step = (clip.len() / 6).max(1) as usize;
        let frame = |i| Ok(FrameItem { source: picture(clip, i)?, options: None });
        let frames = (0..clip.len()).step_by(step).map(frame).collect::<Result<_>>()?;
        questions.extend(ask(MediaKind::Video, Source::Frames(frames), &sample));
    }
    Ok(questions)
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
                Event::Stage(_) | Event::Thinking(_) | Event::Token { .. } => {}
            }
        }
        Err(EngineError::Stopped.into())
    };
    streams.into_iter().map(answer).collect()
}

#[cfg(all(test, feature = "nano"))]
mod tests {
    use super::*;

    #[test]
    fn nano_is_asked_about_pictures_and_frames() {
        let questions = questions().unwrap();
        assert_eq!(questions.len() as u64, PICTURES + CLIPS);
        let options = keye::LoadOptions { max_model_len: Some(4096), ..keye::LoadOptions::default() };
        let keye = keye::Keye::load(keye::NANO, options).unwrap();
        let answers = together(&keye, &questions[PICTURES as usize - 1..]).unwrap();
        assert!(answers.iter().all(|answer| !answer.is_empty()), "{answers:?}");
    }

    #[test]
    fn another_answer_than_the_cpus_is_told_and_another_than_alone_is_wrong() {
        let said = |on_cpu, alone, batched| Answers { question: "What colour?", on_cpu, alone, batched };
        let same = judge(&[said("red", "red", "red"), said("two", "two", "two")], 1.0);
        assert!(same.failed.is_empty() && same.differs.is_empty() && same.count == 4);
        assert_eq!(same.name, "keye-nano: 2 of 2 answers are the CPU's");
        let near = judge(&[said("red", "orange", "orange"), said("two", "two", "two")], 1.0);
        assert!(near.failed.is_empty(), "{near:?}");
        assert_eq!(near.differs, ["What colour?: \"red\" on the CPU, \"orange\" on the GPU"]);
        assert_eq!(near.name, "keye-nano: 1 of 2 answers are the CPU's");
        let wrong = judge(&[said("red", "red", "orange"), said("two", "two", "two")], 1.0);
        assert_eq!(wrong.failed, ["What colour?: \"red\" alone, \"orange\" among others"]);
        assert_eq!(judge(&[said("red", "a a a", "a a a")], 1.0).failed, ["no answer is the CPU's"]);
    }
}
