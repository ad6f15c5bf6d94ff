"""Arguments and options that several commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer


class Dtype(str, Enum):
    """Floating-point types that a model can be converted to."""

    float32 = "float32"
    float64 = "float64"
    float16 = "float16"
    bfloat16 = "bfloat16"


class Mode(str, Enum):
    """How groups are compared."""

    dependency_aware = "dependency_aware"
    global_ = "global"
    balance = "balance"


Model: TypeAlias = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="torchvision:NAME, timm:NAME, package.module:callable or path/file.py:callable; the callable takes no arguments and returns "
        "an nn.Module (a module instance will do as well).",
    ),
]
Inputs: TypeAlias = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="[NAME:][TYPE:]SHAPE[:BELOW]",
        help="An example input: 1,3,224,224 for an image, int64:1,16 for integers (0 and 1, or below BELOW: int64:1,16:30000), "
        "ids:int64:1,16 for the keyword argument ids. Repeat it for several arguments. Default for torchvision and timm: one image.",
    ),
]
Weights: TypeAlias = Annotated[
    Path | None,
    typer.Option("--weights", metavar="FILE", help="State dict to load, a safetensors file. Default: the weights the model is built with."),
]
DtypeOption: TypeAlias = Annotated[Dtype | None, typer.Option("--dtype", help="Convert parameters and inputs to this type.")]
Seed: TypeAlias = Annotated[int, typer.Option("--seed", min=0, help="Seed of random weights and inputs.")]
Macs: TypeAlias = Annotated[float | None, typer.Option("--macs", help="Share of the MACs to remove, in place of --sparsity.")]
Params: TypeAlias = Annotated[float | None, typer.Option("--params", help="Share of the parameters to remove, in place of --sparsity.")]
Criterion: TypeAlias = Annotated[
    str,
    typer.Option(
        "--criterion",
        help="Which channels are important: l1, l2, fpgm, bn_scale, lamp, random; with --data apoz, mean_activation, wanda; with --data "
        "and --loss taylor, taylor_group, hessian.",
    ),
]
ModeOption: TypeAlias = Annotated[Mode, typer.Option("--mode", help="Every group by itself, or all of them in one ranking.")]
Data: TypeAlias = Annotated[
    str | None, typer.Option("--data", metavar="NAME", help="Batches: package.module:callable or path/file.py:callable (or an iterable).")
]
Loss: TypeAlias = Annotated[
    str | None,
    typer.Option("--loss", metavar="NAME", help="A function of torch.nn.functional, such as cross_entropy, or path/file.py:callable."),
]
