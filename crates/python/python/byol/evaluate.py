"""Evaluations of frozen encoders. They never change the encoder.

The other evaluations of the paper (fine-tuning, transfer, segmentation, depth) are commands:
``byol eval --help``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from byol import _byol
from byol._data import Dataset, PathLike, Split, as_dataset
from byol._encoder import Encoder

__all__ = ["Classification", "knn", "label_free", "linear"]


@dataclass(frozen=True, eq=False)
class Classification:
    """Accuracy and predictions on the test images."""

    accuracy: float
    """Fraction of test images whose class was predicted."""
    low: float
    """Lower end of the 95 % confidence interval (bootstrap over the test images)."""
    high: float
    """Upper end of the interval."""
    predicted: NDArray[np.int64]
    """Predicted class of each test image, ``[N]``."""
    labels: NDArray[np.int64]
    """True class of each test image, ``[N]``."""
    classes: list[str]
    """Names of the classes."""

    def confusion(self) -> NDArray[np.int64]:
        """Return the number of images by true (row) and predicted (column) class."""
        counts = np.zeros((len(self.classes), len(self.classes)), dtype=np.int64)
        np.add.at(counts, (self.labels, self.predicted), 1)
        return counts

    def __repr__(self) -> str:
        low, high = (100 * value for value in (self.low, self.high))
        return f"Classification(accuracy {100 * self.accuracy:.1f} %, {low:.1f} % to {high:.1f} %)"


def knn(
    encoder: Encoder,
    data: Dataset | PathLike,
    k: int = 20,
    temperature: float = 0.07,
    limit: int = 0,
    seed: int = 0,
) -> Classification:
    """Classify the test images by their nearest training images (Wu et al. 2018).

    Parameters
    ----------
    data
        Labeled images. Without a test split, one image in five is used for testing.
    k
        Number of neighbors that vote.
    temperature
        Temperature of the votes.
    limit
        Maximum number of training images (stratified sample; 0: all).
    seed
        Random seed of the confidence interval.
    """
    dataset = as_dataset(data, encoder._native)
    return _result(_byol.knn(encoder._native, dataset._native, k, temperature, limit, seed), dataset)


def linear(
    encoder: Encoder, data: Dataset | PathLike, limit: int = 0, seed: int = 0
) -> Classification:
    """Fit a logistic regression to the features, as ``byol eval linear --fast``.

    The L2 strength is selected on held-out training images.

    Parameters
    ----------
    data, limit
        As for `knn`.
    seed
        Random seed of the held-out images and of the confidence interval.
    """
    dataset = as_dataset(data, encoder._native)
    return _result(_byol.linear(encoder._native, dataset._native, limit, seed), dataset)


def label_free(
    encoder: Encoder,
    data: Dataset | PathLike,
    split: Split | None = None,
    limit: int = 512,
    seed: int = 0,
) -> dict[str, float]:
    """Compute metrics that need no labels, for comparison with those of ``encoder.random()``.

    The views are those of the encoder's run, or the paper's for an encoder without a run.

    Parameters
    ----------
    split
        Default: ``test`` if there is one, else ``train``.
    limit
        Maximum number of images, at least 16 (0: all).

    Returns
    -------
    The keys of ``label_free`` in ``metrics.jsonl``: ``retrieval`` and ``consistency`` (fractions),
    ``lidar``, ``rankme``, ``alpha_req``, ``alignment``, ``uniformity``, ``cosine`` and others.
    """
    dataset = as_dataset(data, encoder._native)
    split = split or ("test" if "test" in dataset.splits else "train")
    metrics: dict[str, float] = json.loads(_byol.label_free(encoder._native, dataset._native, split, limit, seed))
    return metrics


def _result(native: tuple[tuple[float, float, float], list[int], list[int]], data: Dataset) -> Classification:
    (accuracy, low, high), predicted, labels = native
    return Classification(accuracy, low, high, np.array(predicted, dtype=np.int64), np.array(labels, dtype=np.int64), data.classes)
