//! `keye ask`.

use std::io::Read;

use crate::support::{ask, command, fixture, input, keye, keye_with, model};

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
fn an_answer_has_the_form_that_was_asked_for() {
    let picture = input("one.png");
    for flags in [&["-q"][..], &[]] {
        let run =
            ask(&[flags, &["--no-think", &picture, "Is it red?", "--choice", "red", "--choice", "not red </think>"]]
                .concat())
            .ok();
        assert!(["red\n", "not red </think>\n"].contains(&run.stdout.as_str()), "{run:#?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("schema.json");
    let schema = r#" {"type": "object", "properties": {"red": {"type": "boolean"}}, "required": ["red"], "additionalProperties": false}"#;
    std::fs::write(&path, schema).unwrap();
    for schema in [schema, path.to_str().unwrap()] {
        let run = ask(&["-q", "--no-think", &picture, "Is it red?", "--json-schema", schema]).ok();
        let found: serde_json::Value = serde_json::from_str(&run.stdout).unwrap();
        assert!(found["red"].is_boolean(), "{run:#?}");
        let object = ask(&["--json", "--no-think", &picture, "Is it red?", "--json-schema", schema]).ok().json();
        assert_eq!(object["parts"]["answer"].as_str(), run.stdout.strip_suffix('\n'));
    }
    for (wrong, told) in [
        ("gone.json", "--json-schema gone.json: expected a file"),
        ("{", "a schema in JSON"),
        (r#"{"type": 1}"#, "--json-schema: "),
        (r#"{"type": "obj"}"#, "--json-schema: Invalid type: obj"),
        (r#"{"type": "string", "pattern": "("}"#, "--json-schema: regex parse error: unclosed group"),
    ] {
        let run = ask(&["--no-think", &picture, "Is it red?", "--json-schema", wrong]);
        assert!(run.code == Some(2) && run.stderr.contains(told), "{run:#?}");
    }
}

/// A program would take it for a whole answer.
#[test]
fn an_answer_that_is_cut_off_before_it_has_its_form_is_1() {
    let model = model();
    let short =
        ["ask", "-m", &model, "--greedy", "--max-model-len", "2048", "--max-tokens", "2", "--no-think", "What?"];
    let schema =
        r#"{"type": "object", "properties": {"red": {"const": "a text of many letters"}}, "required": ["red"]}"#;
    for form in [["--json-schema", schema], ["--choice", "a text of many letters"]] {
        for flags in [&[][..], &["-q"]] {
            let run = keye(&[&short[..], &form, flags].concat());
            assert!(run.code == Some(1) && run.stdout.len() > 1, "{run:#?}");
            for words in [form[0], "cut off after 2 tokens", "--max-tokens (it is 2)", "--no-think"] {
                assert!(run.stderr.contains(words), "{words}: {run:#?}");
            }
            assert_eq!(run.stderr.matches("cut off").count(), 1, "{run:#?}");
        }
        let run = keye(&[&short[..], &form, &["--json"]].concat());
        assert!(run.code == Some(1) && run.stderr.contains("cut off after 2 tokens"), "{run:#?}");
        assert_eq!(run.json()["finish_reason"], "length");
    }
    // Without a form a piece of an answer is one.
    keye(&[&short[..], &["-q"]].concat()).ok();
}

#[test]
fn json_tells_which_frames_the_model_saw() {
    let (clip, picture) = (input("clip.mp4"), input("one.png"));
    let run = ask(&["--json", "-q", "--max-pixels", "50176", &clip, &picture, "What?"]).ok();
    assert_eq!(run.stderr, "");
    let media = run.json()["media"].clone();
    for medium in media.as_array().unwrap() {
        assert_eq!(medium["warnings"], serde_json::json!([]));
        let shown = medium["shown"].as_array().unwrap();
        assert_eq!(Some(shown.len() as u64), medium["frames"].as_u64(), "{medium:#}");
        let slow = shown.iter().filter(|frame| frame["kind"] == "slow").count();
        assert_eq!(Some(slow as u64), medium["slow_frames"].as_u64(), "{medium:#}");
        let side = |frame: &serde_json::Value, name: &str| frame[name].as_u64().unwrap() / 14;
        let patches: u64 = shown.iter().map(|frame| side(frame, "width") * side(frame, "height")).sum();
        assert_eq!(Some(patches), medium["patches"].as_u64(), "{medium:#}");
    }
    let times: Vec<f64> = media[0]["shown"].as_array().unwrap().iter().map(|f| f["time"].as_f64().unwrap()).collect();
    assert!(times.len() > 2 && times.is_sorted() && times.iter().all(|time| time.to_string().len() < 10), "{times:?}");
    assert!(media[1]["shown"][0]["time"].is_null() && media[1]["shown"][0]["index"] == 0, "{media:#}");
}

/// An answer about the first part of a clip is none about the clip.
#[test]
fn a_clip_that_is_cut_short_is_told() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.mp4");
    let mut ffmpeg = std::process::Command::new("ffmpeg");
    ffmpeg.args(["-nostdin", "-loglevel", "error", "-i", &input("clip.mp4"), "-c", "copy", "-movflags", "+faststart"]);
    assert!(ffmpeg.arg(&path).status().unwrap().success());
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() * 7 / 10]).unwrap();
    let words = ["--max-pixels", "50176", path.to_str().unwrap(), "What?"];
    let told = "the file seems cut short or damaged";
    let run = ask(&words).ok();
    assert!(run.stderr.lines().any(|line| line.starts_with("cut.mp4: ") && line.ends_with(told)), "{run:#?}");
    let object = ask(&[&words[..], &["--json"]].concat()).ok().json();
    assert!(object["media"][0]["warnings"][0].as_str().unwrap().ends_with(told), "{object:#}");
}

/// Names of files are bytes.
#[cfg(target_os = "linux")]
#[test]
fn a_name_that_is_not_utf_8_names_a_file_all_the_same() {
    use std::os::unix::ffi::OsStrExt;
    let folder = tempfile::tempdir().unwrap();
    let name = std::ffi::OsStr::from_bytes(b"one-\xff.png");
    let path = folder.path().join(name);
    std::fs::copy(input("one.png"), &path).unwrap();
    let run = |words: &[&std::ffi::OsStr]| {
        let mut command = command();
        command.args(["ask", "-m", &model(), "--greedy", "--max-tokens", "1", "--max-model-len", "2048"]).args(words);
        let output = command.output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, told) = run(&[path.as_os_str(), "What?".as_ref()]);
    assert!(code == Some(0) && told.contains("one-\u{fffd}.png: "), "{told}");
    let (code, told) = run(&[path.as_os_str()]);
    assert!(code == Some(2) && told.contains("the question comes last"), "{told}");
    let (code, told) = run(&[name]);
    assert!(code == Some(2) && told.contains("the question is not UTF-8"), "{told}");
    let (code, told) = run(&["--system".as_ref(), name, "What?".as_ref()]);
    assert!(code == Some(2) && told.contains(r#"found "one-\xFF.png" (number 10)"#), "{told}");
}

#[test]
fn a_file_url_may_have_escapes() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(input("one.png"), folder.path().join("a b.png")).unwrap();
    let run = ask(&[&format!("file://{}/a%20b.png", folder.path().display()), "What?"]).ok();
    assert!(run.stderr.contains("a%20b.png: "), "{run:#?}");
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

/// A program in the decoder's place that writes its process id and then nothing for a minute.
#[cfg(target_os = "linux")]
fn silent_decoder(folder: &std::path::Path) -> (std::path::PathBuf, std::path::PathBuf) {
    use std::os::unix::fs::PermissionsExt;
    let (program, pid) = (folder.join("decoder"), folder.join("pid"));
    let script = format!(
        "#!/bin/sh\n[ \"$1\" = -version ] && exit 0\necho $$ > {0}.new\nmv {0}.new {0}\nexec sleep 60\n",
        pid.display()
    );
    std::fs::write(&program, script).unwrap();
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755)).unwrap();
    (program, pid)
}

fn eventually<T>(mut look: impl FnMut() -> Option<T>) -> T {
    let start = std::time::Instant::now();
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(start.elapsed() < std::time::Duration::from_secs(20), "it does not happen");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
}

/// A decoder with nothing to write outlived a killed keye, and the terminal's Ctrl-C hit it too.
#[cfg(target_os = "linux")]
#[test]
fn a_decoder_has_its_own_group_and_ends_with_keye() {
    let folder = tempfile::tempdir().unwrap();
    let (program, pid) = silent_decoder(folder.path());
    for signal in [libc::SIGKILL, libc::SIGINT] {
        let _ = std::fs::remove_file(&pid);
        let mut command = command();
        command.args(["ask", "-m", &model(), &input("clip.mp4"), "What?"]).env("KEYE_FFMPEG", &program);
        let mut child = command.spawn().unwrap();
        let decoder: libc::pid_t = eventually(|| std::fs::read_to_string(&pid).ok()).trim().parse().unwrap();
        // SAFETY: asks for the group of a process, touches no memory.
        assert_eq!(unsafe { libc::getpgid(decoder) }, decoder);
        // SAFETY: sends a signal to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, signal) }, 0);
        let status = child.wait().unwrap();
        assert_eq!(status.code(), (signal == libc::SIGINT).then_some(130));
        eventually(|| {
            let state = std::fs::read_to_string(format!("/proc/{decoder}/stat")).unwrap_or_default();
            (state.is_empty() || state.contains(") Z ")).then_some(())
        });
    }
}

/// Ctrl-C waited for a server that says nothing.
#[test]
fn interrupted_while_a_server_is_silent() {
    let server = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/a.png", server.local_addr().unwrap());
    let mut child = command().args(["ask", "-m", &model(), &url, "What?"]).spawn().unwrap();
    server.set_nonblocking(true).unwrap();
    let _connection = eventually(|| {
        assert_eq!(child.try_wait().unwrap(), None, "it ended before it asked the server");
        server.accept().ok()
    });
    let start = std::time::Instant::now();
    // SAFETY: sends a signal to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(child.id() as libc::pid_t, libc::SIGINT) }, 0);
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert!(start.elapsed() < std::time::Duration::from_secs(10));
}
