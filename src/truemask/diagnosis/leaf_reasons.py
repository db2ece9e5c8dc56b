"""Why a leaf of the language lets a pair through or not, in a sentence for each kind."""

from __future__ import annotations

import torch
from torch import Tensor

from truemask.common.formatting import counted, shortened
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.core.mask import Mask
from truemask.masks.core.verdict import Cell
from truemask.masks.leaves.bands import Blocks, Causal, Local, Window
from truemask.masks.leaves.documents import Documents, Labels, Same
from truemask.masks.leaves.matrices import BlockPattern, Dense
from truemask.masks.leaves.patterns import Dilated, Grid, Random, Strided
from truemask.masks.leaves.per_token import GlobalTokens, Keys, Padding, Prefix, Queries, number_for
from truemask.masks.leaves.predicate import Predicate
from truemask.masks.leaves.tree import Tree


def because(leaf: Mask, seen: bool, cell: Cell) -> str:
    """Why `leaf` says what it says of a cell; of `packed`, `padded` and `prepended`, what they add to their base.

    >>> from truemask.masks.leaves.bands import window
    >>> because(window(4), False, Cell(0, 0, 9, 2))
    'key 2 is 7 positions before query 9, and the window reaches 3 back'
    """
    b, h, q, k = cell
    match leaf:
        case Causal():
            return f"{_order(q, k)}" if seen else f"key {k} comes after query {q}"
        case Window(size=size):
            return _window(size, q, k)
        case Local(radius=radius):
            return f"key {k} and query {q} are {_apart(abs(q - k))} apart, {_within(abs(q - k), radius, 'the radius')}"
        case Blocks() | BlockPattern() | Grid() | Dilated() | Strided() | Random():
            return _pattern(leaf, seen, cell)
        case Prefix(length=length):
            return f"key {k} is {_not(seen)}among the first {counted(number_for(length, b), 'key')}"
        case GlobalTokens():
            return _global(leaf, cell)
        case Keys() | Queries():
            name, place = ("key", k) if isinstance(leaf, Keys) else ("query", q)
            return f"{name} {place} is {'flagged' if seen else 'not flagged'}"
        case Padding():
            return _padding(leaf, cell)
        case Documents() | Same() | Packed():
            return _belonging(leaf, cell)
        case Padded(starts=starts):
            return f"{_pads(q, k, number_for(starts, b))} (sample {b} begins at {number_for(starts, b)})"
        case Prepended(k=extra):
            return f"key {k} is one of the {extra} extra keys, which every row sees"
        case Tree():
            return _tree(leaf, seen, cell)
        case Dense(tensor=data):
            place = [min(i, n - 1) for i, n in zip(cell, data.tensor.shape, strict=True)]
            return f"tensor{place} is {seen}"
        case Predicate():
            return f"the function returns {seen} for ({b}, {h}, {q}, {k})"
        case _:
            return f"it lets {'every' if seen else 'no'} pair through"


def quoted(mask: Mask) -> str:
    """A part of an expression in a sentence; cells are not written out.

    >>> from truemask.masks.leaves.bands import causal
    >>> quoted(causal)
    '`causal`'
    """
    return f"`{mask.kind}(...)`" if mask.kind == "dense" else f"`{shortened(mask.text)}`"


def _not(seen: bool) -> str:
    return "" if seen else "not "


def _apart(n: int) -> str:
    return counted(n, "position")


def _within(n: int, most: int, what: str) -> str:
    return f"{'within' if n <= most else 'more than'} {what} of {most}"


def _order(q: int, k: int) -> str:
    return f"key {k} is query {q} itself" if q == k else f"key {k} comes before query {q}"


def _window(size: int, q: int, k: int) -> str:
    if k > q:
        return f"key {k} comes after query {q}, and a window looks back only"
    if q - k >= size:
        return f"key {k} is {_apart(q - k)} before query {q}, and the window reaches {max(size - 1, 0)} back"
    return _order(q, k) if q == k else f"key {k} is {_apart(q - k)} before query {q}: within the window"


def _pattern(leaf: Mask, seen: bool, cell: Cell) -> str:
    _, h, q, k = cell
    match leaf:
        case Blocks(size=n, back=back, ahead=ahead):
            reach = f", and blocks see {back} back and {ahead} ahead" if q // n != k // n else ""
            return f"query {q} is in block {q // n} and key {k} in block {k // n}{reach}"
        case BlockPattern(size=n):
            return f"block row {q // n}, block column {k // n} of the pattern is {seen}"
        case Grid(width=w, radius=r):
            rows, columns = abs(q // w - k // w), abs(q % w - k % w)
            apart = f"{counted(rows, 'row')} and {counted(columns, 'column')}"
            return f"in the image they are {apart} apart; the radius is {r}"
        case Dilated(step=step):
            return f"they are {_apart(abs(q - k))} apart, {_not(seen)}a multiple of {step}"
        case Strided(step=step, last=last):
            return f"key {k} is {_not(seen)}among the last {last} of every {counted(step, 'key')}"
        case Random(rate=rate, per_head=per_head):
            head = f", head {h}" if per_head else ""
            return f"the hash of its block{head} falls {'below' if seen else 'above'} the rate {rate}"
        case _:
            return f"the pattern says {seen}"


def _global(leaf: GlobalTokens, cell: Cell) -> str:
    chosen = set(leaf.positions_.tensor.tolist())
    found = [f"{name} {place}" for name, place in (("query", cell.query), ("key", cell.key)) if place in chosen]
    one = f"{' and '.join(found)} {'are global tokens' if len(found) > 1 else 'is a global token'}"
    return one if found else f"neither query {cell.query} nor key {cell.key} is a global token"


def _padding(leaf: Padding, cell: Cell) -> str:
    sides = {"keys": ("key",), "queries": ("query",), "both": ("query", "key")}[leaf.on]
    places = {"query": cell.query, "key": cell.key}
    if leaf.lengths is not None:
        n = number_for(leaf.lengths, cell.sample)
        bad, has = [f"{side} {places[side]}" for side in sides if places[side] >= n], f"has {counted(n, 'token')}"
    else:
        n = number_for(leaf.starts or 0, cell.sample)
        bad, has = [f"{side} {places[side]}" for side in sides if places[side] < n], f"begins at {n}"
    what = f"{' and '.join(bad)} {'are' if len(bad) > 1 else 'is'} padding" if bad else "they are real tokens"
    return f"{what}: sample {cell.sample} {has}"


def _pads(q: int, k: int, start: int) -> str:
    bad = [f"{side} {place}" for side, place in (("query", q), ("key", k)) if place < start]
    return f"{' and '.join(bad)} {'are' if len(bad) > 1 else 'is'} padding" if bad else "they are real tokens"


def _belonging(leaf: Documents | Same | Packed, cell: Cell) -> str:
    """Which documents or groups they are in."""
    first, second = leaf._sides  # pyright: ignore[reportPrivateUsage]
    if isinstance(first, Labels) and isinstance(second, Labels):
        own, other = _at(first.each, cell.sample, cell.query), _at(second.each, cell.sample, cell.key)
    else:
        own, other = (
            _at(side.document, cell.sample, place)  # pyright: ignore[reportAttributeAccessIssue]
            for side, place in ((first, cell.query), (second, cell.key))
        )
    if isinstance(leaf, Same):
        if leaf.none in (own, other):
            which = f"query {cell.query}" if own == leaf.none else f"key {cell.key}"
            return f"{which} has the label {leaf.none}, which belongs to nothing"
        return (
            f"both have the label {own}"
            if own == other
            else f"query {cell.query} has label {own}, key {cell.key} {other}"
        )
    if own == other:
        return f"both are in document {own}"
    return f"query {cell.query} is in document {own} and key {cell.key} in document {other}"


def _at(table: Tensor, b: int, i: int) -> int:
    row = table if table.ndim == 1 else table[min(b, len(table) - 1)]
    return int(row[i])


def _tree(leaf: Tree, seen: bool, cell: Cell) -> str:
    lengths = leaf.lengths.tensor if leaf.lengths is not None else torch.ones_like(leaf.parents.tensor)
    ends = lengths[min(cell.sample, len(lengths) - 1)].cumsum(0) if lengths.ndim == 2 else lengths.cumsum(0)
    own, other = (int(torch.searchsorted(ends, place, right=True)) for place in (cell.query, cell.key))
    if own == other:
        return f"key {cell.key} is {_not(seen)}at or before query {cell.query} in the same node"
    kin = "an ancestor" if seen else "no ancestor"
    return f"key {cell.key} is in node {other}, {kin} of node {own}, which has query {cell.query}"
