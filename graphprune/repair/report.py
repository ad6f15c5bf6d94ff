"""What a reconstruction did, layer by layer."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Group as Renderable


@dataclass(frozen=True)
class Refitted:
    """One layer whose weights were fitted anew.

    Attributes:
        layer: the module that owns the weight; the weight's own name where that is the model itself.
        operators: how often the forward pass calls it.
        features: how many weights compute one output: channels that are left times kernel positions, plus one for a bias that is fitted.
        points: how many outputs of each channel were compared.
        before: ||Y - Y'|| / ||Y|| over these points (Frobenius norms), Y' with the old weights on the pruned network's inputs.
        after: the same with the new weights.
    """

    layer: str
    operators: int
    features: int
    points: int
    before: float
    after: float


@dataclass(frozen=True)
class LeftAlone:
    """One layer that reads channels that go and keeps its weights.

    Attributes:
        layer: the module that owns the weight; the weight's own name where that is the model itself.
        reason: why, as a phrase.
    """

    layer: str
    reason: str


@dataclass(frozen=True)
class ReconstructionReport:
    """What a reconstruction did.

    Attributes:
        layers: those that were fitted, in order.
        left: those that read channels that go and were not.
        samples: how many samples each fit looked at (of this process).
        seconds: wall time.
    """

    layers: tuple[Refitted, ...]
    left: tuple[LeftAlone, ...]
    samples: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Returns the report as plain values, for JSON."""
        return {**asdict(self), "layers": [asdict(x) for x in self.layers], "left": [asdict(x) for x in self.left]}

    def __rich__(self) -> Renderable:
        """Renders the layers as a table, and what was left alone below it."""
        from rich.console import Group as Renderable  # noqa: PLC0415 (only where something is shown)
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(title=f"Reconstruction ({self.samples} samples, {self.seconds:.1f} s)")
        for head in ("layer", "features", "points", "error before", "after"):
            table.add_column(head, justify="left" if head == "layer" else "right")
        for each in self.layers:
            calls = f" ({each.operators} calls)" if each.operators > 1 else ""
            table.add_row(each.layer + calls, f"{each.features:,}", f"{each.points:,}", f"{each.before:.2%}", f"{each.after:.2%}")
        lines = [f"Left alone: {each.layer}, as it {each.reason}" for each in self.left]
        return Renderable(table, *([Text("\n".join(lines))] if lines else []))

    def __str__(self) -> str:
        """The report as plain text."""
        from rich.console import Console  # noqa: PLC0415

        text = io.StringIO()
        Console(width=140, file=text).print(self)
        return text.getvalue().rstrip()
