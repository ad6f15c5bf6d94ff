"""Least-squares reconstruction: layers that read channels that go are fitted to what they computed before."""

from __future__ import annotations

from graphprune.reconstruction.rebuilding import Reconstruction, reconstruct
from graphprune.reconstruction.report import LeftAlone, ReconstructionReport, Refitted

__all__ = ["LeftAlone", "Reconstruction", "ReconstructionReport", "Refitted", "reconstruct"]
