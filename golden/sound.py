"""Log-mel spectrograms by librosa and views of spectrograms by PyTorch (`sound.json`), and the same
sound in four formats (`tone.*`).

Settings and order of the operations are those of nttcslab/byol-a. Needs librosa, soundfile, torch
and the program lame.
"""

import json
import pathlib
import subprocess

import librosa
import numpy as np
import soundfile
import torch


def log_mel(rate, n):
    """A chirp with noise, as 16-bit samples, and its log-mel spectrogram [frames, 64]."""
    rng = np.random.default_rng(rate)
    t = np.arange(n) / rate
    sound = 0.5 * np.sin(2 * np.pi * (200 + 2000 * t) * t) + 0.05 * rng.standard_normal(n)
    sound[: n // 8] = 0.0
    samples = np.round(np.clip(sound, -1, 1) * 32767).astype(int)
    scale = rate / 16000
    power = librosa.feature.melspectrogram(
        y=(samples / 32768).astype(np.float32), sr=rate, n_fft=round(1024 * scale), hop_length=round(160 * scale),
        n_mels=64, fmin=60, fmax=7800 * scale, power=2.0, center=True, pad_mode="constant",
    )
    values = np.log(power.astype(np.float64) + np.finfo(np.float32).eps)
    return {"rate": rate, "samples": samples.tolist(), "log_mel": np.round(values.T, 6).ravel().tolist()}


def view(channels):
    rng = np.random.default_rng(channels)
    image, background = (rng.integers(0, 65536, size=(12, width, channels)) for width in (16, 9))
    mean, std = rng.uniform(0.3, 0.6, channels), rng.uniform(0.1, 0.3, channels)
    (row, rows), (column, columns) = (2, 9), (-3, 17)
    mixup, fade, size = 0.3, (-0.5, 0.8), 8
    canvas = 24  # 1.5 times the width

    def normalized(pixels):
        return torch.tensor(((pixels / 65535 - mean) / std).transpose(2, 0, 1))

    x, z = normalized(image), normalized(np.tile(background, (1, 2, 1))[:, :16])
    x = torch.log((1 - mixup) * x.exp() + mixup * z.exp() + torch.finfo(torch.float32).eps)
    area = torch.zeros(channels, 12, canvas, dtype=x.dtype)
    left = (canvas - 16) // 2
    area[:, :, left : left + 16] = x
    crop = area[:, row : row + rows, left + column : left + column + columns]
    x = torch.nn.functional.interpolate(crop[None], size=(size, size), mode="bicubic", align_corners=True)[0]
    x = x + torch.linspace(*fade, size, dtype=x.dtype)
    result = (x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]).clamp(0, 1)
    return {
        "channels": channels, "image": image.ravel().tolist(), "background": background.ravel().tolist(),
        "statistics": np.stack([mean, std], axis=1).tolist(), "view": np.round(result.numpy(), 7).ravel().tolist(),
    }


golden = {"log_mel": [log_mel(16000, 3000), log_mel(8000, 2000)], "views": [view(c) for c in (1, 3, 4, 13)]}
pathlib.Path(__file__).with_suffix(".json").write_text(json.dumps(golden) + "\n")

# Stereo: the channels differ, and are averaged.
t = np.arange(4800) / 16000
left, right = (np.round(12000 * np.sin(2 * np.pi * hz * t)).astype(np.int16) for hz in (440, 1500))
tone = pathlib.Path(__file__).with_name("tone.wav")
for extension in ("wav", "flac", "ogg"):
    soundfile.write(tone.with_suffix(f".{extension}"), np.stack([left, right], axis=1), 16000)
subprocess.run(["lame", "--quiet", "-b", "64", tone, tone.with_suffix(".mp3")], check=True)
