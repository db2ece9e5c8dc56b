"""`AutoregressiveWrapper`: the next-token loss of a decoder, and generation from it.

Shapes: b batch, n tokens, v vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from truemask.common.formatting import describe
from truemask.common.warning import warn
from truemask.errors import MaskError
from truemask.generation.decoding import Reader, cache_for, evaluating
from truemask.generation.prompts import PromptLike, Prompts, as_tensors, read_prompts
from truemask.generation.sampling import Filter, Sampler
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.padding import marks_queries
from truemask.nn.config import check_type, reject_keywords
from truemask.nn.forward_mask import Layout, pairs_ahead, read_masks, token_positions
from truemask.nn.wrappers import TransformerWrapper
from truemask.nn.x_transformers_names import AUTOREGRESSIVE, GENERATE, LOSS


class AutoregressiveWrapper(nn.Module):
    """Trains `net` to predict the next token and generates from it; `net` is a TransformerWrapper around a Decoder.

    >>> from truemask.nn.layers import Decoder
    >>> decoder = Decoder(dim=16, depth=1, heads=2, attn_dim_head=8)
    >>> model = AutoregressiveWrapper(TransformerWrapper(num_tokens=11, max_seq_len=8, attn_layers=decoder))
    >>> tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    >>> model(tokens).ndim
    0
    >>> model.generate(tokens[:, :3], 4, temperature=0.0).shape
    torch.Size([1, 4])
    """

    def __init__(self, net: TransformerWrapper, ignore_index: int = -100, pad_value: int = 0, **unknown: Any) -> None:
        super().__init__()
        reject_keywords("AutoregressiveWrapper", AutoregressiveWrapper.__init__, unknown, AUTOREGRESSIVE)
        check_type("ignore_index", ignore_index, "int")
        check_type("pad_value", pad_value, "int")
        if not isinstance(net, TransformerWrapper):
            raise TypeError(f"net is {describe(net)}; expected a TransformerWrapper")
        if not net.attn_layers.causal:
            raise ValueError("net is built around an Encoder, whose rows read what they should predict: use a Decoder")
        self.net = net
        self.ignore_index = ignore_index
        self.pad_value = pad_value

    def forward(
        self,
        tokens: Tensor,
        mask: Mask | Tensor | str | None = None,
        attn_mask: Mask | Tensor | str | None = None,
        *,
        labels: Tensor | None = None,
        causal: bool | None = None,
        **unknown: Any,
    ) -> Tensor:
        """The mean cross-entropy, in nats, of every token of (b, n + 1) given those before it; a 0-d tensor.

        `mask` and `attn_mask` are those of the layers and speak of all n + 1 tokens. A token counts as a target if it
        follows the token before it: both are real (neither is padding), and their logical positions are neighbours,
        so the first token of a `packed` document is not predicted from the document before. Documents given
        otherwise (`documents(ids=...)`) do not restart positions, and their first tokens count. `labels` (b, n + 1)
        decides instead: the token to predict at each place, `ignore_index` for none. No target at all gives 0.
        """
        reject_keywords("AutoregressiveWrapper.forward", AutoregressiveWrapper.forward, unknown, LOSS)
        self._check_tokens(tokens, labels)
        _check_length("mask", mask, tokens)
        _check_length("attn_mask", attn_mask, tokens)
        batch, n = tokens.shape
        inputs = tokens.masked_fill(tokens == self.ignore_index, self.pad_value)
        layout = Layout(batch=batch, heads=self.net.attn_layers.config.heads, new=n)
        user = read_masks(mask, attn_mask, layout, tokens)
        if causal is False and labels is None:
            _warn_if_seen(user, layout)
        logits = self.net(inputs[:, :-1], user, causal=causal)  # b n v
        targets = tokens if labels is None else labels
        if labels is None and user != everything:
            targets = targets.masked_fill(~follows(user, layout).to(tokens.device), self.ignore_index)
        return self._loss(logits, targets[:, 1:])

    def generate(
        self,
        prompts: PromptLike,
        seq_len: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        filter_logits_fn: Filter | None = None,
        eos_token: int | None = None,
        mask: Mask | Tensor | str | None = None,
        causal: bool | None = None,
        cache_kv: bool = True,
        generator: torch.Generator | None = None,
        **unknown: Any,
    ) -> Tensor:
        """`seq_len` new tokens for each prompt, without the prompt: int64 [b, seq_len], or [seq_len] for one [n].

        `prompts`: token ids [n], [b, n], or a list of [n] of different lengths, which are left padded through
        `mask.padded`, so that each row is what it would be alone; lists of ints do too. `mask`: an expression, over
        prompt and answer at
        positions counted from each prompt's first token; or bool flags over the prompt's tokens, where False at the
        ends is padding and False inside hides a token. After `eos_token` a row is `pad_value`; one in the prompt
        stops nothing. For the filters see `Sampler`. `cache_kv=False` recomputes everything in each step, with the
        same result. With absolute positions, prompt and answer must fit max_seq_len; rotary ones have no limit.
        """
        reject_keywords("generate", AutoregressiveWrapper.generate, unknown, GENERATE)
        prompts = as_tensors(prompts, self.net.token_emb.weight.device)
        steps = self.stream(
            prompts,
            seq_len,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            filter_logits_fn=filter_logits_fn,
            eos_token=eos_token,
            mask=mask,
            causal=causal,
            cache_kv=cache_kv,
            generator=generator,
        )
        with evaluating(self.net):  # once, rather than in each step
            tokens = list(steps)
        single = isinstance(prompts, Tensor) and prompts.ndim == 1
        like = prompts if isinstance(prompts, Tensor) else prompts[0]
        batch = 1 if single else len(prompts)
        answer = torch.full((batch, seq_len), self.pad_value, dtype=torch.int64, device=like.device)
        if tokens:
            answer[:, : len(tokens)] = torch.stack(tokens, dim=1)
        return answer[0] if single else answer

    def stream(
        self,
        prompts: PromptLike,
        seq_len: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        filter_logits_fn: Filter | None = None,
        eos_token: int | None = None,
        mask: Mask | Tensor | str | None = None,
        causal: bool | None = None,
        cache_kv: bool = True,
        generator: torch.Generator | None = None,
        **unknown: Any,
    ) -> Iterator[Tensor]:
        """As `generate`, one step at a time: an iterator of tokens [b]; it ends early when every row has ended."""
        reject_keywords("stream", AutoregressiveWrapper.stream, unknown, GENERATE)
        sampler = Sampler(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, filter_logits_fn=filter_logits_fn
        )
        if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 0:
            raise ValueError(f"seq_len is {seq_len!r}; it counts the new tokens, so a whole number, 0 or more")
        self._check_eos(eos_token)
        check_type("cache_kv", cache_kv, "bool")
        prompts = as_tensors(prompts, self.net.token_emb.weight.device)
        start = read_prompts(prompts, mask, pad_value=self.pad_value, answer=seq_len)
        self._check_room(start, seq_len, causal, cache_kv)
        return self._steps(start, seq_len, sampler, eos_token, causal, cache_kv, generator)

    def _steps(
        self,
        start: Prompts,
        seq_len: int,
        sampler: Sampler,
        eos_token: int | None,
        causal: bool | None,
        cache_kv: bool,
        generator: torch.Generator | None,
    ) -> Iterator[Tensor]:
        batch, width = start.tokens.shape
        tokens = width + max(0, seq_len - 1)  # the last new token is never read
        cache = cache_for(self.net, start.mask, batch=batch, tokens=tokens, causal_too=causal) if cache_kv else None
        ended = torch.zeros(batch, dtype=torch.bool, device=start.tokens.device)
        read, new = None, start.tokens  # b n
        for _ in range(seq_len):
            with evaluating(self.net):
                read = read or Reader(self.net, start.mask, causal_too=causal, cache=cache)
                token = sampler(read(new), generator)  # b
            token = token.masked_fill(ended, self.pad_value)
            yield token
            if eos_token is not None:
                ended = ended | (token == eos_token)
                if bool(ended.all()):
                    return
            new = token[:, None]

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.flatten(0, 1)  # b*n v
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        targets = targets.flatten()
        total = F.cross_entropy(logits, targets, ignore_index=self.ignore_index, reduction="sum")
        return total / (targets != self.ignore_index).sum().clamp(min=1)

    def _check_tokens(self, tokens: Tensor, labels: Tensor | None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] < 2 or tokens.is_floating_point():
            raise ValueError(f"tokens are {describe(tokens)}; expected ids [b, n + 1] with at least two tokens a row")
        if labels is not None and labels.shape != tokens.shape:
            raise ValueError(
                f"labels are {describe(labels)}; expected one for each token, {list(tokens.shape)}, not shifted: "
                "the label of token i is predicted from the tokens before it"
            )

    def _check_eos(self, eos_token: int | None) -> None:
        check_type("eos_token", eos_token, "int | None")
        if eos_token is not None and not 0 <= eos_token < self.net.num_tokens:
            raise ValueError(
                f"eos_token is {eos_token}, which the model never gives: num_tokens={self.net.num_tokens}, so tokens "
                f"are 0 to {self.net.num_tokens - 1}"
            )

    def _check_room(self, start: Prompts, seq_len: int, causal_too: bool | None, cache_kv: bool) -> None:
        """Everything that would only fail in the middle of the answer."""
        batch, width = start.tokens.shape
        total = width + max(0, seq_len - 1)  # the last new token is never read
        layout = Layout(batch=batch, heads=self.net.attn_layers.config.heads, new=total)
        start.mask.check(total, total, batch=batch, heads=layout.heads)
        if self.net.pos_emb is not None:
            last = int(token_positions(start.mask, layout, None).max())
            if last >= self.net.max_seq_len:
                raise ValueError(
                    f"the prompt and {seq_len} new tokens reach position {last}, and the model learned absolute "
                    f"positions 0 to {self.net.max_seq_len - 1} (max_seq_len={self.net.max_seq_len}): ask for fewer, "
                    "cut the prompt, or train with rotary_pos_emb=True, which has no limit"
                )
        if cache_kv and causal_too is False:
            later = (start.mask - causal).at(k_start=width).count(total, total - width, batch=batch, heads=layout.heads)
            if bool(later.any()):
                raise ValueError(
                    f"the mask `{start.mask}` lets earlier tokens read new ones, so what the cache keeps of them would "
                    "have to change with every token: pass cache_kv=False"
                )


def follows(user: Mask, layout: Layout) -> Tensor:
    """Whether each token follows the one before it, bool [b|1, n]: both real, at neighbouring positions."""
    n = layout.new
    positions = token_positions(user, layout, None)
    positions = positions[None] if positions.ndim == 1 else positions
    real = torch.ones_like(positions, dtype=torch.bool)
    if any(map(marks_queries, user.walk())):
        real = ~user.dead_queries(n, n, batch=layout.batch, heads=layout.heads).all(dim=1)  # b|1 n
    follow = torch.zeros(torch.broadcast_shapes(positions.shape, real.shape), dtype=torch.bool)
    follow[:, 1:] = (positions[:, 1:] == positions[:, :-1] + 1) & real[:, 1:] & real[:, :-1]
    return follow


def _check_length(name: str, value: object, tokens: Tensor) -> None:
    """Say what a tensor for the n tokens that the model reads misses: the loss masks speak of n + 1."""
    n = tokens.shape[1]
    if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[-1] != n - 1:
        return
    if name == "mask" or n > 2:  # one key fits any number of them in attn_mask
        raise MaskError(
            f"{name}= is {describe(value)} and tokens are {describe(tokens)}: the mask speaks of all n + 1 = {n} "
            f"tokens, of which the model reads the first {n - 1}; make it for all of them"
        )


def _warn_if_seen(user: Mask, layout: Layout) -> None:
    pairs = pairs_ahead(user, layout.new, layout.batch, layout.heads)
    if pairs:
        warn(
            f"with causal=False the mask `{user}` lets {pairs:,} pairs look ahead, at the tokens that the loss asks "
            "for: pass labels= with ignore_index at the tokens that may be seen"
        )
