"""A step of decoding by the native kernel: from a few new tokens to their logits in one call.

Torch runs some hundred operations for a token, whose threads fall asleep in between; the kernel reads every weight once
and needs about the time that memory takes. What many steps have in common (mask, positions, angles) is worked out for
up to 64 tokens ahead. Models, numbers and calls that it does not know go through `net(...)`, to the same result.

Shapes: b batch, n new tokens, j keys, v vocabulary, r features of a head that are rotated.
"""

from __future__ import annotations

from ctypes import POINTER, addressof, c_int64, cast, memmove, sizeof
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from truemask.backends.base import Job, Request
from truemask.backends.context import named_here
from truemask.backends.native.abi import ALIBI, DTYPES, TILE, ArrayStruct, CallStruct
from truemask.backends.native.backend import TilesProposal
from truemask.backends.native.library import missing, run_step
from truemask.backends.native.step_abi import GELU, RELU_SQUARED, SILU, LayerStruct, StepStruct
from truemask.biases import usual_slopes
from truemask.common.real_tensors import cannot_look
from truemask.generation.kv_cache import KVCache
from truemask.generation.speculation.ragged_cache import RaggedCache
from truemask.masks.core.mask import Mask
from truemask.nn.attention import Attention
from truemask.nn.feedforward import FeedForward
from truemask.nn.forward_mask import Layout, token_positions
from truemask.nn.layers import AttentionLayers, Block, Decoder
from truemask.nn.norms import HeadRMSNorm, LayerNorm, RMSNorm
from truemask.nn.positions import AbsolutePositionalEmbedding, RotaryEmbedding
from truemask.nn.wrappers import TransformerWrapper

MOST_ROWS = 16  # tokens of all samples; for more, products that pack the weights are quicker
MOST_STACKED = 32  # rows of heads that share keys: `FEW` of csrc/reading_cut.h
THREAD_BYTES = 1 << 19  # of weights, that are worth a thread
LANES = 16  # what sizes must be a multiple of, whatever the instruction set
KNOWN = (
    *(TransformerWrapper, Decoder, AttentionLayers, Block, Attention, FeedForward, LayerNorm, RMSNorm, HeadRMSNorm),
    *(RotaryEmbedding, AbsolutePositionalEmbedding, nn.ModuleList, nn.Linear, nn.Embedding, nn.Dropout, nn.Identity),
)


def objection(net: TransformerWrapper) -> str:
    """Why the kernel cannot run the steps of a model; empty if it can."""
    weight = net.token_emb.weight
    if why := missing():
        return f"there is no native kernel: {why}"
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return f"the model is {weight.dtype} on {weight.device}: the kernel knows fp32, bf16 and fp16 on the CPU"
    for name, module in net.named_modules():
        if type(module) not in KNOWN:
            return f"`{name}` is a {type(module).__name__}, which the kernel does not know"
        if any(len(hooks) for hooks in _hooks(module)):
            return f"`{name}` has hooks, which the kernel would not call"
    for name, parameter in net.named_parameters():
        if type(parameter) is not nn.Parameter or parameter.dtype != weight.dtype or not parameter.is_contiguous():
            return f"`{name}` is no plain contiguous parameter of {weight.dtype}"
    return _sizes_objection(net)


def _sizes_objection(net: TransformerWrapper) -> str:
    config = net.attn_layers.config
    inner = int(config.dim * config.ff.mult)
    sizes = {
        "dim": config.dim,
        "heads times attn_dim_head": config.heads * config.attn.dim_head,
        "the inner size": inner,
    }
    for name, size in sizes.items():
        if size % LANES:
            return f"{name} is {size}, no multiple of {LANES}"
    if not config.attn.flash:
        return "attn_flash=False asks for dense attention"
    return ""


def _hooks(module: nn.Module) -> list[Any]:
    return [module._forward_hooks, module._forward_pre_hooks]


class Distances(NamedTuple):
    """What ALiBi counts by: positions of rows [(b) n] and keys [(b) j], slopes [h]."""

    rows: Tensor
    keys: Tensor
    slopes: Tensor


@dataclass
class Ahead:
    """What the tokens `start` to `stop` have in common, as long as the cache has moved keys `moves` times."""

    mask: Mask
    start: int
    stop: int
    moves: int
    known: int  # of how many of them, from the first on, the model has learned the positions
    positions: Tensor  # (b) n
    angles: tuple[Tensor, ...]
    distances: Distances | None
    held: list[Any]  # tensors and arrays that the structures point to


class NativeStep:
    """The steps of one model and cache, under the cache's mask or, if it has none, `mask`."""

    def __init__(self, net: TransformerWrapper, cache: KVCache | RaggedCache, mask: Mask, causal: bool | None) -> None:
        self._net, self._cache, self.mask = net, cache, mask
        self._causal = net.attn_layers.causal if causal is None else causal
        self._config = net.attn_layers.config
        self._layers = (LayerStruct * self._config.depth)()
        self._calls = [layer.attention for layer in self._layers]
        self._step = _described(net)
        self._step.layers = cast(self._layers, POINTER(LayerStruct))
        self._weights = _weights(net, self._step, self._layers)
        self._addresses: list[int] = []
        self._bytes = 0
        self._ahead: Ahead | None = None
        self._slopes = usual_slopes(self._config.heads)

    def __call__(self, tokens: Tensor) -> Tensor | None:
        """Logits [b, n, v] in fp32 of new tokens [b, n], whose keys the cache then has; the caller advances it.

        None if this is no call for the kernel, before anything was done.
        """
        if not self._takes(tokens):
            return None
        (b, n), cache, ahead = tokens.shape, self._cache, self._prepared(tokens.shape[1])
        row = cache.past - ahead.start
        if row + n > ahead.known:
            return None
        tokens, logits = tokens.contiguous(), torch.empty(b, n, self._net.num_tokens)
        self._point_at(row, tokens, logits)
        distances = ahead.distances
        for index, call in enumerate(self._calls):
            call.b, call.nq, call.nk, call.mask_row = b, n, cache.layer(index).length + n, row
            if distances is not None:
                call.q_positions = distances.rows.data_ptr() + distances.rows.element_size() * row
        run_step(self._step)
        for index in range(self._config.depth):
            layer = cache.layer(index)
            layer.stop = layer.length + n
        return logits

    def _takes(self, tokens: Tensor) -> bool:
        cache, config = self._cache, self._config
        if tokens.ndim != 2 or tokens.dtype != torch.int64 or not (rows := tokens.numel()):
            return False
        new, group = tokens.shape[1], config.heads // config.kv_heads
        small = rows <= MOST_ROWS and group * new <= MOST_STACKED and len(tokens) == cache.batch
        fits = cache.past + new <= cache.tokens and new <= self._spare()
        return cache.begun and small and fits and _may_run() and self._are_words(tokens)

    def _are_words(self, tokens: Tensor) -> bool:
        low, high = tokens.aminmax()
        return int(low) >= 0 and int(high) < self._net.num_tokens

    def _spare(self) -> int:
        """How many keys fit behind those that there are, in every layer."""
        layers = map(self._cache.layer, range(self._config.depth))
        return min(layer.room - layer.length for layer in layers)

    # -- what many steps have in common ------------------------------------------------------------------------------

    def _prepared(self, new: int) -> Ahead:
        cache, ahead = self._cache, self._ahead
        stays = ahead is not None and ahead.moves == cache.moves and ahead.mask is self._own_mask
        if ahead is None or not stays or not ahead.start <= cache.past <= ahead.stop - new:
            ahead = self._ahead = self._prepare(new)
        return ahead

    @property
    def _own_mask(self) -> Mask:
        return self.mask if self._cache.mask is None else self._cache.mask

    def _prepare(self, new: int) -> Ahead:
        cache = self._cache
        rows = max(new, min(TILE, cache.tokens - cache.past, self._spare()))
        layout = self._net.attn_layers.layout(cache.batch, rows, cache, self._net.num_memory_tokens)
        return self._prepared_at(layout, token_positions(self._own_mask, layout, None))

    def _prepared_at(self, layout: Layout, positions: Tensor) -> Ahead:
        """What the rows of a layout need, whose tokens stand at these positions [(b) n]."""
        cache, mask, rows, positions = self._cache, self._own_mask, layout.new, positions.contiguous()
        angles = self._angles_of(positions)
        tiles, distances = self._read_mask(mask, layout)
        known = self._known(positions)
        held = [*angles, *tiles]
        return Ahead(mask, cache.past, cache.past + rows, cache.moves, known, positions, angles, distances, held)

    def _known(self, positions: Tensor) -> int:
        """Of how many rows, from the first on, the model has learned the positions."""
        if self._net.pos_emb is None:
            return positions.shape[-1]
        beyond = (positions >= self._net.max_seq_len).reshape(-1, positions.shape[-1]).any(dim=0)
        return int((beyond.cumsum(0) == 0).sum())

    def _angles_of(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Cosines and sines [b|1, 1, n, r/2]; nothing if the model does not rotate."""
        rotary = self._net.attn_layers.rotary
        return () if rotary is None else tuple(x.contiguous() for x in rotary(positions, torch.float32))

    def _read_mask(self, mask: Mask, layout: Layout) -> tuple[list[Any], Distances | None]:
        """The masks of the rows to come, in the structures of their layers.

        With what they point to, and what ALiBi counts rows by, which is the same in all layers.
        """
        layers, held = self._net.attn_layers, []
        for term, own in enumerate(layers.combined(mask, layout, causal_too=self._causal, cache=self._cache)):
            indices = [index for index, which in enumerate(layers.masks.which) if which == term]
            held += self._read_one(own, layout.new, indices)
        return held, next((part for part in held if isinstance(part, Distances)), None)

    def _read_one(self, mask: Mask, new: int, indices: list[int]) -> list[Any]:
        """The mask of `new` rows of these layers, over the keys that they have; what its structures point to."""
        config, cache = self._config, self._cache.layer(indices[0])
        memory, keys = cache.memory, cache.length + new  # 2 b g room e
        sizes = (self._cache.batch, config.heads, config.kv_heads, new, keys, config.attn.dim_head, memory.shape[-1])
        tiles = TilesProposal(Job(mask, Request(*sizes, memory.dtype, memory.device))).lower().data[0]
        held = [tiles]
        if config.alibi_pos_bias:
            at, to = mask.positions(new, keys)
            held.append(Distances(at.long().contiguous(), to.long().contiguous(), self._slopes))
        for index in indices:
            _fill(self._calls[index], tiles.template, config, self._cache.layer(index).memory)
            if config.alibi_pos_bias:
                _fill_alibi(self._calls[index], held[1])
        return held

    def _point_at(self, row: int, tokens: Tensor, logits: Tensor) -> None:
        """What the structure points to, for a step whose first token is so many rows ahead."""
        step, ahead = self._step, self._ahead
        assert ahead is not None
        step.b, step.n = tokens.shape
        step.tokens, step.logits = tokens.data_ptr(), logits.data_ptr()
        if self._net.pos_emb is not None:
            step.positions = ahead.positions.data_ptr() + ahead.positions.element_size() * row
            step.positions_stride = _apart(ahead.positions)
        if ahead.angles:
            step.cos, step.sin = (x.data_ptr() + x.element_size() * x.stride(2) * row for x in ahead.angles)
            step.angles_stride = _apart(ahead.angles[0][:, 0])
        self._point_at_weights()
        step.threads = max(1, min(torch.get_num_threads(), self._bytes // THREAD_BYTES))

    def _point_at_weights(self) -> None:
        addresses = [parameter.data_ptr() for _, _, parameter in self._weights]
        if addresses == self._addresses:
            return
        self._addresses = addresses
        self._bytes = sum(parameter.nbytes for _, _, parameter in self._weights)
        for (struct, name, _), address in zip(self._weights, addresses, strict=True):
            setattr(struct, name, address)


def _may_run() -> bool:
    """Whether nothing around the call asks for another way."""
    free = not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or cannot_look())
    return free and named_here(None) in (None, "native")


def _apart(x: Tensor) -> int:
    """From one sample's numbers to the next one's, of a tensor [(b,) ...]; 0 if all have the same."""
    return x.stride(0) if x.ndim > 1 and len(x) > 1 else 0


Weight = tuple[LayerStruct | StepStruct, str, Tensor]


def _weights(net: TransformerWrapper, step: StepStruct, layers: Any) -> list[Weight]:
    """Where the address of each parameter goes."""
    norm: Any = net.attn_layers.final_norm
    head = net.token_emb if net.tie_embedding else net.project_out
    found: list[Weight] = [
        (step, "embedding", net.token_emb.weight),
        (step, "final_gain", norm.gain),
        (step, "to_logits", head.weight),
    ]
    if net.pos_emb is not None:
        found.append((step, "position_embedding", net.pos_emb.emb.weight))
    for struct, block in zip(layers, net.attn_layers.layers, strict=True):
        found.extend((struct, name, weight) for name, weight in _weights_of(block).items() if weight is not None)
    return found


def _weights_of(block: Any) -> dict[str, Tensor | None]:
    attn, ff = block.attn, block.ff
    return {
        "attn_gain": block.attn_norm.gain,
        "to_q": attn.to_q.weight,
        "to_k": attn.to_k.weight,
        "to_v": attn.to_v.weight,
        "q_gain": getattr(attn.q_norm, "gain", None),
        "k_gain": getattr(attn.k_norm, "gain", None),
        "to_out": attn.to_out.weight,
        "ff_gain": block.ff_norm.gain,
        "ff_in": ff.proj_in.weight,
        "ff_in_bias": ff.proj_in.bias,
        "ff_out": ff.proj_out.weight,
        "ff_out_bias": ff.proj_out.bias,
    }


def _described(net: TransformerWrapper) -> StepStruct:
    """The structure with what no step changes."""
    config, norm = net.attn_layers.config, net.attn_layers.final_norm
    step = StepStruct(dim=config.dim, inner=int(config.dim * config.ff.mult), depth=config.depth)
    step.vocabulary, step.dtype = net.num_tokens, DTYPES[net.token_emb.weight.dtype]
    step.activation = RELU_SQUARED if config.ff.relu_squared else SILU if config.ff.swish else GELU
    step.gated, step.rms, step.normed_heads = config.ff.glu, config.use_rmsnorm, config.attn.qk_norm
    step.rotary = config.rotary_dim if net.attn_layers.rotary is not None else 0
    step.eps, step.offset = norm.eps, norm.offset
    step.positions_scale = net.pos_emb.scale if net.pos_emb is not None else 0.0
    step.logits_scale = net.tie_embedding_scale if net.tie_embedding else 1.0
    return step


def _fill_alibi(call: CallStruct, by: Distances) -> None:
    rows, keys, slopes = by
    call.bias_kind, call.bias, call.bias_strides = ALIBI, slopes.data_ptr(), (c_int64 * 4)(0, slopes.stride(0), 0, 0)
    call.q_positions, call.k_positions = rows.data_ptr(), keys.data_ptr()
    call.q_stride, call.k_stride = _apart(rows), _apart(keys)


def _fill(call: CallStruct, template: CallStruct, config: Any, memory: Tensor) -> None:
    """What the steps of one layer have in common: its mask, sizes, and where its keys and values lie."""
    memmove(addressof(call), addressof(template), sizeof(CallStruct))
    call.hq, call.hk, call.d, call.dv = config.heads, config.kv_heads, config.attn.dim_head, config.attn.dim_head
    call.dtype, call.scale = DTYPES[memory.dtype], config.attn.scale
    _, sample, head, row, _ = memory.stride()
    call.k, call.v = (ArrayStruct(part.data_ptr(), sample, head, row) for part in memory)
