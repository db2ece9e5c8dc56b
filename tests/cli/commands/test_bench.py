"""`truemask bench`: masks race, a calibration is stored and found again, and no file of costs can break a plan."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import truemask as tm
from truemask.attention.planning.cache import CACHE
from truemask.backends.costs import calibration_file as calibration
from truemask.backends.costs import model as costs
from truemask.backends.isa import built
from truemask.backends.registry import BACKENDS
from truemask.benchmarking import calibrate
from truemask.benchmarking.probes import Probe, Sizes, measures
from truemask.cli.app import app
from truemask.cli.commands import bench

SIZES = Sizes(7, (40, 200), 66, 97, 130, 2)
PROBE = Probe(tm.window(31), 61, 2, 16)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


@pytest.fixture
def costs_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of costs, in a folder that is not there yet; afterwards everything is as it was."""
    file = tmp_path / "deep" / "costs.json"
    monkeypatch.setenv("TRUEMASK_COSTS", str(file))
    _forget()
    yield file
    monkeypatch.undo()
    _forget()


def _forget() -> None:
    costs.forget()
    CACHE.clear()


def _stored(**changes: Any) -> dict[str, Any]:
    """The shipped costs with other numbers of sdpa, as an entry holds them."""
    numbers = {name: getattr(costs.shipped()[0], name).numbers() for name in costs.BACKENDS}
    numbers["sdpa"].update(changes)
    return numbers | {"native": {costs.isa_in_use(): numbers["native"]}}


def _with_shares(costs: dict[str, Any], share: float) -> dict[str, Any]:
    """The same with another share of full speed for few rows of sdpa, all of them."""
    paces = {
        dtype: {way: pace | dict.fromkeys(("rows1", "rows32", "rows64"), share) for way, pace in both.items()}
        for dtype, both in costs["sdpa"]["paces"].items()
    }
    return costs | {"sdpa": costs["sdpa"] | {"paces": paces}}


# -- racing ------------------------------------------------------------------------------------------------------------


def test_masks_race(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    code, out = run("causal & window(7)", "random(0.2, per_head=True)", "-n", "67", "--heads", "2", "--head-dim", "8")
    assert code == 0, out
    assert "67 tokens, 2 heads of 8, float32, forward;" in out
    assert re.search(r"^causal & window\(7\) +\d.* x +(native|sdpa|block_sparse) +\d", out, re.MULTILINE)
    assert "predicted from the shipped costs" in out


def test_five_masks_race_by_themselves_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    code, out = run("--length", "131", "--heads", "1", "--dtype", "float64", "--grad")
    assert code == 0, out
    assert len(re.findall(r"\d x +\w+ +\d", out)) == 5
    assert "float64, forward and backward" in out


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_masks_race_in_half_precision(monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    code, out = run("causal & window(7)", "-n", "67", "--heads", "2", "--head-dim", "8", "--dtype", dtype, "--grad")
    assert code == 0, out
    assert f"67 tokens, 2 heads of 8, {dtype}, forward and backward;" in out
    assert len(re.findall(r"\d x +\w+ +\d", out)) == 1


def test_a_mistake_is_a_message() -> None:
    code, out = run("windw(3)")
    assert code == 2
    assert "did you mean 'window'?" in out


# -- calibrating -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], list[str]]:
    """What calibration finds with tiny probes, and what it says meanwhile."""
    said: list[str] = []
    return calibrate.measured_costs(said.append, SIZES, 0.0), said


def test_calibration_is_stored_and_found(
    costs_file: Path, monkeypatch: pytest.MonkeyPatch, measured: tuple[dict[str, Any], list[str]]
) -> None:
    before = tm.plan(tm.causal, 67)
    assert re.search(r"predicted from the shipped costs.*; `truemask bench --calibrate`", str(before))
    found = _with_shares(measured[0], 0.8)  # those of tiny probes mean nothing
    monkeypatch.setattr(bench, "measured_costs", lambda say: found)
    code, out = run("--calibrate")
    assert code == 0, out
    assert f"stored in {costs_file}" in out.replace("\n", "")
    assert costs.table() == costs.table_of(found)
    after = tm.plan(tm.causal, 67)
    assert after.costs != before.costs
    assert re.search(r"predicted from costs measured on this machine on \d{4}-\d\d-\d\d", str(after))
    assert not list(costs_file.parent.glob("*.part"))


def test_every_constant_is_measured(measured: tuple[dict[str, Any], list[str]]) -> None:
    found, said = measured
    assert re.match(r"1 of \d+: 1 x 7 tokens, 1 heads of 8, fp32, forward, causal", said[0])
    assert said[-1].startswith(f"{len(said)} of {len(said)}: ")
    assert costs.table_of(json.loads(json.dumps(found))) == costs.table_of(found)
    shown = {(name, path) for one in measures(SIZES) for name, paths in one.shows.items() for path in paths}
    start = costs.shipped()[0]
    for name in costs.BACKENDS:
        paths = {path for path in getattr(start, name).flat() if not path.startswith("native.fp64")}
        apart = {path for path in paths if path in ("threads", "lanes", "peak", "join", "copy")}  # by themselves
        few = () if name == "sdpa" else ("rows1", "rows32", "rows64", *(["step"] if name == "reference" else []))
        wanted = {path for path in paths - apart if path.split(".")[-1] not in few}
        assert wanted <= {path for backend, path in shown if backend == name}, name


def test_gathering_is_measured(measured: tuple[dict[str, Any], list[str]]) -> None:
    assert measured[0]["block_sparse"]["copy"] != costs.shipped()[0].block_sparse.copy
    assert calibrate.copy_rate(0.0) > 1e7


def test_tiles_are_calibrated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a processor with AMX, in both dtypes; and what was measured is no longer doubted."""
    if "amx_emulated" not in built():
        pytest.skip("the kernel is missing here: it was not built")
    monkeypatch.setenv("TRUEMASK_ISA", "amx_emulated")
    said: list[str] = []
    found = calibrate.measured_costs(said.append, SIZES, 0.0, ("native",))
    assert list(found["native"]) == ["amx_emulated"]
    assert any("fp32, forward and backward" in text for text in said)
    assert any("bf16, forward and backward" in text for text in said)
    table, start = costs.table_of(_stored() | found), costs.shipped()[0]
    assert not table.unmeasured
    for dtype in ("fp32", "bf16"):
        for way in ("forward", "backward"):
            path = f"{dtype}.{way}.d64"
            assert table.native.flat()[path] != start.native.flat()[path]


def test_more_threads_begin_with_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with forty threads is not held to what two of them reach."""
    monkeypatch.setenv("TRUEMASK_COSTS", "avx2")
    monkeypatch.setattr(calibrate, "missing", lambda: "so that no peak is measured")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 40)
    before, start = costs.shipped()[0].sdpa, calibrate._start(1e9, 2e9)
    times = start.sdpa.paces["bf16"].forward.d64 / before.paces["bf16"].forward.d64
    assert times == pytest.approx(40 / before.threads)
    assert (start.sdpa.call, start.sdpa.threads) == (before.call, 40)
    assert start.sdpa.paces["fp32"].forward.rows32 == before.paces["fp32"].forward.rows32
    assert (start.sdpa.join, start.block_sparse.copy) == (1e9, 2e9)
    assert start.sdpa.read < 1e12, "also where the table says that nobody waits"


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend.name in costs.BACKENDS])
def test_calibration_predicts_what_it_measured(backend: Any) -> None:
    """Of seconds that these constants would take, multiplied by what the two directions and head sizes differ by."""
    if backend.unavailable():
        pytest.skip("the kernel is missing here: it was not built")
    start, name = calibrate._start(1e9, 2e9), backend.name
    times = {"call": 1.7, "call_backward": 0.6, "fp32.forward.d64": 0.5, "fp32.backward.d64": 1.9}
    truth = replace(start, **{name: getattr(start, name).scaled(times)})
    found = []
    for one in measures(Sizes()):
        if name in one.shows and one.probe.dtype == "fp32":
            measured = calibrate.Measured(backend, one.probe, one.shows[name], 0.0)
            found.append(measured._replace(seconds=calibrate.predicted(measured, truth)))
    table = calibrate.fitted(found, start)
    for one in found:
        assert calibrate.predicted(one, table) == pytest.approx(one.seconds, rel=0.02), one.probe


def test_nothing_is_kept_where_it_cannot_be(costs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs_file.parent.write_text("a file where the folder should be")
    monkeypatch.setattr(bench, "measured_costs", lambda say: pytest.fail("measured for nothing"))
    code, out = run("--calibrate")
    assert code == 2
    assert "TRUEMASK_COSTS=FILE names another place" in out
    monkeypatch.setenv("TRUEMASK_COSTS", "off")
    code, out = run("--calibrate")
    assert code == 2
    assert "unset it" in out


@pytest.mark.parametrize("earlier", [False, True])
@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda costs: _with_shares(costs, 2.01), r"sdpa: fp32\.forward\.rows1 = 2\.01 of full speed is more than"),
        (lambda costs: costs | {"sdpa": costs["sdpa"] | {"call": 1e999}}, r"sdpa: call = inf is no constant above 0:"),
        (lambda costs: costs | {"sdpa": costs["sdpa"] | {"masked": float("nan")}}, r"sdpa: masked = nan is no"),
        (lambda costs: costs | {"reference": costs["reference"] | {"call": -1e-6}}, r"reference: call = -1e-06 is no"),
    ],
)
def test_what_cannot_be_is_refused(
    costs_file: Path, monkeypatch: pytest.MonkeyPatch, wrong: Any, words: str, earlier: bool
) -> None:
    """As a busy machine makes it; an earlier file stays, word for word."""
    if earlier:
        costs_file.parent.mkdir()
        calibration.store(_stored(call=1e-3))
    before = costs_file.read_text() if earlier else ""
    monkeypatch.setattr(bench, "measured_costs", lambda say: wrong(_stored()))
    code, out = run("--calibrate")
    said = " ".join(out.split())
    assert code == 2
    assert re.search(words, said), said
    assert "stays as it was: run `truemask bench --calibrate` again when this machine has nothing else to do" in said
    assert (costs_file.read_text() if costs_file.exists() else "") == before


# -- the file ----------------------------------------------------------------------------------------------------------


def test_a_kernel_that_nobody_measured_beside_amx_is_measured_before_the_race(
    costs_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once: the second time its costs are known."""
    unmeasured = replace(costs.table(), unmeasured="amx")
    monkeypatch.setattr(costs, "has_amx", lambda: True)
    monkeypatch.setattr(bench, "SECONDS", 0.0)
    monkeypatch.setattr(bench, "measured_costs", lambda say: _stored())
    for table in (unmeasured, costs.table()):
        with costs.assumed(table):
            code, text = run("causal", "--length", "64")
        assert code == 0
        assert ("never measured beside an SDPA with AMX" in text) == (table is unmeasured)
        assert costs_file.is_file()
    monkeypatch.setenv("TRUEMASK_COSTS", "off")
    with costs.assumed(unmeasured):
        assert "never measured" not in run("causal", "--length", "64")[1]


def test_entries_of_other_machines_stay(costs_file: Path) -> None:
    costs_file.parent.mkdir()
    threads = torch.get_num_threads()
    calibration.store(_stored(call=1e-3))
    torch.set_num_threads(threads + 1)
    try:
        assert "(measured were" in costs.source()
        assert costs.table() == costs.shipped()[0]
        calibration.store(_stored(call=2e-3))
        costs.forget()
        assert costs.table().sdpa.call == 2e-3
    finally:
        torch.set_num_threads(threads)
    assert costs.table().sdpa.call == 1e-3
    calibration.store(_stored(call=3e-3))
    costs.forget()
    assert costs.table().sdpa.call == 3e-3
    assert len(calibration.read_entries()) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 4, "entries": []}', '{"format": 3, "entries": [3]}', '{"format": 3}', "\x00"],
)
def test_a_broken_file_is_a_warning_and_the_shipped_costs(costs_file: Path, text: str) -> None:
    costs_file.parent.mkdir()
    costs_file.write_text(text)
    with pytest.warns(UserWarning, match=r"costs\.json cannot be used .*plans go by the shipped ones"):
        assert costs.table() == costs.shipped()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tm.plan(tm.causal, 67).costs, "the warning comes once"
    calibration.store(_stored(call=5e-3))
    costs.forget()
    assert costs.table().sdpa.call == 5e-3


@pytest.mark.parametrize("number", [1, 2])
def test_a_file_of_an_earlier_format_says_so(number: int, costs_file: Path) -> None:
    costs_file.parent.mkdir()
    costs_file.write_text(f'{{"format": {number}, "entries": []}}')
    with pytest.warns(UserWarning, match=rf"is in format {number}, .* earlier version; .*`truemask bench --calibrate`"):
        assert costs.table() == costs.shipped()[0]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        *(({"call": wrong}, "call = ") for wrong in (-1.0, 0, "fast", True, 1e999)),
        ({"speed": 1.0}, "speed: "),
        ({"paces": {"fp32": {"forward": {}}}}, "d64"),
        ({"paces": 3}, "int"),
    ],
)
def test_a_wrong_constant_is_a_warning(costs_file: Path, changes: dict[str, Any], named: str) -> None:
    costs_file.parent.mkdir()
    calibration.store(_stored(**changes))
    with pytest.warns(UserWarning, match=rf"are wrong \(sdpa: .*{named}"):
        assert costs.table() == costs.shipped()[0]
    assert "because the measured ones are wrong" in costs.source()


def test_a_share_that_no_machine_has_is_a_warning(costs_file: Path) -> None:
    costs_file.parent.mkdir()
    calibration.store(_with_shares(_stored(), 2.5))
    with pytest.warns(UserWarning, match=r"are wrong \(sdpa: fp32\.forward\.rows1 = 2\.50 of full speed"):
        assert costs.table() == costs.shipped()[0]


def test_a_backend_that_came_later_is_a_warning(costs_file: Path) -> None:
    costs_file.parent.mkdir()
    calibration.store({"sdpa": costs.shipped()[0].sdpa.numbers()})
    with pytest.warns(UserWarning, match="nothing is said of the backend"):
        assert costs.table() == costs.shipped()[0]


def test_each_instruction_set_has_costs_of_its_own(costs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs_file.parent.mkdir()
    for isa, call in (("avx2", 2e-3), ("base", 1e-3)):
        monkeypatch.setattr(costs, "isa_in_use", lambda isa=isa: isa)
        stored = _stored(call=call)
        stored["native"][isa]["call"] = call
        calibration.store(stored)
    _forget()
    assert (costs.table().native.call, costs.table().sdpa.call) == (1e-3, 1e-3)
    monkeypatch.setattr(costs, "isa_in_use", lambda: "avx2")
    assert (costs.table().native.call, costs.table().sdpa.call) == (2e-3, 1e-3)
    monkeypatch.setattr(costs, "isa_in_use", lambda: "avx512")
    assert costs.table().native == costs.shipped()[0].native
    assert "native with avx512 was not, and goes by the shipped ones" in costs.source()


def test_a_file_of_another_machine_is_a_warning(costs_file: Path) -> None:
    costs_file.parent.mkdir()
    calibration.store(_stored())
    costs_file.write_text(costs_file.read_text().replace(torch.__version__, "1.13"))
    with pytest.warns(UserWarning, match=r"are of another machine \(.*torch 1\.13; this is .*`truemask bench --cal"):
        assert costs.table() == costs.shipped()[0]


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUEMASK_COSTS", "off")
    assert calibration.costs_file() is None
    monkeypatch.delenv("TRUEMASK_COSTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration.costs_file() == tmp_path / "truemask" / "costs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert calibration.costs_file() == tmp_path / "home" / ".cache" / "truemask" / "costs.json"
