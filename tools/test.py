"""Checks the whole project: lint, format, types and tests. Arguments are handed on to pytest.

    python tools/test.py                      # everything but the tests marked zoo or slow
    python tools/test.py tests/masks/test_channels.py  # lint, format and types of everything, and these tests
    python tools/test.py -m zoo               # the full zoo of networks

Needs nothing but Python: the first run makes the virtual environment `.venv-dev` from pinned versions.
"""

from __future__ import annotations

import sys
import time

from _environment import ROOT, call, enter

STEPS = (
    ("ruff check", ("ruff", "check", ".")),
    ("ruff format", ("ruff", "format", "--check", ".")),
    ("mypy", ("mypy",)),
    ("pytest", ("pytest",)),  # last, so that its closing line stays in sight
)


def main() -> int:
    """Runs all steps, whether or not an earlier one failed, and returns 1 if any did, else 0."""
    failed: list[str] = []
    took: list[str] = []
    for name, module in STEPS:
        start = time.monotonic()
        arguments = sys.argv[1:] if name == "pytest" else []
        print(f"[{name}]", flush=True)
        if call([sys.executable, "-m", *module, *arguments], folder=ROOT):
            failed.append(name)
        took.append(f"{name} {time.monotonic() - start:.1f} s")
    print(f"{'FAILED: ' + ', '.join(failed) if failed else 'all passed'} ({', '.join(took)})", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    enter("dev")
    sys.exit(main())
