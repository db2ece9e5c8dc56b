"""The face: the public names, written down. A name comes or goes on purpose, with a line here and in CHANGELOG.md."""

from __future__ import annotations

import inspect
import types

import truemask

NAMES = """
    AutoregressiveWrapper
    Bias
    ConventionWarning
    Decoder
    Encoder
    KVCache
    Mask
    MaskError
    PackCollator
    PackedRows
    PackedTrees
    Plan
    PlanError
    Rectangles
    TileMap
    TransformerWrapper
    TruemaskError
    alibi
    assert_no_leak
    attend
    audit
    backends
    block_pattern
    blocks
    causal
    dense
    diagnose
    dilated
    documents
    enable
    everything
    explain
    from_additive
    from_huggingface_2d
    from_keras
    from_torch_mha
    from_torch_sdpa
    from_varlen
    from_x_transformers
    global_tokens
    grid
    keys
    load_mask
    local
    nothing
    pack
    pack_tree
    padding
    parse
    per_head
    per_sample
    plan
    predicate
    prefix
    queries
    random
    reach
    relative
    same
    save_mask
    strided
    to_additive
    to_flashmask
    to_huggingface_2d
    to_keras
    to_torch_mha
    to_torch_sdpa
    to_varlen
    to_x_transformers
    tree
    use
    window
""".split()


def public() -> list[str]:
    """What `truemask` offers: its names without a leading underscore that are not modules."""
    return [
        name
        for name, value in vars(truemask).items()
        if not name.startswith("_") and not isinstance(value, types.ModuleType) and name != "annotations"
    ]


def test_the_public_names_are_those_written_here() -> None:
    assert sorted(public()) == sorted(NAMES)


def test_every_public_name_says_what_it_is() -> None:
    for name in public():
        value = getattr(truemask, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"truemask.{name} has no docstring"
