"""The benchmarks run: each script, at tiny sizes, so that none of them rots."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from random import Random
from types import ModuleType

import pytest
import torch

from truemask.cli.races import document_lengths, race_masks
from truemask.cli.timing import race, timing, turns

Script = Callable[[str], ModuleType]
FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def script() -> Iterator[Script]:
    """A file of the folder, imported as it is when it runs as a script."""
    sys.path.insert(0, str(FOLDER))
    yield import_module
    sys.path.remove(str(FOLDER))


@pytest.mark.parametrize("name", ["plan", "attend", "costs"])
def test_every_script_runs_and_writes_its_numbers(script: Script, name: str, tmp_path: Path) -> None:
    file = tmp_path / "numbers.json"
    text = script(name).main(["--quick", "--json", str(file)])
    found = json.loads(file.read_text())
    assert found["machine"] in text
    assert f"torch {torch.__version__}" in found["machine"]
    for table in found["tables"]:
        assert table["title"] in text
        assert table["rows"]
        assert table["numbers"]


def test_the_page_is_written_from_what_the_scripts_print(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = script("report")
    for name in ("plan", "attend"):
        monkeypatch.setattr(script(name), "main", lambda wanted, name=name: f"{name} {' '.join(wanted)}")
    report.main(["--page", str(tmp_path / "page.md"), "--quick"])
    page = (tmp_path / "page.md").read_text()
    assert "```text\nplan --quick\n```" in page
    assert "```text\nattend --quick\n```" in page


def test_every_script_is_on_the_page(script: Script) -> None:
    page = script("report").HEAD
    for path in FOLDER.glob("*.py"):
        assert path.name in page or path.name in ("report.py", "harness.py", "bench_masks.py"), path


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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_the_peak_of_a_process_of_its_own(script: Script) -> None:
    harness = script("harness")
    assert 190e6 < harness.peak_beyond(lambda: torch.ones(200_000_000, dtype=torch.uint8)) < 250e6
    assert harness.peak_elsewhere(str(FOLDER / "plan.py"), "causal.packed(lengths)") < 500e6


def test_contestants_take_turns() -> None:
    ran: list[str] = []
    contestants = {name: lambda name=name: ran.append(name) for name in "abc"}
    found = race(contestants, 0.0, least=3)
    assert "".join(ran) == "abc" + "cba" + "abc" + "cba"  # one round warms up; nobody always follows the same rival
    assert {name: timing.runs for name, timing in found.items()} == dict.fromkeys("abc", 3)


def test_the_hopeless_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"fast": 0.1, "slow": 5.0}
    monkeypatch.setattr("truemask.cli.timing.clock", lambda run: seconds[run()])
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
