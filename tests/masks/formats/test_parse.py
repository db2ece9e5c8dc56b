"""The language as text: what parses, what the parser points at, and that hostile text costs nothing but an error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import truemask as tm
from tests.support.strategies import LEAVES, Drawn, build, expressions
from tests.support.work import work_of

WORDS = {
    "causal": tm.causal,
    "everything": tm.everything,
    "nothing": tm.nothing,
    "window(256)": tm.window(256),
    "local(0)": tm.local(0),
    "prefix(4)": tm.prefix(4),
    "prefix([1, 5, 0])": tm.prefix([1, 5, 0]),
    "global_tokens([0, 7])": tm.global_tokens([0, 7]),
    "blocks(64)": tm.blocks(64),
    "blocks(64, back=1, ahead=2)": tm.blocks(64, back=1, ahead=2),
    "block_pattern([[True, False], [True, True]], 3)": tm.block_pattern([[True, False], [True, True]], 3),
    "dilated(3)": tm.dilated(3),
    "strided(8)": tm.strided(8),
    "strided(8, last=2)": tm.strided(8, last=2),
    "random(0.1)": tm.random(0.1),
    "random(0.25, block=64, seed=7, per_head=True)": tm.random(0.25, block=64, seed=7, per_head=True),
    "grid(3, 5, 1)": tm.grid(3, 5, 1),
    "same([1, -1, 1])": tm.same([1, -1, 1]),
    "keys([True, False, True])": tm.keys([True, False, True]),
    "queries([True, False, True])": tm.queries([True, False, True]),
    "padding(lengths=[3, 5])": tm.padding(lengths=[3, 5]),
    'padding(starts=[0, 2], on="keys")': tm.padding(starts=[0, 2], on="keys"),
    "tree([-1, 0, 0])": tm.tree([-1, 0, 0]),
    "tree([-1, 0], lengths=[2, 3])": tm.tree([-1, 0], lengths=[2, 3]),
    "per_head([causal, window(2)])": tm.per_head([tm.causal, tm.window(2)]),
    "per_sample([causal, ~causal])": tm.per_sample([tm.causal, ~tm.causal]),
    "documents([2, 3])": tm.documents([2, 3]),
    "documents([2, 3], kv_lengths=[1, 4])": tm.documents([2, 3], kv_lengths=[1, 4]),
    "documents(ids=[0, 1, 0])": tm.documents(ids=[0, 1, 0]),
    "causal.T": tm.causal.T,
    "causal.at(q_start=3)": tm.causal.at(q_start=3),
    "causal.at(3, 2)": tm.causal.at(3, 2),
    "causal.take(q=[3, 1])": tm.causal.take(q=[3, 1]),
    "prefix([1, 2]).select(samples=[1, 0])": tm.prefix([1, 2]).select(samples=[1, 0]),
    "causal.packed([2, 3])": tm.causal.packed([2, 3]),
    "causal.padded([0, 1])": tm.causal.padded([0, 1]),
    "(causal & window(3)).at(q_start=2).T": (tm.causal & tm.window(3)).at(q_start=2).T,
}


@pytest.mark.parametrize("text", WORDS)
def test_every_word_parses_and_prints_back(text: str) -> None:
    mask = WORDS[text]
    assert tm.parse(text) == mask
    assert mask.has_text
    assert tm.parse(str(mask)) == mask


@pytest.mark.parametrize("text", [t for t in WORDS if t != "causal.at(3, 2)"])
def test_the_text_of_a_word_is_the_word(text: str) -> None:
    assert str(tm.parse(text)).replace("'", '"') == text


a, b, c = tm.causal, tm.window(3), tm.prefix(2)
PRECEDENCE = {
    "causal | window(3) & prefix(2)": a | (b & c),
    "(causal | window(3)) & prefix(2)": (a | b) & c,
    "causal ^ window(3) & prefix(2)": a ^ (b & c),
    "causal | window(3) ^ prefix(2)": a | (b ^ c),
    "(causal | window(3)) ^ prefix(2)": (a | b) ^ c,
    "~causal & window(3)": (~a) & b,
    "~(causal & window(3))": ~(a & b),
    "~causal - window(3)": (~a) - b,
    "~(causal - window(3))": ~(a - b),
    "causal - window(3) - prefix(2)": (a - b) - c,
    "causal - (window(3) - prefix(2))": a - (b - c),
    "causal & (window(3) - prefix(2))": a & (b - c),
    "(causal & window(3)) - prefix(2)": (a & b) - c,
    "(causal - window(3)) | prefix(2)": (a - b) | c,
    "causal - (window(3) | prefix(2))": a - (b | c),
    "~causal.T": ~(a.T),
    "(~causal).T": (~a).T,
    "(causal | window(3)).at(q_start=1)": (a | b).at(1),
}


@pytest.mark.parametrize("text", PRECEDENCE)
def test_precedence_is_pythons_and_print_is_minimal(text: str) -> None:
    assert tm.parse(text) == PRECEDENCE[text]
    assert str(PRECEDENCE[text]) == text


@given(expressions(leaves=[leaf for leaf in LEAVES if leaf != "predicate"]))
def test_text_of_any_expression_round_trips_or_is_refused(drawn: Drawn) -> None:
    mask = drawn.mask
    if mask.has_text:
        assert tm.parse(mask.text) == mask
    else:
        with pytest.raises(tm.MaskError):
            tm.parse(mask.text)


def test_space_and_line_breaks_mean_nothing() -> None:
    assert tm.parse("  causal&\n\t( window( 3 )|prefix(2) )  ") == a & (b | c)
    assert tm.parse("causal &\r\n window(3)") == a & b


MISTAKES = {
    "causal & windw(8)": ("windw", "did you mean 'window'"),
    "causal & window": ("window", "needs its arguments"),
    "causal()": ("causal()", "value, not a function"),
    "causal(3) | window(2)": ("causal(3)", "value, not a function"),
    "causal and window(3)": ("causal and window(3)", "`&`"),
    "not causal": ("not causal", "`~`"),
    "causal + window(3)": ("causal + window(3)", "`&`"),
    "causal & window(size=3, bakc=1)": ("bakc=1", "no argument"),
    "blocks(4, bakc=1)": ("bakc=1", "did you mean 'back'"),
    "causal & window()": ("window()", "size"),
    "window(1, 2)": ("window(1, 2)", "window(size)"),
    "causal | window(0)": ("window(0)", "at least 1"),
    "causal | window(2.5)": ("window(2.5)", "whole number"),
    "window(True)": ("window(True)", "whole number"),
    'window("3")': ('window("3")', "whole number"),
    "random(1.5)": ("random(1.5)", "between 0 and 1"),
    "causal - window(3) & prefix(2)": ("causal - window(3)", "parentheses"),
    "causal & window(3) - prefix(2)": ("window(3) - prefix(2)", "parentheses"),
    "prefix(2) | (causal) - window(3)": ("(causal) - window(3)", "parentheses"),
    "causal.size": ("causal.size", "no attribute"),
    "causal.att(3)": ("causal.att", "did you mean 'at'"),
    "causal.T()": ("causal.T()", "without parentheses"),
    "causal & (window(3)": ("(", "never closed"),
    "causal & ": (None, "not an expression"),
    "": (None, "not an expression"),
    "3": ("3", "not a mask"),
    "causal & 3": ("3", "not a mask"),
    "[causal]": ("[causal]", "not a mask"),
    "causal; window(3)": (None, "not an expression"),
    "x = causal": (None, "not an expression"),
    "per_head([causal, 3])": ("per_head([causal, 3])", "masks"),
    "window(*[3])": ("window(*[3])", "`*`"),
    "window(**{})": ("window(**{})", "`**`"),
    "per_head([window(3), windw(3)])": ("windw", "did you mean"),
    "'ü' and causal": ("'ü' and causal", "`&`"),
    "ünknown | causal": ("ünknown", "unknown name"),
    "keys(['ü']) & windw(1)": ("keys(['ü'])", "keys"),
    "causal if causal else nothing": ("causal if causal else nothing", "not a mask"),
    "causal && window(3)": ("&&", "masks combine with a single `&`"),
    "causal || window(3)": ("||", "masks combine with a single `|`"),
    "causal & keys([True] * 5)": ("[True] * 5", "arguments are read, not worked out"),
    "window(2**8)": ("2**8", "arguments are read, not worked out"),
    "causal.at & window(3)": ("causal.at", "`at` is a method and needs its arguments: `.at(q_start=0, k_start=0)`"),
    "causal.packed": ("causal.packed", "`.packed(lengths, kv_lengths=None)`"),
    "predicate(print)": ("predicate(", "cannot carry"),
}


def pointed_at(message: str) -> str:
    """The piece of the text over the carets of an error."""
    *_, shown, carets = message.splitlines()
    assert set(carets.strip()) == {"^"}
    return shown[carets.index("^") : len(carets)]


@pytest.mark.parametrize("text", MISTAKES)
def test_mistakes_are_pointed_at(text: str) -> None:
    place, reason = MISTAKES[text]
    with pytest.raises(tm.MaskError) as caught:
        tm.parse(text)
    message = str(caught.value)
    assert reason in message
    if place is not None:
        assert pointed_at(message) == place
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


def test_a_long_line_is_cut_around_the_place() -> None:
    text = " | ".join(["causal"] * 40 + ["windw(3)"] + ["causal"] * 40)
    with pytest.raises(tm.MaskError) as caught:
        tm.parse(text)
    assert pointed_at(str(caught.value)) == "windw"
    assert max(map(len, str(caught.value).splitlines())) < 120


@pytest.mark.parametrize(
    ("mask", "name"),
    [
        (tm.keys(torch.ones(300, dtype=torch.bool)), "keys"),
        (tm.causal & tm.keys(torch.ones(2, 300, dtype=torch.bool)), "keys"),
        (tm.dense(torch.ones(20, 20, dtype=torch.bool)), "dense"),
        (tm.documents(ids=torch.arange(300)), "documents"),
        (tm.same(torch.arange(300)), "same"),
        (tm.tree(torch.arange(300) - 1), "tree"),
        (tm.predicate(lambda b, h, q, k: q == k), "predicate"),
    ],
    ids=str,
)
def test_data_prints_short_with_shape_and_is_refused_by_name(mask: tm.Mask, name: str) -> None:
    assert not mask.has_text
    assert len(str(mask)) < 120
    assert name == "predicate" or "300" in str(mask) or "20" in str(mask)
    way_out = "build it in Python" if name == "predicate" else "save_mask"
    with pytest.raises(tm.MaskError, match=f"`{name}`.*{way_out}"):
        tm.parse(str(mask))


def test_different_data_prints_different_digests() -> None:
    first, second = (tm.keys(torch.arange(300) != i) for i in (3, 4))
    assert str(first) != str(second)
    assert str(first) == str(tm.keys(torch.arange(300) != 3))


HOSTILE = {
    "import": "__import__('os').system('true')",
    "attributes": "causal.__class__.__bases__[0].__subclasses__()",
    "dunder method": "causal.__reduce__()",
    "method outside the language": "causal.to_dense(100000)",
    "method of a call": "window(3).show(10)",
    "lambda": "(lambda: causal)()",
    "comprehension": "[causal for _ in range(10**9)]",
    "generator": "per_head(causal for _ in [1])",
    "walrus": "(x := causal)",
    "f-string": "keys(f'{causal}')",
    "dict": "per_head({causal: causal})",
    "subscript": "causal[0, 0]",
    "star": "per_head([*[causal]])",
    "compare": "causal < window(3)",
    "await": "await causal",
    "yield": "(yield causal)",
    "power": "window(9**9**9**9)",
    "multiplied string": "keys('a' * 10**10)",
    "many parentheses": "(" * 20_000 + "causal" + ")" * 20_000,
    "many parentheses unclosed": "(" * 20_000,
    "many brackets": "per_head(" + "[" * 20_000 + "]" * 20_000 + ")",
    "brackets within the length": "(" * 9_000 + "causal" + ")" * 9_000,
    "many nots": "~" * 20_000 + "causal",
    "nots within the length": "~" * 19_000 + "causal",
    "nots with spaces": "~ " * 9_000 + "causal",
    "nots and parentheses": ("~" * 90 + "(") * 90 + "causal" + ")" * 90,
    "many minus": "-" * 19_000 + "causal",
    "word nots": "not " * 4_900 + "causal",
    "lambdas": "lambda: " * 2_400 + "causal",
    "conditionals": "causal if causal else " * 800 + "causal",
    "powers": "**".join(["causal"] * 2_400),
    "many attributes": "causal" + ".x" * 9_000,
    "mixed brackets": "([{" * 6_000,
    "a million digits": "window(" + "9" * 1_000_000 + ")",
    "digits within the length": "window(" + "9" * 19_000 + ")",
    "underscored digits": "window(" + "9_" * 9_000 + "9)",
    "hexadecimal": "window(0x" + "f" * 19_000 + ")",
    "hexadecimal rate": "random(0x" + "f" * 19_000 + ")",
    "hexadecimal list": "prefix([0x" + "f" * 19_000 + "])",
    "hexadecimal flag": "keys([0x" + "f" * 5_000 + "])",
    "hexadecimal option": "padding(lengths=[1], on=0x" + "f" * 5_000 + ")",
    "binary": "blocks(0b" + "1" * 29 + "_" + "f" * 100 + ")",
    "large float": "window(1e999)",
    "long exponent": "random(1e" + "9" * 28 + ")",
    "complex": "window(3j)",
    "bytes": "keys(b'ab')",
    "ellipsis": "window(...)",
    "huge size": "window(" + "9" * 25 + ")",
    "negative": "window(-1)",
    "huge position": "global_tokens([1099511627775])",
    "huge document": "documents([1099511627775])",
    "huge documents": "causal.packed([1099511627775, 1099511627775])",
    "huge segment": "tree([-1], lengths=[1099511627775])",
    "10 MB": "causal & " * 1_200_000 + "causal",
    "10 MB of spaces": " " * 10_000_000 + "(",
    "one long word": "a" * 20_000,
    "one long word and parenthesis": "a" * 19_999 + "(",
    "long word, known start": "window" * 3_000,
    "long string": "padding(lengths=[1], on='" + "x" * 19_000 + "')",
    "unicode": "causal & \uff57indow\uff13",
    "emoji": "🙂" * 5_000,
    "right to left": "causal \u202e& window(3)",
    "surrogate": "causal & \ud800",
    "NUL": "causal\0& window(3)",
    "NUL alone": "\0",
    "control": "causal \x1b[2J & window(3)",
    "form feed": "\f" * 10_000,
    "comment": "causal # & window(3)",
    "escape": "padding(lengths=[1], on='\\d')",
    "keyword glued": "window(1if 1else 2)",
    "backslash": "causal \\",
    "tabs": "\t" * 19_000 + "x",
    "decorator": "@causal",
    "two lines": "causal\nimport os",
    "raggedlist": "block_pattern([[True], [True, False]], 2)",
    "list of masks as data": "keys([causal])",
    "mask as number": "window(causal)",
    "list as number": "window([3])",
    "mask as rate": "random(causal)",
    "nested lists": "keys(" + "[" * 90 + "True" + "]" * 90 + ")",
    "string as list": "per_head('ab')",
    "string as lengths": "documents('ab')",
    "none": "window(None)",
    "nan": "random(nan)",
    "too many terms to nest": " - ".join(["causal"] * 1_000),
    "cycle": "tree([1, 0])",
}


def parsed_or_error(text: str) -> tm.Mask | tm.MaskError:
    try:
        return tm.parse(text)
    except tm.MaskError as error:
        return error


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_a_mask_error_at_once(name: str) -> None:
    text = HOSTILE[name]
    error, calls, peak_bytes = work_of(lambda: parsed_or_error(text))
    assert isinstance(error, tm.MaskError)
    assert calls < 200_000
    assert peak_bytes < 60_000_000 + 8 * len(text)
    message = str(error)
    assert len(message) < 1000
    assert all(char.isprintable() or char == "\n" for char in message)


@pytest.mark.parametrize(
    "text",
    [
        "causal" + ".T" * 9_000,
        "causal" + ".T" * 700,
        "causal" + ".at(q_start=1)" * 1_300,
        "causal" + ".at(q_start=1)" * 300,
        ("~" * 90 + "(") * 9 + "causal" + ")" * 9,
        " | ".join(["causal"] * 2_000),
        " & ".join(f"window({i + 1})" for i in range(900)),
        "(" * 90 + "causal" + ")" * 90,
        "per_head([" + ", ".join(["causal"] * 2_000) + "])",
    ],
    ids=lambda text: text[:12] + f"...{len(text)}",
)
def test_long_but_honest_text_parses_or_is_a_mask_error(text: str) -> None:
    mask, calls, _ = work_of(lambda: parsed_or_error(text))
    assert calls < 1_500_000
    assert isinstance(mask, tm.MaskError) or mask.to_dense(3, 3, heads=mask.head_count).shape[-2:] == (3, 3)


@given(st.text(max_size=60))
def test_any_text_is_a_mask_or_a_mask_error(text: str) -> None:
    assert_answers(text)


PIECES = [
    "causal",
    "window(",
    "3",
    ")",
    "(",
    "&",
    "|",
    "~",
    "-",
    ".T",
    ".at(",
    "[",
    "]",
    ",",
    "=",
    "q",
    " ",
    "'",
    "prefix",
]


@given(st.lists(st.sampled_from(PIECES), max_size=12))
def test_any_rearrangement_of_the_language_is_a_mask_or_a_mask_error(pieces: list[str]) -> None:
    assert_answers("".join(pieces))


def assert_answers(text: str) -> None:
    try:
        mask = tm.parse(text)
    except tm.MaskError:
        return
    assert tm.parse(mask.text) == mask


@pytest.mark.parametrize("value", [b"causal", None, 3, ["causal"], tm.causal], ids=str)
def test_only_text_is_text(value: object) -> None:
    with pytest.raises(tm.MaskError, match="text"):
        tm.parse(value)  # pyright: ignore[reportArgumentType]


def test_parsing_runs_nothing() -> None:
    for text in ("exec('x = 1')", "eval('1')", "open('/etc/passwd')", "print(1)", "tm.causal", "torch.ones(3)"):
        with pytest.raises(tm.MaskError):
            tm.parse(text)


def test_build_of_descriptions_and_text_agree() -> None:
    assert build(("and", ("causal",), ("or", ("window", 256), ("prefix", 4)))) == tm.parse(
        "causal & (window(256) | prefix(4))"
    )


def test_short_texts_of_long_documents_stay_cheap() -> None:
    many = ", ".join(f"documents([{2**24 - i}])" for i in range(400))
    documents, leaves = ", ".join(["[16777216]"] * 1500), ", ".join(["[16777216]"] * 1200)
    for text, refused in [
        (f"per_sample([{many}])", False),
        (f"documents([{documents}])", True),
        (f"tree([-1], lengths=[{leaves}])", True),
    ]:
        answer, calls, peak_bytes = work_of(lambda text=text: parsed_or_error(text))
        assert calls < 1_000_000
        assert peak_bytes < 20e6
        if refused:
            assert "at most 16777216 tokens" in str(answer)
        else:
            assert len(answer.children) == 400


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("causal # note", "comments have no place"),
        ("my_predicate(3)", "unknown name 'my_predicate'"),
        ("-".join(["causal"] * 300), "nested more than"),
        ("(" * 20_000 + "causal" + ")" * 20_000, "brackets inside each other"),
        (f"window({'9' * 1_000_000})", "more than 30 digits"),
        ("causal & " * 3000 + "causal", "at most 20000 characters"),
    ],
    ids=["comment", "name", "long chain", "brackets", "digits", "length"],
)
def test_every_refusal_points_at_the_place(text: str, message: str) -> None:
    with pytest.raises(tm.MaskError, match=message) as caught:
        tm.parse(text)
    assert str(caught.value).splitlines()[-1].strip().strip("^") == ""
