"""Write synthetic sounds of ten classes: python benches/sound_patterns.py FOLDER

The classes are patterns in time. Pitch, timbre, loudness, duration and noise are random, so that they
do not tell the class. 3,000 WAV files for training and 1,000 for testing, about a second each.
"""

import pathlib
import sys
import wave

import numpy as np

RATE = 16000
CLASSES = [
    "steady", "rising", "falling", "vibrato", "tremolo", "arpeggio-up", "arpeggio-down", "trill", "rhythm", "noise",
]


def tone(rng, frequency):
    """A sum of harmonics with random strengths; `frequency` is that of each sample, in Hz."""
    phase = 2 * np.pi * np.cumsum(frequency) / RATE
    strengths = rng.uniform(0.001, 1, rng.integers(1, 6))
    return sum(s * np.sin((k + 1) * phase + rng.uniform(0, 6.28)) for k, s in enumerate(strengths))


def noise(rng, n):
    """Noise around a random frequency."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    frequency = np.linspace(0, 1, len(spectrum))
    spectrum *= np.exp(-(((frequency - rng.uniform(0, 0.5)) / rng.uniform(0.02, 0.9)) ** 2))
    return np.fft.irfft(spectrum, n)


def sound(rng, name):
    n = int(RATE * rng.uniform(0.7, 1.1))
    t, part = np.arange(n) / RATE, np.arange(n) / n
    base = 2 ** rng.uniform(np.log2(150), np.log2(1200))
    beats = rng.uniform(4, 9)  # per second
    octaves = np.zeros(n)
    if name in ("rising", "falling"):
        octaves = rng.uniform(0.7, 1.6) * (part if name == "rising" else 1 - part)
    elif name == "vibrato":
        octaves = rng.uniform(0.08, 0.2) * np.sin(2 * np.pi * beats * t)
    elif name.startswith("arpeggio"):
        notes = np.sort(rng.choice(19, rng.integers(3, 6), replace=False))
        notes = notes if name == "arpeggio-up" else notes[::-1]
        octaves = notes[(part * len(notes)).astype(int)] / 12
    elif name == "trill":
        octaves = np.where(np.sin(2 * np.pi * beats * t) > 0, rng.integers(2, 6), 0) / 12
    x = noise(rng, n) if name in ("rhythm", "noise") else tone(rng, base * 2**octaves)
    if name == "tremolo":
        x = x * (0.5 + 0.5 * np.sin(2 * np.pi * beats * t + rng.uniform(0, 6.28)))
    elif name == "rhythm":
        x = x * np.exp(-8 * ((t * beats + rng.uniform()) % 1))
    x = x / np.abs(x).max() * 10 ** (rng.uniform(-26, -3) / 20)
    x = x + rng.standard_normal(n) * 10 ** (rng.uniform(-60, -35) / 20)
    before, after = rng.integers(0, RATE // 4, 2)
    return np.pad(np.clip(x, -1, 1), (before, after))


def main(folder):
    rng = np.random.default_rng(0)
    for split, n in (("train", 3000), ("test", 1000)):
        for i in range(n):
            name = CLASSES[i % len(CLASSES)]
            path = pathlib.Path(folder, split, name, f"{i:04d}.wav")
            path.parent.mkdir(parents=True, exist_ok=True)
            with wave.open(str(path), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(RATE)
                file.writeframes((sound(rng, name) * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
