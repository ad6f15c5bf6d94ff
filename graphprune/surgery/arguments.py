"""Example inputs without their values: a specification of nested shapes, dtypes and literals that JSON can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from graphprune.errors import InputError
from graphprune.trace.inputs import Inputs

_LITERALS = (bool, int, float, str, type(None))
_SEED = 0  # the values matter to nothing but control flow that depends on data


def described(inputs: Inputs) -> dict[str, Any]:
    """Returns the specification of a call's arguments."""
    return {"args": [_described(value) for value in inputs.args], "kwargs": {name: _described(v) for name, v in inputs.kwargs.items()}}


def rebuilt(spec: Mapping[str, Any], device: torch.device) -> Inputs:
    """Returns arguments that fit a specification: floating-point tensors random, integers zero, booleans true, literals as they were.

    Raises:
        InputError: an argument was of a type that a specification cannot hold.
    """
    generator = torch.Generator().manual_seed(_SEED)
    args = tuple(_rebuilt(value, device, generator) for value in spec["args"])
    return Inputs(args, {name: _rebuilt(value, device, generator) for name, value in spec["kwargs"].items()})


def _described(value: object) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        return {"tensor": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, _LITERALS):
        return {"literal": value}
    if type(value) in {tuple, list}:
        return {type(value).__name__: [_described(item) for item in value]}  # type: ignore[attr-defined]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: _described(item) for key, item in value.items()}}
    return {"other": type(value).__name__}


def _rebuilt(spec: Mapping[str, Any], device: torch.device, generator: torch.Generator) -> Any:
    if "tensor" in spec:
        return _tensor(tuple(spec["tensor"]), getattr(torch, spec["dtype"]), generator).to(device)
    if "literal" in spec:
        return spec["literal"]
    if "dict" in spec:
        return {key: _rebuilt(item, device, generator) for key, item in spec["dict"].items()}
    for kind in (tuple, list):
        if kind.__name__ in spec:
            return kind(_rebuilt(item, device, generator) for item in spec[kind.__name__])
    what = f"an example input was a {spec.get('other', 'value')}, which a recipe cannot hold"
    raise InputError(what, "Pass example_inputs=, arguments of the same shapes and types as when the model was pruned")


def _tensor(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.ones(shape, dtype=dtype) if dtype == torch.bool else torch.zeros(shape, dtype=dtype)
