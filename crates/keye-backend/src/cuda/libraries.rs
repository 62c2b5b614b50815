//! NVIDIA's libraries, found by name when the program runs. None of them has to be there.

use libloading::Library;

/// Opens the first of some names; otherwise says what was looked for.
pub(super) fn open(names: &[String]) -> Result<Library, String> {
    for name in names {
        // SAFETY: the libraries named here are NVIDIA's, whose initialisers have no conditions.
        if let Ok(library) = unsafe { Library::new(name) } {
            return Ok(library);
        }
    }
    Err(format!("none of {} was found", names.join(", ")))
}

/// Names of a library of the toolkit: the newest major version first, then the development link.
pub(super) fn toolkit_names(name: &str) -> Vec<String> {
    ["13", "12"].iter().map(|major| format!("lib{name}.so.{major}")).chain([format!("lib{name}.so")]).collect()
}

/// Whether the driver is there. cudarc panics where it is not, so this is asked first.
pub(super) fn driver() -> Result<(), String> {
    let names = ["libcuda.so.1", "libcuda.so"].map(String::from);
    // Kept open: what cudarc opens afterwards is the same library.
    open(&names).map(std::mem::forget)
}
