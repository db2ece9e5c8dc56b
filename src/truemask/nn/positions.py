"""Where a token is: rotary angles on queries and keys, or a learned vector per position added to the input.

Positions are the mask's logical ones (law 2 in docs/conventions.md), so a document has the same ones alone, packed or
padded. Shapes: b batch, h heads, n positions, d features of a head, r of them rotated.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from truemask.common.real_tensors import cannot_look


class Rotation(NamedTuple):
    """Cosine and sine of the angles of rows, [b|1, 1, n, r/2], in fp32 (fp64 for doubles)."""

    cos: Tensor
    sin: Tensor


class RotaryEmbedding(nn.Module):
    """Rotary positions (Su et al., arXiv 2104.09864), interleaved pairs over the first `dim` features of a head.

    It holds no tensor: angles are computed from integer positions in fp32 whatever the dtype of the model, so
    `.bfloat16()` does not round positions. `interpolation_factor` divides positions; `base_rescale_factor` is the
    NTK-aware rescaling of the base.
    """

    def __init__(self, dim: int, *, interpolation_factor: float = 1.0, base_rescale_factor: float = 1.0) -> None:
        super().__init__()
        self.dim = dim
        self.interpolation_factor = interpolation_factor
        # a single pair has one frequency, 1, whatever the base
        self.base = 10000.0 * (base_rescale_factor ** (dim / (dim - 2)) if dim > 2 else 1.0)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Angles of `positions` (int64 [n] or [b, n]) for a model of `dtype`."""
        exact = torch.promote_types(dtype, torch.float32)
        steps = torch.arange(0, self.dim, 2, device=positions.device, dtype=exact)
        frequencies = self.base ** (-steps / self.dim) / self.interpolation_factor  # r/2
        angles = positions.to(exact)[..., None] * frequencies  # (b) n r/2
        angles = angles[:, None] if angles.ndim == 3 else angles[None, None]  # b|1 1 n r/2
        return Rotation(angles.cos(), angles.sin())

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base:g}, interpolation_factor={self.interpolation_factor:g}"


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the first r features of x (b, h, n, d), pair by pair, computed in the rotation's dtype."""
    width = 2 * rotation.cos.shape[-1]
    turning, rest = x.split((width, x.shape[-1] - width), dim=-1)
    pairs = turning.to(rotation.cos.dtype).unflatten(-1, (-1, 2))  # b h n r/2 2
    turned = _turned_by_parts(pairs, *rotation) if cannot_look() else _turned(pairs, *rotation)
    turned = turned.flatten(-2).to(x.dtype)
    return turned if width == x.shape[-1] else torch.cat((turned, rest), dim=-1)


def _turned(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair times cos + i sin, in one pass."""
    if pairs.stride(-1) != 1 or pairs.storage_offset() % 2 or any(step % 2 for step in pairs.stride()[:-1]):
        pairs = pairs.contiguous()  # complex numbers lie at even places
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.complex(cos, sin))


def _turned_by_parts(pairs: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same in real numbers, which compilers fuse."""
    first, second = pairs.unbind(-1)
    return torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)


class AbsolutePositionalEmbedding(nn.Module):
    """A learned vector for each of `max_seq_len` positions, scaled by dim ** -0.5 as in x-transformers."""

    def __init__(self, dim: int, max_seq_len: int) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.scale = dim**-0.5
        self.emb = nn.Embedding(max_seq_len, dim)

    def forward(self, positions: Tensor) -> Tensor:
        """[n] or [b, n] -> [(b,) n, d]. Positions before 0 are padding, whose vector nobody reads: they take 0's."""
        looks = positions.numel() and not cannot_look()  # a compiled graph cannot; indexing fails there
        if looks and (last := int(positions.max())) >= self.max_seq_len:
            raise ValueError(
                f"position {last} has no embedding: max_seq_len={self.max_seq_len} positions were learned, "
                f"0 to {self.max_seq_len - 1}. Pass fewer tokens, build the model with a larger max_seq_len, "
                "or use rotary_pos_emb=True, which has no limit"
            )
        return self.emb(positions.clamp(min=0).to(self.emb.weight.device)) * self.scale
