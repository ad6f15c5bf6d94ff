"""The package imports nothing heavy before it is used, and its names are what they should be whatever is imported first.

Every case runs in a Python process of its own: in this one, everything has been imported long ago.
"""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from types import ModuleType

import pytest

import graphprune as gp

HEAVY = ("torch", "numpy", "scipy", "onnx", "onnxruntime", "networkx", "matplotlib", "sklearn", "optuna")
LARGEST_SHARE = 0.2  # of the processor time of `import torch`
HELP = "import sys; sys.argv = ['graphprune', '--help']; from graphprune.cli import main; main()"
SECONDS = "import atexit, sys, time; atexit.register(lambda: print(time.process_time(), file=sys.stderr)); "


def run(code: str) -> str:
    """Returns what a new Python process prints while it runs some code."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)  # noqa: S603 - this file's own code
    assert done.returncode == 0, done.stderr
    return done.stdout


def seconds(code: str) -> float:
    """Returns the processor time that a new Python process takes for some code, in seconds, its own start included."""
    done = subprocess.run([sys.executable, "-c", SECONDS + code], capture_output=True, text=True, check=True)  # noqa: S603 - this file's own code
    return float(done.stderr.split()[-1])


@pytest.mark.parametrize("code", ["import graphprune", "import graphprune.errors", HELP, HELP.replace("--help", "prune', '--help")])
def test_nothing_heavy_is_imported(code: str) -> None:
    """Neither the package nor the help of the command line needs torch or any other heavy library."""
    watch = f"import atexit, sys; atexit.register(lambda: print('loaded', sorted(set(sys.modules) & set({HEAVY}))))"
    assert run(f"{watch}; {code}").splitlines()[-1] == "loaded []"


def test_help_takes_a_fifth_of_importing_torch_at_most() -> None:
    """Best of three processes each, taken in turns."""
    rounds = [(seconds(HELP), seconds("import torch")) for _ in range(3)]
    mine, torch = (min(times) for times in zip(*rounds, strict=True))
    assert mine <= LARGEST_SHARE * torch, f"graphprune --help takes {mine:.2f} s, import torch {torch:.2f} s"


FIRST = (
    "from graphprune.trace.recorder import record",
    "import graphprune.compat, graphprune.cli.demo, graphprune.sensitivity.sensitivity",
    "from graphprune import *",
    "import graphprune as gp; gp.trace; gp.criteria.L1; import graphprune.trace, graphprune.speedup",
)


@pytest.mark.parametrize("first", FIRST)
def test_public_names_hold_whatever_is_imported_first(first: str) -> None:
    """The functions that share their names with packages stay functions, and the packages stay importable."""
    code = f"""{first}
import graphprune as gp
import sys
print(type(gp.trace).__name__, type(gp.speedup).__name__, type(gp.sensitivity).__name__)
from graphprune import sensitivity, speedup, trace
from graphprune.trace.recorder import record
from graphprune.trace import recorder
assert (trace, speedup, sensitivity) == (gp.trace, gp.speedup, gp.sensitivity) and recorder.record is record
assert all(type(sys.modules["graphprune." + name]).__name__ == "module" for name in ("trace", "speedup", "sensitivity"))
"""
    assert run(code).split() == ["function"] * 3


def test_threads_may_ask_first_all_at_once() -> None:
    """Names that several threads ask for at the same moment, before anybody has, are the same objects in all of them."""
    code = """
import sys, threading
import graphprune as gp
sys.setswitchinterval(1e-6)
names = sorted(gp.__all__)
threads, seen, errors = 8, {}, []
start = threading.Barrier(threads)
def ask(number):
    try:
        start.wait()
        order = names[number * 9:] + names[:number * 9]
        seen[number] = {name: getattr(gp, name) for name in order}
    except BaseException as error:
        errors.append(repr(error))
workers = [threading.Thread(target=ask, args=(number,)) for number in range(threads)]
[worker.start() for worker in workers]
[worker.join() for worker in workers]
print(errors, len(seen), all(seen[0][name] is each[name] for each in seen.values() for name in names))
"""
    assert run(code).split() == ["[]", "8", "True"]


def test_names_are_listed_before_they_are_asked_for() -> None:
    """`dir` and completion see the public names of a package that has imported nothing yet."""
    assert run("import graphprune as gp, sys; print(set(gp.__all__) <= set(dir(gp)), 'torch' in sys.modules)").split() == ["True", "False"]


def test_packages_are_imported_when_they_are_asked_for() -> None:
    """`gp.errors` needs no import of its own."""
    assert run("import graphprune as gp; print(gp.errors.ConfigError is gp.ConfigError)") == "True\n"


@pytest.mark.parametrize("name", ["prun", "__wrapped__", "_private", "no.such", "9", ""])
def test_unknown_name_is_an_attribute_error(name: str) -> None:
    """As in any module, so that `hasattr` answers."""
    with pytest.raises(AttributeError, match=r"module 'graphprune' has no attribute"):
        getattr(gp, name)


def test_functions_can_be_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    """A public function is replaced and put back like that of any module, also by a module that is no package of this one."""
    for name, stand_in in (("trace", len), ("trace", ModuleType("fake")), ("prune", len)):
        original = getattr(gp, name)
        with monkeypatch.context() as patch:
            patch.setattr(f"graphprune.{name}", stand_in)
            assert getattr(gp, name) is stand_in
        assert getattr(gp, name) is original


def test_package_and_names_survive_copying_and_pickling() -> None:
    """Classes and functions are pickled by the module that defines them, and the package stands for itself."""
    for name in gp.__all__:
        value = getattr(gp, name)
        assert pickle.loads(pickle.dumps(value)) is value, name  # noqa: S301 - written one call earlier
    assert copy.copy(gp) is gp
    assert copy.deepcopy({"package": gp})["package"] is gp
    assert pickle.loads(pickle.dumps(gp)) is gp  # noqa: S301 - written one call earlier
