"""Pretraining."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from byol import _byol
from byol._data import Dataset, PathLike, as_dataset
from byol._encoder import Device, Encoder

Event = dict[str, Any]
Callback = Callable[[Event], object]


class Run:
    """A run folder: plan, metrics and encoder.

    Examples
    --------
    >>> run = byol.Run("byol-runs/photos")
    >>> pandas.DataFrame(run.epochs)[["epoch", "loss", "rankme"]]
    """

    def __init__(self, path: PathLike) -> None:
        """Open a run folder.

        Raises
        ------
        RunError
            If the folder contains no run.
        """
        self.path = Path(path)
        self.plan: dict[str, Any] = json.loads(_byol.plan(os.fspath(path)))

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All records of ``metrics.jsonl``: one per step, epoch and failure."""
        return list(self._records())

    @property
    def steps(self) -> list[dict[str, Any]]:
        """One record per step: loss, eta, tau, images_per_second, seconds."""
        return [record for record in self._records() if record["kind"] == "step"]

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """One record per epoch, from 0 (before the first step): loss, rankme, knn and others."""
        return [record for record in self._records() if record["kind"] == "epoch"]

    @property
    def finished(self) -> bool:
        """Whether all epochs are complete."""
        epochs = self.epochs
        return bool(epochs) and epochs[-1]["epoch"] >= self.plan["recipe"]["train"]["epochs"]

    @property
    def verdict(self) -> str | None:
        """Comparison of the last epoch with the initial weights; None if it was not measured."""
        verdict = _byol.verdict(os.fspath(self.path))
        return None if verdict is None else verdict[0]

    @property
    def encoder(self) -> Encoder:
        """The encoder after the last checkpoint."""
        return Encoder.open(self.path)

    @property
    def best(self) -> Encoder:
        """The encoder of the epoch with the best label-free score, ``best.safetensors``."""
        return Encoder.open(self.path / "best.safetensors")

    def _records(self) -> Iterator[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        if not file.exists():
            return
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                try:
                    yield json.loads(line)
                except json.JSONDecodeError:  # the last line of a running run
                    return

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"byol.Run({str(self.path)!r})"


def pretrain(
    data: Dataset | PathLike,
    out: PathLike | None = None,
    recipe: str | PathLike = "auto",
    *,
    epochs: int | None = None,
    batch: int | None = None,
    augment: str | None = None,
    size: int | None = None,
    encoder: str | None = None,
    width: float | None = None,
    init: PathLike | None = None,
    hidden: int | None = None,
    projection: int | None = None,
    optimizer: str | None = None,
    lr: float | None = None,
    weight_decay: float | None = None,
    trust_coefficient: float | None = None,
    warmup_epochs: int | None = None,
    tau: float | None = None,
    accumulate: int | None = None,
    precision: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
    on_collapse: str | None = None,
    settings: dict[str, Any] | None = None,
    device: Device = "auto",
    threads: int = 0,
    tensorboard: bool = False,
    progress: bool = True,
    callback: Callback | None = None,
) -> Run:
    """Pretrain an encoder with BYOL.

    Ctrl-C stops at the next step with a checkpoint, from which `resume` continues.

    Parameters
    ----------
    data
        A folder of images, CIFAR or IDX files, shards, or a `Dataset`. Labels are used only to
        report kNN accuracy.
    out
        Output folder, which must be empty or absent. Default: ``byol-runs/NAME-OF-DATA``.
    recipe
        ``auto`` (chosen for the data and the machine), a built-in recipe (``byol recipe list``), a
        TOML file, or a run.
    epochs
        Number of epochs. The warm-up of a recipe shrinks to a tenth of them if it would take
        longer.
    batch, accumulate
        Images per step, and the number of micro-batches that they are processed in.
    augment, size
        Augmentations for a kind of images, ``overhead`` or ``microscopy``; side of the views in pixels.
    encoder, width, init
        Architecture, ``resnet18`` to ``resnet200``; factor of its channels; file or run of the weights
        to start from.
    hidden, projection
        Units of the hidden layer and of the output of the projection and prediction heads.
    optimizer, lr, weight_decay, trust_coefficient, warmup_epochs
        ``lars``, ``sgd`` or ``adamw``; learning rate per 256 images.
    tau
        Target decay at the start, from 0 to 1.
    precision
        ``f32``, ``bf16`` or ``f16``.
    limit
        Number of training images to use, sampled evenly.
    seed
        Seed of initialization, order and views.
    on_collapse
        ``stop``, ``rollback`` or ``continue``.
    settings
        Any recipe keys, as in ``{"views.first.area": [0.3, 1.0]}``.
    device
        ``auto``, ``cpu``, ``vulkan``, ``metal``, ``wgpu``, ``cuda`` or ``rocm``.
    threads
        Threads that make views. 0: number of cores.
    tensorboard
        Also write TensorBoard event files.
    progress
        Print a line per epoch to standard error.
    callback
        Called with a dict per event: ``kind`` is ``step``, ``epoch``, ``checkpoint``, ``skipped``
        (unreadable images of shards) or ``rollback``, with the loss, metrics and times that
        `Run.metrics` has. An exception stops the run with a checkpoint.

    Returns
    -------
    Run

    Raises
    ------
    RecipeError, DataError, RunError
    """
    named = {
        "train.batch": batch,
        "views.size": size,
        "encoder.architecture": encoder,
        "encoder.width": width,
        "encoder.from": init,
        "heads.hidden": hidden,
        "heads.projection": projection,
        "optimizer.kind": optimizer,
        "optimizer.lr": lr,
        "optimizer.weight_decay": weight_decay,
        "optimizer.trust_coefficient": trust_coefficient,
        "train.warmup_epochs": warmup_epochs,
        "target.tau": tau,
        "train.accumulate": accumulate,
        "train.precision": precision,
        "train.limit": limit,
        "seed": seed,
        "health.on_collapse": on_collapse,
    }
    named = {key: value for key, value in named.items() if value is not None}
    keys = [f"{key}={_toml(value)}" for key, value in {**named, **(settings or {})}.items()]
    folder = Path(out) if out is not None else _free_folder(data)
    recipe, call = os.fspath(recipe), _native(callback, progress)
    epochs, threads = _count("epochs", epochs), _count("threads", threads) or 0
    dataset = as_dataset(data)._native
    _byol.pretrain(dataset, folder, recipe, augment, epochs, keys, device, threads, tensorboard, call)
    skipped = folder / "skipped.txt"
    if skipped.exists():
        warnings.warn(f"some files were not used; {skipped} lists them", stacklevel=2)
    return _finished(folder, progress)


def resume(
    run: Run | PathLike,
    data: Dataset | PathLike | None = None,
    *,
    epochs: int | None = None,
    threads: int = 0,
    progress: bool = True,
    callback: Callback | None = None,
) -> Run:
    """Resume a run from its latest checkpoint, bit-identical to an uninterrupted run.

    Parameters
    ----------
    run
        Run folder.
    data
        The images of the run, if they are not where they were, or were given as arrays or as a
        sequence.
    epochs
        New number of epochs in total. The schedules of learning rate and tau continue as in a run of
        this length.
    threads, progress, callback
        As for `pretrain`.

    Raises
    ------
    RunError
        If the run cannot be read, or the data have changed. Of a sequence only the length is
        compared.
    """
    folder = Path(run)
    dataset = data._native if isinstance(data, Dataset) else None
    moved = None if data is None or isinstance(data, Dataset) else os.fspath(data)
    call = _native(callback, progress)
    epochs, threads = _count("epochs", epochs), _count("threads", threads) or 0
    _byol.resume(folder, dataset, moved, epochs, threads, call)
    return _finished(folder, progress)


def _finished(folder: Path, progress: bool) -> Run:
    """Return a finished run. A run that learned nothing is a warning, as in the command."""
    text, is_worse = _byol.verdict(os.fspath(folder)) or ("", False)
    if is_worse:
        warnings.warn(text, stacklevel=3)
    elif text and progress:
        print(text, file=sys.stderr, flush=True)
    return Run(folder)


def _native(callback: Callback | None, progress: bool) -> Callable[[str], object]:
    """Return a function of events as JSON."""

    def call(event: str) -> None:
        parsed: Event = json.loads(event)
        if progress and parsed["kind"] == "epoch":
            print(_line(parsed), file=sys.stderr, flush=True)
        if callback is not None:
            callback(parsed)

    return call


def _line(event: Event) -> str:
    """Format an epoch as one line."""
    parts = [f"epoch {event['epoch']}"]
    if event["loss"] is not None:
        parts.append(f"loss {event['loss']:.4f}")
    if event.get("knn") is not None:
        parts.append(f"kNN {100 * event['knn']:.1f} %")
    if "rankme" in event:
        parts.append(f"RankMe {event['rankme']:.1f}")
    if event["collapse"] is not None:
        parts.append(f"failed: {event['collapse']}")
    return "  ".join(parts)


def _count(name: str, value: int | None) -> int | None:
    if value is not None and value < 0:
        raise ValueError(f"{name} must not be negative")
    return value


def _free_folder(data: Dataset | PathLike) -> Path:
    """Return the first of ``NAME``, ``NAME-2``, … that does not exist."""
    name = "run" if isinstance(data, Dataset) else Path(data).resolve().name or "run"
    folder, n = Path("byol-runs") / name, 2
    while folder.exists():
        folder, n = Path("byol-runs") / f"{name}-{n}", n + 1
    return folder


def _toml(value: Any) -> str:
    """Format a value as TOML."""
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.tolist()
    if value is None:
        raise TypeError("a setting cannot be None")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, (str, os.PathLike)):
        return json.dumps(os.fspath(value), ensure_ascii=False)
    return repr(value)
