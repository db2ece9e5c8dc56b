"""`generate` and `perplexity` with people's models, as a person uses them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.commands.test_train_generate import run as call
from tests.textmodels.conftest import TEXT
from tests.textmodels.conftest import folder as folder
from tests.textmodels.conftest import gpt2 as gpt2
from tests.textmodels.conftest import llama as llama
from tests.textmodels.conftest import run as run

MASK = "causal & (window(5) | prefix(2))"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_generate_writes_with_a_folder_and_says_what_it_took(llama: Path) -> None:
    given = ("--model", str(llama), "--mask", MASK, "--prompt", "the cat", "--max-new-tokens", "40")
    code, out, err = call("generate", *given)
    assert code == 0
    assert out.startswith("the cat")
    assert len(out) > len("the cat\n")
    assert "40 tokens, " in err
    assert "tokens/s; the cache takes " in err
    assert ", with every key it would take " in err
    assert "\x1b" not in out + err


def test_generate_takes_a_run_as_a_model_too(run: Path) -> None:
    given = ("--prompt", "the ", "--tokens", "20")
    assert call("generate", str(run), *given)[:2] == call("generate", "--model", str(run), *given)[:2]


def test_perplexity_is_a_table_of_masks(llama: Path, file: Path) -> None:
    code, out, err = call("perplexity", "--model", str(llama), str(file), "--mask", "causal", "--mask", MASK)
    assert (code, err) == (0, "")
    title, header, *rows = out.splitlines()
    assert title == f"{json_of(llama, file)[0]['tokens']} tokens of {len(TEXT.encode()) - len('the')} bytes"
    assert header.split() == ["mask", "bits", "per", "byte", "perplexity"]
    assert [row.rsplit(maxsplit=2)[0].strip() for row in rows] == ["causal", MASK]
    assert all(float(number) > 0 for row in rows for number in row.rsplit(maxsplit=2)[1:])


def json_of(model: Path, file: Path, *more: str) -> list[dict[str, object]]:
    code, out, _ = call("perplexity", "--model", str(model), str(file), "--json", *more)
    assert code == 0
    return json.loads(out)


def test_json_and_the_models_own_mask(run: Path, llama: Path, file: Path) -> None:
    (own,), (others,) = json_of(run, file), json_of(llama, file, "--chunk", "9", "--tokens", "12")
    assert own.keys() == {"mask", "bits_per_byte", "perplexity", "tokens", "bytes"}
    assert (own["mask"], own["tokens"]) == ("causal & (window(7) | prefix(2))", len(TEXT.encode()))
    assert (others["mask"], others["tokens"]) == ("the model's own", 11)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate",), "give exactly one of RUN and --model"),
        (("generate", "{run}", "--model", "{llama}"), "give exactly one of RUN and --model"),
        (("generate", "--model", "{llama}", "--mask", "causl"), "causal"),
        (("generate", "--model", "{llama}", "--mask", "window(3)", "--prompt", ""), "the prompt is empty"),
        (("perplexity", "{file}"), "pass --model"),
        (("perplexity", "--model", "{llama}", "{file}", "--mask", "causal & windw(8)"), "^^^^^"),
        (("perplexity", "--model", "{gpt2}", "{file}"), "has learned 64 positions"),
        (("perplexity", "--model", "{llama}", "{file}.gone"), "there is no file"),
        (("perplexity", "--model", "{file}", "{file}"), "there is no run"),
        (("perplexity", "--model", "gone.gguf", "{file}"), "there is no file gone.gguf"),
        (("perplexity", "--model", "{llama}", "{file}", "--mask", "keys([True])"), "1"),
    ],
)
def test_mistakes_say_the_way_out(
    arguments: tuple[str, ...], says: str, run: Path, llama: Path, gpt2: Path, file: Path
) -> None:
    code, _, err = call(*(argument.format(run=run, llama=llama, gpt2=gpt2, file=file) for argument in arguments))
    assert code == 2
    assert says in err
    assert "Traceback" not in err
