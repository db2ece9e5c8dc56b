"""Every kind of mask answers every open function, wherever it is defined; a kind that does not is told what it owes."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from torch import Tensor

import truemask
from tests.support.cases import CASES
from truemask.geometry.logic import States
from truemask.geometry.tiles.tile_map import Rectangles
from truemask.masks.core.kinds import KINDS
from truemask.masks.core.mask import Mask
from truemask.masks.core.value import Written
from truemask.masks.core.verdict import Cell
from truemask.masks.leaves.bands import causal
from truemask.masks.structure.open_functions import OPEN_FUNCTIONS, answer, open_function, register
from truemask.masks.structure.order import looks_back

for _module in pkgutil.walk_packages(truemask.__path__, "truemask."):
    if _module.name.startswith(("truemask.masks", "truemask.diagnosis")):
        importlib.import_module(_module.name)

# What the functions ask for besides the mask, by the name of the argument.
ARGUMENTS: dict[str, Any] = {
    "plain": causal,
    "term": causal,
    "cell": Cell(0, 0, 0, 0),
    "head": 0,
    "seen": True,
    "start": 0,
}

every_function = pytest.mark.parametrize("function", OPEN_FUNCTIONS, ids=lambda function: function.__name__)


def arguments_of(function: Any) -> list[Any]:
    return [ARGUMENTS[name] for name in list(inspect.signature(function).parameters)[1:]]


def answered(function: Any, mask: Mask) -> Any:
    result = function(mask, *arguments_of(function))
    return list(result) if inspect.isgenerator(result) else result


def test_there_are_open_functions_and_kinds() -> None:
    assert len(OPEN_FUNCTIONS) > 20
    assert len(KINDS) > 30


@every_function
def test_every_kind_has_an_answer(function: Any) -> None:
    owed = [name for name, kind in KINDS.items() if function.dispatch(kind) is function.dispatch(object)]
    assert not owed, f"{function.__name__} has no answer for {owed}: see {function.__module__}"


@every_function
def test_only_kinds_have_answers(function: Any) -> None:
    """An answer registered for a class that several kinds inherit from would be one by default."""
    assert set(function.registry) - {object} == set(KINDS.values())


@every_function
def test_every_mask_of_the_catalogue_answers(function: Any) -> None:
    for case in CASES:
        answered(function, case.make())


@dataclass(frozen=True, eq=False, repr=False)
class Forgotten(Mask):
    """A kind whose author did not read this folder."""

    kind: ClassVar[str] = ""  # not registered, so that no other test meets it

    def _truth(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return k == 2 * q

    def _tile(self, r: Rectangles) -> States:
        raise NotImplementedError

    def _write(self) -> Written:
        return "forgotten", 5


@every_function
def test_a_kind_without_an_answer_is_told_so(function: Any) -> None:
    with pytest.raises(TypeError, match=rf"`{function.__name__}` has no answer for the mask `forgotten`") as caught:
        answered(function, Forgotten())
    assert f"`@register({function.__name__}, Forgotten)`" in str(caught.value)
    assert function.__module__ in str(caught.value)


def test_a_part_without_an_answer_is_told_so() -> None:
    with pytest.raises(TypeError, match="whose kind is Forgotten"):
        looks_back(Forgotten() & causal)


def test_only_masks_are_asked_about() -> None:
    with pytest.raises(TypeError, match="looks_back asks about a mask, got str"):
        looks_back("causal")


def test_an_answer_registered_makes_the_question_answerable() -> None:
    count = len(OPEN_FUNCTIONS)

    @open_function
    def is_even(mask: Mask) -> bool:
        """Whether the mask is even."""
        raise NotImplementedError

    del OPEN_FUNCTIONS[count:]
    answer(is_even, True, Forgotten)
    assert is_even(Forgotten())
    assert is_even.__doc__ == "Whether the mask is even."
    with pytest.raises(TypeError, match="has an answer to `is_even` already"):
        register(is_even, Forgotten)(lambda mask: False)
