"""What a model is made of, as small frozen dataclasses, and the way from keywords to them and back.

`Decoder(dim=512, depth=6, attn_kv_heads=2, ff_glu=True)` is x-transformers' style: a keyword that starts with `attn_`
belongs to every attention, with `ff_` to every feedforward, the rest to the stack itself. Unknown ones raise TypeError.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from truemask.common.formatting import describe, suggest
from truemask.nn import x_transformers_names as foreign_names
from truemask.nn.layer_masks import texts_of_layers

_KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "bool": ("True or False", (bool,)),
    "int": ("a whole number", (int,)),
    "float": ("a number", (int, float)),
    "str": ("a text", (str,)),
    "None": ("None", (type(None),)),
}


def check_type(name: str, value: object, annotation: str) -> None:
    """Raise TypeError unless `value` is of one of the kinds of `annotation`, such as `int | None`.

    A bool is no number here. ValueError on a number that is not finite.
    """
    kinds = [_KINDS[word] for word in annotation.split(" | ")]
    allowed_types = tuple(kind for _, types in kinds for kind in types)
    if not isinstance(value, allowed_types) or (isinstance(value, bool) and bool not in allowed_types):
        raise TypeError(f"{name} is {describe(value)}; expected {' or '.join(words for words, _ in kinds)}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} is {value}; expected a finite number")


def check_fields(config: Any, prefix: str = "") -> None:
    """`check_type` on every field of a dataclass that is annotated with bool, int, float or None."""
    for item in fields(config):
        if set(str(item.type).split(" | ")) <= _KINDS.keys():
            check_type(prefix + item.name, getattr(config, item.name), str(item.type))


def check_rate(name: str, value: float) -> None:
    """Raise ValueError unless `value` is a share that may be dropped."""
    _require(0.0 <= value < 1.0, f"{name} is {value!r}; it is the share that is dropped, in [0, 1)")


def check_needs(owner: str, switched_on: bool, **dependent: object) -> None:
    """Raise ValueError on an argument that would be ignored, since `owner` is not switched on."""
    for name, value in dependent.items():
        _require(
            switched_on or value is None,
            f"{name}={value!r} says something about {owner}, which is off, so it would change nothing: "
            f"pass {owner}=True too, or leave {name} out",
        )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _positive(owner: str, **sizes: int | None) -> None:
    for name, size in sizes.items():
        _require(size is None or size > 0, f"{owner}{name} is {size!r}; it must be a whole number above 0")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """One attention: `attn_` keywords.

    dim_head      size of a head; x-transformers' default, not dim / heads
    kv_heads      heads of keys and values (default: as many as queries); query heads i*g to i*g+g-1 share kv head i
    one_kv_head   the same as kv_heads=1
    qk_norm       cosine attention: q and k on the unit sphere, scores times qk_norm_scale (default: 10)
    qk_rmsnorm    RMSNorm on every head of q and k, with a gain
    num_mem_kv    learned keys and values that every query sees
    flash         True: any exact backend may be chosen; False: dense
    """

    dim_head: int = 64
    kv_heads: int | None = None
    one_kv_head: bool = False
    qk_norm: bool = False
    qk_norm_scale: float | None = None
    qk_rmsnorm: bool = False
    num_mem_kv: int = 0
    dropout: float = 0.0
    flash: bool = True

    def __post_init__(self) -> None:
        check_fields(self, "attn_")
        _positive("attn_", dim_head=self.dim_head, kv_heads=self.kv_heads)
        check_rate("attn_dropout", self.dropout)
        _require(self.num_mem_kv >= 0, f"attn_num_mem_kv is {self.num_mem_kv}; it counts keys, so it is 0 or more")
        _require(
            not (self.one_kv_head and self.kv_heads not in (None, 1)),
            f"attn_one_kv_head says one key head and attn_kv_heads says {self.kv_heads}: pass one of them",
        )
        _require(
            not (self.qk_norm and self.qk_rmsnorm),
            "attn_qk_norm (cosine) and attn_qk_rmsnorm both normalise q and k, with different scales: pass one of them",
        )
        check_needs("attn_qk_norm", self.qk_norm, attn_qk_norm_scale=self.qk_norm_scale)

    @property
    def scale(self) -> float:
        """What scores are multiplied with."""
        if not self.qk_norm:
            return self.dim_head**-0.5
        return 10.0 if self.qk_norm_scale is None else self.qk_norm_scale


@dataclass(frozen=True, kw_only=True)
class FeedForwardConfig:
    """One feedforward: `ff_` keywords. `glu` with `swish` is SwiGLU; the default is GELU."""

    mult: float = 4.0
    glu: bool = False
    swish: bool = False
    relu_squared: bool = False
    no_bias: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_fields(self, "ff_")
        _require(self.mult > 0, f"ff_mult is {self.mult!r}; the inner size is dim * ff_mult, so it must be above 0")
        check_rate("ff_dropout", self.dropout)
        _require(
            not (self.swish and self.relu_squared),
            "ff_swish and ff_relu_squared each name the activation: pass one of them",
        )


@dataclass(frozen=True, kw_only=True)
class LayersConfig:
    """A stack of layers: everything that `Decoder` and `Encoder` take, and `causal`, in which they differ.

    `alibi_pos_bias` adds `-slope * distance` to the scores (ALiBi, arXiv 2108.12409), with the usual slopes of so many
    heads (`alibi`). Distances are those of the mask's logical positions: in packed documents they restart, padding does
    not count, and a cache keeps them. It stands beside rotary or absolute positions, or alone.

    >>> config = LayersConfig.from_keywords(dim=32, depth=2, attn_kv_heads=2, ff_glu=True)
    >>> config.attn.kv_heads, config.ff.glu
    (2, True)
    >>> LayersConfig.from_dict(config.to_dict()) == config
    True
    >>> LayersConfig.from_keywords(dim=32, depth=2, atn_kv_heads=2)
    Traceback (most recent call last):
        ...
    TypeError: LayersConfig() has no keyword 'atn_kv_heads', did you mean 'attn_kv_heads'?
    """

    dim: int
    depth: int
    heads: int = 8
    causal: bool = False
    use_rmsnorm: bool = False
    norm_add_unit_offset: bool = True
    rotary_pos_emb: bool = False
    rotary_emb_dim: int | None = None
    rotary_interpolation_factor: float | None = None  # 1
    rotary_base_rescale_factor: float | None = None  # 1
    alibi_pos_bias: bool = False
    layer_masks: Any = None  # tuple[str, ...], one for each layer, whatever was given
    layer_pattern: str | None = None  # None, once it is read
    attn: AttentionConfig = field(default_factory=AttentionConfig)
    ff: FeedForwardConfig = field(default_factory=FeedForwardConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        _positive("", dim=self.dim, depth=self.depth, heads=self.heads)
        _require(
            self.heads % self.kv_heads == 0,
            f"heads={self.heads} is not a multiple of the {self.kv_heads} key heads; each serves equally many heads",
        )
        check_needs(
            "rotary_pos_emb",
            self.rotary_pos_emb,
            rotary_emb_dim=self.rotary_emb_dim,
            rotary_interpolation_factor=self.rotary_interpolation_factor,
            rotary_base_rescale_factor=self.rotary_base_rescale_factor,
        )
        if self.rotary_pos_emb:
            self._check_rotary()
        _require(
            not (self.alibi_pos_bias and self.attn.num_mem_kv),
            f"alibi_pos_bias counts distances, and the {self.attn.num_mem_kv} keys of attn_num_mem_kv stand nowhere: "
            "leave one of them out",
        )
        object.__setattr__(self, "layer_masks", texts_of_layers(self.layer_masks, self.layer_pattern, self.depth))
        object.__setattr__(self, "layer_pattern", None)

    def _check_rotary(self) -> None:
        _require(
            self.rotary_dim % 2 == 0 and 0 < self.rotary_dim <= self.attn.dim_head,
            f"rotary_emb_dim is {self.rotary_dim}; it turns pairs of the {self.attn.dim_head} features of a head, "
            f"so it must be even and from 2 to {self.attn.dim_head}",
        )
        divisor, rescale = self.rotary_interpolation_factor, self.rotary_base_rescale_factor
        _require(
            divisor is None or divisor >= 1.0,
            f"rotary_interpolation_factor is {divisor}; it divides positions, so 1 or more",
        )
        _require(
            rescale is None or rescale > 0.0,
            f"rotary_base_rescale_factor is {rescale}; it multiplies the base of the angles, so it must be above 0",
        )

    @property
    def kv_heads(self) -> int:
        """How many heads keys and values have."""
        return 1 if self.attn.one_kv_head else self.attn.kv_heads or self.heads

    @property
    def rotary_dim(self) -> int:
        """How many features of a head rotate: half of them unless said otherwise, as in x-transformers."""
        return self.attn.dim_head // 2 if self.rotary_emb_dim is None else self.rotary_emb_dim

    @classmethod
    def from_keywords(cls, caller: str = "LayersConfig", /, **keywords: Any) -> LayersConfig:
        """Route keywords by prefix; raise TypeError on one that does not exist, naming the nearest."""
        unknown = [name for name in keywords if name not in KEYWORDS]
        reject_unknown(caller, unknown, KEYWORDS, _FOREIGN)
        stack = {name: value for name, value in keywords.items() if KEYWORDS[name] == ""}
        attn = {name[5:]: value for name, value in keywords.items() if KEYWORDS[name] == "attn_"}
        ff = {name[3:]: value for name, value in keywords.items() if KEYWORDS[name] == "ff_"}
        return cls(**stack, attn=AttentionConfig(**attn), ff=FeedForwardConfig(**ff))

    def to_dict(self) -> dict[str, Any]:
        """Flat, under the names of the keywords: what a checkpoint's JSON keeps."""
        parts = {"": self, "attn_": self.attn, "ff_": self.ff}
        return {name: getattr(parts[prefix], name.removeprefix(prefix)) for name, prefix in KEYWORDS.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LayersConfig:
        """The inverse of `to_dict`; a missing key is the default."""
        return cls.from_keywords("LayersConfig.from_dict", **values)


def _keywords() -> dict[str, str]:
    """Every keyword of a stack, with its prefix."""
    stack = {item.name: "" for item in fields(LayersConfig) if item.name not in ("attn", "ff")}
    attn = {f"attn_{item.name}": "attn_" for item in fields(AttentionConfig)}
    return stack | attn | {f"ff_{item.name}": "ff_" for item in fields(FeedForwardConfig)}


KEYWORDS = _keywords()
_FOREIGN = (
    foreign_names.LAYERS
    | {f"attn_{name}" for name in foreign_names.ATTENTION}
    | {f"ff_{name}" for name in foreign_names.FEED_FORWARD}
)


def reject_unknown(caller: str, unknown: Iterable[str], keywords: Iterable[str], foreign: frozenset[str]) -> None:
    """Raise TypeError for the first unknown keyword: x-transformers' own, a misspelt one, or neither."""
    for name in unknown:
        if name in foreign or name.startswith("cross_attn_"):
            instead = foreign_names.INSTEAD.get(name)
            raise TypeError(
                f"{caller}() has no keyword {name!r}: x-transformers has it and this library does not have it yet"
                + (f"; {instead}" if instead else "")
            )
        raise TypeError(f"{caller}() has no keyword {name!r}{suggest(name, keywords)}")


def reject_keywords(
    caller: str, function: Callable[..., Any], unknown: Mapping[str, object], foreign: frozenset[str]
) -> None:
    """`reject_unknown` for what a function got beyond its own parameters."""
    if unknown:
        parameters = inspect.signature(function).parameters.values()
        keywords = [
            parameter.name
            for parameter in parameters
            if parameter.kind != parameter.VAR_KEYWORD and parameter.name != "self"
        ]
        reject_unknown(caller, unknown, keywords, foreign)
