//! `keye eval`: reports, and reports beside one another.

use std::fs;

use serde_json::json;

use crate::support::{keye, model};

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
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let [a, b, c] = [("a.json", report), ("b.json", better), ("c.json", other)].map(|(name, report)| {
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
