"""Pickles of masks: they name kinds and two functions of `truemask.masks`, whatever file the classes are in."""

from __future__ import annotations

import copy
import io
import multiprocessing
import pickle
import pickletools
import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import pytest
import torch

import truemask as tm
from tests.support.cases import CASES, Case
from truemask.masks.core.data import Data
from truemask.masks.core.value import MAX_DEPTH

SAVABLE = [case for case in CASES if "predicate" not in case.name]


def named(pickled: bytes) -> Iterator[str]:
    """The module of every class and function that a pickle of protocol 2 names."""
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "GLOBAL":
            yield str(argument).split()[0]


@pytest.mark.parametrize("case", SAVABLE, ids=repr)
def test_a_pickle_names_no_file_of_the_package(case: Case) -> None:
    modules = set(named(pickle.dumps(case.make(), protocol=2)))
    assert {name for name in modules if name.startswith("truemask")} == {"truemask.masks"}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_is_unpickled_is_the_same_mask(protocol: int) -> None:
    flags = tm.keys(torch.arange(300) % 7 != 0)
    mask = (tm.causal & flags).packed([100, 200]) | flags.T
    again = pickle.loads(pickle.dumps(mask, protocol))
    assert (again, hash(again), again.text) == (mask, hash(mask), mask.text)
    first, second = (one.flags for one in again.walk() if one.kind == "keys")
    assert first is second, "data that is shared is written once and stays shared"
    assert torch.equal(again.to_dense(300), mask.to_dense(300))


def test_what_was_worked_out_is_not_pickled() -> None:
    mask = tm.causal.packed([1000, 3000])
    fresh = len(pickle.dumps(mask))
    mask.count(4000)
    mask.to_dense(4000)
    assert len(pickle.dumps(mask)) == fresh
    assert not {"_known", "_bound", "_sides"} & set(vars(copy.copy(mask)))


def test_copies_have_handles_of_their_own() -> None:
    mask = tm.window(3) & tm.causal
    for again in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert again == mask
        assert again.handle is not mask.handle
        assert again.number != mask.number


def test_the_deepest_expression_pickles() -> None:
    mask = tm.causal
    for number in range(MAX_DEPTH // 2 - 1):
        mask = (mask | tm.window(number + 1)) & tm.prefix(number)
    assert pickle.loads(pickle.dumps(mask)) == mask


def test_torch_saves_and_loads_masks() -> None:
    mask, file = tm.keys([True, False]) & tm.causal, io.BytesIO()
    torch.save({"mask": mask, "step": 3}, file)
    file.seek(0)
    assert torch.load(file, weights_only=False) == {"mask": mask, "step": 3}


def count_of(mask: tm.Mask) -> tuple[tm.Mask, int]:
    return mask, int(mask.count(10))


def test_another_process_gets_and_gives_masks() -> None:
    masks = [tm.window(3), tm.documents([4, 6]) & tm.causal, tm.tree([-1, *range(9)])]
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(count_of, masks) == [count_of(mask) for mask in masks]


def test_a_process_that_only_unpickles_knows_all_kinds(tmp_path: Path) -> None:
    path = tmp_path / "mask.pickle"
    path.write_bytes(pickle.dumps(tm.tree([-1, 0, 0]) | tm.random(0.5)))
    program = f"import pickle; print(pickle.load(open({str(path)!r}, 'rb')))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "tree([-1, 0, 0]) | random(0.5)\n"


def test_a_kind_of_a_later_version_is_an_error_that_says_so() -> None:
    later = pickle.dumps(tm.window(3), protocol=2).replace(b"window", b"wimdow")
    with pytest.raises(tm.MaskError, match="of kind 'wimdow', which this version of truemask does not have"):
        pickle.loads(later)


def test_data_pickles_by_itself() -> None:
    data = Data(torch.tensor([1, 2, 3]))
    assert set(named(pickle.dumps(data, protocol=2))) >= {"truemask.masks"}
    assert pickle.loads(pickle.dumps(data)) == copy.deepcopy(data) == data


def test_sending_a_mask_leaves_its_data_where_it_is() -> None:
    """torch moves a tensor that it sends into shared memory; what else looked at the old memory would read nonsense."""
    mask = tm.tree([-1, *range(9)])
    array = mask.parts["parents"].array
    _ = ForkingPickler.dumps(mask)
    assert not mask.parts["parents"].tensor.is_shared()
    assert array.tolist() == [-1, *range(9)]
