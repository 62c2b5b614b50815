//! Embeds compiled kernels: what lies in `cubins/`, where `xtask kernels --embed` puts them. Only for the feature `cuda`.

use std::fmt::Write;
use std::path::PathBuf;
use std::{env, fs};

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    let mut list = String::new();
    if env::var_os("CARGO_FEATURE_CUDA").is_some() {
        let folder = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("cubins");
        println!("cargo:rerun-if-changed={}", folder.display());
        let mut files: Vec<PathBuf> =
            fs::read_dir(&folder).expect("the folder can be read").flatten().map(|entry| entry.path()).collect();
        files.sort();
        for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "cubin")) {
            let name = file.file_name().expect("a file has a name");
            writeln!(list, "    ({name:?}, include_bytes!({file:?}).as_slice()),").expect("strings take all");
        }
    }
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it")).join("cubins.rs");
    fs::write(out, format!("&[\n{list}]\n")).expect("the output folder can be written");
}
