"""Trains, prunes, verifies and times a small residual network on real data. Arguments are handed on to `graphprune demo`.

    python tools/demo.py
    python tools/demo.py --help

Needs nothing but Python: the first run makes the virtual environment `.venv-demo` from pinned versions.
"""

from __future__ import annotations

import sys

from _environment import call, enter

if __name__ == "__main__":
    enter("demo")
    sys.exit(call([sys.executable, "-m", "graphprune", "demo", *sys.argv[1:]]))
