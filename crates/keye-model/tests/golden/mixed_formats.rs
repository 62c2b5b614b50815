//! Checkpoints whose experts are packed in different ways.

use keye_backend::{BackendError, Cpu, CpuOptions, Dtype, KvDtype};
use keye_model::{KeyeModel, LoadOptions, ModelError, split_experts, weight_layout};
use keye_processor::{
    Checkpoint, Dtype as Stored, ModelConfig, NewTensor, PackedFormat, PackedTag, PackedTags, write_packed_checkpoint,
};

use crate::support::fixture;

/// Loads 2.0's fixture with zeros for weights, experts one by one, those that `format` names packed.
fn load(format: impl Fn(&str) -> Option<PackedFormat>) -> Result<(), ModelError> {
    let config = ModelConfig::load(&fixture("keye-2-tiny").join("model")).unwrap();
    let mut tags = PackedTags::new();
    let new = |tensor: keye_model::TensorShape| match (format(&tensor.name), &tensor.shape[..]) {
        (Some(format), &[rows, cols]) => {
            let dtype = if format == PackedFormat::Int8 { Dtype::Int8 } else { Dtype::Int10 };
            let shape = vec![dtype.stored_bytes(rows, cols).unwrap()];
            tags.insert(tensor.name.clone(), PackedTag { format, rows, cols });
            NewTensor { name: tensor.name, dtype: Stored::U8, shape }
        }
        _ => NewTensor { name: tensor.name, dtype: Stored::F32, shape: tensor.shape },
    };
    let tensors: Vec<NewTensor> = split_experts(weight_layout(&config)).into_iter().map(new).collect();
    let dir = tempfile::tempdir().unwrap();
    write_packed_checkpoint(dir.path(), &tensors, &tags, u64::MAX, &mut |tensor, out| {
        out.write_all(&vec![0; tensor.bytes().unwrap() as usize])
    })
    .unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    let options = LoadOptions { cache_tokens: 64, kv_dtype: KvDtype::F32 };
    let cpu = Cpu::new(CpuOptions { threads: Some(1), isa: None }).unwrap();
    KeyeModel::load(cpu, &config, &config.facts().media.processor, &checkpoint, options).map(drop)
}

#[test]
fn experts_that_have_no_product_together_are_refused_by_name() {
    use PackedFormat::{Int8, Int10};
    let first = "model.layers.0.mlp.experts.0.gate_proj.weight";
    let refused = |name: &str, model: &str, format: &dyn Fn(&str) -> Option<PackedFormat>| {
        let Err(ModelError::Backend(BackendError::Weight { name: found, reason })) = load(format) else {
            panic!("{name} was taken");
        };
        assert_eq!(found, name);
        assert!(reason.contains("expected") && reason.contains(model), "{reason}");
    };
    let up = "model.layers.0.mlp.experts.0.up_proj.weight";
    refused(up, first, &|name| (name == up).then_some(Int8));
    refused(up, first, &|name| match name.contains(".experts.") {
        true => Some(if name.contains("up_proj") { Int10 } else { Int8 }),
        false => None,
    });
    let third = "model.layers.0.mlp.experts.3.gate_proj.weight";
    refused(third, first, &|name| name.contains(".experts.3.").then_some(Int8));
    let down = "model.layers.1.mlp.experts.7.down_proj.weight";
    refused(down, "model.layers.1.mlp.experts.0.down_proj.weight", &|name| (name == down).then_some(Int8));
}

#[test]
fn layers_and_downs_may_have_formats_of_their_own() {
    use PackedFormat::{Int8, Int10};
    load(|name| match name.contains("layers.1.mlp.experts.") {
        true => Some(if name.contains("down_proj") { Int10 } else { Int8 }),
        false => None,
    })
    .unwrap();
}
