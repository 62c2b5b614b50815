//! `keye train` on a model of some ten thousand parameters: stops, kills, changed recipes, averages.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use keye_processor::{Checkpoint, Dtype, NewTensor, write_file};
use serde_json::Value;

use crate::support::{Run, command, keye};

const STEPS: u64 = 150;

/// A folder with the small files of keye-nano, its model made smaller still, and a recipe of texts and stills.
fn recipe(dir: &Path, name: &str, fields: &str) -> String {
    let nano = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/keye-nano");
    let files = dir.join("files");
    if !files.exists() {
        fs::create_dir(&files).unwrap();
        for entry in ["model", "tokenizer"].iter().flat_map(|part| fs::read_dir(nano.join(part)).unwrap()) {
            let path = entry.unwrap().path();
            fs::copy(&path, files.join(path.file_name().unwrap())).unwrap();
        }
        let path = files.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        for (field, value) in
            [("hidden_size", 32), ("intermediate_size", 48), ("num_attention_heads", 2), ("num_key_value_heads", 1)]
        {
            config[field] = value.into();
        }
        config["num_hidden_layers"] = 1.into();
        for (field, value) in [("hidden_size", 32), ("intermediate_size", 48), ("num_hidden_layers", 1)] {
            config["vision_config"][field] = value.into();
        }
        fs::write(&path, config.to_string()).unwrap();
    }
    let path = dir.join(format!("{name}.toml"));
    let text = format!(
        "name = \"{name}\"\nobjective = \"next-token\"\nfiles = [\"files\"]\ntrained = [\"\"]\nsteps = {STEPS}\nwarmup = 5\n\
         lr = 1e-2\nmin_lr = 1e-3\ncheckpoint_every = 10\n{fields}\n[data]\nmax_tokens = 300\n\
         sources = [{{ world = \"text\", weight = 3 }}, {{ world = \"still\", weight = 1 }}]\n"
    );
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A running `keye train run`; killed when a test fails.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn start(recipe: &str, out: &Path) -> Running {
    Running(command().args(["train", "run", recipe, "--out", out.to_str().unwrap()]).spawn().unwrap())
}

fn steps(folder: &Path) -> Vec<Value> {
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap_or_default();
    text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
}

/// Waits until a run has told `count` steps.
fn reaches(running: &mut Running, folder: &Path, count: usize) {
    let begin = Instant::now();
    while steps(folder).len() < count {
        assert_eq!(running.0.try_wait().unwrap(), None, "it ended before step {count}");
        assert!(begin.elapsed() < Duration::from_secs(120), "no step {count}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn signal(running: &Running, signal: libc::c_int) {
    // SAFETY: the child has not been waited for, so that its id is still its own.
    assert_eq!(unsafe { libc::kill(running.0.id() as libc::pid_t, signal) }, 0);
}

/// Stopped by Ctrl-C, killed, and gone on: the losses and the model of a run that nobody disturbed, to the bit.
#[test]
fn a_run_that_was_stopped_and_killed_goes_on_bit_for_bit() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "short", "");
    let [whole, broken] = ["whole", "broken"].map(|name| dir.path().join(name));
    let done = keye(&["train", "run", &recipe, "--out", whole.to_str().unwrap()]).ok();
    assert_eq!(done.stdout.trim(), whole.join("short/model").to_str().unwrap());

    let folder = broken.join("short");
    let mut running = start(&recipe, &broken);
    reaches(&mut running, &folder, 13);
    signal(&running, libc::SIGINT);
    assert_eq!(running.0.wait().unwrap().code(), Some(130));
    let stopped = steps(&folder).len();
    assert!((13..STEPS as usize).contains(&stopped), "{stopped}");
    let latest = || fs::read_to_string(folder.join("latest")).unwrap();
    assert_eq!(latest(), format!("step-{stopped:08}"), "Ctrl-C saves");

    let mut running = start(&recipe, &broken);
    reaches(&mut running, &folder, stopped + 15);
    signal(&running, libc::SIGKILL);
    assert_eq!(running.0.wait().unwrap().code(), None);
    assert!(!folder.join("model").exists());

    let done = keye(&["train", "run", &recipe, "--out", broken.to_str().unwrap()]).ok();
    assert_eq!(done.stdout.trim(), folder.join("model").to_str().unwrap());
    let bits = |folder: &Path| -> Vec<[Option<u64>; 3]> {
        let bits = |line: &Value, field: &str| line[field].as_f64().map(f64::to_bits);
        let line = |line: &Value| [line["step"].as_u64(), bits(line, "loss"), bits(line, "gradient_norm")];
        steps(folder).iter().map(line).collect()
    };
    let expected = bits(&whole.join("short"));
    assert_eq!(expected.len() as u64, STEPS);
    assert!(bits(&folder) == expected);
    let model = |folder: &Path| fs::read(folder.join("model/model.safetensors")).unwrap();
    assert!(model(&folder) == model(&whole.join("short")));

    // What is done is not done again, and what was made can be shipped and asked.
    let again = keye(&["train", "run", &recipe, "--out", broken.to_str().unwrap()]).ok();
    assert_eq!(again.stdout, done.stdout);
    let shipped = dir.path().join("shipped").to_str().unwrap().to_owned();
    keye(&["train", "export", folder.join("model").to_str().unwrap(), &shipped]).ok();
    keye(&["ask", "-m", &shipped, "--max-tokens", "2", "What is there?"]).ok();
    let twice = keye(&["train", "export", folder.join("model").to_str().unwrap(), &shipped]);
    assert!(twice.code == Some(2) && twice.stderr.contains(&shipped), "{twice:#?}");
}

#[test]
fn a_changed_recipe_is_refused_by_the_field() {
    let dir = tempfile::tempdir().unwrap();
    let path = recipe(dir.path(), "changed", "seed = 1");
    let out = dir.path().join("runs");
    let mut running = start(&path, &out);
    reaches(&mut running, &out.join("changed"), 1);
    signal(&running, libc::SIGINT);
    assert_eq!(running.0.wait().unwrap().code(), Some(130));
    recipe(dir.path(), "changed", "seed = 2");
    let run = keye(&["train", "run", &path, "--out", out.to_str().unwrap()]);
    assert_eq!(run.code, Some(1), "{run:#?}");
    assert!(run.stderr.contains("seed = 1, the recipe now says 2") && run.stderr.contains("begin again"), "{run:#?}");
}

#[test]
fn what_cannot_be_trained_is_told_before_the_first_step() {
    let dir = tempfile::tempdir().unwrap();
    let good = recipe(dir.path(), "good", "");
    let wrong = |text: &str, run: Run| {
        assert!(run.code.is_some_and(|code| code != 0) && run.stderr.contains(text), "{text}: {run:#?}");
        assert!(!dir.path().join("runs").exists(), "{text}");
    };
    let out = dir.path().join("runs").to_str().unwrap().to_owned();
    let with = |name: &str, fields: &str| {
        let path = recipe(dir.path(), name, fields);
        keye(&["train", "run", &path, "--out", &out])
    };
    wrong("no/such.toml", keye(&["train", "run", "no/such.toml", "--out", &out]));
    wrong("--stage sft: the recipes are good", keye(&["train", "run", &good, "--stage", "sft", "--out", &out]));
    wrong("unknown field `learning_rate`", with("field", "learning_rate = 1"));
    wrong("missing", with("start", "start = \"missing\""));
    wrong("./nowhere", with("path", "start = \"./nowhere\""));
    wrong("found both or neither", {
        let path = recipe(dir.path(), "neither", "");
        let text = fs::read_to_string(&path).unwrap().replace("world = \"text\", ", "");
        fs::write(&path, text).unwrap();
        keye(&["train", "run", &path, "--out", &out])
    });
}

/// Writes the preprocessor config of one folder to another, with other least and most pixels of a picture.
fn limits(from: &Path, to: &Path, [least, most]: [u64; 2]) {
    let name = "preprocessor_config.json";
    let mut config: Value = serde_json::from_slice(&fs::read(from.join(name)).unwrap()).unwrap();
    (config["min_pixels"], config["max_pixels"]) = (least.into(), most.into());
    fs::create_dir_all(to).unwrap();
    fs::write(to.join(name), config.to_string()).unwrap();
}

/// Pictures that are not square have no size within these limits; the others are trained on.
#[test]
fn samples_that_are_left_out_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let path = recipe(dir.path(), "narrow", "");
    let text = fs::read_to_string(&path).unwrap().replace("steps = 150", "steps = 6");
    fs::write(&path, text).unwrap();
    limits(&dir.path().join("files"), &dir.path().join("files"), [784, 1000]);
    let run = keye(&["train", "run", &path, "--out", dir.path().to_str().unwrap()]).ok();
    let told = |line: &str| line.contains("narrow: left out: ") && line.contains("no size fits");
    assert!(run.stderr.lines().any(told), "{}", run.stderr);
}

/// `from` with all weights moved up or down, by turns.
fn moved(from: &Path, to: &Path, by: f32) -> PathBuf {
    fs::create_dir(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let path = file.unwrap().path();
        fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
    let checkpoint = Checkpoint::open_file(&from.join("model.safetensors")).unwrap();
    let names: Vec<String> = checkpoint.names().map(str::to_owned).collect();
    let tensors: Vec<(NewTensor, Vec<u8>)> = (names.iter())
        .map(|name| {
            let stored = checkpoint.get(name).unwrap();
            let values = stored.bytes.chunks_exact(4).enumerate().map(|(i, bytes)| {
                let value = f32::from_le_bytes(bytes.try_into().unwrap());
                if i % 2 == 0 { value + by } else { value - by }
            });
            let bytes = values.flat_map(f32::to_le_bytes).collect();
            (NewTensor { name: name.clone(), dtype: Dtype::F32, shape: stored.shape.clone() }, bytes)
        })
        .collect();
    let tensors: Vec<(NewTensor, &[u8])> = tensors.iter().map(|(new, bytes)| (new.clone(), &bytes[..])).collect();
    write_file(&to.join("model.safetensors"), &tensors).unwrap();
    to.to_owned()
}

/// The mean of two models on either side of a trained one is the trained one, and better than both; the mean of a model with
/// itself is not better.
#[test]
fn a_mean_is_kept_if_it_is_better_than_every_model() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe(dir.path(), "mean", "[validation]\nevery = 50\npacks = 2");
    keye(&["train", "run", &recipe, "--out", dir.path().to_str().unwrap()]).ok();
    let told: Vec<u64> = steps(&dir.path().join("mean"))
        .iter()
        .filter(|line| line["held_out"].is_f64())
        .map(|line| line["step"].as_u64().unwrap())
        .collect();
    assert_eq!(told, [50, 100, 150]);
    let model = dir.path().join("mean/model");
    let [up, down] = [("up", 0.1), ("down", -0.1)].map(|(name, by)| moved(&model, &dir.path().join(name), by));
    let average = |out: &str, models: [&Path; 2], more: &[&str]| {
        let out = dir.path().join(out);
        let mut arguments = vec!["train", "average", out.to_str().unwrap()];
        arguments.extend(models.map(|model| model.to_str().unwrap()));
        let run = keye(&[&arguments[..], more].concat());
        (out, run)
    };
    let (out, run) = average("better", [&up, &down], &["--measure", &recipe, "--json"]);
    let report = run.ok().json();
    let loss = |value: &Value| value["held_out"].as_f64().unwrap();
    let of_models: Vec<f64> = report["models"].as_array().unwrap().iter().map(loss).collect();
    assert!(of_models.len() == 2 && of_models.iter().all(|of_model| loss(&report) + 0.1 < *of_model), "{report:#}");
    let last = &steps(&dir.path().join("mean"))[149];
    assert!((loss(&report) - loss(last)).abs() < 1e-3, "{report:#} {last:#}");
    assert_eq!((report["model"].as_str(), report["written"].as_bool()), (out.to_str(), Some(true)));
    assert!(out.join("config.json").exists());

    let (out, run) = average("equal", [&model, &model], &["--measure", &recipe]);
    assert!(run.code == Some(1) && run.stderr.contains("nothing is written"), "{run:#?}");
    assert!(!out.exists());
    // Held-out packs are made with the recipe's files: smaller pictures give another loss.
    let coarse = fs::read_to_string(&recipe).unwrap().replace("[\"files\"]", "[\"files\", \"coarse\"]");
    let path = dir.path().join("coarse.toml").to_str().unwrap().to_owned();
    fs::write(&path, coarse).unwrap();
    limits(&dir.path().join("files"), &dir.path().join("coarse"), [784, 3136]);
    let measured = |recipe: &str| {
        let run = average("measured", [&model, &model], &["--measure", recipe, "--json"]).1;
        assert!(run.code == Some(1) && run.stderr.contains("nothing is written"), "{run:#?}");
        loss(&serde_json::from_str(&run.stdout).unwrap())
    };
    assert!((measured(&recipe) - loss(last)).abs() < 1e-3);
    assert!((measured(&path) - loss(last)).abs() > 1e-3, "{}", measured(&path));

    average("plain", [&model, &model], &[]).1.ok();
    let read = |dir: &Path| fs::read(dir.join("model.safetensors")).unwrap();
    assert!(read(&dir.path().join("plain")) == read(&model), "a model with itself is itself");
}
