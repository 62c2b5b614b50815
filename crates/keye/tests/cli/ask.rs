//! `keye ask`.

use std::io::Read;

use crate::support::{ask, command, fixture, input, keye_with, model};

fn golden_text(case: &str) -> String {
    let path = fixture("keye-1_5-tiny").join("cases").join(format!("{case}.json"));
    let value: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    value["generated_text"].as_str().unwrap().to_owned()
}

#[test]
fn an_image_and_a_clip_give_the_golden_text_however_it_is_shown() {
    let cases: [(&str, &[&str]); 2] = [
        ("image_one", &[&input("one.png"), "--think", "Describe this image."]),
        ("video_file", &["--fps", "2", "--max-pixels", "78400", &input("clip.mp4"), "Describe the video in detail."]),
    ];
    for (case, arguments) in cases {
        let streamed = ask(arguments).ok();
        let json = ask(&[arguments, &["--json"]].concat()).ok();
        let object = json.json();
        let answer = object["answer"].as_str().unwrap();
        assert_eq!(streamed.stdout, format!("{answer}\n"), "{case}");
        assert_eq!(answer, golden_text(case), "{case}");
        assert_eq!(json.stderr, "");
        assert_eq!(object["finish_reason"], "length");
        assert_eq!(object["usage"]["completion_tokens"], 16);
        assert_eq!(object["usage"]["media_tokens"], object["media"][0]["tokens"]);
        assert!(object["timings"]["total"].as_f64().unwrap() >= object["timings"]["first_token"].as_f64().unwrap());
        let status = format!("prompt {} tokens", object["usage"]["prompt_tokens"]);
        assert!(streamed.stderr.contains(&status), "{streamed:#?}");
        assert!(streamed.stderr.contains("cut off after 16 tokens; --max-tokens"), "{streamed:#?}");
    }
}

#[test]
fn quiet_is_the_answer_alone() {
    let run = ask(&["-q", &input("one.png"), "--think", "Describe this image."]).ok();
    assert_eq!(run.stderr, "");
    assert_eq!(run.stdout.trim(), golden_text("image_one").trim());
}

#[test]
fn a_fragment_is_a_flag_for_one_item() {
    let clip = input("clip.mp4");
    let facts = |arguments: &[&str]| ask(&[arguments, &["--json", "What?"]].concat()).ok().json()["media"].clone();
    let with_fragment = facts(&[&format!("{clip}#fps=1&max_pixels=50176"), &clip]);
    let with_flags = facts(&["--fps", "1", "--max-pixels", "50176", &clip]);
    assert_eq!(with_fragment[0], with_flags[0]);
    assert_ne!(with_fragment[0]["frames"], with_fragment[1]["frames"]);
    assert_eq!(with_fragment[0]["name"], "clip.mp4");
    assert_eq!(with_fragment[0]["kind"], "video");
    let part = facts(&[&format!("{clip}#t=0,1&max_pixels=50176")]);
    let same = facts(&["--start", "0", "--end", "1", "--max-pixels", "50176", &clip]);
    assert_eq!(part, same);
    assert!(part[0]["frames"].as_u64() < with_fragment[1]["frames"].as_u64());
    let mine_wins = facts(&["--fps", "2", &format!("{clip}#fps=1&max_pixels=50176")]);
    assert_eq!(mine_wins[0], with_flags[0]);
}

#[test]
fn media_from_standard_input() {
    let bytes = std::fs::read(input("one.png")).unwrap();
    let model = model();
    let arguments = ["ask", "-m", &model, "--greedy", "--ignore-eos", "--max-tokens", "16", "--max-model-len", "1024"];
    let run = keye_with(&[&arguments[..], &["-", "--think", "Describe this image."]].concat(), Some(&bytes)).ok();
    assert_eq!(run.stdout, format!("{}\n", golden_text("image_one")));
    let run = keye_with(&[&arguments[..], &["-", "--think", "Describe this image."]].concat(), Some(b""));
    assert_eq!(run.code, Some(4), "{run:#?}");
    assert!(run.stderr.contains("standard input: nothing came"), "{run:#?}");
}

#[test]
fn the_seed_repeats_an_answer() {
    let sampled = |seed: &str| {
        let model = model();
        let arguments =
            ["ask", "-m", &model, "--max-model-len", "1024", "--json", "--ignore-eos", "--max-tokens", "24"];
        let sampling = ["--temperature", "3", "--top-k", "0", "--top-p", "1", "--seed", seed, "Say something."];
        let object = keye_with(&[&arguments[..], &sampling].concat(), None).ok().json();
        assert_eq!(object["seed"].to_string(), seed);
        object["answer"].clone()
    };
    assert_eq!(sampled("7"), sampled("7"));
    assert_ne!(sampled("7"), sampled("8"));
}

#[test]
fn a_pipe_that_is_closed_early_ends_it_quietly() {
    let model = model();
    let mut command = command();
    command.args([
        "ask",
        "-m",
        &model,
        "--greedy",
        "--ignore-eos",
        "--max-tokens",
        "900",
        "--max-model-len",
        "1024",
        "-q",
    ]);
    command.arg("Tell a long story.");
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!((child.wait().unwrap().code(), stderr.as_str()), (Some(0), ""));
}

/// The first Ctrl-C ends the request in order.
#[test]
fn interrupted() {
    let model = model();
    let mut command = command();
    command.args([
        "ask",
        "-m",
        &model,
        "--greedy",
        "--ignore-eos",
        "--max-tokens",
        "30000",
        "--max-model-len",
        "32000",
    ]);
    command.arg("Tell a long story.");
    let mut child = command.spawn().unwrap();
    // It is at work when the first piece of the answer comes.
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 4]).unwrap();
    // SAFETY: sends a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    // What it still writes has to go somewhere.
    stdout.read_to_end(&mut Vec::new()).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
