//! `keye eval`: reports, and reports beside one another.

use std::collections::BTreeMap;
use std::fs;
#[cfg(unix)]
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use serde_json::json;

use crate::support::{command, keye, model};

#[test]
fn more_questions_at_once_than_servers_let_wait() {
    let ask = ["eval", "world", "-m", &model(), "--text-only", "--tasks", "trap", "--count", "100", "--at-once", "100"];
    let report = keye(&[&ask[..], &["--max-tokens", "1", "--max-model-len", "1024", "--json"]].concat()).ok().json();
    assert_eq!((report["tasks"][0]["count"].as_u64(), report["max_tokens"].as_u64()), (Some(100), Some(1)));
    assert!(report["cut"].as_u64() > Some(50) && report["cut"] == report["tasks"][0]["cut"], "{report:#}");
}

/// Two kinds are asked by name only.
#[test]
fn the_help_names_the_kinds_of_questions() {
    let help = keye(&["eval", "world", "--help"]).ok().stdout.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(
        help.contains("dense-caption, attribute") && help.contains("[default: all but follow and point]"),
        "{help}"
    );
}

/// An `ffmpeg` without H.264: its clips have another name, so that no run that has H.264 takes them.
#[cfg(unix)]
#[test]
fn clips_of_another_encoder_are_not_taken_for_the_usual_ones() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("ffmpeg");
    let script = "#!/bin/sh\ncase \"$*\" in *libx264*) echo \"Unknown encoder 'libx264'\" >&2; exit 1;; esac\n\
                  exec ffmpeg \"$@\"\n";
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let clips = dir.path().join("clips");
    // The files of H.264 and the others, each with the time when it was written.
    let run = |program: Option<&Path>| {
        let mut command = command();
        command.args(["eval", "world", "-m", &model(), "--tasks", "count", "--count", "2", "--max-tokens", "1"]);
        command.args(["--at-once", "1", "--max-model-len", "2048", "--clips"]).arg(&clips);
        command.envs(program.map(|program| ("KEYE_FFMPEG", program)));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let files = fs::read_dir(&clips).unwrap().map(|entry| entry.unwrap());
        let files =
            files.map(|file| (file.file_name().into_string().unwrap(), file.metadata().unwrap().modified().unwrap()));
        files.partition::<BTreeMap<_, _>, _>(|(name, _)| !name.ends_with("-mpeg4.mp4"))
    };
    let (usual, first) = run(Some(&program));
    assert_eq!((usual.len(), first.len()), (0, 2));
    let (usual, again) = run(Some(&program));
    assert!(
        usual.is_empty() && again.iter().filter(|file| first.get(file.0) == Some(file.1)).count() == 1,
        "{again:?}"
    );
    let (usual, other) = run(None);
    assert_eq!((usual.len(), other), (2, again));
}

/// Questions without clips to a model that knows nothing: the report is the same each time, and `compare` reads it.
#[test]
fn a_report_can_be_compared() {
    let dir = tempfile::tempdir().unwrap();
    let model = model();
    let ask = ["eval", "world", "-m", &model, "--text-only", "--tasks", "count,trap", "--count", "2", "--json"];
    let report = keye(&[&ask[..], &["--max-model-len", "1024"]].concat()).ok().json();
    assert_eq!((report["split"].as_str(), report["text_only"].as_bool()), (Some("test"), Some(true)));
    let rows = report["tasks"].as_array().unwrap();
    assert_eq!(rows.iter().map(|row| row["task"].as_str().unwrap()).collect::<Vec<_>>(), ["count", "trap"]);
    assert!(rows.iter().all(|row| row["count"] == 2 && row["scores"].as_array().unwrap().len() == 2), "{report:#}");

    let mut better = report.clone();
    for row in better["tasks"].as_array_mut().unwrap() {
        row["scores"] = json!([1.0, 1.0]);
    }
    let mut other = report.clone();
    other["tasks"].as_array_mut().unwrap().pop();
    let mut older = report.clone();
    older.as_object_mut().unwrap().remove("scoring").unwrap();
    let mut held_out = report.clone();
    held_out["split"] = json!("validation");
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let reports =
        [("a.json", report), ("b.json", better), ("c.json", other), ("older.json", older), ("v.json", held_out)];
    let [a, b, c, older, held_out] = reports.map(|(name, report)| {
        fs::write(path(name), report.to_string()).unwrap();
        path(name)
    });
    let svg = path("scores.svg");
    let table = keye(&["eval", "compare", &a, &b, "--svg", &svg]).ok().stdout;
    assert!(table.starts_with("| task | asked | chance | a | b |\n") && table.contains("| against a |"), "{table}");
    let picture = fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n") && picture.contains(">count<"), "{picture}");
    let compared = keye(&["eval", "compare", &a, &b, "--json"]).ok().json();
    assert_eq!(compared["reports"][1]["name"], "b");
    assert_eq!(compared["reports"][1]["mean"], 1.0);
    assert_eq!(compared["reports"][0]["difference"], json!({"mean": 0.0, "error": 0.0}));
    let mean = compared["reports"][0]["mean"].as_f64().unwrap();
    assert_eq!(compared["reports"][1]["difference"]["mean"].as_f64(), Some(1.0 - mean));

    let run = keye(&["eval", "compare", &a, &c, "--svg", &path("none.svg")]);
    assert!(run.code == Some(1) && run.stderr.contains("found 2 count") && run.stdout.is_empty(), "{run:#?}");
    assert!(!dir.path().join("none.svg").exists());
    for (other, words) in [(&older, ["older.json", "measure an older one again"]), (&held_out, ["a (test)", "--split"])]
    {
        let run = keye(&["eval", "compare", &a, other]);
        assert!(run.code == Some(1) && words.iter().all(|word| run.stderr.contains(word)), "{run:#?}");
    }
    for (name, text, words) in
        [("d.json", "{}", "expected a report of `keye eval world --json`"), ("e.json", "", "EOF")]
    {
        fs::write(path(name), text).unwrap();
        let run = keye(&["eval", "compare", &a, &path(name)]);
        assert!(run.code == Some(1) && run.stderr.contains(name) && run.stderr.contains(words), "{run:#?}");
    }
    let run = keye(&["eval", "compare", &path("missing.json")]);
    assert!(run.code == Some(1) && run.stderr.contains("missing.json"), "{run:#?}");
}
