"""Measures the dependency graph of a 70-billion-parameter language model whose weights do not exist (PyTorch's meta device).

    python tools/giant.py                                  # 80 layers, 70.6 billion parameters
    python tools/giant.py --layers 8 --vocabulary 32000
    python tools/giant.py --json giant.json

The model is built by transformers from the published configuration: 8,192 channels, 64 heads that share 8 keys, 28,672 channels within
each block. The peak of memory is that of this whole process, with torch and transformers.

Exit code: 0; 1 where the graph took longer or more memory than allowed; 2 where the model could not be built.
"""

# ruff: noqa: PLC0415 - before the environment is entered there is nothing but the standard library

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _environment import ROOT, UNUSABLE, enter

if TYPE_CHECKING:
    from torch import nn

sys.path.insert(0, str(ROOT))

SIZES: dict[str, Any] = {"hidden_size": 8192, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28672}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="giant.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=80, help="number of layers (default 80)")
    parser.add_argument("--vocabulary", type=int, default=128256, help="number of tokens known (default 128256)")
    parser.add_argument("--tokens", type=int, default=16, help="length of the example sequence (default 16)")
    parser.add_argument("--seconds", type=float, default=120.0, help="longest time allowed (default 120)")
    parser.add_argument("--gib", type=float, default=4.0, help="most memory allowed, in GiB (default 4)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the measurements there")
    options = parser.parse_args(arguments)
    for name in ("layers", "vocabulary", "tokens"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return options


def build(layers: int, vocabulary: int) -> nn.Module:
    """Returns the model, on the meta device."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from tests.support.torchvision_shim import import_torchvision

    import_torchvision()
    import transformers

    config = transformers.LlamaConfig(**SIZES, num_hidden_layers=layers, vocab_size=vocabulary, use_cache=False)
    with torch.device("meta"):
        model: nn.Module = transformers.LlamaForCausalLM(config)
    return model.eval()


def measure(model: nn.Module, tokens: int) -> dict[str, Any]:
    """Returns what tracing took, and what it found."""
    import torch

    import graphprune as gp
    from tests.support.memory import peak_bytes

    ids = torch.zeros(1, tokens, dtype=torch.int64)
    start = time.perf_counter()
    graph = gp.trace(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    seconds = time.perf_counter() - start
    held = peak_bytes()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": seconds,
        "seconds_recording": graph.seconds["trace"],
        "seconds_grouping": graph.seconds["groups"],
        "peak_gib": None if held is None else held / 2**30,
        "groups": len(graph.groups),
        "channels": sum(group.channels for group in graph),
        "slices": sum(len(group.slices) for group in graph),
        "reach": graph.reachable(),
        "unknown_operators": sorted({unknown.operator for unknown in graph.unknown}),
        "fingerprint": graph.fingerprint,
    }


def faults(record: dict[str, Any], seconds: float, gib: float) -> list[str]:
    """Returns what exceeds the thresholds."""
    out = []
    if record["seconds"] > seconds:
        out.append(f"took {record['seconds']:.1f} s, more than {seconds:g} s")
    if record["peak_gib"] is not None and record["peak_gib"] > gib:
        out.append(f"held {record['peak_gib']:.2f} GiB, more than {gib:g} GiB")
    return out


def main(arguments: list[str] | None = None) -> int:
    """Builds, measures, prints, and returns the exit code."""
    options = parse(arguments)
    try:
        model = build(options.layers, options.vocabulary)
    except (ImportError, RuntimeError) as error:
        print(f"error: the model cannot be built: {error}", file=sys.stderr)
        return UNUSABLE
    record = measure(model, options.tokens)
    for key, value in record.items():
        shown = f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else value
        print(f"{key.replace('_', ' '):20s} {shown}")
    if options.json:
        from graphprune.runs.atomic import atomic

        with atomic(options.json) as temporary:
            temporary.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    found = faults(record, options.seconds, options.gib)
    print("; ".join(found) or f"passes: at most {options.seconds:g} s and {options.gib:g} GiB")
    return 1 if found else 0


if __name__ == "__main__":
    enter("dev")
    sys.exit(main())
