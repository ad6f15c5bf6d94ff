"""Makes the virtual environments that the tools run in, once each, and starts the tools inside them.

A tool begins with ``enter("dev")``. The first call makes ``.venv-dev`` at the top of the repository from the exact versions in
``constraints.txt``; every later call finds it ready. The environment is made anew when the project's dependencies, the constraints,
the Python version or the repository's place change. What pip said while it failed stays in ``.venv-dev.log``.

Another PyTorch or another Python gets an environment of its own, ``.venv-dev-torch-2.6.0`` or ``.venv-dev-python-3.12``. Beside another
PyTorch everything keeps its exact version but what is bound to one PyTorch: torchvision (the release built for it) and sympy.

Two environment variables steer it:
    GRAPHPRUNE_PYTHON_ENV: the folder of a virtual environment to use as it is; nothing is made or installed.
    GRAPHPRUNE_TORCH_INDEX: the address of a package index that holds the wanted build of torch; pip's own configuration holds
        without it, and a CPU build is preferred to any other.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
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
VISION_BEFORE_TORCH = 15  # torchvision 0.(N + 15) is built for torch 2.N
NOT_OFFERED = ("No matching distribution found", "conflicting dependencies")  # what pip says of a version that it cannot find


class EnvironmentFailure(Exception):  # noqa: N818 - an "EnvironmentError" would read as the OSError of that name
    """A virtual environment could not be made; the message is one sentence without its final period."""


@dataclass(frozen=True)
class Plan:
    """What goes into one environment.

    Args:
        folder: where the environment stands.
        extra: the extra of pyproject.toml that the project is installed with, empty for none.
        also: further exact requirements, each "name==version".
        torch: the version of PyTorch, empty for the pinned one.
        python: the interpreter that the environment is made with.
    """

    folder: Path
    extra: str
    also: tuple[str, ...]
    torch: str = ""
    python: str = sys.executable

    @property
    def marker(self) -> Path:
        """The file that is written last; it holds the digest of what the environment was made from."""
        return self.folder / ".complete"

    def beside(self, suffix: str) -> Path:
        """Returns a path next to the folder: its name with a suffix (`with_suffix` would take the end of a version for one)."""
        return self.folder.with_name(self.folder.name + suffix)

    def constraints(self) -> str:
        """Returns the exact versions: what `constraints.txt` says, with another PyTorch in its place."""
        lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
        if self.torch:
            lines = [line for line in lines if line.partition("==")[0] not in ("torch", "torchvision", "sympy")]
            lines += [f"torch=={self.torch}", f"torchvision==0.{int(self.torch.split('.')[1]) + VISION_BEFORE_TORCH}.*"]
        return "\n".join(lines) + "\n"

    def digest(self) -> str:
        """Returns the digest of everything that decides what is installed; linter and test settings do not."""
        project = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("\n[tool.ruff]")[0]
        parts = (str(ROOT), str(version_of(self.python)), project, self.constraints(), self.extra, *self.also)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def is_complete(self) -> bool:
        """Returns whether the environment is there, finished, and made from what the repository says now."""
        try:
            return self.marker.read_text(encoding="utf-8") == self.digest() and python_of(self.folder).exists()
        except FileNotFoundError:
            return False


def enter(purpose: str, extra: str | None = None, also: Sequence[str] = (), *, torch: str = "", python: str = "") -> None:
    """Returns inside the environment `.venv-<purpose>`; elsewhere, runs this same command line there and exits with its code.

    An environment with another PyTorch or Python than usual has that in its name too.

    Args:
        purpose: the last part of the environment's name.
        extra: the extra of pyproject.toml to install, empty for none, `purpose` when not given.
        also: further exact requirements, installed last.
        torch: the version of PyTorch, such as "2.6.0"; empty for the pinned one.
        python: an interpreter (a path, or a command such as "python3.12"); empty for the running one.

    Raises:
        SystemExit: outside the environment, always: with the job's exit code, or with 2 and one line on stderr when the
            environment could not be made.
    """
    given = os.environ.get("GRAPHPRUNE_PYTHON_ENV")
    try:
        plan = planned(purpose, purpose if extra is None else extra, tuple(also), torch, python)
        asked = "--torch" if torch else "--python" if python else ""
        folder = Path(given) if given and not asked else plan.folder
        if Path(sys.prefix).resolve() == folder.resolve():
            return
        executable = _given(Path(given), asked) if given else _prepared(plan)
    except EnvironmentFailure as failure:
        _say(f"error: {failure}.")
        raise SystemExit(UNUSABLE) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None
    raise SystemExit(call([str(executable), *sys.argv]))


def call(command: Sequence[str], folder: Path | None = None) -> int:
    """Runs a command with this process's input and output, and returns its exit code (130 when Ctrl-C ended it)."""
    try:
        return subprocess.call(command, cwd=folder)
    except KeyboardInterrupt:
        return INTERRUPTED


def version_of(python: str) -> tuple[int, int]:
    """Returns the version of an interpreter, as (3, 12).

    Raises:
        EnvironmentFailure: there is no such interpreter.
    """
    if python == sys.executable:
        return sys.version_info[:2]
    try:
        said = subprocess.run([python, "-c", "import sys; print(*sys.version_info[:2])"], capture_output=True, text=True, check=True)
        major, minor = said.stdout.split()
        return int(major), int(minor)
    except (OSError, subprocess.SubprocessError, ValueError):
        raise EnvironmentFailure(f"{python} is no Python; name an interpreter, such as python3.12 or its path") from None


def python_of(folder: Path) -> Path:
    """Returns the interpreter of the virtual environment in `folder`."""
    return folder / "Scripts" / "python.exe" if os.name == "nt" else folder / "bin" / "python"


def planned(purpose: str, extra: str, also: tuple[str, ...], torch: str, python: str) -> Plan:
    """Returns what goes into an environment; see `enter`."""
    if torch and not re.fullmatch(r"2\.\d+(\.\d+)?", torch):
        raise EnvironmentFailure(f"{torch} is no version of PyTorch; write one such as 2.6.0")
    name = f".venv-{purpose}" + (f"-torch-{torch}" if torch else "")
    if python:
        name += "-python-" + ".".join(map(str, version_of(python)))
    return Plan(ROOT / name, extra, also, torch, python or sys.executable)


def _say(line: str) -> None:
    """Prints one line of progress; stdout belongs to the job."""
    print(line, file=sys.stderr, flush=True)


def _given(folder: Path, asked: str) -> Path:
    """Returns the interpreter of the environment that the user named, unless an option asks for another one."""
    if asked:
        raise EnvironmentFailure(f"{asked} makes an environment, and GRAPHPRUNE_PYTHON_ENV names {folder}; unset the variable")
    python = python_of(folder)
    if not python.exists() or not (folder / "pyvenv.cfg").exists():  # half deleted: it would start anew without end
        what = f"GRAPHPRUNE_PYTHON_ENV names {folder}, which holds no virtual environment"
        raise EnvironmentFailure(f"{what}; name the folder of one, or unset the variable")
    return python.absolute()


def _prepared(plan: Plan) -> Path:
    """Returns the interpreter of the planned environment, which is made first unless it is complete."""
    version = version_of(plan.python)
    if version < OLDEST_PYTHON:
        raise EnvironmentFailure(f"this is Python {version[0]}.{version[1]}; graphprune needs 3.10 or later")
    if not plan.is_complete():
        try:
            with _locked(plan.beside(".lock")):
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


def _make(plan: Plan) -> None:
    """Makes the environment from nothing; on any failure the folder is gone again."""
    log_path = plan.beside(".log")
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


def _build(plan: Plan, log: TextIO) -> None:
    """Runs the steps in their order and says how long each took.

    torch goes first and alone: chosen among all requirements at once, pip could settle on a build with CUDA for the sake of another
    package. The build backend is installed from the constraints as well, instead of the newest one that build isolation would fetch.
    """
    python = str(python_of(plan.folder))
    constraints = plan.beside(".constraints.txt") if plan.torch else CONSTRAINTS
    if plan.torch:
        constraints.write_text(plan.constraints(), encoding="utf-8")
    install = partial(_install, python, constraints=constraints, log=log)
    target = f".[{plan.extra}]" if plan.extra else "."
    steps: tuple[tuple[str, Callable[[], None]], ...] = (
        ("empty environment", lambda: _step([plan.python, "-m", "venv", str(plan.folder)], log)),
        ("torch", lambda: _install_torch(install, next(line for line in plan.constraints().splitlines() if line.startswith("torch==")))),
        ("setuptools", lambda: install(["setuptools"])),
        (f"the project, {target}", lambda: install(["--no-build-isolation", "--editable", target, *plan.also])),
    )
    _say(f"{plan.folder.name}: making the virtual environment (once; a few minutes)")
    for name, step in steps:
        start = time.monotonic()
        try:
            step()
        except EnvironmentFailure as failure:
            raise EnvironmentFailure(f"{name}: {failure}") from None
        _say(f"{plan.folder.name}: {name}, {time.monotonic() - start:.0f} s")


def _install_torch(install: Callable[[Sequence[str]], None], torch: str) -> None:
    """Installs the wanted torch: from the index that the user named, else a CPU build, else what pip offers."""
    if os.environ.get("GRAPHPRUNE_TORCH_INDEX"):
        install([torch])
        return
    try:
        install([f"{torch}+cpu"])
    except EnvironmentFailure as failure:
        if not any(complaint in str(failure) for complaint in NOT_OFFERED):
            raise
        if sys.platform == "linux":  # elsewhere the plain build is the CPU build
            _say("note: pip is offered no CPU build of torch, so the plain one (large) is taken; to choose another, interrupt and")
            _say("      set GRAPHPRUNE_TORCH_INDEX to the address of an index that holds it")
        install([torch])


def _install(python: str, arguments: Sequence[str], *, constraints: Path, log: TextIO) -> None:
    """Installs with pip under the constraints."""
    index = os.environ.get("GRAPHPRUNE_TORCH_INDEX")
    options = ["--disable-pip-version-check", "--no-input", "--progress-bar", "off", "--constraint", str(constraints)]
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
