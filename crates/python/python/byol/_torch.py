"""Encoders as PyTorch models. Imported only where they are asked for."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray


def _load(model: torch.nn.Module, state: dict[str, NDArray[Any]]) -> torch.nn.Module:
    model.load_state_dict({name: torch.from_numpy(np.asarray(value)) for name, value in state.items()})
    return model.eval()


def _use_cifar_stem(model: Any, state: dict[str, NDArray[Any]]) -> None:
    """Replace the stem by the one for small images: a 3x3 convolution without pooling."""
    channels, inputs = state["conv1.weight"].shape[:2]
    model.conv1 = torch.nn.Conv2d(inputs, channels, 3, 1, 1, bias=False)
    model.maxpool = torch.nn.Identity()


_DEPTHS = {
    "resnet18": [2, 2, 2, 2],
    "resnet34": [3, 4, 6, 3],
    "resnet50": [3, 4, 6, 3],
    "resnet101": [3, 4, 23, 3],
    "resnet152": [3, 8, 36, 3],
    "resnet200": [3, 24, 36, 3],
}


def _planes(state: dict[str, NDArray[Any]]) -> list[int]:
    """Return the width of each group, as the constructors count it."""
    return [int(state[f"layer{i}.0.conv1.weight"].shape[0]) for i in range(1, 5)]


def torchvision_model(spec: dict[str, Any], state: dict[str, NDArray[Any]]) -> torch.nn.Module:
    """Build torchvision's ResNet of any width."""
    from torchvision.models import resnet

    norm = partial(torch.nn.BatchNorm2d, eps=spec["eps"])
    depths = _DEPTHS[spec["architecture"]]
    block = resnet.BasicBlock if spec["architecture"] in ("resnet18", "resnet34") else resnet.Bottleneck
    model: Any = resnet.ResNet(block, depths, norm_layer=norm)
    channels, inputs = state["conv1.weight"].shape[:2]
    if inputs != 3 or spec["width"] != 1:
        model.conv1 = torch.nn.Conv2d(inputs, channels, 7, 2, 3, bias=False)
    if spec["width"] != 1:
        model.bn1 = norm(channels)
        model.inplanes = channels
        for i, (depth, planes) in enumerate(zip(depths, _planes(state))):
            layer = model._make_layer(block, planes, depth, stride=1 if i == 0 else 2)
            setattr(model, f"layer{i + 1}", layer)
    if spec["stem"] == "cifar":
        _use_cifar_stem(model, state)
    model.fc = torch.nn.Identity()
    return _load(model, state)


def timm_model(spec: dict[str, Any], state: dict[str, NDArray[Any]]) -> torch.nn.Module:
    """Build timm's ResNet of any width."""
    import timm
    from timm.models import resnet

    model: Any
    if spec["width"] == 1:
        model = timm.create_model(spec["architecture"], pretrained=False, num_classes=0, in_chans=spec["channels"])
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eps = spec["eps"]
        if spec["stem"] == "cifar":
            _use_cifar_stem(model, state)
        return _load(model, state)
    norm = partial(torch.nn.BatchNorm2d, eps=spec["eps"])
    block: Any = resnet.BasicBlock if spec["architecture"] in ("resnet18", "resnet34") else resnet.Bottleneck
    channels, inputs = state["conv1.weight"].shape[:2]
    model = resnet.ResNet(
        block,
        tuple(_DEPTHS[spec["architecture"]]),
        num_classes=0,
        in_chans=inputs,
        channels=tuple(_planes(state)),
        norm_layer=norm,
    )
    # The constructor has a stem of 64 channels.
    model.conv1 = torch.nn.Conv2d(inputs, channels, 7, 2, 3, bias=False)
    model.bn1 = norm(channels)
    model.feature_info[0]["num_chs"] = channels
    first = model.layer1[0]
    kernel = first.conv1.kernel_size[0]
    first.conv1 = torch.nn.Conv2d(channels, first.conv1.out_channels, kernel, 1, kernel // 2, bias=False)
    shortcut = state.get("layer1.0.downsample.0.weight")
    first.downsample = None
    if shortcut is not None:
        width = shortcut.shape[0]
        first.downsample = torch.nn.Sequential(torch.nn.Conv2d(channels, width, 1, bias=False), norm(width))
    if spec["stem"] == "cifar":
        _use_cifar_stem(model, state)
    return _load(model, state)
