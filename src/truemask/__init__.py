"""truemask: attention masks as small exact expressions, and the fastest correct way to run them. True means attend."""

from __future__ import annotations

from truemask._attend import attend as attend
from truemask._choose import Plan as Plan
from truemask._plan import plan as plan
from truemask.backends.registry import backends as backends
from truemask.errors import ConventionWarning as ConventionWarning
from truemask.errors import MaskError as MaskError
from truemask.errors import PlanError as PlanError
from truemask.errors import TruemaskError as TruemaskError
from truemask.generation.autoregressive import AutoregressiveWrapper as AutoregressiveWrapper
from truemask.generation.cache import KVCache as KVCache
from truemask.geometry.tiles import Rectangles as Rectangles
from truemask.geometry.tiles import TileMap as TileMap
from truemask.masks.biases import Bias as Bias
from truemask.masks.biases import alibi as alibi
from truemask.masks.biases import relative as relative
from truemask.masks.choice import per_head as per_head
from truemask.masks.choice import per_sample as per_sample
from truemask.masks.combine import everything as everything
from truemask.masks.combine import nothing as nothing
from truemask.masks.core import Mask as Mask
from truemask.masks.data import global_tokens as global_tokens
from truemask.masks.data import keys as keys
from truemask.masks.data import padding as padding
from truemask.masks.data import prefix as prefix
from truemask.masks.data import queries as queries
from truemask.masks.foreign import from_additive as from_additive
from truemask.masks.foreign import from_huggingface_2d as from_huggingface_2d
from truemask.masks.foreign import from_keras as from_keras
from truemask.masks.foreign import from_torch_mha as from_torch_mha
from truemask.masks.foreign import from_torch_sdpa as from_torch_sdpa
from truemask.masks.foreign import from_varlen as from_varlen
from truemask.masks.foreign import from_x_transformers as from_x_transformers
from truemask.masks.foreign import to_additive as to_additive
from truemask.masks.foreign import to_flashmask as to_flashmask
from truemask.masks.foreign import to_huggingface_2d as to_huggingface_2d
from truemask.masks.foreign import to_keras as to_keras
from truemask.masks.foreign import to_torch_mha as to_torch_mha
from truemask.masks.foreign import to_torch_sdpa as to_torch_sdpa
from truemask.masks.foreign import to_varlen as to_varlen
from truemask.masks.foreign import to_x_transformers as to_x_transformers
from truemask.masks.labels import documents as documents
from truemask.masks.labels import same as same
from truemask.masks.matrices import block_pattern as block_pattern
from truemask.masks.matrices import dense as dense
from truemask.masks.matrices import tree as tree
from truemask.masks.patterned import dilated as dilated
from truemask.masks.patterned import grid as grid
from truemask.masks.patterned import random as random
from truemask.masks.patterned import strided as strided
from truemask.masks.positional import blocks as blocks
from truemask.masks.positional import causal as causal
from truemask.masks.positional import local as local
from truemask.masks.positional import window as window
from truemask.masks.predicate import predicate as predicate
from truemask.masks.serial import load_mask as load_mask
from truemask.masks.serial import save_mask as save_mask
from truemask.masks.text import parse as parse
from truemask.nn.layers import Decoder as Decoder
from truemask.nn.layers import Encoder as Encoder
from truemask.nn.wrappers import TransformerWrapper as TransformerWrapper

__version__ = "0.1.0"
