"""Encoders as PyTorch models. Imported only where they are asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from byol._byol import EncoderError


def _load(model: torch.nn.Module, state: dict[str, NDArray[Any]]) -> torch.nn.Module:
    model.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in state.items()})
    return model.eval()


def _use_cifar_stem(model: Any, state: dict[str, NDArray[Any]]) -> None:
    """Replace the stem by the one for small images: a 3x3 convolution without pooling."""
    channels, inputs = state["conv1.weight"].shape[:2]
    model.conv1 = torch.nn.Conv2d(inputs, channels, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()


def torchvision_model(spec: dict[str, Any], state: dict[str, NDArray[Any]]) -> torch.nn.Module:
    """Build torchvision's ResNet of any width."""
    from torchvision.models import resnet

    norm = partial(torch.nn.BatchNorm2d, eps=spec["eps"])
    blocks = {
        "resnet18": (resnet.BasicBlock, [2, 2, 2, 2]),
        "resnet34": (resnet.BasicBlock, [3, 4, 6, 3]),
        "resnet50": (resnet.Bottleneck, [3, 4, 6, 3]),
        "resnet101": (resnet.Bottleneck, [3, 4, 23, 3]),
        "resnet152": (resnet.Bottleneck, [3, 8, 36, 3]),
        "resnet200": (resnet.Bottleneck, [3, 24, 36, 3]),
    }
    block, depths = blocks[spec["architecture"]]
    model: Any = resnet.ResNet(block, depths, norm_layer=norm)
    channels, inputs = state["conv1.weight"].shape[:2]
    if inputs != 3 or spec["width"] != 1:
        model.conv1 = torch.nn.Conv2d(inputs, channels, 7, 2, 3, bias=False)
    if spec["width"] != 1:
        model.bn1 = norm(channels)
        model.inplanes = channels
        for i, depth in enumerate(depths):
            planes = state[f"layer{i + 1}.0.conv1.weight"].shape[0]
            layer = model._make_layer(block, planes, depth, stride=1 if i == 0 else 2)
            setattr(model, f"layer{i + 1}", layer)
    if spec["stem"] == "cifar":
        _use_cifar_stem(model, state)
    model.fc = torch.nn.Identity()
    return _load(model, state)


def timm_model(spec: dict[str, Any], state: dict[str, NDArray[Any]]) -> torch.nn.Module:
    """Build timm's ResNet."""
    if spec["width"] != 1:
        raise EncoderError(
            f"timm has no {spec['architecture']} of width {spec['width']:g}\nhint: use `to_torchvision`"
        )
    import timm

    model: Any = timm.create_model(spec["architecture"], pretrained=False, num_classes=0, in_chans=spec["channels"])
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = spec["eps"]
    if spec["stem"] == "cifar":
        _use_cifar_stem(model, state)
    return _load(model, state)
