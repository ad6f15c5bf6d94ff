"""Long runs that outlive their process: one folder, one file per kind of run, always complete.

save ──▶ temporary file, flushed to disk ──▶ renamed over the last save. Whatever moment the process dies at, the folder holds the last
complete save, and running the same command again goes on from there with the same random numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from graphprune.errors import ConfigError, FileError
from graphprune.runs.atomic import atomic, leftovers

FORMAT = 2
_KEY = "graphprune.run"
_OWN = "tensor/"
_RANDOM = "random/"
_OTHER = "Choose another folder, or delete the file to start anew"


@dataclass(frozen=True, eq=False)
class Saved:
    """What the last save of a run left.

    Attributes:
        state: plain values, as JSON gives them back (tuples are lists).
        tensors: name -> tensor, on the CPU.
    """

    state: dict[str, Any]
    tensors: dict[str, torch.Tensor]


class Run:
    """A long computation that is saved step by step and goes on where it was when it is started again.

    Args:
        folder: made if it is missing; None keeps nothing, and then `load` finds nothing.
        kind: names the file, `<kind>.safetensors`; runs of several kinds can share a folder.
        settings: what the result depends on, as plain values; a folder goes on with runs of the same settings only.

    Attributes:
        path: the file, or None.

    Raises:
        ConfigError: the kind is no file name, or a setting is not a plain value.
        FileError: the folder holds a run of this kind with other settings, or a file that is none, or cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, kind: str, settings: Mapping[str, Any]) -> None:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", kind):
            raise ConfigError(f"the kind of a run is {kind!r}", "Use letters, digits, points, hyphens and underscores")
        self.kind = kind
        self.settings: dict[str, Any] = {str(name): plain(value, f"setting {name!r}") for name, value in settings.items()}
        self.path = None if folder is None else Path(folder) / f"{kind}.safetensors"
        if self.path is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"cannot make the folder {str(self.path.parent)!r}: {error}", "Choose one that can be written to") from error
        if self.path.exists():
            self._require_mine(_read(self.path, tensors=False)[0])

    def load(self) -> Saved | None:
        """Returns the last complete save, or None where there is none; puts the random number generators where they were then.

        The generators are the global ones of torch (CPU, and CUDA where it was in use), numpy and Python.

        Raises:
            FileError: the file is damaged, or is of a run with other settings.
        """
        if self.path is None:
            return None
        for leftover in leftovers(self.path):
            leftover.unlink(missing_ok=True)
        if not self.path.exists():
            return None
        header, tensors = _read(self.path, tensors=True)
        self._require_mine(header)
        try:
            _put_random(header["random"], tensors)
            state: dict[str, Any] = header["state"]
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileError(f"the run in {str(self.path)!r} is damaged: {type(error).__name__}: {error}", _OTHER) from error
        return Saved(state, {name.removeprefix(_OWN): value for name, value in tensors.items() if name.startswith(_OWN)})

    def save(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """Replaces the last save, atomically: after a crash of the process or the machine there is either the last one or this one.

        Args:
            state: plain values: None, booleans, numbers, strings, and lists and dicts of these.
            tensors: name -> dense tensor.

        Raises:
            ConfigError: a value is not plain.
            FileError: the file cannot be written, or safetensors cannot hold a tensor.
        """
        if self.path is None:
            return
        found, arrays = _random()
        header = {
            "format": FORMAT,
            "kind": self.kind,
            "settings": self.settings,
            "state": {str(name): plain(value, f"state {name!r}") for name, value in state.items()},
            "random": found,
        }
        try:
            own = {f"{_OWN}{n}": t.detach().cpu().clone(memory_format=torch.contiguous_format) for n, t in (tensors or {}).items()}
            with atomic(self.path) as temporary:
                temporary.write_bytes(save({**own, **arrays}, {_KEY: json.dumps(header)}))
        except OSError as error:
            raise FileError(f"cannot write the run to {str(self.path)!r}: {error}", "Choose a folder that can be written to") from error
        except (KeyError, ValueError, RuntimeError, SafetensorError) as error:
            raise FileError(f"safetensors cannot hold the tensors of the run: {error}", "Give plain dense tensors") from error

    def _require_mine(self, header: Mapping[str, Any]) -> None:
        """Raises unless the file is of a run with these settings."""
        theirs: Mapping[str, Any] = header["settings"]
        for name in dict.fromkeys([*self.settings, *theirs]):
            mine, other = (side.get(name, "missing") for side in (self.settings, theirs))
            if mine != other:
                what = f"{str(self.path)!r} is of a run with other settings: {name} was {_shown(other)} and is {_shown(mine)} now"
                raise FileError(what, f"Give the same {name} to go on with that run. {_OTHER}")


def digest(values: Mapping[str, Any]) -> str:
    """Returns a SHA-256 over names, types, shapes and values of tensors, for settings to say which weights a run began with.

    Args:
        values: by name; what is no tensor is left out.
    """
    total = hashlib.sha256()
    for name, tensor in sorted((name, value) for name, value in values.items() if isinstance(value, torch.Tensor)):
        value = tensor.detach().cpu().contiguous()
        total.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
        total.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def plain(value: Any, where: str) -> Any:
    """Returns a value as JSON gives it back: tuples as lists, numpy's numbers and paths as Python's.

    Raises:
        ConfigError: it holds something else than None, booleans, numbers, strings, lists and dicts with strings as keys.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or type(value) in {bool, int, float, str}:
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{where}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: plain(item, f"{where}[{key!r}]") for key, item in value.items()}
    what = f"{where} of a run is a {type(value).__name__}{' with keys that are no strings' if isinstance(value, Mapping) else ''}"
    raise ConfigError(what, "Give plain values: None, booleans, numbers, strings, lists, and dicts with strings as keys")


def _shown(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _read(path: Path, *, tensors: bool) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns the header and, if asked for, the tensors of a file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            found = {name: file.get_tensor(name) for name in file.keys()} if tensors else {}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        raise FileError(f"cannot read a run from {str(path)!r}: {error}", _OTHER) from error
    if _KEY not in metadata:
        raise FileError(f"{str(path)!r} holds tensors but no run", _OTHER)
    header: dict[str, Any] = json.loads(metadata[_KEY])
    if header.get("format") != FORMAT:
        raise FileError(f"{str(path)!r} is of format {header.get('format')!r}, and this graphprune reads format {FORMAT}", _OTHER)
    return header, found


def _random() -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns the states of the global random number generators: plain values and arrays."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 (the global generator that users seed)
    arrays = {f"{_RANDOM}torch": torch.get_rng_state(), f"{_RANDOM}numpy": torch.from_numpy(np.asarray(keys, dtype=np.int64))}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        arrays |= {f"{_RANDOM}cuda/{index}": state for index, state in enumerate(torch.cuda.get_rng_state_all())}
    version, numbers, following = random.getstate()
    numpys = [str(name), int(position), int(has_gauss), float(gauss)]
    return {"numpy": numpys, "python": [version, list(numbers), following]}, arrays


def _put_random(found: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts the global random number generators into saved states."""
    name, position, has_gauss, gauss = found["numpy"]
    version, numbers, following = found["python"]
    keys = tensors[f"{_RANDOM}numpy"].numpy().astype(np.uint32)
    torch.set_rng_state(tensors[f"{_RANDOM}torch"])
    np.random.set_state((name, keys, position, has_gauss, gauss))  # noqa: NPY002 (the global generator that users seed)
    random.setstate((version, tuple(numbers), following))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            if f"{_RANDOM}cuda/{index}" in tensors:
                torch.cuda.set_rng_state(tensors[f"{_RANDOM}cuda/{index}"], index)
