#!/usr/bin/env python3
"""keye's vision tower beside PyTorch's: transformers' SiglipVisionModel of the same sizes, random weights, in turns.

    pip install torch transformers
    python bench/peers/beside_torch_vision.py --keye target/release/keye

Both have random weights. Cases as `keye bench` has them: one block of 1024 patches, eight blocks of 512. PyTorch runs 3 of the 27 layers, its time is
taken times 9. Prints one line of json: seconds of every round, and the ratio of the best.
"""
import argparse
import json
import os
import subprocess
import sys
import time

CASES = {1024: (1, 448, 448), 4096: (8, 224, 448)}
LAYERS, RUN = 27, 3


def peer(arguments):
    import torch
    import transformers
    torch.set_num_threads(arguments.threads)
    config = transformers.SiglipVisionConfig(
        hidden_size=1152, intermediate_size=4304, num_hidden_layers=RUN, num_attention_heads=16, patch_size=14,
        image_size=448, vision_use_head=False, attn_implementation="sdpa")
    model = transformers.SiglipVisionModel(config).eval().to(getattr(torch, arguments.dtype))
    found = {"version": torch.__version__}
    for patches, (frames, height, width) in CASES.items():
        pixels = torch.randn(frames, 3, height, width).to(model.dtype)
        times = []
        with torch.inference_mode():
            for _ in range(arguments.repeat + 1):
                start = time.time()
                model(pixel_values=pixels, interpolate_pos_encoding=True)
                times.append(time.time() - start)
        found[str(patches)] = min(times) * LAYERS / RUN
    print(json.dumps(found))


def ours(arguments):
    weights = ["--model", arguments.model] if arguments.model else ["--preset", "keye-vl-1.5-8b", "--quant", "int4", "--layers", "1"]
    command = [arguments.keye, "bench", *weights, "--only", "vision", "--json", "--threads", str(arguments.threads)]
    command += ["--repeat", str(arguments.repeat)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"limits": found["limits"], **{str(run["patches"]): run["seconds"] for run in found["vision"]}}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keye", default="target/release/keye")
    parser.add_argument("--model", help="packed checkpoint [default: random weights of the real sizes]")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--peer-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer_only:
        return peer(arguments)
    rounds = []
    for _ in range(arguments.rounds):
        mine = ours(arguments)
        command = [sys.executable, __file__, "--peer-only", "--dtype", arguments.dtype, "--threads", str(arguments.threads)]
        command += ["--repeat", str(arguments.repeat)]
        theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rounds.append({"keye": mine, "torch": theirs})
        print(rounds[-1], file=sys.stderr, flush=True)
    best = lambda who, patches: min(entry[who][str(patches)] for entry in rounds)
    ratio = {str(patches): round(best("torch", patches) / best("keye", patches), 2) for patches in CASES}
    print(json.dumps({"bench": "beside_torch_vision", "dtype": arguments.dtype, "rounds": rounds, "ratio": ratio}))


if __name__ == "__main__":
    main()
