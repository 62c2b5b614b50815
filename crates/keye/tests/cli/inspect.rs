//! `keye inspect`, `bench`, `eval`, `completions`, `--help`.

use crate::support::{fixture, keye};

#[test]
fn a_whole_checkpoint() {
    let dir = fixture("keye-1_5-tiny").join("model");
    let dir = dir.to_str().unwrap();
    let facts = keye(&["inspect", dir, "--json"]).ok().json();
    assert_eq!(facts["variant"], "Keye-VL-1.5");
    assert_eq!(facts["weights"]["complete"], true);
    // 2 (keys, values) x 4 layers x 2 heads x 32 wide x 4 bytes
    assert_eq!(facts["kv_cache"]["f32"]["bytes_per_token"], 2048);
    assert_eq!(facts["kv_cache"]["bf16"]["bytes_at_8k"], 1024 * 8192);
    assert_eq!(facts["generation"]["top_k"], 20);
    // 960 x 64 twice, 4 layers of q 128x64, k and v 64x64, o 64x128, two norms of 32, two of 64, MLP 3 x 144x64, and the last norm
    assert_eq!(facts["parameters"]["text"], 2 * 61440 + 4 * (8192 + 4096 * 2 + 8192 + 64 + 128 + 27648) + 64);
    assert_eq!(facts["special_tokens"]["end"].as_array().unwrap().len(), 2);
    let text = keye(&["inspect", dir]).ok().stdout;
    assert!(text.contains("all tensors are there") && text.contains("<|image_pad|>"), "{text}");
}

/// The tiny 2.0 model has no tokenizer.
#[test]
fn what_can_be_told_is_told_when_a_file_is_missing() {
    let dir = fixture("keye-2-tiny").join("model");
    let dir = dir.to_str().unwrap();
    let run = keye(&["inspect", dir, "--json"]);
    assert_eq!(run.code, Some(3), "{run:#?}");
    let facts = run.json();
    assert_eq!((&facts["variant"], &facts["weights"]["complete"]), (&"Keye-VL-2.0".into(), &true.into()), "{facts}");
    assert!(facts["memory"]["f32"]["total"].as_u64().unwrap() > 0 && facts["special_tokens"].is_null(), "{facts}");
    assert_eq!(facts["processor"]["complete"], false);
    let problem = facts["processor"]["problem"].as_str().unwrap();
    assert!(problem.contains(dir) && run.stderr.contains(problem), "{run:#?}");
    let run = keye(&["inspect", dir]);
    assert!(run.code == Some(3) && run.stdout.contains(&format!("problem        {problem}")), "{run:#?}");
    assert!(run.stdout.contains("all tensors are there") && run.stdout.contains("memory f32"), "{run:#?}");
    assert!(!run.stdout.contains("videos "), "{run:#?}");
}

#[test]
fn the_variable_names_the_model_and_steps_back_behind_a_preset() {
    let dir = crate::support::model();
    let inspect = |variable: &str, arguments: &[&str]| {
        let mut command = crate::support::command();
        command.env("KEYE_MODEL", variable).args(["inspect", "--json"]).args(arguments);
        let output = command.output().unwrap();
        (output.status.code(), serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap_or_default())
    };
    let (code, facts) = inspect(&dir, &[]);
    assert_eq!((code, facts["directory"].as_str()), (Some(0), Some(dir.as_str())));
    #[cfg(feature = "nano")]
    assert_eq!(inspect("", &[]).1["directory"], "keye-nano");
    let (code, facts) = inspect("./no/such/model", &["--preset", "keye-vl-2"]);
    assert_eq!((code, facts["variant"].as_str()), (Some(0), Some("Keye-VL-2.0")));
    assert_eq!(inspect(&dir, &["./other", "--preset", "keye-vl-2"]).0, Some(2));
}

#[test]
fn a_written_checkpoint_answers() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("model");
    let dir = dir.to_str().unwrap();
    let write = ["bench", "--write-checkpoint", dir, "--preset", "keye-tiny", "--dtype", "f32", "--seed", "3"];
    keye(&write).ok();
    assert_eq!(keye(&["inspect", dir, "--json"]).ok().json()["weights"]["complete"], true);
    keye(&["ask", "-m", dir, "--max-tokens", "2", "Hello?"]).ok();
    let again = keye(&write);
    assert_eq!(again.code, Some(2));
    assert!(again.stderr.contains("choose another name"), "{again:#?}");
}

#[test]
fn help_teaches_by_example() {
    let commands = ["ask", "chat", "trace", "inspect", "bench", "quantize", "completions"];
    for command in commands.into_iter().chain(cfg!(feature = "serve").then_some("serve")) {
        let help = keye(&[command, "--help"]).ok().stdout;
        let examples = help.split("Examples:").nth(1).map_or(0, |text| text.matches("keye ").count());
        assert!(examples >= 3, "{command}: {help}");
    }
    assert!(keye(&["--help"]).ok().stdout.contains("130  interrupted"));
    assert!(keye(&["--version"]).ok().stdout.starts_with("keye 0."));
    for shell in ["bash", "zsh", "fish"] {
        assert!(keye(&["completions", shell]).ok().stdout.contains("max-model-len"), "{shell}");
    }
}

#[test]
fn the_world_is_asked_about() {
    let model = crate::support::model();
    let eval = ["eval", "world", "-m", &model, "--count", "1"];
    let run = |more: &[&str]| keye(&[&eval, more].concat());
    let report = run(&["--tasks", "when,count", "--json", "--show"]).ok();
    let json = report.json();
    assert_eq!((&json["split"], &json["frames"]), (&"test".into(), &"slow-fast".into()));
    assert_eq!(json["tasks"].as_array().unwrap().len(), 2);
    assert!((0.0..=1.0).contains(&json["mean"].as_f64().unwrap()), "{json}");
    assert!(report.stderr.contains("test-question-") && report.stderr.contains("[when]"), "{report:#?}");
    let table = run(&["--tasks", "count", "--frames", "uniform"]).ok().stdout;
    assert!(table.contains("chance") && table.contains("mean of tasks"), "{table}");
    run(&["--tasks", "count", "--text-only"]).ok();
    let wrong = run(&["--tasks", "smell"]);
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("dense-caption"), "{wrong:#?}");
}
