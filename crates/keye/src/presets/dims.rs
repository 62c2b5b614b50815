//! The sizes in which the presets differ.

/// The dimensions in which the presets differ (spec §2, §3).
pub(super) struct Dims {
    pub(super) hidden: usize,
    pub(super) intermediate: usize,
    pub(super) layers: usize,
    pub(super) heads: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) vocab: usize,
    pub(super) mrope_section: [usize; 3],
    pub(super) vision_hidden: usize,
    pub(super) vision_intermediate: usize,
    pub(super) vision_layers: usize,
    pub(super) vision_heads: usize,
    /// Rows of the table that inference does not use.
    pub(super) packing_positions: usize,
    pub(super) image_max_pixels: u64,
    /// Experts, of them for a token, width of each.
    pub(super) experts: Option<[usize; 3]>,
    /// Heads of the indexer, width of each, keys that are selected.
    pub(super) indexer: Option<[usize; 3]>,
    /// The id of `<|endoftext|>`, the first added token; others keep their distance from it.
    pub(super) first_added: usize,
}

pub(super) const REAL: Dims = Dims {
    hidden: 4096,
    intermediate: 12288,
    layers: 36,
    heads: 32,
    kv_heads: 8,
    head_dim: 128,
    vocab: 151_936,
    mrope_section: [16, 24, 24],
    vision_hidden: 1152,
    vision_intermediate: 4304,
    vision_layers: 27,
    vision_heads: 16,
    packing_positions: 32_768,
    image_max_pixels: 1_003_520,
    experts: None,
    indexer: None,
    first_added: 151_643,
};

/// Spec of 2.0, §2.
pub(super) const REAL_2: Dims = Dims {
    hidden: 2048,
    intermediate: 6144,
    layers: 48,
    kv_heads: 4,
    image_max_pixels: 20_480 * 784,
    experts: Some([128, 8, 768]),
    indexer: Some([16, 64, 2048]),
    ..REAL
};

pub(super) const TINY: Dims = Dims {
    hidden: 64,
    intermediate: 144,
    layers: 4,
    heads: 4,
    kv_heads: 2,
    head_dim: 32,
    vocab: 960,
    mrope_section: [4, 6, 6],
    vision_hidden: 64,
    vision_intermediate: 120,
    vision_layers: 3,
    vision_heads: 4,
    packing_positions: 96,
    image_max_pixels: 37_632,
    experts: None,
    indexer: None,
    first_added: 672,
};

pub(super) const TINY_2: Dims = Dims {
    layers: 3,
    head_dim: 64,
    mrope_section: [8, 12, 12],
    experts: Some([8, 3, 40]),
    indexer: Some([4, 32, 16]),
    ..TINY
};

pub(super) const REAL_671B: Dims = Dims {
    hidden: 7168,
    intermediate: 18_432,
    layers: 61,
    heads: 128,
    kv_heads: 128,
    vocab: 129_280,
    first_added: 128_815,
    ..REAL
};

pub(super) const TINY_671B: Dims = Dims { kv_heads: 4, ..TINY };
