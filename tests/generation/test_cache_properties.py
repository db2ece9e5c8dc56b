"""Random causal masks, chunks, beams and rejected drafts: a cache gives what reading all again gives, to 1e-9."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import truemask as tm
from tests.support.nn_models import FEATURES, HEADS, decoder, featured, ids, wrapped
from tests.support.strategies import Drawn, Reach, expressions
from truemask.generation import kv_cache
from truemask.generation.kv_cache import KVCache
from truemask.masks.core.mask import Mask
from truemask.masks.structure.parts import with_term
from truemask.nn.wrappers import TransformerWrapper

FEATURED = ["absolute", "rotary", "alibi", "registers", "memories"]
LAYERED = ["causal", "window(3)", "window(2) | prefix(1)", "blocks(4)", "window(6) & dilated(2)"]


@pytest.fixture(autouse=True, scope="module")
def little_room() -> Any:
    """Small memories, so that few tokens move keys often."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kv_cache, "LEAST_ROOM", 2)
        yield


def _has_positions(mask: Mask, n: int) -> bool:
    try:
        mask.positions(n)
    except tm.MaskError:
        return False
    return True


class Step(NamedTuple):
    """Something that happens to a cache: `read` (how many tokens), `truncate` (how many less) or samples that go on."""

    kind: str
    number: int
    rows: tuple[int, ...] = ()


@st.composite
def histories(draw: Any) -> tuple[Drawn, list[Step]]:
    """A mask of n tokens, and what happens to a cache of it, as long as there are tokens."""
    n, batch = draw(st.integers(4, 14)), draw(st.integers(1, 3))
    drawn, steps = draw(expressions(depth=3, reach=Reach(n, n, batch, HEADS))), []
    for _ in range(draw(st.integers(1, 9))):
        kind = draw(st.sampled_from(["read", "read", "read", "truncate", "reorder", "select"]))
        rows = draw(st.lists(st.integers(0, batch - 1), min_size=1, max_size=4)) if kind == "select" else []
        rows = [draw(st.integers(0, batch - 1)) for _ in range(batch)] if kind == "reorder" else rows
        batch = len(rows) or batch
        steps.append(Step(kind, draw(st.integers(1, 5)), tuple(rows)))
    return drawn, [*steps, Step("read", n)]


class Story:
    """A cache and all tokens of its samples, those included that come later."""

    def __init__(self, net: TransformerWrapper, mask: Mask, reach: Reach, *, sized: bool) -> None:
        self.net, self.mask, self.n = net, mask, reach.q
        self.tokens = ids(reach.batch, self.n)
        self.cache = KVCache(net, batch=reach.batch, tokens=self.n, mask=mask if sized else None)

    def go_on(self, step: Step) -> None:
        if step.kind == "read":
            self._read(min(step.number, self.n - self.cache.past))
        elif step.kind == "truncate":
            self._truncate(max(0, self.cache.past - step.number))
        else:
            rows = list(step.rows)
            getattr(self.cache, step.kind)(rows)
            self.tokens, self.mask = self.tokens[rows], self.mask.select(samples=rows)

    def _read(self, new: int) -> None:
        past = self.cache.past
        if new == 0:
            return
        span = slice(past, past + new)
        mask = self.mask if self.cache.mask is None else None
        found = self.net(self.tokens[:, span], mask, cache=self.cache, **self._told(span))
        self.cache.advance()
        whole = self.net(self.tokens, self.mask, **self._told(slice(0, self.n)))[:, span]
        assert float((found - whole).abs().max()) < 1e-9 * max(1.0, float(whole.abs().max()))

    def _told(self, span: slice) -> dict[str, Tensor]:
        """Positions, as random masks often give a token two of them; ALiBi asks the mask."""
        return {} if self.net.attn_layers.config.alibi_pos_bias else {"pos": torch.arange(self.n)[span]}

    def _truncate(self, length: int) -> None:
        """Other tokens come then; where keys are missing that are needed, nothing changes."""
        before, refusal = self.cache.positions, ""
        try:
            self.cache.truncate(length)
        except ValueError as error:
            refusal = str(error)
        if refusal:
            assert "was overwritten" in refusal
            assert torch.equal(self.cache.positions, before)
            return
        self.tokens = torch.cat((self.tokens[:, :length], ids(*self.tokens[:, length:].shape, seed=length)), dim=1)


@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("feature", FEATURED)
@given(history=histories())
@settings(max_examples=25)
def test_whatever_happens_to_a_cache(feature: str, sized: bool, history: tuple[Drawn, list[Step]]) -> None:
    drawn, steps = history
    if feature == "alibi":
        assume(_has_positions(tm.causal & drawn.mask, drawn.reach.q))
    story = Story(featured(feature), tm.causal & drawn.mask, drawn.reach, sized=sized)
    with torch.no_grad():
        for step in steps:
            story.go_on(step)
    assert story.cache.past == story.n


@pytest.mark.parametrize("feature", ["absolute", "rotary", "memories"])
@given(history=histories(), masks=st.lists(st.sampled_from(LAYERED), min_size=2, max_size=2))
@settings(max_examples=25)
def test_layers_that_forget_each_their_own(feature: str, history: tuple[Drawn, list[Step]], masks: list[str]) -> None:
    drawn, steps = history
    layers, wrapper = FEATURES[feature]
    mask = tm.causal & drawn.mask
    assume(with_term(mask, tm.parse(masks[0])) is not None)  # it says from where positions count
    story = Story(wrapped(decoder(**layers, layer_masks=masks), **wrapper), mask, drawn.reach, sized=True)
    with torch.no_grad():
        for step in steps:
            story.go_on(step)
    assert story.cache.past == story.n
