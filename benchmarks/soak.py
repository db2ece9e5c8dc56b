"""The native kernel on thousands of random calls: masks, sizes, dtypes, layouts, options, planted NaN, threads.

    python benchmarks/soak.py [--cases 10000] [--seed 0] [--isa NAME] [--in-parts] [--quick] [--json FILE]
    python benchmarks/soak.py --seed 0 --only INDEX

Every case follows from the seed and its index alone. It runs forward and backward with two numbers of threads, whose
results must have the same bits, and is held to `reference` in fp64 within what rounding explains (`soak_check.py` says
how much that is). *worst* is the largest error as a share of what is allowed. Where SDPA can compute the case, its
error in the same dtype is taken too (law 10). `--only` runs one case again and tells all about it. The exit status is 1
if a case failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness import Table, finish, options, verdict
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from soak_cases import Case, drawn_case
from soak_check import Fault, Verdict, checked

import truemask as tm
from truemask.backends.isa import ISAS, VARIABLE
from truemask.backends.native.library import isa, missing
from truemask.backends.native.parts import forced
from truemask.cli.console import make_console, plain

QUICK_CASES, PLAIN_EVERY = 25, 10.0  # seconds between lines where there is no terminal
BAR_ERROR = 1.5  # law 10
AT = "TRUEMASK_SOAK_AT"  # in the environment: the file in which the case stands that runs
RESULTS = ("out", "lse", "dq", "dk", "dv", "dsinks")


@dataclass
class Tally:
    """What became of some cases."""

    cases: int = 0
    failures: int = 0
    worst: float = 0.0
    seconds: float = 0.0

    def add(self, found: Verdict, seconds: float) -> None:
        """One more case."""
        self.cases += 1
        self.failures += bool(found.faults)
        self.worst = max([self.worst, *found.shares.values()])
        self.seconds += seconds


@dataclass
class Soak:
    """A run: what is counted, and what failed."""

    given: argparse.Namespace
    tallies: dict[str, dict[str, Tally]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(Tally)))
    shares: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    beside: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0, 0.0]))
    failed: dict[int, list[Fault]] = field(default_factory=dict)

    def run(self, index: int) -> tuple[Case, Verdict]:
        """One case, counted."""
        began = time.perf_counter()
        case = drawn_case(self.given.seed, index)
        try:
            found = checked(case)
        except Exception as error:
            found = Verdict([Fault(type(error).__name__, f"{error}\n{traceback.format_exc(limit=-3)}")], {}, {})
        self._count(case, found, time.perf_counter() - began)
        if found.faults:
            self.failed[index] = found.faults
        return case, found

    def _count(self, case: Case, found: Verdict, seconds: float) -> None:
        groups = {"dtype": (case.dtype,), "option": case.tags, "layout": case.layouts, "word": case.words}
        for group, names in groups.items():
            for name in ("all", *names) if group == "dtype" else names:
                self.tallies[group][name].add(found, seconds)
        for name, share in found.shares.items():
            self.shares[case.dtype, name] = max(self.shares[case.dtype, name], share)
        for name, squares in found.beside.items():
            both = self.beside[case.dtype, name]
            for i, square in enumerate((*squares, 1.0)):
                both[i] += square

    def repeat(self, index: int) -> str:
        """The command that runs one case again."""
        chosen = f" --isa {os.environ[VARIABLE]}" if os.environ.get(VARIABLE) else ""
        chosen += " --in-parts" if self.given.in_parts else ""
        return f"python benchmarks/soak.py --seed {self.given.seed} --only {index}{chosen}"


# -- tables ------------------------------------------------------------------------------------------------------------


def tables(soak: Soak) -> list[Table]:
    """What was run, by dtype, option and word; errors; failures."""
    given = soak.given
    title = f"Soak: {given.cases:,} random calls of the native kernel ({isa()}), seed {given.seed}"
    titles = {"dtype": title, "option": "By size and option", "layout": "By layout", "word": "By word of the mask"}
    return [*(_counts(titles[group], soak.tallies[group]) for group in titles), errors(soak), failures(soak)]


def _counts(title: str, tallies: dict[str, Tally]) -> Table:
    table = Table(title, ("", "cases", "failures", "worst", "ms a case", "seconds"))
    for name, tally in sorted(tallies.items()):
        each = tally.seconds / tally.cases * 1e3
        table.rows.append(
            (name, f"{tally.cases:,}", f"{tally.failures}", f"{tally.worst:.2f}", f"{each:.0f}", f"{tally.seconds:.0f}")
        )
        table.numbers.append({"name": name, **vars(tally)})
    return table


def errors(soak: Soak) -> Table:
    """The largest errors by dtype and result, and how they compare with SDPA's."""
    table = Table("Errors", ("dtype, result", "worst", "of SDPA's error, rms", "cases", "bar", ""))
    for (dtype, name), worst in sorted(soak.shares.items(), key=lambda item: (item[0][0], RESULTS.index(item[0][1]))):
        ours, theirs, cases = soak.beside.get((dtype, name), (0.0, 0.0, 0.0))
        ratio = (ours / theirs) ** 0.5 if theirs else None
        judged = (
            ("", "", "", "")
            if ratio is None
            else (f"{ratio:.2f}", f"{cases:.0f}", f"{BAR_ERROR}", verdict(ratio, BAR_ERROR))
        )
        table.rows.append((f"{dtype} {name}", f"{worst:.2f}", *judged))
        table.numbers.append({"dtype": dtype, "result": name, "worst": worst, "of_sdpa": ratio, "cases": cases})
    return table


def failures(soak: Soak) -> Table:
    """Each failure with the command that repeats it."""
    table = Table("Failures", ("command", "result", "what"))
    for index, faults in soak.failed.items():
        for fault in faults:
            table.rows.append((soak.repeat(index), fault.what, fault.how.splitlines()[0]))
            table.numbers.append({"index": index, "result": fault.what, "what": fault.how})
    if not soak.failed:
        table.rows.append(("none", "", ""))
        table.numbers.append({})
    return table


# -- the run -----------------------------------------------------------------------------------------------------------


def progress(indices: Sequence[int], soak: Soak) -> Iterator[int]:
    """The indices with a bar, or with a line now and then where there is no terminal."""
    console = make_console(stderr=True)
    if not console.is_terminal:
        said = time.monotonic()
        for i, index in enumerate(indices):
            if time.monotonic() - said > PLAIN_EVERY:
                said = time.monotonic()
                plain(console, f"{i:,} of {len(indices):,} cases, {len(soak.failed)} failed")
            yield index
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[failed]} failed"), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=len(indices), failed=0)
        for index in indices:
            yield index
            bar.update(task, advance=1, failed=len(soak.failed))


def told(soak: Soak, case: Case, found: Verdict) -> str:
    """All about one case."""
    shares = ", ".join(f"{name} {share:.3f}" for name, share in found.shares.items())
    faults = [f"{fault.what}: {fault.how}" for fault in found.faults]
    return "\n".join([soak.repeat(case.index), str(case), f"errors as shares of what is allowed: {shares}", *faults])


def soaked(arguments: Sequence[str] | None = None) -> tuple[str, bool]:
    """Run the cases; the text, and whether all went well."""
    given = options(
        __doc__,
        arguments,
        cases={"type": int, "default": 10_000, "metavar": "N"},
        seed={"type": int, "default": 0, "metavar": "N"},
        only={"type": int, "metavar": "INDEX", "help": "run this case alone and tell all about it"},
        isa={"choices": ISAS, "help": "the instruction set of the kernel"},
        in_parts={"action": "store_true", "help": "fp32 and fp16 as sums of bf16, where there are tiles"},
    )
    if given.isa:
        os.environ[VARIABLE] = given.isa  # read when the first plan asks for the library
    if missing():
        print(text := f"there is nothing to soak: {missing()}")
        return text, False
    warnings.simplefilter("ignore", tm.ConventionWarning)  # masks of rectangles are drawn on purpose
    given.cases = min(given.cases, QUICK_CASES) if given.quick else given.cases
    before, soak = torch.get_num_threads(), Soak(given)
    torch.set_num_threads(1)  # the reference and all that is around the kernel: one core is enough
    try:
        with forced(given.in_parts or None):
            return _all(soak)
    finally:
        torch.set_num_threads(before)


def _all(soak: Soak) -> tuple[str, bool]:
    given = soak.given
    if given.only is not None:
        text = told(soak, *_noted(soak, given.only))
        print(text)
        return text, not soak.failed
    for index in progress(range(given.cases), soak):
        case, found = _noted(soak, index)
        if found.faults:
            plain(make_console(stderr=True), f"FAILED {told(soak, case, found)}\n")
    return finish(tables(soak), given), not soak.failed


def _noted(soak: Soak, index: int) -> tuple[Case, Verdict]:
    """Run the case, written down beforehand for whoever watches."""
    if AT in os.environ:
        Path(os.environ[AT]).write_text(soak.repeat(index))
    return soak.run(index)


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the cases; the text."""
    return soaked(arguments)[0]


def watched() -> int:
    """The command in a process of its own; its exit status, and the case at which it died if it did."""
    with tempfile.NamedTemporaryFile() as at:
        done = subprocess.run([sys.executable, *sys.argv], env={**os.environ, AT: at.name}, check=False)
        if done.returncode < 0:
            died = signal.Signals(-done.returncode).name
            print(f"DIED of {died} in, or by what was broken before:\n{Path(at.name).read_text()}", file=sys.stderr)
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(not soaked()[1] if AT in os.environ else watched())
