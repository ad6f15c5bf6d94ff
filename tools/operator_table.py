"""Measures forty operators that move or mix channels, and writes the table into the README.

    python tools/operator_table.py              # measures them and writes the section of README.md
    python tools/operator_table.py --check      # writes nothing, says whether the section is up to date
    python tools/operator_table.py --pairs 400  # besides, that many random pairs; whatever is wrong is printed

Exit code: 0; 1 where an operator or a pair is wrong or crashes, or where --check finds the section out of date.
"""

# ruff: noqa: PLC0415 - before the environment is entered there is nothing but the standard library

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _environment import ROOT, enter

sys.path.insert(0, str(ROOT))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="operator_table.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing, say whether the section is up to date")
    parser.add_argument("--pairs", type=int, default=0, metavar="N", help="measure N random pairs besides (default 0)")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md", help="the file with the section (default README.md)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measures, writes or compares, and returns the exit code."""
    from graphprune.runs.atomic import atomic
    from tests.support.operator_section import COMMAND, replaced, section
    from tests.support.operator_table import OPERATORS
    from tests.support.operator_verdicts import measure, pair

    options = parse(arguments)
    outcomes = [measure([operator]) for operator in OPERATORS]
    pairs = [measure(pair(seed)) for seed in range(options.pairs)]
    bad = [outcome for outcome in [*outcomes, *pairs] if outcome.verdict in ("wrong", "crash")]
    for outcome in bad:
        print(f"{outcome.name}: {outcome.verdict}: {outcome.fault}")
    if pairs:
        counts = {verdict: sum(o.verdict == verdict for o in pairs) for verdict in ("pruned", "partly", "frozen", "wrong", "crash")}
        print(f"{len(pairs)} pairs: " + ", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    old = options.readme.read_text(encoding="utf-8")
    new = replaced(old, section(outcomes))
    if options.check:
        print(f"{options.readme.name} is up to date" if new == old else f"{options.readme.name} is out of date; run {COMMAND}")
        return 1 if bad or new != old else 0
    with atomic(options.readme) as temporary:
        temporary.write_text(new, encoding="utf-8")
    return 1 if bad else 0


if __name__ == "__main__":
    enter("dev")
    sys.exit(main())
