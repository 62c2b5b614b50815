//! bf16 products by cuBLASLt, opened when it is there. Its algorithms depend on the number of rows, so rows do too.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::sync::{Mutex, PoisonError};

use libloading::{Library, Symbol};

use super::libraries;

/// Bytes that an algorithm may use besides its operands.
pub(super) const WORKSPACE: usize = 32 << 20;

// Numbers of cublasLt.h, library_types.h and cublas_api.h, the same in CUDA 12 and 13.
const CUDA_R_32F: c_int = 0;
const CUDA_R_16BF: c_int = 14;
const CUBLAS_COMPUTE_32F: c_int = 68;
const MATMUL_DESC_TRANSA: c_int = 3;
static CUBLAS_OP_T: i32 = 1;
const PREF_MAX_WORKSPACE_BYTES: c_int = 1;

type Handle = *mut c_void;

/// cublasLtMatmulHeuristicResult_t, of which the first member is the algorithm.
#[repr(C)]
#[derive(Clone, Copy)]
struct Heuristic {
    algorithm: [u64; 8],
    workspace: usize,
    state: c_int,
    waves: f32,
    reserved: [c_int; 4],
}

/// `d [m, n] = x [m, k] w [n, k]^T + beta d`: rows of x and of w `stride` elements apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub stride: usize,
}

/// Addresses of the operands on the device.
#[derive(Debug, Clone, Copy)]
pub(super) struct Operands {
    pub x: u64,
    pub weight: u64,
    pub d: u64,
    pub workspace: u64,
}

pub(super) struct Blas {
    library: Library,
    handle: Handle,
    plans: Mutex<HashMap<Shape, Plan>>,
}

/// Descriptions of a shape and the algorithm found for it; kept for good.
#[derive(Clone, Copy)]
struct Plan {
    product: Handle,
    weight: Handle,
    x: Handle,
    d: Handle,
    algorithm: [u64; 8],
}

// SAFETY: a cuBLASLt handle may be used by any thread; descriptions are only read once they are made.
unsafe impl Send for Blas {}
// SAFETY: as above.
unsafe impl Sync for Blas {}

fn check(what: &str, status: c_int) -> Result<(), String> {
    if status == 0 { Ok(()) } else { Err(format!("{what} returned {status}")) }
}

impl Blas {
    /// Opens the library of CUDA 13 or 12 for the current context: the first that can be used with this driver.
    pub fn open() -> Result<Self, String> {
        libraries::first_of(&libraries::toolkit_names("cublasLt"), Self::new).map_err(|reasons| {
            format!(
                "{reasons}; where it is installed, put the folder of libcublasLt.so.13 or .so.12 into LD_LIBRARY_PATH"
            )
        })
    }

    fn new(library: Library) -> Result<Self, String> {
        let mut handle: Handle = std::ptr::null_mut();
        // SAFETY: the signature is that of cublasLt.h.
        unsafe {
            let create: Symbol<'_, unsafe extern "C" fn(*mut Handle) -> c_int> =
                library.get("cublasLtCreate").map_err(|e| e.to_string())?;
            check("cublasLtCreate", create(&raw mut handle))?;
        }
        Ok(Self { library, handle, plans: Mutex::default() })
    }

    /// # Safety
    /// `T` has to be the function's type.
    unsafe fn symbol<T>(&self, name: &str) -> Result<Symbol<'_, T>, String> {
        // SAFETY: the caller's.
        unsafe { self.library.get(name.as_bytes()) }.map_err(|e| e.to_string())
    }

    /// The library counts in columns: `d^T [n, m] = (w^T)^T x^T`, w^T being `[k, n]` and x^T `[k, m]`.
    fn plan(&self, shape: Shape) -> Result<Plan, String> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(plan) = plans.get(&shape) {
            return Ok(*plan);
        }
        type LayoutCreate = unsafe extern "C" fn(*mut Handle, c_int, u64, u64, i64) -> c_int;
        type Set = unsafe extern "C" fn(Handle, c_int, *const c_void, usize) -> c_int;
        type Find = unsafe extern "C" fn(
            Handle,
            Handle,
            Handle,
            Handle,
            Handle,
            Handle,
            Handle,
            c_int,
            *mut Heuristic,
            *mut c_int,
        ) -> c_int;
        let Shape { m, n, k, stride } = shape;
        let layout = |kind: c_int, rows: usize, cols: usize, stride: usize| -> Result<Handle, String> {
            let mut layout: Handle = std::ptr::null_mut();
            // SAFETY: as in cublasLt.h.
            unsafe {
                let create = self.symbol::<LayoutCreate>("cublasLtMatrixLayoutCreate")?;
                let status = create(&raw mut layout, kind, rows as u64, cols as u64, stride as i64);
                check("cublasLtMatrixLayoutCreate", status)?;
            }
            Ok(layout)
        };
        let weight = layout(CUDA_R_16BF, k, n, stride)?;
        let x = layout(CUDA_R_16BF, k, m, stride)?;
        let d = layout(CUDA_R_32F, n, m, n)?;
        let mut product: Handle = std::ptr::null_mut();
        let mut found = Heuristic { algorithm: [0; 8], workspace: 0, state: 0, waves: 0.0, reserved: [0; 4] };
        // SAFETY: signatures are those of cublasLt.h; attributes are given with their sizes.
        unsafe {
            let create =
                self.symbol::<unsafe extern "C" fn(*mut Handle, c_int, c_int) -> c_int>("cublasLtMatmulDescCreate")?;
            check("cublasLtMatmulDescCreate", create(&raw mut product, CUBLAS_COMPUTE_32F, CUDA_R_32F))?;
            let set = self.symbol::<Set>("cublasLtMatmulDescSetAttribute")?;
            let transpose = (&raw const CUBLAS_OP_T).cast();
            check("cublasLtMatmulDescSetAttribute", set(product, MATMUL_DESC_TRANSA, transpose, 4))?;
            let workspace = WORKSPACE;
            let mut preference: Handle = std::ptr::null_mut();
            let create = self.symbol::<unsafe extern "C" fn(*mut Handle) -> c_int>("cublasLtMatmulPreferenceCreate")?;
            check("cublasLtMatmulPreferenceCreate", create(&raw mut preference))?;
            let set = self.symbol::<Set>("cublasLtMatmulPreferenceSetAttribute")?;
            let status = set(preference, PREF_MAX_WORKSPACE_BYTES, (&raw const workspace).cast(), size_of::<usize>());
            check("cublasLtMatmulPreferenceSetAttribute", status)?;
            let mut count = 0;
            let find = self.symbol::<Find>("cublasLtMatmulAlgoGetHeuristic")?;
            let status = find(self.handle, product, weight, x, d, d, preference, 1, &raw mut found, &raw mut count);
            self.symbol::<unsafe extern "C" fn(Handle) -> c_int>("cublasLtMatmulPreferenceDestroy")?(preference);
            check("cublasLtMatmulAlgoGetHeuristic", status)?;
            if count == 0 {
                return Err(format!("cuBLASLt has no algorithm for {shape:?}"));
            }
        }
        let plan = Plan { product, weight, x, d, algorithm: found.algorithm };
        plans.insert(shape, plan);
        Ok(plan)
    }

    /// Puts a product on a stream; `add` keeps what d held.
    ///
    /// # Safety
    /// The operands have to be of that shape, the workspace of [`WORKSPACE`] bytes, all of the stream's device, whose context
    /// is current.
    pub unsafe fn product(&self, shape: Shape, at: Operands, add: bool, stream: *mut c_void) -> Result<(), String> {
        type Matmul = unsafe extern "C" fn(
            Handle,
            Handle,
            *const c_void,
            *const c_void,
            Handle,
            *const c_void,
            Handle,
            *const c_void,
            *const c_void,
            Handle,
            *mut c_void,
            Handle,
            *const [u64; 8],
            *mut c_void,
            usize,
            *mut c_void,
        ) -> c_int;
        let plan = self.plan(shape)?;
        let (alpha, beta) = (1.0f32, if add { 1.0f32 } else { 0.0 });
        // SAFETY: the signature is that of cublasLt.h; the rest is the caller's.
        unsafe {
            let matmul = self.symbol::<Matmul>("cublasLtMatmul")?;
            let status = matmul(
                self.handle,
                plan.product,
                (&raw const alpha).cast(),
                at.weight as *const c_void,
                plan.weight,
                at.x as *const c_void,
                plan.x,
                (&raw const beta).cast(),
                at.d as *const c_void,
                plan.d,
                at.d as *mut c_void,
                plan.d,
                &raw const plan.algorithm,
                at.workspace as *mut c_void,
                WORKSPACE,
                stream,
            );
            check("cublasLtMatmul", status)
        }
    }
}
