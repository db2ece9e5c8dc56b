"""Why a leaf of the language lets a pair through or not, in a sentence for each kind."""

from __future__ import annotations

import torch

from truemask.common.formatting import counted, shortened
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.compose.per_axis import Select
from truemask.masks.core.mask import Mask
from truemask.masks.core.verdict import Cell
from truemask.masks.leaves.bands import Blocks, Causal, Local, Window
from truemask.masks.leaves.documents import Documents, Same
from truemask.masks.leaves.matrices import BlockPattern, Dense
from truemask.masks.leaves.patterns import Dilated, Grid, Random, Strided
from truemask.masks.leaves.per_token import GlobalTokens, Keys, Padding, Prefix, Queries, number_for
from truemask.masks.leaves.predicate import Predicate
from truemask.masks.leaves.tree import Tree
from truemask.masks.structure.data import cells_held
from truemask.masks.structure.documents import labels_at
from truemask.masks.structure.groups import BOOLEAN, CONSTANTS, PER_AXIS, REINDEXED
from truemask.masks.structure.open_functions import open_function, register


@open_function
def because(mask: Mask, seen: bool, cell: Cell) -> str:
    """Why a mask says what it says of a cell; of `packed`, `padded` and `prepended`, what they add to their base.

    >>> from truemask.masks.leaves.bands import window
    >>> because(window(4), False, Cell(0, 0, 9, 2))
    'key 2 is 7 positions before query 9, and the window reaches 3 back'
    """
    raise NotImplementedError


@register(because, *CONSTANTS)
def _constant(_: Mask, seen: bool, __: Cell) -> str:
    return f"it lets {'every' if seen else 'no'} pair through"


@register(because, *BOOLEAN, *PER_AXIS, Select, *REINDEXED)
def _parts(_: Mask, seen: bool, __: Cell) -> str:
    return f"its parts {'let' if seen else 'do not let'} the pair through"


@register(because, Causal)
def _causal(_: Causal, seen: bool, cell: Cell) -> str:
    return _order(cell.query, cell.key) if seen else f"key {cell.key} comes after query {cell.query}"


@register(because, Window)
def _window(mask: Window, _: bool, cell: Cell) -> str:
    q, k = cell.query, cell.key
    if k > q:
        return f"key {k} comes after query {q}, and a window looks back only"
    if q - k >= mask.size:
        return f"key {k} is {_apart(q - k)} before query {q}, and the window reaches {max(mask.size - 1, 0)} back"
    return _order(q, k) if q == k else f"key {k} is {_apart(q - k)} before query {q}: within the window"


@register(because, Local)
def _local(mask: Local, _: bool, cell: Cell) -> str:
    distance = abs(cell.query - cell.key)
    reach = f"{'within' if distance <= mask.radius else 'more than'} the radius of {mask.radius}"
    return f"key {cell.key} and query {cell.query} are {_apart(distance)} apart, {reach}"


@register(because, Blocks)
def _blocks(mask: Blocks, _: bool, cell: Cell) -> str:
    row, column = cell.query // mask.size, cell.key // mask.size
    reach = f", and blocks see {mask.back} back and {mask.ahead} ahead" if row != column else ""
    return f"query {cell.query} is in block {row} and key {cell.key} in block {column}{reach}"


@register(because, BlockPattern)
def _block_pattern(mask: BlockPattern, seen: bool, cell: Cell) -> str:
    return f"block row {cell.query // mask.size}, block column {cell.key // mask.size} of the pattern is {seen}"


@register(because, Grid)
def _grid(mask: Grid, _: bool, cell: Cell) -> str:
    rows = abs(cell.query // mask.width - cell.key // mask.width)
    columns = abs(cell.query % mask.width - cell.key % mask.width)
    apart = f"{counted(rows, 'row')} and {counted(columns, 'column')}"
    return f"in the image they are {apart} apart; the radius is {mask.radius}"


@register(because, Dilated)
def _dilated(mask: Dilated, seen: bool, cell: Cell) -> str:
    return f"they are {_apart(abs(cell.query - cell.key))} apart, {_not(seen)}a multiple of {mask.step}"


@register(because, Strided)
def _strided(mask: Strided, seen: bool, cell: Cell) -> str:
    return f"key {cell.key} is {_not(seen)}among the last {mask.last} of every {counted(mask.step, 'key')}"


@register(because, Random)
def _random(mask: Random, seen: bool, cell: Cell) -> str:
    head = f", head {cell.head}" if mask.per_head else ""
    return f"the hash of its block{head} falls {'below' if seen else 'above'} the rate {mask.rate}"


@register(because, Prefix)
def _prefix(mask: Prefix, seen: bool, cell: Cell) -> str:
    length = number_for(mask.length, cell.sample)
    return f"key {cell.key} is {_not(seen)}among the first {counted(length, 'key')}"


@register(because, GlobalTokens)
def _global_tokens(mask: GlobalTokens, _: bool, cell: Cell) -> str:
    positions = set(mask.positions_.tensor.tolist())
    tokens = [f"{name} {place}" for name, place in (("query", cell.query), ("key", cell.key)) if place in positions]
    if not tokens:
        return f"neither query {cell.query} nor key {cell.key} is a global token"
    return f"{' and '.join(tokens)} {'are global tokens' if len(tokens) > 1 else 'is a global token'}"


@register(because, Keys)
def _keys(_: Keys, seen: bool, cell: Cell) -> str:
    return f"key {cell.key} is {_not(seen)}flagged"


@register(because, Queries)
def _queries(_: Queries, seen: bool, cell: Cell) -> str:
    return f"query {cell.query} is {_not(seen)}flagged"


@register(because, Padding)
def _padding(mask: Padding, _: bool, cell: Cell) -> str:
    sides = {"keys": ("key",), "queries": ("query",), "both": ("query", "key")}[mask.on]
    places = {"query": cell.query, "key": cell.key}
    if mask.lengths is not None:
        n = number_for(mask.lengths, cell.sample)
        pads, extent = [f"{side} {places[side]}" for side in sides if places[side] >= n], f"has {counted(n, 'token')}"
    else:
        n = number_for(mask.starts or 0, cell.sample)
        pads, extent = [f"{side} {places[side]}" for side in sides if places[side] < n], f"begins at {n}"
    return f"{_pads(pads)}: sample {cell.sample} {extent}"


@register(because, Padded)
def _padded(mask: Padded, _: bool, cell: Cell) -> str:
    start = number_for(mask.starts, cell.sample)
    pads = [f"{side} {place}" for side, place in (("query", cell.query), ("key", cell.key)) if place < start]
    return f"{_pads(pads)} (sample {cell.sample} begins at {start})"


@register(because, Prepended)
def _prepended(mask: Prepended, _: bool, cell: Cell) -> str:
    return f"key {cell.key} is one of the {mask.k} extra keys, which every row sees"


@register(because, Documents, Packed)
def _documents(mask: Documents | Packed, _: bool, cell: Cell) -> str:
    row, column = labels_at(mask, cell) or (0, 0)
    if row == column:
        return f"both are in document {row}"
    return f"query {cell.query} is in document {row} and key {cell.key} in document {column}"


@register(because, Same)
def _same(mask: Same, _: bool, cell: Cell) -> str:
    row, column = labels_at(mask, cell) or (0, 0)
    if mask.none in (row, column):
        which = f"query {cell.query}" if row == mask.none else f"key {cell.key}"
        return f"{which} has the label {mask.none}, which belongs to nothing"
    if row == column:
        return f"both have the label {row}"
    return f"query {cell.query} has label {row}, key {cell.key} {column}"


@register(because, Tree)
def _tree(mask: Tree, seen: bool, cell: Cell) -> str:
    lengths = mask.lengths.tensor if mask.lengths is not None else torch.ones_like(mask.parents.tensor)
    ends = lengths[min(cell.sample, len(lengths) - 1)].cumsum(0) if lengths.ndim == 2 else lengths.cumsum(0)
    row, column = (int(torch.searchsorted(ends, place, right=True)) for place in (cell.query, cell.key))
    if row == column:
        return f"key {cell.key} is {_not(seen)}at or before query {cell.query} in the same node"
    kin = "an ancestor" if seen else "no ancestor"
    return f"key {cell.key} is in node {column}, {kin} of node {row}, which has query {cell.query}"


@register(because, Dense)
def _dense(mask: Dense, seen: bool, cell: Cell) -> str:
    indices = [min(i, n - 1) for i, n in zip(cell, mask.tensor.tensor.shape, strict=True)]
    return f"tensor{indices} is {seen}"


@register(because, Predicate)
def _predicate(_: Predicate, seen: bool, cell: Cell) -> str:
    return f"the function returns {seen} for {tuple(cell)}"


def quoted(mask: Mask) -> str:
    """A part of an expression in a sentence; cells are not written out.

    >>> from truemask.masks.leaves.bands import causal
    >>> quoted(causal)
    '`causal`'
    """
    return "`dense(...)`" if cells_held(mask) is not None else f"`{shortened(mask.text)}`"


def _not(seen: bool) -> str:
    return "" if seen else "not "


def _apart(n: int) -> str:
    return counted(n, "position")


def _order(q: int, k: int) -> str:
    return f"key {k} is query {q} itself" if q == k else f"key {k} comes before query {q}"


def _pads(pads: list[str]) -> str:
    return f"{' and '.join(pads)} {'are' if len(pads) > 1 else 'is'} padding" if pads else "they are real tokens"
