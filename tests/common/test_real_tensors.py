"""Nothing that is remembered holds a tensor that is not real, whatever was traced."""

from __future__ import annotations

import ast
import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from types import BuiltinFunctionType, ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import truemask as tm
from tests.support.cases import CASES
from tests.support.equality import assert_same
from truemask.attention.planning.cache import CACHE, Entry
from truemask.common.real_tensors import is_real

SOURCE = Path(tm.__file__).parent


def reachable(roots: Iterable[object]) -> Iterator[Tensor]:
    """Every tensor that the objects hold, however deep: in caches, attributes, closures, containers."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "truemask"]
    namespaces = {id(vars(module)) for module in sys.modules.values() if isinstance(module, ModuleType)}
    left: list[Any] = [value for module in modules for value in vars(module).values()] + list(roots)
    seen = {id(left), *namespaces}
    while left:
        one = left.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, BuiltinFunctionType, str, bytes, int, float)):
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif type(one).__module__.partition(".")[0] in ("truemask", "builtins", "functools", "collections", "weakref"):
            left += gc.get_referents(one)
            left += list(one.values()) if type(one).__name__ == "WeakValueDictionary" else []


def attended(mask: tm.Mask, q: Tensor) -> Tensor:
    return tm.attend(q, q, q, mask)


def asked(mask: tm.Mask, q: Tensor) -> Tensor:
    """What people ask of a mask inside of a model, besides attending under it."""
    n, sizes = q.shape[2], {"batch": q.shape[0], "heads": q.shape[1]}
    mask.check(n, n, **sizes)
    _ = hash(mask), str(mask), mask.twin() == mask, mask.varies_with_query, mask.kv_len_for(n)
    mask.tiles(int(n), **sizes)
    mask.count(int(n), **sizes)
    return q


def under_a_fake_mode(call: Callable[[Tensor], Any]) -> None:
    with FakeTensorMode():
        call(torch.randn(2, 2, 5, 8))


def on_meta(call: Callable[[Tensor], Any]) -> None:
    with torch.device("meta"):
        call(torch.randn(2, 2, 5, 8))


class Module(torch.nn.Module):
    def __init__(self, call: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(x)


Q = torch.randn(2, 2, 5, 8)
TRACERS: dict[str, Callable[[Callable[[Tensor], Any]], Any]] = {
    "export": lambda call: torch.export.export(Module(call), (Q,)),
    "jit.trace": lambda call: torch.jit.trace(Module(call), (Q,), check_trace=False),
    "make_fx": lambda call: make_fx(call, tracing_mode="symbolic")(Q),
    "proxies beside real tensors": lambda call: make_fx(call)(Q),
    "fake": under_a_fake_mode,
    "meta": on_meta,
    "grad": lambda call: torch.func.grad(lambda x: call(x).sum())(Q),
    "vmap": lambda call: torch.vmap(call)(torch.stack([Q, Q])),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("what", [attended, asked], ids=lambda what: what.__name__)
@pytest.mark.parametrize("name", TRACERS)
def test_masks_that_were_traced_hold_real_tensors(name: str, what: Callable[[tm.Mask, Tensor], Tensor]) -> None:
    """New masks, which nobody has asked before, of every kind that takes these sizes; then eager code goes on."""
    CACHE.clear()
    made = {mask.kind: mask for mask in (case.make() for case in CASES) if fits(mask)}
    assert len(made) > 20
    for mask in made.values():
        TRACERS[name](partial(what, mask))
    assert all(map(is_real, reachable(made.values())))
    for mask in made.values():
        want = tm.attend(Q, Q, Q, mask, backend="reference")
        assert_same(attended(mask, Q), want)


def fits(mask: tm.Mask) -> bool:
    try:
        mask.check(5, 5, batch=2, heads=2)
    except tm.MaskError:
        return False
    return True


@pytest.mark.filterwarnings("ignore")
def test_masks_that_are_made_while_tracing_hold_real_tensors() -> None:
    """Of numbers, lists, and tensors from outside: none of it is a part of the graph."""
    outside, kept = torch.tensor([2, 3]), []

    def call(q: Tensor) -> Tensor:
        masks = tm.causal.packed([2, 3]), tm.documents(outside), tm.tree([-1, 0, 0, 1, 1]), tm.keys([True] * 5)
        kept.extend([*masks, tm.window(3) & masks[0], tm.global_tokens(outside), tm.parse("causal & window(2)")])
        return sum((attended(mask, q) for mask in kept[-7:]), q)

    for name in ("export", "jit.trace", "make_fx", "fake", "meta"):
        TRACERS[name](call)
    assert all(map(is_real, reachable(kept)))
    assert {mask.kind for mask in kept} == {mask.kind for mask in kept if tm.attend(Q, Q, Q, mask).isfinite().all()}


def test_the_walk_sees_what_is_hidden_in_caches() -> None:
    """A stand-in in a mask's table, in a plan and in a memory of a function would be found."""
    mask = tm.window(3) & tm.causal
    with FakeTensorMode():
        fake = torch.ones(2)
    vars(mask)["_bound"] = {"cpu": fake}
    assert not all(map(is_real, reachable([mask])))
    CACHE.clear()
    mask = tm.keys([True] * 5)
    tm.attend(Q, Q, Q, mask)
    entry = next(holder for holder in CACHE._kept if isinstance(holder, Entry))
    vars(entry.plan.job)["small"] = fake
    assert not all(map(is_real, reachable([])))
    CACHE.clear()
    assert all(map(is_real, reachable([])))


REMEMBERS_NO_TENSOR = {
    "masks/leaves/predicate.py",
    "common/real_tensors.py",
    "masks/core/deferred.py",
    "masks/formats/as_mask.py",
}  # numbers; the tool; texts, read by it


def test_masks_and_jobs_remember_by_the_one_way() -> None:
    """In the rooms whose objects outlive calls, `functools` caches nothing."""
    files = [path for room in ("common", "masks") for path in (SOURCE / room).rglob("*.py")]
    found = {
        file.relative_to(SOURCE).as_posix()
        for file in [*files, SOURCE / "backends" / "base.py", SOURCE / "attention" / "planning" / "cache.py"]
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and node.module == "functools"
        and {name.name for name in node.names} & {"cache", "cached_property", "lru_cache"}
    }
    assert found == REMEMBERS_NO_TENSOR
