//! Runs that are killed, stopped, done or ended by an error, and what they go on from.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use keye_train::{
    Cpu, ExportDtype, Model, Outcome, Pack, PackSource, Recipe, StepMetrics, TrainError, export, load_model, run,
};
use serde_json::{Value, json};

use crate::support::{fixture, packed, sample};

/// How a run ends in the middle of a step: at a given pack.
#[derive(Clone, Copy, PartialEq)]
pub enum End {
    /// As by a kill: nothing of the run is done any more.
    Killed(u64),
    /// By data that cannot be read.
    Unread(u64),
}

/// The same packs again and again, in an order that its state tells.
struct Packs<'a> {
    model: &'a Model,
    next: u64,
    end: Option<End>,
}

impl PackSource for Packs<'_> {
    fn next_pack(&mut self) -> Result<Pack, TrainError> {
        if self.end == Some(End::Killed(self.next)) {
            std::panic::resume_unwind(Box::new("killed"));
        }
        if self.end == Some(End::Unread(self.next)) {
            return Err(TrainError::Data("r7: cannot be read".into()));
        }
        self.next += 1;
        let seed = self.next % 5;
        Ok(packed(&[
            sample(self.model, seed, 8, &[[2, 4], [2, 2]]),
            sample(self.model, seed + 50, 20, &[]),
            sample(self.model, seed + 90, 8, &[[4, 4]]),
        ]))
    }

    fn state(&self) -> Value {
        json!({"next": self.next})
    }

    fn restore(&mut self, state: &Value) -> Result<(), TrainError> {
        self.next = state["next"].as_u64().ok_or_else(|| TrainError::Pack("no state".into()))?;
        Ok(())
    }
}

/// A recipe of the fixture's files with these fields more, as NAME.toml.
pub fn recipe(dir: &Path, name: &str, fields: &str) -> PathBuf {
    let path = dir.join(format!("{name}.toml"));
    let files = fixture();
    let data = if fields.contains("[data]") { "" } else { "[data]\n" };
    let text = format!(
        "name = \"{name}\"\nobjective = \"next-token\"\nfiles = [{files:?}]\nlr = 1e-2\nmin_lr = 1e-4\nwarmup = 1\n{fields}\n{data}"
    );
    std::fs::write(&path, text).unwrap();
    path
}

/// A run from where it is, told to stop after a step; its outcome and what it told.
pub fn losses(
    recipe: &Recipe,
    out: &Path,
    end: Option<End>,
    stop_at: u64,
) -> (Result<Outcome, TrainError>, Vec<StepMetrics>) {
    let model = load_model(recipe, Cpu::detect()).unwrap();
    let mut lines = Vec::new();
    let step = Cell::new(0);
    let mut packs = Packs { model: &model, next: 0, end };
    let held_out = [packs.next_pack().unwrap()];
    packs.next = 0;
    let mut told = |line: &StepMetrics| {
        step.set(line.step);
        lines.push(*line);
    };
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        run(recipe, &model, out, &mut packs, &held_out, &|| step.get() == stop_at, &mut told)
    }));
    (outcome.unwrap_or_else(|_| Err(TrainError::Pack("killed".into()))), lines)
}

fn bits(lines: &[StepMetrics]) -> Vec<(u64, u64, u64)> {
    lines.iter().map(|l| (l.step, l.loss.to_bits(), l.gradient_norm.to_bits())).collect()
}

#[test]
fn a_killed_run_goes_on_bit_for_bit() {
    killed_and_resumed("");
}

#[test]
fn so_does_one_with_muon_in_mixed_precision() {
    killed_and_resumed("\noptimizer = \"muon\"\nprecision = \"bf16\"");
}

fn killed_and_resumed(how: &str) {
    let dir = tempfile::tempdir().unwrap();
    let fields = format!("steps = 9\naccumulate = 2\ncheckpoint_every = 2\ntrained = [\"\"]{how}");
    let path = recipe(dir.path(), "short", &fields);
    let recipe = Recipe::load(&path).unwrap();
    let whole = dir.path().join("whole");
    let (outcome, lines) = losses(&recipe, &whole, None, 0);
    assert_eq!(outcome.unwrap(), Outcome::Done(whole.join("short/model")));
    let want = bits(&lines);
    assert_eq!(want.len(), 9);
    assert!(lines[8].loss < lines[0].loss, "it learns: {} {}", lines[0].loss, lines[8].loss);

    let broken = dir.path().join("broken");
    // Killed in the second pack of step 6, after the checkpoint of step 4.
    let (outcome, first) = losses(&recipe, &broken, Some(End::Killed(11)), 0);
    assert!(outcome.is_err());
    assert_eq!(bits(&first), want[..5]);
    // What a kill in the middle of a save leaves.
    std::fs::create_dir_all(broken.join("short/step-00000006.partial")).unwrap();
    // Goes on at step 5, and is told to stop after 7.
    let (outcome, second) = losses(&recipe, &broken, None, 7);
    assert_eq!(outcome.unwrap(), Outcome::Stopped(7));
    assert_eq!(bits(&second), want[4..7]);
    let (outcome, third) = losses(&recipe, &broken, None, 0);
    assert_eq!(outcome.unwrap(), Outcome::Done(broken.join("short/model")));
    assert_eq!(bits(&third), want[7..]);

    // Every step stands once in the metrics, and both runs made the same model.
    let text = std::fs::read_to_string(broken.join("short/metrics.jsonl")).unwrap();
    let steps: Vec<u64> = text.lines().map(|line| serde_json::from_str::<StepMetrics>(line).unwrap().step).collect();
    assert_eq!(steps, (1..=9).collect::<Vec<_>>());
    let read = |out: &Path| std::fs::read(out.join("short/model/model.safetensors")).unwrap();
    assert!(read(&whole) == read(&broken));
    let kept = std::fs::read_dir(broken.join("short")).unwrap();
    assert_eq!(kept.filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().starts_with("step-")).count(), 2);
    // A stage that is done is not done again.
    let (outcome, none) = losses(&recipe, &broken, None, 0);
    assert!(matches!(outcome.unwrap(), Outcome::Done(_)) && none.is_empty());
}

/// Data that cannot be read end a run, but lose none of its finished steps.
#[test]
fn a_run_that_ends_with_an_error_saves_first() {
    let dir = tempfile::tempdir().unwrap();
    let fields = "steps = 6\naccumulate = 2\ncheckpoint_every = 100\ntrained = [\"\"]";
    let recipe = Recipe::load(&recipe(dir.path(), "unread", fields)).unwrap();
    let want = bits(&losses(&recipe, &dir.path().join("whole"), None, 0).1);
    let broken = dir.path().join("broken");
    let latest = || std::fs::read_to_string(broken.join("unread/latest")).ok();
    let ends = |pack: u64| {
        let (outcome, lines) = losses(&recipe, &broken, Some(End::Unread(pack)), 0);
        assert_eq!(outcome.unwrap_err().to_string(), "data: r7: cannot be read");
        bits(&lines)
    };
    assert!(ends(1).is_empty() && latest().is_none(), "no step is finished");
    // In the second pack of step 4, before it and after it.
    assert_eq!(ends(7), want[..3]);
    assert_eq!(latest().as_deref(), Some("step-00000003"));
    assert!(ends(7).is_empty() && latest().as_deref() == Some("step-00000003"));
    assert_eq!(ends(8), want[3..4]);
    let (outcome, rest) = losses(&recipe, &broken, None, 0);
    assert_eq!(outcome.unwrap(), Outcome::Done(broken.join("unread/model")));
    assert_eq!(bits(&rest), want[4..]);
}

/// A run goes on only by the recipe that it was begun with; what does not change its results may change.
#[test]
fn a_changed_recipe_does_not_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let load = |fields: &str| Recipe::load(&recipe(dir.path(), "changed", fields)).unwrap();
    let (outcome, _) = losses(&load("steps = 4\ntrained = [\"\"]"), dir.path(), None, 2);
    assert_eq!(outcome.unwrap(), Outcome::Stopped(2));
    for (fields, named) in [
        ("steps = 5\ntrained = [\"\"]", "steps = 4, the recipe now says 5"),
        ("steps = 4\ntrained = [\"mlp_AR.\"]", "trained[0] = \"\", the recipe now says \"mlp_AR.\""),
        ("steps = 4\ntrained = [\"\"]\n[data]\nmax_tokens = 3", "data.max_tokens = null, the recipe now says 3"),
        ("steps = 4\ntrained = [\"\"]\nstart = \"changed\"", "start = null, the recipe now says \"changed\""),
    ] {
        let error = losses(&load(fields), dir.path(), None, 0).0.unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("begin again"), "{error}");
    }
    let same = "steps = 4\ntrained = [\"\"]\nrecompute = true\ncheckpoint_every = 1";
    let (outcome, lines) = losses(&load(same), dir.path(), None, 0);
    assert_eq!(outcome.unwrap(), Outcome::Done(dir.path().join("changed/model")));
    assert_eq!(lines.len(), 2);
}

/// Two runs would take turns at the same checkpoints and metrics.
#[test]
fn a_stage_is_run_once_at_a_time() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe::load(&recipe(dir.path(), "twice", "steps = 3\ntrained = [\"\"]")).unwrap();
    let model = load_model(&recipe, Cpu::detect()).unwrap();
    let mut packs = Packs { model: &model, next: 0, end: None };
    let mut refused = 0;
    let mut told = |_: &StepMetrics| {
        let error = losses(&recipe, dir.path(), None, 0).0.unwrap_err().to_string();
        assert!(error.contains("twice") && error.contains("another run"), "{error}");
        refused += 1;
    };
    let outcome = run(&recipe, &model, dir.path(), &mut packs, &[], &|| false, &mut told);
    assert_eq!(outcome.unwrap(), Outcome::Done(dir.path().join("twice/model")));
    assert_eq!(refused, 3);
}

/// As on a full disk: what could not be finished is gone, and the reason is told once.
#[test]
fn what_cannot_be_saved_leaves_nothing_behind() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = Recipe::load(&recipe(dir.path(), "full", "steps = 3\ntrained = [\"\"]")).unwrap();
    let model = load_model(&recipe, Cpu::detect()).unwrap();
    let mut packs = Packs { model: &model, next: 0, end: None };
    // A directory in the place of the pointer to the newest checkpoint.
    let folder = dir.path().join("full");
    let block = |_: &StepMetrics| std::fs::create_dir_all(folder.join("latest.partial/x")).unwrap();
    let error = run(&recipe, &model, dir.path(), &mut packs, &[], &|| true, &mut { block }).unwrap_err().to_string();
    assert_eq!(error.matches("latest.partial").count(), 1, "{error}");
    assert!(error.contains("steps after 0 are lost"), "{error}");
    let names = |dir: &Path| -> Vec<String> {
        let entries = std::fs::read_dir(dir).unwrap();
        entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned()).collect()
    };
    assert!(names(&folder).iter().all(|name| !name.starts_with("step-")), "{:?}", names(&folder));
    // The recipe's files are gone when it is to be saved.
    let gone = dir.path().join("gone");
    std::fs::create_dir(&gone).unwrap();
    let mut without = recipe.clone();
    without.name = "other".into();
    without.files.push(gone.clone());
    let vanish = |_: &StepMetrics| drop(std::fs::remove_dir(&gone));
    packs.next = 0;
    run(&without, &model, dir.path(), &mut packs, &[], &|| true, &mut { vanish }).unwrap_err();
    let other = names(&dir.path().join("other"));
    assert!(other.iter().all(|name| !name.starts_with("step-")), "{other:?}");
    let model_dir = dir.path().join("export");
    let params = model.init(1);
    let missing = vec![dir.path().join("nowhere")];
    export(&model, &params, &missing, &model_dir, ExportDtype::F32, true).unwrap_err();
    let left = names(dir.path());
    assert!(left.iter().all(|name| !name.contains("export")), "{left:?}");
}

/// So does a recipe whose small files have been changed: they make other samples of the same data.
#[test]
fn changed_files_do_not_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let files = dir.path().join("files");
    std::fs::create_dir(&files).unwrap();
    for entry in std::fs::read_dir(fixture()).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, files.join(path.file_name().unwrap())).unwrap();
    }
    let path = recipe(dir.path(), "files", "steps = 6\ntrained = [\"\"]");
    let text = std::fs::read_to_string(&path).unwrap().replace(fixture().to_str().unwrap(), "files");
    std::fs::write(&path, text).unwrap();
    let recipe = Recipe::load(&path).unwrap();
    let folder = dir.path().join("files-out");
    let goes_on = |stop: u64| losses(&recipe, &folder, None, stop).0;
    assert_eq!(goes_on(1).unwrap(), Outcome::Stopped(1));

    let limits = files.join("preprocessor_config.json");
    let old = std::fs::read_to_string(&limits).unwrap();
    std::fs::write(&limits, old.replace("37632", "12544")).unwrap();
    let refused = |named: &str| {
        let error = goes_on(2).unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("begin again"), "{error}");
    };
    refused("another preprocessor_config.json");
    // The same limits, written otherwise.
    let value: Value = serde_json::from_str(&old).unwrap();
    std::fs::write(&limits, value.to_string()).unwrap();
    assert_eq!(goes_on(2).unwrap(), Outcome::Stopped(2));
    std::fs::write(files.join("chat_template.jinja"), "{{ messages }}").unwrap();
    refused("another chat_template.jinja");
    std::fs::remove_file(files.join("chat_template.jinja")).unwrap();

    // The first runs kept no files in their checkpoints.
    let step = folder.join("files/step-00000002");
    for entry in std::fs::read_dir(&step).unwrap() {
        let path = entry.unwrap().path();
        if !path.file_name().unwrap().to_str().unwrap().starts_with("state.") {
            std::fs::remove_file(path).unwrap();
        }
    }
    assert!(matches!(goes_on(0).unwrap(), Outcome::Done(_)));
    // A stage that is done is of its files as well.
    std::fs::write(&limits, old.replace("37632", "12544")).unwrap();
    refused("another preprocessor_config.json");
}

/// A stage that is done is done only for the recipe that made it.
#[test]
fn a_stage_that_is_done_was_made_by_its_recipe() {
    let dir = tempfile::tempdir().unwrap();
    let load = |fields: &str| Recipe::load(&recipe(dir.path(), "done", fields)).unwrap();
    let again = |fields: &str| {
        let (outcome, lines) = losses(&load(fields), dir.path(), None, 0);
        assert!(lines.is_empty());
        outcome.map_err(|error| error.to_string())
    };
    let folder = dir.path().join("done");
    let (outcome, _) = losses(&load("steps = 9\ntrained = [\"\"]"), dir.path(), None, 2);
    assert_eq!(outcome.unwrap(), Outcome::Stopped(2));
    // Ended early: its state and the recipe are told that these were all its steps.
    let path = folder.join("step-00000002/state.json");
    let change = |change: &dyn Fn(&mut Value)| {
        let mut state: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        change(&mut state);
        std::fs::write(&path, state.to_string()).unwrap();
    };
    change(&|state| state["recipe"]["steps"] = 2.into());
    let done = Ok(Outcome::Done(folder.join("model")));
    let same = "steps = 2\ntrained = [\"\"]";
    assert_eq!((again(same), again(same)), (done.clone(), done.clone()));
    assert_eq!(again(&format!("{same}\ncheckpoint_every = 7")), done);

    let error = again("steps = 3\ntrained = [\"\"]").unwrap_err();
    assert!(error.contains("steps = 2, the recipe now says 3") && error.contains("begin again"), "{error}");
    // Made before recipes could say how targets are weighted, and before states told their recipe.
    change(&|state| drop(state["recipe"].as_object_mut().unwrap().remove("weighting")));
    assert_eq!(again(same), done);
    let error = again(&format!("{same}\nweighting = \"answer\"")).unwrap_err();
    assert!(error.contains("weighting = \"token\", the recipe now says \"answer\""), "{error}");
    change(&|state| drop(state.as_object_mut().unwrap().remove("recipe")));
    assert_eq!(again("steps = 3\ntrained = [\"\"]"), done);
    std::fs::remove_dir_all(folder.join("step-00000002")).unwrap();
    assert_eq!(again(same), done);
}
