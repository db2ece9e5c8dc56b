"""The house: imports run down the stairs only, files and functions stay small, every room says what it is.

`STAIRS` is the order of the rooms, ground floor first: a file of the package imports only from its own room and from
rooms above it in the list. A line is a folder, or a file that stands apart from its folder's others; a file belongs to
the longest line that its path begins with. Within a room no circle of files is allowed.
"""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
SOURCE, TESTS = ROOT / "src" / "truemask", ROOT / "tests"

LONGEST_FUNCTION = 60
LONGEST_FILE = 400
USUAL_FILE = 130  # the median
CORE_NEEDS_NOT = ("rich", "typer", "matplotlib", "safetensors", "x_transformers", "transformers", "einops")
NOT_MIRRORED = {"laws", "repo", "support"}  # folders of tests that stand for no folder of the package

STAIRS = """
    errors.py
    common
    geometry
    geometry/slabs
    geometry/tiles
    viz
    masks/core
    masks/compose
    masks
    masks/leaves
    masks/structure
    masks/formats
    masks/foreign
    viz/plot.py
    biases.py
    backends/base.py
    backends/backend.py
    backends/isa.py
    backends/costs
    backends/shared
    backends/block_sparse
    backends/flex
    backends/native
    backends
    diagnosis
    diagnosis/rules
    diagnosis/diagnose.py
    diagnosis/reach.py
    attention/validation.py
    attention/call.py
    attention/planning
    attention
    nn
    generation
    packing
    interop
    interop/huggingface
    interop/x_transformers
    interop/use.py
    interop/speculate.py
    interop/cache_for.py
    interop/active_masks.py
    auditing
    train
    textmodels
    benchmarking
    cli
    cli/commands
    cli/doctor
    cli/tour
    cli/app.py
    cli/__init__.py
    __init__.py
    __main__.py
""".split()

# Files over LONGEST_FILE lines, each with the reason why it is not two files.
LONG_FILES: dict[str, str] = {}


def package_files() -> list[str]:
    return sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


@cache
def room_of(file: str) -> str | None:
    """The line of STAIRS that a file belongs to: the longest that its path begins with."""
    rooms = [room for room in STAIRS if file == room or file.startswith(f"{room}/")]
    return max(rooms, key=len, default=None)


@cache
def text_of(file: str) -> str:
    return (SOURCE / file).read_text(encoding="utf-8")


@cache
def tree_of(file: str) -> ast.Module:
    return ast.parse(text_of(file))


@cache
def module_file(module: str) -> str | None:
    """The file of the package that the dotted name stands for, or None if it is a name within a file.

    A folder's `__init__.py` stands for the folder.
    """
    parts = module.split(".")[1:]
    for candidate in (
        SOURCE.joinpath(*parts).with_suffix(".py") if parts else None,
        SOURCE.joinpath(*parts, "__init__.py"),
    ):
        if candidate is not None and candidate.is_file():
            return candidate.relative_to(SOURCE).as_posix()
    return None


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Every (line, file of the package) that the code imports, wherever the import stands."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                names.append(inner if node.module.split(".")[0] == "truemask" and module_file(inner) else node.module)
        for name in names:
            if name.split(".")[0] == "truemask":
                file = module_file(name)
                assert file is not None, f"line {node.lineno} imports {name}, which is no file of the package"  # pyright: ignore
                yield node.lineno, file  # pyright: ignore


FILES = package_files()


def test_every_file_is_in_a_room() -> None:
    assert len(STAIRS) == len(set(STAIRS)), "a room stands twice in STAIRS"
    missing = [file for file in FILES if room_of(file) is None]
    gone = [room for room in STAIRS if not (SOURCE / room).exists()]
    assert not missing, f"give the rooms of these files a place in STAIRS (tests/repo/test_house.py): {missing}"
    assert not gone, f"these rooms of STAIRS are not there any more: {gone}"


def test_imports_run_down_the_stairs() -> None:
    floor = {room: i for i, room in enumerate(STAIRS)}
    up = [
        f"{file}, line {line}: {target}"
        for file in FILES
        for line, target in imported(tree_of(file))
        if floor[room_of(target) or ""] > floor[room_of(file) or ""]
    ]
    assert not up, f"imports from rooms that do not stand above the file's own in STAIRS: {up}"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {file: {target for _, target in imported(tree_of(file))} for file in FILES}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"these files import each other in a circle: {' <- '.join(error.args[1])}")


def test_files_and_functions_stay_small() -> None:
    for file in FILES:
        length = len(text_of(file).splitlines())
        assert (length > LONGEST_FILE) == (file in LONG_FILES), f"{file} has {length} lines; LONG_FILES says otherwise"
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                assert lines <= LONGEST_FUNCTION, f"{file}: {node.name} has {lines} lines, over {LONGEST_FUNCTION}"


def test_the_usual_file_is_small() -> None:
    lengths = [len(text_of(file).splitlines()) for file in FILES if not file.endswith("__init__.py")]
    assert median(lengths) <= USUAL_FILE


def test_every_file_says_what_it_is() -> None:
    silent = [file for file in FILES if not ast.get_docstring(tree_of(file))]
    assert not silent, f"these have no docstring, whose first sentence docs/internals/map.md shows: {silent}"


def classes_of_masks(tree: ast.AST) -> set[str]:
    """The names by which the code knows classes of masks."""
    from truemask.masks.core.kinds import KINDS

    importlib.import_module("truemask.masks.structure.groups")  # so that every kind is there
    kinds = {kind.__name__ for kind in KINDS.values()}
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module is not None]
    from_masks = [alias for node in imports if node.module.startswith("truemask.masks") for alias in node.names]  # pyright: ignore
    return {alias.asname or alias.name for alias in from_masks if alias.name in kinds}


def questions_of_kind(tree: ast.AST) -> Iterator[int]:
    """The lines that ask what class a mask is of: by isinstance, match or comparison, or by its `kind`."""
    classes = classes_of_masks(tree)
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}

    def names_class(node: ast.AST) -> bool:
        return any(isinstance(part, ast.Name) and part.id in classes for part in ast.walk(node))

    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="isinstance" | "issubclass"), args=[_, kind]) if names_class(kind):
                yield node.lineno
            case ast.MatchClass(cls=kind) if names_class(kind):
                yield node.lineno
            case ast.Compare(comparators=kinds) if any(map(names_class, kinds)):
                yield node.lineno
            case ast.Attribute(attr="kind", value=ast.Attribute(attr="dtype")):
                pass
            case ast.Attribute(attr="kind") if id(node) not in called:
                yield node.lineno
            case _:
                pass


def test_only_masks_asks_what_kind_a_mask_is() -> None:
    """A new kind must not fall through a table of kinds: who has to know asks an open function (masks/structure)."""
    asking = [
        f"{file}, line {line}"
        for file in FILES
        if not file.startswith("masks/")
        for line in questions_of_kind(tree_of(file))
        if "VAR_KEYWORD" not in text_of(file).splitlines()[line - 1]  # a parameter of a function has a kind, too
    ]
    assert not asking, f"these ask for the class of a mask: {asking}; ask an open function of masks/structure"


@pytest.mark.parametrize(
    "code",
    [
        "isinstance(mask, Causal)",
        "isinstance(mask, (int, Window))",
        "type(mask) is Causal",
        "mask.kind == 'causal'",
        "kinds = {part.kind for part in mask.walk()}",
        "match mask:\n    case Window(size=size):\n        pass",
    ],
)
def test_such_questions_are_seen(code: str) -> None:
    imports = "from truemask.masks.leaves.bands import Causal, Window\n"
    assert list(questions_of_kind(ast.parse(imports + code)))
    assert not list(
        questions_of_kind(ast.parse(imports + "register(looks_back, Causal)(Window(3))\narray.dtype.kind == 'f'"))
    )


def test_the_tests_mirror_the_package() -> None:
    folders = {path.parent.relative_to(TESTS).as_posix() for path in TESTS.rglob("test_*.py")}
    strange = {name for name in folders if name not in NOT_MIRRORED and not (SOURCE / name).is_dir()}
    assert not strange, f"these folders of tests stand for no folder of src/truemask: {sorted(strange)}"


def test_the_core_needs_torch_and_numpy_only() -> None:
    """Masks, plans, attention and models work where nothing but torch and numpy is installed."""
    program = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {CORE_NEEDS_NOT!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
import torch, truemask as tm
mask = tm.parse("causal & (window(3) | prefix(1))")
q = torch.randn(1, 2, 7, 8)
tm.attend(q, q, q, mask)
print(tm.plan(mask, q_len=7).backend, tm.Decoder(dim=16, depth=1, heads=2)(torch.randn(1, 7, 16), mask=mask).shape)
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "torch.Size([1, 7, 16])" in result.stdout


def test_the_map_shows_the_house() -> None:
    sys.path.insert(0, str(ROOT / "tools" / "docs"))
    try:
        from make_map import OTHERS, PAGE, drawn
    finally:
        sys.path.pop(0)
    for name in OTHERS:
        assert (ROOT / name).exists(), f"tools/docs/make_map.py describes {name}, which is not there"
    unseen = {
        path.relative_to(ROOT).as_posix() for folder in ("docs", "tools") for path in (ROOT / folder).glob("*.[!p]*")
    }
    assert unseen <= set(OTHERS), (
        f"give these files a line in OTHERS of tools/docs/make_map.py: {sorted(unseen - set(OTHERS))}"
    )
    assert PAGE.read_text(encoding="utf-8") == drawn(STAIRS), (
        "docs/internals/map.md is out of date: `python tools/docs/make_map.py` (or `make format`) redraws it"
    )


def test_the_version_is_said_once() -> None:
    import truemask

    said = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert said is not None
    assert truemask.__version__ == said[1]
    assert f"version: {said[1]}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{said[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
