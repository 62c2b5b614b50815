#!/usr/bin/env python3
"""keye's media path beside keye-vl-utils 1.5.2 with torchvision: a minute of 720p and a 12-megapixel JPEG, in turns.

    pip install torch torchvision "keye-vl-utils[decord]==1.5.2" opencv-python-headless einops
    cargo build --release -p keye-media --example media_bench
    python bench/peers/beside_keye_vl_utils.py --keye target/release/examples/media_bench

From a file to the pixels that the model is given, with 1.5's defaults: decoding, sampling, slow and fast frames, resizing,
normalising. keye goes on to cut and hash patches; the peer stops at normalised frames. Its video reader is decord. The photo
has at most 1280 tokens. The clip and the photo are those of `media_bench`, in the folder for temporary files. CPU seconds are
of all threads and child processes; the least of the repetitions. Prints one line of json: every round, and ratios.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time

CLIP, PHOTO = (os.path.join(tempfile.gettempdir(), "keye-sample-" + name) for name in ("720p.mp4", "12mp.jpg"))
PHOTO_PIXELS = 1280 * 28 * 28


def timed(work, repeat):
    """Least wall and CPU seconds."""
    def cpu():
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in used)

    best = {"wall_s": float("inf"), "cpu_s": float("inf")}
    for _ in range(repeat):
        wall, used = time.time(), cpu()
        work()
        best = {"wall_s": min(best["wall_s"], time.time() - wall), "cpu_s": min(best["cpu_s"], cpu() - used)}
    return best


def peer(arguments):
    """One round of the peer, in a process of its own."""
    import torch
    from keye_vl_utils import vision_process
    from torchvision.transforms import functional
    torch.set_num_threads(arguments.threads)
    bicubic = functional.InterpolationMode.BICUBIC
    normalised = lambda frames: (frames.float() / 255.0 - 0.5) / 0.5
    facts = {}

    def video():
        frames, sizes = vision_process.fetch_video({"video": CLIP})
        kinds = sizes["frame_types"]
        fast = (sizes["fast_height"], sizes["fast_width"])
        done = [normalised(functional.resize(frames[kinds == kind], list(size), interpolation=bicubic, antialias=True))
                for kind, size in enumerate([(sizes["height"], sizes["width"]), fast]) if (kinds == kind).any()]
        facts["frames"] = [len(part) for part in done]

    def photo():
        picture = vision_process.fetch_image({"image": PHOTO, "max_pixels": PHOTO_PIXELS})
        return normalised(functional.pil_to_tensor(picture))

    found = {"video": timed(video, arguments.repeat), "photo": timed(photo, arguments.repeat)}
    found["rss_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"torch": torch.__version__, **facts, **found}))


def ours(arguments):
    command = [arguments.keye, "--json", "--rounds", str(arguments.repeat)]
    video, photo = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    short = lambda cost: {name: cost[name] for name in ("wall_s", "cpu_s", "rss_mb", "child_rss_mb", "decode_cpu_s", "decode_wall_s")}
    return {"video": short(video), "photo": short(photo)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keye", default="target/release/examples/media_bench")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of the peer")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--peer-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.peer_only:
        return peer(arguments)
    rounds = []
    for _ in range(arguments.rounds):
        mine = ours(arguments)
        command = [sys.executable, __file__, "--peer-only", "--repeat", str(arguments.repeat), "--threads", str(arguments.threads)]
        theirs = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        rounds.append({"keye": mine, "keye-vl-utils": theirs})
        print(rounds[-1], file=sys.stderr, flush=True)
    least = lambda who, what, unit: min(entry[who][what][unit] for entry in rounds)
    ratio = {what: {unit: round(least("keye-vl-utils", what, unit) / least("keye", what, unit), 2) for unit in ("wall_s", "cpu_s")}
             for what in ("video", "photo")}
    print(json.dumps({"bench": "beside_keye_vl_utils", "threads": arguments.threads, "rounds": rounds, "ratio": ratio}))


if __name__ == "__main__":
    main()
