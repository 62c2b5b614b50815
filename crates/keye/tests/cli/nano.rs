//! The model inside the program.

use crate::support::keye;

#[test]
fn without_a_name_the_model_inside_is_used_and_says_so_in_one_line() {
    let run = keye(&["ask", "--max-tokens", "1", "What is there?"]).ok();
    let lines: Vec<&str> = run.stderr.lines().filter(|line| line.contains("no --model")).collect();
    assert_eq!(
        lines,
        ["no --model: using keye-nano, the small model trained on synthetic shapes; it knows nothing else"]
    );
    let named = keye(&["ask", "-m", "keye-nano", "--max-tokens", "1", "What is there?"]).ok();
    assert!(!named.stderr.contains("no --model"), "{named:#?}");
    assert_eq!(named.stdout, run.stdout);
    let quiet = keye(&["chat", "-q", "--max-tokens", "1"]).ok();
    assert_eq!(quiet.stderr, "");
    let facts = keye(&["inspect", "--json"]).ok().json();
    assert_eq!((facts["directory"].as_str(), facts["weights"]["complete"].as_bool()), (Some("keye-nano"), Some(true)));
}

#[test]
fn the_model_inside_can_be_quantised() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("int8");
    keye(&["quantize", "keye-nano", "--to", "int8", "-o", dir.to_str().unwrap()]).ok();
    let facts = keye(&["inspect", "--json", dir.to_str().unwrap()]).ok().json();
    assert_eq!(facts["weights"]["complete"], true);
    assert!(facts["weights"]["types"]["U8"]["tensors"].as_u64().unwrap() > 0, "{facts:#}");
}
