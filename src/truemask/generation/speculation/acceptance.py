"""Which guesses are right, so that a text has the distribution of the model that checks them, whoever guessed.

Guesses that were picked (by looking up, or the best ones of a model) are checked by choosing as without them: the model
chooses a token in its own way, and goes on along the guess that it is. Guesses that were drawn from probabilities q
are right more often by the rule of speculative sampling (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
2302.01318): token x is right with probability min(1, p(x) / q(x)), and if it is not, the next one is drawn from what p
has more than q. Several guesses are tried one after the other, each against what is left of both (SpecInfer, Miao et
al., arXiv 2305.09781). For a guess that was picked q is 1 at one token, and the rule says the same as choosing.

Shapes: v vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from truemask.generation.choosing import Chooser, Chosen, Pick
from truemask.generation.speculation.trees import Draft


def walked(draft: Draft, logits: Tensor, choose: Chooser, most: int) -> tuple[list[int], list[Chosen]]:
    """Down a draft as far as its guesses are right: the nodes that were read rightly, and what was chosen behind each.

    `logits` [n, v] are those after each node. At most `most` tokens are chosen, fewer where an answer ends.
    """
    node: int | None = 0
    path: list[int] = []
    chosen: list[Chosen] = []
    while node is not None and len(chosen) < most and not bool(choose.ended.any()):
        step = choose(logits[node][None], _rule(draft, node))
        path.append(node)
        chosen.append(step)
        node = draft.child(node, int(step.tokens))
    return path, chosen


def _rule(draft: Draft, node: int) -> Pick | None:
    """How a token is chosen behind a node, if its guesses were drawn."""
    if node not in draft.drawn:
        return None
    guesses = [draft.tokens[child] for child in draft.children(node)]
    return lambda p, generator: right_or_drawn(p, guesses, draft.drawn[node], generator)


def right_or_drawn(p: Tensor, guesses: Sequence[int], q: Tensor, generator: torch.Generator | None = None) -> int:
    """A token with the probabilities `p` [v]: the first guess that is right, or one drawn from what is left.

    The guesses were drawn from `q` [v], one after the other without putting back.

    >>> right_or_drawn(torch.tensor([0.0, 1.0]), [0], torch.tensor([0.5, 0.5]))
    1
    """
    p, q = p.double(), q.double()
    for token in guesses:
        if float(torch.rand((), dtype=torch.float64, generator=generator)) * float(q[token]) < float(p[token]):
            return token
        rest = (p - q).clamp(min=0.0)
        if not float(rest.sum()) > 0:  # p is q up to rounding
            return token
        p = rest / rest.sum()
        q = q.clone()
        q[token] = 0.0
        q = q / q.sum().clamp(min=torch.finfo(q.dtype).tiny)
    return int(torch.multinomial(p, 1, generator=generator))
