"""The house: imports run down the stairs only, files and functions stay small, the map shows what is there.

`STAIRS` is the order: a file of the package imports only from files above it. A new file gets its place in the list.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src" / "truemask"

LONGEST_FUNCTION = 80
LONGEST_FILE = 400
CORE_NEEDS_NOT = ("rich", "typer", "matplotlib", "safetensors", "x_transformers", "transformers", "einops")

STAIRS = """
    errors.py

    geometry/__init__.py
    geometry/logic.py
    geometry/ranges.py
    geometry/edges.py
    geometry/lines.py
    geometry/slabs.py
    geometry/overlay.py
    geometry/forms.py
    geometry/measure.py
    geometry/tiles.py
    geometry/strips.py
    geometry/slab_strips.py
    geometry/tile_strips.py
    geometry/quadtree.py
    geometry/search.py
    geometry/block_lists.py
    geometry/picture.py

    masks/remembering.py
    masks/data_store.py
    masks/tables.py
    masks/hashing.py
    masks/block_mask.py
    masks/verdict.py
    masks/exact.py
    masks/slab_tensors.py
    masks/pictures.py
    masks/questions.py
    masks/value.py
    masks/building.py
    masks/core.py
    masks/traced.py
    masks/writing.py
    masks/combine.py
    masks/reindex.py
    masks/packing.py
    masks/choice.py
    masks/__init__.py
    masks/positional.py
    masks/patterned.py
    masks/data.py
    masks/captured.py
    masks/predicate.py
    masks/labels.py
    masks/sampled.py
    masks/matrices.py
    masks/biases.py
    masks/text.py
    masks/given.py
    masks/serial.py
    masks/foreign/reading.py
    masks/foreign/importers.py
    masks/foreign/exporters.py
    masks/foreign/intervals.py
    masks/foreign/__init__.py

    backends/__init__.py
    backends/base.py
    backends/calibration.py
    backends/native_library.py
    backends/costs.py
    backends/dropping.py
    backends/trilinear.py
    backends/eager.py
    backends/flash.py
    backends/once.py
    backends/contain.py
    backends/reference.py
    backends/sdpa.py
    backends/weave.py
    backends/groups.py
    backends/places.py
    backends/strip_cells.py
    backends/strip_kernel.py
    backends/strip_math.py
    backends/block_sparse.py
    backends/score_mod.py
    backends/flex.py
    backends/native_call.py
    backends/native.py
    backends/registry.py
    backends/chosen.py

    diagnosis/__init__.py
    diagnosis/finding.py
    diagnosis/words.py
    diagnosis/why.py
    diagnosis/slips.py
    diagnosis/recognise.py
    diagnosis/naming.py
    diagnosis/subject.py
    diagnosis/placing.py
    diagnosis/outcome.py
    diagnosis/heads.py
    diagnosis/wording.py
    diagnosis/traps.py
    diagnosis/diagnose.py
    diagnosis/reach.py

    viz/__init__.py
    viz/panels.py
    viz/plot.py

    _door.py
    _call.py
    _explain.py
    _advice.py
    _choose.py
    _cache.py
    _plan.py
    _run.py
    _plain.py
    _compiled.py
    _attend.py

    nn/foreign_names.py
    nn/config.py
    nn/doors.py
    nn/masking.py
    nn/norms.py
    nn/positions.py
    nn/feedforward.py
    nn/attention.py
    nn/layers.py
    nn/wrappers.py
    nn/torch_masks.py
    nn/multihead.py
    nn/__init__.py

    generation/__init__.py
    generation/cache.py
    generation/prompts.py
    generation/sampling.py
    generation/autoregressive.py

    packing/__init__.py
    packing/samples.py
    packing/fit.py
    packing/pack.py
    packing/tree.py
    packing/collate.py

    interop/__init__.py
    interop/recomputing.py
    interop/in_force.py
    interop/positions.py
    interop/dropping.py
    interop/stand_in.py
    interop/unreached.py
    interop/layers.py
    interop/watching.py
    interop/lifting.py
    interop/placing.py
    interop/claims.py
    interop/tensors.py
    interop/switch.py
    interop/without_us.py
    interop/huggingface.py
    interop/x_masks.py
    interop/x_frame.py
    interop/x_attention.py
    interop/x_layers.py
    interop/x_transformers.py
    interop/use.py
    interop/in_use.py

    auditing/__init__.py
    auditing/placeholders.py
    auditing/models.py
    auditing/signals.py
    auditing/torch_modules.py
    auditing/ruler.py
    auditing/probes.py
    auditing/larger.py
    auditing/kinds.py
    auditing/claims.py
    auditing/contexts.py
    auditing/caches.py
    auditing/decoding.py
    auditing/alone.py
    auditing/report.py
    auditing/steadiness.py
    auditing/judging.py
    auditing/audit.py

    train/__init__.py
    train/config.py
    train/corpus.py
    train/rows.py
    train/baselines.py
    train/checkpoint.py
    train/model.py
    train/sample.py
    train/trainer.py

    cli/console.py
    cli/machine.py
    cli/options.py
    cli/timing.py
    cli/races.py
    cli/calibrate.py
    cli/mask_tables.py
    cli/mask_files.py
    cli/show.py
    cli/explain.py
    cli/check.py
    cli/audit.py
    cli/bench.py
    cli/gpu_report.py
    cli/self_test.py
    cli/doctor.py
    cli/generate.py
    cli/train.py
    cli/tour/__init__.py
    cli/tour/stage.py
    cli/tour/peers.py
    cli/tour/curve.py
    cli/tour/report.py
    cli/tour/article.py
    cli/tour/inverted.py
    cli/tour/patterns.py
    cli/tour/leak.py
    cli/tour/race.py
    cli/tour/smollm.py
    cli/tour/your_model.py
    cli/tour/audited.py
    cli/tour/learning.py
    cli/tour/tour.py
    cli/app.py
    cli/__init__.py

    __init__.py
    __main__.py
""".split()

# Files over LONGEST_FILE lines, each with the reason why it is not two files.
LONG_FILES: dict[str, str] = {}


def package_files() -> list[str]:
    return sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))


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


def test_every_file_has_its_place_on_the_stairs() -> None:
    assert len(STAIRS) == len(set(STAIRS)), "a file stands twice in STAIRS"
    missing, gone = sorted(set(package_files()) - set(STAIRS)), sorted(set(STAIRS) - set(package_files()))
    assert not missing, f"give these files a place in STAIRS (tests/test_house.py): {missing}"
    assert not gone, f"these files of STAIRS are not there any more: {gone}"


@pytest.mark.parametrize("file", STAIRS)
def test_imports_run_down_the_stairs(file: str) -> None:
    place = {name: i for i, name in enumerate(STAIRS)}
    tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
    up = [f"line {line}: {target}" for line, target in imported(tree) if place.get(target, len(place)) >= place[file]]
    assert not up, f"{file} imports from files that do not stand above it in STAIRS: {up}"


@pytest.mark.parametrize("file", STAIRS)
def test_files_and_functions_stay_small(file: str) -> None:
    text = (SOURCE / file).read_text(encoding="utf-8")
    length = len(text.splitlines())
    assert (length > LONGEST_FILE) == (file in LONG_FILES), f"{file} has {length} lines; LONG_FILES says otherwise"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{file}: {node.name} has {lines} lines, over {LONGEST_FUNCTION}"


@pytest.mark.parametrize("file", STAIRS)
def test_every_file_says_what_it_is(file: str) -> None:
    said = ast.get_docstring(ast.parse((SOURCE / file).read_text(encoding="utf-8")))
    assert said, f"{file} has no docstring; its first line is what the map in CONTRIBUTING.md shows"


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
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch.Size([1, 7, 16])" in done.stdout


def test_the_map_shows_the_house() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        from make_map import OTHERS, PAGE, drawn, in_page
    finally:
        sys.path.pop(0)
    for name in OTHERS:
        assert (ROOT / name).exists(), f"docs/make_map.py describes {name}, which is not there"
    unseen = {
        path.relative_to(ROOT).as_posix() for folder in ("docs", "tools") for path in (ROOT / folder).glob("*.[!p]*")
    }
    assert unseen <= set(OTHERS), (
        f"give these files a line in OTHERS of docs/make_map.py: {sorted(unseen - set(OTHERS))}"
    )
    assert in_page(PAGE.read_text(encoding="utf-8")) == drawn(STAIRS), (
        "the map in CONTRIBUTING.md is out of date: `python docs/make_map.py` (or `make format`) redraws it"
    )


def test_the_version_is_said_once() -> None:
    import truemask

    said = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert said is not None
    assert truemask.__version__ == said[1]
    assert f"version: {said[1]}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{said[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
