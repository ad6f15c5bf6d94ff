"""What processes that train together must agree on: sums of statistics, and scores.

Without `torch.distributed`, or with one process, nothing happens here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def processes() -> int:
    """Returns how many processes take part: 1 without `torch.distributed`."""
    if not distributed.is_available() or not distributed.is_initialized():
        return 1
    return distributed.get_world_size()


def rank() -> int:
    """Returns the number of this process, from 0."""
    return distributed.get_rank() if processes() > 1 else 0


def all_reduce_sum(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the sum of each tensor over all processes, on the tensor's own device; every process must call this with equal shapes."""
    if processes() == 1:
        return list(tensors)
    out = []
    for tensor in tensors:
        total = tensor.detach().to(_meeting_place(tensor.device), copy=True).contiguous()
        distributed.all_reduce(total)
        out.append(total.to(tensor.device))
    return out


def broadcast_from_first(array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns the values that the first process has, of the same shape, so that all take the same decisions by them, bit for bit."""
    if processes() == 1:
        return array
    values = torch.from_numpy(array.copy()).to(_meeting_place(torch.device("cpu")))
    distributed.broadcast(values, src=0)
    shared: NDArray[np.float64] = values.cpu().numpy()
    return shared


def _meeting_place(device: torch.device) -> torch.device:
    """Returns where the processes can exchange a tensor of a device: NCCL moves only what is on a GPU."""
    if distributed.get_backend() == "nccl" and device.type != "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return device
