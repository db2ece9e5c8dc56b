"""Where the costs measured on this machine are kept: one JSON file in the user's cache, with an entry for each machine.

`truemask bench --calibrate` writes it, `backends/costs/model.py` reads it once in a process, for the first plan.
The environment's `TRUEMASK_COSTS` names another file, is `off`, or names a table that ships (`avx2`, `avx512`, `amx`).
An entry holds the native kernel's costs for each instruction set that was measured: `{"native": {"avx2": {...}}}`.
Nothing here measures anything.
"""

from __future__ import annotations

import json
import os
import platform
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from truemask.backends.costs.shipped import TORCH
from truemask.errors import TruemaskError

VARIABLE, FORMAT = "TRUEMASK_COSTS", 3
OFF = ("off", *TORCH)  # no file: the shipped costs that fit, or those of one name
AGAIN = "`truemask bench --calibrate` measures this machine"


class Machine(NamedTuple):
    """What measured costs belong to: they mean nothing on another processor, number of threads or torch."""

    processor: str
    threads: int
    torch: str

    def __str__(self) -> str:
        return f"{self.processor}, {self.threads} threads, torch {self.torch}"


class Entry(NamedTuple):
    """Costs as they were stored, unchecked but for their form, and the day on which they were measured."""

    machine: Machine
    measured: str
    costs: dict[str, Any]


def this_machine() -> Machine:
    """The processor, the threads that torch uses now, and torch."""
    return Machine(processor(), torch.get_num_threads(), str(torch.__version__))


@cache
def processor() -> str:
    """The processor's name and the instructions that torch uses of it; Linux keeps the name in a file."""
    info, name = Path("/proc/cpuinfo"), platform.processor() or platform.machine()
    if info.is_file():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def costs_file() -> Path | None:
    """The file, whether it is there or not; None if it is switched off."""
    named = os.environ.get(VARIABLE, "")
    if named:
        return None if named in OFF else Path(named)
    folder = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(folder) if folder else Path.home() / ".cache") / "truemask" / "costs.json"


def read_entries() -> list[Entry]:
    """What the file holds; nothing if there is none, nothing and a warning if it cannot be understood."""
    try:
        file = costs_file()
        if file is None or not file.is_file():
            return []
        return [_entry(entry) for entry in _checked(json.loads(file.read_text(encoding="utf-8")))]
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        complain(f"cannot be used ({type(error).__name__}: {error})")
        return []


def complain(reason: str) -> None:
    """Warn that the file is left aside, with the way out."""
    warnings.warn(
        f"the measured costs in {costs_file()} {reason}: plans go by the shipped ones. {AGAIN} and writes the file "
        f"anew; {VARIABLE}=off silences this",
        UserWarning,
        stacklevel=2,
    )


def store(costs: dict[str, Any]) -> Path:
    """Keep the costs of this machine beside those of others, whole or not at all; the file that was written.

    What was measured of the native kernel with other instruction sets stays.
    """
    file = writable_file()
    machine = this_machine()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a broken file is replaced
        before = read_entries()
    mine = next((entry.costs.get("native") for entry in before if entry.machine == machine), None)
    natives = {**(mine if isinstance(mine, dict) else {}), **costs.get("native", {})}
    entry = Entry(machine, time.strftime("%Y-%m-%d"), {**costs, "native": natives})
    entries = [*(entry for entry in before if entry.machine != machine), entry]
    written = {"format": FORMAT, "entries": [{**e._asdict(), "machine": e.machine._asdict()} for e in entries]}
    part = file.with_name(f"{file.name}.{os.getpid()}.part")
    part.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    part.replace(file)
    return file


def writable_file() -> Path:
    """The file, if costs can be kept there: its folder is made."""
    file = costs_file()
    if file is None:
        raise TruemaskError(
            f"{VARIABLE}={os.environ[VARIABLE]} says that no costs are kept: unset it, or give it the path of a file"
        )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        writable = os.access(file.parent, os.W_OK) and not file.is_dir()
    except OSError:
        writable = False
    if not writable:
        raise TruemaskError(f"costs cannot be kept in {file}: {VARIABLE}=FILE names another place")
    return file


def _checked(content: Any) -> list[Any]:
    number = content.get("format") if isinstance(content, dict) else None
    if number in range(1, FORMAT):
        raise ValueError(f"it is in format {number}, of an earlier version; this is format {FORMAT}")
    if number != FORMAT or not isinstance(content.get("entries"), list):
        raise ValueError(f"not a file of costs in format {FORMAT}")
    return content["entries"]


def _entry(content: Any) -> Entry:
    machine = content["machine"]
    name, threads, version, day = machine["processor"], machine["threads"], machine["torch"], content["measured"]
    texts = all(isinstance(text, str) for text in (name, version, day))
    if not texts or not isinstance(threads, int) or not isinstance(content["costs"], dict):
        raise ValueError("an entry names a processor, threads, torch, a day and costs")
    return Entry(Machine(name, threads, version), day, content["costs"])
