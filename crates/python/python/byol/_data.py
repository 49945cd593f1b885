"""Data sets and images."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Union

import numpy as np
from numpy.typing import NDArray

from byol import _byol

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

PathLike = Union[str, "os.PathLike[str]"]
ImageLike = Union[PathLike, NDArray[np.uint8], "PilImage"]
Split = Literal["train", "val", "test"]


def as_item(image: ImageLike) -> PathLike | NDArray[np.uint8]:
    """Return a path unchanged, and any other image as ``uint8 [H, W, 3]``."""
    if isinstance(image, (str, os.PathLike)):
        return image
    if not isinstance(image, np.ndarray) and hasattr(image, "convert"):  # a PIL image
        from PIL import ImageOps

        upright = ImageOps.exif_transpose(image)
        return np.ascontiguousarray(np.asarray(upright.convert("RGB"), dtype=np.uint8))
    array: NDArray[np.uint8] = np.asarray(image)
    if array.dtype != np.uint8:
        raise _byol.DataError(
            f"an array of {array.dtype} is not an image\nhint: pass uint8 values from 0 to 255"
        )
    if array.ndim == 2:
        array = np.repeat(array[:, :, None], 3, axis=2)
    if array.ndim != 3:
        raise _byol.DataError(
            f"an array of shape {list(array.shape)} is not an image\nhint: pass arrays of shape [H, W, 3]"
        )
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return np.ascontiguousarray(array)


class Dataset:
    """Images with splits, and with labels if the data have them.

    Examples
    --------
    >>> data = byol.Dataset.open("photos")
    >>> len(data), data.classes
    >>> data = byol.Dataset.from_arrays(images, labels)   # uint8 [N, H, W, 3], int [N]
    """

    def __init__(self, native: _byol.Dataset) -> None:
        self._native = native

    @classmethod
    def open(cls, path: PathLike) -> Dataset:
        """Open a folder of images, CIFAR or IDX files, or shards, as the command does.

        Images are read when they are needed.

        Raises
        ------
        DataError
            If there are no images.
        """
        return cls(_byol.Dataset.open(os.fspath(path)))

    @classmethod
    def from_arrays(
        cls, images: Iterable[ImageLike], labels: Sequence[int] | NDArray[np.integer] | None = None
    ) -> Dataset:
        """Copy images into memory.

        Parameters
        ----------
        images
            ``uint8 [N, H, W, 3]``, or any iterable of arrays ``uint8 [H, W, 3]`` or ``[H, W]``, PIL
            images, or paths. Sizes may differ.
        labels
            Class of each image, from 0. Used by evaluations, never by pretraining.

        Raises
        ------
        DataError
            If there are no images, or an image is of another kind.
        """
        items = [as_item(image) for image in images]
        arrays = [_read(item) if isinstance(item, (str, os.PathLike)) else item for item in items]
        classes = None if labels is None else [_class(label) for label in labels]
        return cls(_byol.Dataset.from_arrays(arrays, classes))

    @classmethod
    def synthetic(cls, n: int = 2000, n_test: int = 800, seed: int = 0) -> Dataset:
        """Generate 32 px images of six patterns, as ``byol demo`` does, with a test split."""
        if n < 1 or n_test < 0:
            raise _byol.DataError("the number of images must be at least 1")
        return cls(_byol.Dataset.synthetic(n, n_test, seed))

    @property
    def classes(self) -> list[str]:
        """Names of the classes; empty without labels."""
        return self._native.classes

    @property
    def splits(self) -> dict[str, int]:
        """Number of images of each split: ``train``, and ``val`` and ``test`` if there are any."""
        sizes = {split: self._native.size(split) for split in ("train", "val", "test")}
        return {split: size for split, size in sizes.items() if size is not None}

    def labels(self, split: Split = "train") -> NDArray[np.int64] | None:
        """Class of each image of a split, ``int64 [N]``; None without labels."""
        return self._native.labels(split)

    def names(self, split: Split = "train") -> list[str]:
        """Path or name of each image of a split."""
        return self._native.names(split)

    def image(self, i: int, split: Split = "train") -> NDArray[np.uint8]:
        """Image ``i`` of a split, decoded: ``uint8 [H, W, 3]``."""
        return self._native.image(split, i)

    def __len__(self) -> int:
        """Number of training images."""
        return self.splits["train"]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {size}" for name, size in self.splits.items())
        return f"byol.Dataset({sizes}, {len(self.classes)} classes)"


def as_dataset(data: Dataset | PathLike) -> Dataset:
    """Open data given by their path."""
    return data if isinstance(data, Dataset) else Dataset.open(data)


def _read(path: PathLike) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(as_item(image))


def _class(label: int | np.integer) -> int:
    if int(label) < 0:
        raise _byol.DataError(f"label {label} is negative\nhint: number the classes from 0")
    return int(label)
