//! Checkpoints with random weights: the layout, size and speed of the real ones without their knowledge.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;

use anyhow::{Result, bail};
use keye_backend::f32_to_bf16;
use keye_backend::packed::{TILE_ROWS, pack_rows, tile_bytes};
use keye_processor::{Dtype, NewTensor, PackedFormat, PackedTag, PackedTags, write_packed_checkpoint};

use crate::new_dir::NewDir;
use crate::presets::Sizes;
use crate::quantize::{packed_dtype, packed_layout, quantization_config, write_json};

/// Elements of a shard, as transformers saves them.
const SHARD_BYTES: u64 = 5_000_000_000;
/// Standard deviation of weights (`initializer_range`), and of biases.
const WEIGHT_STD: f32 = 0.02;
const BIAS_STD: f32 = 0.002;
/// Scale of all blocks of 8-bit weights: 448, the largest, is 4.5 standard deviations.
const FP8_SCALE: f32 = 2e-4;
/// Entries of the table that random numbers choose from.
const TABLE: usize = 1 << TABLE_BITS;
const TABLE_BITS: usize = 12;

/// Distinct tiles of 16 rows that random packed tensors are put together from.
const TILES: usize = 32;

/// Writes the files and random weights of `sizes` as the new directory `dir`.
///
/// Weights are `bf16`, `f16` or `f32`, or `f8_e4m3` in blocks where the published model's are, normal with standard deviation
/// 0.02, norms 1; the same `seed` gives the same bytes.
/// `progress` is told bytes written and bytes in all; when it returns false the work is given up.
/// All goes to `DIR.partial` first, which a killed run may leave and the next run takes away.
pub fn write(
    dir: &Path,
    sizes: impl Into<Sizes>,
    dtype: Dtype,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<()> {
    let sizes = sizes.into();
    if !sizes.preset.is_stored_as(dtype) {
        bail!(
            "random weights are written as bf16, f16 or f32 (fp8 where the model's are), {} not as {dtype}",
            sizes.preset.name()
        );
    }
    write_layout(dir, sizes, dtype, (sizes.tensors(dtype)?, PackedTags::new()), None, seed, progress)
}

/// As [`write()`], quantised to `to` as [`quantize`](crate::quantize::quantize) does it, tensors that inference does not use
/// left out; what is not packed is bf16.
///
/// Packed matrices are put together from a few random tiles, so that they are written as fast as the disk takes them: of
/// any more than 512 rows some are the same.
pub fn write_packed(
    dir: &Path,
    sizes: impl Into<Sizes>,
    to: PackedFormat,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<()> {
    let sizes = sizes.into();
    let layout = packed_layout(sizes.split_tensors(Dtype::Bf16)?, to)?;
    write_layout(dir, sizes, Dtype::Bf16, layout, Some(to), seed, progress)
}

/// Bytes of the tensors that [`write()`] (as bf16) or [`write_packed`] writes.
pub fn total_bytes(sizes: impl Into<Sizes>, packed: Option<PackedFormat>) -> Result<u64> {
    let sizes = sizes.into();
    match packed {
        Some(to) => quantized_bytes(sizes, Dtype::Bf16, to),
        None => Ok(sizes.tensors(Dtype::Bf16)?.iter().filter_map(NewTensor::bytes).sum()),
    }
}

/// Bytes of the tensors of a model of type `dtype` quantised to `to`.
pub fn quantized_bytes(sizes: Sizes, dtype: Dtype, to: PackedFormat) -> Result<u64> {
    Ok(packed_layout(sizes.split_tensors(dtype)?, to)?.0.iter().filter_map(NewTensor::bytes).sum())
}

fn write_layout(
    dir: &Path,
    sizes: Sizes,
    dtype: Dtype,
    (tensors, tags): (Vec<NewTensor>, PackedTags),
    packed: Option<PackedFormat>,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<()> {
    let total: u64 = tensors.iter().filter_map(NewTensor::bytes).sum();
    let new = NewDir::create(dir, sizes.preset.name(), total)?;
    for (name, mut content) in sizes.files(dtype) {
        if let (Some(to), "config.json") = (packed, name) {
            content["quantization_config"] = quantization_config(to);
        }
        write_json(&new.path.join(name), &content)?;
    }
    let mut done = 0;
    let mut generator = Generator::new(seed);
    write_packed_checkpoint(&new.path, &tensors, &tags, SHARD_BYTES, &mut |tensor, out| {
        generator.fill(tensor, tags.get(&tensor.name).copied(), &mut |bytes| {
            out.write_all(bytes)?;
            done += bytes.len() as u64;
            match progress(done, total) {
                true => Ok(()),
                false => Err(io::Error::other("given up")),
            }
        })
    })?;
    new.keep()
}

/// Fills tensors by drawing from a table of normal numbers.
struct Generator {
    seed: u64,
    /// Encoded weights and biases by type.
    tables: BTreeMap<Dtype, [Vec<[u8; 4]>; 2]>,
    buffer: Vec<u8>,
    /// Random tiles by format and columns.
    tiles: BTreeMap<(PackedFormat, usize), Vec<u8>>,
}

impl Generator {
    const BUFFER: usize = 1 << 20;

    fn new(seed: u64) -> Self {
        Self { seed, tables: BTreeMap::new(), buffer: vec![0; Self::BUFFER], tiles: BTreeMap::new() }
    }

    /// Hands out the bytes of `tensor` in pieces. They depend on seed, name and shape only.
    fn fill(
        &mut self,
        tensor: &NewTensor,
        tag: Option<PackedTag>,
        write: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let dtype = tensor.dtype;
        let is_norm = tensor.name.contains("norm") && tensor.name.ends_with(".weight");
        let [one, scale] = [1.0, FP8_SCALE].map(|value| [encode(dtype, value)]);
        let [weights, biases] = self.tables.entry(dtype).or_insert_with(|| {
            [WEIGHT_STD, BIAS_STD].map(|std| normal_table().map(|x| encode(dtype, x * std)).collect())
        });
        let table = match tensor.name.as_str() {
            _ if is_norm => &one[..],
            name if name.ends_with("bias") => biases,
            name if name.ends_with("_scale_inv") => &scale,
            _ => weights,
        };
        // FNV-1a of the name.
        let hash = tensor
            .name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut random = SplitMix(hash ^ self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        if let Some(tag) = tag {
            let tiles = self.tiles.entry((tag.format, tag.cols)).or_insert_with(|| random_tiles(tag, self.seed));
            let tile = tiles.len() / TILES;
            for _ in 0..tag.rows.div_ceil(TILE_ROWS) {
                let at = (random.next() as usize % TILES) * tile;
                write(&tiles[at..at + tile])?;
            }
            return Ok(());
        }
        let mut left = tensor.bytes().unwrap_or(0);
        while left > 0 {
            let piece = left.min(Self::BUFFER as u64) as usize;
            let buffer = &mut self.buffer[..piece];
            match dtype.size() {
                1 => draw::<1>(table, &mut random, buffer),
                2 => draw::<2>(table, &mut random, buffer),
                _ => draw::<4>(table, &mut random, buffer),
            }
            write(buffer)?;
            left -= piece as u64;
        }
        Ok(())
    }
}

/// [`TILES`] tiles of normal weights.
fn random_tiles(tag: PackedTag, seed: u64) -> Vec<u8> {
    let table: Vec<f32> = normal_table().map(|x| x * WEIGHT_STD).collect();
    let mut random = SplitMix(seed ^ tag.cols as u64);
    let rows = TILES * TILE_ROWS;
    let values: Vec<f32> = (0..rows * tag.cols).map(|_| table[random.next() as usize % TABLE]).collect();
    let dtype = packed_dtype(tag.format);
    let mut tiles = vec![0; tile_bytes(dtype, tag.cols).unwrap_or(0) * TILES];
    pack_rows(dtype, rows, tag.cols, &values, &mut tiles).expect("the table has finite numbers");
    tiles
}

/// Fills `out` with entries of `N` bytes; one random number gives four of them.
fn draw<const N: usize>(table: &[[u8; 4]], random: &mut SplitMix, out: &mut [u8]) {
    let mask = table.len() - 1;
    for four in out.chunks_mut(4 * N) {
        let mut bits = random.next() as usize;
        for element in four.chunks_mut(N) {
            element.copy_from_slice(&table[bits & mask][..N]);
            bits >>= TABLE_BITS;
        }
    }
}

/// Steele, Lea and Flood's generator: every 64-bit number once.
struct SplitMix(u64);

impl SplitMix {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let x = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

/// [`TABLE`] numbers with mean 0 and variance 1: Box and Muller's transform of a grid.
fn normal_table() -> impl Iterator<Item = f32> {
    const SIDE: usize = 1 << (TABLE_BITS / 2);
    let centre = |i: usize| (i as f32 + 0.5) / SIDE as f32;
    let point =
        move |i: usize| (-2.0 * centre(i / SIDE).ln()).sqrt() * (std::f32::consts::TAU * centre(i % SIDE)).cos();
    (0..TABLE).map(point)
}

/// Little-endian; 16-bit types use the first two bytes. Finite values within the range of the type.
fn encode(dtype: Dtype, x: f32) -> [u8; 4] {
    let bits = x.to_bits();
    // Rounds the low `shift` bits away, half to even.
    let rounded = |bits: u32, shift: u32| (bits + (1 << (shift - 1)) - 1 + ((bits >> shift) & 1)) >> shift;
    match dtype {
        Dtype::Bf16 => u32::from(f32_to_bf16(x)).to_le_bytes(),
        Dtype::F16 => {
            let (sign, magnitude) = ((bits >> 16) & 0x8000, bits & 0x7fff_ffff);
            // 2^-14 is the smallest normal half; what is below becomes 0. The exponent's bias falls from 127 to 15.
            let half = if magnitude < 0x3880_0000 { 0 } else { rounded(magnitude - 0x3800_0000, 13) };
            (sign | half).to_le_bytes()
        }
        Dtype::F8E4M3 => {
            let scaled = (x / FP8_SCALE).to_bits();
            let (sign, magnitude) = ((scaled >> 24) & 0x80, scaled & 0x7fff_ffff);
            // 2^-6 is the smallest normal; what is below becomes 0. The exponent's bias falls from 127 to 7.
            let byte = if magnitude < 0x3c80_0000 { 0 } else { rounded(magnitude - 0x3c00_0000, 20).min(0x7e) };
            (sign | byte).to_le_bytes()
        }
        _ => bits.to_le_bytes(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(dtype: Dtype, bytes: [u8; 4]) -> f32 {
        let bits = u32::from_le_bytes(bytes);
        match dtype {
            Dtype::Bf16 => f32::from_bits(bits << 16),
            Dtype::F16 => {
                let magnitude = (bits & 0x7fff) as f32;
                let exponent = (magnitude / 1024.0).floor();
                let value = (1.0 + (magnitude - exponent * 1024.0) / 1024.0) * (exponent - 15.0).exp2();
                if bits & 0x8000 == 0 { value } else { -value }
            }
            _ => f32::from_bits(bits),
        }
    }

    #[test]
    fn elements_are_encoded_to_the_nearest() {
        for (dtype, error) in [(Dtype::F32, 0.0), (Dtype::Bf16, 1.0 / 256.0), (Dtype::F16, 1.0 / 2048.0)] {
            for x in [1.0f32, -1.0, 0.02, -0.0537, 0.000_123, 1.999_99, -3.3] {
                let found = decode(dtype, encode(dtype, x));
                assert!((found - x).abs() <= x.abs() * error, "{dtype}: {x} became {found}");
            }
        }
        assert_eq!(encode(Dtype::Bf16, 1.0), [0x80, 0x3f, 0, 0]);
        assert_eq!(encode(Dtype::F16, 1.0), [0x00, 0x3c, 0, 0]);
    }

    #[test]
    fn the_table_is_normal() {
        let table: Vec<f32> = normal_table().collect();
        let mean = table.iter().sum::<f32>() / TABLE as f32;
        let variance = table.iter().map(|x| x * x).sum::<f32>() / TABLE as f32;
        let within = table.iter().filter(|x| x.abs() < 1.0).count() as f32 / TABLE as f32;
        assert!(mean.abs() < 1e-3 && (variance - 1.0).abs() < 0.02 && (within - 0.683).abs() < 0.02);
    }
}
