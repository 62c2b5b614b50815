//! Optimiser, schedules, recipes and what a run makes.

use std::path::{Path, PathBuf};

use keye_train::data::DataConfig;
use keye_train::{
    Cpu, ExportDtype, Gradients, Means, Optimizer, Recipe, Schedule, StepMetrics, Weighting, export, groups,
    load_model, load_params, loss_svg, model_of, weights,
};

use crate::resume::{losses, recipe};
use crate::support::{model, packed, sample};

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
    let mut gradients = Gradients::zeros(model.device(), layout, trained).unwrap();
    let range = layout.range(i);
    gradients.values[range.start] = 3.0;
    gradients.values[range.start + 1] = -4.0;
    let start = model.init(1);
    let mut params = start.clone();
    let mut optimizer = Means::new(layout);
    let groups = groups(layout, Optimizer::AdamW, 0.1, 0.5);
    let norm = optimizer.step(model.device(), &mut params, &gradients, &groups, 1e-2, 1.0).unwrap();
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
    let norm = optimizer.step(model.device(), &mut params, &gradients, &groups, 1e-2, 1.0).unwrap();
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

/// A checkpoint from the middle of a stage is a model.
#[test]
fn the_middle_of_a_stage_is_exported() {
    let dir = tempfile::tempdir().unwrap();
    let recipe =
        Recipe::load(&recipe(dir.path(), "half", "steps = 4\ntrained = [\"\"]\ncheckpoint_every = 2")).unwrap();
    losses(&recipe, dir.path(), None, 0).0.unwrap();
    let read = |from: &Path| {
        let model = model_of(from, Cpu::detect()).unwrap();
        let mut params = model.init(9);
        load_params(&model, from, &mut params).unwrap();
        let out = dir.path().join("exported").join(from.file_name().unwrap());
        export(&model, &params, &[from.to_owned()], &out, ExportDtype::F32, true).unwrap();
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

/// Starts that are no stage but the mean of two (`keye train average`).
const MEANS: [(&str, [&str; 2]); 1] = [("mean-34", ["sft-3", "sft-4"])];

/// What ships: recipes that load, each from a stage before it or a mean of such, with data of which a part is held out.
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
        let follows = |start: &String| match MEANS.iter().find(|(name, _)| start == name) {
            Some((_, of)) => of.iter().all(|stage| before.iter().any(|name| name == stage)),
            None => before.contains(start),
        };
        assert!(recipe.start.as_ref().map_or(before.is_empty(), follows), "{}", path.display());
        recipe.trained(load_model(&recipe, Cpu::detect()).unwrap().layout()).unwrap();
        let data = DataConfig::from_table(&recipe.data).unwrap();
        let unused = recipe.validation.as_ref().is_some_and(|validation| validation.every > recipe.steps);
        assert!(!unused && data.held_out().is_ok(), "{}", path.display());
        before.push(recipe.name);
    }
    assert!(before.len() > 9, "{before:?}");
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
