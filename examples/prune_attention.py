"""Whole heads, or widths within heads, of an attention layer whose keys serve two query heads each.

python examples/prune_attention.py [--out DIR]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import graphprune as gp


class Attention(nn.Module):
    """Grouped-query attention: `heads` query heads share `kv_heads` keys and values."""

    def __init__(self, width: int = 48, heads: int = 8, kv_heads: int = 4) -> None:
        """Makes the projections."""
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, kv_heads * self.head_dim)
        self.v, self.o = nn.Linear(width, kv_heads * self.head_dim), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (n, length, width) to the same shape."""
        n, length, _ = x.shape
        q = self.q(x).view(n, length, self.heads, self.head_dim).transpose(1, 2)
        k = self.k(x).view(n, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.v(x).view(n, length, self.kv_heads, self.head_dim).transpose(1, 2)
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        out: Tensor = self.o(y.transpose(1, 2).reshape(n, length, -1))
        return out


def main() -> None:
    """Prunes one way after the other."""
    parser = argparse.ArgumentParser(description="prune whole heads, or widths within heads")
    parser.add_argument("--out", type=Path, help="folder for the smaller models; a temporary one by default")
    given: Path | None = parser.parse_args().out
    out = given or Path(tempfile.mkdtemp(prefix="graphprune-"))
    out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 48), Attention(), nn.LayerNorm(48), nn.Linear(48, 10)).eval()
    x = torch.randn(2, 12, 16)

    print(gp.trace(model, x).explain("1.k"))  # the group of key heads owns two query heads per channel
    for cut in ("blocks", "query_key", "value"):
        small, report = gp.prune(model, x, sparsity=0.5, cut=cut)
        rows = {name: tensor.shape[0] for name, tensor in small.named_parameters()}
        shown = ", ".join(f"{name} {rows[f'1.{name}.weight']}" for name in "qkv")
        print(f"{cut}: rows {shown}; result {report.kind}; error {report.error:.0e}")
        layer = small.get_submodule("1") if report.kind == "module" else None
        if isinstance(layer, Attention):
            print(f"  heads {layer.heads}, key heads {layer.kv_heads}, width of a head {layer.head_dim}")
        gp.save(small, out / f"{cut}.safetensors")


if __name__ == "__main__":
    main()
