"""Wheels as people install them: with the native kernel inside, and without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from truemask.backends.isa import SETS
from truemask.backends.native.library import missing

ROOT = Path(__file__).resolve().parents[2]
PARTS = ("pyproject.toml", "README.md", "LICENSE", "src", "csrc", "tools")
SCRIPT = """
import torch, truemask
from truemask.backends.native.library import isa, missing
q = torch.ones(1, 1, 5, 8)
out = truemask.attend(q, q, q, truemask.causal, backend=None if missing() else "native")
print(truemask.__file__, isa() or missing(), tuple(out.shape), sep="|")
"""

pytestmark = pytest.mark.slow


def test_the_recipes_say_what_each_extra_brings() -> None:
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), re.M)
    assert sorted(name for name, _ in rows) == sorted(metadata.metadata("truemask").get_all("Provides-Extra"))
    said = {"truemask"}
    for name, brings in rows:  # `test` and `dev` bring what those above them bring
        said |= {*brings.replace(",", "").split()}
        needs = [need for need in metadata.requires("truemask") or [] if re.search(rf"extra == ['\"]{name}['\"]", need)]
        assert {re.split(r"[<>=;\[ ]", need)[0] for need in needs} <= said


def wheel_of(place: Path, **environment: str) -> Path:
    """The wheel that pip builds of a copy of this tree."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "wheel",
        "--quiet",
        "--no-index",
        "--no-deps",
    ]
    command += ["--no-build-isolation", "--wheel-dir", str(place / "wheels"), str(place / "tree")]
    subprocess.run(command, check=True, capture_output=True, env=os.environ | environment, timeout=300)
    (wheel,) = (place / "wheels").glob("*.whl")
    return wheel


def copied(place: Path, *, native: bool) -> None:
    """A copy of what a wheel is made of, with or without what was compiled here."""
    for name in PARTS:
        source, target = ROOT / name, place / "tree" / name
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", *([] if native else ["_native"]))
            shutil.copytree(source, target, ignore=ignored)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    shutil.copy(ROOT / ".gitignore", place / "tree" / ".gitignore")


def said(place: Path, wheel: Path) -> list[str]:
    """What the script says that runs on the installed wheel: the file, the instruction set or why not, a shape."""
    site = place / "site"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        check=True,
        capture_output=True,
        text=True,
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(site)},
        timeout=120,
    )
    return result.stdout.strip().split("|")


@pytest.mark.skipif(bool(missing()), reason="the move is whoever installs a C++ compiler")
def test_a_wheel_has_the_kernel_for_every_python(tmp_path: Path) -> None:
    copied(tmp_path, native=True)
    wheel = wheel_of(tmp_path)
    assert "-py3-none-" in wheel.name
    assert "any" not in wheel.name
    held = zipfile.ZipFile(wheel).namelist()
    assert "truemask_pytest.py" in held
    assert any(name.endswith(".so") for name in held)
    assert not any(name.endswith((".stamp", ".part", ".h", ".cpp")) for name in held)
    file, kernel, shape = said(tmp_path, wheel)
    assert file.startswith(str(tmp_path))
    assert kernel in [one.name for one in SETS if not one.only_named]
    assert shape == "(1, 1, 5, 8)"


def test_without_a_compiler_the_install_goes_on(tmp_path: Path) -> None:
    copied(tmp_path, native=False)
    wheel = wheel_of(tmp_path, CXX="/nowhere/g++")
    assert wheel.name.endswith("-py3-none-any.whl")
    _, why, shape = said(tmp_path, wheel)
    assert "it was not built: there was no C++ compiler" in why
    assert shape == "(1, 1, 5, 8)"
