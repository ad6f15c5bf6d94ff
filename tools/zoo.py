"""Measures tracing, pruning, training and export on zoos of networks, one process per network.

    python tools/zoo.py                                   # all three zoos; finished networks are skipped when run again
    python tools/zoo.py --zoo transformers timm --jobs 2
    python tools/zoo.py --only resnet50 timm:vgg11 --no-resume
    python tools/zoo.py --list --zoo timm                 # names only
    python tools/zoo.py --refresh-timm                    # find the smallest network of every module of timm anew (minutes)

torchvision: every registered network but the quantized ones. timm: the smallest of every module that registers networks. transformers:
small configurations of twenty-five architectures. Each network gets random weights with non-trivial statistics, loses half of every
group's channels by L1, and is compared with the masked network. The results file holds one JSON object per line and is replaced as a
whole after each network.

Exit code: 0; 1 where the networks miss what is required of them, see the last table; 2 where the zoo could not be run.
"""

# ruff: noqa: PLC0415 - before the environment is entered there is nothing but the standard library

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NoReturn

from _environment import INTERRUPTED, ROOT, enter

sys.path.insert(0, str(ROOT))

ZOOS = ("torchvision", "timm", "transformers")
FULL_SIZE, FULL_SIZES = 224, {"torchvision:inception_v3": 299}
# What makes two results comparable; a result for other settings does not count as finished.
SETTINGS = ("dtype", "sparsity", "size", "batch", "threads", "seed")

Record = dict[str, Any]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Returns the options."""
    parser = argparse.ArgumentParser(prog="zoo.py", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--zoo", nargs="+", choices=ZOOS, default=list(ZOOS), help="which zoos (default all)")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="these networks, as resnet50 or torchvision:resnet50")
    parser.add_argument("--list", action="store_true", help="print the names of the networks, and measure nothing")
    parser.add_argument("--refresh-timm", action="store_true", help="find the smallest networks of timm anew, and measure nothing")
    parser.add_argument("--jobs", type=int, default=1, help="networks at a time (default 1, as times are measured)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds per network (default 120)")
    parser.add_argument("--out", type=Path, default=Path("zoo.json"), help="results file, JSON lines (default zoo.json)")
    parser.add_argument("--resume", action=argparse.BooleanOptionalAction, default=True, help="skip networks that the file has finished")
    parser.add_argument("--retry", action="store_true", help="with --resume, measure again those that missed a threshold")
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64")
    parser.add_argument("--sparsity", type=float, default=0.5, help="share of every group's channels to remove (default 0.5)")
    parser.add_argument("--full-size", action="store_true", help="torchvision: images of 224 pixels (299 for inception_v3)")
    parser.add_argument("--batch", type=int, default=2, help="examples per batch (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per network (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, statistics and permutations")
    parser.add_argument("--worker", metavar="NAME", help="measure one network in this process and print one line of JSON")
    parser.add_argument("--partial", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for option, allowed in (("jobs", options.jobs >= 1), ("limit", options.limit > 0), ("sparsity", 0 <= options.sparsity < 1)):
        if not allowed:
            parser.error(f"--{option} {getattr(options, option)} is out of range")
    return options


def chosen(options: argparse.Namespace) -> list[str]:
    """Returns the full names, "torchvision:resnet50", of the networks to measure.

    Raises:
        ValueError: a name without a zoo is in none of the lists.
    """
    from tests.support.zoo_sources import names

    if not options.only:
        return [name for zoo in options.zoo for name in names(zoo)]
    found: dict[str, None] = {}
    for name in options.only:
        known = [name] if ":" in name else [full for zoo in options.zoo for full in names(zoo) if full == f"{zoo}:{name}"]
        if not known:
            message = f"no list holds a network called {name!r}; name its zoo as well, as in timm:{name}, or see --list"
            raise ValueError(message)
        found.update(dict.fromkeys(known))
    return list(found)


def settings_of(options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Returns the fields of `tests.support.measure.Settings` for one network."""
    fields = {key: getattr(options, key) for key in SETTINGS if key != "size"}
    full = options.full_size and name.startswith("torchvision:")
    return {**fields, "name": name, "size": FULL_SIZES.get(name, FULL_SIZE) if full else None}


def work(options: argparse.Namespace) -> int:
    """Measures one network here; stdout gets the one line, whatever the libraries below print goes to stderr."""
    stdout = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from tests.support.measure import Settings, measure

    def keep(record: Record) -> None:
        if options.partial:
            replace_text(options.partial, json.dumps(record))

    record = measure(Settings(**settings_of(options, options.worker)), keep)
    with stdout:
        stdout.write(json.dumps(record, allow_nan=False) + "\n")
    return 0


class Runner:
    """Runs one process per network, each in a process group of its own, and ends the group when its time is up."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Starts nothing yet."""
        self._options = options
        self._running: set[subprocess.Popen[str]] = set()
        self._lock = threading.Lock()

    def run(self, name: str) -> Record:
        """Returns the record of one network; where its process ended early, what it had measured, and why it ended."""
        options = self._options
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            partial = Path(folder) / "partial.json"
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", name, "--partial", str(partial)]
            for key in ("dtype", "sparsity", "batch", "threads", "seed"):
                command += [f"--{key}", str(getattr(options, key))]
            command += ["--full-size"] if options.full_size else []
            out, complaint = self.communicate(command)
            record = self._read(out, partial, settings_of(options, name), complaint)
        record["wall_seconds"] = time.monotonic() - start
        return record

    def communicate(self, command: list[str]) -> tuple[str, str]:
        """Returns what the process printed and, where it did not end well, why."""
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=ROOT, start_new_session=True)
        with self._lock:
            self._running.add(process)
        try:
            out, err = process.communicate(timeout=self._options.limit)
        except subprocess.TimeoutExpired:
            kill(process)
            out, err = process.communicate()
            return out, f"time limit of {self._options.limit:g} s"
        finally:
            with self._lock:
                self._running.discard(process)
        if process.returncode == 0:
            return out, ""
        if process.returncode < 0:
            return out, f"ended by {signal.Signals(-process.returncode).name}"
        lines = [line for line in err.splitlines() if line.strip()]
        return out, lines[-1].strip() if lines else f"exit code {process.returncode}"

    @staticmethod
    def _read(out: str, partial: Path, settings: dict[str, Any], complaint: str) -> Record:
        if not complaint:
            with contextlib.suppress(IndexError, json.JSONDecodeError):
                record: Record = json.loads(out.splitlines()[-1])
                return record
            complaint = "the process printed no result"
        record = {**settings, "failures": {}, "finished": False}
        with contextlib.suppress(OSError, json.JSONDecodeError):
            record.update(json.loads(partial.read_text(encoding="utf-8")))
        record["failures"][record.get("stage") or "start"] = complaint
        return record

    def stop(self) -> None:
        """Ends all processes that still run."""
        with self._lock:
            for process in self._running:
                kill(process)


def interrupt(*_: object) -> NoReturn:
    """Ends the zoo as Ctrl-C does."""
    raise KeyboardInterrupt


def kill(process: subprocess.Popen[str]) -> None:
    """Ends a process and its group."""
    with contextlib.suppress(ProcessLookupError):
        if hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def replace_text(path: Path, text: str) -> None:
    """Writes a file under a temporary name beside it and renames it, so that no reader sees half of it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        message = f"cannot write {path}: {error.strerror}; name another file with --out"
        raise OSError(message) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Record]:
    """Returns network name -> record of a results file; nothing where there is none.

    Raises:
        ValueError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {record["name"]: record for record in records}
    except (ValueError, TypeError, KeyError) as error:
        message = f"{path} is no results file of this tool ({error}); name another with --out, or delete it"
        raise ValueError(message) from error


def source_digest() -> str:
    """Returns a digest of the package's source, to tell results of one state of the code from those of another."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "graphprune").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def main(options: argparse.Namespace) -> int:
    """Does what the options say, and returns the exit code."""
    from tests.support.zoo_report import console, print_report

    try:
        names = chosen(options)
        if options.list:
            print("\n".join(names))
            return 0
        records = load(options.out)
        replace_text(options.out, "".join(json.dumps(record) + "\n" for record in records.values()))
    except (OSError, ValueError) as error:
        console().print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        return 2
    if not measure_all(options, names, records):
        return INTERRUPTED
    return 0 if print_report([records[name] for name in names]) else 1


def measure_all(options: argparse.Namespace, names: list[str], records: dict[str, Record]) -> bool:
    """Measures the networks that are not finished, and adds their records; returns False where Ctrl-C ended it."""
    from tests.support.zoo_report import console
    from tests.support.zoo_verdicts import faults

    def is_done(name: str) -> bool:
        record = records.get(name, {})
        same = all(record.get(key) == value for key, value in settings_of(options, name).items())
        return bool(options.resume and same and record.get("finished") and not (options.retry and faults(record)))

    todo = [name for name in names if not is_done(name)]
    screen = console()
    screen.print(f"{len(names)} networks, {len(names) - len(todo)} finished before, results in {options.out}")
    source = source_digest()
    older = [name for name in names if name not in todo and records[name].get("source") != source]
    if older:
        screen.print(f"{len(older)} of them were measured on another state of graphprune; --no-resume measures all again", style="yellow")
    runner = Runner(options)
    previous = signal.signal(signal.SIGTERM, interrupt)  # else the workers would outlive this process
    pool = ThreadPoolExecutor(options.jobs)
    try:
        jobs = {pool.submit(runner.run, name): name for name in todo}
        for number, job in enumerate(as_completed(jobs), 1):
            record = records[jobs[job]] = {**job.result(), "source": source}
            replace_text(options.out, "".join(json.dumps(entry) + "\n" for entry in records.values()))
            verdict = "; ".join(f"{cause}: {detail}" for cause, detail in faults(record)) or "passes"
            screen.print(f"[{number}/{len(todo)}] {jobs[job]} {record['wall_seconds']:.1f} s, {verdict}", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        screen.print("interrupted; run again to go on", style="yellow")
        return False
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        runner.stop()
        signal.signal(signal.SIGTERM, previous)
    return True


def refresh_timm() -> int:
    """Rewrites the list of timm's smallest networks."""
    from tests.support.zoo_timm import refresh

    refresh(lambda line: print(line, flush=True))
    return 0


if __name__ == "__main__":
    if not all(importlib.util.find_spec(name) for name in ("torch", "torchvision", "timm", "transformers", "rich")):
        enter("dev")
    parsed = parse()
    sys.exit(work(parsed) if parsed.worker else refresh_timm() if parsed.refresh_timm else main(parsed))
