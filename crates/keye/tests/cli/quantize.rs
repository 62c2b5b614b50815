//! `keye quantize` and `keye bench` as a user runs them.

use crate::support::{command, keye, model};

#[test]
fn a_quantised_model_answers() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().join("q").display().to_string();
    let report = keye(&["quantize", &model(), "--to", "int4", "-o", &dir, "--json"]).ok().json();
    assert_eq!(report["format"], "int4");
    assert!(report["report"]["roles"].as_array().unwrap().iter().any(|role| role["format"] == "int10"));
    let limits = ["--greedy", "--ignore-eos", "--max-tokens", "4", "--max-model-len", "256"];
    let answer = keye(&[&["ask", "-m", &dir, "What?"][..], &limits].concat()).ok();
    assert!(answer.stderr.contains("4 tokens"), "{answer:?}");
    let again = keye(&["quantize", &dir, "--to", "int8", "-o", &format!("{dir}2")]);
    assert!(again.code == Some(1) && again.stderr.contains("quantised already"), "{again:?}");
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 1);
    // Told before a model is looked for.
    std::os::unix::fs::symlink(&dir, root.path().join("link")).unwrap();
    let link = root.path().join("link").display().to_string();
    let refused = keye(&["quantize", "./no/such/model", "--to", "int8", "-o", &link]);
    assert!(refused.code == Some(2) && refused.stderr.contains("link is a link"), "{refused:?}");
}

#[test]
fn bench_takes_models_as_other_commands_do() {
    let missing = keye(&["bench", "-m", "./no/such/model", "--only", "start"]);
    assert!(missing.code == Some(3) && missing.stderr.contains("./no/such/model"), "{missing:?}");
    let bare = keye(&["bench"]);
    assert!(
        bare.code == Some(2) && bare.stderr.contains("Usage: keye bench <--preset <NAME>|--model <DIR|HUB_ID>>"),
        "{bare:?}"
    );
    let nowhere = keye(&["bench", "--preset", "keye-tiny", "--only", "start", "--dir", "/no/such/folder"]);
    assert!(nowhere.code == Some(2) && nowhere.stderr.contains("--dir: there is no directory"), "{nowhere:?}");
    let there = keye(&["bench", "--preset", "keye-tiny", "--write-checkpoint", &model()]);
    assert!(there.code == Some(2) && there.stderr.contains("--write-checkpoint: "), "{there:?}");
}

/// It takes most of a minute, in which nothing was told.
#[cfg(unix)]
#[test]
fn bench_says_that_it_makes_a_clip() {
    use std::os::unix::fs::PermissionsExt;
    let root = tempfile::tempdir().unwrap();
    let program = root.path().join("ffmpeg");
    std::fs::write(&program, "#!/bin/sh\n[ \"$1\" = -version ] && exit 0\nsleep 0.3\nexit 1\n").unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    let mut command = command();
    command.args(["bench", "-m", &model(), "--only", "media"]).env("KEYE_FFMPEG", &program);
    let output = command.output().unwrap();
    let told = String::from_utf8(output.stderr).unwrap();
    assert!(told.contains("media: making a minute of 720p") && told.contains("making the clip, 0 B so far"), "{told}");
    assert!(output.status.code() == Some(4) && told.contains("an ffmpeg with libx264"), "{told}");
}

#[test]
fn bench_prints_the_documented_keys() {
    let root = tempfile::tempdir().unwrap();
    let dir = root.path().display().to_string();
    let parts = ["--only", "start,decode,vision", "--repeat", "1", "--threads", "1", "--dir", &dir, "--json"];
    let report = keye(&[&["bench", "--preset", "keye-1.5-tiny", "--quant", "int8"][..], &parts].concat()).ok().json();
    assert!(report["limits"]["read_gb_s"].as_f64().unwrap() > 0.1, "{report}");
    for key in ["int8_gop_s", "f16_gflop_s", "f32_gflop_s"] {
        assert!(report["limits"].get(key).is_some(), "{key}");
    }
    let contexts: Vec<_> = report["decode"].as_array().unwrap().iter().map(|run| run["context"].as_u64()).collect();
    assert_eq!(contexts, [Some(128), Some(4096)]);
    assert!(report["decode"][0]["tok_s"].as_f64().unwrap() > 0.0);
    assert_eq!(report["vision"][1]["patches"], 4096);
    assert!(report["first_token_s"].as_f64().unwrap() > 0.0 && report["rss_gb"].as_f64().unwrap() > 0.0);
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0, "the weights are gone");
    let refused = keye(&["bench", "--write-checkpoint", &dir, "--preset", "keye-tiny", "--json"]);
    assert_eq!(refused.code, Some(2), "{refused:?}");
}
