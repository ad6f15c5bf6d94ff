"""Makes the virtual environments that the tools run in, once each, and starts the tools inside them.

A tool begins with ``enter("dev")``. The first call makes ``.venv-dev`` at the top of the repository from the exact versions in
``constraints.txt``; every later call finds it ready. The environment is made anew when the project's dependencies, the constraints,
the Python version or the repository's place change. What pip said while it failed stays in ``.venv-dev.log``.

Two environment variables steer it:
    GRAPHPRUNE_PYTHON_ENV: the folder of a virtual environment to use as it is; nothing is made or installed.
    GRAPHPRUNE_TORCH_INDEX: the address of a package index that holds the wanted build of torch; pip's own configuration holds
        without it, and a CPU build is preferred to any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

try:
    import fcntl
except ImportError:  # Windows: two simultaneous first runs are then on their own
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "tools" / "constraints.txt"
OLDEST_PYTHON = (3, 10)
UNUSABLE = 2  # exit code: the environment could not be made, so the job never began
INTERRUPTED = 130  # exit code of a shell command that Ctrl-C ended
NOT_OFFERED = ("No matching distribution found", "conflicting dependencies")  # what pip says of a version that it cannot find


class EnvironmentFailure(Exception):  # noqa: N818 - an "EnvironmentError" would read as the OSError of that name
    """A virtual environment could not be made; the message is one sentence without its final period."""


@dataclass(frozen=True)
class _Plan:
    """What goes into one environment.

    Args:
        folder: where the environment stands.
        extra: the extra of pyproject.toml that the project is installed with, empty for none.
        also: further exact requirements, each "name==version".
    """

    folder: Path
    extra: str
    also: tuple[str, ...]

    @property
    def marker(self) -> Path:
        """The file that is written last; it holds the digest of what the environment was made from."""
        return self.folder / ".complete"

    def digest(self) -> str:
        """Returns the digest of everything that decides what is installed; linter and test settings do not."""
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\n[tool.ruff]")[0]
        parts = (str(ROOT), str(sys.version_info[:2]), project, CONSTRAINTS.read_text(encoding="utf-8"), self.extra, *self.also)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def is_complete(self) -> bool:
        """Returns whether the environment is there, finished, and made from what the repository says now."""
        try:
            return self.marker.read_text(encoding="utf-8") == self.digest() and python_of(self.folder).exists()
        except FileNotFoundError:
            return False


def enter(purpose: str, extra: str | None = None, also: Sequence[str] = ()) -> None:
    """Returns inside the environment `.venv-<purpose>`; elsewhere, runs this same command line there and exits with its code.

    Args:
        purpose: the last part of the environment's name.
        extra: the extra of pyproject.toml to install, empty for none, `purpose` when not given.
        also: further exact requirements, installed last.

    Raises:
        SystemExit: outside the environment, always: with the job's exit code, or with 2 and one line on stderr when the
            environment could not be made.
    """
    plan = _Plan(ROOT / f".venv-{purpose}", purpose if extra is None else extra, tuple(also))
    given = os.environ.get("GRAPHPRUNE_PYTHON_ENV")
    folder = Path(given) if given else plan.folder
    if Path(sys.prefix).resolve() == folder.resolve():
        return
    try:
        python = _given(folder) if given else _prepared(plan)
    except EnvironmentFailure as failure:
        _say(f"error: {failure}.")
        raise SystemExit(UNUSABLE) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    raise SystemExit(call([str(python), *sys.argv]))


def call(command: Sequence[str], folder: Path | None = None) -> int:
    """Runs a command with this process's input and output, and returns its exit code (130 when Ctrl-C ended it)."""
    try:
        return subprocess.call(command, cwd=folder)
    except KeyboardInterrupt:
        return INTERRUPTED


def python_of(folder: Path) -> Path:
    """Returns the interpreter of the virtual environment in `folder`."""
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def _say(line: str) -> None:
    """Prints one line of progress; stdout belongs to the job."""
    print(line, file=sys.stderr, flush=True)


def _given(folder: Path) -> Path:
    """Returns the interpreter of the environment that the user named."""
    python = python_of(folder)
    if not python.exists():
        what = f"GRAPHPRUNE_PYTHON_ENV names {folder}, which holds no virtual environment"
        raise EnvironmentFailure(f"{what}; name the folder of one, or unset the variable")
    return python.absolute()


def _prepared(plan: _Plan) -> Path:
    """Returns the interpreter of the planned environment, which is made first unless it is complete."""
    if sys.version_info < OLDEST_PYTHON:
        raise EnvironmentFailure(f"this is Python {sys.version.split()[0]}; graphprune needs 3.10 or later")
    if not plan.is_complete():
        try:
            with _locked(plan.folder.with_suffix(".lock")):
                if not plan.is_complete():  # another process may have made it while this one waited for the lock
                    _make(plan)
        except OSError as error:
            raise EnvironmentFailure(f"cannot make {plan.folder}: {error}") from error
    return python_of(plan.folder)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds a lock between processes; the system drops it when the process ends, however it ends."""
    with path.open("w", encoding="utf-8") as handle:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _make(plan: _Plan) -> None:
    """Makes the environment from nothing; on any failure the folder is gone again."""
    log_path = plan.folder.with_suffix(".log")
    shutil.rmtree(plan.folder, ignore_errors=True)
    try:
        with log_path.open("w", encoding="utf-8") as log:
            _build(plan, log)
        temporary = plan.marker.with_suffix(".tmp")
        temporary.write_text(plan.digest(), encoding="utf-8")
        temporary.replace(plan.marker)
    except BaseException as error:  # an interrupt, too, must leave no half-made environment
        shutil.rmtree(plan.folder, ignore_errors=True)
        if isinstance(error, EnvironmentFailure):
            raise EnvironmentFailure(f"cannot make {plan.folder.name}: {error} (all of it: {log_path})") from None
        raise
    log_path.unlink()


def _build(plan: _Plan, log: TextIO) -> None:
    """Runs the steps in their order and says how long each took.

    torch goes first and alone: chosen among all requirements at once, pip could settle on a build with CUDA for the sake of another
    package. The build backend is installed from the constraints as well, instead of the newest one that build isolation would fetch.
    """
    python = str(python_of(plan.folder))
    target = f".[{plan.extra}]" if plan.extra else "."
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("empty environment", lambda: _step([sys.executable, "-m", "venv", str(plan.folder)], log)),
        ("torch", lambda: _install_torch(python, log)),
        ("setuptools", lambda: _install(python, ["setuptools"], log)),
        (f"the project, {target}", lambda: _install(python, ["--no-build-isolation", "--editable", target, *plan.also], log)),
    )
    _say(f"{plan.folder.name}: making the virtual environment (once; a few minutes)")
    for name, step in steps:
        start = time.monotonic()
        try:
            step()
        except EnvironmentFailure as failure:
            raise EnvironmentFailure(f"{name}: {failure}") from None
        _say(f"{plan.folder.name}: {name}, {time.monotonic() - start:.0f} s")


def _install_torch(python: str, log: TextIO) -> None:
    """Installs the pinned torch: from the index that the user named, else a CPU build, else what pip offers."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    torch = next(line for line in lines if line.startswith("torch=="))
    if os.environ.get("GRAPHPRUNE_TORCH_INDEX"):
        _install(python, [torch], log)
        return
    try:
        _install(python, [f"{torch}+cpu"], log)
    except EnvironmentFailure as failure:
        if not any(complaint in str(failure) for complaint in NOT_OFFERED):
            raise
        if sys.platform == "linux":  # elsewhere the plain build is the CPU build
            _say("note: pip is offered no CPU build of torch, so the plain one (large) is taken; to choose another, interrupt and")
            _say("      set GRAPHPRUNE_TORCH_INDEX to the address of an index that holds it")
        _install(python, [torch], log)


def _install(python: str, arguments: Sequence[str], log: TextIO) -> None:
    """Installs with pip under the constraints."""
    index = os.environ.get("GRAPHPRUNE_TORCH_INDEX")
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--constraint", str(CONSTRAINTS)]
    options += ["--extra-index-url", index] if index else []
    _step([python, "-m", "pip", "install", *options, *arguments], log)


def _step(command: Sequence[str], log: TextIO) -> None:
    """Runs one command at the top of the repository, with its output appended to the log.

    Raises:
        EnvironmentFailure: the command failed; says what it complained of last.
    """
    log.flush()
    start = log.tell()
    # A configured `pip install --user` is refused inside a virtual environment.
    environment = {**os.environ, "PIP_USER": "0"}
    code = subprocess.call(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment)
    if code == 0:
        return
    said = [line.strip() for line in Path(log.name).read_bytes()[start:].decode("utf-8", "replace").splitlines() if line.strip()]
    complaints = [line for line in said if line.lower().startswith("error") and "ResolutionImpossible" not in line] or said
    raise EnvironmentFailure(complaints[-1].removeprefix("ERROR: ").rstrip(".") if complaints else f"exit code {code}")
