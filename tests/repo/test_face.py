"""The face: the public names, written down. A name comes or goes on purpose, with a line here and in CHANGELOG.md."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

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
    attention_backend
    backends
    block_pattern
    blocks
    cache_for
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
    speculate
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


ADDED = """
import sys
import torch
before = set(sys.modules)
import truemask
print(*sorted(name for name in {*sys.modules} - before if name.split(".")[0] != "truemask"))
"""
COMES_WITH_IT = {"html", "html.entities", "numpy.typing", "numpy._typing._add_docstring"}
COMES_WITH_IT |= {"torch.nn.attention._utils", "torch.nn.attention.flex_attention"}


def run(program: str) -> str:
    """What a program prints in a process of its own."""
    return subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout


def test_the_public_names_are_those_written_here() -> None:
    assert sorted(truemask.__all__) == sorted(NAMES)
    assert {*NAMES, "nn"} <= {*dir(truemask)}


def test_every_public_name_says_what_it_is() -> None:
    for name in NAMES:
        value = getattr(truemask, name)
        if inspect.isclass(value) or inspect.isfunction(value):
            assert inspect.getdoc(value), f"truemask.{name} has no docstring"


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'truemask' has no attribute 'attendd'"):
        _ = truemask.attendd


def test_names_come_with_the_first_that_is_asked_for() -> None:
    assert run("import sys, truemask; print({'torch', 'numpy'} & {*sys.modules})").strip() == "set()"
    assert run("import truemask as tm; print(tm.causal & tm.window(3), tm.nn.__name__)").split("\n")[0].endswith("nn")
    assert run("from truemask import nn, attend; print(nn.MultiheadAttention.__name__)").strip() == "MultiheadAttention"


def test_masks_have_their_operators_whichever_file_is_imported_first() -> None:
    program = "from truemask.masks.leaves.bands import causal, window; print((causal & window(3)).at(2).packed([4]))"
    assert run(program).strip() == "(causal & window(3)).at(q_start=2).packed([4])"


def test_after_torch_every_name_comes_at_once_with_the_operators_that_exported_programs_call() -> None:
    names = run("import torch, truemask; print(*vars(truemask)); torch.ops.truemask.attend").split()
    assert {*NAMES} <= {*names}


def test_importing_truemask_costs_few_modules_over_torch() -> None:
    added = {*run(ADDED).split()}
    packages = {name.split(".")[0] if "torch" not in name else ".".join(name.split(".")[:2]) for name in added}
    assert added <= COMES_WITH_IT, f"`import truemask` imports {len(added)} modules over torch, of {sorted(packages)}"
