//! The kernels on the CPU, for tests: g++ compiles their sources with a shim (kernels/fibers.h and what follows it) into
//! libraries.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;

use libloading::Library;

use super::device::Grid;
use super::kernels::MODULES;
use crate::BackendError;

/// Bytes of a page, or a multiple of them.
const PAGE: usize = 4096;

const SHIM: [&str; 3] =
    [include_str!("kernels/fibers.h"), include_str!("kernels/watch.h"), include_str!("kernels/emulate.h")];

type Launch = unsafe extern "C" fn(*mut *mut c_void, *const u32, u32, u32) -> c_int;
type Sizes = unsafe extern "C" fn(*mut u32) -> u32;

/// How thorough.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Fast,
    /// Every load and store is looked at (kernels/watch.h).
    Watched,
}

#[derive(Clone)]
struct Kernel {
    launch: Launch,
    /// Threads that it was compiled for.
    threads: u32,
    /// Bytes of its arguments.
    arguments: Vec<u32>,
}

/// What is compiled together: kernels and the threads of their blocks.
struct Source {
    name: &'static str,
    text: String,
    kernels: Vec<(&'static str, u32)>,
}

/// Memory is the host's, an address a pointer. One launch at a time: the shim has one set of fibers.
pub(super) struct Emulator {
    kernels: HashMap<&'static str, Kernel>,
    running: Mutex<()>,
    _libraries: Vec<Library>,
}

impl Emulator {
    /// Compiles all modules; `None` when there is no g++ or this is not x86-64, for which the shim's switch is written.
    pub fn build(kind: Kind) -> Option<Self> {
        let source = |module: super::kernels::Module| Source {
            name: module.name,
            text: module.source(),
            kernels: module.kernels(),
        };
        Self::compile(&MODULES.map(source), kind)
    }

    fn compile(modules: &[Source], kind: Kind) -> Option<Self> {
        if !cfg!(target_arch = "x86_64") || Command::new("g++").arg("--version").output().is_err() {
            return None;
        }
        let folder =
            std::env::temp_dir().join(format!("keye-kernels-{}-{kind:?}-{}", std::process::id(), modules[0].name));
        std::fs::create_dir_all(&folder).expect("a folder for test files");
        let mut compilers = Vec::new();
        for Source { name, text: source, kernels } in modules {
            let library: PathBuf = folder.join(format!("{name}.so"));
            let mut text = SHIM.concat() + source;
            for (kernel, _) in kernels {
                text.push_str(&format!("\nEXPORT({kernel})\n"));
            }
            let mut compiler = compiler(kind, &library).stdin(Stdio::piped()).spawn().expect("g++ starts");
            let input = compiler.stdin.take().expect("a pipe was asked for");
            { input }.write_all(text.as_bytes()).expect("g++ reads");
            compilers.push((name, kernels, library, compiler));
        }
        let (mut all, mut libraries) = (HashMap::new(), Vec::new());
        for (name, kernels, library, mut compiler) in compilers {
            assert!(compiler.wait().expect("g++ ends").success(), "{name}.cu compiles for the CPU");
            // SAFETY: just compiled from our sources, whose exported functions have these types.
            unsafe {
                let library = Library::new(&library).expect("a library was written");
                for &(kernel, threads) in kernels {
                    let launch = library.get::<Launch>(format!("emu_{kernel}")).expect("every kernel is exported");
                    let sizes = library.get::<Sizes>(format!("emu_{kernel}_sizes")).expect("its arguments as well");
                    let mut arguments = vec![0; 32];
                    let count = sizes(arguments.as_mut_ptr());
                    arguments.truncate(count as usize);
                    all.insert(kernel, Kernel { launch: *launch, threads, arguments });
                }
                libraries.push(library);
            }
        }
        let _ = std::fs::remove_dir_all(&folder);
        Some(Self { kernels: all, running: Mutex::new(()), _libraries: libraries })
    }

    /// Whole pages for an allocation and one more that may not be touched.
    fn pages(bytes: usize) -> usize {
        bytes.next_multiple_of(PAGE) + PAGE
    }

    /// Filled with NaN: nothing may rely on zeros. Its end is that of the last page before one without access, so that
    /// reading or writing behind it stops the test.
    pub fn allocate(&self, bytes: usize) -> u64 {
        let length = Self::pages(bytes);
        // SAFETY: fresh pages of our own; the bytes are inside them.
        unsafe {
            let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let start = libc::mmap(std::ptr::null_mut(), length, access, kind, -1, 0);
            assert!(start != libc::MAP_FAILED, "memory for a test");
            let end = start.cast::<u8>().add(length - PAGE);
            assert_eq!(libc::mprotect(end.cast(), PAGE, libc::PROT_NONE), 0);
            let pointer = end.sub(bytes);
            pointer.write_bytes(0xff, bytes);
            pointer as u64
        }
    }

    pub fn free(&self, address: u64, bytes: usize) {
        let length = Self::pages(bytes);
        // SAFETY: the pages that `allocate` took for as many bytes.
        unsafe {
            let start = (address as *mut u8).add(bytes + PAGE).sub(length);
            libc::munmap(start.cast(), length);
        }
    }

    pub fn zero(&self, address: u64, bytes: usize) {
        // SAFETY: inside an allocation.
        unsafe { (address as *mut u8).write_bytes(0, bytes) }
    }

    pub fn upload(&self, address: u64, bytes: &[u8]) {
        // SAFETY: inside an allocation.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), address as *mut u8, bytes.len()) }
    }

    pub fn download(&self, address: u64, out: &mut [u8]) {
        // SAFETY: inside an allocation.
        unsafe { std::ptr::copy_nonoverlapping(address as *const u8, out.as_mut_ptr(), out.len()) }
    }

    pub fn copy(&self, from: u64, to: u64, bytes: usize) {
        // SAFETY: inside allocations.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) }
    }

    /// `sizes` are the bytes of the arguments: a GPU would take what lies behind too few, and half of one too wide.
    pub fn launch(
        &self,
        kernel: &'static str,
        grid: Grid,
        args: &mut [*mut c_void],
        sizes: &[u32],
    ) -> Result<(), BackendError> {
        match self.status(kernel, grid, args, sizes) {
            0 => Ok(()),
            1 => panic!("{kernel}: threads wait for others that never come"),
            _ => panic!("{kernel}: its threads race, or load what was never stored (see above)"),
        }
    }

    fn status(&self, name: &str, grid: Grid, args: &mut [*mut c_void], sizes: &[u32]) -> c_int {
        let kernel = self.kernels.get(name).unwrap_or_else(|| panic!("no kernel {name}"));
        assert_eq!(sizes, kernel.arguments, "{name}: bytes of the arguments");
        assert!(grid.threads <= kernel.threads && grid.threads.is_multiple_of(32), "{name}: {} threads", grid.threads);
        let _running = self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: the arguments are as many and as wide as the kernel's; `Device::launch` demands the right ones.
        unsafe { (kernel.launch)(args.as_mut_ptr(), grid.blocks.as_ptr(), grid.threads, grid.shared) }
    }
}

/// g++ that reads a source and writes a library.
fn compiler(kind: Kind, library: &Path) -> Command {
    let common = "-std=c++17 -march=native -ffp-contract=off -w -fPIC -shared";
    // Calls for loads and stores come from the thread sanitizer, whose own library is left out.
    let special = match kind {
        Kind::Fast => "-O3",
        Kind::Watched => {
            "-O2 -fno-tree-vectorize -fsanitize=thread --param=tsan-instrument-func-entry-exit=0 -nodefaultlibs -DKEYE_WATCHED"
        }
    };
    let behind: &[&str] = match kind {
        Kind::Fast => &[],
        Kind::Watched => &["-lstdc++", "-lm", "-lc", "-lgcc_s", "-lgcc"],
    };
    let mut command = Command::new("g++");
    command.args(common.split(' ').chain(special.split(' '))).args(["-x", "c++", "-", "-o"]).arg(library).args(behind);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRONG: &str = r#"
    KERNEL(64) right(unsigned* out) {
        SHARED unsigned room[64];
        room[threadIdx.x] = threadIdx.x;
        __syncthreads();
        unsigned other = room[63 - threadIdx.x];
        __syncthreads();
        room[threadIdx.x] = other;
        __syncwarp();
        out[64 * blockIdx.x + threadIdx.x] = room[threadIdx.x ^ 1];
    }
    KERNEL(64) barrier_forgotten(unsigned* out) {
        SHARED unsigned room[64];
        room[threadIdx.x] = threadIdx.x;
        out[64 * blockIdx.x + threadIdx.x] = room[threadIdx.x ^ 32];
    }
    KERNEL(64) overtaken(unsigned* out) {
        SHARED unsigned room[64];
        room[threadIdx.x] = threadIdx.x;
        __syncthreads();
        unsigned other = room[63 - threadIdx.x];
        room[threadIdx.x] = other;
        out[64 * blockIdx.x + threadIdx.x] = other;
    }
    KERNEL(64) a_shuffle_is_no_barrier(unsigned* out) {
        SHARED unsigned room[64];
        room[threadIdx.x] = threadIdx.x;
        unsigned lane = __shfl_sync(0xffffffffu, threadIdx.x, 0);
        out[64 * blockIdx.x + threadIdx.x] = lane + room[threadIdx.x ^ 1];
    }
    KERNEL(64) never_stored(unsigned* out) {
        SHARED unsigned room[64];
        if (threadIdx.x < 63) room[threadIdx.x] = threadIdx.x;
        __syncthreads();
        out[64 * blockIdx.x + threadIdx.x] = room[threadIdx.x];
    }
    KERNEL(64) blocks_meet(unsigned* out) {
        out[32 * blockIdx.x + threadIdx.x] = threadIdx.x;
    }
    KERNEL(64) copy_not_waited_for(unsigned* out) {
        __attribute__((aligned(16))) SHARED unsigned room[64];
        if (threadIdx.x < 16) copy_async(room + 4 * threadIdx.x, out + 64 * blockIdx.x + 4 * threadIdx.x, true);
        commit_copies();
        __syncthreads();
        wait_copies<0>();
        unsigned mine = room[threadIdx.x];
        __syncthreads();
        out[64 * blockIdx.x + threadIdx.x] = mine;
    }
    KERNEL(64) some_stay_away(unsigned* out) {
        if (threadIdx.x % 2) __syncwarp();
    }
    "#;

    #[test]
    fn cuda_races_are_noticed() {
        let cases = [
            ("right", 0),
            ("barrier_forgotten", 2),
            ("overtaken", 2),
            ("a_shuffle_is_no_barrier", 2),
            ("never_stored", 2),
            ("blocks_meet", 2),
            ("copy_not_waited_for", 2),
            ("some_stay_away", 1),
        ];
        let wrong =
            Source { name: "wrong", text: WRONG.to_owned(), kernels: cases.map(|(name, _)| (name, 64)).to_vec() };
        let Some(emulator) = Emulator::compile(&[wrong], Kind::Watched) else { return };
        for (name, expected) in cases {
            let mut out = emulator.allocate(2 * 64 * 4);
            let mut args = [(&raw mut out).cast()];
            let grid = Grid::of(2, 1, 64);
            assert_eq!(emulator.status(name, grid, &mut args, &[8]), expected, "{name}");
            emulator.free(out, 2 * 64 * 4);
        }
    }
}
