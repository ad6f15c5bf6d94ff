"""Models by name: what stands before the colon says where to look, what stands behind it what to call.

    torchvision:NAME        timm:NAME        package.module:callable        path/file.py:callable

A callable takes no arguments and returns an nn.Module; the name of an nn.Module instance does as well.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import inspect
import os
import sys
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from graphprune.errors import FileError, GraphPruneError, InputError, nearest
from graphprune.trace.threads import forked_generators

FORMS = "torchvision:NAME, timm:NAME, package.module:callable or path/file.py:callable"
_ORIGINS: dict[str, tuple[int, int, int]] = {}  # name of a module from a file -> when the file was written, its size, and the seed
IMAGE = (3, 224, 224)
"""The image that a model of torchvision takes, and one of timm that says nothing else: channels, height, width."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Attributes:
        name: as the user wrote it.
        make: returns a new model on every call.
        seed: of the random weights.
        image: whether the model takes images when the user says nothing of inputs.
    """

    name: str
    make: Callable[[], Any]
    seed: int = 0
    image: bool = False

    def build(self) -> nn.Module:
        """Returns a new model, the same on every call; the global random state stays as it was.

        Raises:
            InputError: the callable raises, or returns something else than an nn.Module.
        """
        with forked_generators():
            torch.manual_seed(self.seed)
            try:
                model = self.make()
            except GraphPruneError:
                raise
            except Exception as error:
                what = f"{self.name} cannot be built: {_said(error)}"
                raise InputError(what, "Name a callable that takes no arguments and returns an nn.Module") from error
        if not isinstance(model, nn.Module):
            what = f"{self.name} gives a {type(model).__name__}, not an nn.Module"
            raise InputError(what, "Name a callable that takes no arguments and returns an nn.Module")
        return model


def find(name: str, seed: int = 0) -> Source:
    """Returns where a model comes from; the module that it is in is imported, with random numbers drawn from `seed`.

    Raises:
        InputError: the name has no such form, or there is nothing of that name; the nearest is suggested.
        FileError: the file is missing.
    """
    place, _, target = name.rpartition(":")
    if place in _LIBRARIES and target:
        return Source(name, _LIBRARIES[place](target), seed, image=True)
    value, candidates = named_object(name, "a model", FORMS, seed)
    if isinstance(value, nn.Module):
        return Source(name, partial(copy.deepcopy, value), seed)
    if not callable(value):
        what = f"{name} is a {type(value).__name__}, neither a callable nor an nn.Module"
        raise InputError(what, _listed(candidates))
    return Source(name, value, seed)


def named_object(name: str, kind: str, forms: str, seed: int = 0) -> tuple[Any, list[str]]:
    """Returns what a name of the form PLACE:TARGET stands for, and what else there is at that place.

    Args:
        name: package.module:target or path/file.py:target.
        kind: what it should be, as in "a model", for the error.
        forms: the forms that it may have, for the error.
        seed: of random numbers that the module draws while it is imported.

    Raises:
        InputError: the name has no such form, or there is nothing of that name; the nearest is suggested.
        FileError: the file is missing.
    """
    place, colon, target = name.rpartition(":")
    if not colon or not place or not target:
        raise InputError(f"{name!r} does not name {kind}", f"Write {forms}")
    with forked_generators():
        torch.manual_seed(seed)
        is_file = place.endswith(".py") or "/" in place or os.sep in place
        module = _from_file(Path(place), seed) if is_file else _from_package(place)
    candidates = _candidates(module)
    if not hasattr(module, target):
        raise InputError(f"{place} has no {target!r}{_hint(target, candidates)}", _listed(candidates))
    return getattr(module, target), candidates


def _from_file(path: Path, seed: int) -> ModuleType:
    """Returns the module in a file, whose folder is importable from then on, as if the file were run.

    A file that names the model and the data too is run once: what it defines would be there twice, and could not be pickled.
    """
    if not path.is_file():
        raise FileError(f"there is no file {str(path)!r}", f"Check the path; models are named {FORMS}")
    folder, changed = str(path.resolve().parent), path.stat()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    name = f"_graphprune_{path.stem}_{zlib.crc32(folder.encode()):08x}"
    origin = (changed.st_mtime_ns, changed.st_size, seed)
    if name in sys.modules and _ORIGINS.get(name) == origin:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{str(path)!r} is no Python file", f"Models are named {FORMS}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and torch look classes up by their module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{str(path)!r} cannot be imported: {_said(error)}", "Correct the file, or install what it imports") from error
    _ORIGINS[name] = origin
    return module


def _from_package(place: str) -> ModuleType:
    """Returns an installed module, or one in the current folder."""
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        top = (error.name or "").partition(".")[0]
        if top == place.partition(".")[0]:
            raise InputError(f"there is no module {error.name!r}{_hint(place, _LIBRARIES)}", f"Models are named {FORMS}") from error
        raise InputError(f"{place} cannot be imported: {_said(error)}", f"Install {top}") from error
    except Exception as error:
        raise InputError(f"{place} cannot be imported: {_said(error)}", "Correct the module, or install what it imports") from error


def _torchvision(target: str) -> Callable[[], Any]:
    """Returns what builds a model of torchvision with random weights."""
    models = _library("torchvision", "models")
    _check_known(target, "torchvision", models.list_models())
    options = {"weights": None}
    if "weights_backbone" in inspect.signature(models.get_model_builder(target)).parameters:
        options["weights_backbone"] = None  # the default downloads weights
    return partial(models.get_model, target, **options)


def _timm(target: str) -> Callable[[], Any]:
    """Returns what builds a model of timm with random weights."""
    timm = _library("timm")
    _check_known(target.partition(".")[0], "timm", timm.list_models())
    return partial(timm.create_model, target, pretrained=False)


_LIBRARIES: dict[str, Callable[[str], Callable[[], Any]]] = {"torchvision": _torchvision, "timm": _timm}


def _library(package: str, submodule: str = "") -> Any:
    """Returns a library of models, or one of its modules."""
    try:
        library = importlib.import_module(package)
        return importlib.import_module(f"{package}.{submodule}") if submodule else library
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            raise InputError(f"{package} is not installed", f"Install it with `pip install {package}`") from error
        what = f"{package} cannot be imported: {_said(error)}"
        fix = f"Install the release of {package} that was built for torch {torch.__version__}: `pip install --force-reinstall {package}`"
        raise InputError(what, fix) from error


def _check_known(target: str, package: str, known: Iterable[str]) -> None:
    """Raises unless a library has a model of that name."""
    names = list(known)
    if target not in names:
        listing = f"{package}.models.list_models()" if package == "torchvision" else f"{package}.list_models()"
        raise InputError(f"{package} has no model called {target!r}{_hint(target, names)}", f"See {listing}")


def _candidates(module: ModuleType) -> list[str]:
    """Returns the public names in a module that may give a model; what it imported from elsewhere stands last."""
    names = [n for n, value in vars(module).items() if not n.startswith("_") and (callable(value) or isinstance(value, nn.Module))]
    return sorted(names, key=lambda n: getattr(vars(module)[n], "__module__", "") != module.__name__)


def _listed(names: list[str], most: int = 5) -> str:
    """Returns a phrase with the first few names."""
    return f"It has {', '.join(names[:most])}{' and others' if len(names) > most else ''}" if names else "It defines no callable"


def _hint(name: str, known: Iterable[str]) -> str:
    """Returns the suggestion of the nearest known name in parentheses, or nothing."""
    suggestion = nearest(name, known)
    return f" ({suggestion})" if suggestion else ""


def _said(error: BaseException) -> str:
    """Returns class and message of an error from elsewhere, in one line and without a final period."""
    return " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".:")
