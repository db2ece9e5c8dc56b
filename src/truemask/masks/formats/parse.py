"""The language as text: the Python expression, the `repr` and the command line's argument are one.

Text is bounded (length, nesting) before Python's own parser sees it, and its syntax tree is walked, never evaluated.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from typing import Any

from truemask.common.formatting import suggest
from truemask.errors import MaskError
from truemask.masks.compose.boolean import everything, nothing
from truemask.masks.compose.per_axis import per_head, per_sample
from truemask.masks.core.deferred import deferrable
from truemask.masks.core.mask import Mask
from truemask.masks.leaves.bands import blocks, causal, local, window
from truemask.masks.leaves.documents import documents, same
from truemask.masks.leaves.matrices import block_pattern, dense
from truemask.masks.leaves.patterns import dilated, grid, random, strided
from truemask.masks.leaves.per_token import global_tokens, keys, padding, prefix, queries
from truemask.masks.leaves.tree import tree

MAX_CHARACTERS = 20_000  # characters
MAX_NESTING = 100  # brackets, or signs in a row
MAX_DIGITS = 30  # digits
SIGNS = re.compile(rf"([~+-]\s*){{{MAX_NESTING},}}")
DIGITS = re.compile(rf"\b\d\w{{{MAX_DIGITS},}}")

VALUES: dict[str, Mask] = {"causal": causal, "everything": everything, "nothing": nothing}
FUNCTIONS: dict[str, Callable[..., Mask]] = {
    f.__name__: f
    for f in (
        window, local, prefix, global_tokens, blocks, block_pattern, dilated, strided, random, grid, documents, same,
        keys, queries, padding, tree, dense, per_head, per_sample,
    )
}  # fmt: skip
METHODS = ("at", "take", "select", "packed", "padded", "prepended")
OPERATORS: dict[type[ast.operator], Callable[[Mask, Mask], Mask]] = {
    ast.BitAnd: lambda a, b: a & b,
    ast.BitOr: lambda a, b: a | b,
    ast.BitXor: lambda a, b: a ^ b,
    ast.Sub: lambda a, b: a - b,
}


@deferrable
def parse(text: str) -> Mask:
    """The mask that a text of the language says; the inverse of `str(mask)` where `mask.has_text`.

    Errors are `MaskError`s that point at the place and suggest the nearest name.

    >>> parse("causal & (window(256) | prefix(4))")
    causal & (window(256) | prefix(4))
    >>> parse("causal & windw(8)")
    Traceback (most recent call last):
        ...
    truemask.errors.MaskError: unknown name 'windw', did you mean 'window'?
      causal & windw(8)
               ^^^^^
    """
    if not isinstance(text, str):
        raise MaskError(f"parse takes text, got {type(text).__name__}")
    _bounded(text)
    line = re.sub(r"[\r\n\f\v]", " ", text).strip()
    try:
        tree_ = ast.parse(line, mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        if doubled := re.search(r"&&|\|\|", line):
            raise _error(line, f"masks combine with a single `{doubled[0][0]}`", *doubled.span()) from None
        place = (getattr(error, "offset", None) or 1) - 1
        raise _error(line, f"this is not an expression of masks ({_reason(error)})", place, place + 1) from None
    try:
        return _Walk(line).mask(tree_.body)
    except RecursionError:
        raise _error(line, "this expression is nested too deeply", 0, len(line)) from None


def _reason(error: BaseException) -> str:
    return getattr(error, "msg", None) or str(error) or type(error).__name__


def _bounded(text: str) -> None:
    """Refuse what would cost Python's parser more than a moment, and what text cannot say."""
    start = text[:MAX_CHARACTERS]
    if found := re.search(r"\b(\w+)\((?:\w+=)?<|<\w+ \[[\d, ]*\] #[0-9a-f]+>|\bpredicate\(", start):
        name = found[1] or ("predicate" if found[0] == "predicate(" else "this mask")
        what = "is a function, which text cannot carry: build it in Python"
        if name != "predicate":
            what = "holds data that text cannot carry: build it in Python, or use save_mask and load_mask"
        raise _error(start, f"`{name}` {what}", *found.span())
    if "#" in start:
        raise _error(start, "comments have no place in a mask", start.index("#"), len(start))
    depth = 0
    for place, sign in enumerate(start):
        depth += (sign in "([{") - (sign in ")]}")
        if depth > MAX_NESTING:
            raise _error(start, f"more than {MAX_NESTING} brackets inside each other", place, place + 1)
    for found, what in (
        (SIGNS.search(start), f"more than {MAX_NESTING} signs in a row"),
        (DIGITS.search(start), f"a number of more than {MAX_DIGITS} digits"),
    ):
        if found:
            raise _error(start, what, *found.span())
    if len(text) > MAX_CHARACTERS:
        what = f"the text of a mask has at most {MAX_CHARACTERS} characters, this one has {len(text)}"
        raise _error(text[: MAX_CHARACTERS + 50], what, MAX_CHARACTERS, MAX_CHARACTERS + 1)


def _error(line: str, message: str, start: int, stop: int) -> MaskError:
    """The message with a caret under the place, in a line cut to what fits on a screen."""
    line = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in line)
    start = max(0, min(start, len(line)))
    cut = max(0, start - 50)
    shown = line[cut : cut + 100]
    carets = "^" * max(1, min(stop, cut + len(shown)) - start)
    return MaskError(f"{message}\n  {shown}\n  {' ' * (start - cut)}{carets}")


class _Walk:
    """One walk over the syntax tree of a text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def error(self, node: ast.AST, message: str) -> MaskError:
        """Point at the node. (Columns of the tree are bytes of UTF-8, not characters.)"""
        line = self.text.encode()
        start, stop = getattr(node, "col_offset", 0), getattr(node, "end_col_offset", None) or 0
        return _error(self.text, message, len(line[:start].decode()), len(line[:stop].decode()))

    def mask(self, node: ast.expr) -> Mask:
        match node:
            case ast.Name():
                return self.name(node)
            case ast.BinOp():
                return self.binary(node)
            case ast.UnaryOp(op=ast.Invert()):
                return ~self.mask(node.operand)
            case ast.Attribute(attr="T"):
                return self.mask(node.value).T
            case ast.Call():
                return self.call(node)
            case ast.BoolOp() | ast.UnaryOp(op=ast.Not()):
                raise self.error(node, "masks combine with `&`, `|` and `~`, not with `and`, `or` and `not`")
            case ast.Attribute(attr=name) if name in METHODS:
                told = _parameters(getattr(Mask, name)).replace("(self, ", "(")
                raise self.error(node, f"`{name}` is a method and needs its arguments: `.{name}{told}`")
            case ast.Attribute():
                near = suggest(node.attr, [*METHODS, "T"])
                raise self.error(node, f"a mask has no attribute {node.attr[:60]!r} in text{near}")
            case _:
                raise self.error(node, "this is not a mask")

    def name(self, node: ast.Name) -> Mask:
        if node.id in VALUES:
            return VALUES[node.id]
        if node.id in FUNCTIONS:
            raise self.error(node, f"`{node.id}` needs its arguments: `{node.id}{_parameters(FUNCTIONS[node.id])}`")
        raise self.error(node, f"unknown name {node.id[:60]!r}{suggest(node.id, [*VALUES, *FUNCTIONS])}")

    def binary(self, node: ast.BinOp) -> Mask:
        """A chain of operators of the same precedence leans left: walk down it without recursion."""
        chain: list[ast.BinOp] = []
        first: ast.expr = node
        while isinstance(first, ast.BinOp) and (not chain or isinstance(first.op, type(chain[0].op))):
            chain.append(first)
            first = first.left
        for link in chain:
            self.sign(link)
        terms = [self.mask(first), *(self.mask(link.right) for link in reversed(chain))]
        try:
            return _combine(OPERATORS[type(node.op)], terms, flat=not isinstance(node.op, ast.Sub))
        except MaskError as error:
            raise self.error(node, str(error)) from None

    def sign(self, node: ast.BinOp) -> None:
        """Only the four operators, and `-` never mixed with another one without parentheses."""
        if type(node.op) not in OPERATORS:
            raise self.error(node, "masks combine with `&`, `|`, `^`, `-` and `~`")
        for side in (node.left, node.right):
            mixed = isinstance(side, ast.BinOp) and isinstance(node.op, ast.Sub) != isinstance(side.op, ast.Sub)
            if mixed and not self.bracketed(side):
                raise self.error(side, "`-` binds tighter than `&`, `^` and `|`: put parentheses around what you mean")

    def bracketed(self, node: ast.expr) -> bool:
        """Whether parentheses of its own stand around the node."""
        line = self.text.encode()
        return line[: node.col_offset].rstrip().endswith(b"(") and line[node.end_col_offset :].lstrip().startswith(b")")

    def call(self, node: ast.Call) -> Mask:
        match node.func:
            case ast.Name(id=name) if name in FUNCTIONS:
                return self.apply(node, FUNCTIONS[name])
            case ast.Name(id=name) if name in VALUES:
                raise self.error(node, f"`{name}` is a value, not a function: write `{name}` without parentheses")
            case ast.Name():
                return self.name(node.func)
            case ast.Attribute(attr=name) if name in METHODS:
                return self.apply(node, getattr(self.mask(node.func.value), name))
            case ast.Attribute(attr="T"):
                raise self.error(node, "`.T` is an attribute: write it without parentheses")
            case ast.Attribute():
                return self.mask(node.func)
            case _:
                raise self.error(node, "this is not a mask")

    def apply(self, node: ast.Call, function: Callable[..., Mask]) -> Mask:
        for part in [*node.args, *node.keywords]:
            if isinstance(part, ast.Starred) or (isinstance(part, ast.keyword) and part.arg is None):
                raise self.error(node, "`*` and `**` have no place in a mask")
        args = [self.value(arg) for arg in node.args]
        options = {str(k.arg): self.value(k.value) for k in node.keywords}
        known = inspect.signature(function).parameters
        for keyword in node.keywords:
            if keyword.arg not in known:
                name = str(keyword.arg)[:60]
                raise self.error(keyword, f"`{function.__name__}` has no argument {name!r}{suggest(name, known)}")
        try:
            inspect.signature(function).bind(*args, **options)
        except TypeError as error:
            raise self.error(node, f"`{function.__name__}{_parameters(function)}`: {error}") from None
        try:
            return function(*args, **options)
        except MaskError as error:
            raise self.error(node, str(error)) from None

    def value(self, node: ast.expr) -> Any:
        """An argument: a number, True, False, None, a string, a list of these, or a mask."""
        match node:
            case ast.Constant(value=bool() | int() | float() | str() | None):
                return node.value
            case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
                return -number
            case ast.List() | ast.Tuple():
                return [self.value(item) for item in node.elts]
            case ast.BinOp() if type(node.op) not in OPERATORS:
                raise self.error(node, "arguments are read, not worked out: write the number, or the whole list")
            case ast.Constant():
                raise self.error(node, "numbers, True, False, None, strings, lists and masks are the only arguments")
            case _:
                return self.mask(node)


def _combine(operator: Callable[[Mask, Mask], Mask], terms: list[Mask], *, flat: bool) -> Mask:
    """Fold from the left; an associative chain by halves, so that a long one stays cheap."""
    if flat and len(terms) > 2:
        middle = len(terms) // 2
        return operator(_combine(operator, terms[:middle], flat=True), _combine(operator, terms[middle:], flat=True))
    result = terms[0]
    for term in terms[1:]:
        result = operator(result, term)
    return result


def _parameters(function: Callable[..., Mask]) -> str:
    """`(size, back=0)`: the parameters without their types."""
    parts = [
        p.name if p.default is p.empty else f"{p.name}={p.default!r}"
        for p in inspect.signature(function).parameters.values()
    ]
    return f"({', '.join(parts)})"
