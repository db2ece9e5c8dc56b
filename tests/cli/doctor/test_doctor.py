"""`doctor`: what it says of a machine, and the report of a GPU, whose every line can be made on a CPU."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
import torch

import truemask as tm
from tests.cli.commands.test_show_explain import run
from truemask.backends.costs import model as costs
from truemask.cli.doctor import backend_check as self_test
from truemask.cli.doctor import doctor, gpu_report
from truemask.cli.doctor.gpu_report import Check, report

CPU = torch.device("cpu")


def test_doctor_names_versions_and_backends() -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert f"torch           {torch.__version__}" in out
    for name in tm.backends():
        assert f"  {name}" in out
    assert "cannot: gradients: FlexAttention has no backward on the CPU" in out
    assert out.count("and is chosen") == 2 * (1 + torch.cuda.is_available())


def test_doctor_as_json() -> None:
    code, out, _ = run("doctor", "--json")
    report = json.loads(out)
    assert (code, report["facts"]["torch"]) == (0, torch.__version__)
    assert [outcome["backend"] for outcome in report["self_test"]] == list(tm.backends())
    assert all(outcome["good"] for outcome in report["self_test"])
    assert report["backends"][1]["objections"]["flex"] == ["gradients: FlexAttention has no backward on the CPU"]


def test_doctor_says_when_costs_are_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the arithmetic of the kernel; a table that was named is not held to this machine."""
    monkeypatch.setattr(doctor, "missing", lambda: "")
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 4)
    assert doctor.fit() == []
    table = replace(costs.table(), fixed=False)
    with costs.assumed(table):
        monkeypatch.setattr(doctor, "peak", lambda seconds, halves: 4 * 1.2 * table.native.peak)
        assert re.fullmatch(r"\d+ GF/s in fp32 for each thread, \d+ where the costs were measured", doctor.fit()[0][1])
        monkeypatch.setattr(doctor, "peak", lambda seconds, halves: 4 * 0.4 * table.native.peak)
        assert doctor.fit()[0][1].endswith("they do not fit; `truemask bench --calibrate` measures this machine")
    monkeypatch.setattr(doctor, "missing", lambda: "there is none")
    assert doctor.fit() == []


def test_the_self_test_is_short_and_notices_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    real, lengths = self_test.attend, []

    def counted(*tensors: Any, backend: str) -> torch.Tensor:
        lengths.append(tensors[0].shape[2])
        return real(*tensors, backend=backend)

    monkeypatch.setattr(self_test, "attend", counted)
    assert [outcome.text.split(":")[0] for outcome in self_test.self_test()].count("agrees") >= 3
    assert len(lengths) <= len(tm.backends())
    assert max(lengths) < 256

    def broken(*tensors: torch.Tensor, backend: str) -> torch.Tensor:
        if backend == "sdpa":
            raise RuntimeError("no kernel")
        return real(*tensors, backend=backend) * (1.01 if backend == "block_sparse" else 1.0)

    monkeypatch.setattr(self_test, "attend", broken)
    bad = {outcome.backend: outcome.text for outcome in self_test.self_test() if not outcome.good}
    assert bad["sdpa"] == "RuntimeError: no kernel"
    assert bad["block_sparse"].startswith("DIFFERS: error 2")
    assert len(bad) == 2
    assert run("doctor")[0] == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_what_it_would_do() -> None:
    code, out, _ = run("doctor", "--gpu")
    assert code == 1
    assert "no GPU: torch sees no CUDA device" in out
    assert "causal & window(256), bfloat16, by sdpa and flex" in out


def test_the_report() -> None:
    checks = (Check("causal & window(20)", torch.float32), Check("causal.packed([30, 31, 40])", torch.bfloat16))
    lines = list(report(CPU, checks, 101, 60.0))
    text = "\n".join(line.text for line in lines)
    assert all(line.good for line in lines), text
    assert text.count("sdpa   agrees: error") == text.count("flex   agrees: error") == 2
    assert text.count("gradients") == text.count("with backward") == 2  # of sdpa


def test_the_report_says_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """A crash and a wrong result are lines that are not good; a reason not to run is no fault."""
    real = gpu_report.attend

    def broken(*tensors: torch.Tensor, backend: str) -> torch.Tensor:
        if backend == "flex":
            raise RuntimeError("\nno kernel image is available\nsecond line")
        return real(*tensors, backend=backend) * (1.5 if backend == "sdpa" else 1.0)

    monkeypatch.setattr(gpu_report, "attend", broken)
    _, _, sdpa, flex = report(CPU, (Check("causal", torch.float32),), 37, 60.0)
    assert not sdpa.good
    assert "DIFFERS: error 5.0e-01" in sdpa.text
    assert flex == ("  flex   RuntimeError: no kernel image is available", False)


def test_the_report_ends_when_the_time_is_over() -> None:
    lines = list(report(CPU, (Check("causal", torch.float32),), 37, 0.0))
    assert [line.text for line in lines[2:]] == [f"  {name:<6} not run: the time is over" for name in ("sdpa", "flex")]
