"""What data shows of channels and weights: statistics of activations, inputs, gradients and curvature, streamed batch by batch.

Every function takes a `graphprune.data.sources.Source`, leaves the model as it was, and, under `torch.distributed`, returns the same on all
processes: the statistics of all their batches.
"""

from __future__ import annotations

from graphprune.criteria.statistics.activations import Observed, observe_activations
from graphprune.criteria.statistics.curvature import observe_curvature
from graphprune.criteria.statistics.gradients import observe_joint, observe_products
from graphprune.criteria.statistics.inputs import observe_inputs

__all__ = ["Observed", "observe_activations", "observe_curvature", "observe_inputs", "observe_joint", "observe_products"]
