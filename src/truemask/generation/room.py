"""Whether prompt and answer fit what a model knows, before the first token."""

from __future__ import annotations

from truemask.generation.prompts import Prompts
from truemask.masks.leaves.bands import causal
from truemask.nn.forward_mask import Layout, token_positions
from truemask.nn.wrappers import TransformerWrapper


def check_room(
    name: str, net: TransformerWrapper, start: Prompts, seq_len: int, causal_too: bool | None, cache_kv: bool
) -> None:
    """Everything that would only fail in the middle of the answer; `name` is what messages call the model."""
    batch, width = start.tokens.shape
    total = width + max(0, seq_len - 1)  # the last new token is never read
    layout = Layout(batch=batch, heads=net.attn_layers.config.heads, new=total)
    start.mask.check(total, total, batch=batch, heads=layout.heads)
    if net.pos_emb is not None:
        last = int(token_positions(start.mask, layout, None).max())
        if last >= net.max_seq_len:
            raise ValueError(
                f"the prompt and {seq_len} new tokens reach position {last}, and {name} learned absolute "
                f"positions 0 to {net.max_seq_len - 1} (max_seq_len={net.max_seq_len}): ask for fewer, "
                "cut the prompt, or train with rotary_pos_emb=True, which has no limit"
            )
    if cache_kv and causal_too is False:
        later = (start.mask - causal).at(k_start=width).count(total, total - width, batch=batch, heads=layout.heads)
        if bool(later.any()):
            raise ValueError(
                f"the mask `{start.mask}` lets earlier tokens read new ones, so what the cache keeps of them would "
                "have to change with every token: pass cache_kv=False"
            )
