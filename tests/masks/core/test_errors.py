"""What a wrong call says: the thing, the value, the reason and the way out, word for word.

The messages are a snapshot: a change of one is a change that somebody reads, so it is made here on purpose. (The file
is long because it is that table.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import truemask as tm

FLAGS = [True, False, True, True, False]
lang: Any = tm  # unchecked: the mistakes below are mistakes of type, too


def cells(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


MESSAGES: dict[str, tuple[Callable[[], object], str]] = {
    "if": (
        lambda: bool(lang.causal),
        "the mask `causal` is neither true nor false: Python's `and`, `or`, `not` and `if` cannot combine "
        "masks. Use `&`, `|` and `~`",
    ),
    "and": (
        lambda: lang.causal and lang.window(3),
        "the mask `causal` is neither true nor false: Python's `and`, `or`, `not` and `if` cannot combine "
        "masks. Use `&`, `|` and `~`",
    ),
    "not": (
        lambda: not lang.causal,
        "the mask `causal` is neither true nor false: Python's `and`, `or`, `not` and `if` cannot combine "
        "masks. Use `&`, `|` and `~`",
    ),
    "calling a value": (
        lambda: lang.causal(),
        "`causal` is a value, not a function: write `causal` without parentheses (its cells are `mask[q, k]`,"
        " its meaning on index tensors `mask.truth(b, h, q, k)`)",
    ),
    "calling a value with a size": (
        lambda: lang.causal(5),
        "`causal` is a value, not a function: write `causal` without parentheses (its cells are `mask[q, k]`,"
        " its meaning on index tensors `mask.truth(b, h, q, k)`)",
    ),
    "calling a function's mask": (
        lambda: lang.window(3)(5),
        "`window(3)` is a value, not a function: write `window(3)` without parentheses (its cells are "
        "`mask[q, k]`, its meaning on index tensors `mask.truth(b, h, q, k)`)",
    ),
    "calling everything": (
        lambda: lang.everything(),
        "`everything` is a value, not a function: write `everything` without parentheses (its cells are "
        "`mask[q, k]`, its meaning on index tensors `mask.truth(b, h, q, k)`)",
    ),
    "and with a tensor": (
        lambda: lang.causal & cells(3, 3),
        "`&` combines masks with masks, got bool [3, 3] on cpu: wrap a boolean tensor in `dense(tensor)`, key"
        " padding in `keys(flags)`",
    ),
    "and with a tensor first": (
        lambda: cells(3, 3) & lang.causal,
        "`&` combines masks with masks, got bool [3, 3] on cpu: wrap a boolean tensor in `dense(tensor)`, key"
        " padding in `keys(flags)`",
    ),
    "or with a function": (
        lambda: lang.causal | lang.window,
        "`|` combines masks with masks, got function <function window at 0x...>: call it with its arguments first",
    ),
    "and with None": (
        lambda: lang.causal & None,
        "`&` combines masks with masks, got NoneType None: `everything` and `nothing` are the constants",
    ),
    "and with True": (
        lambda: True & lang.causal,
        "`&` combines masks with masks, got bool True: `everything` and `nothing` are the constants",
    ),
    "minus a number": (
        lambda: lang.causal - 3,
        "`-` combines masks with masks, got int 3: `everything` and `nothing` are the constants",
    ),
    "number minus": (
        lambda: 3 - lang.causal,
        "`-` combines masks with masks, got int 3: `everything` and `nothing` are the constants",
    ),
    "window 0": (
        lambda: lang.window(0),
        "window(size) must be at least 1 and below 2**40, got 0",
    ),
    "window negative": (
        lambda: lang.window(-3),
        "window(size) must be at least 1 and below 2**40, got -3",
    ),
    "window float": (
        lambda: lang.window(2.0),
        "window(size) must be a whole number, got float 2.0",
    ),
    "window bool": (
        lambda: lang.window(True),
        "window(size) must be a whole number, got bool True",
    ),
    "window huge": (
        lambda: lang.window(10**30),
        "window(size) must be at least 1 and below 2**40, got a number of 100 bits",
    ),
    "local negative": (
        lambda: lang.local(-1),
        "local(radius) must be at least 0 and below 2**40, got -1",
    ),
    "prefix negative": (
        lambda: lang.prefix(-1),
        "prefix(length) must be at least 0 and below 2**40, got -1",
    ),
    "prefix negative sample": (
        lambda: lang.prefix([3, -1]),
        "prefix(length) must be 0 or more for each of at least one sample, got [3, -1]",
    ),
    "prefix empty": (
        lambda: lang.prefix([]),
        "prefix(length) must be 0 or more for each of at least one sample, got []",
    ),
    "prefix 2d": (
        lambda: lang.prefix([[1, 2], [3, 4]]),
        "prefix(length) must be [b], got int64 [2, 2] on cpu",
    ),
    "blocks 0": (
        lambda: lang.blocks(0),
        "blocks(size) must be at least 1 and below 2**40, got 0",
    ),
    "blocks back": (
        lambda: lang.blocks(3, back=-1),
        "blocks(back=...) must be at least 0 and below 2**40, got -1",
    ),
    "dilated 0": (
        lambda: lang.dilated(0),
        "dilated(step) must be at least 1 and below 2**40, got 0",
    ),
    "strided last": (
        lambda: lang.strided(3, last=4),
        "strided: last=4 columns of every step=3 is more than there are",
    ),
    "random rate": (
        lambda: lang.random(1.5),
        "random(rate) is a probability between 0 and 1, got float 1.5",
    ),
    "random nan": (
        lambda: lang.random(float("nan")),
        "random(rate) is a probability between 0 and 1, got float nan",
    ),
    "random seed": (
        lambda: lang.random(0.5, seed=2**32),
        "random(seed=...) must be below 2**32, got 4294967296",
    ),
    "random negative seed": (
        lambda: lang.random(0.5, seed=-1),
        "random(seed=...) must be at least 0 and below 2**40, got -1",
    ),
    "random per_head": (
        lambda: lang.random(0.5, per_head=3),
        "random(per_head=...) is True or False, got int 3",
    ),
    "grid": (
        lambda: lang.grid(0, 3, 1),
        "grid(height) must be at least 1 and below 2**40, got 0",
    ),
    "keys float": (
        lambda: lang.keys(torch.ones(5)),
        "keys(flags) must be bool (True = may attend), got float32 [5] on cpu. A mask of numbers says nothing"
        " of what they mean: for 1 = real use `from_huggingface_2d`, for 0 and -inf use `from_additive`, for "
        "torch's MultiheadAttention (True = masked out) use `from_torch_mha`; other floats are a bias "
        "(`attend(bias=)`)",
    ),
    "keys int": (
        lambda: lang.keys([1, 0, 1]),
        "keys(flags) must be bool (True = may attend), got int64 [3] on cpu. A mask of numbers says nothing "
        "of what they mean: for 1 = real use `from_huggingface_2d`, for 0 and -inf use `from_additive`, for "
        "torch's MultiheadAttention (True = masked out) use `from_torch_mha`; other floats are a bias "
        "(`attend(bias=)`)",
    ),
    "keys 3d": (
        lambda: lang.keys(cells(2, 2, 2)),
        "keys(flags) must be [n] or [b, n], got bool [2, 2, 2] on cpu",
    ),
    "keys mask": (
        lambda: lang.keys(lang.causal),
        "keys(flags) must be a bool tensor [n] or [b, n], got Causal causal",
    ),
    "queries additive": (
        lambda: lang.queries(torch.tensor([0.0, float("-inf")])),
        "queries(flags) must be bool (True = may attend), got float32 [2] on cpu. A mask of numbers says "
        "nothing of what they mean: for 1 = real use `from_huggingface_2d`, for 0 and -inf use "
        "`from_additive`, for torch's MultiheadAttention (True = masked out) use `from_torch_mha`; other "
        "floats are a bias (`attend(bias=)`)",
    ),
    "dense float": (
        lambda: lang.dense(torch.zeros(3, 3)),
        "dense(tensor) must be bool (True = may attend), got float32 [3, 3] on cpu. A mask of numbers says "
        "nothing of what they mean: for 1 = real use `from_huggingface_2d`, for 0 and -inf use "
        "`from_additive`, for torch's MultiheadAttention (True = masked out) use `from_torch_mha`; other "
        "floats are a bias (`attend(bias=)`)",
    ),
    "dense int": (
        lambda: lang.dense(torch.ones(3, 3, dtype=torch.int64)),
        "dense(tensor) must be bool (True = may attend), got int64 [3, 3] on cpu. A mask of numbers says "
        "nothing of what they mean: for 1 = real use `from_huggingface_2d`, for 0 and -inf use "
        "`from_additive`, for torch's MultiheadAttention (True = masked out) use `from_torch_mha`; other "
        "floats are a bias (`attend(bias=)`)",
    ),
    "dense 3d": (
        lambda: lang.dense(cells(2, 3, 5)),
        "dense(tensor) got bool [2, 3, 5] on cpu, which can be read two ways: axes='bqk' (2 samples, heads "
        "alike) or axes='hqk' (2 heads, samples alike; x-transformers' reading). Say which",
    ),
    "dense 1d": (
        lambda: lang.dense(cells(3)),
        "dense(tensor) must be [q, k] or [b, h, q, k], got bool [3] on cpu",
    ),
    "dense 5d": (
        lambda: lang.dense(cells(1, 1, 1, 3, 3)),
        "dense(tensor) must be [q, k] or [b, h, q, k], got bool [1, 1, 1, 3, 3] on cpu",
    ),
    "dense axes": (
        lambda: lang.dense(cells(2, 3, 5), axes="kq"),
        "dense(axes=...) is one of 'qk', 'bqk', 'hqk', 'bhqk', got str 'kq'",
    ),
    "dense axes dims": (
        lambda: lang.dense(cells(3, 5), axes="bqk"),
        "dense(axes='bqk') needs 3 dimensions, got bool [3, 5] on cpu",
    ),
    "block_pattern float": (
        lambda: lang.block_pattern(torch.ones(3, 3), 2),
        "block_pattern(matrix) must be bool (True = may attend), got float32 [3, 3] on cpu. A mask of numbers"
        " says nothing of what they mean: for 1 = real use `from_huggingface_2d`, for 0 and -inf use "
        "`from_additive`, for torch's MultiheadAttention (True = masked out) use `from_torch_mha`; other "
        "floats are a bias (`attend(bias=)`)",
    ),
    "block_pattern 4d": (
        lambda: lang.block_pattern(cells(1, 1, 3, 3), 2),
        "block_pattern(matrix) must be [rows, columns] or [h, rows, columns], got bool [1, 1, 3, 3] on cpu",
    ),
    "block_pattern empty": (
        lambda: lang.block_pattern(cells(0, 3), 2),
        "block_pattern(matrix) needs at least one block, got bool [0, 3] on cpu",
    ),
    "documents both": (
        lambda: lang.documents([2, 3], ids=[0, 0, 1]),
        "documents needs one of `lengths` (tokens per document) and `ids=` (a document for each token)",
    ),
    "documents none": (
        lambda: lang.documents(),
        "documents needs one of `lengths` (tokens per document) and `ids=` (a document for each token)",
    ),
    "documents negative": (
        lambda: lang.documents([2, -3]),
        "lengths are tokens per document, 0 or more and at least one document: got [2, -3]",
    ),
    "documents float": (
        lambda: lang.documents(ids=[0.0, 1.0]),
        "documents(ids=...) must be whole numbers [n] or [b, n], got float32 [2] on cpu",
    ),
    "documents bool": (
        lambda: lang.documents(ids=[True, False]),
        "documents(ids=...) must be whole numbers [n] or [b, n], got bool [2] on cpu",
    ),
    "documents totals": (
        lambda: lang.documents([[2, 3], [1, 1]]),
        "lengths of the samples must add up to the same row length, got [5, 2]: count the padding of a "
        "shorter row as a last document",
    ),
    "documents kv mixed": (
        lambda: lang.documents([2, 3], kv_ids=[0, 1]),
        "documents: `kv_lengths` goes with `lengths`, and `kv_ids` with `ids`",
    ),
    "documents kv count": (
        lambda: lang.documents([2, 3], kv_lengths=[5]),
        "lengths has 2 documents and kv_lengths 1: the i-th ones belong together, so both need the same "
        "number (0 is a document without tokens)",
    ),
    "same none": (
        lambda: lang.same([1, 2], none=1.5),
        "same(none=...) is the label of tokens that belong to nothing, a whole number; got float 1.5",
    ),
    "same float": (
        lambda: lang.same(torch.ones(3)),
        "same(labels) must be whole numbers [n] or [b, n], got float32 [3] on cpu",
    ),
    "same batches": (
        lambda: lang.same(torch.zeros(2, 3, dtype=torch.int64), kv_labels=torch.zeros(3, 3, dtype=torch.int64)),
        "the parts of `same([[0, 0, 0], [0, 0, 0]], kv_labels=[[0, 0, 0], [0, 0, 0], [0, 0, 0]])` hold data "
        "for 2 and for 3 samples: they must agree",
    ),
    "padding both": (
        lambda: lang.padding(lengths=[1], starts=[2]),
        "padding needs one of `lengths=` (right padding) and `starts=` (left padding), not both or none",
    ),
    "padding none": (
        lambda: lang.padding(),
        "padding needs one of `lengths=` (right padding) and `starts=` (left padding), not both or none",
    ),
    "padding on": (
        lambda: lang.padding(lengths=[1], on="rows"),
        "padding(on=...) is 'both', 'keys' or 'queries', got str 'rows'",
    ),
    "padding negative": (
        lambda: lang.padding(starts=[-1]),
        "padding(starts=...) must be 0 or more for each of at least one sample, got [-1]",
    ),
    "tree parent": (
        lambda: lang.tree([-1, 5]),
        "tree(parents) are indices of nodes, or -1 for a root: 2 nodes, got [-1, 5]",
    ),
    "tree cycle": (
        lambda: lang.tree([-1, 2, 1]),
        "tree(parents): 2 nodes are their own ancestors, so they hang on no root (-1)",
    ),
    "tree lengths": (
        lambda: lang.tree([-1, 0], lengths=[3]),
        "tree(lengths=...) are the tokens of each of the 2 nodes, 0 or more; got [3]",
    ),
    "tree batches": (
        lambda: lang.tree([[-1, 0], [-1, 0]], lengths=[[1, 1], [1, 1], [2, 0]]),
        "tree: parents speak of 2 samples and lengths of 3",
    ),
    "tree empty": (
        lambda: lang.tree([]),
        "tree(parents) are indices of nodes, or -1 for a root: 0 nodes, got []",
    ),
    "predicate value": (
        lambda: lang.predicate(3),
        "predicate(fn) takes a function of (b, h, q, k), got int 3",
    ),
    "predicate of two": (
        lambda: lang.predicate(lambda q, k: q >= k),  # pyright: ignore
        "predicate(fn) calls fn(b, h, q, k): index tensors of the sample, the query head, the query and the key, in "
        "this order; `<lambda>(q, k)` takes 2: write `lambda b, h, q, k: ...`",
    ),
    "predicate score_mod": (
        lambda: lang.predicate(lambda score, b, h, q, k: score),  # pyright: ignore
        "predicate(fn) calls fn(b, h, q, k): index tensors of the sample, the query head, the query and the key, in "
        "this order; `<lambda>(score, b, h, q, k)` takes 5: a score_mod changes scores, which is a bias: "
        "`attend(..., bias=...)`",
    ),
    "predicate order": (
        lambda: lang.predicate(lambda q, k, b, h: q >= k),
        "predicate(fn) calls fn(b, h, q, k): index tensors of the sample, the query head, the query and the key, in "
        "this order; `<lambda>(q, k, b, h)` names them in another",
    ),
    "predicate with and": (
        lambda: lang.predicate(lambda b, h, q, k: q >= k and k > 3).to_dense(5),
        "`predicate(<lambda>.<locals>.<lambda>)` asks whether a tensor is true: its indices are whole tensors, so "
        "combine comparisons with `&`, `|` and `~` instead of `and`, `or`, `not` and `if`",
    ),
    "predicate mask": (
        lambda: lang.predicate(lang.causal),
        "predicate(fn) takes a function of (b, h, q, k), got Causal causal",
    ),
    "per_head mask": (
        lambda: lang.per_head(lang.causal),
        "per_head takes a list of masks, got Causal causal",
    ),
    "per_head empty": (
        lambda: lang.per_head([]),
        "per_head needs a mask for each head, got none",
    ),
    "per_head tensor": (
        lambda: lang.per_head([cells(2, 2)]),
        "`per_head` combines masks with masks, got bool [2, 2] on cpu: wrap a boolean tensor in "
        "`dense(tensor)`, key padding in `keys(flags)`",
    ),
    "per_head wrong count": (
        lambda: lang.per_head([lang.per_head([lang.causal, lang.causal, lang.causal]), lang.causal]),
        "per_head got 2 masks, one of which holds data for another number of heads",
    ),
    "per_sample wrong count": (
        lambda: lang.per_sample([lang.prefix([1, 2, 3]), lang.causal]),
        "per_sample got 2 masks, one of which holds data for another number of samples",
    ),
    "at negative": (
        lambda: lang.causal.at(q_start=-1),
        "q_start must be at least 0 and below 2**40, got -1",
    ),
    "at float": (
        lambda: lang.causal.at(1.5),
        "q_start must be a whole number, got float 1.5",
    ),
    "take nothing": (
        lambda: lang.causal.take(),
        "take needs positions: `take(q=positions)`, `take(k=positions)` or both",
    ),
    "take negative": (
        lambda: lang.causal.take(q=[3, -1]),
        "take(q=...): positions are 0 or more, got -1; leave out rows that do not exist",
    ),
    "take flags": (
        lambda: lang.causal.take(k=cells(3)),
        "take(k=...) must be whole numbers [n] or [b, n], got bool [3] on cpu",
    ),
    "take beyond": (
        lambda: lang.keys(FLAGS).take(k=[2, 5]),
        "`keys([True, False, True, True, False])` holds data for 5 keys, but was asked about 6",
    ),
    "take 3d": (
        lambda: lang.causal.take(q=torch.zeros(1, 2, 3, dtype=torch.int64)),
        "take(q=...) must be [n] or [b, n], got int64 [1, 2, 3] on cpu",
    ),
    "select nothing": (
        lambda: lang.causal.select(),
        "select needs indices: `select(samples=[...])`, `select(heads=[...])` or both",
    ),
    "select beyond": (
        lambda: lang.prefix([1, 2, 3]).select(samples=[0, 3]),
        "select: samples [0, 3] are out of range, the mask holds 3",
    ),
    "select negative": (
        lambda: lang.prefix([1, 2, 3]).select(samples=[-1]),
        "select: samples [-1] are out of range, the mask holds 3",
    ),
    "select heads beyond": (
        lambda: lang.per_head([lang.causal, lang.causal & lang.causal]).select(heads=[2]),
        "select: heads [2] are out of range, the mask holds 2",
    ),
    "packed negative": (
        lambda: lang.causal.packed([2, -1]),
        "lengths are tokens per document, 0 or more and at least one document: got [2, -1]",
    ),
    "packed empty": (
        lambda: lang.causal.packed([]),
        "lengths are tokens per document, 0 or more and at least one document: got []",
    ),
    "packed beyond": (
        lambda: lang.keys(FLAGS).packed([3, 7]),
        "`keys([True, False, True, True, False])` holds data for 5 keys, but was asked about 7",
    ),
    "packed kv": (
        lambda: lang.causal.packed([2, 3], kv_lengths=[5]),
        "lengths has 2 documents and kv_lengths 1: the i-th ones belong together, so both need the same "
        "number (0 is a document without tokens)",
    ),
    "packed totals": (
        lambda: lang.causal.packed([[2, 3], [1, 1]]),
        "lengths of the samples must add up to the same row length, got [5, 2]: count the padding of a "
        "shorter row as a last document",
    ),
    "padded negative": (
        lambda: lang.causal.padded([-1]),
        "padded needs the number of pads of each sample, 0 or more: got [-1]",
    ),
    "padded number": (
        lambda: lang.causal.padded(3),
        "starts must be whole numbers [b], got int 3",
    ),
    "prepended seen": (
        lambda: lang.causal.prepended(q=1, seen=lang.causal),
        "prepended: `seen` must be the same for every query, but `causal` varies with it",
    ),
    "batch mismatch": (
        lambda: lang.prefix([1, 2]) & lang.prefix([1, 2, 3]),
        "cannot combine `prefix([1, 2])`, which holds data for 2 samples, with `prefix([1, 2, 3])`, which has 3",
    ),
    "head mismatch": (
        lambda: lang.per_head([lang.causal, lang.causal.T]) | lang.per_head([lang.causal, lang.causal.T, lang.causal]),
        "cannot combine `per_head([causal, causal.T])`, which holds data for 2 heads, with `per_head([causal,"
        " causal.T, causal])`, which has 3",
    ),
    "keys beyond": (
        lambda: lang.keys(FLAGS).to_dense(5, 7),
        "`keys([True, False, True, True, False])` holds data for 5 keys, but was asked about 7",
    ),
    "queries beyond": (
        lambda: lang.queries(FLAGS).to_dense(7, 5),
        "`queries([True, False, True, True, False])` holds data for 5 queries, but was asked about 7",
    ),
    "documents beyond": (
        lambda: lang.documents([2, 3]).tiles(7),
        "`documents([2, 3])` holds data for 5 queries, but was asked about 7",
    ),
    "tree beyond": (
        lambda: lang.tree([-1, 0]).count(3),
        "`tree([-1, 0])` holds data for 2 positions, but was asked about 3",
    ),
    "dense beyond": (
        lambda: lang.dense(cells(3, 5)).density(4, 5),
        "`dense([[[[True, True, True, True, True], [True, True, True, True, True], [True, True, True, True, "
        "True]]]])` holds data for 3 queries, but was asked about 4",
    ),
    "grid beyond": (
        lambda: lang.grid(2, 3, 1).to_dense(7),
        "`grid(2, 3, 1)` is an image of 2 x 3 = 6 positions, but was asked about 7",
    ),
    "block_pattern beyond": (
        lambda: lang.block_pattern(cells(2, 2), 3).to_dense(7),
        "`block_pattern([[True, True], [True, True]], 3)` holds data for 6 queries, but was asked about 7",
    ),
    "packed total beyond": (
        lambda: lang.causal.packed([2, 3]).to_dense(6),
        "`causal.packed([2, 3])` packs documents of 5 queries in all, but was asked about 6",
    ),
    "take asked beyond": (
        lambda: lang.causal.take(q=[1, 2]).to_dense(3),
        "`causal.take(q=[1, 2])` takes 2 queries, but was asked about 3",
    ),
    "inside beyond": (
        lambda: (lang.causal & ~lang.keys(FLAGS).at(k_start=2)).to_dense(5),
        "`keys([True, False, True, True, False])` holds data for 5 keys, but was asked about 7",
    ),
    "cell beyond": (
        lambda: lang.keys(FLAGS)[0, 5],
        "`keys([True, False, True, True, False])` holds data for 5 keys, but was asked about 6",
    ),
    "batch asked": (
        lambda: lang.prefix([1, 2]).to_dense(3, batch=3),
        "the mask `prefix([1, 2])` holds data for 2 samples, but was asked about 3",
    ),
    "heads asked": (
        lambda: lang.per_head([lang.causal, lang.causal.T]).to_dense(3, heads=3),
        "the mask `per_head([causal, causal.T])` holds data for 2 heads, but was asked about 3",
    ),
    "heads needed": (
        lambda: lang.random(0.5, per_head=True).to_dense(3),
        "the mask `random(0.5, per_head=True)` varies over heads and holds no number of them: pass `heads=`",
    ),
    "negative length": (
        lambda: lang.causal.to_dense(-1),
        "q_len must be at least 0 and below 2**40, got -1",
    ),
    "negative kv": (
        lambda: lang.causal.to_dense(3, -5),
        "kv_len must be at least 0 and below 2**40, got -5",
    ),
    "float length": (
        lambda: lang.causal.to_dense(3.5),
        "q_len must be a whole number, got float 3.5",
    ),
    "tensor length": (
        lambda: lang.causal.to_dense(torch.ones(3)),
        "q_len must be a whole number, got float32 [3] on cpu",
    ),
    "block 0": (
        lambda: lang.causal.tiles(5, block=0),
        "block must be at least 1 and below 2**40, got 0",
    ),
    "block three": (
        lambda: lang.causal.tiles(5, block=(1, 2, 3)),
        "block is an int or a pair (queries, keys), got tuple (1, 2, 3)",
    ),
    "block str": (
        lambda: lang.causal.tiles(5, block="128"),
        "block must be a whole number, got str '128'",
    ),
    "cell one": (
        lambda: lang.causal[3],
        "a cell is `mask[q, k]`, two whole numbers; got int 3",
    ),
    "cell slice": (
        lambda: lang.causal[1:3, 2],
        "q must be a whole number, got slice slice(1, 3, None)",
    ),
    "cell negative": (
        lambda: lang.causal[-1, 0],
        "q must be at least 0 and below 2**40, got -1",
    ),
    "cell varies": (
        lambda: lang.prefix([1, 2])[0, 0],
        "the mask `prefix([1, 2])` varies over samples: choose one first, with `mask.select(samples=[0], "
        "heads=[0])[q, k]`",
    ),
    "batch 0": (
        lambda: lang.causal.to_dense(3, batch=-1),
        "samples must be at least 0 and below 2**40, got -1",
    ),
    "equivalent tensor": (
        lambda: lang.causal.equivalent(torch.ones(3, 3), 3),
        "`equivalent` combines masks with masks, got float32 [3, 3] on cpu: wrap a boolean tensor in "
        "`dense(tensor)`, key padding in `keys(flags)`",
    ),
    "documents str": (
        lambda: lang.documents("ab"),
        "lengths must be whole numbers [m] or [b, m], got str 'ab'",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_the_message(name: str) -> None:
    call, message = MESSAGES[name]
    with pytest.raises(tm.MaskError) as caught:
        call()
    found = str(caught.value)
    assert found.split(" at 0x")[0] == message.split(" at 0x")[0]
    assert isinstance(caught.value, (tm.TruemaskError, ValueError))


@pytest.mark.parametrize("name", MESSAGES)
def test_no_message_is_bare(name: str) -> None:
    message = MESSAGES[name][1]
    assert len(message) > 30
    assert "invalid" not in message.lower()


def test_a_predicate_must_answer_with_booleans() -> None:
    for answer, shown in ((3, "int 3"), (torch.ones(1), "float32 [1]")):
        with pytest.raises(tm.MaskError, match="must return a bool tensor that broadcasts") as caught:
            lang.predicate(lambda b, h, q, k, answer=answer: answer)
        assert shown in str(caught.value)


def test_a_predicate_over_samples_asks_for_their_number() -> None:
    mask = tm.predicate(lambda b, h, q, k: q + b >= k)
    with pytest.raises(tm.MaskError, match="varies over samples and holds no number of them: pass `batch=`"):
        mask.to_dense(3)
    assert mask.to_dense(3, batch=2).shape == (2, 1, 3, 3)


def test_numbers_for_a_mask_name_every_importer() -> None:
    for wrong in (torch.ones(5), torch.ones(5, dtype=torch.int64), torch.zeros(5, dtype=torch.float64)):
        with pytest.raises(tm.MaskError) as caught:
            tm.keys(wrong)
        for importer in ("from_huggingface_2d", "from_additive", "from_torch_mha"):
            assert importer in str(caught.value)
            assert callable(getattr(tm, importer))


def test_asking_beyond_the_data_shows_both_numbers_everywhere() -> None:
    mask = tm.causal & (tm.window(3) | tm.keys(FLAGS))
    questions = [mask.to_dense, mask.tiles, mask.count, mask.density, mask.dead_queries, mask.dead_keys, mask.show]
    for ask in questions:
        with pytest.raises(tm.MaskError, match="5 keys, but was asked about 7"):
            ask(3, 7)
    with pytest.raises(tm.MaskError, match="5 keys, but was asked about 7"):
        mask.check(3, 7)
    with pytest.raises(tm.MaskError, match="5 keys, but was asked about 7"):
        mask.equivalent(tm.causal, 3, 7)
    with pytest.raises(tm.MaskError, match="5 keys, but was asked about 7"):
        mask.at(k_start=4).to_dense(1, 3)


def nested(levels: int) -> tm.Mask:
    mask = tm.causal
    for _ in range(levels):
        mask = (mask & tm.window(3)) | tm.prefix(2)
    return mask


def test_a_deep_expression_is_refused_before_python_gives_up() -> None:
    assert nested(50).to_dense(5).any()
    with pytest.raises(tm.MaskError, match="nested more than"):
        nested(1000)
    flat = tm.window(1)
    for size in range(2, 300):
        flat = flat | tm.window(size)
    assert flat.equivalent(tm.window(299), 331)
    assert tm.parse(flat.text) == flat
