"""Models to audit: small ones whose faults were planted, and the tiny ones of other libraries."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOKENS, DIM = 31, 8
SIZES: dict[str, Any] = {
    "vocab_size": TOKENS,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}


def ids(b: int, n: int, seed: int = 3) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(3, TOKENS, (b, n), generator=torch.Generator().manual_seed(seed))


class Sums(nn.Module):
    """The sum of the embedded tokens so far: causal, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(TOKENS, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.embedding(x))

    def after(self, x: Tensor) -> Tensor:
        """What happens to the embedded tokens `[b, n, d]`."""
        return x.cumsum(dim=1)


class Planted(Sums):
    """The same with a fault in `after`."""

    def __init__(self, fault: Any) -> None:
        super().__init__()
        self.fault = fault

    def after(self, x: Tensor) -> Tensor:
        return self.fault(x)


def tiny(kind: str, **keywords: Any) -> Any:
    """A tiny model of transformers with random weights: `Llama`, `Mistral`, ..."""
    import transformers

    sizes = dict(SIZES)
    heads = {"GPT2": "LMHeadModel", "Bert": "ForMaskedLM"}.get(kind, "ForCausalLM")
    if kind in ("Llama", "Mistral", "Gemma3"):
        sizes |= {"num_key_value_heads": 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "GPT2":
        sizes = {"vocab_size": TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
        sizes |= {"bos_token_id": 1, "eos_token_id": 2}
    make = getattr(transformers, f"{kind}{'Text' * (kind == 'Gemma3')}Config")
    torch.manual_seed(1)
    return getattr(transformers, kind + heads)(make(**sizes | keywords)).eval()
