//! Products of rows with weights, and mixtures of experts.

use std::sync::Arc;

use super::blas::{Operands, Shape};
use super::device::{Arg, Device, Grid, Memory, ProductArg};
use super::tensor::{Form, Index, Tensor, Weight};
use super::{Cuda, Products};
use crate::{Activation, BackendError, Expert};

/// What is done with a result, as in common.cuh.
#[derive(Debug, Clone, Copy)]
pub(super) enum Epilogue {
    Store = 0,
    GeluTanh = 1,
    GeluErf = 2,
    Add = 3,
    Gate = 4,
}

impl From<Activation> for Epilogue {
    fn from(activation: Activation) -> Self {
        match activation {
            Activation::None => Self::Store,
            Activation::GeluTanh => Self::GeluTanh,
            Activation::GeluErf => Self::GeluErf,
        }
    }
}

/// Most slots for the kernels that keep a weight's tile for 8 slots, and for those that keep it for 32.
const FEW: usize = 8;
const SOME: usize = 64;
/// Rows from which on cuBLASLt is asked.
const MANY: usize = SOME + 1;

/// A kernel for products: its slots and outputs of a block, its shared memory.
struct Kernel {
    name: &'static str,
    slots: usize,
    outputs: usize,
    shared: usize,
}

/// The kernel for a weight's form and a number of slots.
fn kernel(products: Products, form: Form, slots: usize) -> Kernel {
    let sliced = |few, some| match slots <= FEW {
        true => Kernel { name: few, slots: 8, outputs: 16, shared: 0 },
        false => Kernel { name: some, slots: 32, outputs: 32, shared: 0 },
    };
    let packed =
        |name, codes: usize| Kernel { name, slots: 128, outputs: 64, shared: 3 * (4 * (codes + 64) + 128 * (64 + 16)) };
    match (form, products, slots <= SOME) {
        (Form::F32 | Form::Wide, ..) => Kernel { name: "product_f32", slots: 64, outputs: 64, shared: 0 },
        (Form::Bf16, Products::F32, _) => Kernel { name: "product_f32_bf16", slots: 64, outputs: 64, shared: 0 },
        (Form::Bf16, _, true) => sliced("product_bf16_few", "product_bf16_some"),
        (Form::Bf16, _, false) => {
            Kernel { name: "product_bf16_many", slots: 128, outputs: 128, shared: 4 * 2 * 128 * 64 }
        }
        (Form::Fp8, _, true) => sliced("product_fp8_few", "product_fp8_some"),
        (Form::Fp8, _, false) => {
            Kernel { name: "product_fp8_many", slots: 128, outputs: 64, shared: 4 * (64 * 32 + 128 * 64) }
        }
        (Form::Int8, _, true) => sliced("product_int8_few", "product_int8_some"),
        (Form::Int8, _, false) => packed("product_int8_many", 1024),
        (Form::Int4, _, true) => sliced("product_int4_few", "product_int4_some"),
        (Form::Int4, _, false) => packed("product_int4_many", 512),
    }
}

/// Slots of a mixture, sorted by expert.
struct Sorted {
    /// Slot of each place, the row of it.
    order: Memory,
    rows: Memory,
    tiles: Memory,
    /// Most slots of a tile.
    size: usize,
    /// Tiles that there are at most.
    most: usize,
}

impl Cuda {
    /// `y = epilogue(x w^T + bias)`.
    pub(super) fn product(
        &self,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Weight>,
        y: &mut Tensor,
        epilogue: Epilogue,
    ) -> Result<(), BackendError> {
        assert_eq!((x.cols, y.rows, y.cols), (weight.cols, x.rows, weight.rows), "input features, rows, outputs");
        if self.library_product(x, weight, bias, y, epilogue)? {
            return Ok(());
        }
        let kernel = kernel(self.products, weight.form, x.rows);
        let tiles = x.rows.div_ceil(kernel.slots);
        y.change();
        let product = ProductArg {
            weight: weight.memory.address(),
            bias: bias.map_or(0, |bias| {
                assert_eq!(bias.cols, weight.rows, "outputs");
                bias.vector();
                bias.memory.address()
            }),
            y: y.memory.address(),
            m: x.rows as u32,
            ..Default::default()
        };
        self.launch_product(&kernel, product, x, weight, tiles, epilogue)
    }

    /// Leaves a large bf16 product to cuBLASLt, where that was chosen.
    fn library_product(
        &self,
        x: &Tensor,
        weight: &Weight,
        bias: Option<&Weight>,
        y: &mut Tensor,
        epilogue: Epilogue,
    ) -> Result<bool, BackendError> {
        let Some(gpu) = self.device.gpu() else { return Ok(false) };
        let wanted = gpu.has_library() && self.products == Products::Bf16 && weight.form == Form::Bf16;
        if !wanted || x.rows < MANY {
            return Ok(false);
        }
        let narrow = x.narrow(&self.device)?;
        // Columns behind the last are zeros in both.
        let shape = Shape { m: x.rows, n: weight.rows, k: weight.stride, stride: weight.stride };
        let at = |d: &Memory| Operands {
            x: narrow.address(),
            weight: weight.memory.address(),
            d: d.address(),
            workspace: 0,
        };
        y.change();
        match (epilogue, bias) {
            (Epilogue::Store, None) => gpu.library_product(shape, at(&y.memory), false)?,
            (Epilogue::Add, None) => gpu.library_product(shape, at(&y.memory), true)?,
            _ => {
                let z = self.device.allocate("activations", y.bytes())?;
                gpu.library_product(shape, at(&z), false)?;
                let bias = bias.map_or(Arg::Address(0), Weight::vector);
                let args = [z.arg(), bias, y.memory.arg(), Arg::U32(y.cols as u32), Arg::U32(epilogue as u32)];
                self.device.launch("finish_rows", Grid::of(y.rows, 1, 256), &args)?;
            }
        }
        Ok(true)
    }

    /// Fills in what every product has and launches it; `x` and `weight` give form and shape.
    fn launch_product(
        &self,
        kernel: &Kernel,
        product: ProductArg,
        x: &Tensor,
        weight: &Weight,
        tiles: usize,
        epilogue: Epilogue,
    ) -> Result<(), BackendError> {
        let mut product = ProductArg {
            n: weight.rows as u32,
            k: weight.cols as u32,
            w_stride: weight.stride as u32,
            kind: epilogue as u32,
            w_block: weight.block as u32,
            ..product
        };
        // Held until the launch: freeing is ordered behind it.
        let (narrow, quantized, wide);
        match weight.form {
            Form::F32 => (product.x, product.x_stride) = (x.memory.address(), x.cols as u32),
            Form::Bf16 if self.products == Products::F32 => {
                (product.x, product.x_stride) = (x.memory.address(), x.cols as u32);
            }
            Form::Wide => {
                wide = x.wide(&self.device)?;
                (product.x, product.x_stride) = (wide.address(), x.cols as u32);
            }
            Form::Bf16 | Form::Fp8 => {
                narrow = x.narrow(&self.device)?;
                (product.x, product.x_stride) = (narrow.address(), x.narrow_stride() as u32);
            }
            Form::Int8 | Form::Int4 => {
                quantized = x.quantized(&self.device)?;
                (product.x, product.x_stride) = (quantized.codes.address(), quantized.stride as u32);
                product.x_scales = quantized.scales.address();
                product.x_sums = quantized.sums.address();
            }
        }
        let grid = Grid::of(weight.rows.div_ceil(kernel.outputs), tiles, 256).shared(kernel.shared);
        self.device.launch(kernel.name, grid, &[Arg::Product(product)])
    }

    pub(super) fn route_rows(
        &self,
        x: &Tensor,
        router: &Weight,
        count: usize,
        normalise: bool,
    ) -> Result<(Index, Tensor), BackendError> {
        let experts = router.rows;
        assert!(count <= experts, "experts to choose from");
        let mut logits = Tensor::room(&self.device, x.rows, experts)?;
        self.product(x, router, None, &mut logits, Epilogue::Store)?;
        let scratch = Tensor::room(&self.device, x.rows, experts)?;
        let chosen = self.device.allocate("activations", x.rows * count * 4)?;
        let weights = Tensor::room(&self.device, x.rows, count)?;
        let args = [
            logits.memory.arg(),
            scratch.memory.arg(),
            chosen.arg(),
            weights.memory.arg(),
            Arg::U32(x.rows as u32),
            Arg::U32(experts as u32),
            Arg::U32(count as u32),
            Arg::U32(u32::from(normalise)),
        ];
        self.device.launch("route_rows", Grid::of(x.rows.div_ceil(8), 1, 256), &args)?;
        Ok((Index { memory: chosen, len: x.rows * count }, weights))
    }

    /// All experts of a step in three grouped products; nothing comes back to the host in between.
    pub(super) fn experts(
        &self,
        x: &Tensor,
        experts: &[Expert<Weight>],
        chosen: &Index,
        weights: &Tensor,
        y: &mut Tensor,
    ) -> Result<(), BackendError> {
        let (per_row, slots) = (weights.cols, chosen.len);
        assert_eq!(slots, x.rows * per_row, "experts of every row");
        let Some(first) = experts.first().filter(|_| slots > 0) else { return Ok(()) };
        let device = &self.device;
        let (width, cols) = (first.gate.rows, first.down.rows);
        assert_eq!((first.gate.cols, first.down.cols, y.cols), (x.cols, width, cols), "an expert's shape");
        // How full tiles are decides on the kernel; no result depends on it.
        let filling = slots / experts.len();
        let table = |of: fn(&Expert<Weight>) -> &Weight| {
            let model = of(first);
            let layout = |weight: &Weight| (weight.rows, weight.cols, weight.stride, weight.block, weight.form);
            if let Some(other) = experts.iter().map(of).find(|weight| layout(weight) != layout(model)) {
                return Err(BackendError::Setting(format!(
                    "experts of one layer have to be of one shape and type on a GPU, found {} x {} of {:?} beside {} x {} of \
                     {:?}; use the CPU",
                    other.rows, other.cols, other.form, model.rows, model.cols, model.form
                )));
            }
            let addresses = experts.iter().flat_map(|expert| of(expert).memory.address().to_le_bytes());
            device.upload("experts", &addresses.collect::<Vec<u8>>())
        };
        let sort = |kernel: &Kernel| sort(device, chosen, per_row, experts.len(), kernel.slots);
        let mut sorted = sort(&kernel(self.products, first.gate.form, filling))?;
        let mut h = Tensor::room(device, slots, width)?;
        let results = Tensor::room(device, slots, cols)?;
        for (of, epilogue) in
            [((|e| &e.gate) as fn(&Expert<Weight>) -> &Weight, Epilogue::Store), (|e| &e.up, Epilogue::Gate)]
        {
            let weight = of(first);
            let kernel = kernel(self.products, weight.form, filling);
            if sorted.size != kernel.slots {
                sorted = sort(&kernel)?;
            }
            let table = table(of)?;
            let product = ProductArg {
                table: table.address(),
                tiles: sorted.tiles.address(),
                x_rows: sorted.rows.address(),
                y_rows: sorted.order.address(),
                y: h.memory.address(),
                ..Default::default()
            };
            h.change();
            self.launch_product(&kernel, product, x, weight, sorted.most, epilogue)?;
        }
        let kernel = kernel(self.products, first.down.form, filling);
        if sorted.size != kernel.slots {
            sorted = sort(&kernel)?;
        }
        let table = table(|e| &e.down)?;
        let product = ProductArg {
            table: table.address(),
            tiles: sorted.tiles.address(),
            x_rows: sorted.order.address(),
            y_rows: sorted.order.address(),
            y: results.memory.address(),
            ..Default::default()
        };
        self.launch_product(&kernel, product, &h, &first.down, sorted.most, Epilogue::Store)?;
        let args =
            [results.memory.arg(), weights.memory.arg(), y.change(), Arg::U32(cols as u32), Arg::U32(per_row as u32)];
        device.launch("combine_experts", Grid::of(x.rows, 1, 256), &args)
    }
}

/// Sorts the slots of a mixture by expert, on the device.
fn sort(
    device: &Arc<Device>,
    chosen: &Index,
    per_row: usize,
    experts: usize,
    size: usize,
) -> Result<Sorted, BackendError> {
    let slots = chosen.len;
    // Each expert that is chosen has at most one tile that is not full.
    let most = slots / size + experts.min(slots);
    let room = |count: usize| device.allocate("experts", count * 4);
    let (counts, sorted) =
        (room(experts)?, Sorted { order: room(slots)?, rows: room(slots)?, tiles: room(3 * most)?, size, most });
    let args = [
        chosen.memory.arg(),
        Arg::U32(slots as u32),
        Arg::U32(per_row as u32),
        Arg::U32(experts as u32),
        Arg::U32(size as u32),
        Arg::U32(most as u32),
        counts.arg(),
        sorted.order.arg(),
        sorted.rows.arg(),
        sorted.tiles.arg(),
    ];
    device.launch("sort_slots", Grid::of(1, 1, 256), &args)?;
    Ok(sorted)
}
