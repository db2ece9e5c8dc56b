"""The options of `attend` are written down once, and everybody else has the same list."""

from __future__ import annotations

import inspect

import truemask as tm
from truemask.attention.attend import Options
from truemask.attention.call import AttendArgs
from truemask.attention.operator_args import FIELDS, SCHEMA, TENSOR_OPTIONS, OperatorArgs
from truemask.attention.planning.plan import PLANNED_KEYWORDS

PUBLIC = tuple(name for name in AttendArgs._fields if name != "preferred")


def test_the_signature_lists_them_with_the_same_defaults() -> None:
    parameters = inspect.signature(tm.attend).parameters.values()
    keywords = {
        parameter.name: parameter.default for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY
    }
    assert keywords == {name: AttendArgs._field_defaults[name] for name in PUBLIC}
    assert {*Options.__annotations__, "return_lse", "return_weights"} == set(PUBLIC)


def test_plan_takes_them_too() -> None:
    assert set(PUBLIC) - {"backend"} == PLANNED_KEYWORDS


def test_the_operators_schema_follows_from_them() -> None:
    assert (*OperatorArgs._fields[:-1], *AttendArgs._fields) == FIELDS
    assert SCHEMA.startswith("(Tensor q, Tensor k, Tensor v, str mask, ")
    arguments = SCHEMA[1 : SCHEMA.index(")")].split(", ")
    assert [argument.split()[1] for argument in arguments] == list(FIELDS)
    assert {"Tensor? bias", "float? scale", "float dropout", "str? backend", "bool return_lse"} <= set(arguments)
    assert set(TENSOR_OPTIONS) >= {"bias", "sink_logits"}
