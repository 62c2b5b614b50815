//! Running the binary.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

pub const FIXTURES: [&str; 2] = ["keye-preview-tiny", "keye-1_5-tiny"];

pub fn fixture(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../fixtures").join(name)
}

/// The tiny 1.5 model.
pub fn model() -> String {
    fixture("keye-1_5-tiny").join("model").display().to_string()
}

/// A file among the inputs of the tiny 1.5 model.
pub fn input(name: &str) -> String {
    fixture("keye-1_5-tiny").join("inputs").join(name).display().to_string()
}

/// Names of the cases that are one request.
pub fn cases(fixture_name: &str) -> Vec<String> {
    let files = std::fs::read_dir(fixture(fixture_name).join("cases")).unwrap();
    let names = files.filter_map(|file| Some(file.unwrap().path().file_stem()?.to_str()?.to_owned()));
    let mut names: Vec<String> = names.filter(|name| name != "batch_left_padded").collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), 11, "{fixture_name}");
    names
}

/// What a run of the binary left.
#[derive(Debug)]
pub struct Run {
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Run {
    #[track_caller]
    pub fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self:#?}");
        self
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:#?}"))
    }
}

pub fn command() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_keye"));
    command.env_remove("KEYE_MODEL").env("HF_HUB_OFFLINE", "1").env("COLUMNS", "100");
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

pub fn keye(arguments: &[&str]) -> Run {
    keye_with(arguments, None)
}

/// With bytes on standard input.
pub fn keye_with(arguments: &[&str], stdin: Option<&[u8]>) -> Run {
    let mut command = command();
    command.args(arguments);
    if stdin.is_some() {
        command.stdin(Stdio::piped());
    }
    let mut child = command.spawn().unwrap();
    if let (Some(bytes), Some(mut pipe)) = (stdin, child.stdin.take()) {
        pipe.write_all(bytes).unwrap();
    }
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Run { code: output.status.code(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// `keye ask` with the tiny model, greedy and short, and these further arguments.
pub fn ask(arguments: &[&str]) -> Run {
    let model = model();
    let mut all =
        vec!["ask", "-m", &model, "--greedy", "--ignore-eos", "--max-tokens", "16", "--max-model-len", "2048"];
    all.extend(arguments);
    keye(&all)
}
