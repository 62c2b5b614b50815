//! The operations of latent attention and of grouped routing.

use super::{Random, STALE, STALE_STEPS, Suite, source, spoil};
use crate::{
    Backend, BackendError, CacheSpec, Dtype, GroupedRouting, KvDtype, LatentShape, Reference, SequenceRows,
    WeightSource,
};

/// Latent rows in two parts and queries of one sequence, each with its width.
struct Latent {
    spec: CacheSpec,
    shape: LatentShape,
    a: (usize, Vec<f32>),
    b: (usize, Vec<f32>),
    q: (usize, Vec<f32>),
}

impl Latent {
    fn random(random: &mut Random, [heads, rank, rope]: [usize; 3], dtype: KvDtype, tokens: usize) -> Self {
        let width = rank + rope;
        let mut values = |width: usize| (width, random.values(tokens * width, 1.5));
        Self {
            spec: CacheSpec { layers: 2, kv_heads: 0, head_dim: 0, dtype, index_dim: 0, latent_dim: width },
            shape: LatentShape { heads, value_dim: rank, scale: (width as f32).powf(-0.5) },
            a: values(rank),
            b: values(rope),
            q: values(heads * width),
        }
    }

    /// Runs steps of token ranges on block tables; returns the results of the first sequence, one after the other.
    fn run<B: Backend>(
        &self,
        b: &B,
        steps: &[Vec<(std::ops::Range<usize>, Vec<u32>)>],
    ) -> Result<Vec<f32>, BackendError> {
        let mut cache = b.cache(&self.spec, 6)?;
        let mut out = Vec::new();
        for step in steps {
            let (mut sequences, mut row) = (Vec::new(), 0);
            for (tokens, block_table) in step {
                let rows = row..row + tokens.len();
                row = rows.end;
                sequences.push(SequenceRows { rows, start: tokens.start, block_table: block_table.clone() });
            }
            let upload = |(width, values): &(usize, Vec<f32>)| {
                let rows = step.iter().flat_map(|(t, _)| &values[t.start * width..t.end * width]).copied();
                b.upload(row, *width, &rows.collect::<Vec<f32>>())
            };
            let plan = b.plan(&sequences)?;
            b.write_latent(&upload(&self.a)?, &upload(&self.b)?, &mut cache, 1, &plan)?;
            let attended = b.download(&b.latent_attention(&upload(&self.q)?, &cache, 1, &plan, self.shape)?)?;
            out.extend_from_slice(&attended[..step[0].0.len() * self.shape.heads * self.shape.value_dim]);
        }
        Ok(out)
    }
}

impl<B: Backend> Suite<'_, B> {
    pub(super) fn latent(&mut self) -> Result<(), BackendError> {
        self.latent_attention()?;
        self.pairs_and_heads()?;
        self.grouped_routing()?;
        self.stale_latent()
    }

    fn latent_attention(&mut self) -> Result<(), BackendError> {
        // Widths of the latent and its rotated part; the value is the first.
        for (heads, rank, rope, dtype, tokens) in [
            (5, 32, 8, KvDtype::F32, 200),
            (5, 32, 8, KvDtype::Bf16, 200),
            (33, 24, 6, KvDtype::F32, 70),
            (2, 512, 64, KvDtype::F32, 20),
        ] {
            let case = Latent::random(&mut self.random, [heads, rank, rope], dtype, tokens);
            let name = format!("latent_attention {heads} heads, {rank} + {rope}, {dtype:?}");
            let blocks = vec![5, 0, 3, 1];
            let whole = [vec![(0..tokens, blocks.clone())]];
            let found = case.run(self.backend, &whole)?;
            self.record(name.clone(), &found, &case.run(&Reference, &whole)?);
            // The same tokens in chunks, each beside another sequence that starts anew every time.
            let (mut steps, mut at) = (Vec::new(), 0);
            for len in [1, 18, 43, 1, 1, 70, 30, 36] {
                let end = tokens.min(at + len);
                if at < end {
                    steps.push(vec![(at..end, blocks.clone()), (0..7, vec![2])]);
                }
                at = end;
            }
            let chunked = case.run(self.backend, &steps)?;
            self.equal(format!("{name}: whole = chunks in a batch"), &found, &chunked);
        }
        Ok(())
    }

    /// As the suite's `stale_slots`, with latent rows.
    fn stale_latent(&mut self) -> Result<(), BackendError> {
        for dtype in [KvDtype::F32, KvDtype::Bf16, KvDtype::Int8] {
            let mut case = Latent::random(&mut self.random, [5, 32, 8], dtype, STALE.end);
            for (_, values) in [&mut case.a, &mut case.b] {
                spoil(values);
            }
            let steps = STALE_STEPS.map(|tokens| vec![(tokens, vec![5, 2])]);
            let clean = case.run(self.backend, &steps)?;
            let after = [&[vec![(STALE, vec![0, 0, 5, 2])]][..], &steps].concat();
            let found = case.run(self.backend, &after)?.split_off(STALE.len() * 5 * 32);
            self.equal(
                format!("latent_attention, {dtype:?}: blocks with NaN of others = fresh blocks"),
                &found,
                &clean,
            );
        }
        Ok(())
    }

    fn pairs_and_heads(&mut self) -> Result<(), BackendError> {
        let (rows, heads, stride, width) = (9, 3, 22, 6);
        let (x, angles) = (self.random.values(rows * heads * stride, 1.0), self.random.values(rows * width, 1.0));
        let found = pairs(self.backend, heads, [stride, width], &x, &angles)?;
        let expected = pairs(&Reference, heads, [stride, width], &x, &angles)?;
        self.record(format!("rope_pairs of {heads} heads' last {width} of {stride}"), &found, &expected);
        for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F8E4M3] {
            for (rows, heads, stride, input, out) in [(1, 3, 24, 16, 40), (7, 5, 130, 130, 25), (530, 2, 20, 3, 1)] {
                let x = self.random.values(rows * heads * stride, 1.0);
                let weights: Vec<WeightSource> =
                    (0..heads).map(|_| source(out, input, &self.random.values(out * input, 1.0), dtype)).collect();
                let name = format!("linear_heads {rows}x{heads}x{input}/{stride}x{out} {dtype:?}");
                let all = heads_product(self.backend, heads * stride, &x, &weights)?;
                self.record(name.clone(), &all, &heads_product(&Reference, heads * stride, &x, &weights)?);
                let mut one_by_one = Vec::new();
                for row in x.chunks_exact(heads * stride) {
                    one_by_one.extend(heads_product(self.backend, heads * stride, row, &weights)?);
                }
                self.equal(format!("{name}: rows together = one by one"), &all, &one_by_one);
            }
        }
        Ok(())
    }

    fn grouped_routing(&mut self) -> Result<(), BackendError> {
        let (rows, cols, experts) = (19, 72, 32);
        let x = self.random.values(rows * cols, 1.0);
        let router = source(experts, cols, &self.random.values(experts * cols, 0.3), Dtype::F32);
        let bias = source(1, experts, &self.random.values(experts, 0.2), Dtype::F32);
        for (groups, chosen_groups) in [(8, 4), (4, 1), (1, 1)] {
            let routing = GroupedRouting { count: 5, groups, chosen_groups, normalise: true, scale: 2.5 };
            let (chosen, weights) = grouped(self.backend, [rows, cols], &x, &router, &bias, routing)?;
            let (expected_chosen, expected_weights) = grouped(&Reference, [rows, cols], &x, &router, &bias, routing)?;
            let name = format!("route_grouped {chosen_groups} of {groups} groups");
            self.equal(format!("{name}: experts"), &chosen, &expected_chosen);
            self.record(format!("{name}: weights"), &weights, &expected_weights);
        }
        Ok(())
    }
}

/// Chosen experts, as numbers, and their weights.
fn grouped<B: Backend>(
    b: &B,
    [rows, cols]: [usize; 2],
    x: &[f32],
    router: &WeightSource,
    bias: &WeightSource,
    routing: GroupedRouting,
) -> Result<(Vec<f32>, Vec<f32>), BackendError> {
    let x = b.upload(rows, cols, x)?;
    let (chosen, weights) = b.route_grouped(&x, &b.load(router)?, &b.load(bias)?, routing)?;
    let chosen = b.download_index(&chosen)?.into_iter().map(|expert| expert as f32).collect();
    Ok((chosen, b.download(&weights)?))
}

fn pairs<B: Backend>(
    b: &B,
    heads: usize,
    [stride, width]: [usize; 2],
    x: &[f32],
    angles: &[f32],
) -> Result<Vec<f32>, BackendError> {
    let rows = angles.len() / width;
    let mut x = b.upload(rows, heads * stride, x)?;
    b.rope_pairs(&mut x, heads, &b.upload(rows, width, angles)?)?;
    b.download(&x)
}

fn heads_product<B: Backend>(
    b: &B,
    cols: usize,
    x: &[f32],
    weights: &[WeightSource],
) -> Result<Vec<f32>, BackendError> {
    let weights = weights.iter().map(|w| b.load(w)).collect::<Result<Vec<_>, _>>()?;
    b.download(&b.linear_heads(&b.upload(x.len() / cols, cols, x)?, &weights)?)
}
