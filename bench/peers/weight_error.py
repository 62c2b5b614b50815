#!/usr/bin/env python3
"""What quantising loses: relative RMS error of keye's int4 and int8 beside ggml's Q4_K, Q4_0 and Q8_0 on the same tensors.

    python3 -m venv venv && venv/bin/pip install gguf ik-llama-cpp-python --only-binary :all:
    cargo build --release -p keye --example packed_error
    venv/bin/python bench/peers/weight_error.py target/release/examples/packed_error

ggml's own C code quantises (libggml.so of the wheel), PyPI's gguf dequantises. The tensors: normal numbers; Student's t with
4 degrees of freedom; normal numbers with one input channel in 64 twenty times as large; rows of very different size.
"""
import ctypes
import glob
import json
import os
import subprocess
import sys
import tempfile

import ik_llama_cpp
import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

ROWS, COLS = 1024, 4096
TYPES = {"Q4_K": GGMLQuantizationType.Q4_K, "Q4_0": GGMLQuantizationType.Q4_0, "Q8_0": GGMLQuantizationType.Q8_0}
BITS = {"Q4_K": 4.5, "Q4_0": 4.5, "Q8_0": 8.5}


def tensors():
    rng = np.random.default_rng(1)
    normal = rng.standard_normal((ROWS, COLS)).astype(np.float32) * 0.02
    yield "normal", normal
    yield "student-t, 4", (rng.standard_t(4, (ROWS, COLS)) * 0.02).astype(np.float32)
    outlier = normal.copy()
    outlier[:, rng.choice(COLS, COLS // 64, replace=False)] *= 20
    yield "outlier channels", outlier
    yield "rows of all sizes", (normal * np.exp(rng.standard_normal((ROWS, 1)))).astype(np.float32)


def relative_error(x, y):
    x, y = x.astype(np.float64), y.astype(np.float64)
    return float(np.sqrt(((x - y) ** 2).sum() / (x**2).sum()))


def main():
    packed_error = sys.argv[1]
    folder = os.path.dirname(ik_llama_cpp.__file__)
    ggml = ctypes.CDLL(glob.glob(f"{folder}/**/libggml*.so", recursive=True)[0])
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    ggml.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p] + [ctypes.c_int64] * 3 + [ctypes.c_void_p]
    out = []
    for name, x in tensors():
        row = {"tensor": name}
        for kind, number in TYPES.items():
            data = np.zeros(ROWS * COLS * 9 // 8, np.uint8)
            used = ggml.ggml_quantize_chunk(number.value, x.ctypes.data, data.ctypes.data, 0, ROWS, COLS, None)
            assert abs(used * 8 / x.size - BITS[kind]) < 1e-6, (kind, used)
            row[kind] = relative_error(x, dequantize(data[:used].reshape(ROWS, -1), number))
        with tempfile.NamedTemporaryFile() as file:
            x.tofile(file)
            file.flush()
            text = subprocess.run([packed_error, file.name, str(ROWS), str(COLS)], check=True, capture_output=True, text=True)
        ours = json.loads(text.stdout)
        for kind in ("int4", "int8"):
            row[kind] = ours[kind]["relative_rms_error"]
        row["int4_of_Q4_K"], row["int8_of_Q8_0"] = row["int4"] / row["Q4_K"], row["int8"] / row["Q8_0"]
        out.append(row)
        print(f"{name:20}" + "".join(f" {key} {value:.5f}" for key, value in row.items() if key != "tensor"), file=sys.stderr)
    print(json.dumps(out))


if __name__ == "__main__":
    main()
