"""Lets ``python -m graphprune`` do what the ``graphprune`` command does."""

from __future__ import annotations

from graphprune.cli import main

if __name__ == "__main__":
    main()
