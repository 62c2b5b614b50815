//! Checkpoints with random weights: the layout, size and speed of the real ones without their knowledge.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use keye_processor::{Dtype, NewTensor, write_checkpoint};

use crate::disk::free_bytes;
use crate::presets::Preset;

/// Elements of a shard, as transformers saves them.
const SHARD_BYTES: u64 = 5_000_000_000;
/// What json files and headers need, generously.
const EXTRA_BYTES: u64 = 4 << 20;
/// Standard deviation of weights (`initializer_range`), and of biases.
const WEIGHT_STD: f32 = 0.02;
const BIAS_STD: f32 = 0.002;
/// Entries of the table that random numbers choose from.
const TABLE: usize = 1 << TABLE_BITS;
const TABLE_BITS: usize = 12;

/// Writes the files and random weights of `preset` as the new directory `dir`.
///
/// Weights are `bf16`, `f16` or `f32`, normal with standard deviation 0.02, norms 1; the same `seed` gives the same bytes.
/// `progress` is told bytes written and bytes in all; when it returns false the work is given up.
/// All goes to `DIR.partial` first, which a killed run may leave and the next run takes away.
pub fn write(
    dir: &Path,
    preset: Preset,
    dtype: Dtype,
    seed: u64,
    progress: &mut dyn FnMut(u64, u64) -> bool,
) -> Result<()> {
    if !matches!(dtype, Dtype::Bf16 | Dtype::F16 | Dtype::F32) {
        bail!("random weights are written as bf16, f16 or f32, not as {dtype}");
    }
    let is_empty = |dir: &Path| fs::read_dir(dir).is_ok_and(|mut entries| entries.next().is_none());
    if dir.exists() && !is_empty(dir) {
        bail!("{} is there already and not an empty directory; choose another name or remove it", dir.display());
    }
    let tensors = preset.tensors(dtype)?;
    let total: u64 = tensors.iter().filter_map(NewTensor::bytes).sum();
    let free = free_bytes(dir).with_context(|| format!("cannot tell how much room there is for {}", dir.display()))?;
    if total + EXTRA_BYTES > free {
        let gigabytes = |bytes: u64| bytes as f64 / 1e9;
        bail!(
            "{} needs {:.1} GB, {} has room for {:.1} GB",
            preset.name(),
            gigabytes(total),
            dir.display(),
            gigabytes(free)
        );
    }
    let partial = PartialDir::create(dir)?;
    for (name, content) in preset.files(dtype) {
        let path = partial.path.join(name);
        fs::write(&path, format!("{content:#}\n")).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let mut done = 0;
    let mut generator = Generator::new(dtype, seed);
    write_checkpoint(&partial.path, &tensors, SHARD_BYTES, &mut |tensor, out| {
        generator.fill(tensor, &mut |bytes| {
            out.write_all(bytes)?;
            done += bytes.len() as u64;
            match progress(done, total) {
                true => Ok(()),
                false => Err(io::Error::other("given up")),
            }
        })
    })?;
    partial.keep(dir)
}

/// `DIR.partial`, removed when dropped before it is kept.
struct PartialDir {
    path: PathBuf,
}

impl PartialDir {
    fn create(dir: &Path) -> Result<Self> {
        let name = dir.file_name().with_context(|| format!("{}: expected the name of a directory", dir.display()))?;
        let mut name = name.to_owned();
        name.push(".partial");
        let partial = Self { path: dir.with_file_name(name) };
        partial.remove();
        fs::create_dir_all(&partial.path).with_context(|| format!("cannot create {}", partial.path.display()))?;
        if fs::read_dir(&partial.path)?.next().is_some() {
            let path = partial.path.clone();
            bail!("{} holds files that this program did not write; remove it", path.display());
        }
        Ok(partial)
    }

    /// Removes what a run writes, and the directory if nothing else is in it.
    fn remove(&self) {
        for entry in fs::read_dir(&self.path).into_iter().flatten().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let ours = name.ends_with(".json") || name.ends_with(".safetensors") || name.ends_with(".partial");
            if ours && entry.file_type().is_ok_and(|kind| kind.is_file()) {
                // What cannot be removed makes the next step fail with a message.
                let _ = fs::remove_file(entry.path());
            }
        }
        let _ = fs::remove_dir(&self.path);
    }

    fn keep(self, dir: &Path) -> Result<()> {
        fs::rename(&self.path, dir)
            .with_context(|| format!("cannot rename {} to {}", self.path.display(), dir.display()))
    }
}

impl Drop for PartialDir {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Fills tensors by drawing from a table of normal numbers.
struct Generator {
    dtype: Dtype,
    seed: u64,
    weights: Vec<[u8; 4]>,
    biases: Vec<[u8; 4]>,
    buffer: Vec<u8>,
}

impl Generator {
    const BUFFER: usize = 1 << 20;

    fn new(dtype: Dtype, seed: u64) -> Self {
        let table = |std: f32| normal_table().map(|x| encode(dtype, x * std)).collect();
        Self { dtype, seed, weights: table(WEIGHT_STD), biases: table(BIAS_STD), buffer: vec![0; Self::BUFFER] }
    }

    /// Hands out the bytes of `tensor` in pieces. They depend on seed, name and shape only.
    fn fill(&mut self, tensor: &NewTensor, write: &mut dyn FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        let size = self.dtype.size();
        let is_norm = tensor.name.contains("norm") && tensor.name.ends_with(".weight");
        let one = [encode(self.dtype, 1.0)];
        let table = match is_norm {
            true => &one[..],
            false if tensor.name.ends_with("bias") => &self.biases,
            false => &self.weights,
        };
        // FNV-1a of the name.
        let hash = tensor
            .name
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325, |hash: u64, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        let mut random = SplitMix(hash ^ self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut left = tensor.bytes().unwrap_or(0);
        while left > 0 {
            let piece = left.min(Self::BUFFER as u64) as usize;
            let buffer = &mut self.buffer[..piece];
            match size {
                2 => draw::<2>(table, &mut random, buffer),
                _ => draw::<4>(table, &mut random, buffer),
            }
            write(buffer)?;
            left -= piece as u64;
        }
        Ok(())
    }
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
        Dtype::Bf16 => rounded(bits, 16).to_le_bytes(),
        Dtype::F16 => {
            let (sign, magnitude) = ((bits >> 16) & 0x8000, bits & 0x7fff_ffff);
            // 2^-14 is the smallest normal half; what is below becomes 0. The exponent's bias falls from 127 to 15.
            let half = if magnitude < 0x3880_0000 { 0 } else { rounded(magnitude - 0x3800_0000, 13) };
            (sign | half).to_le_bytes()
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
