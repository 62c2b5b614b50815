//! Wrong inputs: exit codes, and messages that name input and remedy.

use crate::support::{ask, command, fixture, input, keye, model};

#[test]
fn usage_is_2() {
    let clip = input("clip.mp4");
    let image = input("one.png");
    let (part, backwards) = (format!("{clip}#t=5"), format!("{clip}#t=5,2.5"));
    for (arguments, words) in [
        (vec!["--fps", "1", image.as_str(), "What?"], "--fps is for videos, and there are none"),
        (vec!["--presence-penalty", "7", "What?"], "--presence-penalty is 7"),
        (vec!["--temperature", "1", "What?"], "--greedy"),
        (vec!["--max-reasoning-tokens", "-1", "What?"], "--max-reasoning-tokens"),
        (vec!["--stop", "", "What?"], "--stop: a stop string has 0 bytes"),
        (vec!["--choice", "", "What?"], "--choice: expected a text"),
        (vec![image.as_str()], "the question comes last"),
        (vec![image.as_str(), clip.as_str()], "clip.mp4 is a file"),
        (vec![image.as_str(), part.as_str()], "the question comes last, behind the media, and is missing"),
        (vec!["What is it?", clip.as_str()], "\"What is it?\" stands before"),
        (vec![image.as_str(), "https://example.org/a.png"], "https://example.org/a.png is a URL"),
        (vec!["-"], "- is standard input"),
        (
            vec!["--start", "5", "--end", "2.5", clip.as_str(), "What?"],
            "ends at 2.5 s, before it starts (--start) at 5 s",
        ),
        (vec!["--end", "2.5", part.as_str(), "What?"], "ends at 2.5 s, before it starts (--start) at 5 s"),
        (vec![backwards.as_str(), "What?"], "ends at 2.5 s, before it starts at 5 s"),
        (vec!["ftp://example.org/a.png", "What?"], "kinds of URL"),
        (vec!["", "What?"], "found nothing"),
        (vec!["-", "-", "What?"], "once only"),
        (vec!["https://example.org/watch", "What?"], "video:https://example.org/watch"),
        (vec!["--think", "--no-think", "What?"], "cannot be used with"),
    ] {
        let run = ask(&arguments);
        assert_eq!(run.code, Some(2), "{run:#?}");
        assert!(run.stderr.contains(words), "{words}: {run:#?}");
        assert_eq!(run.stdout, "");
    }
    let run = ask(&[&format!("{clip}#fsp=1"), "What?"]);
    assert_eq!(run.code, Some(2), "{run:#?}");
    assert!(run.stderr.contains("fsp") && run.stderr.contains("video_start"), "{run:#?}");
    let run = ask(&["--nframes", "8", &clip, "What?"]);
    assert_eq!(run.code, Some(2), "{run:#?}");
    assert!(run.stderr.contains("nframes") && run.stderr.contains("Keye-VL-8B-Preview"), "{run:#?}");
    #[cfg(not(feature = "nano"))]
    assert_eq!(keye(&["ask", "What?"]).code, Some(2), "no model");
    let run = keye(&["ask", "-m", &model(), "--max-tokens", "0", "What?"]);
    assert!(run.code == Some(2) && run.stderr.contains("--max-tokens is 0"), "{run:#?}");
    let run = keye(&["chat", "-m", &model(), "--start", "5", "--end", "2"]);
    assert!(run.code == Some(2) && run.stderr.contains("before it starts"), "{run:#?}");
}

/// What is asked for in vain is the command line's fault: the model itself can be loaded.
#[test]
fn settings_that_a_model_does_not_take_are_2() {
    for (flags, words) in [
        (["--frame-prefix", "{ts:.1f}"], "a frame prefix is for Keye-VL-2.0"),
        (["--video-budget", "adaptive"], "are for Keye-VL-2.0"),
        (["--processor-min-pixels", "0"], "min_pixels and max_pixels: expected 1 or more"),
        (["--max-model-len", "0"], "this model takes 1 to"),
        (["--max-model-len", "100000000"], "this model takes 1 to"),
        (["--tp", "3"], "this model takes 1, 2, 4"),
        (["--scorer", "fp8"], "no indexer"),
        #[cfg(not(feature = "cuda"))]
        (["--device", "cuda"], "build with --features cuda"),
    ] {
        let run = keye(&[&["ask", "-m", &model()][..], &flags, &["What?"]].concat());
        assert!(run.code == Some(2) && run.stderr.contains(words), "{words}: {run:#?}");
    }
    let output = command().args(["ask", "-m", &model(), "What?"]).env("KEYE_ISA", "abacus").output().unwrap();
    assert_eq!(output.status.code(), Some(2), "{output:?}");
}

/// Whichever way this was built: what is missing is said. With a GPU the check takes minutes, and is another's.
#[test]
fn a_gpu_check_without_a_gpu_is_1() {
    let run = keye(&["gpu-check", "--device", "4096", "--json"]);
    assert_eq!(run.code, Some(1), "{run:#?}");
    let words = ["build with --features cuda", "is NVIDIA's driver installed?", "GPU 4096 was asked for"];
    assert!(words.iter().any(|words| run.stderr.contains(words)), "{run:#?}");
}

#[test]
#[cfg(not(feature = "parquet"))]
fn a_command_of_other_builds_names_the_build() {
    let run = keye(&["world", "./clips", "--count", "3"]);
    assert_eq!(run.code, Some(1), "{run:#?}");
    assert!(run.stderr.contains("--features parquet"), "{run:#?}");
    assert!(!keye(&["--help"]).ok().stdout.contains("world"));
}

#[test]
fn a_model_that_cannot_be_loaded_is_3() {
    let run = keye(&["ask", "-m", "no/such-model", "What?"]);
    assert_eq!(run.code, Some(3), "{run:#?}");
    assert!(run.stderr.contains("no/such-model"), "{run:#?}");
    let run = keye(&["ask", "-m", "./no/such/model", "What?"]);
    assert_eq!(run.code, Some(3), "{run:#?}");

    let broken = tempfile::tempdir().unwrap();
    for file in std::fs::read_dir(fixture("keye-1_5-tiny").join("model")).unwrap() {
        let path = file.unwrap().path();
        std::fs::copy(&path, broken.path().join(path.file_name().unwrap())).unwrap();
    }
    let weights = broken.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let dir = broken.path().to_str().unwrap();
    for arguments in [&["ask", "-m", dir, "What?"][..], &["inspect", dir]] {
        let run = keye(arguments);
        assert_eq!(run.code, Some(3), "{run:#?}");
        assert!(run.stderr.contains("model.safetensors"), "{run:#?}");
    }
}

/// A run of the trainer has its models further below.
#[test]
fn a_directory_without_a_checkpoint_is_3_and_says_where_there_is_one() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let out = folder.path().join("new");
    let out = out.to_str().unwrap();
    let commands = [&["ask", "-m", dir, "What?"][..], &["inspect", dir], &["quantize", dir, "--to", "int8", "-o", out]];
    for arguments in commands {
        let run = keye(arguments);
        assert_eq!(run.code, Some(3), "{run:#?}");
        assert!(run.stderr.contains("expected a checkpoint directory (config.json"), "{run:#?}");
        assert!(run.stderr.contains(dir) && !run.stderr.contains("there is one"), "{run:#?}");
    }
    for below in ["sft/model", "model"] {
        let below = folder.path().join(below);
        std::fs::create_dir_all(&below).unwrap();
        std::fs::write(below.join("config.json"), "{}").unwrap();
        let run = keye(&["ask", "-m", dir, "What?"]);
        let hint = format!("there is one in {}", below.display());
        assert!(run.code == Some(3) && run.stderr.contains(&hint), "{hint}: {run:#?}");
    }
    let run = keye(&["quantize", &format!("{dir}/model"), "--to", "int8", "-o", out]);
    assert_eq!(run.code, Some(3), "{run:#?}");
}

/// Somebody who puts the question first is not left with a file that is not there.
#[test]
fn a_question_among_the_media_is_told_as_such() {
    let run = ask(&["What is it?", "And why?"]);
    assert_eq!(run.code, Some(4), "{run:#?}");
    assert!(
        run.stderr.contains("What is it?: there is no such file; if it is the question, that comes last"),
        "{run:#?}"
    );
}

#[test]
fn media_that_cannot_be_read_are_4() {
    let folder = tempfile::tempdir().unwrap();
    let text = folder.path().join("notes.txt");
    std::fs::write(&text, "not a picture").unwrap();
    let image = folder.path().join("cut.png");
    std::fs::write(&image, &std::fs::read(input("one.png")).unwrap()[..100]).unwrap();
    for path in [folder.path().join("missing.mp4"), text, image, folder.path().to_owned()] {
        let run = ask(&[path.to_str().unwrap(), "What?"]);
        assert_eq!(run.code, Some(4), "{run:#?}");
        assert!(run.stderr.contains(path.to_str().unwrap()), "{run:#?}");
        assert!(run.stderr.matches("os error").count() <= 1, "a cause is told twice: {run:#?}");
        assert_eq!(run.stdout, "");
    }
}

#[test]
fn a_url_in_a_request_file_is_not_fetched() {
    let folder = tempfile::tempdir().unwrap();
    let request = folder.path().join("request.json");
    let part = r#"{"type": "image", "image": "http://127.0.0.1:9/a.png"}"#;
    std::fs::write(&request, format!(r#"{{"messages": [{{"role": "user", "content": [{part}]}}]}}"#)).unwrap();
    let out = folder.path().join("out.safetensors");
    let arguments = ["trace", "-m", &model(), "--request", request.to_str().unwrap(), "--out", out.to_str().unwrap()];
    let run = keye(&arguments);
    assert_eq!(run.code, Some(4), "{run:#?}");
    assert!(run.stderr.contains("not allowed") && run.stderr.contains("request file"), "{run:#?}");
    assert!(!out.exists());
}

fn request(folder: &std::path::Path) -> String {
    let path = folder.join("request.json");
    std::fs::write(&path, r#"{"messages": [{"role": "user", "content": "hi"}]}"#).unwrap();
    path.to_str().unwrap().to_owned()
}

/// `keye trace --out` took the place of its own request, and of devices.
#[test]
fn a_trace_overwrites_no_input_and_no_device() {
    let folder = tempfile::tempdir().unwrap();
    let request = request(folder.path());
    let before = std::fs::read(&request).unwrap();
    let pipe = folder.path().join("pipe");
    let name = std::ffi::CString::new(pipe.to_str().unwrap()).unwrap();
    // SAFETY: the name ends with a zero and outlives the call.
    assert_eq!(unsafe { libc::mkfifo(name.as_ptr(), 0o600) }, 0);
    for (out, words) in [(request.as_str(), "is an input too"), (pipe.to_str().unwrap(), "no regular file")] {
        let run = keye(&["trace", "-m", &model(), "--request", &request, "--out", out]);
        assert_eq!(run.code, Some(2), "{run:#?}");
        assert!(run.stderr.contains(words), "{run:#?}");
    }
    assert_eq!(std::fs::read(&request).unwrap(), before);
    assert!(!pipe.is_file());
}

/// `keye trace --out` took the place of weights, and of a picture that the request shows.
#[test]
fn a_trace_overwrites_neither_the_model_nor_media() {
    let folder = tempfile::tempdir().unwrap();
    let copy = |from: std::path::PathBuf, to: &std::path::Path| {
        std::fs::create_dir(to).unwrap();
        for file in std::fs::read_dir(from).unwrap().map(|file| file.unwrap().path()).filter(|path| path.is_file()) {
            std::fs::copy(&file, to.join(file.file_name().unwrap())).unwrap();
        }
    };
    let [model, linked, media] = ["model", "linked", "media"].map(|name| folder.path().join(name));
    copy(fixture("keye-1_5-tiny").join("model"), &model);
    copy(fixture("keye-1_5-tiny").join("inputs"), &media);
    // As the hub's cache has them.
    std::fs::create_dir(&linked).unwrap();
    for file in std::fs::read_dir(&model).unwrap().map(|file| file.unwrap()) {
        std::os::unix::fs::symlink(file.path(), linked.join(file.file_name())).unwrap();
    }
    let request = media.join("request.json");
    let parts = r#"{"type": "image", "image": "one.png"}, {"type": "video", "video": ["big.png", "wide.png"]},
        {"type": "image", "image": "file://a%20b.png"}"#;
    std::fs::copy(media.join("one.png"), media.join("a b.png")).unwrap();
    std::fs::write(&request, format!(r#"{{"messages": [{{"role": "user", "content": [{parts}]}}]}}"#)).unwrap();
    let weights = model.join("model.safetensors");
    let before = [&weights, &media.join("one.png"), &media.join("wide.png")].map(|path| std::fs::read(path).unwrap());
    for (model, out, words) in [
        (&model, weights.clone(), "is in the model's directory"),
        (&model, model.join("trace.safetensors"), "is in the model's directory"),
        (&linked, weights.clone(), "is an input too"),
        (&model, media.join("one.png"), "is an input too"),
        (&model, media.join("wide.png"), "is an input too"),
        (&model, media.join("a b.png"), "is an input too"),
    ] {
        let [model, request, out] = [model, &request, &out].map(|path| path.to_str().unwrap());
        let run = keye(&["trace", "-m", model, "--request", request, "--out", out, "--generate", "1"]);
        assert_eq!(run.code, Some(2), "{out}: {run:#?}");
        assert!(run.stderr.contains(words) && run.stderr.contains(out), "{words}: {run:#?}");
    }
    let after = [&weights, &media.join("one.png"), &media.join("wide.png")].map(|path| std::fs::read(path).unwrap());
    assert!(before == after && !model.join("trace.safetensors").exists());
}

/// Names from damaged or hostile files do not steer the terminal.
#[test]
fn control_characters_are_shown_not_sent() {
    let run = ask(&["\x1b[31mred.png", "What?"]);
    assert_eq!(run.code, Some(4), "{run:#?}");
    assert!(!run.stderr.contains('\x1b') && run.stderr.contains("[31mred.png"), "{run:#?}");
}

#[test]
fn a_chat_takes_no_media_from_standard_input() {
    let run = keye(&["chat", "-m", &model(), "image:-"]);
    assert_eq!(run.code, Some(2), "{run:#?}");
}
