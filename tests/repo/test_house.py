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
    geometry/slabs/lines.py
    geometry/slabs/slabs.py
    geometry/slabs/algebra.py
    geometry/slabs/normal_form.py
    geometry/slabs/measure.py
    geometry/tiles/tile_map.py
    backends/block_sparse/strips.py
    backends/block_sparse/from_slabs.py
    backends/block_sparse/from_tiles.py
    geometry/tiles/quadtree.py
    geometry/tiles/measure.py
    geometry/tiles/block_lists.py
    viz/picture.py

    common/real_tensors.py
    masks/core/data.py
    masks/core/lookup.py
    common/hashing.py
    masks/core/block_mask.py
    masks/core/verdict.py
    masks/core/exact_form.py
    masks/core/slab_tensors.py
    masks/core/pictures.py
    masks/core/queries.py
    masks/core/value.py
    masks/core/registry.py
    masks/core/mask.py
    masks/core/deferred.py
    masks/core/unparse.py
    masks/compose/boolean.py
    masks/compose/reindex.py
    masks/compose/packed.py
    masks/compose/per_axis.py
    masks/__init__.py
    masks/leaves/bands.py
    masks/leaves/patterns.py
    masks/leaves/per_token.py
    masks/leaves/captured.py
    masks/leaves/predicate.py
    masks/leaves/documents.py
    masks/leaves/tile_sample.py
    masks/leaves/matrices.py
    biases.py
    masks/formats/parse.py
    masks/formats/as_mask.py
    masks/formats/serialization.py
    masks/foreign/tensors.py
    masks/foreign/importers.py
    masks/foreign/exporters.py
    masks/foreign/varlen.py
    masks/foreign/__init__.py

    backends/__init__.py
    backends/base.py
    backends/costs/calibration_file.py
    backends/native/library.py
    backends/costs/model.py
    backends/shared/dropout.py
    backends/shared/masked_matmul.py
    backends/shared/eager.py
    backends/shared/cpu_flash.py
    backends/shared/autograd.py
    backends/shared/containment.py
    backends/reference.py
    backends/sdpa.py
    backends/block_sparse/interleave.py
    backends/block_sparse/batching.py
    backends/block_sparse/gather_scatter.py
    backends/block_sparse/cells.py
    backends/block_sparse/flash_path.py
    backends/block_sparse/math_path.py
    backends/block_sparse/backend.py
    backends/flex/score_mod.py
    backends/flex/backend.py
    backends/native/call.py
    backends/native/backend.py
    backends/registry.py
    backends/context.py

    diagnosis/__init__.py
    common/finding.py
    diagnosis/leaf_reasons.py
    diagnosis/explain.py
    diagnosis/convention_warnings.py
    diagnosis/recognise.py
    diagnosis/naming.py
    diagnosis/rules/context.py
    diagnosis/rules/alignment.py
    diagnosis/rules/visibility.py
    diagnosis/rules/heads.py
    diagnosis/rules/expression.py
    diagnosis/rules/misreadings.py
    diagnosis/diagnose.py
    diagnosis/reach.py

    viz/__init__.py
    viz/panels.py
    masks/formats/figures.py

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

    nn/x_transformers_names.py
    nn/config.py
    nn/validation.py
    nn/forward_mask.py
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
    generation/kv_cache.py
    generation/prompts.py
    generation/sampling.py
    generation/autoregressive.py

    packing/__init__.py
    packing/samples.py
    packing/best_fit.py
    packing/pack.py
    packing/tree.py
    packing/collate.py

    interop/__init__.py
    interop/checkpointing.py
    interop/scopes.py
    interop/positions.py
    interop/removed_pairs.py
    interop/huggingface/mask_placeholder.py
    interop/huggingface/coverage.py
    interop/huggingface/layers.py
    interop/huggingface/inputs.py
    interop/huggingface/mask_functions.py
    interop/huggingface/placement.py
    interop/huggingface/masks.py
    interop/huggingface/tensor_masks.py
    interop/huggingface/switch.py
    interop/huggingface/fallback.py
    interop/huggingface/attention.py
    interop/x_transformers/masks.py
    interop/x_transformers/inputs.py
    interop/x_transformers/attention.py
    interop/x_transformers/layers.py
    interop/x_transformers/switch.py
    interop/use.py
    interop/active_masks.py

    auditing/__init__.py
    auditing/placeholders.py
    auditing/subject.py
    auditing/multimodal.py
    auditing/torch_modules.py
    auditing/distances.py
    auditing/probes.py
    auditing/amplified_probes.py
    auditing/declared_masks.py
    auditing/expected_masks.py
    auditing/cross_attention.py
    auditing/cached_calls.py
    auditing/cached_decoding.py
    auditing/batch_invariance.py
    auditing/report.py
    auditing/determinism.py
    auditing/checks.py
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
    benchmarking/timing.py
    benchmarking/workloads.py
    benchmarking/calibrate.py
    masks/foreign/tables.py
    masks/foreign/files.py
    cli/commands/show.py
    cli/commands/explain.py
    cli/commands/check.py
    cli/commands/audit.py
    cli/commands/bench.py
    cli/doctor/gpu_report.py
    cli/doctor/backend_check.py
    cli/doctor/doctor.py
    cli/commands/generate.py
    cli/commands/train.py
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
    sys.path.insert(0, str(ROOT / "tools" / "docs"))
    try:
        from make_map import OTHERS, PAGE, drawn, in_page
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
    assert in_page(PAGE.read_text(encoding="utf-8")) == drawn(STAIRS), (
        "the map in CONTRIBUTING.md is out of date: `python tools/docs/make_map.py` (or `make format`) redraws it"
    )


def test_the_version_is_said_once() -> None:
    import truemask

    said = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    assert said is not None
    assert truemask.__version__ == said[1]
    assert f"version: {said[1]}" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"## [{said[1]}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
