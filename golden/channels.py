"""Values of the color operations for images that are not RGB, in double precision: `channels.json`.

Independent of the Rust code: the hue shift is a phase of the first coefficient of the discrete
Fourier transform over the channels (docs/reference/augmentations.md).
"""

import json
import pathlib

import numpy as np


def hue(x, turns):
    c = x.shape[-1]
    if c < 3:
        return x
    spectrum = np.fft.fft(x, axis=-1)
    phase = np.exp(-2j * np.pi * turns)
    spectrum[..., 1] *= phase
    spectrum[..., c - 1] *= np.conj(phase)
    return np.fft.ifft(spectrum, axis=-1).real


def saturation(x, factor):
    mean = x.mean(axis=-1, keepdims=True)
    return factor * x + (1 - factor) * mean


def contrast(x, factor):
    mean = x.mean(axis=(0, 1), keepdims=True)
    return factor * x + (1 - factor) * mean


def case(channels):
    rng = np.random.default_rng(channels)
    x = rng.random((3, 5, channels)).astype(np.float32).astype(np.float64)
    values = {
        "brightness": (0.3, x + 0.3),
        "contrast": (1.4, contrast(x, 1.4)),
        "saturation": (0.7, saturation(x, 0.7)),
        "hue": (0.17, hue(x, 0.17)),
        "gray": (0.0, saturation(x, 0.0)),
        "solarize": (0.0, np.where(x < 0.5, x, 1 - x)),
    }
    outputs = {name: {"value": v, "view": np.clip(y, 0, 1).ravel().tolist()} for name, (v, y) in values.items()}
    return {"shape": x.shape, "image": x.ravel().tolist(), "outputs": outputs}


cases = [case(channels) for channels in (1, 2, 4, 13)]
pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(cases) + "\n")
