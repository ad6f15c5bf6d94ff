"""Writes the table of operators as the section of the README that lies between two comments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from tests.support.operator_verdicts import Outcome

BEGIN: Final = "<!-- operators: written by tools/operator_table.py -->"
END: Final = "<!-- operators end -->"
COMMAND: Final = "python tools/operator_table.py"
EXACT: Final = 1e-12  # errors below this differ between machines, and say no more than that nothing but rounding differs


def section(outcomes: Sequence[Outcome]) -> str:
    """Returns the section, its two comments included."""
    counts = Counter(outcome.verdict for outcome in outcomes)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in ("pruned", "partly", "frozen", "wrong", "crash"))
    head = [
        BEGIN,
        "",
        f"`{COMMAND}` puts each of {len(outcomes)} operators between two convolutions and removes half of",
        f"the channels of every group: {told}. Error: of the small network against one with zeroed channels, relative, in",
        "float64, statistics over the channels that are left. Effect: of the removal. The tests do the same with pairs of operators.",
        "",
        "| operator | verdict | error | effect | what stays because it ... |",
        "|---|---|---|---|---|",
    ]
    return "\n".join([*head, *(row(outcome) for outcome in outcomes), "", END])


def row(outcome: Outcome) -> str:
    """Returns the line of one operator."""
    verdict = f"partly, {outcome.share:.0%}" if outcome.verdict == "partly" else outcome.verdict
    measured = outcome.verdict in ("pruned", "partly", "wrong")
    error = "" if not measured else f"< {EXACT:.0e}" if outcome.error < EXACT else f"{outcome.error:.0e}"
    effect = f"{outcome.effect:.2f}" if measured else ""
    because = outcome.fault or "; ".join(outcome.named or dict.fromkeys(str(f) for f in outcome.reasons))
    return "| " + " | ".join((cell(outcome.name), verdict, error, effect, cell(because))) + " |"


def cell(text: str) -> str:
    """Returns text on one line, without the bars that would end a cell."""
    return " ".join(text.split()).replace("|", "\\|")


def replaced(readme: str, new: str) -> str:
    """Returns the README with its section replaced.

    Raises:
        ValueError: the two comments do not both stand in the README, once and in order.
    """
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        message = f"the README needs the lines {BEGIN!r} and {END!r} once each, in this order"
        raise ValueError(message)
    return before + new + after
