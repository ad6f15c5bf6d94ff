"""What the zoo demands: of every network, and of the shares of networks that meet it."""

from __future__ import annotations

import operator
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

Record = dict[str, Any]

# key, relation, bound, what it is called, which share it belongs to
_DEMANDS: Final[tuple[tuple[str, str, Any, str, str], ...]] = (
    ("lifeless_outputs", "==", 0, "outputs worth comparing", "verify"),
    ("unknown", "==", [], "operators without a rule", "unknown"),
    ("off_target", "==", [], "sparsity of every group", "checks"),
    ("coverage_faults", "==", 0, "coverage", "checks"),
    ("permutation_error", "<", 1e-9, "permutation", "permute"),
    ("control", ">", 1e-3, "permutation control", "permute"),
    ("error", "<", 1e-9, "speedup error", "verify"),
    ("effect", ">", 1e-3, "speedup effect", "verify"),
    ("reference_error", "<", 1e-9, "error against the reference", "verify"),
    ("shape_kept", "==", True, "output shape", "verify"),
    ("train_ok", "==", True, "training", "checks"),
    ("onnx_error", "<", 1e-3, "ONNX Runtime", "ONNX"),
)
THRESHOLDS: Final = tuple(demand[:4] for demand in _DEMANDS)
# Failed measurements, by the share that they belong to; all others belong to "verify".
_STAGES: Final = {
    **dict.fromkeys(("coverage", "train", "own class"), "checks"),
    "permutation": "permute",
    **dict.fromkeys(("ONNX", "dense ONNX"), "ONNX"),
}
# Errors above are for float64; what ran in float32 is held to these, and what computes in it here and there to the engine's own bound.
FLOAT32_BOUND: Final = 1e-3
FLOAT32_PERMUTATION: Final = 1e-4
_RELATIONS: Final[dict[str, Callable[[Any, Any], bool]]] = {"<": operator.lt, ">": operator.gt, "==": operator.eq}
# A chaotic network turns the last place of its inputs into errors larger than the bounds: it is held to a few times that (`rounding`).
_COMPARED: Final = ("permutation_error", "error", "reference_error")
_ROUNDINGS: Final = 10.0
LEAST_REACH: Final = 0.8  # networks below are named with what holds them back


@dataclass(frozen=True)
class Requirement:
    """One line of what must be shown.

    Attributes:
        zoo: name of the zoo, "all" for all of them together.
        what: the quantity.
        measured: its value, None where nothing could be measured.
        bound: the least that it may be.
    """

    zoo: str
    what: str
    measured: float | None
    bound: float

    @property
    def met(self) -> bool:
        """Whether it is met; what nobody could measure is not."""
        return self.measured is not None and self.measured >= self.bound


# share of networks that must hold, by zoo
_SHARES: Final[Mapping[str, float]] = {"torchvision": 1.0, "timm": 0.98, "transformers": 1.0}
_CHECKS: Final = 0.95
_OWN_CLASS: Final = 0.9
_ONNX: Final = 0.95
_REACH: Final[Mapping[str, tuple[float, float]]] = {"torchvision": (0.95, LEAST_REACH)}  # median and worst


def zoo_of(record: Record) -> str:
    """Returns the source of a network."""
    return str(record["name"]).partition(":")[0]


def faults(record: Record) -> list[tuple[str, str]]:
    """Returns (cause, detail) for each failed measurement, and each threshold that a measured value misses.

    A value that is missing though nothing failed is a fault as well, unless the process ended before it could be measured.
    """
    return [(cause, detail) for cause, detail, _ in _faults(record)]


def _faults(record: Record) -> list[tuple[str, str, str]]:
    failures: dict[str, str] = record["failures"]
    found = [(f"{stage} failed", detail, _STAGES.get(stage, "verify")) for stage, detail in failures.items()]
    for key, relation, bound, cause, share in _DEMANDS:
        limit = _limit(key, relation, bound, record)
        value = record.get(key)
        if value is None:
            excused = failures or (key == "onnx_error" and "dense_onnx_refused" in record)
            found += [] if excused else [(cause, "not measured", share)]
        elif not _RELATIONS[relation](value, limit):
            found.append((cause, f"{key} is {shown(value)}, must be {relation} {limit}", share))
    return found


def _limit(key: str, relation: str, bound: Any, record: Record) -> Any:
    if relation != "<":
        return bound
    if record.get("ran_in", record["dtype"]) == "float32":
        return FLOAT32_PERMUTATION if key == "permutation_error" else FLOAT32_BOUND
    if key in _COMPARED:
        bound = max(bound, _ROUNDINGS * (record.get("rounding") or 0.0))
    return max(bound, record.get("tolerance") or 0.0) if key == "error" else bound


def holds(record: Record, share: str) -> bool:
    """Returns whether a network meets all that belongs to a share: "verify", "permute", "checks" or "ONNX"."""
    measured = all(record.get(key) is not None for key, *_, found in _DEMANDS if found == share)
    return measured and not any(found == share for *_, found in _faults(record))


def is_own_class(record: Record) -> bool:
    """Returns whether the shrunk network is of the class of the original, and verified."""
    return record.get("kind") == "module" and holds(record, "verify")


def can_be_own_class(record: Record) -> bool:
    """Returns whether there is a verified result of the class of the original, by default or with `keep_class=True`."""
    error, effect = record.get("own_class_error"), record.get("own_class_effect")
    asked = error is not None and effect is not None and error < _limit("error", "<", 1e-9, record) and effect > 1e-3
    return is_own_class(record) or (asked and holds(record, "verify"))


def exports(record: Record) -> bool:
    """Returns whether the original can be exported, as far as is known: only a refusal of it says that it cannot."""
    return "dense_onnx_refused" not in record


def share_of(records: Iterable[Record], holding: Callable[[Record], bool]) -> float | None:
    """Returns the share of the records for which something holds, None where there are none."""
    flags = [holding(record) for record in records]
    return sum(flags) / len(flags) if flags else None


def reaches(records: Iterable[Record]) -> list[float]:
    """Returns the shares of parameters that can be pruned, of the networks that were traced."""
    return [record["reach"] for record in records if record.get("reach") is not None]


def requirements(records: list[Record]) -> list[Requirement]:
    """Returns what the zoos that were measured must show, and what they do."""
    lines = []
    for zoo, least in _SHARES.items():
        mine = [record for record in records if zoo_of(record) == zoo]
        if not mine:
            continue
        lines += [
            Requirement(zoo, "prune, verify and run", share_of(mine, lambda r: holds(r, "verify")), least),
            Requirement(zoo, "permutation error", share_of(mine, lambda r: holds(r, "permute")), least),
            Requirement(zoo, "train, coverage, sparsity", share_of(mine, lambda r: holds(r, "checks")), _CHECKS),
        ]
        if zoo in _REACH:
            known = reaches(mine)
            median, worst = _REACH[zoo]
            lines.append(Requirement(zoo, "prunable parameters, median", statistics.median(known) if known else None, median))
            lines.append(Requirement(zoo, "prunable parameters, worst", min(known, default=None), worst))
        if zoo == "transformers":
            lines.append(Requirement(zoo, "own class", share_of(mine, is_own_class), _OWN_CLASS))
    lines.append(Requirement("all", "own class", share_of(records, is_own_class), _OWN_CLASS))
    lines.append(Requirement("all", "own class, keep_class where needed", share_of(records, can_be_own_class), _OWN_CLASS))
    exportable = [record for record in records if exports(record)]
    lines.append(Requirement("all", "ONNX, of those that export", share_of(exportable, lambda r: holds(r, "ONNX")), _ONNX))
    return lines


def by_cause(records: Iterable[Record]) -> list[tuple[str, str, list[str], str]]:
    """Returns (what fails, cause, names of the networks, what the first says), the most frequent first.

    Details that differ only in numbers, names of layers and shapes are one cause.
    """
    found: dict[tuple[str, str], list[tuple[str, str]]] = defaultdict(list)
    for record in records:
        for what, detail in faults(record):
            found[what, generalised(detail)].append((str(record["name"]), detail))
    rows = [(what, cause, [name for name, _ in entries], entries[0][1]) for (what, cause), entries in found.items()]
    return sorted(rows, key=lambda row: (-len(row[2]), row[:2]))


def generalised(detail: str) -> str:
    """Returns a message without what differs from network to network."""
    detail = re.sub(r"\(?\[[\d, x]*\]\)?", "[...]", detail)
    detail = re.sub(r"'[^']*'|\"[^\"]*\"", "'...'", detail)
    detail = re.sub(r"\b[A-Za-z_]\w*(\.\w+)*\.\d+(\.\w+)*", "<layer>", detail)
    detail = re.sub(r"-?\b\d+(\.\d+)?(e[+-]?\d+)?\b", "N", detail)
    return re.sub(r"\b(\w*?)_N\b|\b([a-z_]+?)_\d+\b", r"\1\2", detail)[:200]


def shown(value: object) -> str:
    """Returns a value as tables show it."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.1e}" if isinstance(value, float) else str(value)
