"""The same keywords and the same weights give what x-transformers gives, outside the listed deviations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.equality import assert_tokens_equal_up_to_tie
from tests.support.nn_models import DEPTH, DIM, DIM_HEAD, HEADS, TOKENS, block_of, features, ids
from truemask.generation.autoregressive import AutoregressiveWrapper
from truemask.nn.layers import Decoder, Encoder
from truemask.nn.wrappers import TransformerWrapper

peer: Any = pytest.importorskip("x_transformers", reason="x-transformers is not installed (the extra `peers` has it)")

BATCH, N = 3, 11
KEYWORDS: list[dict[str, Any]] = [
    {},
    {"use_rmsnorm": True, "ff_glu": True, "ff_swish": True},
    {"rotary_pos_emb": True, "rotary_emb_dim": 4},
    {
        "rotary_pos_emb": True,
        "rotary_emb_dim": 6,
        "rotary_interpolation_factor": 2.0,
        "rotary_base_rescale_factor": 3.0,
    },
    {"alibi_pos_bias": True, "rotary_pos_emb": True, "rotary_emb_dim": 4},
    {"attn_kv_heads": 2, "ff_relu_squared": True},
    {"attn_one_kv_head": True, "ff_no_bias": True, "ff_mult": 3},
    {"attn_qk_norm": True, "attn_qk_norm_scale": 7},
    {"attn_qk_rmsnorm": True, "attn_kv_heads": 2, "norm_add_unit_offset": False},
    {"attn_num_mem_kv": 3, "attn_qk_norm": True, "attn_kv_heads": 2},
]


def pair(kind: str, **keywords: Any) -> tuple[Any, Any]:
    """A peer's stack and ours, with the peer's weights, in fp64."""
    sizes = {"dim": DIM, "depth": DEPTH, "heads": HEADS, "attn_dim_head": DIM_HEAD}
    torch.manual_seed(5)
    theirs = getattr(peer, kind)(**sizes, verbose=False, **keywords).double().eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.4)
    ours = {"Decoder": Decoder, "Encoder": Encoder}[kind](**sizes, **keywords).double().eval()
    ours.load_state_dict(dict(translated(theirs)))
    return theirs, ours


def translated(theirs: Any) -> list[tuple[str, Tensor]]:
    """A peer's weights under our names; its round-robin query heads in our blocks."""
    weights, state = [], theirs.state_dict()
    for name, tensor in state.items():
        if name.startswith("rotary_pos_emb"):
            continue
        place = name.split(".")
        if place[0] == "final_norm":
            weights.append(("final_norm.gain", tensor))
            continue
        index, part = int(place[1]), ".".join(place[2:])
        layer, side = f"layers.{index // 2}", "attn" if index % 2 == 0 else "ff"
        if part.startswith("0."):
            weights.append((f"{layer}.{side}_norm.gain", tensor))
        elif side == "attn":
            weights.append((f"{layer}.attn.{attention_name(part)}", in_blocks(part, tensor, theirs)))
        else:
            projection = "proj_in" if part.startswith("1.ff.0") else "proj_out"
            weights.append((f"{layer}.ff.{projection}.{place[-1]}", tensor))
    return weights


def attention_name(part: str) -> str:
    return part.removeprefix("1.").replace("q_rmsnorm.gamma", "q_norm.gain").replace("k_rmsnorm.gamma", "k_norm.gain")


def in_blocks(part: str, tensor: Tensor, theirs: Any) -> Tensor:
    """Head h reads key head h % g there, and h // (heads / g) here."""
    kv_heads = next(m for m in theirs.modules() if type(m).__name__ == "Attention").kv_heads
    order = torch.arange(HEADS).reshape(-1, kv_heads).T.flatten()
    if part == "1.to_q.weight":
        return tensor.unflatten(0, (HEADS, -1))[order].flatten(0, 1)
    if part == "1.to_out.weight":
        return tensor.unflatten(1, (HEADS, -1))[:, order].flatten(1, 2)
    return tensor[order] if part == "1.q_rmsnorm.gamma" else tensor


def assert_parity(ours: Tensor, theirs: Tensor) -> None:
    """Their rotary frequencies are rounded to fp32, and their RMSNorm has another epsilon."""
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("keywords", KEYWORDS, ids=str)
@pytest.mark.parametrize("kind", ["Decoder", "Encoder"])
def test_stacks(kind: str, keywords: dict[str, Any]) -> None:
    theirs, ours = pair(kind, **keywords)
    x = features(BATCH, N)
    assert_parity(ours(x), theirs(x))


FLAGS = torch.tensor([[True] * N, [True] * 7 + [False] * 4, [False] * 2 + [True] * 9])
MATRIX = torch.rand(BATCH, HEADS, N, N, generator=torch.Generator().manual_seed(3)) < 0.6
MATRIX |= torch.eye(N, dtype=torch.bool)  # without its diagonal, the peer's decoder averages the future


@pytest.mark.parametrize(
    "given",
    [
        {"mask": FLAGS},
        {"attn_mask": MATRIX[0, 0]},
        {"attn_mask": MATRIX[0]},
        {"attn_mask": MATRIX},
        {"attn_mask": MATRIX[:, :1]},
        {"mask": FLAGS, "attn_mask": MATRIX[:1]},
    ],
    ids=lambda given: "+".join(f"{name}{list(value.shape)}" for name, value in given.items()),
)
@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("kind", ["Decoder", "Encoder"])
def test_masks(kind: str, flash: bool, given: dict[str, Tensor]) -> None:
    theirs, ours = pair(kind, attn_flash=flash)
    x = features(BATCH, N)
    real = given.get("mask", torch.ones(BATCH, N, dtype=torch.bool))  # pads are zeroed by both, and read by nobody
    assert_parity(ours(x, **given)[real], theirs(x, **given)[real])


def test_causal_override() -> None:
    theirs, ours = pair("Decoder", attn_flash=False)
    x = features(BATCH, N)
    assert_parity(ours(x, causal=False), theirs(x, causal=False))


def models(kind: str, layers: dict[str, Any], **keywords: Any) -> tuple[Any, TransformerWrapper]:
    """A peer's TransformerWrapper and ours with its weights, in fp64."""
    options = {"num_tokens": TOKENS, "max_seq_len": 29, **keywords}
    their_layers, our_layers = pair(kind, **layers)
    theirs = peer.TransformerWrapper(attn_layers=their_layers, **options).double().eval()
    ours = TransformerWrapper(attn_layers=our_layers, **options).double().eval()
    names = {"token_emb.emb.weight": "token_emb.weight", "to_logits.weight": "project_out.weight"}
    own = {
        names.get(str(name), str(name)): t
        for name, t in theirs.state_dict().items()
        if not str(name).startswith("attn_layers")
    }
    missing, unexpected = ours.load_state_dict(own, strict=False)
    assert not unexpected
    assert all(name.startswith("attn_layers.") for name in missing)
    return theirs, ours


@pytest.mark.parametrize(
    ("kind", "layers", "keywords"),
    [
        ("Decoder", {}, {}),
        ("Decoder", {}, {"use_abs_pos_emb": False}),
        ("Decoder", {"rotary_pos_emb": True, "rotary_emb_dim": 4}, {"tie_embedding": True}),
        ("Decoder", {"rotary_pos_emb": True, "rotary_emb_dim": 4}, {"num_memory_tokens": 1}),
        ("Encoder", {}, {"num_memory_tokens": 3, "tie_embedding": True, "tie_embedding_scale": 0.5}),
    ],
    ids=str,
)
def test_wrappers(kind: str, layers: dict[str, Any], keywords: dict[str, Any]) -> None:
    theirs, ours = models(kind, layers, **keywords)
    tokens = ids(BATCH, N)
    assert_parity(ours(tokens), theirs(tokens))
    assert_parity(ours(tokens, mask=FLAGS)[FLAGS], theirs(tokens, mask=FLAGS)[FLAGS])


def test_losses_and_greedy_answers() -> None:
    theirs, ours = models("Decoder", {"rotary_pos_emb": True, "rotary_emb_dim": 4})
    theirs, ours = peer.AutoregressiveWrapper(theirs), AutoregressiveWrapper(ours)
    tokens = ids(BATCH, N)
    assert_parity(ours(tokens), theirs(tokens))
    assert_same_answers(theirs, ours, list(tokens[:, :3]))
    prompts = [tokens[0, :3], tokens[1, :8], tokens[2, :5]]
    theirs, ours = theirs.float(), ours.float()  # in fp64 the peer's rows of pads are NaN, and reach every answer
    assert_same_answers(theirs, ours, prompts)


def assert_same_answers(theirs: Any, ours: AutoregressiveWrapper, prompts: list[Tensor]) -> None:
    answer = theirs.generate(prompts, 7, temperature=0.0, cache_kv=False)

    def chosen_from(row: int, step: int) -> Tensor:
        return ours.net(torch.cat((prompts[row], answer[row, :step]))[None])[0, -1]

    assert_tokens_equal_up_to_tie(ours.generate(prompts, 7, temperature=0.0), answer, chosen_from)


def test_initial_weights_have_the_peers_scale() -> None:
    """The same spread of every matrix, so that recipes carry over."""
    sizes = {"dim": 128, "depth": 1, "heads": 4, "attn_dim_head": 32}
    theirs = peer.TransformerWrapper(num_tokens=97, max_seq_len=89, attn_layers=peer.Decoder(**sizes, verbose=False))
    ours = TransformerWrapper(num_tokens=97, max_seq_len=89, attn_layers=Decoder(**sizes))
    pairs = [
        (ours.token_emb.weight, theirs.token_emb.emb.weight),
        (ours.project_out.weight, theirs.to_logits.weight),
        (block_of(ours.attn_layers).attn.to_q.weight, theirs.attn_layers.layers[0][1].to_q.weight),
        (block_of(ours.attn_layers).ff.proj_out.weight, theirs.attn_layers.layers[1][1].ff[2].weight),
    ]
    for own, other in pairs:
        assert own.shape == other.shape
        torch.testing.assert_close(own.std(), other.std(), rtol=0.1, atol=0)
