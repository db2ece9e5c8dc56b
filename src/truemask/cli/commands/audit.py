"""`truemask audit`: a model of your own, held to its mask from outside; the exit code is 0 if it is clean, 1 if not."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from rich.progress import Progress
from torch import Tensor, nn

from truemask.auditing.audit import MAX_POSITIONS
from truemask.auditing.audit import audit as run_audit
from truemask.auditing.placeholders import special_tokens
from truemask.auditing.probes import ProgressCallback
from truemask.auditing.subject import SEED, AuditError
from truemask.cli.console import make_console, needs_ascii, plain, show_error
from truemask.common.formatting import describe, suggest
from truemask.errors import TruemaskError
from truemask.masks.formats.parse import parse

MISTAKE = 2
SAMPLES = 2  # in a batch that is made from --length and --vocab


def audit(
    target: Annotated[
        str,
        typer.Argument(
            metavar="MODULE:FACTORY",
            help="A function without arguments that returns a model, (model, batch) or (model, batch, mask); "
            "MODULE is imported from this folder, or is a .py file.",
        ),
    ],
    mask: Annotated[str | None, typer.Option(help="The mask to hold it to; by default what the model claims.")] = None,
    length: Annotated[int, typer.Option("--length", "-n", min=2, help="Tokens of a batch made here.")] = 16,
    vocab: Annotated[int | None, typer.Option(min=2, help="Vocabulary of a batch made here.")] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="How many layers run the mask.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="How often everything is tried.")] = 2,
    positions: Annotated[int, typer.Option(min=2, help="How many positions are probed.")] = MAX_POSITIONS,
    train: Annotated[bool, typer.Option("--train", help="Audit in training mode.")] = False,
    html: Annotated[Path | None, typer.Option(help="Write the report into this HTML file too.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print findings and notes as JSON.")] = False,
    ascii: Annotated[bool, typer.Option("--ascii", help="Use signs that every terminal has.")] = False,
) -> None:
    """Find what the outputs of a model really depend on, and compare it with its mask."""
    console = make_console()
    with _mistakes():
        stated = None if mask is None else parse(mask)
        model, batch, own_mask = model_and_batch(load(target), length, vocab)
        with _progress() as progress:
            report = run_audit(
                model,
                batch,
                own_mask if stated is None else stated,
                layers=layers,
                seeds=seeds,
                positions=positions,
                train=train,
                progress=progress,
            )
        written = None if html is None else report.to_html(html)
    if as_json:
        plain(console, json.dumps(report.to_dict(), indent=2))
    else:
        plain(console, report.text(ascii=ascii or needs_ascii(console)))
    if written is not None and not as_json:
        plain(console, f"written to {written}")
    raise typer.Exit(report.exit_code)


@contextmanager
def _mistakes() -> Iterator[None]:
    """A wrong call is a message, an error of the user's own code keeps its traceback; both are exit code 2."""
    try:
        yield
    except TruemaskError as error:
        show_error(error)
        raise typer.Exit(MISTAKE) from error
    except (Exception, SystemExit) as error:  # a factory that ends the process has not been audited
        traceback.print_exc()
        raise typer.Exit(MISTAKE) from error


@contextmanager
def _progress() -> Iterator[ProgressCallback]:
    """A bar on standard error, gone when it is done."""
    with Progress(console=make_console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def update(what: str, count: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=of)
            bar.update(tasks[what], completed=count)

        yield update


def load(target: str) -> Callable[[], Any]:
    """The function that `module:factory` names; the module is looked for in the current folder first."""
    name, colon, function = target.partition(":")
    if not colon or not name or not function:
        raise AuditError(f"{target!r} is not MODULE:FACTORY, such as my_package.models:make_tiny")
    module = _from_file(Path(name)) if name.endswith(".py") else _imported(name)
    factory = getattr(module, function, None)
    if not callable(factory):
        names = [key for key, value in vars(module).items() if callable(value)]
        raise AuditError(f"the module {name!r} has no function {function!r}{suggest(function, names)}")
    return factory


def _from_file(path: Path) -> ModuleType:
    """A file as a module, whatever else has its name; what lies beside it can be imported."""
    if not path.is_file():
        raise AuditError(f"there is no file {path}")
    sys.path[:0] = [str(path.resolve().parent), str(Path.cwd())]
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    registered = sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if registered is module:
            del sys.modules[path.stem]
        raise
    return module


def _imported(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0] and error.name != name:
            raise
        raise AuditError(f"there is no module {name!r}, in {Path.cwd()} or among what is installed") from error


def model_and_batch(factory: Callable[[], Any], length: int, vocab: int | None) -> tuple[nn.Module, Any, Any]:
    """The model, batch and mask of a factory; a batch of random tokens where it gives none."""
    result = factory()
    parts = result if isinstance(result, tuple) else (result,)
    if not 1 <= len(parts) <= 3 or not isinstance(parts[0], nn.Module):
        raise AuditError(
            f"the factory returned {describe(result)}; expected a model, (model, batch) or (model, batch, mask)"
        )
    model, batch, mask = parts[0], *(*parts[1:], None, None)[:2]
    if batch is None:
        batch = _random_batch(model, length, vocab)
    return model, batch, mask


def _random_batch(model: nn.Module, length: int, vocab: int | None) -> Tensor | dict[str, Tensor]:
    """Random tokens `[b, length]` that mean nothing special, for both sides of an encoder-decoder."""
    config = getattr(model, "config", None)
    inner = getattr(config, "get_text_config", None)
    text = inner() if callable(inner) else config
    size = vocab or getattr(text, "vocab_size", None)
    if not isinstance(size, int):
        raise AuditError("the factory returned no batch: return (model, batch), or pass --vocab and --length")
    special, generator = special_tokens(model), torch.Generator().manual_seed(SEED)
    ordinary = torch.tensor([token for token in range(size) if token not in special] or list(range(size)))
    sides = [ordinary[torch.randint(len(ordinary), (SAMPLES, length), generator=generator)] for _ in range(2)]
    if "decoder_input_ids" not in inspect.signature(model.forward).parameters:
        return sides[0]
    return {"input_ids": sides[0], "decoder_input_ids": sides[1]}
