"""Pretrain image encoders without labels (Bootstrap Your Own Latent, Grill et al. 2020).

>>> import byol
>>> run = byol.pretrain("photos", epochs=50)          # a folder of images
>>> encoder = run.encoder                             # or: byol.Encoder.open("byol-runs/photos")
>>> features = encoder.embed(["a.jpg", "b.jpg"])      # float32 [2, D]
>>> byol.evaluate.knn(encoder, "labeled").accuracy

The command ``byol`` is part of the package. Everything runs in native code; PyTorch is needed only
by ``Encoder.to_torchvision`` and ``Encoder.to_timm``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from byol import evaluate
    from byol._byol import ByolError, DataError, EncoderError, RecipeError, RunError, __version__
    from byol._data import Dataset
    from byol._encoder import Encoder
    from byol._index import Index
    from byol._train import Run, pretrain, resume

# Imported when they are used, so that the command starts without NumPy.
_MODULES = {
    "_data": ["Dataset"],
    "_encoder": ["Encoder"],
    "_index": ["Index"],
    "_train": ["Run", "pretrain", "resume"],
    "_byol": ["ByolError", "DataError", "EncoderError", "RecipeError", "RunError", "__version__"],
}


def __getattr__(name: str) -> Any:
    if name == "evaluate":
        return import_module("byol.evaluate")
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"byol.{module}"), name)
    raise AttributeError(f"module 'byol' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "ByolError",
    "DataError",
    "Dataset",
    "Encoder",
    "EncoderError",
    "Index",
    "RecipeError",
    "Run",
    "RunError",
    "__version__",
    "evaluate",
    "pretrain",
    "resume",
]
