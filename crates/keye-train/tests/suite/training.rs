//! Optimiser, schedules, recipes, and runs that are killed and go on.

use std::cell::Cell;
use std::path::{Path, PathBuf};

use keye_backend::Isa;
use keye_train::data::DataConfig;
use keye_train::{
    ExportDtype, Gradients, Means, Model, Optimizer, Outcome, Pack, PackSource, Recipe, Schedule, StepMetrics,
    TrainError, Weighting, export, groups, load_model, load_params, loss_svg, model_of, run, weights,
};
use serde_json::{Value, json};

use crate::support::{fixture, model, packed, sample};

/// Acceptance test 5 (spec §9).
#[test]
fn schedules_follow_the_cosine_formula() {
    let schedule = Schedule { peak: 2e-3, min: 2e-4, warmup: 10, steps: 110 };
    let near = |step, want: f64| assert!((schedule.at(step) - want).abs() < 1e-12, "{step}: {}", schedule.at(step));
    near(0, 0.0);
    near(5, 1e-3);
    near(10, 2e-3);
    near(60, 2e-3 * (0.5 * 0.9 + 0.1));
    near(110, 2e-4);
    near(500, 2e-4);
    let constant = Schedule { peak: 1e-3, min: 1e-3, warmup: 0, steps: 9 };
    assert!((0..9).all(|step| constant.at(step) == 1e-3));
}

/// Acceptance test 4 (spec §9).
#[test]
fn the_vision_tower_learns_at_a_tenth_and_vectors_do_not_decay() {
    let model = model();
    let layout = model.layout();
    for (tensor, group) in layout.tensors().iter().zip(groups(layout, Optimizer::Muon, 0.1, 0.2)) {
        assert_eq!(group.lr_scale, if tensor.name.starts_with("visual.") { 0.1 } else { 1.0 }, "{}", tensor.name);
        let vector = tensor.name.ends_with("bias") || tensor.name.contains("norm") || tensor.name.contains("logit_");
        assert_eq!(group.decay, if vector { 0.0 } else { 0.2 }, "{}", tensor.name);
        let inside =
            tensor.name.contains("_proj.weight") || tensor.name.contains("fc1.w") || tensor.name.contains(".fc2.w");
        let inside = inside && tensor.name.contains("layers.") || tensor.name.contains("linear_") && !vector;
        let muon = group.optimizer == Optimizer::Muon;
        assert_eq!(muon, inside, "{}", tensor.name);
    }
}

/// One AdamW step by hand: m = 0.1 g, v = 0.05 g^2, both corrected back to g and g^2, so that the step is lr sign(g) and decay.
#[test]
fn a_first_step_moves_by_the_learning_rate() {
    let model = model();
    let layout = model.layout();
    let i = layout.find("model.layers.0.mlp.up_proj.weight").unwrap();
    let trained = (0..layout.tensors().len()).map(|t| t == i).collect();
    let mut gradients = Gradients::zeros(layout, trained);
    let range = layout.range(i);
    gradients.values[range.start] = 3.0;
    gradients.values[range.start + 1] = -4.0;
    let start = model.init(1);
    let mut params = start.clone();
    let mut optimizer = Means::new(layout);
    let norm =
        optimizer.step(Isa::detect(), &mut params, &gradients, &groups(layout, Optimizer::AdamW, 0.1, 0.5), 1e-2, 1.0);
    assert_eq!(norm, 5.0);
    for (at, sign) in [(0, 1.0), (1, -1.0), (2, 0.0)] {
        let p = start.values[range.start + at];
        assert!((params.values[range.start + at] - (p - 1e-2 * (sign + 0.5 * p))).abs() < 1e-6);
    }
    // Clipped to a norm of 1 before it enters the means.
    assert!((optimizer.m[range.start] - 0.1 * 0.6).abs() < 1e-7);
    let untouched = (0..start.values.len()).filter(|j| !range.contains(j));
    assert!(untouched.into_iter().all(|j| params.values[j] == start.values[j]));
    gradients.values[range.start] = f32::NAN;
    let before = params.clone();
    let norm =
        optimizer.step(Isa::detect(), &mut params, &gradients, &groups(layout, Optimizer::AdamW, 0.1, 0.5), 1e-2, 1.0);
    assert!(norm.is_nan() && params == before && optimizer.steps == 1);
}

#[test]
fn weightings_differ_by_sample() {
    let model = model();
    let pack = packed(&[sample(&model, 1, 4, &[]), sample(&model, 2, 16, &[])]);
    let sums = |weighting| {
        let weights = weights(&pack, weighting);
        [&weights[..5], &weights[5..]].map(|w| w.iter().sum::<f32>())
    };
    assert_eq!(sums(Weighting::Token), [4.0, 16.0]);
    assert_eq!(sums(Weighting::Sample), [1.0, 1.0]);
    assert_eq!(sums(Weighting::SquareRoot), [2.0, 4.0]);
    // A conversation of two answers, of 4 tokens and of 1.
    let mut pack = packed(&[sample(&model, 3, 16, &[])]);
    pack.loss_mask.iter_mut().enumerate().for_each(|(i, m)| *m = (1..5).contains(&i) || i == 7);
    let answers = weights(&pack, Weighting::Answer);
    assert_eq!((answers[..6].iter().sum::<f32>(), answers[6..].iter().sum::<f32>()), (2.0, 1.0));
}

/// The same packs again and again, in an order that its state tells; fails at a given pack, as a kill would end a run.
struct Packs<'a> {
    model: &'a Model,
    next: u64,
    fail_at: Option<u64>,
}

impl PackSource for Packs<'_> {
    fn next_pack(&mut self) -> Result<Pack, TrainError> {
        if self.fail_at == Some(self.next) {
            return Err(TrainError::Pack("killed".into()));
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

fn recipe(dir: &Path, name: &str, fields: &str) -> PathBuf {
    let path = dir.join(format!("{name}.toml"));
    let files = fixture();
    let data = if fields.contains("[data]") { "" } else { "[data]\n" };
    let text = format!(
        "name = \"{name}\"\nobjective = \"next-token\"\nfiles = [{files:?}]\nlr = 1e-2\nmin_lr = 1e-4\nwarmup = 1\n{fields}\n{data}"
    );
    std::fs::write(&path, text).unwrap();
    path
}

fn losses(
    recipe: &Recipe,
    out: &Path,
    fail_at: Option<u64>,
    stop_at: u64,
) -> (Result<Outcome, TrainError>, Vec<StepMetrics>) {
    let model = load_model(recipe, Isa::detect()).unwrap();
    let mut lines = Vec::new();
    let step = Cell::new(0);
    let mut packs = Packs { model: &model, next: 0, fail_at };
    let held_out = [packs.next_pack().unwrap()];
    packs.next = 0;
    let outcome =
        run(recipe, &model, out, &mut packs, &held_out, &|| step.get() == stop_at, &mut |line: &StepMetrics| {
            step.set(line.step);
            lines.push(*line);
        });
    (outcome, lines)
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
    let bits = |lines: &[StepMetrics]| -> Vec<(u64, u64, u64)> {
        lines.iter().map(|l| (l.step, l.loss.to_bits(), l.gradient_norm.to_bits())).collect()
    };
    let want = bits(&lines);
    assert_eq!(want.len(), 9);
    assert!(lines[8].loss < lines[0].loss, "it learns: {} {}", lines[0].loss, lines[8].loss);

    let broken = dir.path().join("broken");
    // Killed in the second pack of step 6, after the checkpoint of step 4.
    let (outcome, first) = losses(&recipe, &broken, Some(11), 0);
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

/// Held-out loss is measured where the recipe says, changes nothing, and falls.
#[test]
fn held_out_loss_is_told_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let fields = "steps = 5\ntrained = [\"\"]";
    let plain = Recipe::load(&recipe(dir.path(), "plain", fields)).unwrap();
    let with = "steps = 5\ntrained = [\"\"]\n[validation]\nevery = 2\npacks = 1";
    let measured = Recipe::load(&recipe(dir.path(), "measured", with)).unwrap();
    let (_, without) = losses(&plain, dir.path(), None, 0);
    let (outcome, lines) = losses(&measured, dir.path(), None, 0);
    outcome.unwrap();
    let bits = |lines: &[StepMetrics]| lines.iter().map(|l| l.loss.to_bits()).collect::<Vec<_>>();
    assert_eq!(bits(&lines), bits(&without));
    let told: Vec<u64> = lines.iter().filter(|l| l.held_out.is_some()).map(|l| l.step).collect();
    assert_eq!(told, [2, 4, 5]);
    assert!(without.iter().all(|l| l.held_out.is_none()) && lines[4].held_out < lines[1].held_out, "{lines:?}");
    // The pack of the first step, so that the loss before it is known: after two steps it is lower.
    assert!(lines[1].held_out.unwrap() < lines[0].loss);
    let text = std::fs::read_to_string(dir.path().join("measured/metrics.jsonl")).unwrap();
    let read: Vec<StepMetrics> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(read, lines);
}

/// The recipe of keye-nano: every stage can be read, and starts from one before it.
#[test]
fn the_stages_of_keye_nano_follow_one_another() {
    let folder = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../recipes/keye-nano"));
    let mut files: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|end| end == "toml"));
    files.sort();
    let mut before: Vec<String> = Vec::new();
    for path in &files {
        let recipe = Recipe::load(path).unwrap();
        DataConfig::from_table(&recipe.data).unwrap();
        recipe.trained(load_model(&recipe, Isa::detect()).unwrap().layout()).unwrap();
        assert!(recipe.start.iter().all(|start| before.contains(start)), "{}: {:?}", path.display(), recipe.start);
        before.push(recipe.name);
    }
    assert!(before.len() > 9, "{before:?}");
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
    ] {
        let error = losses(&load(fields), dir.path(), None, 0).0.unwrap_err().to_string();
        assert!(error.contains(named) && error.contains("begin again"), "{error}");
    }
    let same = "steps = 4\ntrained = [\"\"]\nrecompute = true\ncheckpoint_every = 1";
    let (outcome, lines) = losses(&load(same), dir.path(), None, 0);
    assert_eq!(outcome.unwrap(), Outcome::Done(dir.path().join("changed/model")));
    assert_eq!(lines.len(), 2);
}

/// A checkpoint from the middle of a stage is a model.
#[test]
fn the_middle_of_a_stage_is_exported() {
    let dir = tempfile::tempdir().unwrap();
    let recipe =
        Recipe::load(&recipe(dir.path(), "half", "steps = 4\ntrained = [\"\"]\ncheckpoint_every = 2")).unwrap();
    losses(&recipe, dir.path(), None, 0).0.unwrap();
    let read = |from: &Path| {
        let model = model_of(from, Isa::detect()).unwrap();
        let mut params = model.init(9);
        load_params(&model, from, &mut params).unwrap();
        let out = dir.path().join("exported").join(from.file_name().unwrap());
        export(&model, &params, &[from.to_owned()], &out, ExportDtype::F32).unwrap();
        assert!(out.join("config.json").exists() && !out.join("state.json").exists());
        std::fs::read(out.join("model.safetensors")).unwrap()
    };
    let folder = dir.path().join("half");
    let [middle, end, model] = ["step-00000002", "step-00000004", "model"].map(|name| read(&folder.join(name)));
    assert!(end == model && middle != model);
}

/// Acceptance test 3 (spec §9), and a stage that starts from another.
#[test]
fn the_projector_stage_changes_the_projector_alone() {
    let dir = tempfile::tempdir().unwrap();
    let first = Recipe::load(&recipe(dir.path(), "all", "steps = 2\ntrained = [\"\"]")).unwrap();
    let second =
        Recipe::load(&recipe(dir.path(), "align", "steps = 2\nstart = \"all\"\ntrained = [\"mlp_AR.\"]")).unwrap();
    losses(&first, dir.path(), None, 0).0.unwrap();
    losses(&second, dir.path(), None, 0).0.unwrap();
    let model = model();
    let read = |stage: &str| {
        let mut params = model.init(9);
        load_params(&model, &dir.path().join(stage).join("model"), &mut params).unwrap();
        params
    };
    let (before, after) = (read("all"), read("align"));
    for tensor in model.layout().tensors() {
        let changed = before.tensor(&tensor.name) != after.tensor(&tensor.name);
        assert_eq!(changed, tensor.name.starts_with("mlp_AR."), "{}", tensor.name);
    }
}

/// What ships: recipes that load, each from a stage before it, with data of which a part is held out.
#[test]
fn the_recipes_of_keye_nano_fit_together() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../recipes/keye-nano");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.retain(|path| path.extension().is_some_and(|end| end == "toml"));
    let number = |path: &PathBuf| -> u32 {
        let name = path.file_name().unwrap().to_str().unwrap();
        name.split_once('-').and_then(|(number, _)| number.parse().ok()).unwrap_or_else(|| panic!("{name}: no number"))
    };
    paths.sort_by_key(number);
    let mut before: Vec<String> = Vec::new();
    for path in paths {
        let recipe = Recipe::load(&path).unwrap();
        assert!(recipe.start.as_ref().map_or(before.is_empty(), |start| before.contains(start)), "{}", path.display());
        recipe.trained(load_model(&recipe, Isa::detect()).unwrap().layout()).unwrap();
        let data = DataConfig::from_table(&recipe.data).unwrap();
        let unused = recipe.validation.as_ref().is_some_and(|validation| validation.every > recipe.steps);
        assert!(!unused && data.held_out().is_ok(), "{}", path.display());
        before.push(recipe.name);
    }
    assert!(before.len() >= 9, "{before:?}");
}

#[test]
fn wrong_recipes_are_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    for (fields, named) in [
        ("steps = 2\ntrained = []\nlearning = 3", "learning"),
        ("steps = 1\ntrained = []", "warmup"),
        ("steps = 2\ntrained = []\nclip = 0.0", "clip"),
        ("steps = 2\ntrained = []\naccumulate = 0", "accumulate"),
        ("steps = 2\ntrained = []\nvision_lr = -1.0", "vision_lr"),
    ] {
        let error = Recipe::load(&recipe(dir.path(), "wrong", fields)).expect_err(named).to_string();
        assert!(error.contains(named) && error.contains("wrong.toml"), "{error}");
    }
    let unknown = Recipe::load(&recipe(dir.path(), "x", "steps = 2\ntrained = [\"viual.\"]")).unwrap();
    assert!(losses(&unknown, dir.path(), None, 0).0.unwrap_err().to_string().contains("viual."));
}

#[test]
fn a_curve_is_drawn_of_any_run() {
    let line = |step, loss| StepMetrics {
        step,
        loss,
        lr: 0.0,
        gradient_norm: 0.0,
        tokens: 0,
        targets: 0,
        patches: 0,
        seconds: 0.0,
        waiting: 0.0,
        held_out: None,
        gflops: 0.0,
    };
    assert!(loss_svg(&[]).ends_with("</svg>\n"));
    let svg = loss_svg(&(1..3000).map(|i| line(i, 5.0 / i as f64)).collect::<Vec<_>>());
    assert!(svg.len() < 40_000 && svg.matches("<polyline").count() == 2 && !svg.contains("NaN"));
    let measured = [StepMetrics { held_out: Some(9.0), ..line(1, 5.0) }, line(2, 4.0)];
    assert!(loss_svg(&measured).matches("<polyline").count() == 3 && loss_svg(&measured).contains(">9.00<"));
}
