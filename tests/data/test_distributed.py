"""Two processes that see half of the data each find what one process finds that sees all of it, and both find the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed

from graphprune.data.distributed import all_reduce_sum, broadcast_from_first, processes, rank
from tests.support.two_processes import batches, statistics

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not distributed.is_available(), reason="this PyTorch was built without torch.distributed")
def test_statistics_of_two_processes_are_those_of_one(tmp_path: Path) -> None:
    """Sums and means over batches, of every kind, equal those of all data in one process; scores are the same bits on both ranks."""
    call = "import sys; from tests.support.two_processes import take_part; take_part(int(sys.argv[1]), 2, sys.argv[2])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(  # noqa: S603 (our own code)
            [sys.executable, "-c", call, str(number), str(tmp_path)], env=environment, cwd=ROOT, stderr=subprocess.PIPE
        )
        for number in range(2)
    ]
    try:
        for process in started:
            _, complaint = process.communicate(timeout=120)
            assert process.returncode == 0, complaint.decode()[-2000:]
    finally:
        for process in started:
            process.kill()
            process.wait()
    one, two = (torch.load(tmp_path / f"{number}.pt") for number in range(2))
    assert torch.equal(one.pop("summed"), torch.tensor([1.0, 3.0, 5.0]))
    assert torch.equal(two.pop("summed"), torch.tensor([1.0, 3.0, 5.0]))
    assert torch.equal(one.pop("agreed"), torch.arange(3.0, dtype=torch.float64))
    assert torch.equal(two.pop("agreed"), torch.arange(3.0, dtype=torch.float64))
    alone = statistics(batches())
    half = statistics(batches()[:1])
    assert list(one) == list(two) == list(alone)
    for name, expected in alone.items():
        torch.testing.assert_close(one[name], expected, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]
        assert torch.equal(one[name], two[name]), name
        assert not torch.allclose(half[name], expected), name


def test_one_process_needs_nobody() -> None:
    """Without other processes sums are the tensors themselves, and scores the array itself."""
    tensors = [torch.ones(2), torch.zeros(3)]
    assert (processes(), rank()) == (1, 0)
    assert all(a is b for a, b in zip(all_reduce_sum(tensors), tensors, strict=True))
    array = np.arange(3.0)
    assert broadcast_from_first(array) is array
