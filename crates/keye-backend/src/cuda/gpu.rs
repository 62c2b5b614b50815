//! One GPU through CUDA's driver: a context, a stream on which everything happens in order, the loaded kernels.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::sync::{Mutex, PoisonError, RwLock};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use super::blas::{Blas, Operands, Shape, WORKSPACE};
use super::device::Grid;
use super::kernels::{MODULES, Module};
use super::{CudaOptions, libraries, nvrtc};
use crate::BackendError;

/// Bytes of each of the two pinned buffers through which uploads go.
const STAGING: usize = 32 << 20;

pub(super) struct Gpu {
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// Where all memory comes from.
    pool: sys::CUmemoryPool,
    /// Of all modules that were loaded: training's are when they are first wanted.
    kernels: RwLock<HashMap<&'static str, sys::CUfunction>>,
    architecture: String,
    driver: i32,
    staging: Mutex<Option<Staging>>,
    name: String,
    /// cuBLASLt and its workspace, when wanted.
    blas: Option<(Blas, u64)>,
    /// Each launch is waited for, so that an error names its kernel.
    waiting: bool,
}

/// Pinned buffers that are filled in turn: all of `current` up to `used` is on its way to the GPU, as is all of the other,
/// until its event has passed.
struct Staging {
    buffers: [*mut u8; 2],
    free: [sys::CUevent; 2],
    current: usize,
    used: usize,
}

// SAFETY: handles of the driver may be used by any thread that has made the context current, which every call here does;
// the staging buffers are used under their lock.
unsafe impl Send for Gpu {}
// SAFETY: as above; the driver locks inside.
unsafe impl Sync for Gpu {}

fn failed(what: impl Into<String>) -> impl FnOnce(DriverError) -> BackendError {
    |error| BackendError::Device { what: what.into(), reason: format!("the CUDA driver says {error:?}") }
}

fn device_error(what: &str, reason: String) -> BackendError {
    BackendError::Device { what: what.into(), reason }
}

/// The kernels of a module, which is compiled where no cache has it; the context is current.
fn load_module(
    module: &Module,
    architecture: &str,
    driver: i32,
) -> Result<Vec<(&'static str, sys::CUfunction)>, BackendError> {
    let open = |cubin: &[u8]| {
        if !nvrtc::is_whole(cubin) {
            return Err(format!("{}: the machine code is cut short", module.name));
        }
        // SAFETY: the image has the tables that its head speaks of. Modules are never unloaded, so their functions stay valid.
        let loaded = unsafe { result::module::load_data(cubin.as_ptr().cast()) };
        loaded.map_err(|error| format!("{}: the CUDA driver says {error:?}", module.name))
    };
    let loaded = nvrtc::load(module, architecture, driver, open).map_err(|reason| device_error("kernels", reason))?;
    let kernels = module.kernels().into_iter().map(|(kernel, _)| {
        let name = CString::new(kernel).map_err(|e| device_error(kernel, e.to_string()))?;
        // SAFETY: the module is loaded, the name ends with zero.
        let function = unsafe { result::module::get_function(loaded, name) };
        Ok((kernel, function.map_err(failed(kernel))?))
    });
    kernels.collect()
}

impl Gpu {
    /// Opens device `ordinal` and loads the kernels for its architecture, training's only when they are wanted.
    pub fn open(CudaOptions { device: ordinal, library, waiting, .. }: CudaOptions) -> Result<Self, BackendError> {
        libraries::driver()
            .map_err(|reason| device_error("CUDA", format!("{reason}; is NVIDIA's driver installed?")))?;
        result::init().map_err(failed("starting CUDA"))?;
        let count = result::device::get_count().map_err(failed("counting GPUs"))?;
        if ordinal >= count as usize {
            return Err(device_error("CUDA", format!("GPU {ordinal} was asked for, {count} found")));
        }
        let device = result::device::get(ordinal as i32).map_err(failed("opening the GPU"))?;
        let name = result::device::get_name(device).map_err(failed("the GPU's name"))?;
        use sys::CUdevice_attribute_enum::{
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR as MAJOR,
            CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR as MINOR,
        };
        // SAFETY: the device is one; the primary context is kept for the life of the process.
        let (major, minor, context, pool) = unsafe {
            let attribute =
                |which| result::device::get_attribute(device, which).map_err(failed("the GPU's capability"));
            let context = result::primary_ctx::retain(device).map_err(failed("opening the GPU"))?;
            result::ctx::set_current(context).map_err(failed("using the GPU"))?;
            // Freed memory is kept for the next allocation instead of going back to the system.
            let pool = result::device::get_default_mem_pool(device).map_err(failed("the GPU's memory"))?;
            let mut keep = u64::MAX;
            result::mem_pool::set_attribute(
                pool,
                sys::CUmemPool_attribute_enum::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                (&raw mut keep).cast(),
            )
            .map_err(failed("the GPU's memory"))?;
            (attribute(MAJOR)?, attribute(MINOR)?, context, pool)
        };
        if major < 8 {
            return Err(device_error(
                &name,
                format!("compute capability 8.0 (Ampere) or newer is needed, this has {major}.{minor}"),
            ));
        }
        let architecture = if (major, minor) == (9, 0) { "sm_90a".into() } else { format!("sm_{major}{minor}") };
        let stream = result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("a stream"))?;
        let mut driver = 0;
        // SAFETY: one integer is written.
        unsafe { sys::cuDriverGetVersion(&raw mut driver) }.result().map_err(failed("the driver's version"))?;
        let mut kernels = HashMap::new();
        for module in MODULES.iter().filter(|module| !module.is_of_training()) {
            kernels.extend(load_module(module, &architecture, driver)?);
        }
        let kernels = RwLock::new(kernels);
        let blas = match library {
            true => {
                let blas = Blas::open().map_err(|reason| device_error("cuBLASLt", reason))?;
                // SAFETY: a plain allocation, kept for the life of the process.
                let workspace = unsafe { result::malloc_async(stream, WORKSPACE) };
                Some((blas, workspace.map_err(failed("cuBLASLt's workspace"))?))
            }
            false => None,
        };
        let name =
            format!("{name}, compute capability {major}.{minor}, driver {}.{}", driver / 1000, driver % 1000 / 10);
        let staging = Mutex::new(None);
        Ok(Self { context, stream, pool, kernels, architecture, driver, staging, name, blas, waiting })
    }

    fn kernel(&self, kernel: &'static str) -> Result<sys::CUfunction, BackendError> {
        let loaded = |kernels: &HashMap<_, _>| kernels.get(kernel).copied();
        if let Some(function) = loaded(&self.kernels.read().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(function);
        }
        let has = |module: &&Module| module.kernels().iter().any(|(name, _)| *name == kernel);
        let module = MODULES.iter().find(has).ok_or_else(|| device_error(kernel, "no such kernel".into()))?;
        let mut kernels = self.kernels.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have loaded it meanwhile.
        if loaded(&kernels).is_none() {
            self.enter().map_err(failed(kernel))?;
            kernels.extend(load_module(module, &self.architecture, self.driver)?);
        }
        loaded(&kernels).ok_or_else(|| device_error(kernel, "its module has no such kernel".into()))
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that are free, and all. Waits for the device, and gives back what the pool keeps for later: it would count as
    /// used, by whom the caller cannot tell.
    pub fn memory(&self) -> Result<(u64, u64), BackendError> {
        self.synchronize()?;
        let memory = self.enter().and_then(|()| {
            // SAFETY: the device's own pool; what is in use stays.
            unsafe { result::mem_pool::trim_to(self.pool, 0) }?;
            result::mem_get_info()
        });
        memory.map(|(free, total)| (free as u64, total as u64)).map_err(failed("the GPU's memory"))
    }

    /// Whether products may be left to cuBLASLt.
    pub fn has_library(&self) -> bool {
        self.blas.is_some()
    }

    /// `d = x w^T`, or added to d; all addresses of operands of that shape, the workspace is set here.
    pub fn library_product(&self, shape: Shape, at: Operands, add: bool) -> Result<(), BackendError> {
        self.enter().map_err(failed("cuBLASLt"))?;
        let (blas, workspace) = self.blas.as_ref().ok_or_else(|| device_error("cuBLASLt", "not opened".into()))?;
        // SAFETY: the stream is this context's, the workspace of the right size; the operands are the caller's tensors.
        unsafe { blas.product(shape, Operands { workspace: *workspace, ..at }, add, self.stream.cast()) }
            .map_err(|reason| device_error("cuBLASLt", reason))
    }

    fn enter(&self) -> Result<(), DriverError> {
        // SAFETY: the context lives as long as the process.
        unsafe { result::ctx::set_current(self.context) }
    }

    /// `None` where there is not enough memory.
    pub fn allocate(&self, bytes: usize) -> Result<Option<u64>, BackendError> {
        // SAFETY: the size is not zero.
        let address = self.enter().and_then(|()| unsafe { result::malloc_async(self.stream, bytes) });
        match address {
            Ok(address) => Ok(Some(address)),
            Err(DriverError(sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Ok(None),
            // What went wrong in a kernel before is often noticed here.
            Err(error) => Err(failed("taking memory, or what was launched before")(error)),
        }
    }

    pub fn free(&self, address: u64) {
        // SAFETY: the address came from `allocate` and is freed once; freeing is ordered behind the launches that use it.
        // A failure means that the context is gone, and its memory with it.
        let _ = self.enter().and_then(|()| unsafe { result::free_async(address, self.stream) });
    }

    pub fn zero(&self, address: u64, bytes: usize) -> Result<(), BackendError> {
        // SAFETY: the range is inside an allocation.
        self.enter()
            .and_then(|()| unsafe { result::memset_d8_async(address, 0, bytes, self.stream) })
            .map_err(failed("clearing memory"))
    }

    pub fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), BackendError> {
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: both ranges are inside allocations.
        self.enter()
            .and_then(|()| unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream) })
            .map_err(failed("copying on the GPU"))
    }

    /// Through pinned buffers, one filled while the other is on its way: whether the driver has read pageable memory when it
    /// returns depends on the machine.
    pub fn upload(&self, address: u64, bytes: &[u8]) -> Result<(), BackendError> {
        if bytes.is_empty() {
            return Ok(());
        }
        let upload = || {
            self.enter()?;
            let mut staging = self.staging.lock().unwrap_or_else(PoisonError::into_inner);
            let staging = match &mut *staging {
                Some(staging) => staging,
                none => none.insert(Staging::new()?),
            };
            for (i, piece) in bytes.chunks(STAGING).enumerate() {
                let place = staging.room(piece.len(), self.stream)?;
                // SAFETY: the place has that many bytes, which the device does not read any more.
                unsafe {
                    std::ptr::copy_nonoverlapping(piece.as_ptr(), place, piece.len());
                    let staged = std::slice::from_raw_parts(place, piece.len());
                    result::memcpy_htod_async(address + (i * STAGING) as u64, staged, self.stream)?;
                }
            }
            Ok(())
        };
        upload().map_err(failed("copying to the GPU, or what was launched before"))
    }

    pub fn download(&self, address: u64, out: &mut [u8]) -> Result<(), BackendError> {
        let mut download = || {
            self.enter()?;
            // SAFETY: the range is inside an allocation, and the copy is waited for while `out` is borrowed.
            unsafe {
                if !out.is_empty() {
                    result::memcpy_dtoh_async(out, address, self.stream)?;
                }
                result::stream::synchronize(self.stream)
            }
        };
        download().map_err(failed("copying from the GPU, or what was launched before"))
    }

    pub fn synchronize(&self) -> Result<(), BackendError> {
        // SAFETY: the stream is this context's and lives as long as the process.
        let done = self.enter().and_then(|()| unsafe { result::stream::synchronize(self.stream) });
        done.map_err(failed("what was launched before"))
    }

    pub fn launch(&self, kernel: &'static str, grid: Grid, args: &mut [*mut c_void]) -> Result<(), BackendError> {
        let function = self.kernel(kernel)?;
        let blocks = (grid.blocks[0], grid.blocks[1], grid.blocks[2]);
        let mut launch = || {
            self.enter()?;
            // SAFETY: `Device::launch` demands the kernel's own arguments.
            unsafe {
                if grid.shared > 48 << 10 {
                    use sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES as LIMIT;
                    result::function::set_function_attribute(function, LIMIT, grid.shared as i32)?;
                }
                result::launch_kernel(function, blocks, (grid.threads, 1, 1), grid.shared, self.stream, args)?;
                if self.waiting { result::stream::synchronize(self.stream) } else { Ok(()) }
            }
        };
        launch().map_err(failed(kernel))
    }
}

impl Staging {
    fn new() -> Result<Self, DriverError> {
        // SAFETY: plain allocations, kept for the life of the process.
        unsafe {
            let buffer = || result::malloc_host(STAGING, 0).map(<*mut c_void>::cast::<u8>);
            let event = || result::event::create(sys::CUevent_flags_enum::CU_EVENT_DISABLE_TIMING);
            Ok(Self { buffers: [buffer()?, buffer()?], free: [event()?, event()?], current: 0, used: 0 })
        }
    }

    /// A place of `bytes` (up to [`STAGING`]) that the device does not read any more.
    fn room(&mut self, bytes: usize, stream: sys::CUstream) -> Result<*mut u8, DriverError> {
        if self.used + bytes > STAGING {
            // SAFETY: events and stream are of this context. One that was never recorded has passed.
            unsafe {
                result::event::record(self.free[self.current], stream)?;
                self.current = 1 - self.current;
                result::event::synchronize(self.free[self.current])?;
            }
            self.used = 0;
        }
        // SAFETY: inside the buffer.
        let place = unsafe { self.buffers[self.current].add(self.used) };
        self.used = (self.used + bytes).next_multiple_of(256).min(STAGING);
        Ok(place)
    }
}
