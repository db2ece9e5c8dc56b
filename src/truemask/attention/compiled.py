"""`attend` under `torch.compile`: one operator, `truemask::attend`, and its backward.

What dynamo traces is short: the mask is noted as text (masks/core/deferred.py), and everything goes to the operator,
whose run is the eager `attend` with its caches of plans. So nothing of a mask is a constant of the graph: another mask,
other data, another offset or length are no new compilation.

In training the run is recorded by autograd, and its record travels to the backward behind a tensor, `state`, whose
memory owns it. A compiled graph may write over its tensors once it has no more use for them, and knows nothing of the
record: so the run works on copies, and what it returns are copies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from truemask.attention.call import Call, cast, read_call
from truemask.attention.decomposition import attend_plain
from truemask.attention.run import new_seed, run
from truemask.attention.validation import check_mask_tensor
from truemask.backends.base import Result
from truemask.backends.shared.autograd import differentiable_once
from truemask.biases import Alibi, Bias, Relative, alibi, relative
from truemask.common.torch_internals import transform
from truemask.errors import PlanError
from truemask.masks.core.deferred import BUILDERS, Note, Traced, read


class Asked(NamedTuple):
    """What the operators are asked: `SCHEMA` in Python's words."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: str  # as `Note` wrote it, with the tensors, ints and floats of its places
    tensors: Sequence[Tensor]
    ints: Sequence[int]
    floats: Sequence[float]
    bias: Tensor | None
    bias_form: str  # as a note, with the tensor in its place
    sinks: Tensor | None
    seed: Tensor | None
    scale: float | None
    softcap: float | None
    dropout: float
    backend: str | None
    return_lse: bool
    return_weights: bool
    grads: str  # of q, k, v, sinks and bias, which want gradients


SCHEMA = (
    "Tensor q, Tensor k, Tensor v, str mask, Tensor[] tensors, SymInt[] ints, float[] floats, Tensor? bias, "
    "str bias_form, Tensor? sinks, Tensor? seed, float? scale, float? softcap, float dropout, str? backend, "
    "bool return_lse, bool return_weights, str grads"
)


def attend_traced(q: Tensor, k: Tensor, v: Tensor, mask: Any, bias: Any, sinks: Any, **options: Any) -> Result:
    """The call, while `torch.compile` traces it."""
    exporting = torch.compiler.is_exporting()
    at_once(let_dynamo_pass if exporting else refuse_transforms)
    q, k, v = cast(q, k, v)
    note = Note(by_number=exporting)
    text = note.write(mask)
    added, form = _as_tensor(bias)
    seed = new_seed() if options["dropout"] else None
    given = zip(DIFFERENTIABLE, (q, k, v, sinks, added), strict=True)
    wanted = [name for name, x in given if x is not None and x.requires_grad and torch.is_grad_enabled()]
    grads = " ".join(wanted)
    asked = Asked(q, k, v, text, note.tensors, note.ints, note.floats, added, form, sinks, seed, grads=grads, **options)
    if exporting:
        out, *more = attend_exported(*asked)
        lse = more[0] if options["return_lse"] else None
        return Result(out, lse, more[-1] if options["return_weights"] else None)
    return Result(*torch.ops.truemask.attend(*asked)[:3])


def at_once(call: Callable[[Any], None]) -> None:
    """Make the call while dynamo traces, rather than write it down."""
    dynamo: Any = torch._dynamo
    dynamo.comptime.comptime(call)


def _as_tensor(bias: Any) -> tuple[Tensor | None, str]:
    """A bias as the tensor that may want gradients, and a note (traced.py) of the bias that holds it."""
    if isinstance(bias, Alibi):
        return bias.slopes, "alibi(T0, {})"
    if isinstance(bias, Relative):
        options = f"{{'max_distance': {bias.max_distance}, 'bidirectional': {bias.bidirectional}}}"
        return bias.table, f"relative(T0, {options})"
    if isinstance(bias, Bias):
        return None, OTHER
    return bias, "None" if bias is None else "T0"


OTHER = "'a bias of another class'"
BUILDERS.update(alibi=alibi, relative=relative)


def positions_traced(builder: str, mask: Any, numbers: list[int]) -> Tensor:
    """What `builder` says of a mask and a layout, int64 `[b, n]`: a tensor of positions, while dynamo traces."""
    note = Note(by_number=torch.compiler.is_exporting())
    text = note.write(Traced(builder, (mask, numbers, {})))
    if torch.compiler.is_exporting():
        at_once(let_dynamo_pass)
        return read(text, note.tensors, note.ints, note.floats)
    return torch.ops.truemask.positions(text, note.tensors, note.ints, note.floats, numbers[0], numbers[2])


@torch.library.custom_op("truemask::positions", mutates_args=())
def positions_op(
    text: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], batch: int, rows: int
) -> Tensor:
    """A note of positions, read."""
    return read(text, tensors, ints, floats).clone(memory_format=torch.contiguous_format)


@positions_op.register_fake
def _(
    text: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], batch: int, rows: int
) -> Tensor:
    return torch.empty(batch, rows, dtype=torch.int64)


# -- torch.export by way of dynamo -------------------------------------------------------------------------------------


def attend_exported(*args: Any) -> tuple[Tensor, ...]:
    """out, and what was asked for of lse and weights, in plain torch: dynamo writes it down as one call.

    That graph is traced again before the export ends, and then nothing but torch's operations is left of it.
    """
    asked = Asked(*args)
    found = attend_plain(
        asked.q,
        asked.k,
        asked.v,
        read(asked.mask, asked.tensors, asked.ints, asked.floats),
        bias=_bias(asked),
        sink_logits=asked.sinks,
        seed=asked.seed,
        **{name: getattr(asked, name) for name in OPTIONS},
    )
    return tuple(x for x in found if x is not None)


OPTIONS = ("scale", "softcap", "dropout", "backend", "return_lse", "return_weights")


def let_dynamo_pass(_: Any) -> None:
    """Called by dynamo, which is not imported before somebody needs it."""
    for function in (attend_exported, read):
        torch.compiler.allow_in_graph(function)


# -- forward -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("truemask::attend", mutates_args=(), schema=f"({SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor)")
def attend_op(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse and weights, what was not asked for empty; and what the backward needs."""
    refuse_transforms()
    asked = Asked(*args)
    record = Record() if asked.grads else None
    found = _eagerly(asked) if record is None else record.run(asked)
    out = found.out.detach().transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)
    lse, weights = (asked.q.new_empty(0) if x is None else _own(x) for x in found[1:])
    return out, lse, weights, torch.empty(0, dtype=torch.uint8) if record is None else record.state()


@attend_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes; it passes the door, so that mistakes are told when the function is compiled."""
    refuse_transforms()
    asked = Asked(*args)
    r, new = _read(asked, None).request, asked.q.new_empty
    if asked.mask == "T0":
        check_mask_tensor(asked.tensors[0], r.batch, r.heads, r.q_len, r.kv_len)
    rows = (r.batch, r.heads, r.q_len)
    lse = new(rows, dtype=torch.float64 if r.dtype == torch.float64 else torch.float32) if r.return_lse else new(0)
    weights = new((*rows, r.kv_len)) if r.return_weights else new(0)
    state = torch.empty(int(bool(asked.grads)), dtype=torch.uint8)
    return new((r.batch, r.q_len, r.heads, r.value_dim)).transpose(1, 2), lse, weights, state


def refuse_transforms(_: Any = None) -> None:
    """Raise inside of forward mode and `torch.func`: torch would take an operator without a rule for a constant."""
    if around := transform():
        raise PlanError(
            f'{around}: {COMPILED} has no rule for it; leave the function uncompiled, where backend="reference" has one'
        )


def _bias(asked: Asked) -> Tensor | Bias | None:
    if asked.bias_form == OTHER:
        raise TypeError(
            "attend: a compiled function takes a bias as a tensor, alibi(...) or relative(...): nobody knows which "
            "tensors another bias object reads"
        )
    return read(asked.bias_form, [] if asked.bias is None else [asked.bias], (), ())


def _read(asked: Asked, mask: Any) -> Call:
    return read_call(
        asked.q,
        asked.k,
        asked.v,
        mask,
        bias=_bias(asked),
        scale=asked.scale,
        softcap=asked.softcap,
        sink_logits=asked.sinks,
        dropout=asked.dropout,
        return_lse=asked.return_lse,
        return_weights=asked.return_weights,
    )


def _eagerly(asked: Asked) -> Result:
    """The call as it runs without `torch.compile`."""
    mask = read(asked.mask, asked.tensors, asked.ints, asked.floats)
    return run(_read(asked, mask), asked.backend, asked.seed)


def _own(x: Tensor) -> Tensor:
    """A copy of the numbers, one after the other."""
    return x.detach().clone(memory_format=torch.contiguous_format)


# -- backward ----------------------------------------------------------------------------------------------------------


class Record(bytearray):
    """One run as autograd saw it; the memory of the tensor that stands for it."""

    __slots__ = ("__weakref__", "leaves", "results")
    leaves: dict[str, Tensor]
    results: tuple[Tensor | None, ...]

    def __init__(self) -> None:
        super().__init__(1)

    def run(self, asked: Asked) -> Result:
        """The call on copies of its tensors; those that want gradients are kept."""
        wanted = asked.grads.split()
        given = {name: x.detach().clone() for name in DIFFERENTIABLE if (x := getattr(asked, name)) is not None}
        self.leaves = {name: given[name].requires_grad_() for name in wanted}
        with _recording():
            self.results = found = _eagerly(asked._replace(**given))
        return found

    def state(self) -> Tensor:
        """The tensor that keeps this record, and finds it: a single 0."""
        tensor = torch.frombuffer(self, dtype=torch.uint8)
        RECORDS[tensor.data_ptr()] = self
        return tensor


DIFFERENTIABLE = ("q", "k", "v", "sinks", "bias")
RECORDS: WeakValueDictionary[int, Record] = WeakValueDictionary()


class Arrived(NamedTuple):
    """What the operator of the backward is asked: `BACKWARD_SCHEMA` in Python's words."""

    state: Tensor
    dout: Tensor
    dlse: Tensor | None
    dweights: Tensor | None
    names: str  # of the tensors whose gradients are wanted
    sizes: Sequence[int]  # theirs, strung together
    sinks_dtype: torch.dtype | None
    bias_dtype: torch.dtype | None


BACKWARD_SCHEMA = (
    "(Tensor state, Tensor dout, Tensor? dlse, Tensor? dweights, str names, SymInt[] sizes, ScalarType? sinks_dtype, "
    "ScalarType? bias_dtype) -> Tensor[]"
)


@torch.library.custom_op("truemask::attend_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def backward_op(*args: Any) -> list[Tensor]:
    """The gradients that are wanted."""
    asked = Arrived(*args)
    record = RECORDS.get(asked.state.data_ptr())
    if not asked.state.numel():
        raise PlanError(
            "attend: this graph was traced where nothing wanted gradients, so its forward kept nothing for a backward: "
            "trace it again with inputs or parameters that want them"
        )
    if record is None:
        raise PlanError(
            "attend: the backward of a compiled function was given a copy of what its forward left behind: hooks that "
            "move saved tensors elsewhere (`save_on_cpu`) do not go with attend under torch.compile"
        )
    arrived = zip(record.results, (asked.dout, asked.dlse, asked.dweights), strict=True)
    results, arriving = zip(*[(x, dx) for x, dx in arrived if x is not None and dx is not None], strict=True)
    leaves = [record.leaves[name] for name in asked.names.split()]
    with _recording():
        grads = torch.autograd.grad(results, leaves, arriving, retain_graph=True, materialize_grads=True)
    return [_own(grad) for grad in grads]


@backward_op.register_fake
def _(*args: Any) -> list[Tensor]:
    asked = Arrived(*args)
    made, rest = [], list(asked.sizes)
    for name in asked.names.split():
        axes = {"sinks": 1, "bias": len(rest)}.get(name, 4)  # a bias comes last
        dtype = {"sinks": asked.sinks_dtype, "bias": asked.bias_dtype}.get(name, asked.dout.dtype)
        made.append(asked.dout.new_empty(rest[:axes], dtype=dtype))
        rest = rest[axes:]
    return made


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd as in eager code: inside of an operator's kernel torch leaves it out."""
    left_out = torch._C._dispatch_tls_local_exclude_set()
    key = torch._C.DispatchKey
    for one in (key.AutogradFunctionality, key.AutogradOther, key.AutogradNestedTensor):
        left_out = left_out.remove(one)
    included = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(included, left_out), torch.enable_grad():
        yield


COMPILED = "attend inside of a function that torch.compile compiles"


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    asked = Asked(*inputs)
    ctx.save_for_backward(output[-1], *[getattr(asked, name) for name in asked.grads.split()])
    ctx.returned = asked.return_lse, asked.return_weights
    ctx.shapes = {name: getattr(asked, name).shape for name in asked.grads.split()}
    ctx.dtypes = [None if x is None else x.dtype for x in (asked.sinks, asked.bias)]
    ctx.lists = {name: len(getattr(asked, name)) for name in ("tensors", "ints", "floats")}


def _backward(ctx: Any, dout: Tensor, dlse: Tensor, dweights: Tensor, _: Tensor) -> tuple[Any, ...]:
    state, *leaves = ctx.saved_tensors
    names = [name for name in ctx.shapes if ctx.needs_input_grad[Asked._fields.index(name)]]
    arriving = [dx if returned else None for dx, returned in zip((dlse, dweights), ctx.returned, strict=True)]
    sizes = [size for name in names for size in ctx.shapes[name]]
    asked = (state, dout, *arriving, " ".join(names), sizes, *ctx.dtypes)
    found = differentiable_once(
        COMPILED,
        [*leaves, dout, *arriving],
        lambda: torch.ops.truemask.attend_backward(*asked),
        first="leave the function uncompiled, and ",
    )
    grads = dict(zip(names, found, strict=True))
    lists = {name: [None] * n for name, n in ctx.lists.items() if name == "tensors" or not n}  # torch's own rule
    return tuple((grads | lists).get(name) for name in Asked._fields)


attend_op.register_autograd(_backward, setup_context=_remember)
