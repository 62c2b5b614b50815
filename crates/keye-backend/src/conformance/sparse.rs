//! The operations of experts and sparse attention: values against the reference, choices and row invariance bit for bit.

use super::{Random, STALE, STALE_STEPS, Suite, source, spoil};
use crate::{
    AttentionShape, Backend, BackendError, CacheSpec, Dtype, Expert, IndexShape, KvDtype, Reference, SequenceRows,
    WeightSource,
};

/// Experts `[gate, up, down]` with their router.
struct Mixture {
    router: WeightSource,
    experts: Vec<[WeightSource; 3]>,
    count: usize,
}

impl Mixture {
    /// Chosen experts, their weights, and the rows with what the experts add.
    fn run<B: Backend>(&self, b: &B, cols: usize, x: &[f32], y: &[f32]) -> Result<[Vec<f32>; 3], BackendError> {
        let rows = x.len() / cols;
        let tensor = b.upload(rows, cols, x)?;
        let mut out = b.upload(rows, cols, y)?;
        let (chosen, weights) = b.route(&tensor, &b.load(&self.router)?, self.count, true)?;
        let load = |[gate, up, down]: &[WeightSource; 3]| {
            Ok(Expert { gate: b.load(gate)?, up: b.load(up)?, down: b.load(down)? })
        };
        let experts = self.experts.iter().map(load).collect::<Result<Vec<_>, BackendError>>()?;
        b.add_experts(&tensor, &experts, &chosen, &weights, &mut out)?;
        let chosen = b.download_index(&chosen)?.into_iter().map(|expert| expert as f32).collect();
        Ok([chosen, b.download(&weights)?, b.download(&out)?])
    }
}

/// Keys, values, index keys and queries of one sequence.
struct Sparse {
    spec: CacheSpec,
    shape: AttentionShape,
    index: IndexShape,
    /// Queries, keys, values, index queries, index keys, weights of index heads; each with its width.
    parts: [(usize, Vec<f32>); 6],
}

impl Sparse {
    fn random(
        random: &mut Random,
        [heads, kv_heads, hd]: [usize; 3],
        dtype: KvDtype,
        top_k: usize,
        tokens: usize,
    ) -> Self {
        let (index_heads, index_dim) = (3, 24);
        let widths = [heads * hd, kv_heads * hd, kv_heads * hd, index_heads * index_dim, index_dim, index_heads];
        Self {
            spec: CacheSpec { layers: 2, kv_heads, head_dim: hd, dtype, index_dim, latent_dim: 0 },
            shape: AttentionShape { heads, kv_heads, head_dim: hd, scale: (hd as f32).powf(-0.5) },
            index: IndexShape { heads: index_heads, head_dim: index_dim, top_k, scale: (index_dim as f32).powf(-0.5) },
            parts: widths.map(|width| (width, random.values(tokens * width, 1.0))),
        }
    }

    /// Runs steps of token ranges on block tables; returns positions, sparse and dense attention of the first sequence.
    fn run<B: Backend>(
        &self,
        b: &B,
        steps: &[Vec<(std::ops::Range<usize>, Vec<u32>)>],
    ) -> Result<[Vec<f32>; 3], BackendError> {
        let mut cache = b.cache(&self.spec, 6)?;
        let mut out = [const { Vec::new() }; 3];
        for step in steps {
            let (mut sequences, mut row) = (Vec::new(), 0);
            for (tokens, block_table) in step {
                let rows = row..row + tokens.len();
                row = rows.end;
                sequences.push(SequenceRows { rows, start: tokens.start, block_table: block_table.clone() });
            }
            let upload = |part: usize| {
                let (width, values) = &self.parts[part];
                let rows = step.iter().flat_map(|(t, _)| &values[t.start * width..t.end * width]).copied();
                b.upload(row, *width, &rows.collect::<Vec<f32>>())
            };
            let plan = b.plan(&sequences)?;
            let mut q = upload(0)?;
            // Angles of no rotation: cosines of one, sines of zero.
            let hd = self.shape.head_dim;
            let angles: Vec<f32> = (0..row * hd).map(|i| if i % hd < hd / 2 { 1.0 } else { 0.0 }).collect();
            let angles = b.upload(row, hd, &angles)?;
            b.norm_rope_write(&mut q, upload(1)?, upload(2)?, None, &angles, &mut cache, 1, &plan)?;
            b.write_index_keys(&upload(4)?, &mut cache, 1, &plan)?;
            let selected = b.select(&upload(3)?, &upload(5)?, &cache, 1, &plan, self.index)?;
            let sparse = b.download(&b.sparse_attention(&q, &cache, 1, &plan, self.shape, &selected)?)?;
            let dense = b.download(&b.paged_attention(&q, &cache, 1, &plan, self.shape)?)?;
            let selected = b.download_index(&selected)?.into_iter().map(|position| position as f32).collect();
            let rows = step[0].0.len();
            for (out, values) in out.iter_mut().zip([selected, sparse, dense]) {
                out.extend_from_slice(&values[..values.len() / row * rows]);
            }
        }
        Ok(out)
    }
}

impl<B: Backend> Suite<'_, B> {
    pub(super) fn experts(&mut self) -> Result<(), BackendError> {
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::Int8, Dtype::Int4] {
            let (rows, cols, width, experts, count) = (37, 72, 40, 8, 3);
            let mut random = |rows: usize, cols: usize, scale: f32, dtype: Dtype| {
                source(rows, cols, &self.random.values(rows * cols, scale), dtype)
            };
            let mixture = Mixture {
                router: random(experts, cols, 0.3, Dtype::F32),
                experts: (0..experts)
                    .map(|_| [(width, cols), (width, cols), (cols, width)].map(|(r, c)| random(r, c, 0.2, dtype)))
                    .collect(),
                count,
            };
            let [x, y] = [1.0, 1.0].map(|scale| self.random.values(rows * cols, scale));
            let [chosen, weights, out] = mixture.run(self.backend, cols, &x, &y)?;
            let [expected_chosen, expected_weights, expected] = mixture.run(&Reference, cols, &x, &y)?;
            self.equal(format!("route {dtype:?}: experts"), &chosen, &expected_chosen);
            self.record(format!("route {dtype:?}: weights"), &weights, &expected_weights);
            self.record(format!("add_experts {dtype:?}"), &out, &expected);
            if self.small {
                continue;
            }
            let mut one_by_one = [const { Vec::new() }; 3];
            for (x, y) in x.chunks_exact(cols).zip(y.chunks_exact(cols)) {
                for (all, row) in one_by_one.iter_mut().zip(mixture.run(self.backend, cols, x, y)?) {
                    all.extend(row);
                }
            }
            for ((all, alone), what) in
                [&chosen, &weights, &out].into_iter().zip(&one_by_one).zip(["experts", "weights", "sums"])
            {
                self.equal(format!("mixture {dtype:?}: {what} of rows together = one by one"), all, alone);
            }
        }
        Ok(())
    }

    pub(super) fn fp8_rows(&mut self) -> Result<(), BackendError> {
        for (rows, width) in [(1, 32), (33, 64), (5, 128)] {
            let (values, b) = (self.random.values(rows * 3 * width, 2.0), self.backend);
            let run = |rows: usize, values: &[f32]| {
                let mut found = b.upload(rows, 3 * width, values)?;
                b.round_to_fp8(&mut found, width)?;
                b.download(&found)
            };
            let found = run(rows, &values)?;
            let mut expected = Reference.upload(rows, 3 * width, &values)?;
            Reference.round_to_fp8(&mut expected, width)?;
            self.equal(format!("round_to_fp8 {rows} x 3 x {width}"), &found, &Reference.download(&expected)?);
            let mut alone = Vec::new();
            for row in values.chunks_exact(3 * width) {
                alone.extend(run(1, row)?);
            }
            self.equal(format!("round_to_fp8 {rows} x 3 x {width}: rows together = one by one"), &found, &alone);
        }
        Ok(())
    }

    pub(super) fn sparse_attention(&mut self) -> Result<(), BackendError> {
        let tokens = 200;
        for (heads, kv_heads, hd, dtype) in
            [(4, 2, 32, KvDtype::F32), (3, 1, 16, KvDtype::F32), (4, 2, 32, KvDtype::Bf16), (4, 2, 40, KvDtype::Int8)]
        {
            let all: &[usize] = if self.small { &[70] } else { &[16, 70, tokens] };
            for &top_k in all {
                let case = Sparse::random(&mut self.random, [heads, kv_heads, hd], dtype, top_k, tokens);
                let name = format!("sparse {heads}/{kv_heads} heads of {hd}, {dtype:?}, top {top_k}");
                let blocks = vec![5, 0, 3, 1];
                let whole = [vec![(0..tokens, blocks.clone())]];
                let [selected, sparse, dense] = case.run(self.backend, &whole)?;
                let [expected_selected, expected, _] = case.run(&Reference, &whole)?;
                self.equal(format!("{name}: positions"), &selected, &expected_selected);
                self.record(format!("{name}: attention"), &sparse, &expected);
                let all = top_k.min(tokens) * heads * hd;
                self.equal(format!("{name}: everything selected = dense"), &sparse[..all], &dense[..all]);
                // The same tokens in chunks, each beside another sequence that starts anew every time.
                let (mut steps, mut at) = (Vec::new(), 0);
                for len in [1, 62, 1, 1, 70, 30, 35] {
                    steps.push(vec![(at..at + len, blocks.clone()), (0..7, vec![2])]);
                    at += len;
                }
                let [chunked_selected, chunked, _] = case.run(self.backend, &steps)?;
                self.equal(format!("{name}: positions, whole = chunks in a batch"), &selected, &chunked_selected);
                self.equal(format!("{name}: attention, whole = chunks in a batch"), &sparse, &chunked);
            }
        }
        Ok(())
    }

    /// As the suite's `stale_slots`, with index keys.
    pub(super) fn stale_sparse(&mut self) -> Result<(), BackendError> {
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
            let top_k = 16;
            let mut case = Sparse::random(&mut self.random, [4, 2, 32], dtype, top_k, STALE.end);
            for part in [1, 2, 4] {
                spoil(&mut case.parts[part].1);
            }
            let steps = STALE_STEPS.map(|tokens| vec![(tokens, vec![5, 2])]);
            let clean = case.run(self.backend, &steps)?;
            let after = [&[vec![(STALE, vec![0, 0, 5, 2])]][..], &steps].concat();
            let found = case.run(self.backend, &after)?;
            let widths = [top_k, 4 * 32, 4 * 32];
            for (((found, clean), width), what) in
                found.iter().zip(&clean).zip(widths).zip(["positions", "sparse attention", "attention"])
            {
                let name = format!("{what} beside index keys, {dtype:?}: blocks with NaN of others = fresh blocks");
                self.equal(name, &found[STALE.len() * width..], clean);
            }
        }
        Ok(())
    }
}
