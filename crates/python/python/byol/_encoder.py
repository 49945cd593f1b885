"""Frozen encoders."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Sized
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, Union

import numpy as np
from numpy.typing import NDArray

from byol import _byol
from byol._data import Dataset, ImageLike, PathLike, Split, as_dataset, as_images, as_item

if TYPE_CHECKING:
    import torch

Images = Union[Dataset, ImageLike, Iterable[ImageLike]]
Device = Literal["auto", "cpu", "vulkan", "metal", "wgpu", "cuda", "rocm"]


class Encoder:
    """A trained ResNet that maps images to vectors.

    Examples
    --------
    >>> encoder = byol.Encoder.open("byol-runs/photos")
    >>> encoder.embed("cat.jpg").shape
    (1, 512)
    >>> model = encoder.to_torchvision()
    """

    def __init__(self, native: _byol.Encoder) -> None:
        self._native = native

    @classmethod
    def open(cls, path: PathLike, device: Device = "auto") -> Encoder:
        """Open the encoder of a run folder, or an encoder file (``.safetensors``).

        Raises
        ------
        EncoderError
            If the file is missing, damaged, or not an encoder.
        """
        return cls(_byol.Encoder.open(os.fspath(path), device))

    def random(self, seed: int = 0) -> Encoder:
        """Return the same architecture with random initialization, as a baseline."""
        return Encoder(self._native.random(seed))

    @property
    def features(self) -> int:
        """Dimension D of the embeddings."""
        return self._native.features

    @property
    def spec(self) -> dict[str, Any]:
        """Architecture, width, stem, input size, center crop, normalization and batch-norm epsilon."""
        spec: dict[str, Any] = json.loads(self._native.spec)
        return spec

    def embed(
        self,
        images: Images,
        batch_size: int = 64,
        progress: bool = False,
        split: Split = "train",
    ) -> NDArray[np.float32]:
        """Compute embeddings.

        Parameters
        ----------
        images
            A path, a PIL image, an array ``uint8`` or ``uint16 [H, W, C]``, an iterable of these, an
            array ``[N, H, W, C]``, a folder, or a `Dataset`. For an encoder with a range for each
            channel, arrays hold the values of a file.
        batch_size
            Number of images decoded and embedded at a time. A folder or `Dataset` has batches of its
            own.
        progress
            Show the number of images done on standard error.
        split
            Split of a folder or `Dataset`: ``train`` (everything if there are no splits), ``val`` or
            ``test``.

        Returns
        -------
        ``float32 [N, D]``, one row per image.

        Raises
        ------
        DataError
            If an image cannot be read.
        """
        if batch_size < 1:
            raise ValueError("batch_size must be at least 1")
        if isinstance(images, (str, os.PathLike)) and os.path.isdir(images):
            images = as_dataset(images, self._native)
        if isinstance(images, Dataset):
            show = _progress(progress, images.splits.get(split))
            return self._native.embed_split(images._native, split, show)
        listed = as_images(images)
        show = _progress(progress, len(listed) if isinstance(listed, Sized) else None)
        iterator, blocks, done = iter(listed), [self._native.embed([])], 0
        while block := [as_item(image, self.spec["channels"]) for image in islice(iterator, batch_size)]:
            blocks.append(self._native.embed(block))
            done += len(block)
            if show is not None:
                show(done)
        return np.concatenate(blocks)

    def preprocess(self, image: ImageLike, normalize: bool = True) -> NDArray[np.float32]:
        """Return the evaluation view of an image, exactly as `embed` computes it.

        Parameters
        ----------
        image
            A path, a PIL image, or an array ``uint8`` or ``uint16 [H, W, C]``.
        normalize
            Subtract the mean and divide by the standard deviation, as the models of
            `to_torchvision` and `to_timm` expect. Without it values are from 0 to 1, as exported
            ONNX models expect.

        Returns
        -------
        ``float32 [3, S, S]``
        """
        view = self._native.view(as_item(image, self.spec["channels"]))
        if not normalize:
            return view
        normalization = self.spec["normalization"]
        mean, std = (
            np.array(normalization[key], dtype=np.float32)[:, None, None] for key in ("mean", "std")
        )
        return np.asarray((view - mean) / std, dtype=np.float32)

    def state_dict(self) -> dict[str, NDArray[Any]]:
        """Weights and running statistics by torchvision's parameter names."""
        data = self._native.to_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])
        header.pop("__metadata__", None)
        types = {"F32": np.float32, "I64": np.int64}
        tensors = {}
        for name, entry in header.items():
            first, last = (start + offset for offset in entry["data_offsets"])
            values = np.frombuffer(data[first:last], dtype=types[entry["dtype"]])
            tensors[name] = values.reshape(entry["shape"]).copy()
        return tensors

    def to_torchvision(self) -> torch.nn.Module:
        """Return the encoder as a torchvision ResNet in evaluation mode, without its classifier.

        The model expects normalized images: see `preprocess`. Needs torch and torchvision.
        """
        from byol._torch import torchvision_model

        return torchvision_model(self.spec, self.state_dict())

    def to_timm(self) -> torch.nn.Module:
        """Return the encoder as a timm ResNet in evaluation mode, without its classifier.

        The model expects normalized images: see `preprocess`. Needs torch and timm.
        """
        from byol._torch import timm_model

        return timm_model(self.spec, self.state_dict())

    def export(self, path: PathLike, normalized_input: bool = False) -> float:
        """Write the encoder as ``.onnx`` or ``.safetensors``, replacing an existing file.

        The file is read back and compared with this encoder on eight images before it replaces
        ``path``.

        Parameters
        ----------
        path
            Output file. The extension selects the format.
        normalized_input
            ONNX: expect normalized images instead of values from 0 to 1.

        Returns
        -------
        Largest absolute difference of a feature.
        """
        return self._native.export(os.fspath(path), normalized_input)

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bytes, (self._native.to_bytes(),)

    def __repr__(self) -> str:
        spec = self.spec
        return (
            f"byol.Encoder({spec['architecture']}, width {spec['width']:g}, {spec['size']} px, "
            f"{self.features} features)"
        )


def _from_bytes(data: bytes) -> Encoder:
    """Restore a pickled encoder, on the CPU."""
    return Encoder(_byol.Encoder.from_bytes(data))


def _progress(shown: bool, total: int | None) -> Callable[[int], None] | None:
    """Return a function that shows the number of images done."""
    if not shown:
        return None

    def show(done: int) -> None:
        end = "\n" if done == total else ""
        of = "" if total is None else f"/{total}"
        print(f"\rembedding {done}{of}", end=end, file=sys.stderr, flush=True)

    return show
