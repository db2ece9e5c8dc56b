"""The masks of the benchmarks: five usual ones, everything, and structured expressions drawn from a seed."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import truemask as tm
from truemask.benchmarking.workloads import race_masks

Make = Callable[[], tm.Mask]
Spelled = tuple[Make, Make]  # one meaning by two expressions
KINDS = 10
DENSITIES = (0.01, 0.6)  # of the random expressions of `attend.py`


def attend_masks(n: int) -> dict[str, tm.Mask]:
    """What `attend.py` runs at n tokens."""
    drawn = {f"random expression {i}": mask for i, mask in enumerate(random_masks(n, 3), 1)}
    return {"everything": tm.everything, **race_masks(n), **drawn}


def random_masks(n: int, how_many: int) -> list[tm.Mask]:
    """The first expressions of four leaves, by seed, that let neither nearly nothing nor nearly everything through."""
    found: list[tm.Mask] = []
    seed = 0
    while len(found) < how_many:
        mask = Expression.drawn(Random(seed), n, leaves=4, pieces=max(2, n // 256)).mask()
        if DENSITIES[0] <= mask.density(n) <= DENSITIES[1]:
            found.append(mask)
        seed += 1
    return found


@dataclass(frozen=True)
class Expression:
    """A random structured expression whose numbers are drawn and whose masks are not made yet."""

    leaves: list[Spelled]
    joints: list[tuple[int, int, str]]  # (place, place, operation): both are taken out, the result goes to the end

    @classmethod
    def drawn(cls, draw: Random, n: int, leaves: int, pieces: int) -> Expression:
        """`leaves` different kinds of leaf with up to `pieces` blocks or documents, joined at random."""
        kinds = draw.sample(range(KINDS), leaves)
        sizes = range(leaves, 1, -1)
        joints = [(draw.randrange(left), draw.randrange(left - 1), draw.choice("&||^-")) for left in sizes]
        return cls([leaf(draw, n, pieces, kind) for kind in kinds], joints)

    def mask(self) -> tm.Mask:
        """The mask, made anew."""
        return self._joined(WAYS, 0)

    def rewritten(self) -> tm.Mask:
        """The same meaning by other operations (De Morgan) on the same leaves."""
        return self._joined(OTHER_WAYS, 0)

    def respelled(self) -> tm.Mask:
        """The same meaning by other operations on other leaves: nothing but the cells themselves can tell."""
        return self._joined(OTHER_WAYS, 1)

    def _joined(self, ways: dict[str, Callable[[tm.Mask, tm.Mask], tm.Mask]], spelling: int) -> tm.Mask:
        terms = [spelled[spelling]() for spelled in self.leaves]
        for first, second, sign in self.joints:
            a, b = terms.pop(first), terms.pop(second)
            terms.append(ways[sign](a, b))
        return terms[0]


WAYS = {"&": operator.and_, "|": operator.or_, "^": operator.xor, "-": operator.sub}
OTHER_WAYS: dict[str, Callable[[tm.Mask, tm.Mask], tm.Mask]] = {
    "&": lambda a, b: ~(~a | ~b),
    "|": lambda a, b: ~(~a & ~b),
    "^": lambda a, b: ~a ^ ~b,
    "-": lambda a, b: a & ~b,
}


def leaf(draw: Random, n: int, pieces: int, kind: int) -> Spelled:
    """One of ten kinds of leaf, with numbers of its own, in two spellings that are the same on n tokens."""
    size = draw.randint(-(-n // pieces), -(-2 * n // pieces))
    wide = draw.randint(n // 64 + 1, n // 8 + 2)
    tokens, cut = sorted(draw.sample(range(n), min(8, n))), lengths(draw, n, pieces)
    equal = [size] * -(-n // size)
    makers: tuple[Spelled, ...] = (
        (lambda: tm.causal, lambda: tm.window(n)),
        (lambda: tm.window(wide), lambda: tm.causal & tm.local(wide - 1)),
        (lambda: tm.local(wide), lambda: tm.local(wide).T),
        (lambda: tm.prefix(wide), lambda: tm.prefix(wide + 1).at(k_start=1)),
        (lambda: tm.global_tokens(tokens), lambda: tm.global_tokens(tokens).T),
        (lambda: tm.blocks(size), lambda: tm.documents(equal)),
        (lambda: tm.blocks(size, back=1, ahead=1), lambda: tm.blocks(size, back=1) | tm.blocks(size, ahead=1)),
        (lambda: tm.documents(cut), lambda: tm.everything.packed(cut)),
        (lambda: tm.causal.packed(cut), lambda: tm.causal & tm.documents(cut)),
        (lambda: tm.window(wide).packed(cut), lambda: tm.window(wide) & tm.documents(cut)),
    )
    return makers[kind]


def lengths(draw: Random, total: int, pieces: int) -> list[int]:
    """So many lengths at random that make `total` in all."""
    cuts = [0, *sorted(draw.sample(range(1, total), min(pieces, total) - 1)), total]
    return [b - a for a, b in itertools.pairwise(cuts)]
