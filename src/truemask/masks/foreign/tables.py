"""Tables in text files: rows of cells, with or without names above and beside them."""

from __future__ import annotations

import re
from itertools import chain

import torch
from torch import Tensor

from truemask.errors import MaskError

WORDS = {"true": 1.0, "false": 0.0}
NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?inf(inity)?|nan", re.IGNORECASE)

Row = list[str]


def table_in(text: str, name: str) -> tuple[Tensor, str] | None:
    """The cells of a table `[rows, columns]`, and which names were left out; None if the text is no table.

    Cells that are written 0, 1, True and False are booleans, others are floats. Raises MaskError for a table that is
    not whole: rows of different lengths, a cell that is no number.

    >>> cells, left_out = table_in(",a,b" + chr(10) + "a,1,0" + chr(10) + "b,1,1", "mask.csv")
    >>> cells.int().tolist(), left_out
    ([[1, 0], [1, 1]], ' without its row and column of names')
    >>> table_in("causal & window(4)", "mask.txt")
    """
    rows = [_split(line) for line in text.splitlines() if line.strip()]
    if rows and all(set("".join(row)) <= {"0", "1"} for row in rows):
        rows = [list("".join(row)) for row in rows]
    header = len(rows) > 1 and _is_header(rows)
    body = rows[header:]
    beside = bool(body) and _is_beside(rows[0] if header else [], body)
    cells = [row[beside:] for row in body]
    wrong = next((cell for cell in chain.from_iterable(cells) if not _is_cell(cell)), None)
    if not any(cells) or (wrong is not None and sum(map(_is_cell, chain.from_iterable(cells))) < 3):
        return None
    if wrong is not None:
        raise MaskError(f"{name}: the cell {wrong[:40]!r} is no number: a table holds 0 and 1 (or True and False)")
    sizes = sorted({len(row) for row in cells})
    if len(sizes) > 1:
        raise MaskError(f"{name}: rows have {sizes} cells, and need the same number")
    names = " and ".join([*(["row"] if header else []), *(["column"] if beside else [])])
    return _tensor(cells), f" without its {names} of names" if names else ""


def _split(line: str) -> Row:
    """The cells of a line: between commas, semicolons or tabs, otherwise between blanks; quotes go."""
    line = line.strip("\r\n\ufeff")
    sign = next((sign for sign in ",;\t" if sign in line.strip()), None)
    cells = [cell.strip().strip("\"'") for cell in (line.split(sign) if sign else line.split())]
    return cells[:-1] if sign and len(cells) > 1 and not cells[-1] else cells  # a sign may end each line


def _is_header(rows: list[Row]) -> bool:
    """Whether the first row names the columns: by words, or by their numbers above cells that are none."""
    first = rows[0]
    names = first[1:] if first[0] == "" or not _is_cell(first[0]) else first
    return bool(names) and (not any(map(_is_cell, names)) or _is_numbering(names))


def _is_beside(header: Row, body: list[Row]) -> bool:
    """Whether the first column names the rows: by words or numbers, or under a corner that is empty or missing."""
    first = [row[0] for row in body]
    corner = bool(header) and (header[0] == "" or len(header) == len(body[0]) - 1)
    more = all(len(row) > 1 for row in body)
    return more and (corner or not any(map(_is_cell, first)) or _is_numbering(first))


def _is_numbering(names: Row) -> bool:
    """0, 1, 2, ... or 1, 2, 3, ...: more than two, so that not all of them could be cells."""
    return len(names) > 2 and any(names == [str(i + start) for i in range(len(names))] for start in (0, 1))


def _is_cell(text: str) -> bool:
    return text.lower() in WORDS or NUMBER.fullmatch(text) is not None


def _tensor(cells: list[Row]) -> Tensor:
    values = torch.tensor([[_value(cell) for cell in row] for row in cells])
    plain = all(cell.lower() in WORDS or cell in ("0", "1") for row in cells for cell in row)
    return values.bool() if plain else values


def _value(cell: str) -> float:
    word = WORDS.get(cell.lower())
    return float(cell) if word is None else word
