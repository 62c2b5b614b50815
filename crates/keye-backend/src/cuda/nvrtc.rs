//! Compiling kernels when the program runs, with a cache on disk.
//!
//! A compiled module's file name has its architecture and the hash of its source and options; in the cache
//! (`KEYE_CUDA_CACHE`, or `keye/cuda` in the user's cache folder) it lies in a folder of the driver's version. A release
//! carries its modules inside (`xtask kernels --embed` before the build): these come first, and NVRTC is not needed.

use std::ffi::{CString, c_char, c_int, c_void};
use std::path::{Path, PathBuf};

use libloading::{Library, Symbol};

use super::kernels::Module;
use super::libraries;

/// Sums are fused only where the source says so; no host code, no headers.
const OPTIONS: [&str; 3] = ["--std=c++17", "--fmad=false", "-default-device"];

/// Bytes of a module at most: several times the largest.
const LARGEST: usize = 64 << 20;

/// A module compiled for one architecture.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// Machine code.
    pub cubin: Vec<u8>,
    /// What the compiler said, with each kernel's registers and spills.
    pub log: String,
}

/// NVRTC, opened.
pub struct Nvrtc {
    library: Library,
}

type Program = *mut c_void;

impl Nvrtc {
    /// Opens the library of CUDA 13 or 12.
    pub fn open() -> Result<Self, String> {
        libraries::open(&libraries::toolkit_names("nvrtc")).map(|library| Self { library })
    }

    /// Major and minor version.
    pub fn version(&self) -> Result<(i32, i32), String> {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: nvrtcVersion(int*, int*) writes two ints.
        unsafe {
            let version = self.symbol::<unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int>("nvrtcVersion")?;
            check("nvrtcVersion", version(&raw mut major, &raw mut minor))?;
        }
        Ok((major, minor))
    }

    /// # Safety
    /// `T` has to be the function's type.
    unsafe fn symbol<T>(&self, name: &str) -> Result<Symbol<'_, T>, String> {
        // SAFETY: the caller's.
        unsafe { self.library.get(name.as_bytes()) }.map_err(|e| e.to_string())
    }

    /// Compiles a module to machine code for an architecture such as `sm_90a`.
    pub fn compile(&self, module: &Module, architecture: &str) -> Result<Compiled, String> {
        type Create = unsafe extern "C" fn(
            *mut Program,
            *const c_char,
            *const c_char,
            c_int,
            *const *const c_char,
            *const *const c_char,
        ) -> c_int;
        type Compile = unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int;
        let text = |text: String| CString::new(text).map_err(|e| e.to_string());
        let (source, name) = (text(module.source())?, text(format!("{}.cu", module.name))?);
        let options = [format!("--gpu-architecture={architecture}"), "--ptxas-options=-v".into()]
            .into_iter()
            .chain(OPTIONS.map(String::from))
            .map(text)
            .collect::<Result<Vec<_>, _>>()?;
        let pointers: Vec<_> = options.iter().map(|option| option.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: signatures are those of nvrtc.h; all strings outlive the calls; the program is destroyed once.
        unsafe {
            let create = self.symbol::<Create>("nvrtcCreateProgram")?;
            let none = std::ptr::null();
            check("nvrtcCreateProgram", create(&raw mut program, source.as_ptr(), name.as_ptr(), 0, none, none))?;
            let status =
                self.symbol::<Compile>("nvrtcCompileProgram")?(program, pointers.len() as c_int, pointers.as_ptr());
            let log = self.bytes(program, "nvrtcGetProgramLogSize", "nvrtcGetProgramLog");
            let cubin = self.bytes(program, "nvrtcGetCUBINSize", "nvrtcGetCUBIN");
            let destroy = self.symbol::<unsafe extern "C" fn(*mut Program) -> c_int>("nvrtcDestroyProgram")?;
            destroy(&raw mut program);
            let log = String::from_utf8_lossy(&log?).trim_end_matches('\0').to_owned();
            match status {
                0 => Ok(Compiled { cubin: cubin?, log }),
                _ => Err(format!("{}.cu for {architecture}: {log}", module.name)),
            }
        }
    }

    /// # Safety
    /// `program` has to be one; the names those of a size and of the getter that fills that many bytes.
    unsafe fn bytes(&self, program: Program, size: &str, get: &str) -> Result<Vec<u8>, String> {
        let mut bytes = 0usize;
        // SAFETY: the getters write a size, then as many bytes.
        unsafe {
            let size_of = self.symbol::<unsafe extern "C" fn(Program, *mut usize) -> c_int>(size)?;
            check(size, size_of(program, &raw mut bytes))?;
            let mut out = vec![0u8; bytes];
            let fill = self.symbol::<unsafe extern "C" fn(Program, *mut c_char) -> c_int>(get)?;
            check(get, fill(program, out.as_mut_ptr().cast()))?;
            Ok(out)
        }
    }
}

fn check(what: &str, status: c_int) -> Result<(), String> {
    if status == 0 { Ok(()) } else { Err(format!("{what} returned {status}")) }
}

/// FNV-1a of source and options: a name, not a protection.
fn hash(module: &Module) -> u64 {
    let source = module.source();
    let bytes = source.bytes().chain(OPTIONS.iter().flat_map(|option| option.bytes()));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

/// The file that a compiled module has in a cache.
pub fn file_name(module: &Module, architecture: &str) -> String {
    format!("{}-{:016x}-{architecture}.cubin", module.name, hash(module))
}

/// Machine code that was compiled into the program, deflated, by file name.
static EMBEDDED: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/cubins.rs"));

/// Names of the modules' files that the program carries, whole.
pub fn embedded() -> impl Iterator<Item = &'static str> {
    EMBEDDED.iter().filter(|(_, deflated)| is_whole(&inflate(deflated))).map(|(name, _)| *name)
}

/// Nothing where it cannot be inflated, which is machine code that cannot be opened.
fn inflate(deflated: &[u8]) -> Vec<u8> {
    miniz_oxide::inflate::decompress_to_vec_with_limit(deflated, LARGEST).unwrap_or_default()
}

/// Loads a module with `open`: the one that the program carries, the one in the cache, or one compiled now. Machine code that
/// cannot be opened (damaged, or newer than the driver) counts as missing.
pub(super) fn load<T>(
    module: &Module,
    architecture: &str,
    driver: i32,
    open: impl Fn(&[u8]) -> Result<T, String>,
) -> Result<T, String> {
    let carried = |architecture: &str| {
        let name = file_name(module, architecture);
        let (_, deflated) = EMBEDDED.iter().find(|(embedded, _)| *embedded == name)?;
        Some(inflate(deflated))
    };
    let name = file_name(module, architecture);
    let cached = cache_folder().map(|folder| folder.join(format!("driver-{driver}")).join(&name));
    let found = find(carried(architecture).as_deref(), cached.as_deref(), &open, || {
        let nvrtc = Nvrtc::open().map_err(|reason| {
            format!(
                "kernels for {architecture} have to be compiled once, for which {reason}; install CUDA's NVRTC, or take a \
                 program that carries them (xtask kernels --embed)"
            )
        })?;
        Ok(nvrtc.compile(module, architecture)?.cubin)
    });
    // Machine code of 8.0 runs on all of 8.x.
    match (found, architecture.starts_with("sm_8").then(|| carried("sm_80")).flatten()) {
        (Err(reason), Some(cubin)) => {
            open(&cubin).map_err(|of_first| format!("{reason}; the code for sm_80: {of_first}"))
        }
        (found, _) => found,
    }
}

fn cache_folder() -> Option<PathBuf> {
    if let Some(folder) = std::env::var_os("KEYE_CUDA_CACHE") {
        return Some(folder.into());
    }
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let base = base.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache")))?;
    Some(base.join("keye").join("cuda"))
}

/// The first that opens of what the program carries, the cache's file, and what `compile` makes, which then is the cache's
/// file. A cache that cannot be written is no error.
fn find<T>(
    carried: Option<&[u8]>,
    cached: Option<&Path>,
    open: impl Fn(&[u8]) -> Result<T, String>,
    compile: impl FnOnce() -> Result<Vec<u8>, String>,
) -> Result<T, String> {
    let refused = match carried.map(&open) {
        Some(Ok(opened)) => return Ok(opened),
        Some(Err(reason)) => format!("; the code that the program carries: {reason}"),
        None => String::new(),
    };
    let stored = cached.and_then(|file| std::fs::read(file).ok());
    if let Some(opened) = stored.and_then(|cubin| open(&cubin).ok()) {
        return Ok(opened);
    }
    let cubin = compile().map_err(|reason| format!("{reason}{refused}"))?;
    let opened = open(&cubin)?;
    if let Some(file) = cached {
        // Written beside and renamed, so that no other process reads half a file.
        let part = file.with_extension(format!("{}.part", std::process::id()));
        let folder = file.parent().map(std::fs::create_dir_all);
        if folder.is_some_and(|made| made.is_ok()) && std::fs::write(&part, &cubin).is_ok() {
            let _ = std::fs::rename(&part, file);
        }
    }
    Ok(opened)
}

/// Whether the tables that an image's head speaks of lie inside it: one cut short would be read beyond its end.
pub(super) fn is_whole(cubin: &[u8]) -> bool {
    let field = |at: usize, bytes: usize| {
        let bytes = cubin.get(at..at + bytes)?;
        Some(bytes.iter().rev().fold(0u64, |value, byte| value << 8 | u64::from(*byte)))
    };
    // Of a 64-bit ELF file: where a table starts, the size of an entry, their number.
    let inside = |start: usize, size: usize, count: usize| {
        let end = field(start, 8)?.checked_add(field(size, 2)? * field(count, 2)?)?;
        Some(end <= cubin.len() as u64)
    };
    cubin.starts_with(b"\x7fELF\x02")
        && inside(0x20, 0x36, 0x38) == Some(true)
        && inside(0x28, 0x3a, 0x3c) == Some(true)
}

/// What a kernel needs of the chip, as the compiler's log says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resources {
    /// Its name.
    pub kernel: String,
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of a thread's stack and of the registers that were stored there and loaded again. Should be zero.
    pub stack: u32,
    /// See `stack`.
    pub spills: u32,
}

impl Compiled {
    /// The log's figures.
    pub fn resources(&self) -> Vec<Resources> {
        let before = |line: &str, unit: &str| -> u32 {
            let words = line.split(unit).next().and_then(|text| text.split_whitespace().last());
            words.and_then(|number| number.parse().ok()).unwrap_or(0)
        };
        let mut out: Vec<Resources> = Vec::new();
        for line in self.log.lines() {
            if let Some((_, name)) = line.split_once("Compiling entry function '") {
                let kernel = name.split('\'').next().unwrap_or_default().to_owned();
                out.push(Resources { kernel, registers: 0, stack: 0, spills: 0 });
            } else if let Some(last) = out.last_mut() {
                if line.contains("bytes spill stores") {
                    last.stack = before(line, " bytes stack frame");
                    last.spills = before(line, " bytes spill stores") + before(line, " bytes spill loads");
                } else if line.contains(" registers") {
                    last.registers = before(line, " registers");
                }
            }
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_read_from_the_log() {
        let log = "ptxas info    : Compiling entry function 'a' for 'sm_90a'\n\
                   ptxas info    : Function properties for a\n\
                   ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n\
                   ptxas info    : Used 128 registers, used 1 barriers, 4096 bytes smem\n\
                   ptxas info    : Compiling entry function 'b' for 'sm_90a'\n\
                   ptxas info    : Function properties for b\n    \
                   0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n\
                   ptxas info    : Used 21 registers, used 0 barriers\n";
        let resources = Compiled { cubin: Vec::new(), log: log.into() }.resources();
        let [a, b] = &resources[..] else { panic!("{resources:?}") };
        assert_eq!((a.kernel.as_str(), a.registers, a.stack, a.spills), ("a", 128, 8, 16));
        assert_eq!((b.kernel.as_str(), b.registers, b.stack, b.spills), ("b", 21, 0, 0));
    }

    /// Opens what begins with `good`.
    fn open(cubin: &[u8]) -> Result<String, String> {
        let text = String::from_utf8_lossy(cubin).into_owned();
        if text.starts_with("good") { Ok(text) } else { Err("not machine code".into()) }
    }

    #[test]
    fn what_was_compiled_is_read_the_next_time_unless_it_is_damaged() {
        let folder = std::env::temp_dir().join(format!("keye-cubins-{}", std::process::id()));
        let file = folder.join("driver-12090").join("rows-sm_90a.cubin");
        let never = || -> Result<Vec<u8>, String> { Err("nothing compiles here".into()) };
        assert!(find(None, Some(&file), open, never).unwrap_err().contains("nothing compiles"));
        assert_eq!(find(None, Some(&file), open, || Ok(b"good 1".to_vec())).unwrap(), "good 1");
        assert_eq!(find(None, Some(&file), open, never).unwrap(), "good 1");
        assert_eq!(find(Some(b"good carried"), Some(&file), open, never).unwrap(), "good carried");
        assert_eq!(find(Some(b"of a newer driver"), Some(&file), open, never).unwrap(), "good 1");
        let refused = find(Some(b"of a newer driver"), None, open, never).unwrap_err();
        assert!(refused.contains("nothing compiles") && refused.contains("the program carries: not machine code"));
        std::fs::write(&file, "goo").unwrap();
        assert_eq!(find(None, Some(&file), open, || Ok(b"good 2".to_vec())).unwrap(), "good 2");
        assert_eq!(std::fs::read(&file).unwrap(), b"good 2");
        // Neither what does not open nor a folder that is a file is kept.
        std::fs::remove_file(&file).unwrap();
        assert!(find(None, Some(&file), open, || Ok(b"bad".to_vec())).is_err() && !file.exists());
        std::fs::remove_dir_all(&folder).unwrap();
        std::fs::write(&folder, "").unwrap();
        assert_eq!(find(None, Some(&file), open, || Ok(b"good 3".to_vec())).unwrap(), "good 3");
        std::fs::remove_file(&folder).unwrap();
    }

    #[test]
    fn an_image_that_was_cut_short_is_noticed() {
        // Two program headers of 56 bytes at 128, three section headers of 64 bytes at 240.
        let mut image = vec![0; 432];
        image[..5].copy_from_slice(b"\x7fELF\x02");
        for (at, value) in [(0x20, 128), (0x36, 56), (0x38, 2), (0x28, 240), (0x3a, 64), (0x3c, 3)] {
            image[at] = value;
        }
        assert!(is_whole(&image));
        assert!([431, 240, 63, 5, 0].iter().all(|length| !is_whole(&image[..*length])));
        image[0x2f] = 0xff;
        assert!(!is_whole(&image) && !is_whole(&[0; 432]));
    }

    #[test]
    fn names_depend_on_source_and_architecture() {
        use crate::cuda::kernels::MODULES;
        let names: std::collections::BTreeSet<_> =
            MODULES.iter().flat_map(|module| ["sm_80", "sm_90a"].map(|chip| file_name(module, chip))).collect();
        assert_eq!(names.len(), 2 * MODULES.len());
    }
}
