"""The only place that flips or reinterprets a mask: from and to the conventions of other libraries.

Here `True` means "may attend" (law 1 of `docs/conventions.md`). What the others mean:

| whose | dtype | shape | what it says |
|---|---|---|---|
| `F.scaled_dot_product_attention` | bool | (q, k), (b, h, q, k) | True = attend |
| the same, and most eager code | float | the same | added to the scores: 0 = attend, -inf or the lowest = hidden |
| `nn.MultiheadAttention` `attn_mask` | bool | (q, k), (b * h, q, k) | True = masked OUT |
| `nn.MultiheadAttention` `key_padding_mask` | bool | (b, k), (k) | True = masked OUT |
| Hugging Face `attention_mask` | int, bool | (b, k) | 1 = a real token |
| x-transformers `mask` | bool | (b, k) | True = a real token |
| x-transformers `attn_mask` | bool | (q, k), (h, q, k), (b, h, q, k) | True = attend |
| Keras `attention_mask` | bool, 0/1 | (b, q, k) | True = attend |
| FlashAttention `cu_seqlens_q`, `cu_seqlens_k` | int32 | (documents + 1) | attend within a document and `window_size` |
| FlashMask `startend_row_indices` | int32 | (b, h, k, 1, 2 or 4) | the queries from which a key is hidden |

A mask keeps no gradient and a bias is not a mask: numbers that are neither 0 nor hidden belong in `attend(...,
bias=)`. The words: docs/internals/glossary.md.
"""

from __future__ import annotations

from truemask.masks.foreign.exporters import to_additive as to_additive
from truemask.masks.foreign.exporters import to_huggingface_2d as to_huggingface_2d
from truemask.masks.foreign.exporters import to_keras as to_keras
from truemask.masks.foreign.exporters import to_torch_mha as to_torch_mha
from truemask.masks.foreign.exporters import to_torch_sdpa as to_torch_sdpa
from truemask.masks.foreign.exporters import to_x_transformers as to_x_transformers
from truemask.masks.foreign.importers import from_additive as from_additive
from truemask.masks.foreign.importers import from_huggingface_2d as from_huggingface_2d
from truemask.masks.foreign.importers import from_keras as from_keras
from truemask.masks.foreign.importers import from_torch_mha as from_torch_mha
from truemask.masks.foreign.importers import from_torch_sdpa as from_torch_sdpa
from truemask.masks.foreign.importers import from_x_transformers as from_x_transformers
from truemask.masks.foreign.varlen import FlashMask as FlashMask
from truemask.masks.foreign.varlen import Varlen as Varlen
from truemask.masks.foreign.varlen import from_varlen as from_varlen
from truemask.masks.foreign.varlen import to_flashmask as to_flashmask
from truemask.masks.foreign.varlen import to_varlen as to_varlen
