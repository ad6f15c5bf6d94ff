"""Everything about a model that is said on the command line, turned into a model and example inputs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from graphprune.cli.files import check_readable
from graphprune.cli.sources import IMAGE, Source, find
from graphprune.errors import FileError, InputError, nearest
from graphprune.trace.inputs import Inputs

_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
_SHAPE = re.compile(r"\d+(?:[,x]\d+)*")
_BELOW = 2  # integers are drawn from 0 and 1, which every table of embeddings has
_FORM = "Write --input 1,3,224,224, --input int64:1,16, or with the argument's name --input ids:int64:1,16"
_SHOWN = 3  # names that a message lists before it says how many more there are


@dataclass(frozen=True)
class Request:
    """A model as the command line describes it.

    Attributes:
        name: see `sources`.
        inputs: specifications of the example inputs, see `parse_inputs`; none for the default of the model.
        weights: a safetensors file, or None for random weights.
        dtype: of parameters and floating-point inputs, or None for the model's own.
        seed: of random weights and inputs.
    """

    name: str
    inputs: Sequence[str] = ()
    weights: Path | None = None
    dtype: str | None = None
    seed: int = 0

    def load(self) -> Loaded:
        """Returns the model and its example inputs; what can be checked without the model is checked first.

        Raises:
            InputError, FileError: some part of the description is wrong.
        """
        given = parse_inputs(self.inputs, self.seed) if self.inputs else None
        tensors = read_tensors(self.weights) if self.weights else None
        source = find(self.name, self.seed)
        model = source.build()
        inputs = given if given is not None else self._default(source, model)
        if tensors is not None:
            load_weights(model, tensors, str(self.weights))
        return Loaded(self, source, model, inputs).to(self.dtype)

    def _default(self, source: Source, model: nn.Module) -> Inputs:
        """Returns one image of the usual size where the model is one of a library of image models."""
        if not source.image:
            raise InputError(f"there are no example inputs to run {self.name} on", f"Pass them: {_FORM[0].lower()}{_FORM[1:]}")
        own = getattr(model, "default_cfg", None)  # where timm keeps the size that a model was made for
        shape = own.get("input_size", IMAGE) if isinstance(own, dict) else IMAGE
        return parse_inputs([",".join(str(size) for size in (1, *shape))], self.seed)


@dataclass(frozen=True, eq=False)
class Loaded:
    """A model, ready to be run.

    Attributes:
        request: what was asked for.
        source: builds the model anew.
        model: with weights and type as asked for.
        inputs: example inputs, in the model's type.
    """

    request: Request
    source: Source
    model: nn.Module
    inputs: Inputs

    def pruned(self, path: Path) -> Loaded:
        """Returns the pruned model in a file that `prune` wrote, with inputs of the file's type unless another was asked for.

        Raises:
            FileError, MaskError: the file cannot be read, or was made of another model.
        """
        from graphprune.recipes.replay import load

        small = load(self.source.build(), path, self.inputs)
        pruned = Loaded(replace(self.request, weights=path), self.source, small, self.inputs)
        return pruned.to(self.request.dtype or pruned.dtype)

    def to(self, dtype: str | None) -> Loaded:
        """Returns the same with model and inputs converted, which changes this model; None leaves both as they are."""
        if dtype is None:
            return self
        kind: torch.dtype = getattr(torch, dtype)
        return Loaded(self.request, self.source, self.model.to(kind), self.inputs.to(kind))

    @property
    def dtype(self) -> str | None:
        """Name of the type of the first floating-point parameter."""
        kinds = (parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        return next((str(kind).removeprefix("torch.") for kind in kinds), None)

    def facts(self) -> dict[str, Any]:
        """Returns what the model is, for JSON."""
        return {
            "model": self.request.name,
            "class": type(self.model).__name__,
            "inputs": str(self.inputs),
            "weights": str(self.request.weights) if self.request.weights else None,
            "seed": self.request.seed,
            "dtype": self.dtype,
        }

    def title(self) -> str:
        """Returns what the model is, in one line."""
        weights = f"weights of {self.request.weights}" if self.request.weights else f"its initial weights, seed {self.request.seed}"
        return f"{self.request.name} ({type(self.model).__name__}), {weights}, inputs ({self.inputs})"


def parse_inputs(specifications: Sequence[str], seed: int) -> Inputs:
    """Returns random example inputs.

    A specification is ``[NAME:][TYPE:]SHAPE[:BELOW]``: ``1,3,224,224`` is a positional argument of normally distributed numbers,
    ``int64:1,16`` one of integers, ``ids:int64:1,16:30000`` the keyword argument `ids` with integers from 0 to 29999. Without BELOW,
    integers are 0 or 1.

    Raises:
        InputError: a specification has another form, or names an argument twice.

    >>> print(parse_inputs(["2,3,8,8", "ids:int64:2,16:100"], seed=0))
    [2, 3, 8, 8] float32, ids=[2, 16] int64
    """
    generator = torch.Generator().manual_seed(seed)
    args: list[Tensor] = []
    kwargs: dict[str, Tensor] = {}
    for text in specifications:
        name, tensor = _parse_input(text, generator)
        if name in kwargs:
            raise InputError(f"--input names {name!r} twice", _FORM)
        if name:
            kwargs[name] = tensor
        else:
            args.append(tensor)
    return Inputs(tuple(args), kwargs)


def _parse_input(text: str, generator: torch.Generator) -> tuple[str, Tensor]:
    """Returns the name of the argument, "" for a positional one, and its value."""
    fields = [field.strip() for field in text.replace(" ", "").split(":")]
    below = int(fields.pop()) if len(fields) > 1 and fields[-1].isdecimal() and _SHAPE.fullmatch(fields[-2]) else None
    shape_text = fields.pop()
    if not _SHAPE.fullmatch(shape_text):
        raise InputError(f"--input {text!r} has no shape", _FORM)
    shape = [int(size) for size in re.split("[,x]", shape_text)]
    dtype = fields.pop() if fields and (len(fields) > 1 or fields[-1] in _DTYPES) else "float32"
    name = fields.pop() if fields else ""
    if dtype not in _DTYPES:
        hint = nearest(dtype, _DTYPES)
        what = f"--input {text!r} asks for the type {dtype!r}, which there is not{f' ({hint})' if hint else ''}"
        raise InputError(what, f"Use one of {', '.join(_DTYPES)}")
    if fields or (name and not name.isidentifier()):
        raise InputError(f"--input {text!r} is no name, type and shape", _FORM)
    if min(shape) < 1:
        raise InputError(f"--input {text!r} has a size of 0", "Give sizes of at least 1")
    kind: torch.dtype = getattr(torch, dtype)
    if kind.is_floating_point:
        if below is not None:
            raise InputError(f"--input {text!r} gives an upper bound for {dtype}", "Give one for integers only, as in int64:1,16:30000")
        return name, torch.randn(shape, generator=generator).to(kind)
    largest = 2 if kind is torch.bool else torch.iinfo(kind).max
    if below is not None and not 1 <= below <= largest:
        raise InputError(f"--input {text!r} asks for {dtype} below {below}", f"Give a bound from 1 to {largest}")
    return name, torch.randint(below or _BELOW, shape, generator=generator).to(kind)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors in a safetensors file.

    Raises:
        FileError: it cannot be read, or is none.
    """
    check_readable(path, "the weights")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        what = f"{str(path)!r} is no safetensors file: {str(error).rstrip('.')}"
        raise FileError(what, "Write one with safetensors.torch.save_file(model.state_dict(), path)") from error


def load_weights(model: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Copies tensors into a model that has exactly these names and shapes; of tied parameters one name is enough.

    Args:
        model: changed only when everything fits.
        tensors: by the names of the state dict.
        where: the file, for the message.

    Raises:
        InputError: names are missing, unexpected, or have other shapes.
    """
    state = model.state_dict(keep_vars=True)
    present = {id(state[name]) for name in tensors if name in state}
    missing = [name for name, tensor in state.items() if name not in tensors and id(tensor) not in present]
    unexpected = [name for name in tensors if name not in state]
    shapes = [
        f"{name} {list(tensor.shape)} for {list(state[name].shape)}"
        for name, tensor in tensors.items()
        if name in state and tensor.shape != state[name].shape
    ]
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
    if any(wrong.values()):
        faults = "; ".join(f"{len(names)} {fault} ({_listed(names)})" for fault, names in wrong.items() if names)
        raise InputError(f"the weights in {where!r} do not fit {type(model).__name__}: {faults}", "Pass a state dict of this very model")
    model.load_state_dict(tensors, strict=False)


def _listed(names: Sequence[str]) -> str:
    """Joins the first few names, and says how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
