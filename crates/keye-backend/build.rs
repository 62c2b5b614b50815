//! Embeds compiled kernels, deflated: what lies in `cubins/`, where `xtask kernels --embed` puts them. Only for the feature
//! `cuda`.

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    embed();
}

#[cfg(feature = "cuda")]
fn embed() {
    use std::fmt::Write;
    use std::path::PathBuf;
    use std::{env, fs};

    let folder = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it")).join("cubins");
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut files: Vec<PathBuf> =
        fs::read_dir(&folder).expect("the folder can be read").flatten().map(|entry| entry.path()).collect();
    files.sort();
    let mut list = String::new();
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "cubin")) {
        let name = file.file_name().expect("a file has a name");
        let deflated = out.join(name).with_extension("deflate");
        let code = miniz_oxide::deflate::compress_to_vec(&fs::read(file).expect("a file that was listed"), 9);
        fs::write(&deflated, code).expect("the output folder can be written");
        writeln!(list, "    ({name:?}, include_bytes!({deflated:?}).as_slice()),").expect("strings take all");
    }
    fs::write(out.join("cubins.rs"), format!("&[\n{list}]\n")).expect("the output folder can be written");
}
