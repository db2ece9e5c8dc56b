"""From logits to a token. Filters act on the logits first, then the temperature, as in x-transformers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from truemask.common.formatting import describe
from truemask.nn.config import check_fields

Filter = Callable[[Tensor], Tensor]
FILTER_NAMES = ("top_k", "top_p", "min_p")  # the filters that x-transformers has by name


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a token is drawn from logits (b, v).

    temperature  0 takes the best token; 1 samples from the model's own distribution
    top_k        only the k best
    top_p        only the best whose probabilities first add up to p (nucleus; Holtzman et al., arXiv 1904.09751)
    min_p        only those at least min_p times as likely as the best (arXiv 2407.01082)
    filter_logits_fn  a function of logits to logits, before the others; -inf forbids a token

    >>> Sampler(temperature=0.0)(torch.tensor([[0.1, 0.7, 0.2]]))
    tensor([1])
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    filter_logits_fn: Filter | None = None

    def __post_init__(self) -> None:
        if self.filter_logits_fn is not None and not callable(self.filter_logits_fn):
            raise TypeError(_not_a_function(self.filter_logits_fn))
        check_fields(self)
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it divides the logits: 0 (greedy) or above")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it counts tokens to choose from, so 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it is a share of probability, in (0, 1]")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it is a share of the best token's probability, in [0, 1]")

    def __call__(
        self, logits: Tensor, generator: torch.Generator | None = None, uniform: Tensor | None = None
    ) -> Tensor:
        """Tokens (b) from logits (b, v): drawn by numbers of [0, 1), `uniform` (b), or else by the generator."""
        logits = self.filtered(logits)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        if uniform is not None:
            return drawn((logits.double() / self.temperature).softmax(dim=-1), uniform)
        probabilities = (logits / self.temperature).softmax(dim=-1)
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)

    def probabilities(self, logits: Tensor) -> Tensor:
        """What tokens are drawn from, fp64 (b, v); at temperature 0 the best one has all."""
        logits = self.filtered(logits).double()
        if self.temperature == 0:
            return torch.zeros_like(logits).scatter_(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
        return (logits / self.temperature).softmax(dim=-1)

    def filtered(self, logits: Tensor) -> Tensor:
        """Logits (b, v) with -inf where a filter forbids a token; those with names filter only what is drawn."""
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        if self.filter_logits_fn is not None:
            logits = self.filter_logits_fn(logits)
        if self.temperature == 0:
            return logits
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return logits


def _not_a_function(value: object) -> str:
    text = f"filter_logits_fn is {describe(value)}; expected a function of logits (b, v) to logits"
    if not isinstance(value, str):
        return text
    return f"{text}. Filters with a name are arguments: pass {value if value in FILTER_NAMES else 'top_k'}=..."


def drawn(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens (b), each where its number of [0, 1) falls among the sums of probabilities (b, v) in fp64.

    >>> drawn(torch.tensor([[0.2, 0.0, 0.8]] * 3, dtype=torch.float64), torch.tensor([0.0, 0.19, 0.2])).tolist()
    [0, 0, 2]
    """
    sums = probabilities.cumsum(dim=-1)
    found = torch.searchsorted(sums, (uniform * sums[:, -1])[:, None], right=True)[:, 0]
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(dim=-1)  # that can be drawn
    return torch.minimum(found, last)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf everywhere but at the k best (ties beyond k go by index)."""
    best, index = logits.topk(min(k, logits.shape[-1]), dim=-1)
    return torch.full_like(logits, -math.inf).scatter(-1, index, best)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf behind the best tokens whose probabilities first reach p; the best one always stays."""
    ordered, index = logits.sort(dim=-1, descending=True)
    probabilities = ordered.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities  # what the better ones add up to
    nucleus = ordered.masked_fill(before >= p, -math.inf)
    nucleus[..., 0] = ordered[..., 0]
    return torch.full_like(logits, -math.inf).scatter(-1, index, nucleus)


def keep_min_p(logits: Tensor, share: float) -> Tensor:
    """-inf where a token is less likely than `share` of the best one."""
    probabilities = logits.softmax(dim=-1)
    return logits.masked_fill(probabilities < share * probabilities.amax(dim=-1, keepdim=True), -math.inf)
