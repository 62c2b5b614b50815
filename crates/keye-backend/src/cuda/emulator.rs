//! The kernels on the CPU, for tests: g++ compiles their sources with a shim (kernels/emulate.h) into libraries.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Mutex;

use libloading::Library;

use super::device::Grid;
use super::kernels::MODULES;
use crate::BackendError;

/// Bytes of a page, or a multiple of them.
const PAGE: usize = 4096;

type Launch = unsafe extern "C" fn(*mut *mut c_void, *const u32, u32, u32) -> c_int;

/// Memory is the host's, an address a pointer. One launch at a time: the shim has one set of fibers.
pub(super) struct Emulator {
    kernels: HashMap<&'static str, Launch>,
    running: Mutex<()>,
    _libraries: Vec<Library>,
}

impl Emulator {
    /// Compiles all modules; `None` when there is no g++ or this is not x86-64, for which the shim's switch is written.
    pub fn build() -> Option<Self> {
        if !cfg!(target_arch = "x86_64") || Command::new("g++").arg("--version").output().is_err() {
            return None;
        }
        let folder = std::env::temp_dir().join(format!("keye-kernels-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder for test files");
        let mut compilers = Vec::new();
        for module in MODULES {
            let library: PathBuf = folder.join(format!("{}.so", module.name));
            let mut source = format!("{}\n{}", include_str!("kernels/emulate.h"), module.source());
            for kernel in module.kernels() {
                source.push_str(&format!("\nEXPORT({kernel})\n"));
            }
            let mut compiler = Command::new("g++")
                .args([
                    "-std=c++17",
                    "-O3",
                    "-march=native",
                    "-ffp-contract=off",
                    "-w",
                    "-fPIC",
                    "-shared",
                    "-x",
                    "c++",
                    "-",
                    "-o",
                ])
                .arg(&library)
                .stdin(Stdio::piped())
                .spawn()
                .expect("g++ starts");
            let input = compiler.stdin.take().expect("a pipe was asked for");
            { input }.write_all(source.as_bytes()).expect("g++ reads");
            compilers.push((module, library, compiler));
        }
        let (mut kernels, mut libraries) = (HashMap::new(), Vec::new());
        for (module, library, mut compiler) in compilers {
            assert!(compiler.wait().expect("g++ ends").success(), "{}.cu compiles for the CPU", module.name);
            // SAFETY: just compiled from our sources, whose exported functions have the type `Launch`.
            unsafe {
                let library = Library::new(&library).expect("a library was written");
                for kernel in module.kernels() {
                    let launch = library.get::<Launch>(format!("emu_{kernel}")).expect("every kernel is exported");
                    kernels.insert(kernel, *launch);
                }
                libraries.push(library);
            }
        }
        let _ = std::fs::remove_dir_all(&folder);
        Some(Self { kernels, running: Mutex::new(()), _libraries: libraries })
    }

    /// Whole pages for an allocation and one more that may not be touched.
    fn pages(bytes: usize) -> usize {
        bytes.next_multiple_of(PAGE) + PAGE
    }

    /// Filled with NaN: nothing may rely on zeros. Its end is that of the last page before one without access, so that
    /// reading or writing behind it stops the test.
    pub fn allocate(&self, bytes: usize) -> Result<u64, cudarc::driver::result::DriverError> {
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
            Ok(pointer as u64)
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

    pub fn launch(&self, kernel: &'static str, grid: Grid, args: &mut [*mut c_void]) -> Result<(), BackendError> {
        let _running = self.running.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let launch = self.kernels.get(kernel).unwrap_or_else(|| panic!("no kernel {kernel}"));
        // SAFETY: `Device::launch` demands the kernel's own arguments.
        let status = unsafe { launch(args.as_mut_ptr(), grid.blocks.as_ptr(), grid.threads, grid.shared) };
        assert_eq!(status, 0, "{kernel}: threads wait for others that never come");
        Ok(())
    }
}
