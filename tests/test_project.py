"""What the project says of itself: licence, version, and the files that a built wheel holds."""

from __future__ import annotations

import hashlib
import re
import shutil
import subprocess
import sys
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest

import graphprune as gp

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = sorted(path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "graphprune").glob("*/__init__.py"))
STANDARD_TEXT = (
    "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"  # of LICENSE-2.0.txt as the Apache foundation publishes it
)
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel({!r}))"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Builds the wheel in a copy of the project, without a network."""
    copy, out = tmp_path_factory.mktemp("project"), tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "graphprune", copy / "graphprune", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-c", BUILD.format(str(out))]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)  # noqa: S603 - this file's own code
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(out / done.stdout.split()[-1])


def metadata(wheel: zipfile.ZipFile) -> Message:
    """Returns what the wheel says of itself."""
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode("utf-8"))


def test_licence_is_the_standard_text() -> None:
    """LICENSE is the Apache License 2.0, unmodified."""
    assert hashlib.sha256((ROOT / "LICENSE").read_bytes()).hexdigest() == STANDARD_TEXT


def test_wheel_states_version_and_licence(wheel: zipfile.ZipFile) -> None:
    """The version is that of the package, the licence an SPDX expression with its text, and no classifier repeats it."""
    facts = metadata(wheel)
    assert facts["Version"] == gp.__version__
    assert facts["License-Expression"] == "Apache-2.0"
    assert facts.get_all("License-File") == ["LICENSE"]
    assert not [classifier for classifier in facts.get_all("Classifier", []) if classifier.startswith("License")]
    held = next(name for name in wheel.namelist() if name.endswith(".dist-info/licenses/LICENSE"))
    assert hashlib.sha256(wheel.read(held)).hexdigest() == STANDARD_TEXT


def test_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    """Modules, the marker of type annotations and the README of every package are there, and nothing else."""
    own = {
        path.relative_to(ROOT).as_posix() for path in (ROOT / "graphprune").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in wheel.namelist() if name.startswith("graphprune/")} == own


def test_changelog_has_the_version() -> None:
    """The newest section of CHANGELOG.md is the present version's."""
    newest = re.search(r"^## \[(.+?)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert newest, "CHANGELOG.md has no section"
    assert gp.__version__ in newest.groups()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_mentioned_files_exist(name: str) -> None:
    """Every path of this project that a document sends its readers to is there."""
    text = (ROOT / name).read_text(encoding="utf-8")
    paths = re.findall(r"(?:graphprune|tests|tools|examples)/[\w/.]*\w|\b[A-Z]+\.md\b|LICENSE\b", text)
    assert len(paths) > 3
    assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_says_what_it_is_for(package: str) -> None:
    """Its README says what comes in, what goes out and where the next thing goes, and every file and folder that it mentions is there."""
    folder = ROOT / package
    text = (folder / "README.md").read_text(encoding="utf-8")
    files = re.findall(r"`([\w/]+\.(?:py|md|toml))`", text)
    folders = re.findall(r"`((?:graphprune|tests|tools|examples)/[\w/]*)`", text)
    missing = [name for name in files if not ((ROOT / name).exists() or (ROOT / "graphprune" / name).exists() or any(folder.rglob(name)))]
    assert missing + [name for name in folders if not (ROOT / name).is_dir()] == []
    assert files, "no file is mentioned"
    assert "add" in text.lower()
