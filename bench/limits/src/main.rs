//! Prints the machine's limits as one line of json.
//!
//! `cargo run --release -p keye-limits [-- THREADS]`

fn main() {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = std::env::args().nth(1).and_then(|n| n.parse().ok()).unwrap_or(cores);
    let limits = keye_limits::measure(threads);
    let giga = |rate: Option<f64>| rate.map_or("null".to_owned(), |rate| format!("{:.1}", rate / 1e9));
    println!(
        r#"{{"threads": {threads}, "read_gb_s": {}, "int8_gop_s": {}, "f16_gflop_s": {}, "f32_gflop_s": {}}}"#,
        giga(Some(limits.read)),
        giga(limits.int8),
        giga(limits.f16),
        giga(limits.f32),
    );
}
