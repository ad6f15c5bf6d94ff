"""The smallest network, by parameters, of every module of timm that registers networks.

Which these are lies in `zoo_timm.json`; `tools/zoo.py --refresh-timm` finds it anew.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

import torch

from graphprune.runs.atomic import atomic
from tests.support.torchvision_shim import import_torchvision
from tests.support.zoo_sources import Blueprint, images

SMALLEST: Final = Path(__file__).with_suffix(".json")
# Tried in this order where a network does not say that its size is fixed: with a stride of 32, the last map is at least 3 x 3.
_SIZES: Final = (96, 128, 160, 192, 224, 256, 384)


@cache
def library() -> Any:
    """Returns the module timm; no weights are ever fetched."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import_torchvision()
    return importlib.import_module("timm")


def names() -> tuple[str, ...]:
    """Returns the names in `SMALLEST`."""
    modules: dict[str, dict[str, Any]] = json.loads(SMALLEST.read_text(encoding="utf-8"))["modules"]
    return tuple(entry["name"] for _, entry in sorted(modules.items()))


def blueprint(name: str, size: int | None) -> Blueprint:
    """Returns how to build a network, see `zoo_sources.blueprint`."""
    timm = library()
    if not timm.is_model(name):
        message = f"Unknown model: timm registers none that is called {name!r}"
        raise ValueError(message)
    settings = timm.models.get_pretrained_cfg(name)
    channels, height, width = settings.input_size
    own = (channels, size or height, size or width)
    smaller = [] if size or settings.fixed_input_size else [(channels, pixels, pixels) for pixels in _SIZES if pixels < height]
    return Blueprint(partial(timm.create_model, name, pretrained=False), (*smaller, own), images)


def refresh(say: Callable[[str], None]) -> None:
    """Finds the smallest network of every module, by building all of them without weights (minutes), and rewrites `SMALLEST`.

    Args:
        say: is given a line for each module, and for each network that cannot be built.
    """
    timm = library()
    modules: dict[str, dict[str, Any]] = {}
    for module in timm.list_modules():
        sizes = {name: count for name in timm.list_models(module=module) if (count := _parameters(timm, name, say))}
        if sizes:
            name = min(sizes, key=lambda known: (sizes[known], known))
            modules[module] = {"name": name, "params": sizes[name], "of": len(sizes)}
            say(f"{module}: {name}, {sizes[name]:,} parameters, the smallest of {len(sizes)}")
    save(str(timm.__version__), modules)


def save(version: str, modules: dict[str, dict[str, Any]]) -> None:
    """Writes `SMALLEST`, a line for each module."""
    lines = ",\n".join(f"    {json.dumps(module)}: {json.dumps(entry)}" for module, entry in sorted(modules.items()))
    with atomic(SMALLEST) as temporary:
        temporary.write_text(f'{{\n  "timm": {json.dumps(version)},\n  "modules": {{\n{lines}\n  }}\n}}\n', encoding="utf-8")


def _parameters(timm: Any, name: str, say: Callable[[str], None]) -> int:
    """Returns how many parameters a network has; 0 where it cannot be built, which is said."""

    def built(device: str) -> int:
        with torch.device(device):
            return sum(parameter.numel() for parameter in timm.create_model(name, pretrained=False).parameters())

    with suppress(Exception):  # some compute with values while they are built
        return built("meta")
    try:
        return built("cpu")
    except Exception as error:  # noqa: BLE001 (whatever a network raises while it is built)
        say(f"{name} cannot be built: {error}")
        return 0
