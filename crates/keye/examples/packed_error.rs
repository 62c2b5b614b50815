//! What packing loses: relative RMS error of int4 and int8 on a matrix, as one line of json.
//!
//! `cargo run --release -p keye --example packed_error -- FILE ROWS COLS`, FILE of little-endian f32.

use anyhow::{Context, Result, bail};
use keye_backend::Dtype;
use keye_backend::packed::{pack_rows, unpack};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [file, rows, cols] = arguments.as_slice() else { bail!("expected FILE ROWS COLS") };
    let (rows, cols): (usize, usize) = (rows.parse()?, cols.parse()?);
    let bytes = std::fs::read(file).with_context(|| file.clone())?;
    let values: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    if values.len() != rows * cols {
        bail!("{file}: expected {rows} x {cols} values, found {}", values.len());
    }
    let mut out = serde_json::Map::new();
    for (name, dtype) in [("int4", Dtype::Int4), ("int8", Dtype::Int8)] {
        let size = dtype.stored_bytes(rows, cols).context("too large")?;
        let mut packed = vec![0; size];
        pack_rows(dtype, rows, cols, &values, &mut packed)?;
        let found = unpack(dtype, rows, cols, &packed)?;
        let square = |x: f32| f64::from(x).powi(2);
        let error: f64 = values.iter().zip(&found).map(|(a, b)| square(a - b)).sum();
        let energy: f64 = values.iter().map(|x| square(*x)).sum();
        let bits = 8.0 * size as f64 / (rows * cols) as f64;
        out.insert(name.into(), serde_json::json!({"relative_rms_error": (error / energy).sqrt(), "bits": bits}));
    }
    println!("{}", serde_json::Value::Object(out));
    Ok(())
}
