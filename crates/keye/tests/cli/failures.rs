//! Wrong inputs: exit codes, and messages that name input and remedy.

use crate::support::{ask, fixture, input, keye, model};

#[test]
fn usage_is_2() {
    let clip = input("clip.mp4");
    let image = input("one.png");
    for (arguments, words) in [
        (vec!["--fps", "1", image.as_str(), "What?"], "--fps is for videos, and there are none"),
        (vec!["--presence-penalty", "7", "What?"], "presence_penalty is 7"),
        (vec!["--temperature", "1", "What?"], "--greedy"),
        (vec![image.as_str()], "the question comes last"),
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
    assert_eq!(keye(&["ask", "-m", &model(), "--max-tokens", "0", "What?"]).code, Some(2));
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
    let run = keye(&["ask", "-m", &model(), "--max-model-len", "100000000", "What?"]);
    assert_eq!(run.code, Some(3), "{run:#?}");
    assert!(run.stderr.contains("this model takes 1 to"), "{run:#?}");
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
    let parts = r#"{"type": "image", "image": "one.png"}, {"type": "video", "video": ["big.png", "wide.png"]}"#;
    std::fs::write(&request, format!(r#"{{"messages": [{{"role": "user", "content": [{parts}]}}]}}"#)).unwrap();
    let weights = model.join("model.safetensors");
    let before = [&weights, &media.join("one.png"), &media.join("wide.png")].map(|path| std::fs::read(path).unwrap());
    for (model, out, words) in [
        (&model, weights.clone(), "is in the model's directory"),
        (&model, model.join("trace.safetensors"), "is in the model's directory"),
        (&linked, weights.clone(), "is an input too"),
        (&model, media.join("one.png"), "is an input too"),
        (&model, media.join("wide.png"), "is an input too"),
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
