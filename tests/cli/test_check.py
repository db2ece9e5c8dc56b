"""`check`: masks from files of every kind, what is found, and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

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
