"""`to_block_mask` against torch's `create_block_mask`: lists, split, transposes, `mask_mod`; its life in workers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from torch.utils.data import DataLoader, Dataset

import truemask as tm
from tests.support.cases import CASES, Case
from tests.support.equality import assert_same
from truemask.masks.core.mask import Mask
from truemask.masks.core.queries import indices

LISTS = ("kv", "full_kv", "q", "full_q")
LONG = {
    "causal": tm.causal,
    "sinks and window": tm.causal & (tm.window(37) | tm.prefix(4)),
    "documents": tm.causal & tm.documents([53, 101, 7, 150, 200]),
    "packed": (tm.causal & (tm.window(20) | tm.prefix(3))).packed([53, 101, 7, 150, 200]),
    "padded": tm.causal.padded([0, 31, 300]),
    "holes": tm.everything - tm.blocks(64) - tm.dilated(5),
    "bigbird": tm.blocks(32, back=1, ahead=1) | tm.random(0.2, block=32, per_head=True) | tm.prefix(32),
    "per head": tm.per_head([tm.local(9), tm.causal, tm.nothing]),
    "per sample": tm.per_sample([tm.everything, tm.causal]),
    "a function": tm.predicate(lambda b, h, q, k: (q * 7 + k * 3) % 11 < 4),
    "at": (tm.causal & tm.window(50)).at(q_start=23),
}


def theirs(mask: Mask, q_len: int, kv_len: int, block: tuple[int, int], batch: int, heads: int) -> BlockMask:
    """What torch makes of `truth`."""

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return mask.truth(b, h, q, k)

    return create_block_mask(mask_mod, batch, heads, q_len, kv_len, "cpu", block)


def same(ours: BlockMask, want: BlockMask) -> None:
    """Every list up to its count, the counts, shapes and dtypes; what follows stays a valid index."""
    assert ours.shape == want.shape
    assert ours.BLOCK_SIZE == want.BLOCK_SIZE
    for name in LISTS:
        counts, indices = getattr(ours, f"{name}_num_blocks"), getattr(ours, f"{name}_indices")
        want_counts, want_indices = getattr(want, f"{name}_num_blocks"), getattr(want, f"{name}_indices")
        assert torch.equal(counts, want_counts), name
        assert (counts.dtype, indices.dtype) == (torch.int32, torch.int32)
        assert indices.shape == want_indices.shape
        used = torch.arange(indices.shape[-1]) < counts[..., None]
        assert torch.equal(indices[used], want_indices[used]), name
        assert not indices[~used].any()
        assert counts.is_contiguous()
        assert indices.is_contiguous()
    assert torch.equal(ours.to_dense(), want.to_dense())


def compare(mask: Mask, q_len: int, kv_len: int, block: tuple[int, int], batch: int = 1, heads: int = 1) -> None:
    batch, heads = (1 if mask.batch_size == 1 else batch), (1 if mask.head_count == 1 else heads)
    ours = mask.to_block_mask(q_len, kv_len, block=block, batch=batch, heads=heads)
    same(ours, theirs(mask, q_len, kv_len, block, batch, heads))
    grid = indices(batch, heads, q_len, kv_len, "cpu")
    assert torch.equal(ours.mask_mod(*grid), mask.truth(*grid))


@pytest.mark.parametrize("block", [(1, 1), (2, 3), (4, 2), (16, 16)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=repr)
def test_the_catalogue(case: Case, block: tuple[int, int]) -> None:
    """At the length of the picture and at shorter ones, most of them ragged."""
    mask = case.make()
    for q_len, kv_len in {(case.q_len, case.kv_len), (case.q_len - 1, case.kv_len), (case.q_len, case.kv_len - 1)}:
        if q_len and kv_len:
            compare(mask, q_len, kv_len, block, case.batch, case.heads)


@pytest.mark.parametrize("sizes", [(384, 384), (511, 509), (257, 384), (130, 511)], ids=str)
@pytest.mark.parametrize("block", [(128, 128), (64, 128), (128, 32)], ids=str)
@pytest.mark.parametrize("name", LONG)
def test_longer_masks(name: str, block: tuple[int, int], sizes: tuple[int, int]) -> None:
    mask = LONG[name]
    compare(mask, *sizes, block, max(mask.batch_size, 1), mask.head_count or 2)


def test_block_sizes_and_lengths_as_they_are_given() -> None:
    assert tm.causal.to_block_mask(300).BLOCK_SIZE == (128, 128)
    assert tm.causal.to_block_mask(300, block=64).BLOCK_SIZE == (64, 64)
    assert tm.causal.at(q_start=7).to_block_mask(3).shape == (1, 1, 3, 10)
    assert tm.random(0.5, per_head=True).to_block_mask(130, heads=5).shape == (1, 5, 130, 130)
    with pytest.raises(tm.MaskError, match="varies over heads"):
        tm.random(0.5, per_head=True).to_block_mask(130)
    with pytest.raises(tm.MaskError, match="holds data for 5 queries, but was asked about 6"):
        tm.queries([True] * 5).to_block_mask(6)


@pytest.mark.parametrize(("q_len", "kv_len"), [(0, 3), (3, 0), (0, 0)])
def test_nothing_to_attend(q_len: int, kv_len: int) -> None:
    made = tm.everything.to_block_mask(q_len, kv_len, block=2)
    assert made.kv_num_blocks.sum() == made.full_q_indices.sum() == 0
    assert made.q_indices.shape == (1, 1, -(-kv_len // 2), -(-q_len // 2))


def test_a_block_beyond_the_end_is_partial() -> None:
    """As torch has it: kernels run whole blocks, and only partial ones are masked."""
    made = tm.everything.to_block_mask(256 + 3, 128 + 5)
    assert made.full_kv_num_blocks.tolist() == [[[1, 1, 0]]]
    assert made.kv_num_blocks.tolist() == [[[1, 1, 2]]]


# -- in use ------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["sinks and window", "packed", "per head"])
def test_flex_attention_takes_it(name: str) -> None:
    """torch's own front door, which traces `mask_mod` with dynamo even when nothing is compiled."""
    mask = LONG[name]
    torch.manual_seed(3)
    q, k = torch.randn(2, 3, 131, 16), torch.randn(2, 3, 131, 16)
    out = flex_attention(q, k, k, block_mask=mask.to_block_mask(131))
    assert_same(out, tm.attend(q, k, k, mask))


def test_other_numbers_and_documents_are_no_new_compilation() -> None:
    """Of a function that somebody else compiled: numbers and data are inputs of its graph."""
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, backend=counter, fullgraph=True)
    torch.manual_seed(3)
    q = torch.randn(2, 3, 131, 16)
    for size, *lengths in ([20, 70, 61], [31, 100, 31], [17, 131]):
        mask = (tm.causal & (tm.window(size) | tm.prefix(size // 9))).packed(lengths)
        assert_same(compiled(q, q, q, block_mask=mask.to_block_mask(131)), tm.attend(q, q, q, mask))
    assert counter.frame_count == 1


def test_it_pickles_and_copies() -> None:
    made = LONG["packed"].to_block_mask(400)
    grid = indices(1, 1, 400, 400, "cpu")
    for again in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made), made.to("cpu")):
        assert type(again) is type(made)
        same(again, made)
        assert again.mask_mod == made.mask_mod
        assert torch.equal(again.mask_mod(*grid), made.mask_mod(*grid))
    with pytest.raises((AttributeError, pickle.PicklingError)):
        pickle.dumps(LONG["a function"].to_block_mask(40))  # a mask pickles if its function does


def test_it_moves_with_the_data_of_its_mask() -> None:
    moved = LONG["packed"].to_block_mask(400).to("meta")
    assert moved.kv_indices.is_meta
    assert moved.q_num_blocks.is_meta
    assert moved.mask_mod(*indices(1, 1, 400, 400, "meta")).is_meta


class Rows(Dataset[BlockMask]):
    """Packed rows of different documents, as block masks."""

    lengths = ([53, 101, 46], [7, 190, 3], [200])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, i: int) -> BlockMask:
        return tm.causal.packed(self.lengths[i]).to_block_mask(200)


def only(rows: list[BlockMask]) -> BlockMask:
    return rows[0]


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # newer Pythons, of any loader
@pytest.mark.parametrize("workers", [0, 1])
def test_a_worker_makes_it(workers: int) -> None:
    found = list(DataLoader(Rows(), batch_size=1, num_workers=workers, collate_fn=only))
    assert len(found) == 3
    for made, lengths in zip(found, Rows.lengths, strict=True):
        mask = tm.causal.packed(lengths)
        same(made, theirs(mask, 200, 200, (128, 128), 1, 1))
        grid = indices(1, 1, 200, 200, "cpu")
        assert torch.equal(made.mask_mod(*grid), mask.truth(*grid))


def test_pinning_is_offered_to_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    """`DataLoader(pin_memory=True)` calls `pin_memory`; without a GPU there is none to be had, so a clone stands in."""
    from torch.utils.data._utils.pin_memory import pin_memory

    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)
    made = LONG["packed"].to_block_mask(400)
    pinned = pin_memory({"mask": made})["mask"]
    same(pinned, made)
    assert pinned.kv_indices.data_ptr() != made.kv_indices.data_ptr()
