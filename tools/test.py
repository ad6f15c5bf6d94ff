"""Checks the whole project: lint, format, types and tests. Arguments are handed on to pytest.

    python tools/test.py                      # everything but the tests marked zoo or slow
    python tools/test.py tests/masks/test_channels.py  # lint, format and types of everything, and these tests
    python tools/test.py -m zoo               # the full zoo of networks
    python tools/test.py --torch 2.6.0        # the tests alone, with that release of PyTorch
    python tools/test.py --python python3.12 --torch 2.14.1  # and with that Python (a command or a path)

Needs nothing but Python: the first run makes the virtual environment `.venv-dev` from pinned versions. `--torch` and `--python` make one
more each, `.venv-dev-torch-2.6.0` and so on, with everything else as pinned. Lint, format and types are judged with the pinned PyTorch
alone. A test that cannot run with some release is skipped there and says why (`-rs` lists the reasons).
"""

from __future__ import annotations

import argparse
import os
import sys
import time

from _environment import ROOT, call, enter

LINT = (
    ("ruff check", ("ruff", "check", ".")),
    ("ruff format", ("ruff", "format", "--check", ".")),
    ("mypy", ("mypy",)),
)


def main(rest: list[str], *, lint: bool) -> int:
    """Runs all steps, whether or not an earlier one failed, and returns 1 if any did, else 0.

    Args:
        rest: what pytest gets.
        lint: whether lint, format and types are checked too.
    """
    failed: list[str] = []
    took: list[str] = []
    steps = (*(LINT if lint else ()), ("pytest", ("pytest", *rest)))  # last, so that its closing line stays in sight
    if not lint:
        os.environ["GRAPHPRUNE_PYTHON_ENV"] = sys.prefix  # what a test starts from tools/ stays in this environment
    for name, module in steps:
        start = time.monotonic()
        print(f"[{name}]", flush=True)
        if call([sys.executable, "-m", *module], folder=ROOT):
            failed.append(name)
        took.append(f"{name} {time.monotonic() - start:.1f} s")
    print(f"{'FAILED: ' + ', '.join(failed) if failed else 'all passed'} ({', '.join(took)})", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--torch", default="")
    parser.add_argument("--python", default="")
    options, others = parser.parse_known_args()
    enter("dev", torch=options.torch, python=options.python)
    sys.exit(main(others, lint=not (options.torch or options.python)))
