"""The network of a run: a byte-level Decoder with rotary positions, RMSNorm and SwiGLU, and its loss."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.masks.core.mask import Mask
from truemask.nn.layers import Decoder
from truemask.nn.wrappers import TransformerWrapper
from truemask.train.baselines import byte_count
from truemask.train.config import NUM_TOKENS, TrainConfig
from truemask.train.rows import Batch


def build_model(config: TrainConfig) -> AutoregressiveWrapper:
    """The untrained network; the same numbers for the same seed, and the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        decoder = Decoder(
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            attn_dim_head=config.dim // config.heads,
            attn_flash=True,
            rotary_pos_emb=True,
            rotary_emb_dim=config.dim // config.heads,
            use_rmsnorm=True,
            ff_glu=True,
            ff_swish=True,
        )
        net = TransformerWrapper(
            num_tokens=NUM_TOKENS,
            max_seq_len=config.length,
            attn_layers=decoder,
            use_abs_pos_emb=False,
        )
        return AutoregressiveWrapper(net)


def batch_loss(model: AutoregressiveWrapper, batch: Batch, mask: Mask, reduction: str = "mean") -> torch.Tensor:
    """The cross-entropy in nats of the labels of a batch; each document sees itself alone, from position 0."""
    logits = model.net(batch.ids, mask=mask.packed(batch.lengths))
    return F.cross_entropy(logits.flatten(0, 1).float(), batch.labels.flatten(), reduction=reduction)


@torch.no_grad()
def bits_per_byte(model: AutoregressiveWrapper, rows: Batch, mask: Mask, batch: int) -> float:
    """How many bits the model needs for a byte of these rows, ends of documents included in the cost."""
    training = model.training
    model.eval()
    nats = 0.0
    for start in range(0, len(rows.lengths), batch):
        part = slice(start, start + batch)
        chunk = Batch(rows.ids[part], rows.labels[part], rows.lengths[part])
        nats += float(batch_loss(model, chunk, mask, reduction="sum"))
    model.train(training)
    return nats / math.log(2) / byte_count(rows)
