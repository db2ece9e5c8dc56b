"""Masks in files: what is written is read back, and a damaged or hostile file is a MaskError, never code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import truemask as tm
from tests.support.cases import CASES
from tests.support.descriptions import formula
from tests.support.strategies import LEAVES, Drawn, expressions
from truemask.masks.core.kinds import KINDS
from truemask.masks.formats.serialization import from_json, to_json

SAVABLE = [case for case in CASES if "predicate" not in case.name]
DATA = tm.keys(torch.arange(300) % 7 != 0)
MIXED = tm.causal & (tm.window(31) | tm.prefix([2, 3])) & DATA


@given(expressions(leaves=[leaf for leaf in LEAVES if leaf != "predicate"]))
def test_any_expression_round_trips_through_json(drawn: Drawn) -> None:
    mask = drawn.mask
    expression, tensors = to_json(mask)
    again = from_json(json.loads(json.dumps(expression)), tensors)
    assert again == mask
    assert hash(again) == hash(mask)
    assert again.text == mask.text
    assert to_json(again)[0] == expression


@pytest.mark.parametrize("case", SAVABLE, ids=repr)
def test_files_round_trip(case: Any, tmp_path: Path) -> None:
    mask, path = case.make(), tmp_path / "mask.safetensors"
    tm.save_mask(mask, path)
    again = tm.load_mask(path)
    assert again == mask
    sizes = {"batch": case.batch, "heads": case.heads}
    assert torch.equal(
        again.to_dense(case.q_len, case.kv_len, **sizes), mask.to_dense(case.q_len, case.kv_len, **sizes)
    )


def test_the_json_is_plain_and_shares_equal_data() -> None:
    expression, tensors = to_json(~tm.window(4) & DATA & DATA.T)
    assert len(tensors) == 1
    (digest,) = tensors
    assert expression["kind"] == "and"
    assert expression["terms"][0] == {"kind": "not", "base": {"kind": "window", "size": 4}}
    assert expression["terms"][1] == {"kind": "keys", "flags": {"data": digest}}
    assert set(find_kinds(expression)) <= set(KINDS)


def every_kind() -> tm.Mask:
    bands = (tm.causal | tm.window(31)) ^ tm.local(3) ^ tm.blocks(4, back=1, ahead=1)
    spots = (tm.dilated(3) | tm.strided(5, last=2) | tm.grid(20, 15, 2)) - tm.random(0.25, block=2, seed=3)
    flags = (
        (tm.keys(torch.arange(70) % 7 != 0) & tm.queries([True] * 70))
        | tm.global_tokens([0, 5, 60])
        | tm.prefix([2, 3])
    )
    labels = (
        tm.documents([30, 40]) | tm.documents(ids=[0] * 30 + [4] * 40) | tm.same([-1, 0, 7] * 20 + [1] * 10, none=7)
    )
    shapes = tm.block_pattern(torch.eye(5).bool(), 14) | tm.tree([-1, 0, 0], lengths=[20, 20, 30])
    tensor = tm.dense((torch.arange(4900) % 11 < 4).reshape(70, 70))
    pads = tm.padding(lengths=[66, 70]) & tm.padding(starts=[1, 2], on="keys")
    moved = tm.window(9).at(q_start=2, k_start=1) ^ tm.causal.packed([30, 40]) ^ tm.causal.padded([3, 4])
    placed = tm.causal.take(q=torch.arange(70).flip(0)).T | tm.causal.prepended(q=2, k=3, seen=tm.everything)
    chosen = tm.per_sample([tm.causal, tm.nothing]) | tm.per_head([tm.causal, tm.window(2)]).select(heads=[1])
    return (bands ^ spots ^ (flags | labels)) - (shapes & tensor & pads) ^ ~(moved | placed | chosen)


def test_a_file_of_an_earlier_version_loads() -> None:
    """`every_kind.safetensors` was written before 0.1 was released, when the classes were in other files."""
    mask = tm.load_mask(Path(__file__).with_name("every_kind.safetensors"))
    assert mask == every_kind()
    assert set(find_kinds(to_json(mask)[0])) == set(KINDS) - {"predicate"}
    assert torch.equal(mask.to_dense(60), every_kind().to_dense(60))


def find_kinds(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [*([value["kind"]] if "kind" in value else []), *(k for v in value.values() for k in find_kinds(v))]
    return [k for v in value for k in find_kinds(v)] if isinstance(value, list) else []


def test_a_file_may_be_named_by_a_string(tmp_path: Path) -> None:
    tm.save_mask(MIXED, str(tmp_path / "m"))
    assert tm.load_mask(str(tmp_path / "m")) == MIXED


def test_a_function_cannot_be_saved(tmp_path: Path) -> None:
    mask = tm.causal & tm.predicate(formula)
    with pytest.raises(tm.MaskError, match=r"predicate\(formula\).*cannot be saved"):
        tm.save_mask(mask, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_missing_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        tm.load_mask(tmp_path / "nothing")


@pytest.mark.parametrize("content", [b"", b"not a mask", b"\x00" * 100, b"\xff" * 9, b"PK\x03\x04" + b"a" * 60])
def test_other_bytes_are_not_a_mask(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_bytes(content)
    with pytest.raises(tm.MaskError, match="not a mask file"):
        tm.load_mask(path)


def test_a_folder_is_not_a_mask(tmp_path: Path) -> None:
    with pytest.raises(tm.MaskError, match="not a mask file"):
        tm.load_mask(tmp_path)


def test_another_safetensors_file_is_not_a_mask(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(3)}, tmp_path / "m")
    with pytest.raises(tm.MaskError, match="not one that save_mask wrote"):
        tm.load_mask(tmp_path / "m")


def test_every_cut_and_every_flipped_bit_is_a_mask_error_or_the_same_mask(tmp_path: Path) -> None:
    path, broken = tmp_path / "m", tmp_path / "broken"
    tm.save_mask(MIXED, path)
    content = path.read_bytes()
    for stop in range(0, len(content), 17):
        broken.write_bytes(content[:stop])
        with pytest.raises(tm.MaskError):
            tm.load_mask(broken)
    for place in range(0, len(content), 5):
        broken.write_bytes(content[:place] + bytes([content[place] ^ 16]) + content[place + 1 :])
        try:
            found = tm.load_mask(broken)
        except tm.MaskError:
            continue
        assert isinstance(found, tm.Mask)  # a changed number in the expression is another mask, as good as any


def write(path: Path, expression: Any, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    text = expression if isinstance(expression, str) else json.dumps(expression)
    save_file(tensors or {}, path, metadata={"format": "truemask-1", "mask": text})
    return path


def nested(depth: int) -> str:
    return '{"kind": "not", "base": ' * depth + '{"kind": "causal"}' + "}" * depth


def alternating(depth: int) -> dict[str, Any]:
    mask: dict[str, Any] = {"kind": "window", "size": 3}
    for level in range(depth):
        mask = {"kind": ("and", "or")[level % 2], "terms": [mask, {"kind": "causal"}]}
    return mask


BAD = {
    "unknown kind": {"kind": "windw", "size": 3},
    "no kind": {"size": 3},
    "not an object": [1, 2],
    "a number": 3,
    "null": None,
    "a string": '"causal"',
    "not json": "{",
    "empty": "",
    "a class": {"kind": "builtins.eval", "size": 3},
    "missing argument": {"kind": "window"},
    "another argument": {"kind": "window", "size": 3, "more": 1},
    "argument of a value": {"kind": "causal", "size": 3},
    "wrong type": {"kind": "window", "size": "3"},
    "negative": {"kind": "window", "size": -3},
    "boolean": {"kind": "window", "size": True},
    "huge": {"kind": "window", "size": 10**40},
    "terms missing": {"kind": "and"},
    "one term": {"kind": "and", "terms": [{"kind": "causal"}]},
    "no term": {"kind": "or", "terms": []},
    "term is no mask": {"kind": "and", "terms": [{"kind": "causal"}, 3]},
    "base is no mask": {"kind": "not", "base": 3},
    "missing data": {"kind": "keys", "flags": {"data": "0123456789abcdef"}},
    "data of the wrong name": {"kind": "keys", "flags": {"data": "../../etc/passwd"}},
    "data is no object": {"kind": "keys", "flags": {"data": 3}},
    "numbers for flags": {"kind": "keys", "flags": [1, 0]},
    "missing position": {"kind": "at", "base": {"kind": "causal"}, "q_start": 3},
    "no positions": {"kind": "take", "base": {"kind": "causal"}, "q": None, "k": None},
    "cycle": {"kind": "tree", "parents": [1, 0], "lengths": None},
    "huge documents": {"kind": "packed", "base": {"kind": "causal"}, "lengths": [2**60], "kv_lengths": None},
    "huge labels": {"kind": "documents", "ends": [2**60], "values": [0], "kv_ends": None, "kv_values": None},
    "labels backwards": {"kind": "documents", "ends": [5, 3], "values": [0, 1], "kv_ends": None, "kv_values": None},
    "labels of two lengths": {"kind": "documents", "ends": [2, 3], "values": [0], "kv_ends": None, "kv_values": None},
    "samples do not agree": {
        "kind": "and",
        "terms": [{"kind": "prefix", "length": [1, 2]}, {"kind": "prefix", "length": [1, 2, 3]}],
    },
    "a predicate": {"kind": "predicate", "fn": "os.system"},
    "deep": nested(5_000),
    "deep and": alternating(250),
    "not deep": '{"kind": "not", "base": ' * 900,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_expressions_are_mask_errors(name: str, tmp_path: Path) -> None:
    with pytest.raises(tm.MaskError) as caught:
        tm.load_mask(write(tmp_path / "m", BAD[name]))
    assert len(str(caught.value)) < 2000


def test_a_file_builds_what_the_operators_build() -> None:
    causal, prefix = {"kind": "causal"}, {"kind": "prefix", "length": 2}
    nested_and = {"kind": "and", "terms": [{"kind": "and", "terms": [causal, prefix]}, causal]}
    assert from_json(nested_and, {}) == tm.causal & tm.prefix(2) & tm.causal
    assert from_json({"kind": "not", "base": {"kind": "not", "base": causal}}, {}) == tm.causal


def test_an_unknown_kind_is_named_with_the_nearest_known_one() -> None:
    with pytest.raises(tm.MaskError, match="unknown kind of mask 'windw', did you mean 'window'"):
        from_json({"kind": "windw", "size": 3}, {})


def test_swapped_data_is_noticed(tmp_path: Path) -> None:
    tm.save_mask(DATA, tmp_path / "m")
    ((name, tensor),) = load_file(tmp_path / "m").items()
    write(tmp_path / "m", to_json(DATA)[0], {name: ~tensor})
    with pytest.raises(tm.MaskError, match=name):
        tm.load_mask(tmp_path / "m")


def test_data_that_nobody_names_is_ignored_and_not_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "m", {"kind": "window", "size": 3}, {"extra": torch.ones(3)})
    assert tm.load_mask(path) == tm.window(3)


@given(
    st.recursive(
        st.none() | st.integers() | st.text(max_size=5) | st.sampled_from(sorted(KINDS)),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["kind", "base", "terms", "size", "data", "q", "k"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_any_json_is_a_mask_or_a_mask_error(value: Any) -> None:
    try:
        mask = from_json(value, {})
    except tm.MaskError:
        return
    assert isinstance(mask, tm.Mask)
