"""Latency as what a search is to make small: a model is exported to ONNX and timed in ONNX Runtime."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from graphprune.export import export_onnx
from graphprune.latency import measure_latency


@dataclass(frozen=True, eq=False)
class OnnxLatency:
    """Times models in ONNX Runtime; can be sent to other processes where the example inputs can.

    Processes that run at the same time slow each other down: search with one process, or count MACs, where milliseconds must compare.

    Attributes:
        example_inputs: what the model is exported with, see `graphprune.export_onnx`.
        batch: size of a batch.
        threads: threads within an operator.
        rounds: how often the model is run and timed.
    """

    example_inputs: Any
    batch: int = 1
    threads: int = 1
    rounds: int = 30

    def __call__(self, model: nn.Module) -> float:
        """Returns the median time of one run, in milliseconds.

        Raises:
            InputError, ExportError, ConfigError: see `graphprune.export_onnx` and `graphprune.measure_latency`.
        """
        with tempfile.TemporaryDirectory(prefix="graphprune-latency-") as folder:
            path = Path(folder) / "model.onnx"
            export_onnx(model, self.example_inputs, path, check=False)
            report = measure_latency({"model": path}, batch=self.batch, threads=self.threads, rounds=self.rounds)
        return report["model"].median_ms
