"""The command line: thin commands over the public calls, tables for people, JSON for machines, errors in one line.

    graphprune demo                                            train, prune and time a small network on real data
    graphprune inspect MODEL                                   what can go, and what cannot and why
    graphprune prune MODEL --sparsity 0.5 --out DIR            a smaller model, as tensors and as ONNX, and a report
    graphprune sensitivity MODEL --data NAME --out DIR         what each group can lose by itself, and the score then
    graphprune search MODEL --data NAME --macs 0.5 --out DIR   the best share of every group under a budget, found by trying
    graphprune verify MODEL --pruned DIR/pruned.safetensors    check it against the masked model once more
    graphprune export MODEL --out FILE.onnx
    graphprune bench A.onnx B.onnx

A command is one function in this folder, registered on `app`. Whatever is heavy (torch, onnxruntime) is imported by the command that
needs it.
"""

from __future__ import annotations

from graphprune.cli import demonstration, exporting, inspecting, pruning, searching, sensitivity, verifying
from graphprune.cli.app import app

app.command("demo")(demonstration.demo)
app.command("inspect")(inspecting.inspect)
app.command("prune")(pruning.prune)
app.command("sensitivity")(sensitivity.sensitivity)
app.command("search")(searching.search)
app.command("verify")(verifying.verify)
app.command("export")(exporting.export)
app.command("bench")(exporting.bench)


def main() -> None:
    """Runs the command line on the arguments of the process, and exits: 0 fine, 1 a check failed or a defect, 2 a clear "no"."""
    app()
