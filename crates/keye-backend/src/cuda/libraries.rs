//! NVIDIA's libraries, found by name when the program runs. None of them has to be there.

use std::error::Error;

use libloading::Library;

/// The first of some libraries that opens and that `take` can use; otherwise what each of them said.
pub(super) fn first_of<T>(names: &[String], take: impl Fn(Library) -> Result<T, String>) -> Result<T, String> {
    let mut reasons = Vec::new();
    for name in names {
        // SAFETY: the libraries named here are NVIDIA's, whose initialisers have no conditions.
        let reason = match unsafe { Library::new(name) } {
            Ok(library) => match take(library) {
                Ok(taken) => return Ok(taken),
                Err(reason) => format!("{name}: {reason}"),
            },
            // The loader's own words name the file, and often another one that this one needs.
            Err(error) => error.source().map_or_else(|| format!("{name}: {error}"), ToString::to_string),
        };
        reasons.push(reason);
    }
    Err(reasons.join("; "))
}

/// Opens the first of some names; otherwise says why none of them opens.
pub(super) fn open(names: &[String]) -> Result<Library, String> {
    first_of(names, Ok)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_cannot_be_used_is_passed_over_and_each_says_why() {
        let names = ["libm.so.6", "libkeye-none.so.13", "libc.so.6"].map(String::from);
        let tried = std::cell::Cell::new(0);
        let second = |_| {
            tried.set(tried.get() + 1);
            if tried.get() == 2 { Ok(()) } else { Err("it has no device".to_owned()) }
        };
        assert_eq!(first_of(&names, second), Ok(()));
        let reasons = first_of(&names[..2], |_| Err::<(), _>("it has no device".to_owned())).unwrap_err();
        assert!(reasons.starts_with("libm.so.6: it has no device; libkeye-none.so.13: cannot open"), "{reasons}");
    }
}
