"""A run writes under its own mask or another, and says what the caches take."""

from __future__ import annotations

from pathlib import Path

from truemask.masks.formats.parse import parse
from truemask.textmodels.opening import open_model
from truemask.textmodels.text_model import Writing


def test_a_run_writes_and_counts(run: Path) -> None:
    model, pieces = open_model(str(run)), []
    written = model.write("the cat", None, Writing(tokens=300, temperature=0.0), pieces.append)
    assert 0 < written.tokens <= 300
    assert 0 < len("".join(pieces)) <= written.tokens
    assert written.seconds > 0
    assert written.cache_bytes < written.full_bytes


def test_another_mask_takes_the_place_of_its_own(run: Path) -> None:
    model = open_model(str(run))
    narrow, all_keys = (
        model.write("a", parse(m), Writing(tokens=200), lambda _: None) for m in ("window(3)", "causal")
    )
    assert narrow.cache_bytes < all_keys.cache_bytes == all_keys.full_bytes
