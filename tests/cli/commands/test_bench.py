"""`truemask bench`: masks race, a calibration is stored and found again, and no file of costs can break a plan."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import truemask as tm
from truemask.attention.planning.cache import CACHE
from truemask.backends.costs import calibration_file as calibration
from truemask.backends.costs import model as costs
from truemask.backends.registry import BACKENDS
from truemask.benchmarking import calibrate
from truemask.cli.app import app
from truemask.cli.commands import bench

SMALL = calibrate.Probe(tm.window(5), 11, 1, 8)
LARGE = calibrate.Probe(tm.window(31), 61, 2, 16)


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
    """The shipped costs with another number, as an entry holds them."""
    measured_costs = asdict(costs.SHIPPED)
    measured_costs["sdpa"].update(changes)
    return measured_costs


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


def test_calibration_is_stored_and_found(costs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tm.plan(tm.causal, 67)
    assert re.search(r"predicted from the shipped costs.*; `truemask bench --calibrate`", str(before))
    found = calibrate.measured_costs(lambda text: None, SMALL, LARGE, 0.0)
    monkeypatch.setattr(bench, "measured_costs", lambda say: found)
    code, out = run("--calibrate")
    assert code == 0, out
    assert f"stored in {costs_file}" in out.replace("\n", "")
    assert costs.table() == costs.table_of(found)
    after = tm.plan(tm.causal, 67)
    assert after.costs != before.costs
    assert re.search(r"predicted from costs measured on this machine on \d{4}-\d\d-\d\d", str(after))
    assert not list(costs_file.parent.glob("*.part"))


def test_calibration_predicts_what_it_measured() -> None:
    for backend in (backend for backend in BACKENDS if backend.name in costs.BACKENDS):
        rates = getattr(costs.SHIPPED, backend.name)
        for grad, (few, many) in ((False, (3e-4, 0.07)), (True, (9e-4, 0.31))):
            measured = [
                calibrate.Measured(SMALL, grad, few),
                calibrate.Measured(calibrate.LARGE_PROBE, grad, many),
            ]
            rates = calibrate.fitted(backend, rates, *measured)
            predicted = [calibrate.predicted(backend, rates, found) for found in measured]
            assert predicted == pytest.approx([few, many]), (backend.name, grad)


def test_every_constant_is_measured() -> None:
    said: list[str] = []
    found = calibrate.measured_costs(said.append, SMALL, LARGE, 0.0)
    shipped = asdict(costs.SHIPPED)
    assert {name: set(numbers) for name, numbers in found.items()} == {name: set(of) for name, of in shipped.items()}
    assert all(number > 0 for numbers in found.values() for number in numbers.values())
    assert len(said) == 7
    assert costs.table_of(json.loads(json.dumps(found)))


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


# -- the file ----------------------------------------------------------------------------------------------------------


def test_entries_of_other_machines_stay(costs_file: Path) -> None:
    costs_file.parent.mkdir()
    threads = torch.get_num_threads()
    calibration.store(_stored(forward=1e9))
    torch.set_num_threads(threads + 1)
    try:
        assert "(measured were" in costs.source()
        assert costs.table() == costs.shipped()[0]
        calibration.store(_stored(forward=2e9))
        costs.forget()
        assert costs.table().sdpa.forward == 2e9
    finally:
        torch.set_num_threads(threads)
    assert costs.table().sdpa.forward == 1e9
    calibration.store(_stored(forward=3e9))
    costs.forget()
    assert costs.table().sdpa.forward == 3e9
    assert len(calibration.read_entries()) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"format": 2, "entries": []}', '{"format": 1, "entries": [3]}', '{"format": 1}', "\x00"],
)
def test_a_broken_file_is_a_warning_and_the_shipped_costs(costs_file: Path, text: str) -> None:
    costs_file.parent.mkdir()
    costs_file.write_text(text)
    with pytest.warns(UserWarning, match=r"costs\.json cannot be used .*plans go by the shipped ones"):
        assert costs.table() == costs.shipped()[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tm.plan(tm.causal, 67).backend == "sdpa", "the warning comes once"
    calibration.store(_stored(forward=5e9))
    costs.forget()
    assert costs.table().sdpa.forward == 5e9


@pytest.mark.parametrize(
    "changes", [{"forward": -1.0}, {"forward": 0}, {"call": "fast"}, {"speed": 1.0}, {"call": True}, {"call": 1e999}]
)
def test_a_wrong_constant_is_a_warning(costs_file: Path, changes: dict[str, Any]) -> None:
    costs_file.parent.mkdir()
    calibration.store(_stored(**changes))
    with pytest.warns(UserWarning, match=rf"are wrong \(sdpa: {next(iter(changes))} = .* is no constant"):
        assert costs.table() == costs.shipped()[0]
    assert "because the measured ones are wrong" in costs.source()


def test_a_backend_that_came_later_is_a_warning(costs_file: Path) -> None:
    costs_file.parent.mkdir()
    calibration.store({"sdpa": asdict(costs.SHIPPED.sdpa)})
    with pytest.warns(UserWarning, match="nothing is said of the backend"):
        assert costs.table() == costs.shipped()[0]


def test_a_file_of_another_machine_is_a_warning(costs_file: Path) -> None:
    costs_file.parent.mkdir()
    calibration.store(_stored())
    costs_file.write_text(costs_file.read_text().replace(torch.__version__, "1.13"))
    with pytest.warns(UserWarning, match=r"are of another machine \(.*torch 1\.13; this is .*`truemask bench --cal"):
        assert costs.table() == costs.shipped()[0]


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A processor on which torch multiplies bf16 with AMX."""
    monkeypatch.setenv("TRUEMASK_COSTS", "off")
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    _forget()
    yield
    monkeypatch.undo()
    _forget()


@pytest.mark.usefixtures("amx")
@pytest.mark.parametrize("mask", [tm.everything, tm.causal])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("n", "d"), [(512, 64), (4096, 64), (4096, 128)])
def test_where_torch_has_amx_plain_bf16_is_torchs(mask: tm.Mask, grad: bool, n: int, d: int) -> None:
    assert tm.plan(mask, n, head_dim=d, dtype=torch.bfloat16, grad=grad).backend == "sdpa"


@pytest.mark.usefixtures("amx")
def test_where_torch_has_amx_sparse_bf16_is_not() -> None:
    assert tm.plan(tm.causal & tm.window(256), 8192, dtype=torch.bfloat16).backend != "sdpa"


@pytest.mark.usefixtures("amx")
def test_a_plan_says_when_no_shipped_costs_are_of_this_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "in_use", lambda *_: "avx512")
    _forget()
    said = "the shipped costs, none of which was measured with avx512; `truemask bench --calibrate` measures this"
    assert said in costs.source()
    assert said in str(tm.plan(tm.causal, 67))
    monkeypatch.setattr(costs, "in_use", lambda *_: "avx512_bf16")
    _forget()
    assert costs.source().startswith("the shipped costs; ")


@pytest.mark.parametrize("name", costs.TABLES)
def test_shipped_costs_are_taken_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRUEMASK_COSTS", name)
    _forget()
    assert calibration.costs_file() is None
    assert costs.table() == costs.TABLES[name]
    monkeypatch.undo()
    _forget()


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRUEMASK_COSTS", "off")
    assert calibration.costs_file() is None
    monkeypatch.delenv("TRUEMASK_COSTS")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert calibration.costs_file() == tmp_path / "truemask" / "costs.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert calibration.costs_file() == tmp_path / "home" / ".cache" / "truemask" / "costs.json"


def test_costs_depend_on_the_dtype() -> None:
    rates = costs.Rates(1e9, 1e9, 0.0, 0.0, doubles=3.0, halves=0.5)
    request = SMALL.job(False).request
    seconds = {
        dtype: costs.seconds(rates, request._replace(dtype=dtype), 100.0)
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    }
    single = seconds[torch.float32]
    assert [found / single for found in seconds.values()] == pytest.approx([1.0, 3.0, 0.5, 0.5])
