"""What one output of a layer is computed from: rows of a matrix, or windows of an image.

    convolution:             out[o] = sum_k  w[k] in[o stride - padding + k dilation]
    transposed convolution:  out[o] = sum_k  w[k] in[(o + padding - k dilation) / stride]     where that is a whole number

Only the windows of the outputs that are asked for are taken, so that nothing grows with the size of the images.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from graphprune.repair.readers import Call


class Windows:
    """One call of a layer on one batch.

    Args:
        call: which call.
        given: its arguments by name.
        result: what it returned.
        kernel: sizes of the kernel; empty for a matrix.

    Attributes:
        shape: of the result.
        device: of the result.
    """

    def __init__(self, call: Call, given: Mapping[str, Any], result: Tensor, kernel: tuple[int, ...]) -> None:
        self.call, self.given, self.kernel = call, given, kernel
        self.shape, self.device = tuple(result.shape), result.device
        self._result = result

    @property
    def positions(self) -> int:
        """How many outputs each channel has."""
        return self._result.numel() // max(self._images(self._result).shape[1], 1)

    def outputs(self, chosen: Tensor) -> Tensor:
        """Returns the outputs at positions, (positions, channels) in double precision."""
        image, at = self._located(chosen)
        return self._images(self._result)[image, :, at].double()

    def inputs(self, chosen: Tensor, columns: Tensor) -> Tensor:
        """Returns what the outputs at positions are computed from, (positions, columns times kernel positions) in double precision."""
        source = self.given[self.call.input]
        flat = self._images(source)
        image, at = self._located(chosen)
        if not self.kernel:
            return flat[image[:, None], columns[None], 0].double()
        index, inside = self._taps(at, source.shape[-len(self.kernel) :])
        found = flat[image[:, None, None], columns[None, :, None], index[:, None, :]].double()
        return torch.where(inside[:, None, :], found, 0.0).flatten(1)

    def _images(self, tensor: Tensor) -> Tensor:
        """Returns a tensor as (samples, channels, positions); a matrix has one position per row."""
        if not self.kernel:
            return tensor.reshape(-1, tensor.shape[-1], 1)
        batched = tensor if tensor.ndim == len(self.kernel) + 2 else tensor.unsqueeze(0)
        return batched.flatten(2)

    def _located(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Returns which image each position is in, and where."""
        each = self._images(self._result).shape[2]
        return chosen // each, chosen % each

    def _taps(self, at: Tensor, sizes: torch.Size) -> tuple[Tensor, Tensor]:
        """Returns the input positions of windows, (positions, kernel positions), and whether they are inside the image."""
        dims = len(self.kernel)
        index = torch.zeros(at.numel(), *[1] * dims, dtype=torch.int64, device=at.device)
        inside = torch.ones_like(index, dtype=torch.bool)
        places = torch.unravel_index(at, self.shape[-dims:])
        for d, (place, size) in enumerate(zip(places, sizes, strict=True)):
            step, dilation = self._option("stride", d), self._option("dilation", d)
            taps = torch.arange(self.kernel[d], device=at.device) * dilation
            if self.call.kind == "transposed":
                scaled = place[:, None] + self._padding(d) - taps
                start, whole = scaled.div(step, rounding_mode="floor"), scaled % step == 0
            else:
                start = place[:, None] * step - self._padding(d) + taps
                whole = torch.ones_like(start, dtype=torch.bool)
            whole &= (start >= 0) & (start < size)
            along = [self.kernel[d] if k == d else 1 for k in range(dims)]
            index = index * size + start.clamp(0, size - 1).reshape(at.numel(), *along)
            inside = inside & whole.reshape(at.numel(), *along)
        return index.flatten(1), inside.flatten(1)

    def _option(self, option: str, dim: int) -> int:
        value = self.given.get(option, 0 if option == "padding" else 1)
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        return int(items[dim if len(items) > 1 else 0])

    def _padding(self, dim: int) -> int:
        """Returns how many zeros are before the image along a dimension."""
        value = self.given.get("padding", 0)
        if isinstance(value, str):
            return self._option("dilation", dim) * (self.kernel[dim] - 1) // 2 if value == "same" else 0
        return self._option("padding", dim)
