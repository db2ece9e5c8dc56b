"""The native kernel on tile instructions that `amx_trap.cpp` carries out: test_amx_trapped.py runs this file.

Beside `truemask_amx.so` stands its twin, the same source with the same flags but for the tiles, which are emulated:
results have the same bits. The installed `amx_emulated` is compiled for any processor, with another polynomial for
powers of two and without fused additions: it differs by rounding.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import truemask as tm
from tests.backends.test_native import MASKS, agree, results, tensors
from tests.support.amx_trap import BUILD, ROOT, compiled
from truemask.backends import isa as isa_files
from truemask.backends.isa import VARIABLE
from truemask.backends.native import library as native_library
from truemask.backends.native.backend import Native
from truemask.backends.native.parts import forced

TWIN = "amx_emulated"  # the name under which it is asked for


class Case(NamedTuple):
    """A call: sizes as `tensors` takes them, mask and options."""

    sizes: tuple[int, int, int, int, int, int, int]  # samples, heads, key heads, queries, keys, d, dv
    mask: tm.Mask
    options: dict[str, Any] = {}  # noqa: RUF012
    threads: int = 1
    dtype: torch.dtype = torch.bfloat16  # others are multiplied as sums of bf16


SQUARE = (1, 2, 2, 130, 130, 64, 64)
SHARED = (2, 4, 2, 130, 130, 64, 64)
BIAS = torch.linspace(-3, 3, 130 * 130).view(1, 1, 130, 130)
SINKS = torch.tensor([0.0, 3.0, -2.0, 40.0])
CASES = {
    "everything": Case(SQUARE, tm.everything),
    "whole tiles": Case((1, 1, 1, 128, 192, 64, 64), tm.everything),
    "causal": Case(SQUARE, tm.causal),
    "window": Case((1, 2, 1, 300, 300, 64, 64), MASKS["window"], threads=2),
    "documents": Case(SHARED, MASKS["documents"]),
    "dead rows": Case(SHARED, MASKS["dead rows"]),
    "random": Case(SHARED, MASKS["random"]),
    "per head": Case(SHARED, MASKS["per head"]),
    "per sample": Case(SHARED, MASKS["per sample"], threads=2),
    "d 80": Case((1, 2, 2, 77, 141, 80, 80), tm.causal.at(q_start=64)),
    "d 128": Case((1, 2, 1, 100, 90, 128, 128), tm.causal),
    "d 7, dv 129": Case((1, 2, 2, 65, 63, 7, 129), tm.local(40)),
    "d 33, dv 1": Case((1, 1, 1, 31, 97, 33, 1), tm.everything),
    "few rows": Case((1, 8, 2, 9, 1100, 64, 64), (tm.window(900) | tm.prefix(3)).at(q_start=1091), threads=2),
    "one key": Case((1, 2, 2, 40, 1, 64, 64), tm.everything),
    "soft cap": Case(SHARED, tm.causal, {"softcap": 1.5}),
    "bias": Case(SHARED, tm.causal, {"bias": BIAS}),
    "alibi": Case(SHARED, tm.causal, {"bias": tm.alibi(torch.tensor([0.5, 0.25, 0.1, 0.0]))}),
    "sinks": Case(SHARED, MASKS["sinks"], {"sink_logits": SINKS}),
    "dropout": Case(SHARED, tm.causal, {"dropout": 0.3}, threads=2),
    "many": Case(SHARED, MASKS["documents"], {"softcap": 2.0, "sink_logits": SINKS, "dropout": 0.2, "bias": BIAS}),
    "fp32": Case(SHARED, MASKS["documents"], threads=2, dtype=torch.float32),
    "fp32, many": Case(SHARED, MASKS["window"], {"softcap": 2.0, "dropout": 0.2}, dtype=torch.float32),
    "fp16": Case((1, 2, 1, 77, 141, 80, 24), tm.causal.at(q_start=64), dtype=torch.float16),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library and its twin lie. The twin is optimized less, which takes half as long and changes no bit."""
    place = tmp_path_factory.mktemp("twins")
    (place / "truemask_amx.so").symlink_to(isa_files.file_of("amx"))
    flags = [*BUILD["FLAGS"], *BUILD["variants"]()["amx"], "-DTM_TILES_EMULATED", "-O2"]
    compiled(ROOT / "csrc" / "kernel.cpp", place / f"truemask_{TWIN}.so", flags)
    return place


@pytest.fixture(autouse=True)
def twins(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(isa_files, "FOLDER", folder)
    monkeypatch.setenv(VARIABLE, "amx")
    native_library._loaded.cache_clear()
    assert Path(native_library.library()._name) == folder / "truemask_amx.so"
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    monkeypatch.undo()
    native_library._loaded.cache_clear()


def counted(name: str) -> int:
    """What the trap has counted."""
    count = ctypes.CDLL(None)[name]
    count.restype = ctypes.c_uint64
    return count()


def trapped(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    """Results for which tile instructions were carried out, all of whose rows began at cache lines."""
    before, apart = counted("amx_trap_carried_out"), counted("amx_trap_apart")
    found = run()
    assert counted("amx_trap_carried_out") > before
    assert counted("amx_trap_apart") == apart
    return found


def made_for(case: Case) -> list[Tensor]:
    return tensors(*case.sizes, case.dtype)


def run(case: Case) -> list[Tensor]:
    torch.manual_seed(3)
    torch.set_num_threads(case.threads)
    with forced(True):
        return results(made_for(case), case.mask, "native", **case.options)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, expected, strict=True):
        assert torch.equal(a, b), f"{name}: {int((a != b).sum())} of {a.numel()} differ"


@pytest.mark.parametrize("name", CASES)
def test_every_bit_is_the_twins(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And every number is near the reference's."""
    case = CASES[name]
    found = trapped(lambda: run(case))
    with forced(True):
        agree(made_for(case), case.mask, Native.tolerance[case.dtype], **case.options)
    monkeypatch.setenv(VARIABLE, TWIN)
    before = counted("amx_trap_carried_out")
    assert_same(found, run(case))
    assert counted("amx_trap_carried_out") == before


def test_the_library_itself_refuses_this_processor(folder: Path) -> None:
    assert ctypes.CDLL(str(folder / "truemask_amx.so")).tm_usable() == 0


# -- threads and processes ---------------------------------------------------------------------------------------------


def test_threads_of_torch_change_nothing() -> None:
    case = CASES["window"]
    expected = run(case._replace(threads=1))
    for threads in (2, 4):
        assert_same(trapped(lambda threads=threads: run(case._replace(threads=threads))), expected)


def test_callers_at_once() -> None:
    """Each on threads of its own."""
    case, wrong = CASES["causal"], []
    expected = run(case)

    def work() -> None:
        made = made_for(case)
        for _ in range(3):
            found = results(made, case.mask, "native")
            wrong.extend("other numbers" for a, b in zip(found, expected, strict=True) if not torch.equal(a, b))

    callers = [threading.Thread(target=work) for _ in range(3)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert not wrong


IN_A_FORK = Case((1, 2, 1, 200, 200, 64, 64), MASKS["window"], threads=2)  # torch's own hangs there if it is larger


def _in_a_fork(answers: Any) -> None:
    answers.put([x.tolist() for x in trapped(lambda: run(IN_A_FORK))])


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_computes_the_same() -> None:
    """Where the kernel starts threads of its own."""
    expected = run(IN_A_FORK)
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=_in_a_fork, args=(answers,))
    child.start()
    found = answers.get(timeout=60)
    child.join(60)
    assert_same([torch.tensor(x, dtype=b.dtype) for x, b in zip(found, expected, strict=True)], expected)
