//! `keye chat` with its questions piped in.

use crate::support::{input, keye_with, model};

#[test]
fn a_second_turn_is_answered_from_the_cache() {
    let folder = tempfile::tempdir().unwrap();
    let saved = folder.path().join("messages.json");
    let lines = format!(
        "/add {}#min_pixels=23520\nWhat is this?\n\nAnd what else?\n/save {}\n/nonsense\n/add missing.png\n/clear\nHello\n/quit\n",
        input("one.png"),
        saved.display()
    );
    let model = model();
    let arguments = ["chat", "-m", &model, "--greedy", "--ignore-eos", "--max-tokens", "70", "--max-model-len", "2048"];
    let run = keye_with(&arguments, Some(lines.as_bytes())).ok();
    let counts: Vec<&str> = run.stderr.lines().filter(|line| line.starts_with("prompt ")).collect();
    let cached = |line: &str| -> usize {
        let before = line.split(" cached").next().unwrap();
        before.rsplit(' ').next().unwrap().parse().unwrap()
    };
    assert_eq!(counts.len(), 3, "{run:#?}");
    assert_eq!(cached(counts[0]), 0, "{run:#?}");
    assert!(cached(counts[1]) >= 64, "{run:#?}");
    assert!(counts[..2].iter().all(|line| line.contains("(35 media")), "{run:#?}");
    assert!(counts[2].contains("(0 media"), "nothing is left after /clear: {run:#?}");
    for words in ["/nonsense is unknown", "missing.png: cannot read", "goes with the next question"] {
        assert!(run.stderr.contains(words), "{words}: {run:#?}");
    }
    let messages: serde_json::Value = serde_json::from_slice(&std::fs::read(saved).unwrap()).unwrap();
    let messages = messages["messages"].as_array().unwrap();
    let roles: Vec<&str> = messages.iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["user", "assistant", "user", "assistant"]);
    assert_eq!(messages[0]["content"][0]["image"], input("one.png"));
    assert_eq!(messages[0]["content"][0]["min_pixels"], 23520);
    assert_eq!(messages[2]["content"], "And what else?");
}

#[test]
fn a_question_that_fails_leaves_the_chat_as_it_was() {
    let model = model();
    let arguments = ["chat", "-m", &model, "--greedy", "--max-tokens", "4", "--max-model-len", "128"];
    let lines = format!("{}\nHello\n", "long ".repeat(400));
    let run = keye_with(&arguments, Some(lines.as_bytes()));
    // Once where it happened, and once in the end, since a script sees the exit code only.
    assert_eq!(run.code, Some(2), "{run:#?}");
    assert_eq!(run.stderr.lines().filter(|line| line.starts_with("keye: ")).count(), 2, "{run:#?}");
    assert_eq!(run.stderr.lines().filter(|line| line.starts_with("prompt ")).count(), 1, "{run:#?}");
}
