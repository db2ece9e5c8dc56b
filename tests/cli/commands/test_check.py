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
from tests.cli.commands.test_show_explain import run

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
    ("flags", "options", "message"),
    [
        ([1, 1, 1, 0, 0, 0], [], "6 queries x 6 keys"),
        ([1, 1, 1, 0, 0, 0], ["-n", "4"], "4 queries x 4 keys"),
        ([[1, 1, 1, 0, 0, 0], [1] * 6], ["--padding"], "6 queries x 6 keys"),
    ],
)
def test_flags_of_tokens(tmp_path: Path, flags: list[Any], options: list[str], message: str) -> None:
    np.save(tmp_path / "flags.npy", np.array(flags))
    code, out, _ = run("check", str(tmp_path / "flags.npy"), *options)
    assert (code, message in out, "rows-or-samples" in out) == (0, True, False)


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
        ("ragged.csv", b"1,0,0\n1,1\n", "rows have [2, 3] cells"),
        ("odd.csv", b"1,0,0\n1,1,x\n1,1,1\n", "the cell 'x' is no number"),
        ("three.npy", np.ones((2, 4, 4), bool), "say `--axes bqk` for 2 samples, `--axes hqk` for 2 heads"),
        ("words.txt", b"causel", "did you mean 'causal'"),
        ("bias.npy", np.array([[0.5, 0.0], [0.0, 0.0]]), "bias"),
        ("ids.npy", np.array([[0, 1], [2, 3]]), "a mask holds 0 and 1"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, name: str, content: Any, message: str) -> None:
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


# -- what could mean something else ------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".pt", ".npy", ".csv"])
def test_floats_of_zero_and_one_are_read_as_booleans_with_a_warning(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mask{suffix}"
    match suffix:
        case ".pt":
            torch.save(TRIANGLE.float(), path)
        case ".npy":
            np.save(path, TRIANGLE.double().numpy())
        case _:
            path.write_text("\n".join(";".join(str(float(cell)) for cell in row) for row in TRIANGLE))
    code, out, _ = run("check", str(path))
    assert (code, "warning [floats-as-booleans]" in out, "fix: causal" in out) == (1, True, True)


@pytest.mark.parametrize("cells", [TRIANGLE, TRIANGLE.int(), torch.zeros(6, 6).masked_fill(~TRIANGLE, -torch.inf)])
def test_other_numbers_are_read_without_one(tmp_path: Path, cells: torch.Tensor) -> None:
    torch.save(cells, tmp_path / "mask.pt")
    code, out, _ = run("check", str(tmp_path / "mask.pt"))
    assert (code, "floats-as-booleans" in out) == (0, False)


def test_flags_that_are_said_to_be_padding_may_be_floats(tmp_path: Path) -> None:
    np.save(tmp_path / "flags.npy", np.array([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]]))
    code, out, _ = run("check", str(tmp_path / "flags.npy"), "--padding")
    assert (code, "floats-as-booleans" in out) == (0, False)


@pytest.mark.parametrize("shape", [(1, 6, 6), (1, 1, 6, 6)])
def test_an_axis_of_one_is_one_mask(tmp_path: Path, shape: tuple[int, ...]) -> None:
    for name, cells in (("bool", TRIANGLE), ("added", torch.zeros(6, 6).masked_fill(~TRIANGLE, -torch.inf))):
        torch.save(cells.view(shape), tmp_path / f"{name}.pt")
        code, out, _ = run("check", str(tmp_path / f"{name}.pt"))
        assert (code, "fix: causal" in out) == (0, True)


def test_of_three_axes_the_first_is_told(tmp_path: Path) -> None:
    torch.save(torch.stack([TRIANGLE, ~TRIANGLE]), tmp_path / "two.pt")
    code, out, _ = run("check", str(tmp_path / "two.pt"), "--axes", "hqk")
    assert (code, "error [inverted] head 1" in out) == (1, True)
    assert run("check", str(tmp_path / "two.pt"), "--axes", "bqk")[0] == 1


TABLES = {
    "names above": "k0,k1,k2\n1,0,0\n1,1,0\n1,1,1\n",
    "names beside": "q0 1 0 0\nq1 1 1 0\nq2 1 1 1\n",
    "names above and beside": ",k0,k1,k2\nq0,1,0,0\nq1,1,1,0\nq2,1,1,1\n",
    "a frame": ",0,1,2\n0,True,False,False\n1,True,True,False\n2,True,True,True\n",
    "a frame without its index": "0,1,2\n1,0,0\n1,1,0\n1,1,1\n",
    "numbers beside": "0\t1\t0\t0\n1\t1\t1\t0\n2\t1\t1\t1\n",
    "a corner": "token;the;cat;sat\nthe;1;0;0\ncat;1;1;0\nsat;1;1;1\n",
    "no corner": "the cat sat\nthe 1 0 0\ncat 1 1 0\nsat 1 1 1\n",
    "quoted": '"a","b","c"\n"1","0","0"\n"1","1","0"\n"1","1","1"\n',
    "signs at the ends": "1,0,0,\n1,1,0,\n1,1,1,\n",
    "nothing between": "100\n110\n111\n",
    "a mark of the file's start": "\ufeff1,0,0\n1,1,0\n1,1,1\n",
}


@pytest.mark.parametrize("table", TABLES)
def test_tables_with_names_and_without(tmp_path: Path, table: str) -> None:
    (tmp_path / "mask.csv").write_text(TABLES[table], encoding="utf-8")
    code, out, err = run("check", str(tmp_path / "mask.csv"))
    assert (code, "3 queries x 3 keys" in out, "fix: causal" in out) == (0, True, True), err
    named = table not in ("signs at the ends", "nothing between", "a mark of the file's start")
    assert ("of names" in out) == named


IMAGES: dict[str, tuple[str, str]] = {
    "black on nothing": ("RGBA", "opaque"),
    "white on nothing": ("RGBA", "opaque"),
    "white on black": ("RGBA", "bright and opaque"),
    "grey with alpha": ("LA", "bright and opaque"),
    "no alpha": ("RGB", "bright"),
    "sixteen bits": ("I;16", "bright"),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_images_with_alpha(tmp_path: Path, kind: str) -> None:
    from PIL import Image

    mode, how = IMAGES[kind]
    seen = TRIANGLE.numpy().astype(np.uint8) * 255
    opaque = np.full_like(seen, 255)
    layers = {
        "black on nothing": (seen * 0, seen * 0, seen * 0, seen),
        "white on nothing": (opaque, opaque, opaque, seen),
        "white on black": (seen, seen, seen, opaque),
        "grey with alpha": (seen, opaque),
        "no alpha": (seen, seen, seen),
    }
    if kind == "sixteen bits":
        image = Image.fromarray(seen.astype(np.uint16) * 257)
    else:
        image = Image.merge(mode, [Image.fromarray(layer) for layer in layers[kind]])
    image.save(tmp_path / "mask.png")
    code, out, _ = run("check", str(tmp_path / "mask.png"))
    assert (code, f"read as {how} = may attend" in out, "fix: causal" in out) == (0, True, True)


@pytest.mark.parametrize(
    ("what", "options", "message"),
    [
        ("causal", ["--tensor", "mask"], "--tensor mask speaks of a file's tensor, and 'causal' is an expression"),
        ("causal", ["--axes", "bqk"], "--axes bqk speaks of a file's tensor"),
        ("one.pt", ["--tensor", "mask"], "holds one tensor, which has no name: leave out `--tensor mask`"),
        ("one.npy", ["--tensor", "mask"], "holds one tensor, which has no name"),
        ("one.csv", ["--tensor", "mask"], "holds one mask, a table, read as 1 = may attend: leave out `--tensor mask`"),
        ("one", [], "there is a file one, but its name does not end in what says how to read it"),
        ("none.json", [], "if none.json is a file, there is none"),
        ("causal.at", [], "`at` is a method and needs its arguments"),
    ],
)
def test_options_and_names_that_fit_nothing_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(TRIANGLE, "one.pt")
    np.save("one.npy", TRIANGLE.numpy())
    Path("one.csv").write_text("1,0\n1,1\n")
    Path("one").write_text("causal")
    code, _, err = run("check", what, *options)
    assert (code, message in err) == (2, True), err
