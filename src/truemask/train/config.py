"""What one training run is: every choice in one record, which is also the `config.json` of its checkpoints."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from truemask.common.formatting import suggest
from truemask.errors import TruemaskError
from truemask.masks.core.mask import Mask
from truemask.masks.formats.parse import parse

DEFAULT_MASK = "causal & (window(256) | prefix(4))"
BOUNDARY = 256  # the one token that is not a byte: it opens a document, and predicting it ends one
NUM_TOKENS = 257


class TrainError(TruemaskError, ValueError):
    """A run that cannot start, go on or be found; the message says what would help."""


@dataclass(frozen=True)
class TrainConfig:
    """The choices of a run. Lengths are in tokens (one a byte), rates per step.

    A run ends after `steps` optimizer steps or after `minutes` of training, whichever is given; the learning rate
    follows the share of it that is done.
    """

    data: tuple[str, ...] = ()  # files and folders; none: the standard library of the running interpreter
    mask: str = DEFAULT_MASK
    length: int = 512
    dim: int = 192
    depth: int = 4
    heads: int = 6
    batch: int = 8
    steps: int | None = None
    minutes: float | None = None
    lr: float = 2e-3
    warmup: int = 50
    weight_decay: float = 0.1
    clip: float = 1.0
    held_out: float = 0.05  # share of the files, chosen by a hash of their paths
    evaluate_every: int = 250
    evaluate_rows: int = 64
    save_every: int = 500
    keep: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "dim", "depth", "heads", "batch", "warmup", "evaluate_every", "save_every", "keep"):
            _at_least(name, getattr(self, name), 1)
        _at_least("evaluate_rows", self.evaluate_rows, 1)
        if (self.steps is None) == (self.minutes is None):
            raise TrainError("a run ends after steps or after minutes: give exactly one of --steps and --minutes")
        if self.steps is not None:
            _at_least("steps", self.steps, 1)
        if self.minutes is not None and not self.minutes > 0:
            raise TrainError(f"minutes is {self.minutes}, which must be above 0")
        if self.dim % self.heads or self.dim // self.heads % 2:
            raise TrainError(
                f"dim {self.dim} over {self.heads} heads is {self.dim / self.heads:g} per head; rotary positions turn "
                f"pairs, so it must be an even whole number, for example --dim {self.heads * 32}"
            )
        if not 0 < self.held_out < 1:
            raise TrainError(f"held_out is {self.held_out}, the share of the files kept for the test: between 0 and 1")
        if not self.lr > 0:
            raise TrainError(f"lr is {self.lr}, which must be above 0")

    def expression(self) -> Mask:
        """The mask, checked to fit rows of `length` tokens."""
        mask = parse(self.mask)
        mask.check(self.length, self.length, batch=self.batch, heads=self.heads)
        return mask

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "data": list(self.data)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> TrainConfig:
        """The inverse of `to_json`; an unknown name is an error that shows the nearest known one."""
        names = [field.name for field in fields(cls)]
        for name in record:
            if name not in names:
                raise TrainError(f"the configuration has no {name!r}{suggest(name, names)}")
        return cls(**{**record, "data": tuple(record.get("data", ()))})


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise TrainError(f"{name} is {value}, which must be at least {least}")
