"""`AutoregressiveWrapper`: the next-token loss of a decoder, and generation from it.

Shapes: b batch, n tokens, v vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from truemask.common.formatting import describe
from truemask.generation.beams import Beams, Search, searched
from truemask.generation.choosing import Chooser, Chosen, Ways
from truemask.generation.decoding import Reader, cache_for, evaluating
from truemask.generation.loss import check_length, check_tokens, follows, next_token_loss, warn_if_seen
from truemask.generation.options import Options
from truemask.generation.prompts import PromptLike, Prompts, as_tensors, read_prompts
from truemask.generation.room import check_room
from truemask.generation.speculation.loop import Speculated
from truemask.generation.speculation.own import draft_model, generated
from truemask.generation.stopping import Stops, Tokens
from truemask.masks.compose.boolean import everything
from truemask.masks.core.mask import Mask
from truemask.nn.config import check_type, reject_keywords
from truemask.nn.forward_mask import Layout, read_masks
from truemask.nn.wrappers import TransformerWrapper
from truemask.nn.x_transformers_names import AUTOREGRESSIVE, LOSS


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
        check_tokens(tokens, labels)
        check_length("mask", mask, tokens)
        check_length("attn_mask", attn_mask, tokens)
        batch, n = tokens.shape
        inputs = tokens.masked_fill(tokens == self.ignore_index, self.pad_value)
        layout = Layout(batch=batch, heads=self.net.attn_layers.config.heads, new=n)
        user = read_masks(mask, attn_mask, layout, tokens)
        if causal is False and labels is None:
            warn_if_seen(user, layout)
        logits = self.net(inputs[:, :-1], user, causal=causal)  # b n v
        targets = tokens if labels is None else labels
        if labels is None and user != everything:
            targets = targets.masked_fill(~follows(user, layout).to(tokens.device), self.ignore_index)
        return next_token_loss(logits, targets[:, 1:], self.ignore_index)

    def generate(
        self,
        prompts: PromptLike,
        seq_len: int,
        *,
        return_logprobs: bool = False,
        return_accepted: bool = False,
        **options: Any,
    ) -> Tensor | Chosen | Speculated:
        """`seq_len` new tokens for each prompt, without the prompt: int64 [b, seq_len], or [seq_len] for one [n].

        Args:
            prompts: token ids [n], [b, n], or a list of [n] of different lengths, which are left padded through
                `mask.padded`, so that each row is what it would be alone; lists of ints do too.
            seq_len: how many tokens at most; behind its end an answer is `pad_value`.
            options: how they are chosen, the mask, seeds and more: see `Options`. With `samples_per_prompt` rows are
                those of prompt 0, then of prompt 1.
            return_logprobs: also how likely the model found each token: a `Chosen` of tokens and log-probabilities
                [b, seq_len] (fp32, of the model's own logits, before penalties, filters and temperature), 0 behind
                the end.
            return_accepted: with `draft`, also how many guesses each forward accepted: a `Speculated`, which has
                tokens, log-probabilities and these.

        With absolute positions, prompt and answer must fit max_seq_len; rotary ones have no limit. Raises ValueError,
        TypeError or MaskError before the first token on what cannot be done.
        """
        given = Options.of("generate", options)
        if return_accepted and given.draft is None:
            raise ValueError("return_accepted=True tells how many guesses were accepted, and draft= says who guesses")
        prompts = as_tensors(prompts, self.net.token_emb.weight.device)
        found = self._guessed(prompts, seq_len, given) if given.draft is not None else None
        found = found or self._chosen(prompts, seq_len, given)
        one = _is_one(prompts) and given.samples_per_prompt == 1
        found = type(found)(*(part[0] for part in found)) if one else found
        chosen = Chosen(found.tokens, found.logprobs) if return_logprobs else found.tokens
        return found if return_accepted else chosen

    def _chosen(self, prompts: Tensor | list[Any], seq_len: int, options: Options) -> Chosen:
        """Token by token: [b, seq_len] both."""
        steps = self._begin(prompts, seq_len, options)
        with evaluating(self.net.modules()):  # once, rather than in each step
            chosen = list(steps)
        batch = (1 if _is_one(prompts) else len(prompts)) * options.samples_per_prompt
        answer = torch.full((batch, seq_len), self.pad_value, dtype=torch.int64, device=prompts[0].device)
        logprobs = torch.zeros(batch, seq_len, device=answer.device)
        for step, (tokens, likely) in enumerate(chosen):
            answer[:, step], logprobs[:, step] = tokens, likely
        return Chosen(answer, logprobs)

    def _guessed(self, prompts: Tensor | list[Any], seq_len: int, options: Options) -> Speculated:
        """The same with guesses, of which one forward checks several."""
        guesser = draft_model(options.draft, self.net.num_tokens)
        start, ways = self._read(prompts, seq_len, options)
        if guesser is not None:
            check_room("draft", guesser, start, seq_len, options.causal, cache_kv=True)
        return generated(self.net, start, seq_len, ways, options, self.pad_value)

    def stream(self, prompts: PromptLike, seq_len: int, **options: Any) -> Iterator[Tensor]:
        """As `generate`, one step at a time: an iterator of tokens [b]; it ends early when every row has ended."""
        given = Options.of("stream", options)
        if given.draft is not None:
            raise ValueError(
                "stream gives a token of every sample at a time, and with draft= each gets its own number of them: "
                "use generate, or leave draft= out"
            )
        steps = self._begin(prompts, seq_len, given)
        return (step.tokens for step in steps)

    def beam_search(
        self,
        prompts: PromptLike,
        seq_len: int,
        *,
        beams: int = 4,
        length_penalty: float = 1.0,
        return_n: int = 1,
        eos_token: Tokens = None,
        mask: Mask | Tensor | str | None = None,
        causal: bool | None = None,
        cache_kv: bool = True,
    ) -> Beams:
        """The likeliest answers that a search with so many beams finds for each prompt; see `Beams`.

        `length_penalty` above 0 favours long answers, below 0 short ones; without `eos_token` all have `seq_len`
        tokens. Prompts, masks and errors are those of `generate`; behind its end an answer is `pad_value`. One beam is
        greedy.
        """
        check_type("beams", beams, "int")
        check_type("return_n", return_n, "int")
        check_type("length_penalty", length_penalty, "float")
        check_type("cache_kv", cache_kv, "bool")
        if not 1 <= return_n <= beams:
            raise ValueError(f"beams={beams} and return_n={return_n}: at least one answer, and no more than beams")
        _check_seq_len(seq_len)
        stops = Stops.read(eos_token, None, 0, seq_len, self.net.num_tokens)
        start = self._start(prompts, seq_len, mask, causal, cache_kv)
        search = Search(beams, length_penalty, tuple(end for (end,) in stops.sequences))
        with evaluating(self.net.modules()):
            found = searched(self._reader(start, seq_len, causal, cache_kv), start.tokens, seq_len, search)
        tokens = torch.full((len(found), return_n, seq_len), self.pad_value, dtype=torch.int64)
        scores = torch.full((len(found), return_n), -math.inf)
        for i, answers in enumerate(found):
            for j, (score, answer) in enumerate(answers[:return_n]):
                tokens[i, j, : len(answer)], scores[i, j] = torch.tensor(answer), score
        both = tokens.to(start.tokens.device), scores.to(start.tokens.device)
        return Beams(both[0][0], both[1][0]) if start.single else Beams(*both)

    def _begin(self, prompts: PromptLike, seq_len: int, options: Options) -> Iterator[Chosen]:
        start, ways = self._read(prompts, seq_len, options)
        return self._steps(start, seq_len, ways, options)

    def _read(self, prompts: PromptLike, seq_len: int, options: Options) -> tuple[Prompts, Ways]:
        _check_seq_len(seq_len)
        start = self._start(prompts, seq_len, options.mask, options.causal, options.cache_kv)
        return start, options.ways(seq_len, self.net.num_tokens, len(start.tokens))

    def _start(self, prompts: PromptLike, seq_len: int, mask: Any, causal: bool | None, cache_kv: bool) -> Prompts:
        prompts = as_tensors(prompts, self.net.token_emb.weight.device)
        start = read_prompts(prompts, mask, pad_value=self.pad_value, answer=seq_len)
        self.net.check_ids(start.tokens)
        check_room("the model", self.net, start, seq_len, causal, cache_kv)
        return start

    def _steps(self, start: Prompts, seq_len: int, ways: Ways, options: Options) -> Iterator[Chosen]:
        rows = [i for i in range(len(start.tokens)) for _ in range(options.samples_per_prompt)]
        choose = Chooser(ways, start.tokens[rows], start.real[rows], self.net.num_tokens, self.pad_value)
        modules, read, new = list(self.net.modules()), None, start.tokens  # b n
        for _ in range(seq_len):
            with evaluating(modules):
                read = read or self._reader(start, seq_len, options.causal, options.cache_kv)
                logits = read(new)
                if new is start.tokens and len(rows) > len(new):
                    read.select(rows)
                    logits = logits[rows]
                step = choose(logits)
            yield step
            if ways.stops and bool(choose.ended.all()):
                return
            new = step.tokens[:, None]

    def _reader(self, start: Prompts, seq_len: int, causal: bool | None, cache_kv: bool) -> Reader:
        batch, width = start.tokens.shape
        tokens = width + max(0, seq_len - 1)  # the last new token is never read
        cache = cache_for(self.net, start.mask, batch=batch, tokens=tokens, causal_too=causal) if cache_kv else None
        return Reader(self.net, start.mask, causal_too=causal, cache=cache)


def _check_seq_len(seq_len: int) -> None:
    if isinstance(seq_len, bool) or not isinstance(seq_len, int) or seq_len < 0:
        raise ValueError(f"seq_len is {seq_len!r}; it counts the new tokens, so a whole number, 0 or more")


def _is_one(prompts: Tensor | list[Any]) -> bool:
    """Whether it is one prompt [n]."""
    return isinstance(prompts, Tensor) and prompts.ndim == 1
