"""Act 7: the audit. What does each output of a model really depend on?"""

from __future__ import annotations

import importlib.util
import textwrap
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from truemask.auditing.audit import audit
from truemask.auditing.report import Report
from truemask.cli.console import needs_ascii
from truemask.cli.tour.stage import Act, Part, Stage
from truemask.nn.layers import Decoder
from truemask.nn.wrappers import TransformerWrapper

N, TOKENS = 10, 32  # of a text, and in the vocabulary
SIZES: dict[str, Any] = {"dim": 32, "depth": 2, "heads": 2, "attn_dim_head": 16}
OTHERS = ~torch.eye(N, dtype=torch.bool)  # "attend to the others": everything but the token itself


class WithPlantedMask(nn.Module):
    """A model that is always given the planted mask."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x, attn_mask=OTHERS)


def play(stage: Stage) -> None:
    stage.say(
        "A model is a black box: change one token, look which outputs move, and compare with what its mask promises. "
        "Here a decoder is told to attend to the other tokens and not to itself; then the first token may see nothing."
    )
    stage.code("attn_mask = ~torch.eye(n, dtype=torch.bool)\nprint(tm.audit(model, batch, mask=tm.causal))")
    rows: list[list[Part]] = []
    reports: dict[str, Report] = {}
    for name, model in models().items():
        if model is None:
            rows.append([name, ("not installed", "dim"), "pip install 'truemask[peers]'"])
            continue
        report = reports[name] = audited(model)
        codes = ", ".join(report.findings.codes) or "nothing"
        rows.append([name, (codes, "good" if report.ok else "bad"), outputs(report)])
    stage.table(["model", "the audit finds", "outputs that read the future"], rows)
    for name, report in reports.items():
        if not report.ok:
            stage.say((f"{name}:", "bold"))
            stage.verbatim(narrow(report.text(ascii=needs_ascii(stage.console))))
    stage.say(
        "In a test it is one line, ",
        ("tm.assert_no_leak(model, batch)", "code"),
        ", and for a model in a file ",
        ("truemask audit module:factory", "code"),
        ". A difference that is seen is a proof; nothing seen is evidence.",
    )


def models() -> dict[str, nn.Module | None]:
    """Two libraries' decoders under the planted mask; None where one is not installed."""
    torch.manual_seed(0)
    own_model = TransformerWrapper(num_tokens=TOKENS, max_seq_len=N, attn_layers=Decoder(**SIZES))
    return {"x-transformers": _peer(), "truemask": WithPlantedMask(own_model.eval())}


def _peer() -> nn.Module | None:
    if importlib.util.find_spec("x_transformers") is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about torch's own names, on the first import only
        from x_transformers import Decoder as PeerDecoder
        from x_transformers import TransformerWrapper as PeerWrapper

    torch.manual_seed(0)
    layers = PeerDecoder(**SIZES, verbose=False)
    return WithPlantedMask(PeerWrapper(num_tokens=TOKENS, max_seq_len=N, attn_layers=layers).eval())


def audited(model: nn.Module) -> Report:
    """The audit of a model, held to causality."""
    batch = torch.arange(3, 3 + 2 * N).view(2, N) % TOKENS
    return audit(model, batch, "causal", cache=False)


def outputs(report: Report) -> str:
    """How many outputs read what they must not."""
    return f"{int(report.leaks.any(-1).any(0).sum())} of {N}"


def narrow(text: str, width: int = 92) -> str:
    """Text whose lines fit beside a margin; pictures are narrower than that."""
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="    ", break_on_hyphens=False) if len(line) > width else line
        for line in text.splitlines()
    )


ACT = Act("audit", "The audit: what outputs really depend on", play)
