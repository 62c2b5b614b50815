#!/usr/bin/env python3
"""keye beside llama.cpp, in turns: an 8 B language model at 4 bits, random weights, the same machine and threads.

    CMAKE_ARGS="-DGGML_NATIVE=ON" pip install llama-cpp-python --no-binary llama-cpp-python && pip install gguf numpy
    python bench/peers/beside_llama_cpp.py --keye target/release/keye --gguf qwen3-8b-q4_k_m.gguf

The GGUF file is written first if it is not there (Q4_K_M's mix of Q4_K and Q6_K, 5 GB). llama.cpp runs with flash attention,
batches of 512 and a context of no more than is needed, in turns with its weights repacked (its default) and as they are in the
file (`llama-bench --repack 0`): the faster of the two counts. Prints one line of json: rates of every round, and the ratio of the best.
"""
import argparse
import json
import os
import subprocess
import sys
import time

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 36, 4096, 32, 8, 128, 12288, 151936
PROMPT, CONTEXT, DECODED = 512, 128, 8


def write_gguf(path):
    import gguf
    import numpy as np
    from gguf import GGMLQuantizationType as Q

    def blocks(rng, kind, rows, cols):
        """Random codes; scales such that weights deviate by about 0.02."""
        if kind == Q.F32:
            return np.ones(cols, dtype=np.float32)
        per_block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = np.frombuffer(rng.bytes(rows * cols // per_block * size), dtype=np.uint8).reshape(-1, size).copy()
        half = lambda value: np.full(len(raw), value, dtype=np.float16).view(np.uint8).reshape(-1, 2)
        if kind == Q.Q4_K:
            raw[:, 0:2], raw[:, 2:4] = half(1.3e-4), half(1e-3)
        else:
            raw[:, 208:210] = half(1.5e-5)
        return raw.reshape(rows, -1)

    def more_bits(layer):
        return layer < LAYERS // 8 or layer >= 7 * LAYERS // 8 or (layer - LAYERS // 8) % 3 == 2

    tensors = [("token_embd.weight", VOCAB, HIDDEN, Q.Q4_K)]
    for layer in range(LAYERS):
        mixed = Q.Q6_K if more_bits(layer) else Q.Q4_K
        at = f"blk.{layer}."
        tensors += [(at + name + ".weight", 1, width, Q.F32) for name, width in
                    [("attn_norm", HIDDEN), ("attn_q_norm", HEAD_DIM), ("attn_k_norm", HEAD_DIM), ("ffn_norm", HIDDEN)]]
        tensors += [(at + name + ".weight", rows, cols, kind) for name, rows, cols, kind in [
            ("attn_q", HEADS * HEAD_DIM, HIDDEN, Q.Q4_K), ("attn_k", KV_HEADS * HEAD_DIM, HIDDEN, Q.Q4_K),
            ("attn_v", KV_HEADS * HEAD_DIM, HIDDEN, mixed), ("attn_output", HIDDEN, HEADS * HEAD_DIM, Q.Q4_K),
            ("ffn_gate", MLP, HIDDEN, Q.Q4_K), ("ffn_up", MLP, HIDDEN, Q.Q4_K), ("ffn_down", HIDDEN, MLP, mixed)]]
    tensors += [("output_norm.weight", 1, HIDDEN, Q.F32), ("output.weight", VOCAB, HIDDEN, Q.Q6_K)]

    writer = gguf.GGUFWriter(path + ".partial", "qwen3")
    writer.add_block_count(LAYERS)
    writer.add_context_length(40960)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(15)
    writer.add_quantization_version(2)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(["a", "b", "ab"] + [f"<w{i}>" for i in range(3, VOCAB)])
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(VOCAB - 1)
    for name, rows, cols, kind in tensors:
        if kind == Q.F32:
            writer.add_tensor_info(name, (cols,), np.dtype(np.float32), 4 * cols)
        else:
            per_block, size = gguf.GGML_QUANT_SIZES[kind]
            shape = (rows, cols // per_block * size)
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), shape[0] * shape[1], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    rng = np.random.default_rng(1)
    for name, rows, cols, kind in tensors:
        writer.write_tensor_data(blocks(rng, kind, rows, cols))
    writer.close()
    os.rename(path + ".partial", path)


def peer(arguments):
    """One round of llama.cpp, in a process of its own: its memory is gone when it ends."""
    start = time.time()
    import llama_cpp
    if arguments.as_stored:
        defaults = llama_cpp.llama_cpp.llama_model_default_params

        def as_stored():
            parameters = defaults()
            parameters.use_extra_bufts = False
            return parameters
        # The binding has no switch for it; its constructor takes the defaults from here.
        llama_cpp.llama_cpp.llama_model_default_params = as_stored
    model = llama_cpp.Llama(arguments.gguf, n_ctx=PROMPT + CONTEXT, n_batch=PROMPT, n_ubatch=PROMPT, flash_attn=True,
                            n_threads=arguments.threads, n_threads_batch=arguments.threads, verbose=False)
    ids = [i * 7919 % 150000 for i in range(PROMPT)]
    model.eval(ids[:16])
    first = time.time() - start
    best = {"prefill": 0.0, "decode": 0.0}
    for _ in range(arguments.repeat):
        model.reset()
        at = time.time()
        model.eval(ids)
        best["prefill"] = max(best["prefill"], PROMPT / (time.time() - at))
        model.reset()
        model.eval(ids[:CONTEXT])
        at = time.time()
        for token in ids[:DECODED]:
            model.eval([token])
        best["decode"] = max(best["decode"], DECODED / (time.time() - at))
    print(json.dumps({"version": llama_cpp.__version__, "first_token_s": first, **best}))


def ours(arguments):
    weights = ["--model", arguments.model] if arguments.model else ["--preset", "keye-vl-1.5-8b", "--quant", "int4"]
    command = [arguments.keye, "bench", *weights, "--only", "start,prefill,decode", "--json", "--repeat", str(arguments.repeat)]
    command += ["--prompts", str(PROMPT), "--contexts", str(CONTEXT), "--threads", str(arguments.threads)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"prefill": found["prefill"][0]["tok_s"], "decode": found["decode"][0]["tok_s"],
            "first_token_s": found["first_token_s"], "limits": found["limits"]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keye", default="target/release/keye")
    parser.add_argument("--model", help="packed checkpoint, as `keye bench --write-checkpoint` makes one [default: random weights in memory]")
    parser.add_argument("--gguf", required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--peer-only", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--as-stored", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer_only:
        return peer(arguments)
    if not os.path.exists(arguments.gguf):
        write_gguf(arguments.gguf)
    rounds = []
    for _ in range(arguments.rounds):
        mine = ours(arguments)
        command = [sys.executable, __file__, "--peer-only", "--gguf", arguments.gguf, "--threads", str(arguments.threads)]
        command += ["--repeat", str(arguments.repeat)]
        run = lambda more: json.loads(subprocess.run(command + more, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rounds.append({"keye": mine, "llama.cpp": run([]), "llama.cpp as stored": run(["--as-stored"])})
        print(rounds[-1], file=sys.stderr, flush=True)
    best = lambda what, *who: max(entry[name][what] for entry in rounds for name in who)
    ratio = {what: round(best(what, "keye") / best(what, "llama.cpp", "llama.cpp as stored"), 2) for what in ("prefill", "decode")}
    print(json.dumps({"bench": "beside_llama_cpp", "threads": arguments.threads, "rounds": rounds, "ratio": ratio}))


if __name__ == "__main__":
    main()
