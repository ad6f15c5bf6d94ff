"""Least-squares reconstruction: layers that read channels that go are fitted to what they computed before."""

from __future__ import annotations

from graphprune.repair.rebuilding import Reconstruction, reconstruct
from graphprune.repair.report import LeftAlone, ReconstructionReport, Refitted

__all__ = ["LeftAlone", "Reconstruction", "ReconstructionReport", "Refitted", "reconstruct"]
