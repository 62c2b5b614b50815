//! Reading and writing checkpoints: the golden files, round trips, damaged directories.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use keye_processor::{
    Checkpoint, CheckpointFiles, Dtype, EmbeddedFiles, NewTensor, Overrides, PackedFormat, PackedTag, PackedTags,
    Processor, ProcessorError, SafetensorsWriter, write_checkpoint, write_file, write_packed_checkpoint,
};
use safetensors::SafeTensors;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../fixtures")
}

fn tensor(name: &str, dtype: Dtype, shape: &[usize]) -> NewTensor {
    NewTensor { name: name.into(), dtype, shape: shape.to_vec() }
}

/// Bytes that differ by tensor and place.
fn content(tensor: &NewTensor) -> Vec<u8> {
    let seed = tensor.name.bytes().map(usize::from).sum::<usize>();
    (0..tensor.bytes().unwrap() as usize).map(|i| (i * 7 + seed) as u8).collect()
}

fn write(dir: &Path, tensors: &[NewTensor], shard_bytes: u64) -> Result<(), ProcessorError> {
    write_checkpoint(dir, tensors, shard_bytes, &mut |tensor, out| out.write_all(&content(tensor)))
}

fn error(result: Result<impl Sized, ProcessorError>) -> String {
    result.map(|_| ()).unwrap_err().to_string()
}

fn listing(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// Every golden file reads as the reference implementation reads it.
#[test]
fn golden_files_read_like_the_reference() {
    let mut files = 0;
    for model in ["keye-preview-tiny", "keye-1_5-tiny"] {
        for part in ["model", "cases", "host"] {
            for entry in std::fs::read_dir(fixtures().join(model).join(part)).unwrap() {
                let path = entry.unwrap().path();
                if path.extension().is_none_or(|extension| extension != "safetensors") {
                    continue;
                }
                files += 1;
                let bytes = std::fs::read(&path).unwrap();
                let reference = SafeTensors::deserialize(&bytes).unwrap();
                let checkpoint = Checkpoint::open_file(&path).unwrap();
                let mut names = reference.names();
                names.sort();
                assert_eq!(checkpoint.names().collect::<Vec<_>>(), names);
                for (name, view) in reference.tensors() {
                    let ours = checkpoint.tensor(&name, view.shape()).unwrap();
                    assert_eq!(ours.dtype.name(), view.dtype().to_string());
                    assert_eq!(&ours.bytes[..], view.data(), "{name} of {}", path.display());
                }
            }
        }
    }
    assert!(files > 20, "{files} golden files");
}

#[test]
fn a_model_directory_opens_and_its_tensors_outlive_it() {
    let checkpoint = Checkpoint::open(&fixtures().join("keye-preview-tiny/model")).unwrap();
    let norm = checkpoint.tensor("model.norm.weight", &[64]).unwrap();
    let total = checkpoint.total_bytes();
    assert_eq!(total, checkpoint.totals().values().map(|t| t.bytes).sum::<u64>());
    assert_eq!(checkpoint.names().count(), checkpoint.totals().values().map(|t| t.tensors).sum::<usize>());
    drop(checkpoint);
    assert_eq!(norm.len(), 64);
    assert!(norm.bytes.chunks_exact(4).any(|b| f32::from_le_bytes(b.try_into().unwrap()) != 0.0));
}

#[test]
fn a_missing_tensor_and_a_wrong_shape_name_what_was_expected() {
    let checkpoint = Checkpoint::open(&fixtures().join("keye-preview-tiny/model")).unwrap();
    let missing = error(checkpoint.tensor("model.layers.0.self_attn.q_prj.weight", &[1]));
    assert!(missing.contains("q_prj") && missing.contains("keye-preview-tiny/model: "), "{missing}");
    assert!(missing.contains("nearest name is model.layers.0.self_attn.q_proj.weight"), "{missing}");
    assert!(!error(checkpoint.tensor("something.else.entirely", &[1])).contains("nearest"));
    let shape = error(checkpoint.tensor("model.norm.weight", &[65]));
    assert!(shape.contains("model.safetensors: tensor model.norm.weight: expected shape [65], found [64]"), "{shape}");
}

#[test]
fn names_of_later_saves_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let stored = [
        "model.visual.post.weight",
        "model.language_model.norm.weight",
        "model.mm_projector.pre_norm.bias",
        "lm_head.weight",
    ];
    let tensors: Vec<_> = stored.iter().enumerate().map(|(i, name)| tensor(name, Dtype::U8, &[i + 1])).collect();
    write(dir.path(), &tensors, u64::MAX).unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    for (i, name) in
        ["visual.post.weight", "model.norm.weight", "mlp_AR.pre_norm.bias", "lm_head.weight"].iter().enumerate()
    {
        assert_eq!(checkpoint.tensor(name, &[i + 1]).unwrap().name, stored[i]);
        assert_eq!(checkpoint.get(stored[i]).unwrap().name, stored[i]);
    }
    assert!(checkpoint.get("visual.norm.weight").is_none());
}

#[test]
fn shards_round_trip_and_the_reference_reads_them() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [
        tensor("bytes", Dtype::U8, &[5]),
        tensor("half", Dtype::Bf16, &[3, 4]),
        tensor("ids", Dtype::I64, &[2]),
        tensor("nothing", Dtype::F32, &[0, 8]),
        tensor("large", Dtype::F32, &[100]),
        tensor("scalar", Dtype::F8E4M3, &[]),
    ];
    write(dir.path(), &tensors, 64).unwrap();
    assert_eq!(
        listing(dir.path()),
        [
            "model-00001-of-00003.safetensors",
            "model-00002-of-00003.safetensors",
            "model-00003-of-00003.safetensors",
            "model.safetensors.index.json"
        ]
    );
    let index = std::fs::read(dir.path().join("model.safetensors.index.json")).unwrap();
    let index: serde_json::Value = serde_json::from_slice(&index).unwrap();
    assert_eq!(index["metadata"]["total_size"], 5 + 24 + 16 + 400 + 1);

    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(checkpoint.files().count(), 3);
    assert_eq!(checkpoint.metadata().collect::<Vec<_>>(), [("format", "pt")]);
    assert_eq!(checkpoint.total_bytes(), 446);
    let mut seen = BTreeMap::new();
    for tensor in &tensors {
        let stored = checkpoint.tensor(&tensor.name, &tensor.shape).unwrap();
        assert_eq!((stored.dtype, &stored.bytes[..]), (tensor.dtype, &content(tensor)[..]));
        seen.insert(stored.file, ());
        let file = index["weight_map"][&tensor.name].as_str().unwrap();
        let bytes = std::fs::read(dir.path().join(file)).unwrap();
        assert_eq!(u64::from_le_bytes(bytes[..8].try_into().unwrap()) % 8, 0, "elements start aligned");
        let reference = SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(reference.tensor(&tensor.name).unwrap().data(), content(tensor));
    }
    assert_eq!(seen.len(), 3);
    assert_eq!(checkpoint.totals()[&Dtype::Bf16].elements, 12);
}

#[test]
fn one_shard_needs_no_index() {
    let dir = tempfile::tempdir().unwrap();
    write(dir.path(), &[tensor("a", Dtype::F32, &[2])], 1 << 30).unwrap();
    assert_eq!(listing(dir.path()), ["model.safetensors"]);
    let path = dir.path().join("trace.safetensors");
    let (small, large) = (tensor("small", Dtype::U8, &[3]), tensor("large", Dtype::F64, &[2]));
    write_file(&path, &[(small.clone(), &content(&small)), (large.clone(), &content(&large))]).unwrap();
    let file = Checkpoint::open_file(&path).unwrap();
    assert_eq!(&file.tensor("small", &[3]).unwrap().bytes[..], content(&small));
    let large_bytes = file.tensor("large", &[2]).unwrap().bytes;
    assert_eq!(large_bytes.as_ptr().align_offset(8), 0, "large elements come first and are aligned");
    assert_eq!(&large_bytes[..], content(&large));
}

#[test]
fn half_a_file_never_gets_the_name() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("a.safetensors");
    std::fs::write(&path, b"old").unwrap();
    let tensors = [tensor("a", Dtype::U8, &[4]), tensor("b", Dtype::U8, &[4])];
    let mut writer = SafetensorsWriter::create(&path, &tensors, &[]).unwrap();
    writer.write_next(|_, out| out.write_all(&[1; 4])).unwrap();
    assert_eq!(listing(dir.path()).len(), 2);
    drop(writer);
    assert_eq!(listing(dir.path()), ["a.safetensors"]);

    let unfinished = SafetensorsWriter::create(&path, &tensors, &[]).unwrap().finish();
    assert!(error(unfinished).contains("tensor a: its elements have not been written"));
    for (bytes, expected) in [(3, "expected 4 bytes, found 1 fewer"), (5, "1 bytes more than the tensor has")] {
        let mut writer = SafetensorsWriter::create(&path, &tensors, &[]).unwrap();
        let found = error(writer.write_next(|_, out| out.write_all(&vec![0; bytes])));
        assert!(found.contains(expected), "{found}");
    }
    assert_eq!(listing(dir.path()), ["a.safetensors"]);
    assert_eq!(std::fs::read(&path).unwrap(), b"old");

    let twice = [tensors[0].clone(), tensors[0].clone()];
    assert!(error(SafetensorsWriter::create(&path, &twice, &[])).contains("twice"));
    assert!(error(write(dir.path(), &twice, 100)).contains("twice"));
    let endless = tensor("a", Dtype::F32, &[usize::MAX, 2]);
    assert!(error(SafetensorsWriter::create(&path, &[endless], &[])).contains("can be counted"));
    let nowhere = error(write(&dir.path().join("no/such"), &tensors, 100));
    assert!(nowhere.contains("no/such/model.safetensors: cannot write"), "{nowhere}");
}

/// A directory of two shards, `a` and `b` in the first and `c` in the second, damaged by `damage`.
fn damaged(damage: impl FnOnce(&Path)) -> String {
    let dir = tempfile::tempdir().unwrap();
    let tensors: Vec<_> = ["a", "b", "c"].iter().map(|name| tensor(name, Dtype::U8, &[4])).collect();
    write(dir.path(), &tensors, 8).unwrap();
    damage(dir.path());
    error(Checkpoint::open(dir.path()))
}

#[test]
fn damaged_directories_say_what_is_wrong() {
    let index =
        |text: &'static str| move |dir: &Path| std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap();
    let second = "model-00002-of-00002.safetensors";
    let missing = damaged(|dir| std::fs::remove_file(dir.join(second)).unwrap());
    assert!(missing.contains("index.json: shard model-00002-of-00002.safetensors, which holds 1 tensors, is missing"));
    let cut = damaged(|dir| {
        let bytes = std::fs::read(dir.join(second)).unwrap();
        std::fs::write(dir.join(second), &bytes[..bytes.len() - 3]).unwrap();
    });
    assert!(cut.contains(second) && cut.contains("truncated: 3 bytes are missing"), "{cut}");
    let moved = damaged(index(r#"{"weight_map": {"a": "model-00002-of-00002.safetensors"}}"#));
    assert!(moved.contains("model-00002-of-00002.safetensors: tensor a: ") && moved.contains("it is not"), "{moved}");
    for outside in ["../x.safetensors", "/etc/passwd", "..", "a\\\\b.safetensors", ""] {
        let text = format!(r#"{{"weight_map": {{"a": "{outside}"}}}}"#);
        let found = damaged(|dir| std::fs::write(dir.join("model.safetensors.index.json"), text).unwrap());
        assert!(found.contains("expected names of .safetensors files beside it"), "{found}");
    }
    assert!(damaged(index("{")).contains("index.json: EOF"));
    assert!(damaged(index("{}")).contains("missing field `weight_map`"));
    let directory = damaged(|dir| {
        std::fs::remove_file(dir.join(second)).unwrap();
        std::fs::create_dir(dir.join(second)).unwrap();
    });
    assert!(directory.contains("expected a safetensors file"), "{directory}");
}

#[test]
fn directories_without_weights_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let none = error(Checkpoint::open(dir.path()));
    assert!(none.contains("neither model.safetensors.index.json nor model.safetensors"), "{none}");
    std::fs::File::create(dir.path().join("pytorch_model.bin")).unwrap().write_all(b"x").unwrap();
    assert!(error(Checkpoint::open(dir.path())).contains("save it as safetensors"));
    assert!(error(Checkpoint::open(&dir.path().join("nowhere"))).contains("expected a checkpoint directory"));
    assert!(error(Checkpoint::open_file(&dir.path().join("nowhere"))).contains("cannot read"));
    std::fs::write(dir.path().join("model.safetensors"), b"").unwrap();
    assert!(error(Checkpoint::open(dir.path())).contains("truncated: 0 bytes"));
}

#[test]
fn packed_tensors_are_aligned_tagged_and_keep_their_shape() {
    let dir = tempfile::tempdir().unwrap();
    let tensors = [
        tensor("norm", Dtype::F32, &[3]),
        tensor("a", Dtype::U8, &[640]),
        tensor("odd", Dtype::Bf16, &[5]),
        tensor("b", Dtype::U8, &[1088]),
        tensor("bytes", Dtype::U8, &[7]),
    ];
    let tag = |format, rows, cols| PackedTag { format, rows, cols };
    let packed = PackedTags::from([
        ("a".to_owned(), tag(PackedFormat::Int4, 12, 60)),
        ("b".to_owned(), tag(PackedFormat::Int8, 16, 64)),
    ]);
    for shard_bytes in [u64::MAX, 1000] {
        let fill = &mut |tensor: &NewTensor, out: &mut dyn Write| out.write_all(&content(tensor));
        write_packed_checkpoint(dir.path(), &tensors, &packed, shard_bytes, fill).unwrap();
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        assert!(checkpoint.is_packed());
        let a = checkpoint.tensor("a", &[12, 60]).unwrap();
        assert_eq!((a.packed, a.dtype, a.len()), (Some(PackedFormat::Int4), Dtype::U8, 720));
        assert_eq!(checkpoint.tensor("b", &[16, 64]).unwrap().packed, Some(PackedFormat::Int8));
        for new in &tensors {
            let stored = checkpoint.get(&new.name).unwrap();
            assert_eq!(&stored.bytes[..], content(new));
            if packed.contains_key(&new.name) {
                assert_eq!(stored.bytes.as_ptr() as usize % 64, 0, "{}", new.name);
            } else {
                assert_eq!((stored.packed, &stored.shape), (None, &new.shape));
            }
        }
        let shape = error(checkpoint.tensor("a", &[16, 64]));
        assert!(shape.contains("expected shape [16, 64], found [12, 60]"), "{shape}");
        std::fs::remove_dir_all(dir.path()).unwrap();
        std::fs::create_dir(dir.path()).unwrap();
    }
    let unaligned = PackedTags::from([("bytes".to_owned(), tag(PackedFormat::Int4, 1, 7))]);
    let fill = &mut |tensor: &NewTensor, out: &mut dyn Write| out.write_all(&content(tensor));
    assert!(
        error(write_packed_checkpoint(dir.path(), &tensors, &unaligned, u64::MAX, fill)).contains("multiple of 64")
    );
}

/// The files of a directory as a program would have them inside.
fn embedded(dir: &Path) -> &'static EmbeddedFiles {
    let read = |name: &String| -> (&'static str, &'static [u8]) {
        (name.clone().leak(), std::fs::read(dir.join(name)).unwrap().leak())
    };
    let files: Vec<_> = listing(dir).iter().map(read).collect();
    Box::leak(Box::new(EmbeddedFiles { name: "inside", files: files.leak() }))
}

#[test]
fn an_embedded_checkpoint_reads_like_its_directory_and_where_it_lies() {
    let dir = fixtures().join("keye-1_5-tiny/model");
    let inside = embedded(&dir);
    let files = CheckpointFiles::Embedded(inside);
    let whole = inside.get("model.safetensors").unwrap().as_ptr_range();
    let [outer, inner] = [Checkpoint::open(&dir), Checkpoint::open(&files)].map(Result::unwrap);
    assert_eq!(outer.names().collect::<Vec<_>>(), inner.names().collect::<Vec<_>>());
    for name in outer.names() {
        let [a, b] = [&outer, &inner].map(|checkpoint| checkpoint.get(name).unwrap());
        assert_eq!((a.dtype, &a.shape, &a.bytes), (b.dtype, &b.shape, &b.bytes), "{name}");
        let place = b.bytes.as_ptr_range();
        assert!(whole.start <= place.start && place.end <= whole.end, "{name} was copied");
    }
    let load = |files: CheckpointFiles| Processor::load(&files, &Overrides::default()).unwrap();
    let [outer, inner] = [load(CheckpointFiles::from(&dir)), load(files)];
    assert_eq!(outer.config, inner.config);
    assert_eq!(outer.generation, inner.generation);
    assert_eq!(outer.media, inner.media);
    assert_eq!(outer.template.source(), inner.template.source());
    assert_eq!(outer.tokenizer.vocab_size(), inner.tokenizer.vocab_size());
}

#[test]
fn embedded_shards_are_found_and_a_missing_file_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let tensors: Vec<_> = ["a", "b", "c"].iter().map(|name| tensor(name, Dtype::U8, &[4])).collect();
    write(dir.path(), &tensors, 8).unwrap();
    let open = || Checkpoint::open(CheckpointFiles::Embedded(embedded(dir.path())));
    assert_eq!(open().unwrap().names().collect::<Vec<_>>(), ["a", "b", "c"]);
    std::fs::remove_file(dir.path().join("model-00002-of-00002.safetensors")).unwrap();
    assert!(error(open()).contains("inside/model.safetensors.index.json: shard model-00002"));
    std::fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    assert!(error(open()).contains("inside: no weights: neither model.safetensors.index.json nor model.safetensors"));
    let nothing = CheckpointFiles::Embedded(embedded(dir.path()));
    let config = error(Processor::load(&nothing, &Overrides::default()));
    assert!(config.contains("inside/config.json: cannot read"), "{config}");
}
