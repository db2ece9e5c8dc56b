"""`check`: masks from files of every kind, what is found, and the exit code."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import truemask as tm
from tests.cli.test_show_explain import run

TRIANGLE = torch.ones(6, 6, dtype=torch.bool).tril()


def written(folder: Path, suffix: str) -> Path:
    """The triangle in a file of that kind."""
    path = folder / f"mask{suffix}"
    match suffix:
        case ".pt":
            torch.save(TRIANGLE, path)
        case ".npy":
            np.save(path, TRIANGLE.numpy().astype(np.uint8))
        case ".npz":
            np.savez(path, one=TRIANGLE.numpy())
        case ".safetensors":
            save_file({"mask": torch.zeros(6, 6).masked_fill(~TRIANGLE, -torch.inf)}, path)
        case ".png":
            from PIL import Image

            Image.fromarray(TRIANGLE.numpy().astype(np.uint8) * 255).save(path)
        case ".csv":
            path.write_text("\n".join(",".join(str(int(cell)) for cell in row) for row in TRIANGLE))
    return path


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".npz", ".safetensors", ".png", ".csv"])
def test_files_of_every_kind(tmp_path: Path, suffix: str) -> None:
    code, out, _ = run("check", str(written(tmp_path, suffix)))
    assert (code, "fix: causal" in out) == (0, True)
    assert "6 queries x 6 keys" in out
    assert "may attend" in out


def test_our_own_files_and_expressions(tmp_path: Path) -> None:
    tm.save_mask(tm.causal & tm.documents([8, 16]) & tm.prefix(4), tmp_path / "ours.safetensors")
    (tmp_path / "ours.txt").write_text("causal & documents([8, 16]) & prefix(4)\n")
    for name in ("ours.safetensors", "ours.txt"):
        code, out, _ = run("check", str(tmp_path / name))
        assert (code, "[not-restarted]" in out) == (1, True)
        assert "24 queries x 24 keys" in out
    assert run("check", "causal & documents([8, 16]) & prefix(4)")[0] == 1
    assert run("check", "causal & window(8)", "-n", "32")[0] == 0


def test_claims_and_json() -> None:
    code, out, _ = run("check", "causal | prefix(4)", "--causal", "-n", "16", "--json")
    report = json.loads(out)
    assert (code, report["findings"][0]["code"], report["queries"]) == (1, "future", 16)
    assert run("check", "causal | prefix(4)", "--not-causal", "-n", "16")[0] == 0
    assert "[documents-mixed]" in run("check", "causal", "-n", "24", "--documents", "8,16")[1]


@pytest.mark.parametrize(
    ("flags", "options", "said"),
    [
        ([1, 1, 1, 0, 0, 0], [], "6 queries x 6 keys"),
        ([1, 1, 1, 0, 0, 0], ["-n", "4"], "4 queries x 4 keys"),
        ([[1, 1, 1, 0, 0, 0], [1] * 6], ["--padding"], "6 queries x 6 keys"),
    ],
)
def test_flags_of_tokens(tmp_path: Path, flags: list[Any], options: list[str], said: str) -> None:
    np.save(tmp_path / "flags.npy", np.array(flags))
    code, out, _ = run("check", str(tmp_path / "flags.npy"), *options)
    assert (code, said in out, "rows-or-samples" in out) == (0, True, False)


@pytest.mark.parametrize(("rows", "columns", "noted"), [(2, 8, True), (1, 8, True), (8, 8, False), (8, 2, False)])
def test_a_table_that_may_be_padding_is_noted(tmp_path: Path, rows: int, columns: int, noted: bool) -> None:
    np.save(tmp_path / "table.npy", np.ones((rows, columns), int))
    code, out, _ = run("check", str(tmp_path / "table.npy"), "--json")
    notes = [one for one in json.loads(out)["findings"] if one["code"] == "rows-or-samples"]
    assert (code, len(notes)) == (0, int(noted))
    for note in notes:
        assert f"of {columns} tokens" in note["message"]
        assert "--padding" in note["fix"]


@pytest.mark.parametrize("what", ["causal", "dense([True, False])"])
def test_padding_is_read_from_tables(what: str) -> None:
    assert run("check", what, "--padding")[0] == 2


@pytest.mark.parametrize("name", ["mask (1).pt", "a & b.pt", "[x].pt"])
def test_files_with_signs_in_their_names(tmp_path: Path, name: str) -> None:
    torch.save(TRIANGLE, tmp_path / name)
    code, out, _ = run("check", str(tmp_path / name))
    assert (code, "6 queries x 6 keys" in out) == (0, True)


def test_an_expression_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "causal").write_text("nonsense")
    for what in ("causal", "causal & random(0.5)", " & ".join(["causal"] * 99 + ["random(0.5)"])):
        assert "an expression: 16 queries" in run("check", what, "-n", "16")[1]


def test_what_is_no_mask_in_an_archive_is_left_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "mixed.npz", mask=TRIANGLE.numpy(), name=np.array("mine"), step=np.array(3))
    code, out, _ = run("check", str(tmp_path / "mixed.npz"))
    assert (code, "fix: causal" in out) == (0, True)
    code, _, err = run("check", str(tmp_path / "mixed.npz"), "--tensor", "maks")
    assert (code, "did you mean 'mask'?" in err) == (2, True)


class Malicious:
    """Unpickled, it would raise."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, ("raise SystemExit('it ran')",)


@pytest.mark.parametrize("name", ["code.pt", "code.npy"])
def test_nothing_in_a_file_runs_and_nobody_advises_it(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    torch.save(Malicious(), path) if name.endswith(".pt") else path.write_bytes(pickle.dumps(Malicious()))
    code, _, err = run("check", str(path))
    assert (code, "none of it was loaded" in err) == (2, True)
    assert not re.search("weights_only|allow_pickle|unsafe|trust", err)


def test_an_upside_down_tensor(tmp_path: Path) -> None:
    torch.save({"a": ~TRIANGLE, "b": TRIANGLE}, tmp_path / "two.pt")
    code, _, err = run("check", str(tmp_path / "two.pt"))
    assert (code, "name one with `--tensor NAME`" in err) == (2, True)
    code, out, _ = run("check", str(tmp_path / "two.pt"), "--tensor", "a")
    assert (code, "error [inverted]" in out) == (1, True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("no.pt", None, "there is no file"),
        ("bad.npy", b"nonsense", "cannot be read"),
        ("code.pt", b"cos\nsystem\n(S'true'\ntR.", "cannot be read"),
        ("mask.pkl", b"anything", "masks are read from .pt,"),
        ("mask.npyy", b"anything", "did you mean '.npy'?"),
        ("words.npy", np.array(["a", "b"]), "holds no tensor"),
        ("ragged.txt", b"10\n1\n", "same number"),
        ("words.txt", b"causel", "did you mean 'causal'"),
        ("bias.npy", np.array([[0.5, 0.0], [0.0, 0.0]]), "bias"),
        ("ids.npy", np.array([[0, 1], [2, 3]]), "a mask holds 0 and 1"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, name: str, content: object, message: str) -> None:
    path = tmp_path / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        np.save(path, content)
    code, _, err = run("check", str(path))
    assert (code, message in err) == (2, True), err


def test_a_typo_in_an_expression_points_at_the_place() -> None:
    code, _, err = run("check", "causal & windw(4)")
    assert (code, "did you mean 'window'?" in err) == (2, True)
    assert run("check", "causal", "--documents", "a,b")[0] == 2
