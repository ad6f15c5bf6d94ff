"""Tests that cannot run with some release of PyTorch, and why."""

from __future__ import annotations

import pytest
import torch

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def since(version: tuple[int, int], why: str) -> pytest.MarkDecorator:
    """Returns the mark of a test that is skipped before a release.

    Args:
        version: the first release that it runs with, such as (2, 7).
        why: what older ones do instead.
    """
    return pytest.mark.skipif(version > TORCH, reason=f"PyTorch {torch.__version__}: {why}")
