"""Small images and a small run that the tests share."""

import numpy as np
import pytest

import byol

#: Settings of a run of a second or two.
SMALL = {
    "recipe": "cifar10",
    "encoder": "resnet18",
    "width": 0.0625,
    "size": 16,
    "batch": 8,
    "epochs": 3,
    "hidden": 16,
    "projection": 8,
    "warmup_epochs": 1,
    "device": "cpu",
}


def pictures(n=60):
    """Return `n` striped images of two classes, uint8 [N, 20, 24, 3], and their labels."""
    y, x = np.mgrid[:20, :24]
    images = []
    for i in range(n):
        stripes = x // (2 + i % 3) if i % 2 else y // (2 + i % 3)
        value = np.where(stripes % 2, 200, 40) + (i * 7) % 30
        images.append(np.stack([value, 255 - value, np.full_like(value, (i * 37) % 256)], axis=-1))
    return np.array(images, dtype=np.uint8), [i % 2 for i in range(n)]


@pytest.fixture(scope="session")
def data():
    images, labels = pictures()
    return byol.Dataset.from_arrays(images, labels)


@pytest.fixture(scope="session")
def run(data, tmp_path_factory):
    return byol.pretrain(data, tmp_path_factory.mktemp("runs") / "run", **SMALL)


@pytest.fixture(scope="session")
def encoder(run):
    return run.encoder
