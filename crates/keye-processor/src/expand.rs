//! Media placeholders of a rendered prompt become runs of pad tokens (spec §8.3).

use keye_media::{FrameKind, Media, MediaKind};

use crate::{FrameMarkers, FramePrefix, ModelConfig, ProcessorError, Tokenizer};

/// Where rows of media features go: `len` tokens from `start` on take the feature rows from `row` on of media `media`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeatureSpan {
    /// Index into the conversation's media.
    pub media: usize,
    /// First token.
    pub start: usize,
    /// Tokens.
    pub len: usize,
    /// First feature row.
    pub row: usize,
}

/// A run of pad tokens: one grid, whose positions are counted together.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Block {
    /// The tokens and their features.
    pub(crate) span: FeatureSpan,
    /// `(t, h, w)` in tokens; their product is the span's length.
    pub(crate) grid: [u32; 3],
    /// Seconds between grid steps, in f32 as the reference keeps it (spec §6.2).
    pub(crate) seconds_per_step: f32,
}

/// The special tokens of media, looked up in the checkpoint's own vocabulary.
#[derive(Debug, Clone)]
pub(crate) struct Expander {
    image_pad: Pad,
    video_pad: Pad,
    markers: Markers,
    merge_size: u32,
}

/// How the frames of a clip are told apart.
#[derive(Debug, Clone)]
enum Markers {
    None,
    /// What precedes each frame, and `<|fast_start|>`, `<|fast_end|>` of variants that have fast frames.
    Frames(FramePrefix, Option<[u32; 2]>),
}

#[derive(Debug, Clone)]
struct Pad {
    id: u32,
    text: String,
}

/// Frame rate of a clip that says none.
const DEFAULT_FPS: f64 = 2.0;

impl Expander {
    /// Looks up the tokens that `config` and its variant need.
    ///
    /// `prefix` takes the place of the variant's own text before frames.
    pub(crate) fn new(
        config: &ModelConfig,
        tokenizer: &Tokenizer,
        merge_size: u32,
        prefix: Option<&FramePrefix>,
    ) -> Result<Self, ProcessorError> {
        let pad = |field: &str, id: u32| match tokenizer.id_to_token(id) {
            Some(text) if tokenizer.is_special(id) => Ok(Pad { id, text }),
            found => {
                let reason = format!("{field} of config.json is {id}: expected a special token there, found {found:?}");
                Err(ProcessorError::Prompt(reason))
            }
        };
        let marker = |token: &str| {
            let reason = || format!("the tokenizer has no token {token}, which clips of {} need", config.architecture);
            tokenizer.token_to_id(token).ok_or_else(|| ProcessorError::Prompt(reason()))
        };
        if config.image_token_id == config.video_token_id {
            let reason =
                format!("config.json has {} for both image_token_id and video_token_id", config.image_token_id);
            return Err(ProcessorError::Prompt(reason));
        }
        let markers = config.facts().markers;
        if prefix.is_some() && markers != FrameMarkers::Timestamps {
            let reason = format!("a frame prefix is for Keye-VL-2.0, and this model is a {}", config.architecture);
            return Err(ProcessorError::Prompt(reason));
        }
        Ok(Self {
            image_pad: pad("image_token_id", config.image_token_id)?,
            video_pad: pad("video_token_id", config.video_token_id)?,
            markers: match markers {
                FrameMarkers::None => Markers::None,
                FrameMarkers::SlowFast => {
                    marker("<|frame|>")?;
                    let fast = [marker("<|fast_start|>")?, marker("<|fast_end|>")?];
                    Markers::Frames(FramePrefix::published(), Some(fast))
                }
                FrameMarkers::Timestamps => {
                    let prefix = prefix.cloned().unwrap_or_else(FramePrefix::published);
                    if prefix.text(None).contains("<|frame|>") {
                        marker("<|frame|>")?;
                    }
                    let ids = tokenizer.encode(&prefix.text(Some(0.0)))?;
                    if ids.iter().any(|id| [config.image_token_id, config.video_token_id].contains(id)) {
                        let reason = "the frame prefix holds the token of a picture or video; remove it";
                        return Err(ProcessorError::Prompt(reason.into()));
                    }
                    Markers::Frames(prefix, None)
                }
            },
            merge_size,
        })
    }

    /// Tokenises `text` with the n-th image (video) placeholder replaced by the pads of the n-th image (video).
    ///
    /// The text between placeholders is tokenised piece by piece: a special token splits the text before anything else
    /// looks at it, so the ids are those of the expanded string, without ever building it.
    pub(crate) fn expand(
        &self,
        text: &str,
        media: &[&Media],
        tokenizer: &Tokenizer,
    ) -> Result<(Vec<u32>, Vec<Block>), ProcessorError> {
        let placeholders = self.placeholders(text, media)?;
        let of = |kind| media.iter().enumerate().filter(move |(_, m)| m.kind == kind);
        let (mut images, mut videos) = (of(MediaKind::Image), of(MediaKind::Video));
        let (mut ids, mut blocks) = (Vec::new(), Vec::new());
        let mut done = 0;
        for (at, pad, kind) in placeholders {
            let next = if kind == MediaKind::Image { images.next() } else { videos.next() };
            let (Some((index, item)), Some(before)) = (next, text.get(done..at)) else {
                return Err(ProcessorError::Prompt(format!("placeholders overlap at byte {at}")));
            };
            ids.extend(tokenizer.encode(before)?);
            done = at + pad.text.len();
            self.push_media(index, item, pad.id, tokenizer, &mut ids, &mut blocks)?;
        }
        ids.extend(tokenizer.encode(&text[done..])?);
        Ok((ids, blocks))
    }

    /// Where the placeholders are, in order; there have to be as many as there are media.
    fn placeholders(&self, text: &str, media: &[&Media]) -> Result<Vec<(usize, &Pad, MediaKind)>, ProcessorError> {
        let mut all = Vec::new();
        for (pad, kind, name) in
            [(&self.image_pad, MediaKind::Image, "images"), (&self.video_pad, MediaKind::Video, "videos")]
        {
            let before = all.len();
            all.extend(text.match_indices(&pad.text).map(|(at, _)| (at, pad, kind)));
            let found = all.len() - before;
            let expected = media.iter().filter(|m| m.kind == kind).count();
            if found != expected {
                let cause = if found > expected {
                    "text of a message contains that string itself: remove it"
                } else {
                    "the chat template drops media that stand there: use a template for this model"
                };
                let counts = format!("{expected} {name}, but {found} {} in the rendered prompt", pad.text);
                return Err(ProcessorError::Prompt(format!("the conversation has {counts}; {cause}")));
            }
        }
        all.sort_by_key(|(at, _, _)| *at);
        Ok(all)
    }

    fn push_media(
        &self,
        index: usize,
        media: &Media,
        pad: u32,
        tokenizer: &Tokenizer,
        ids: &mut Vec<u32>,
        blocks: &mut Vec<Block>,
    ) -> Result<(), ProcessorError> {
        let about = |reason: String| ProcessorError::Prompt(format!("media {index}: {reason}"));
        let mut row = 0usize;
        let mut push_block = |ids: &mut Vec<u32>, [t, h, w]: [u32; 3], seconds_per_step: f32| {
            let m = self.merge_size;
            if [t, h, w].contains(&0) || !h.is_multiple_of(m) || !w.is_multiple_of(m) {
                return Err(about(format!("expected a grid of multiples of {m}, found {t} x {h} x {w}")));
            }
            let grid = [t, h / m, w / m];
            let len =
                grid.iter().try_fold(1usize, |len, n| len.checked_mul(*n as usize).filter(|len| *len <= MAX_TOKENS));
            let len = len.filter(|len| ids.len() + len <= MAX_TOKENS);
            let len = len.ok_or_else(|| about(format!("a grid of {t} x {h} x {w} makes the prompt too long")))?;
            blocks.push(Block {
                span: FeatureSpan { media: index, start: ids.len(), len, row },
                grid,
                seconds_per_step,
            });
            ids.resize(ids.len() + len, pad);
            row += len;
            Ok(())
        };

        if let (MediaKind::Video, Markers::Frames(prefix, fast)) = (media.kind, &self.markers) {
            let counted: u64 = media.patches.grid_thw.iter().map(|[t, _, _]| u64::from(*t)).sum();
            if counted != media.frames.len() as u64 {
                return Err(about(format!("expected a grid of {} frames, found {counted}", media.frames.len())));
            }
            for (frame, grid) in media.frames.iter().zip(media.frame_grids()) {
                if let Some(seconds) = frame.timestamp.filter(|seconds| !seconds.is_finite()) {
                    return Err(about(format!("expected a time stamp in seconds, found {seconds}")));
                }
                ids.extend(tokenizer.encode(&prefix.text(frame.timestamp))?);
                match (frame.kind, fast) {
                    (FrameKind::Slow, _) => push_block(ids, grid, 0.0)?,
                    (FrameKind::Fast, Some([start, end])) => {
                        ids.push(*start);
                        push_block(ids, grid, 0.0)?;
                        ids.push(*end);
                    }
                    (FrameKind::Fast, None) => return Err(about("fast frames, which this model does not have".into())),
                }
            }
            return Ok(());
        }
        let [grid] = media.patches.grid_thw[..] else {
            return Err(about(format!("expected one grid row, found {}", media.patches.grid_thw.len())));
        };
        match media.kind {
            MediaKind::Image if grid[0] != 1 => {
                Err(about(format!("expected a picture of one frame, found {}", grid[0])))
            }
            MediaKind::Image => push_block(ids, grid, 0.0),
            MediaKind::Video => {
                let wrong = || about(format!("expected a sampling rate above 0, found {:?}", media.sample_fps));
                push_block(ids, grid, seconds_per_grid(media).ok_or_else(wrong)?)
            }
        }
    }
}

/// Ceiling of a prompt's tokens; the longest context of the family has 131072.
const MAX_TOKENS: usize = 1 << 26;

/// `second_per_grid_t` of a Preview clip: the reciprocal of the real sampling rate, in f32 (spec §6.2). `None` when that is
/// no finite number above 0.
pub fn seconds_per_grid(media: &Media) -> Option<f32> {
    let seconds = (1.0 / media.sample_fps.unwrap_or(DEFAULT_FPS)) as f32;
    (seconds > 0.0 && seconds.is_finite()).then_some(seconds)
}
