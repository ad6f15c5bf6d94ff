"""Columns that are declared once give the table, the CSV file and the plot of records."""

from __future__ import annotations

import csv
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest

from graphprune.errors import FileError
from graphprune.runs.records import Column, RecordSequence, spread


@dataclass(frozen=True)
class Epoch:
    """A record of each kind of value."""

    columns: ClassVar[tuple[Column, ...]] = (
        Column("number", "epoch"),
        Column("asked", "asked", ".0%"),
        Column("", "half", ".1f", value=lambda record: record.number / 2),
        Column("sparsity", "sparsity", ".1%"),
        Column("score", "score", ".3f"),
        Column("layers"),
    )
    number: int
    asked: tuple[float, ...]
    sparsity: float
    score: float | None = None
    layers: tuple[str, ...] = ()
    groups: dict[str, float] = field(default_factory=dict)


class Epochs(RecordSequence[Epoch]):
    """Records whose columns depend on what there is, too."""

    kind = Epoch

    @property
    def _columns(self) -> list[Column]:
        return [*Epoch.columns, *spread(self, "groups")]


EPOCHS = Epochs([Epoch(1, (0.5, 0.5, 0.25), 0.4, None, ("a", "b"), {"g": 0.5}), Epoch(2, (), 0.125, 0.75, groups={"h": 0.25})], "Epochs")


def test_a_table_shows_what_has_a_heading() -> None:
    """Formats are those of the columns, nothing stands for None, and equal values of a tuple are shown once."""
    table = EPOCHS.table()
    assert table.title == "Epochs"
    shown = {str(column.header): list(column.cells) for column in table.columns}
    assert shown == {
        "epoch": ["1", "2"],
        "asked": ["50% 25%", ""],
        "half": ["0.5", "1.0"],
        "sparsity": ["40.0%", "12.5%"],
        "score": ["", "0.750"],
    }
    assert "50% 25%" in str(EPOCHS)


def test_a_file_holds_what_has_a_name(tmp_path: Path) -> None:
    """Numbers are exact, tuples are separated by blanks, and every key of a mapping has a column."""
    EPOCHS.keep(tmp_path, "epochs")
    with (tmp_path / "epochs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["number", "asked", "sparsity", "score", "layers", "g", "h"],
        ["1", "0.5 0.5 0.25", "0.4", "", "a b", "0.5", "0.0"],
        ["2", "", "0.125", "0.75", "", "0.0", "0.25"],
    ]
    assert (tmp_path / "epochs.png").read_bytes().startswith(b"\x89PNG")


def test_files_that_are_there_stay_unless_written_anew(tmp_path: Path) -> None:
    """A run that is asked again does not touch what it has written; without a folder nothing is written."""
    (tmp_path / "epochs.csv").write_text("mine")
    EPOCHS.keep(tmp_path, "epochs", anew=False)
    assert (tmp_path / "epochs.csv").read_text() == "mine"
    EPOCHS.keep(None, "epochs")
    assert {path.name for path in tmp_path.iterdir()} == {"epochs.csv", "epochs.png"}
    with pytest.raises(FileError, match=r"cannot write the history to .*Choose a folder that exists"):
        EPOCHS.to_csv(tmp_path / "nowhere" / "epochs.csv")


def test_records_are_a_sequence() -> None:
    """They compare like the tuple that they are, and slices are tuples."""
    assert (EPOCHS[0], EPOCHS[1]) == EPOCHS
    assert Epochs(list(EPOCHS), "another title") == EPOCHS
    assert EPOCHS[1:] == (EPOCHS[1],)
    assert [record["number"] for record in EPOCHS.to_dicts()] == [1, 2]
