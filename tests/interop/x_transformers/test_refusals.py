"""What `tm.use` refuses of an x-transformers model, in words, and by what it knows one."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.equality import assert_same
from tests.support.x_transformers_models import HEADS, SIZE, X, model, tokens
from truemask.errors import MaskError
from truemask.interop.use import use
from truemask.masks.leaves.bands import causal, window


def test_what_cannot_be_is_refused_in_words() -> None:
    net = model()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"layers": [2], "mask": causal}, "0 to 1"),
        ({"layers": "modle", "mask": causal}, "did you mean 'model'"),
        ({"layers": [0]}, "there is no mask"),
        ({"layers": {0: None}}, "got NoneType"),
        ({"mask": torch.ones(3, 3).bool()}, r"is `dense\(tensor\)`"),
        ({"mask": "causl"}, "did you mean .causal."),
        ({"layers": "cross_attention", "mask": causal}, "no layer"),
        ({"replace": True}, "there is no"),
    ]
    for wrong, words in refused:
        with pytest.raises(MaskError, match=words), use(net, **wrong):
            pytest.fail("not refused")
    with pytest.raises(MaskError, match="no attention of x-transformers"), use(X.FeedForward(8)):
        pytest.fail("not refused")
    with pytest.raises(MaskError, match="several places"), use(X.DPO(model()), causal):
        pytest.fail("not refused")
    with pytest.raises(MaskError, match="PrefixDecoder"), use(model("PrefixDecoder"), causal, replace=True):
        pytest.fail("not refused")
    between = model(wrap={"num_memory_tokens": 2, "memory_tokens_interspersed_every": 4})
    with pytest.raises(MaskError, match="memory_tokens_interspersed_every"), use(between, window(2)):
        between(tokens())
    recurrent = model(wrap={"num_memory_tokens": 2, "max_mem_len": 8})
    _, mems = recurrent(tokens(), return_mems=True)
    with pytest.raises(MaskError, match="recurrence memory"), use(recurrent, window(2)):
        recurrent(tokens(), mems=mems)


def test_models_are_known_by_name() -> None:
    use(X.AutoregressiveWrapper(model()))
    with pytest.raises(MaskError, match="got TransformerEncoderLayer"):
        use(nn.TransformerEncoderLayer(8, 2))
    code = (
        "import sys, truemask.interop.x_transformers.switch; assert not any('x_transformers' == m for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


class Recurrent(nn.Module):
    """A hybrid module: every position hears of those before."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.GRU(HEADS * SIZE, HEADS * SIZE, batch_first=True)

    def forward(self, x: Tensor, hidden: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.cells(x, hidden)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"shift_tokens": 1}, "shift_tokens"),
        ({"attn_hybrid_module": Recurrent(), "attn_hybrid_fold_axial_dim": 1}, "attn_hybrid_module"),
    ],
)
def test_what_moves_beside_attention_is_named(options: dict[str, Any], name: str) -> None:
    """Under causal.packed such a model would carry one document into the next; without a mask it runs as it is."""
    net = model(**options)
    plain = net(tokens())
    with pytest.raises(MaskError, match=rf"{name}.*Build the model without {name}.*tm\.use\(model\)"):
        use(net, causal.packed([6, 7]))
    assert torch.equal(net(tokens()), plain)
    with use(net):
        assert_same(net(tokens()), plain)
