"""``graphprune export`` and ``graphprune bench``: ONNX files, and how fast they run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graphprune.cli import arguments, files
from graphprune.cli.screen import Screen
from graphprune.errors import ConfigError


def export(
    ctx: typer.Context,
    model: arguments.Model,
    *,
    out: Annotated[Path, typer.Option("--out", metavar="FILE", help="The ONNX file to write, in a folder that exists.")],
    pruned: Annotated[
        Path | None, typer.Option("--pruned", metavar="FILE", help="Export the pruned model in this file, written by prune, instead.")
    ] = None,
    inputs: arguments.Inputs = None,
    weights: arguments.Weights = None,
    dtype: arguments.DtypeOption = None,
    seed: arguments.Seed = 0,
    fixed_batch: Annotated[bool, typer.Option("--fixed-batch", help="Fix the batch size at that of the inputs.")] = False,
    opset: Annotated[int | None, typer.Option("--opset", help="Version of the ONNX operator set. Default: the exporter's choice.")] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", help="Largest relative error of ONNX Runtime's outputs.")] = 1e-3,
) -> None:
    """Write a model as an ONNX file, checked against ONNX Runtime."""
    from graphprune.cli.loading import Request
    from graphprune.export import export_onnx

    screen: Screen = ctx.obj
    files.check_target(out)
    if pruned is not None:
        if weights is not None:
            raise ConfigError("--pruned and --weights are given, and both hold the weights to export", "Keep one of them")
        files.check_readable(pruned, "the pruned model")
    with screen.busy(f"building {model}"):
        loaded = Request(model, inputs or (), weights, dtype and dtype.value, seed).load()
        if pruned is not None:
            loaded = loaded.pruned(pruned)
    with screen.busy("exporting and checking"):
        report = export_onnx(loaded.model, loaded.inputs, out, dynamic_batch=not fixed_batch, opset=opset, tolerance=tolerance)
    error = "not checked" if report.error is None else f"ONNX Runtime agrees within {report.error:.1e}"
    batch = "any batch size" if report.dynamic_batch else "a fixed batch size"
    summary = f"Wrote {out}: {report.nodes:,} operators, {report.bytes:,} bytes, opset {report.opset}, {batch}, {error}"
    screen.result({**loaded.facts(), "pruned": pruned, **report.to_dict()}, loaded.title(), summary, *report.notes)


def bench(
    ctx: typer.Context,
    models: Annotated[list[Path], typer.Argument(metavar="A.onnx B.onnx ...", help="ONNX files; the others are compared with the first.")],
    *,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads that ONNX Runtime may use within an operator.")] = 1,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Samples per run, where the file takes any number.")] = 1,
    optimization: Annotated[
        str, typer.Option("--optimization", help="Level of ONNX Runtime's graph optimisation: none, basic, extended or all.")
    ] = "all",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds; each runs every model once.")] = 50,
    seconds: Annotated[float, typer.Option("--seconds", help="Stop when this time is up.")] = 20.0,
    seed: arguments.Seed = 0,
) -> None:
    """Time ONNX files against each other in ONNX Runtime, interleaved in one process."""
    from graphprune.latency import measure_latency

    screen: Screen = ctx.obj
    paths = {name: files.check_readable(path, "a model") for name, path in zip(distinct_names(models), models, strict=True)}
    with screen.busy(f"timing {len(paths)} models"):
        report = measure_latency(paths, batch=batch, threads=threads, rounds=rounds, seconds=seconds, optimization=optimization, seed=seed)
    screen.result(report.to_dict(), report)


def distinct_names(paths: list[Path]) -> list[str]:
    """Returns a name for each file: its stem, its path where several have the stem, with a number where a file is given twice.

    >>> distinct_names([Path("a/dense.onnx"), Path("b/dense.onnx"), Path("small.onnx"), Path("small.onnx")])
    ['a/dense.onnx', 'b/dense.onnx', 'small.onnx', 'small.onnx (2)']
    """
    stems = [path.stem for path in paths]
    names: list[str] = []
    for path in paths:
        name = path.stem if stems.count(path.stem) == 1 else path.as_posix()
        times = sum(1 for other in names if other == name or other.startswith(f"{name} ("))
        names.append(f"{name} ({times + 1})" if times else name)
    return names
