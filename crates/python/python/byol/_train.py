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

# Arguments of `pretrain` that are recipe keys, named as the flags of the command.
_KEYS = {
    "accumulate": "train.accumulate",
    "batch": "train.batch",
    "encoder": "encoder.architecture",
    "hidden": "heads.hidden",
    "init": "encoder.from",
    "limit": "train.limit",
    "lr": "optimizer.lr",
    "on_collapse": "health.on_collapse",
    "optimizer": "optimizer.kind",
    "precision": "train.precision",
    "projection": "heads.projection",
    "seed": "seed",
    "size": "views.size",
    "tau": "target.tau",
    "trust_coefficient": "optimizer.trust_coefficient",
    "warmup_epochs": "train.warmup_epochs",
    "weight_decay": "optimizer.weight_decay",
    "width": "encoder.width",
}


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
    settings: dict[str, Any] | None = None,
    device: Device = "auto",
    threads: int = 0,
    tensorboard: bool = False,
    progress: bool = True,
    callback: Callback | None = None,
    **overrides: Any,
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
    settings
        Recipe keys, as in ``{"views.first.area": [0.3, 1.0]}``.
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
    **overrides
        Common recipe keys by the names of the command's flags: ``accumulate``, ``batch``,
        ``encoder``, ``hidden``, ``init``, ``limit``, ``lr``, ``on_collapse``, ``optimizer``,
        ``precision``, ``projection``, ``seed``, ``size``, ``tau``, ``trust_coefficient``,
        ``warmup_epochs``, ``weight_decay``, ``width``.

    Returns
    -------
    Run

    Raises
    ------
    RecipeError, DataError, RunError
    """
    unknown = sorted(set(overrides) - set(_KEYS))
    if unknown:
        raise TypeError(f"pretrain() got an unexpected keyword argument {unknown[0]!r}")
    named = {_KEYS[name]: value for name, value in overrides.items() if value is not None}
    keys = [f"{key}={_toml(value)}" for key, value in {**named, **(settings or {})}.items()]
    folder = Path(out) if out is not None else _free_folder(data)
    recipe, call = os.fspath(recipe), _native(callback, progress)
    epochs, threads = _count("epochs", epochs), _count("threads", threads) or 0
    dataset = as_dataset(data)._native
    _byol.pretrain(dataset, folder, recipe, epochs, keys, device, threads, tensorboard, call)
    skipped = folder / "skipped.txt"
    if skipped.exists():
        warnings.warn(f"some files were not used; {skipped} lists them", stacklevel=2)
    return Run(folder)


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
        The images of the run, if they are not where they were, or were given as arrays.
    epochs
        New number of epochs in total. The schedules of learning rate and tau continue as in a run of
        this length.
    threads, progress, callback
        As for `pretrain`.

    Raises
    ------
    RunError
        If the data have changed, or the run cannot be read.
    """
    folder = Path(run)
    dataset = data._native if isinstance(data, Dataset) else None
    moved = None if data is None or isinstance(data, Dataset) else os.fspath(data)
    call = _native(callback, progress)
    epochs, threads = _count("epochs", epochs), _count("threads", threads) or 0
    _byol.resume(folder, dataset, moved, epochs, threads, call)
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
