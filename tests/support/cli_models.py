"""A Python file with a model and what scores it, as users of the command line have one."""

from __future__ import annotations

DATA = """

def batches():
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(4, 3, 8, 8, generator=generator), torch.arange(4)) for _ in range(3)]

def once():
    return iter(batches())

def broken(output, target):
    raise ValueError("out of order")
"""
"""Batches of images of 3 x 8 x 8 and four classes, an iterator that ends, and a loss that fails; behind `import torch`."""
