"""What each of several processes does in the tests of distributed statistics: sees its share of the data and writes down what it found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

import graphprune as gp
from graphprune.criteria.activations import APoZ
from graphprune.criteria.gradients import Taylor
from graphprune.criteria.scoring import score_groups
from graphprune.criteria.statistics.activations import observe_activations
from graphprune.criteria.statistics.curvature import observe_curvature
from graphprune.criteria.statistics.gradients import observe_joint, observe_products
from graphprune.criteria.statistics.inputs import observe_inputs
from graphprune.data.distributed import all_reduce_sum, broadcast_from_first
from graphprune.data.sources import Loader
from tests.support.operators import Network, conv, filled, normal

NAMES = ("a.weight", "fc.weight")


def model() -> nn.Module:
    """Returns the same network in every process."""

    def run(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.fc(F.relu(m.norm(m.a(x))).mean((2, 3)))
        return y

    return filled(Network(run, {"a": conv(3, 6), "norm": nn.BatchNorm2d(6), "fc": nn.Linear(6, 3)}))


def diagonal() -> nn.Module:
    """Returns a network whose Hessian is diagonal, so that every random vector shows the same curvature."""
    return filled(Network(lambda m, x: (x * m.w) ** 3, {"w": nn.Parameter(torch.ones(4))}))


def batches() -> list[tuple[Tensor, Tensor]]:
    """Returns all of the data: batches of different sizes."""
    return [(normal(size, 3, 5, 5), torch.arange(size) % 3) for size in (1, 4, 2, 3, 5, 2)]


def statistics(share: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Returns every statistic that there is, by name, of some of the data, and what a reconstruction by it comes to."""
    network = model()
    graph = gp.trace(network, batches()[0][0])
    data = Loader(share, F.cross_entropy)
    out: dict[str, Tensor] = {}
    for name, places in observe_activations(network, graph, data).items():
        for place in places:
            out |= {f"{name} zeros": place.zeros, f"{name} total": place.total, f"{name} elements": place.elements}
    out |= {f"inputs {n}": t for n, t in observe_inputs(network, graph, NAMES, data).items()}
    out |= {f"products {n}": t for n, t in observe_products(network, NAMES, data).items()}
    out |= {f"joint {n}": t for n, t in observe_joint(network, {g.name: g.producers for g in graph.groups}, data).items()}
    flat = [(x[:, :1, 0, :4].flatten(0, 1), torch.zeros(())) for x, _ in share]
    out |= {f"curvature {n}": t for n, t in observe_curvature(diagonal(), ["w"], Loader(flat, lambda o, _: o.sum())).items()}
    masks = gp.Masks(graph, {graph.groups[0].name: np.arange(6) % 2 == 0})
    fitted, report = gp.reconstruct(network, masks, data)
    out |= {f"reconstructed {n}": fitted.get_parameter(n).detach() for n in ("fc.weight", "fc.bias")}
    out["points"] = torch.tensor([each.points for each in report.layers])
    for criterion in (APoZ(), Taylor()):
        scores = score_groups(network, graph, criterion, source=data).groups
        out |= {f"{type(criterion).__name__} {n}": torch.from_numpy(s) for n, s in scores.items()}
    return out


def take_part(rank: int, processes: int, folder: str) -> None:
    """Looks at every `processes`-th batch, together with the others, and writes down what was found."""
    torch.set_num_threads(1)
    meeting = f"file://{Path(folder).as_posix()}/meeting"
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    try:
        found = statistics(batches()[rank::processes])
        found["summed"] = all_reduce_sum([torch.arange(3.0) + rank, torch.ones(())])[0]
        found["agreed"] = torch.from_numpy(broadcast_from_first(np.arange(3.0, dtype=np.float64) + 0.1 * rank))
        torch.save(found, Path(folder) / f"{rank}.pt")
    finally:
        distributed.destroy_process_group()
