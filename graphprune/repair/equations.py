"""Least squares by normal equations, added up point by point: memory grows with the features of a layer, not with the data.

Fitted is the change D of the weights that are left, on what is missing of the original output:

    minimise  || E - X D ||^2 + ridge || D ||^2        E = Y - Y',   (X^T X + ridge) D = X^T E

so that what the points do not determine stays as it was, and the error on them can only fall. A bias is one more column of X, of ones,
without a ridge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_FEWEST = 1e-15  # of the largest eigenvalue, times the size: smaller ones are rounding


class Sums:
    """The normal equations of one block of weights.

    Args:
        features: how many weights compute one output, without the bias.
        outputs: how many outputs there are.
        bias: whether a bias is fitted as well.
        device: where to add up.

    Attributes:
        gram: X^T X, float64.
        cross: X^T E, float64.
        scalars: the number of points, ||Y||^2 and ||E||^2, float64.
    """

    def __init__(self, features: int, outputs: int, *, bias: bool, device: torch.device) -> None:
        self.features, self.bias = features, bias
        size = features + bias
        self.gram = torch.zeros(size, size, dtype=torch.float64, device=device)
        self.cross = torch.zeros(size, outputs, dtype=torch.float64, device=device)
        self.scalars = torch.zeros(3, dtype=torch.float64, device=device)

    def add(self, inputs: Tensor, wanted: Tensor, found: Tensor) -> None:
        """Adds points: inputs (points, features), wanted and found outputs (points, outputs); those that are not finite are left out."""
        missing = wanted - found
        good = inputs.isfinite().all(1) & missing.isfinite().all(1)
        if not good.all():
            inputs, wanted, missing = inputs[good], wanted[good], missing[good]
        if self.bias:
            inputs = torch.cat([inputs, inputs.new_ones(inputs.shape[0], 1)], 1)
        self.gram += inputs.mT @ inputs
        self.cross += inputs.mT @ missing
        self.scalars += torch.stack([missing.new_tensor(float(missing.shape[0])), wanted.square().sum(), missing.square().sum()])

    def parts(self) -> list[Tensor]:
        """Returns the three sums, to be added to those of other processes."""
        return [self.gram, self.cross, self.scalars]

    def replace(self, parts: list[Tensor]) -> None:
        """Takes the sums over all processes in place of its own."""
        self.gram, self.cross, self.scalars = parts

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """Returns D, (features, and one for a bias; outputs), and ||E - X D||^2.

        Args:
            ridge: as a share of the mean of the diagonal of X^T X; 0 gives the solution of least norm.
        """
        scale = float(self.gram.diagonal()[: self.features].mean()) if self.features else 0.0
        change: Tensor | None = None
        if ridge * scale > 0:
            lifted = self.gram.clone()
            lifted.diagonal()[: self.features] += ridge * scale
            factor, failed = torch.linalg.cholesky_ex(lifted)
            change = None if int(failed) else torch.cholesky_solve(self.cross, factor)
        if change is None:
            change = torch.linalg.pinv(self.gram, rtol=_FEWEST * self.gram.shape[0], hermitian=True) @ self.cross
        explained = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        return change, max(float(self.scalars[2] - explained), 0.0)
