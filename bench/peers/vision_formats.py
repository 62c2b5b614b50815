#!/usr/bin/env python3
"""What a vision tower of the real sizes loses when its products are done in fewer bits: weights, activations, and both.

    pip install numpy && python bench/peers/vision_formats.py

27 layers of width 1152, heads of 72, MLP 4304; heavy-tailed weights (Student's t), input channels and norm weights several
times as large as the others, as trained towers have them. "8", "14": codes with a scale per 32 columns. "int10", "int12": as
`keye quantize` packs them, a row scale times a small integer per 32 columns; "14/64": a scale per 64 columns, as activations
beside them have. Prints the relative RMS error of the features, after the last norm, against f32.
"""
import sys

import numpy as np

WIDTH, MLP, HEADS, LAYERS, PATCHES = 1152, 4304, 16, 27, 96
HEAD = WIDTH // HEADS
rng = np.random.default_rng(0)


def heavy(shape, degrees):
    return (rng.standard_t(degrees, shape) / np.sqrt(degrees / (degrees - 2))).astype(np.float32)


def matrix(rows, cols, size=1.0):
    weights = heavy((rows, cols), 5) * size / np.sqrt(cols) * np.exp(0.3 * rng.standard_normal((rows, 1)))
    weights[:, rng.integers(0, cols, cols // 128)] *= 4
    return weights.astype(np.float32)


def norm_weights():
    gamma = np.exp(0.4 * rng.standard_normal(WIDTH)).astype(np.float32)
    gamma[rng.integers(0, WIDTH, 6)] *= 4
    return gamma, (0.1 * rng.standard_normal(WIDTH)).astype(np.float32)


def layer():
    made = {name: matrix(WIDTH, WIDTH) for name in "qkv"}
    return {**made, "o": matrix(WIDTH, WIDTH, 0.5), "fc1": matrix(MLP, WIDTH), "fc2": matrix(WIDTH, MLP, 0.5),
            "norm1": norm_weights(), "norm2": norm_weights()}


def grouped(x, columns):
    return np.pad(x, ((0, 0), (0, -x.shape[1] % columns))).reshape(len(x), -1, columns)


def rounded(x, largest, columns=32):
    """Codes of -largest..largest with a scale per 32 columns, or as many."""
    padded = grouped(x, columns)
    scale = np.abs(padded).max(-1, keepdims=True) / largest
    scale[scale == 0] = 1
    return (np.rint(padded / scale) * scale).reshape(len(x), -1)[:, :x.shape[1]].astype(np.float32)


def packed(x, largest, most):
    """Codes of -largest..largest, times a factor of 1..most per 32 columns, times a scale per row: the best of three factors."""
    padded = grouped(x, 32)
    widest = np.abs(padded).max(-1)
    scale = widest.max(-1, keepdims=True) / (largest * most)
    scale[scale == 0] = 1
    holds = np.clip(np.ceil(widest / (largest * scale) - 1e-6), 1, most)
    best, least = None, None
    for fewer in range(3):
        step = (np.maximum(holds - fewer, 1) * scale)[..., None]
        found = np.clip(np.rint(padded / step), -largest, largest) * step
        error = ((found - padded) ** 2).sum(-1)
        if best is None:
            best, least = found, error
        better = error < least
        best, least = np.where(better[..., None], found, best), np.where(better, error, least)
    return best.reshape(len(x), -1)[:, :x.shape[1]].astype(np.float32)


def norm(x, gamma, beta):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * gamma + beta


def tower(layers, x, weight, activation):
    product = lambda h, w: activation(h) @ weight(w).T
    split = lambda h: h.reshape(PATCHES, HEADS, HEAD).transpose(1, 0, 2)
    for w in layers:
        h = norm(x, *w["norm1"])
        q, k, v = (split(product(h, w[name])) for name in "qkv")
        scores = q @ k.transpose(0, 2, 1) / np.sqrt(HEAD)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        attended = (p / p.sum(-1, keepdims=True) @ v).transpose(1, 0, 2).reshape(PATCHES, WIDTH)
        x = x + product(attended, w["o"])
        h = product(norm(x, *w["norm2"]), w["fc1"])
        h = 0.5 * h * (1 + np.tanh(np.float32(0.79788456) * (h + 0.044715 * h ** 3)))
        x = x + product(h, w["fc2"])
    return norm(x, 1, 0)


def main():
    layers = [layer() for _ in range(LAYERS)]
    x = heavy((PATCHES, WIDTH), 4)
    x[:, rng.integers(0, WIDTH, 5)] *= 15
    same = lambda values: values
    expected = tower(layers, x, same, same)
    forms = {"-": same, "8": lambda x: rounded(x, 127), "14": lambda x: rounded(x, 8191),
             "14/64": lambda x: rounded(x, 8191, 64), "int10": lambda x: packed(x, 511, 8),
             "int12": lambda x: packed(x, 2047, 2)}
    pairs = [("8", "-"), ("-", "8"), ("8", "8"), ("14", "8"), ("8", "14"), ("14", "14"), ("int10", "14/64"), ("int12", "14/64")]
    for weights, activations in pairs:
        if sys.argv[1:] and weights not in sys.argv[1:]:
            continue
        # Weights are rounded once.
        made = [{name: value if name.startswith("norm") else forms[weights](value) for name, value in w.items()} for w in layers]
        found = tower(made, x, same, forms[activations])
        error = np.sqrt(((found - expected) ** 2).sum() / (expected ** 2).sum())
        print(f"weights {weights:>5}, activations {activations:>5}: {100 * error:.3f} %", flush=True)


if __name__ == "__main__":
    main()
