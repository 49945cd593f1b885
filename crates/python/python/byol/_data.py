"""Data sets and images."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, Protocol, Union, cast

import numpy as np
from numpy.typing import NDArray

from byol import _byol

if TYPE_CHECKING:
    from PIL.Image import Image as PilImage

PathLike = Union[str, "os.PathLike[str]"]
Pixels = Union[NDArray[np.uint8], NDArray[np.uint16]]
ImageLike = Union[PathLike, Pixels, "PilImage"]
Split = Literal["train", "val", "test"]


class ImageSequence(Protocol):
    """An object with a length whose items are images, or tuples that begin with one."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Any: ...


def as_item(image: ImageLike, channels: int = 3) -> PathLike | Pixels:
    """Return a path unchanged, and any other image as ``[H, W, C]``.

    Gray is repeated as RGB, unless `channels` is 1.
    """
    if isinstance(image, (str, os.PathLike)):
        return image
    if not isinstance(image, np.ndarray) and hasattr(image, "convert"):  # a PIL image
        return _from_pil(image, channels)
    array: NDArray[Any] = np.asarray(image)
    if array.dtype not in (np.uint8, np.uint16):
        raise _byol.DataError(
            f"an array of {array.dtype} is not an image\n"
            "hint: pass uint8 values from 0 to 255, or uint16 values from 0 to 65535"
        )
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3:
        raise _byol.DataError(
            f"an array of shape {list(array.shape)} is not an image\nhint: pass arrays of shape [H, W, C]"
        )
    if array.shape[2] == 1 and channels != 1:
        array = np.repeat(array, 3, axis=2)
    return cast(Pixels, np.ascontiguousarray(array))


def as_images(images: Any) -> Iterable[ImageLike]:
    """Return one image as a list, and images of any kind as an iterable."""
    if isinstance(images, (str, os.PathLike)) or hasattr(images, "convert"):
        return [images]
    if hasattr(images, "__array__"):  # NumPy, PyTorch, JAX, …
        array = np.asarray(images)
        return [array] if array.ndim <= 3 else list(array)
    return images  # type: ignore[no-any-return]


def _from_pil(image: PilImage, channels: int) -> NDArray[np.uint8]:
    from PIL import ImageOps

    if image.mode[0] in "IF":
        raise _byol.DataError(
            f"a PIL image of mode {image.mode} has no fixed range\nhint: pass its path, or a uint8 array"
        )
    upright = ImageOps.exif_transpose(image)
    array = np.asarray(upright.convert("L" if channels == 1 else "RGB"), dtype=np.uint8)
    return np.ascontiguousarray(array[:, :, None] if channels == 1 else array)


class Dataset:
    """A set of images, with optional labels and splits.

    Examples
    --------
    >>> data = byol.Dataset.open("photos")
    >>> len(data), data.classes
    >>> data = byol.Dataset.from_arrays(images, labels)   # uint8 [N, H, W, 3], int [N]
    """

    def __init__(self, native: _byol.Dataset) -> None:
        self._native = native

    @classmethod
    def open(
        cls,
        path: PathLike,
        column: str | None = None,
        channels: Literal["all", "pages"] | Iterable[int | str] | None = None,
    ) -> Dataset:
        """Open a folder of images, CIFAR or IDX files, or shards, as the command does.

        Images are read when they are needed.

        Parameters
        ----------
        path
            Folder, file, or pattern of shards.
        column
            Image column of Parquet files. Default: ``image``, ``img``, or the only one.
        channels
            ``"all"`` channels of the files; their numbers, from 1; ``"pages"`` of TIFF files; or
            names of the files of an image, such as ``["{id}_B02.tif", "{id}_B03.tif"]``. Default: RGB.

        Raises
        ------
        DataError
            If there are no images.
        """
        if channels is not None and not isinstance(channels, str):
            channels = ",".join(n if isinstance(n, str) else str(operator.index(n)) for n in channels)
        return cls(_byol.Dataset.open(os.fspath(path), column, None, channels))

    @classmethod
    def from_arrays(
        cls,
        images: Iterable[ImageLike],
        labels: Iterable[int] | None = None,
        *,
        test_images: Iterable[ImageLike] | None = None,
        test_labels: Iterable[int] | None = None,
    ) -> Dataset:
        """Read images into memory, at one or two bytes per value.

        Parameters
        ----------
        images
            ``uint8`` or ``uint16 [N, H, W, C]``, or any iterable of arrays ``[H, W, C]`` or ``[H,
            W]`` (gray, repeated as RGB), PIL images, or paths. Sizes may differ. The whole range of
            the type stands for 0 to 1.
        labels
            Class of each image, from 0. Used by evaluations, never by pretraining.
        test_images, test_labels
            A test split for evaluations.

        Raises
        ------
        DataError
            If there are no images, an image cannot be read or is of another kind, or the number of
            labels is not that of the images.
        """
        splits = [_items(images), [] if test_images is None else _items(test_images)]
        classes = [_classes(given) for given in (labels, test_labels)]
        return cls(_byol.Dataset.from_items(splits[0], classes[0], splits[1], classes[1]))

    @classmethod
    def from_sequence(
        cls,
        images: ImageSequence,
        labels: Iterable[int] | None = None,
        *,
        test_images: ImageSequence | None = None,
        test_labels: Iterable[int] | None = None,
    ) -> Dataset:
        """Use images that are read when they are needed.

        Pretraining reads each image once before the first step, and keeps all of them if they fit
        into a quarter of the free memory, at most 8 GiB. Otherwise threads read them ahead of the
        training steps. Several threads call ``images[i]`` at once, so it must be thread-safe.
        Decoding and augmentation do not hold the interpreter lock.

        Parameters
        ----------
        images
            Anything with a length and ``images[i]``, such as a list of paths, an array of an HDF5
            file, or a torchvision data set. An item is a path, a PIL image, an array ``uint8
            [H, W, 3]`` or ``[H, W]``, or a tuple or list that begins with one of these. It must be
            the same at every call.
        labels
            Class of each image, from 0. Used by evaluations, never by pretraining.
        test_images, test_labels
            A test split for evaluations.

        Raises
        ------
        DataError
            If there are no images, or the number of labels is not that of the images. An exception
            that ``images[i]`` raises ends the function that reads the image.

        Examples
        --------
        >>> photos = torchvision.datasets.ImageFolder("photos")
        >>> data = byol.Dataset.from_sequence(photos, photos.targets)
        """
        test = None if test_images is None else _reader(test_images)
        classes = [_classes(given) for given in (labels, test_labels)]
        return cls(_byol.Dataset.from_function(_reader(images), classes[0], test, classes[1]))

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
        """Image ``i`` of a split, decoded, with 8 bits: ``uint8 [H, W, C]``."""
        if i < 0:
            raise IndexError(f"image {i} of a split")
        return self._native.image(split, i)

    def __len__(self) -> int:
        """Number of training images."""
        return self.splits["train"]

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name}: {size}" for name, size in self.splits.items())
        return f"byol.Dataset({sizes}, {len(self.classes)} classes)"


def as_dataset(data: Dataset | PathLike, encoder: _byol.Encoder | None = None) -> Dataset:
    """Open data given by their path, with the levels of the encoder."""
    return data if isinstance(data, Dataset) else Dataset(_byol.Dataset.open(os.fspath(data), None, encoder, None))


def _items(images: Iterable[ImageLike]) -> list[PathLike | Pixels]:
    _refuse_single_image(images)
    return [as_item(image) for image in images]


def _refuse_single_image(images: object) -> None:
    is_one_image = getattr(images, "ndim", 4) <= 3 and getattr(images, "shape", (0,))[-1] == 3
    if is_one_image or isinstance(images, (str, os.PathLike)) or hasattr(images, "convert"):
        raise _byol.DataError("a single image is not a data set\nhint: pass a list of images")


def _reader(images: ImageSequence) -> tuple[Callable[[int], PathLike | Pixels], int]:
    """Return a function of the position, and the number of images."""
    _refuse_single_image(images)
    if not (hasattr(images, "__len__") and hasattr(images, "__getitem__")):
        raise _byol.DataError(
            f"{type(images).__name__} is not a sequence of images\n"
            "hint: pass an object with __len__ and __getitem__, or use Dataset.from_arrays"
        )

    def read(i: int) -> PathLike | Pixels:
        item = images[i]
        if isinstance(item, (tuple, list)):
            item = item[0]
        if isinstance(item, dict):
            raise _byol.DataError(f"image {i}: a dict is not an image\nhint: pass the column of the images")
        try:
            return as_item(item)
        except _byol.DataError as error:
            raise _byol.DataError(f"image {i}: {error}") from None

    return read, len(images)


def _classes(labels: Iterable[int] | None) -> list[int] | None:
    return None if labels is None else [_class(label) for label in labels]


def _class(label: int) -> int:
    number = operator.index(label)
    if number < 0:
        raise _byol.DataError(f"label {number} is negative\nhint: number the classes from 0")
    return number
