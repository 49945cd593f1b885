"""Native half of the package."""

from collections.abc import Callable, Sequence
from os import PathLike

import numpy as np
from numpy.typing import NDArray

__version__: str

class ByolError(Exception):
    """Base class of all errors of byol."""

class DataError(ByolError):
    """Images that cannot be read or used."""

class EncoderError(ByolError):
    """A file that is not a usable encoder."""

class RecipeError(ByolError):
    """An invalid recipe or setting."""

class RunError(ByolError):
    """A run that cannot be started, resumed or finished."""

_Path = str | PathLike[str]
_Item = _Path | NDArray[np.uint8] | NDArray[np.uint16]
_Read = Callable[[int], _Item]
_Estimate = tuple[float, float, float]
_Classified = tuple[_Estimate, list[int], list[int]]

class Dataset:
    @staticmethod
    def open(
        path: _Path, column: str | None, encoder: Encoder | None, channels: str | None
    ) -> Dataset: ...
    @staticmethod
    def from_items(
        train: Sequence[_Item],
        labels: Sequence[int] | None,
        test: Sequence[_Item],
        test_labels: Sequence[int] | None,
    ) -> Dataset: ...
    @staticmethod
    def from_function(
        train: tuple[_Read, int],
        labels: Sequence[int] | None,
        test: tuple[_Read, int] | None,
        test_labels: Sequence[int] | None,
    ) -> Dataset: ...
    @staticmethod
    def synthetic(n: int, n_test: int, seed: int) -> Dataset: ...
    @property
    def classes(self) -> list[str]: ...
    def size(self, split: str) -> int | None: ...
    def labels(self, split: str) -> NDArray[np.int64] | None: ...
    def names(self, split: str) -> list[str]: ...
    def image(self, split: str, i: int) -> NDArray[np.uint8]: ...

class Encoder:
    @staticmethod
    def open(path: _Path, device: str) -> Encoder: ...
    @staticmethod
    def from_bytes(bytes: bytes) -> Encoder: ...
    def random(self, seed: int) -> Encoder: ...
    @property
    def features(self) -> int: ...
    @property
    def spec(self) -> str: ...
    def embed(self, items: Sequence[_Item]) -> NDArray[np.float32]: ...
    def embed_split(
        self, dataset: Dataset, split: str, progress: Callable[[int], object] | None
    ) -> NDArray[np.float32]: ...
    def view(self, item: _Item) -> NDArray[np.float32]: ...
    def to_bytes(self) -> bytes: ...
    def export(self, path: _Path, normalized_input: bool) -> float: ...

class Index:
    def __init__(self, embeddings: NDArray[np.float32]) -> None: ...
    def __len__(self) -> int: ...
    def nearest(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]: ...
    def map(self, method: str) -> NDArray[np.float32]: ...
    def outlier_scores(self, k: int) -> NDArray[np.float64]: ...
    def select(self, n: int) -> NDArray[np.int64]: ...

def main(args: Sequence[str], command: Sequence[str]) -> int: ...
def pretrain(
    dataset: Dataset,
    out: _Path,
    recipe: str,
    augment: str | None,
    epochs: int | None,
    settings: Sequence[str],
    device: str,
    threads: int,
    tensorboard: bool,
    callback: Callable[[str], object] | None,
) -> None: ...
def resume(
    out: _Path,
    dataset: Dataset | None,
    moved: _Path | None,
    epochs: int | None,
    threads: int,
    callback: Callable[[str], object] | None,
) -> None: ...
def plan(folder: _Path) -> str: ...
def verdict(folder: _Path) -> tuple[str, bool] | None: ...
def knn(
    encoder: Encoder, dataset: Dataset, k: int, temperature: float, limit: int, seed: int
) -> _Classified: ...
def linear(encoder: Encoder, dataset: Dataset, limit: int, seed: int) -> _Classified: ...
def label_free(
    encoder: Encoder, dataset: Dataset, split: str, limit: int, seed: int
) -> str: ...
