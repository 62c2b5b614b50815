//! What a checkpoint's files say, and the text side of the models. No computation on weights.
//!
//! **In**: a checkpoint directory in Hugging Face layout (config.json, tokenizer.json, chat template,
//! preprocessor_config.json, generation_config.json, safetensors shards) or the same inside the program, a [`Conversation`] as the OpenAI and
//! transformers formats write it, and the processed media of that conversation. **Out**: a [`Prompt`]: token ids with
//! every media token in place, three-axis positions, and which rows of which media feed which tokens; named weights
//! as slices of a memory map ([`Checkpoint`]); and, on the way back, the parts of an answer ([`Answer`]).
//!
//! What it promises:
//!
//! * The checkpoint's own files win over constants; constants are defaults (`docs/spec/keye-vl-8b.md` §2).
//! * Variants are rows in a table of facts ([`Facts`]), not code paths of their own.
//! * A wrong or damaged file gives one error that names file, field or tensor, expected and found; sizes are checked
//!   before anything is allocated, and weights are mapped, not read.

mod checkpoint;
mod checkpoint_files;
mod claim;
mod config;
mod conversation;
mod dtype;
mod error;
mod expand;
mod facts;
mod few;
mod files;
mod frame_prefix;
mod generation_config;
mod indexer_config;
mod json_scan;
mod latent_config;
mod messages;
mod output;
mod packed;
mod positions;
mod preprocessor_config;
mod processor;
mod python_json;
mod safetensors_file;
mod template;
mod template_budget;
mod template_guard;
mod think_splitter;
mod think_tag;
mod tokenizer;
mod tokenizer_file;
mod tool_calls;
mod tool_prompt;
mod writer;

pub use checkpoint::{Checkpoint, DtypeTotal, StoredTensor};
pub use checkpoint_files::{CheckpointFiles, EmbeddedFiles};
pub use claim::{Claim, claim_dir};
pub use config::{ExpertsConfig, ModelConfig, TextConfig, VisionConfig};
pub use conversation::Conversation;
pub use dtype::Dtype;
pub use error::ProcessorError;
pub use expand::{FeatureSpan, seconds_per_grid};
pub use facts::{Facts, FrameMarkers, PositionRule, ProjectorNorm, Variant, VisionSpan};
pub use frame_prefix::FramePrefix;
pub use generation_config::GenerationConfig;
pub use indexer_config::{AttentionKind, IndexScorer, IndexerConfig};
pub use latent_config::{GroupConfig, LatentConfig, YarnConfig};
pub use output::{Answer, ThinkMode, parse_answer, parse_formed_answer, parse_opened_answer};
pub use packed::{PACKED_ALIGNMENT, PackedFormat, PackedTag};
pub use positions::{prompt_positions, sequential_positions};
pub use processor::{Overrides, Processor, Prompt};
pub use template::{ChatTemplate, TemplateOptions};
pub use think_splitter::{Part, ThinkSplitter};
pub use think_tag::{ThinkTag, Thinking};
pub use tokenizer::{StreamDecoder, Tokenizer};
pub use tool_calls::{ToolCall, ToolCallSplitter, ToolPiece};
pub use writer::{NewTensor, PackedTags, SafetensorsWriter, write_checkpoint, write_file, write_packed_checkpoint};
