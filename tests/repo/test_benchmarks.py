"""The benchmarks run: each script, at tiny sizes, so that none of them rots."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

import pytest
import torch

import truemask as tm
from truemask.backends.native.library import missing
from truemask.benchmarking.timing import race, timing, turns
from truemask.benchmarking.workloads import document_lengths, race_masks

Script = Callable[[str], ModuleType]
FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script() -> Iterator[Script]:
    """A file of the folder, imported as it is when it runs as a script."""
    sys.path.insert(0, str(FOLDER))
    yield import_module
    sys.path.remove(str(FOLDER))


PEERS = "x-transformers is not installed (the extra `peers` has it)"
kernel = pytest.mark.skipif(bool(missing()), reason=f"the move is whoever installs a C++ compiler: {missing()}")


@pytest.mark.parametrize(
    "name",
    [
        "plan",
        "attend",
        "costs",
        "choices",
        pytest.param("soak", marks=kernel),
        "train",
        "huggingface",
        "soak_use",
        "decode",
        "speculate",
        "endless",
    ],
)
def test_every_script_runs_and_writes_its_numbers(script: Script, name: str, tmp_path: Path) -> None:
    if name in ("train", "soak_use", "decode"):
        pytest.importorskip("x_transformers", reason=PEERS)
    if name in ("huggingface", "soak_use", "decode", "speculate", "endless"):
        pytest.importorskip("transformers", reason="transformers is not installed (the extra `models` has it)")
    file = tmp_path / "numbers.json"
    text = script(name).main(["--quick", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["machine"] in text
    assert f"torch {torch.__version__}" in report["machine"]
    for table in report["tables"]:
        assert table["title"] in text
        assert table["rows"]
        assert table["numbers"]


def test_the_page_is_written_from_what_the_scripts_print(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = script("report")
    for name in ("plan", "attend", "soak", "train", "huggingface", "decode", "speculate", "endless"):
        monkeypatch.setattr(script(name), "main", lambda wanted, name=name: f"{name} {' '.join(wanted)}")
    page, kept = tmp_path / "page.md", tmp_path / "kept"
    kept.mkdir()
    (kept / "1-attend.txt").write_text("as it was before the interruption")
    report.main(["--page", str(page), "--quick", "--resume", str(kept)])
    assert "```text\n$ python benchmarks/plan.py\nplan --quick\n```" in page.read_text()
    assert "$ python benchmarks/attend.py\nas it was before the interruption\n```" in page.read_text()
    assert (kept / "0-plan.txt").read_text() == "plan --quick"


def test_every_script_is_on_the_page(script: Script) -> None:
    report = script("report")
    page = report.HEAD + " ".join(Path(str(made.__file__)).name for made, _ in report.SECTIONS.values())
    for path in FOLDER.glob("*.py"):
        if "__main__" in path.read_text(encoding="utf-8"):
            assert path.name in page or path.name == "report.py", path


def test_a_case_follows_from_its_number(script: Script) -> None:
    drawn_case = script("soak_cases").drawn_case
    seen: set[str] = set()
    for index in range(12):
        case, again = drawn_case(3, index), drawn_case(3, index)
        assert str(case) == str(again)
        for name in ("q", "k", "v", "dout", "dlse"):
            torch.testing.assert_close(getattr(case, name), getattr(again, name), rtol=0, atol=0, equal_nan=True)
        seen.add(str(case))
    assert len(seen) == 12


@kernel
@pytest.mark.parametrize(("name", "words"), [("out", "out: off by"), ("dk", "dk: 1 of")])
def test_a_wrong_kernel_is_noticed(
    script: Script, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    soak, check = script("soak"), script("soak_check")
    right = check.results

    def wrong(case: Any, backend: str, tensors: Any) -> Any:
        found = right(case, backend, tensors)
        if backend == "native" and name in found:
            found[name] = found[name].clone()
            found[name].flatten()[-1] = 1e3 if name == "out" else torch.nan
        return found

    monkeypatch.setattr(check, "results", wrong)
    text, well = soak.soaked(["--seed", "5", "--cases", "6"])
    assert not well
    command = next(line for line in text.splitlines() if line.startswith("python benchmarks/soak.py --seed 5 --only"))
    assert words in capsys.readouterr().err
    monkeypatch.undo()
    assert soak.soaked(command.split()[2:6])[1]


@pytest.mark.parametrize("flash", [False, True])
def test_both_train_on_the_same_pairs(script: Script, flash: bool) -> None:
    pytest.importorskip("x_transformers", reason=PEERS)
    from x_transformers.attend import Attend

    train = script("train")
    n, seen = train.PAST + 31, []
    net = train.model(train.FLASH if flash else train.PLAIN, train.WINDOW)
    for module in net.modules():
        if isinstance(module, Attend):
            assert (module.causal, module.flash) == (True, flash)
            module.register_forward_pre_hook(lambda _, args, given: seen.append(given["mask"]), with_kwargs=True)
    net(train.tokens(n)[:, :-1])
    pairs = tm.causal & train.MASKS[train.WINDOW][0]
    assert str(pairs) == train.WINDOW
    assert len(seen) == train.SHAPE["depth"]
    for mask in seen:
        assert torch.equal(mask.tril(), pairs.to_dense(n))


def test_training_says_who_ran_out_of_memory_or_time(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    train = script("train")
    given = argparse.Namespace(quick=False, limit=5.0)
    answers = iter([train.Alone([3.0], 4e8), train.Alone([7.0], 9e8)])
    printed = lambda *_, **__: subprocess.CompletedProcess([], 0, json.dumps(next(answers)), "")  # noqa: E731
    monkeypatch.setattr(subprocess, "run", printed)
    assert train.steps_alone(train.OURS, train.CAUSAL, 8, given) == ([3.0], 4e8, "")
    assert train.steps_alone(train.OURS, train.CAUSAL, 8, given).failed == "over 5 s"

    def without_memory() -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")

    monkeypatch.setattr(train, "training", lambda *_: without_memory)
    assert train.steps_here(train.OURS, train.CAUSAL, 8) == ([], None, train.OUT_OF_MEMORY)
    able, unable = train.Found(timing([2.0]), 512.0, 4e8, ""), train.Found(None, 0.0, None, train.OUT_OF_MEMORY)
    found = {train.PLAIN: unable, train.FLASH: able._replace(speed=64.0, peak=8e8), train.OURS: able}
    assert train.judged_speed(train.WINDOW, 8192, found) == ("8.00 x", "6.0 x", "met")
    assert train.judged_memory(train.WINDOW, 8192, found) == ("0.50", "0.33", "MISSED")
    found[train.FLASH] = unable
    assert train.judged_speed(train.WINDOW, 1024, found) == ("-", "", "")


def test_a_picture_names_its_lines(script: Script, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (the extra `plot` has it)")
    curves = script("curves")
    line = curves.Line("ours", [8, 16, 32], [100.0, 90.0, 80.0], "#0072B2")
    early = curves.Line("theirs", [8, 16], [50.0, 10.0], "#b4531a", True, "then out of memory")
    for name in ("a.svg", "b.svg", "c.png"):
        curves.draw([line, early], "speed", "tokens", tmp_path / name)
    text = (tmp_path / "a.svg").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.svg").read_text(encoding="utf-8")
    assert all(words in text for words in ("ours", "theirs", "then out of memory", "speed"))
    assert (tmp_path / "c.png").stat().st_size > 1000


def test_a_row_is_shown_as_soon_as_it_is_measured() -> None:
    """Into a pipe, too: what ends the process here loses all that waits to be written."""
    program = "import harness, os; harness.Table('t', ('a', 'b')).add('x', '1'); os._exit(0)"
    result = subprocess.run([sys.executable, "-c", program], cwd=FOLDER, check=True, capture_output=True, text=True)
    assert result.stdout == "> x | 1\n"


def test_no_row_is_begun_when_the_minutes_are_over(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = script("attend")
    late = iter([False] * 4)  # asked before a size, a direction and each row
    monkeypatch.setattr(attend, "is_late", lambda given: next(late, True))
    text = attend.main(["--quick", "--minutes", "3"])
    assert "; 7 rows were not measured: 3 minutes were over" in text
    assert text.count("predicted from") == 1, "nor another table"


def test_a_peak_says_what_it_is_of(script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what products of bf16 are made of, which is not told by the instruction set: pairs are AMD's alone."""
    peers = script("attend_peers")
    monkeypatch.setattr(peers, "missing", lambda: "")
    monkeypatch.setattr(peers.library, "peak", lambda seconds, halves: 2.0 if halves else 1.0)
    for made_of, words in (("floats", "multiply-adds"), ("pairs", "pairs of bf16"), ("tiles", "products of tiles")):
        monkeypatch.setattr(peers.library, "products_of_bf16", lambda made_of=made_of: made_of)
        assert words in peers.peak("bf16", True).source
        assert "multiply-adds" in peers.peak("fp32", True).source


def test_random_expressions_mean_what_de_morgan_says(script: Script) -> None:
    masks = script("bench_masks")
    for seed in range(5):
        drawn = masks.Expression.drawn(Random(seed), 211, 10, 13)
        first, other = drawn.mask(), drawn.rewritten()
        assert first == drawn.mask()
        assert first != other
        assert torch.equal(first.to_dense(211), other.to_dense(211))
    assert len({repr(mask) for mask in masks.random_masks(307, 3)}) == 3


def test_bars_and_times_are_read_off(script: Script) -> None:
    harness = script("harness")
    assert harness.verdict(1.0, 2.0) == "met"
    assert harness.verdict(1.0, 2.0, at_least=True) == "MISSED"
    assert [harness.ms(seconds) for seconds in (0.000123, 0.01234, 1.234)] == ["0.123", "12.3", "1234"]


@pytest.mark.timing
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_the_peak_of_a_process_of_its_own(script: Script) -> None:
    harness = script("harness")
    program = "import harness, torch; print(harness.peak_beyond(lambda: torch.ones(200_000_000, dtype=torch.uint8)))"
    result = subprocess.run([sys.executable, "-c", program], cwd=FOLDER, check=True, capture_output=True, text=True)
    assert 190e6 < int(result.stdout) < 250e6
    assert harness.peak_elsewhere(str(FOLDER / "plan.py"), "causal.packed(lengths)") < 500e6


def test_contestants_take_turns() -> None:
    ran: list[str] = []
    contestants = {name: lambda name=name: ran.append(name) for name in "abc"}
    found = race(contestants, 0.0, least=3)
    assert "".join(ran) == "abc" + "cba" + "abc" + "cba"  # one round warms up; nobody always follows the same rival
    assert {name: timing.runs for name, timing in found.items()} == dict.fromkeys("abc", 3)


def test_the_hopeless_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"fast": 0.1, "slow": 5.0}
    monkeypatch.setattr("truemask.benchmarking.timing.clock", lambda run: seconds[run()])
    runs = {name: lambda name=name: name for name in seconds}
    assert list(turns(runs, 0.0, least=2, outsiders=["slow"])) == [("slow", 5.0), ("fast", 0.1), ("fast", 0.1)]
    told = list(turns(runs, 0.0, least=2))
    assert told.count(("slow", 5.0)) == 2, "a first run that took long counts"


def test_a_timing_has_quartiles() -> None:
    found = timing([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (found.median, found.low, found.high, found.least, found.runs) == (3.0, 2.0, 4.0, 1.0, 5)
    assert found.spread == pytest.approx(1 / 3)
    assert timing([7.0])[:3] == (7.0, 7.0, 7.0)


def test_race_masks_hold_at_their_length() -> None:
    for n in (97, 1009):
        assert sum(document_lengths(n)) == n
        for name, mask in race_masks(n).items():
            assert 0 < mask.density(n) <= 1, name
