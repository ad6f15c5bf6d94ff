"""Double precision also where a network itself asks for less, so that rounding cannot be taken for an error, nor hide one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from collections.abc import Callable

_NARROW: Final = frozenset({torch.float32, torch.float16, torch.bfloat16})
_Result = TypeVar("_Result")


class DoublePrecision(TorchDispatchMode):
    """Within this context, whatever is asked to give a narrower floating-point type gives float64 (the casts of norms and rotations)."""

    def __init__(self) -> None:
        """Changes nothing yet."""
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Callable[..., object], types: object, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> object:
        """Calls the operator with a wider type where it is given a narrower one."""
        del types
        kwargs = kwargs or {}
        if kwargs.get("dtype") in _NARROW:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def in_double(function: Callable[[], _Result]) -> _Result:
    """Returns what the function gives in double precision; where it does not run so (a float32 table), as it is."""
    try:
        with DoublePrecision():
            return function()
    except Exception:  # noqa: BLE001 (kernels refuse mixed types in many ways; if it fails for another reason, it fails again)
        return function()
