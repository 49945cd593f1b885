"""Search, maps and selections of embeddings."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from byol import _byol

Map = Literal["tsne", "pca"]


class Index:
    """Embeddings to search, map and select from.

    Similarity is the cosine of embeddings minus their mean, as in ``byol search``.

    Parameters
    ----------
    embeddings
        ``float32 [N, D]``, such as those of `Encoder.embed`.

    Raises
    ------
    DataError
        If there are no embeddings, or some are NaN or infinite.

    Examples
    --------
    >>> index = byol.Index(encoder.embed("photos"))
    >>> rows, cosines = index.nearest(encoder.embed("cat.jpg"), k=5)
    >>> x, y = index.map().T
    """

    def __init__(self, embeddings: NDArray[Any]) -> None:
        self._native = _byol.Index(_matrix(embeddings))

    def nearest(self, queries: NDArray[Any], k: int = 10) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the nearest rows of each query and their cosine similarities, nearest first.

        Parameters
        ----------
        queries
            ``float32 [M, D]`` or ``[D]``.
        k
            Number of rows per query, at most N.

        Returns
        -------
        ``int64 [M, k]`` and ``float32 [M, k]``
        """
        if k < 1:
            raise ValueError("k must be at least 1")
        return self._native.nearest(_matrix(np.atleast_2d(queries)), k)

    def map(self, method: Map = "tsne") -> NDArray[np.float32]:
        """Return positions in the plane, ``float32 [N, 2]`` in -1..1, with similar images close together."""
        return self._native.map(method)

    def outlier_scores(self, k: int = 10) -> NDArray[np.float64]:
        """Return 1 minus the mean cosine similarity to the `k` nearest rows, ``float64 [N]``."""
        if k < 1:
            raise ValueError("k must be at least 1")
        return self._native.outlier_scores(k)

    def select(self, n: int) -> NDArray[np.int64]:
        """Return `n` diverse rows, each the farthest from those before it (k-center greedy)."""
        if n < 0:
            raise ValueError("n must not be negative")
        return self._native.select(n)

    def __len__(self) -> int:
        """Number of embeddings."""
        return len(self._native)

    def __repr__(self) -> str:
        return f"byol.Index({len(self)} embeddings)"


def _matrix(embeddings: NDArray[Any]) -> NDArray[np.float32]:
    array = np.ascontiguousarray(embeddings, dtype=np.float32)
    if array.ndim != 2:
        raise _byol.DataError(f"embeddings of shape {list(array.shape)}\nhint: pass an array of shape [N, D]")
    return array
