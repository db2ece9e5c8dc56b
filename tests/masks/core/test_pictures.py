"""Pictures of masks: the same, cell by cell or from tiles; and of any length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import truemask as tm
from truemask.masks.core import queries
from truemask.viz.picture import text_picture

LARGE = {
    "exact": tm.causal & (tm.window(9) | tm.prefix(3)),
    "cells": tm.dense((torch.arange(40_000) % 11 < 4).reshape(200, 200)),
    "hash": tm.random(0.3, seed=1),
    "function": tm.predicate(lambda b, h, q, k: (q + k) % 3 == 0),
    "heads": tm.per_head([tm.causal, tm.window(2)]),
    "samples": tm.causal.padded([3, 0, 9]),
}


@pytest.mark.parametrize("lengths", [(65, 65), (129, 130), (10, 200), (197, 64)])
@pytest.mark.parametrize("name", LARGE)
def test_tiles_draw_what_cells_would(name: str, lengths: tuple[int, int]) -> None:
    mask = LARGE[name]
    cells = mask.to_dense(*lengths).numpy()
    varies = [f"sample {b}" for b in range(cells.shape[0])] if cells.shape[0] > 1 else []
    varies = varies or ([f"head {h}" for h in range(cells.shape[1])] if cells.shape[1] > 1 else [])
    panels = cells.reshape(-1, *lengths)
    titles = [f"{mask}  ({label})" for label in varies] or [str(mask)]
    drawn = [text_picture(panel, title=title) for panel, title in zip(panels, titles, strict=True)]
    assert mask.show(*lengths) == "\n".join(drawn)


def test_a_mask_of_a_million_tokens_is_drawn_without_its_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a picture of this size needs no dense mask")

    monkeypatch.setattr(queries, "dense", refuse)
    lines = (tm.causal & tm.window(200_000)).show(1_000_000).splitlines()
    assert lines[0] == "causal & window(200000)"
    assert lines[2].split()[1] == "▒▒" + 62 * "·"
    assert lines[-1] == "a sign is 31250 queries by 15625 keys: █ all, ░▒▓ some, · none"


def test_many_large_panels_are_cut_short() -> None:
    text = tm.causal.padded(list(range(11))).show(100)
    assert text.count("causal.padded") == 8
    assert text.endswith("(and 3 more: `.select(samples=[...], heads=[...])` chooses)")


def test_nothing_is_drawn_of_nothing() -> None:
    assert tm.causal.show(0, 100) == "causal\nnothing to draw: 0 queries, 100 keys"
