"""Files that are replaced are there as a whole or not at all."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from graphprune.runs.atomic import atomic, leftovers


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    """Inside the block readers see the old text, behind it the new one, and no other file."""
    path = tmp_path / "table.csv"
    path.write_text("old")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == ".csv"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_what_fails_leaves_nothing(tmp_path: Path) -> None:
    """An exception leaves the old file alone, and no temporary one; a block that writes nothing is an error."""
    path = tmp_path / "table.csv"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("new")
        raise ValueError("half")

    with pytest.raises(ValueError, match="half"), atomic(path) as temporary:
        half(temporary)
    with pytest.raises(FileNotFoundError), atomic(path):
        pass
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the process that is killed is forked")
def test_leftovers_are_those_of_the_dead(tmp_path: Path) -> None:
    """What a killed process left is found; what a living one is writing is not, nor are files of other names."""
    path = tmp_path / "run.safetensors"
    child = os.fork()
    if not child:
        with atomic(path) as temporary:
            temporary.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    (tmp_path / f".other.{child}.part.safetensors").write_text("of another file")
    with atomic(path) as temporary:
        temporary.write_text("new")
        assert [found.read_text() for found in leftovers(path)] == ["half"]
