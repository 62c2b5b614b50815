//! Memory and launches, on a GPU or (in tests) on kernels that a C++ compiler made for the CPU.

use std::ffi::c_void;
use std::sync::Arc;

use super::gpu::Gpu;
use crate::BackendError;

/// Where kernels run.
pub(super) enum Device {
    Gpu(Box<Gpu>),
    #[cfg(feature = "cuda-emulator")]
    Emulator(super::emulator::Emulator),
}

/// Memory of a device; freed when it is dropped, after what was launched before.
pub(super) struct Memory {
    device: Arc<Device>,
    address: u64,
    bytes: usize,
}

/// Operands of a product, as in common.cuh. Addresses of the device; zero: none.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ProductArg {
    pub x: u64,
    pub weight: u64,
    pub table: u64,
    pub tiles: u64,
    pub x_rows: u64,
    pub y_rows: u64,
    pub bias: u64,
    pub y: u64,
    pub m: u32,
    pub n: u32,
    pub k: u32,
    pub x_stride: u32,
    pub w_stride: u32,
    pub kind: u32,
    pub w_block: u32,
    pub x_scales: u64,
    pub x_sums: u64,
}

/// Operands of an attention, as in attention.cu.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct AttentionArg {
    pub q: u64,
    pub out: u64,
    pub keys: u64,
    pub values: u64,
    pub tables: u64,
    pub selected: u64,
    pub work: u64,
    pub partials: u64,
    pub key_scales: u64,
    pub value_scales: u64,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub kv_stride: u32,
    pub top_k: u32,
    pub growth: u32,
    pub scale: f32,
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(super) enum Arg {
    Address(u64),
    U32(u32),
    U64(u64),
    F32(f32),
    Product(ProductArg),
    Attention(AttentionArg),
}

impl Arg {
    fn pointer(&self) -> *mut c_void {
        match self {
            Self::Address(value) | Self::U64(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::U32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::F32(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Product(value) => std::ptr::from_ref(value).cast_mut().cast(),
            Self::Attention(value) => std::ptr::from_ref(value).cast_mut().cast(),
        }
    }

    #[cfg(feature = "cuda-emulator")]
    fn size(&self) -> usize {
        match self {
            Self::Address(value) | Self::U64(value) => size_of_val(value),
            Self::U32(value) => size_of_val(value),
            Self::F32(value) => size_of_val(value),
            Self::Product(value) => size_of_val(value),
            Self::Attention(value) => size_of_val(value),
        }
    }
}

/// Blocks of the second and third dimension of a grid.
pub(super) const MOST_BLOCKS: u32 = 65_535;

/// Blocks, threads of a block, bytes of dynamic shared memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Grid {
    pub blocks: [u32; 3],
    pub threads: u32,
    pub shared: u32,
}

impl Grid {
    /// `x` by `y` blocks without dynamic shared memory.
    pub fn of(x: usize, y: usize, threads: u32) -> Self {
        Self { blocks: [x as u32, y as u32, 1], threads, shared: 0 }
    }

    pub fn shared(self, bytes: usize) -> Self {
        Self { shared: bytes as u32, ..self }
    }
}

impl Device {
    /// The GPU, where it is one.
    pub fn gpu(&self) -> Option<&Gpu> {
        match self {
            Self::Gpu(gpu) => Some(gpu),
            #[cfg(feature = "cuda-emulator")]
            Self::Emulator(_) => None,
        }
    }

    pub fn allocate(self: &Arc<Self>, what: &str, bytes: usize) -> Result<Memory, BackendError> {
        // No address is zero, also where nothing is stored.
        let bytes = bytes.max(16).next_multiple_of(16);
        let address = match &**self {
            Self::Gpu(gpu) => gpu.allocate(bytes)?,
            #[cfg(feature = "cuda-emulator")]
            Self::Emulator(emulator) => Some(emulator.allocate(bytes)),
        };
        let address = address.ok_or_else(|| BackendError::Memory {
            what: what.into(),
            bytes: bytes as u64,
            remedy: "use a smaller model, a quantised one, or fewer tokens at a time",
        })?;
        Ok(Memory { device: Arc::clone(self), address, bytes })
    }

    pub fn zeros(self: &Arc<Self>, what: &str, bytes: usize) -> Result<Memory, BackendError> {
        let memory = self.allocate(what, bytes)?;
        self.clear(&memory)?;
        Ok(memory)
    }

    /// Sets all to zero.
    pub fn clear(&self, memory: &Memory) -> Result<(), BackendError> {
        match self {
            Self::Gpu(gpu) => gpu.zero(memory.address, memory.bytes),
            #[cfg(feature = "cuda-emulator")]
            Self::Emulator(emulator) => {
                emulator.zero(memory.address, memory.bytes);
                Ok(())
            }
        }
    }

    /// A copy of host bytes.
    pub fn upload(self: &Arc<Self>, what: &str, bytes: &[u8]) -> Result<Memory, BackendError> {
        let memory = self.allocate(what, bytes.len())?;
        self.write(&memory, 0, bytes)?;
        Ok(memory)
    }

    /// Writes host bytes from byte `at` on.
    pub fn write(&self, memory: &Memory, at: usize, bytes: &[u8]) -> Result<(), BackendError> {
        assert!(at + bytes.len() <= memory.bytes, "inside the memory");
        let address = memory.address + at as u64;
        match self {
            Self::Gpu(gpu) => gpu.upload(address, bytes),
            #[cfg(feature = "cuda-emulator")]
            Self::Emulator(emulator) => {
                emulator.upload(address, bytes);
                Ok(())
            }
        }
    }

    pub fn upload_u32(self: &Arc<Self>, what: &str, values: &[u32]) -> Result<Memory, BackendError> {
        self.upload(what, &values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>())
    }

    /// Copies `bytes` bytes between places of this device.
    pub fn copy(&self, from: (&Memory, usize), to: (&Memory, usize), bytes: usize) -> Result<(), BackendError> {
        assert!(from.1 + bytes <= from.0.bytes && to.1 + bytes <= to.0.bytes, "inside both memories");
        match self {
            Self::Gpu(gpu) => gpu.copy(from.0.address + from.1 as u64, to.0.address + to.1 as u64, bytes),
            #[cfg(feature = "cuda-emulator")]
            Self::Emulator(emulator) => {
                emulator.copy(from.0.address + from.1 as u64, to.0.address + to.1 as u64, bytes);
                Ok(())
            }
        }
    }

    /// Launches a kernel; a grid without blocks does nothing.
    ///
    /// The arguments have to be the kernel's, in its order; all kernels and all callers are in this module's folder.
    pub fn launch(&self, kernel: &'static str, grid: Grid, args: &[Arg]) -> Result<(), BackendError> {
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        // Whatever the device: a GPU refuses more.
        if grid.blocks[1].max(grid.blocks[2]) > MOST_BLOCKS {
            let [_, y, z] = grid.blocks;
            let reason = format!("{y} by {z} blocks, {MOST_BLOCKS} at most; use fewer tokens at a time");
            return Err(BackendError::Device { what: kernel.into(), reason });
        }
        let mut pointers: Vec<*mut c_void> = args.iter().map(Arg::pointer).collect();
        match self {
            Self::Gpu(gpu) => gpu.launch(kernel, grid, &mut pointers),
            #[cfg(feature = "cuda-emulator")]
            Self::Emulator(emulator) => {
                let sizes: Vec<u32> = args.iter().map(|arg| arg.size() as u32).collect();
                emulator.launch(kernel, grid, &mut pointers, &sizes)
            }
        }
    }
}

impl Memory {
    pub fn address(&self) -> u64 {
        self.address
    }

    pub fn arg(&self) -> Arg {
        Arg::Address(self.address)
    }

    /// Its bytes from the start on, on the host; waits for all launches.
    pub fn download(&self, bytes: usize) -> Result<Vec<u8>, BackendError> {
        let mut out = vec![0; bytes];
        self.read(0, &mut out)?;
        Ok(out)
    }

    /// Its bytes from byte `at` on; waits for all launches.
    pub fn read(&self, at: usize, out: &mut [u8]) -> Result<(), BackendError> {
        assert!(at + out.len() <= self.bytes, "inside the memory");
        let address = self.address + at as u64;
        match &*self.device {
            Device::Gpu(gpu) => gpu.download(address, out),
            #[cfg(feature = "cuda-emulator")]
            Device::Emulator(emulator) => {
                emulator.download(address, out);
                Ok(())
            }
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        match &*self.device {
            Device::Gpu(gpu) => gpu.free(self.address),
            #[cfg(feature = "cuda-emulator")]
            Device::Emulator(emulator) => emulator.free(self.address, self.bytes),
        }
    }
}
