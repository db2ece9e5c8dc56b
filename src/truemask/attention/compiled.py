"""`attend` under `torch.compile`: one operator, `truemask::attend`, and its backward.

What dynamo traces is short: the mask is noted as text (masks/core/deferred.py), and everything goes to the operator,
whose run is the eager `attend` with its caches of plans. So nothing of a mask is a constant of the graph: another mask,
other data, another offset or length are no new compilation.

In training the run is recorded by autograd, and its record travels to the backward behind a tensor, `state`, whose
memory owns it. A compiled graph may write over its tensors once it has no more use for them, and knows nothing of the
record: so the run works on copies, and what it returns are copies.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from truemask.attention.call import AttendArgs, Call, cast, read_call
from truemask.attention.decomposition import attend_plain
from truemask.attention.operator_args import DIFFERENTIABLE, FIELDS, SCHEMA, TENSOR_OPTIONS, OperatorArgs
from truemask.attention.run import new_seed, result_like, run
from truemask.attention.validation import check_mask_tensor
from truemask.backends.base import Result
from truemask.backends.shared.autograd import differentiable_once
from truemask.biases import Alibi, Bias, Relative, alibi, relative
from truemask.common.torch_internals import at_once, recorded_by_autograd, transform
from truemask.errors import PlanError
from truemask.masks.core.deferred import BUILDERS, DeferredMask, DeferredText, read_deferred

# -- tracing -----------------------------------------------------------------------------------------------------------


def attend_traced(q: Tensor, k: Tensor, v: Tensor, mask: Any, args: AttendArgs) -> Result:
    """The call, while `torch.compile` traces it."""
    exporting = torch.compiler.is_exporting()
    at_once(let_dynamo_pass if exporting else refuse_transforms)
    q, k, v = cast(q, k, v)
    deferred = DeferredText(by_number=exporting)
    text = deferred.write(mask)
    bias, form = _as_tensor(args.bias)
    options = args._replace(bias=bias)
    seed = new_seed() if args.dropout else None
    differentiable = zip(DIFFERENTIABLE, (q, k, v, *[getattr(options, name) for name in TENSOR_OPTIONS]), strict=True)
    wanted = [name for name, x in differentiable if x is not None and x.requires_grad and torch.is_grad_enabled()]
    flat = (q, k, v, text, deferred.tensors, deferred.ints, deferred.floats, form, seed, " ".join(wanted), *options)
    if exporting:
        out, *more = attend_exported(*flat)
        return Result(out, more[0] if args.return_lse else None, more[-1] if args.return_weights else None)
    out, lse, weights, _ = torch.ops.truemask.attend(*flat)
    return Result(out, lse if args.return_lse else None, weights if args.return_weights else None)


def _as_tensor(bias: Any) -> tuple[Tensor | None, str]:
    """A bias as the tensor that may want gradients, and the text (deferred.py) of the bias that holds it."""
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
    deferred = DeferredText(by_number=torch.compiler.is_exporting())
    text = deferred.write(DeferredMask(builder, (mask, numbers, {})))
    if torch.compiler.is_exporting():
        at_once(let_dynamo_pass)
        return read_deferred(text, deferred.tensors, deferred.ints, deferred.floats)
    return torch.ops.truemask.positions(text, deferred.tensors, deferred.ints, deferred.floats, numbers[0], numbers[2])


@torch.library.custom_op("truemask::positions", mutates_args=())
def positions_op(
    text: str, tensors: Sequence[Tensor], ints: Sequence[int], floats: Sequence[float], batch: int, rows: int
) -> Tensor:
    """The text of positions, read."""
    return read_deferred(text, tensors, ints, floats).clone(memory_format=torch.contiguous_format)


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
    op = OperatorArgs.of(args)
    mask = read_deferred(op.mask, op.tensors, op.ints, op.floats)
    result = attend_plain(op.q, op.k, op.v, mask, _options(op), seed=op.seed)
    return tuple(x for x in result if x is not None)


def let_dynamo_pass(_: Any) -> None:
    """Called by dynamo, which is not imported before somebody needs it."""
    for function in (attend_exported, read_deferred):
        torch.compiler.allow_in_graph(function)


# -- forward -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("truemask::attend", mutates_args=(), schema=SCHEMA)
def attend_op(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse and weights, what was not asked for empty; and what the backward needs."""
    refuse_transforms()
    op = OperatorArgs.of(args)
    record = SavedForBackward() if op.grads else None
    result = _eagerly(op) if record is None else record.run(op)
    return *_returned(op, result), torch.empty(0, dtype=torch.uint8) if record is None else record.state()


@attend_op.register_fake
def _(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes and dtypes; the arguments are checked, so that mistakes are told when the function is compiled."""
    refuse_transforms()
    op = OperatorArgs.of(args)
    r = _read(op, None).request
    if op.mask == "T0":
        check_mask_tensor(op.tensors[0], r.batch, r.heads, r.q_len, r.kv_len)
    return *_returned(op, result_like(op.q, r)), torch.empty(int(bool(op.grads)), dtype=torch.uint8)


def _returned(op: OperatorArgs, result: Result) -> tuple[Tensor, Tensor, Tensor]:
    """Copies, since an operator may not return what others hold; out lies as a model wants it, `[b, n, h, d]`."""
    lse, weights = (op.q.new_empty(0) if x is None else _own(x) for x in result[1:])
    return _own(result.out.transpose(1, 2)).transpose(1, 2), lse, weights


def refuse_transforms(_: Any = None) -> None:
    """Raise inside of forward mode and `torch.func`: torch would take an operator without a rule for a constant."""
    if around := transform():
        raise PlanError(
            f'{around}: {COMPILED} has no rule for it; leave the function uncompiled, where backend="reference" has one'
        )


def _options(op: OperatorArgs) -> AttendArgs:
    """The options with the bias that was written down."""
    if op.bias_form == OTHER:
        raise TypeError(
            "attend: a compiled function takes a bias as a tensor, alibi(...) or relative(...): nobody knows which "
            "tensors another bias object reads"
        )
    bias = op.tensor("bias")
    return op.options._replace(bias=read_deferred(op.bias_form, [] if bias is None else [bias], (), ()))


def _read(op: OperatorArgs, mask: Any) -> Call:
    return read_call(op.q, op.k, op.v, mask, _options(op))


def _eagerly(op: OperatorArgs) -> Result:
    """The call as it runs without `torch.compile`."""
    mask = read_deferred(op.mask, op.tensors, op.ints, op.floats)
    return run(_read(op, mask), op.seed)


def _own(x: Tensor) -> Tensor:
    """A copy of the numbers, one after the other."""
    return x.detach().clone(memory_format=torch.contiguous_format)


# -- backward ----------------------------------------------------------------------------------------------------------


class SavedForBackward(bytearray):
    """One run as autograd saw it; the memory of the tensor that stands for it."""

    __slots__ = ("__weakref__", "leaves", "results")
    leaves: dict[str, Tensor]
    results: tuple[Tensor | None, ...]

    def __init__(self) -> None:
        super().__init__(1)

    def run(self, op: OperatorArgs) -> Result:
        """The call on copies of its tensors; those that want gradients are kept."""
        copies = {name: x.detach().clone() for name in DIFFERENTIABLE if (x := op.tensor(name)) is not None}
        self.leaves = {name: copies[name].requires_grad_() for name in op.wanted}
        with recorded_by_autograd():
            self.results = result = _eagerly(op.with_tensors(copies))
        return result

    def state(self) -> Tensor:
        """The tensor that keeps this record, and finds it: a single 0."""
        tensor = torch.frombuffer(self, dtype=torch.uint8)
        SAVED[tensor.data_ptr()] = self
        return tensor


SAVED: WeakValueDictionary[int, SavedForBackward] = WeakValueDictionary()


class BackwardArgs(NamedTuple):
    """What the operator of the backward is given: `BACKWARD_SCHEMA` in Python's words."""

    state: Tensor
    dout: Tensor
    dlse: Tensor | None
    dweights: Tensor | None
    names: str  # of the tensors whose gradients are wanted
    dtypes: str  # theirs
    axes: Sequence[int]  # how many each has
    sizes: Sequence[int]  # of all of them, strung together


BACKWARD_SCHEMA = (
    "(Tensor state, Tensor dout, Tensor? dlse, Tensor? dweights, str names, str dtypes, int[] axes, SymInt[] sizes) "
    "-> Tensor[]"
)


@torch.library.custom_op("truemask::attend_backward", mutates_args=(), schema=BACKWARD_SCHEMA)
def backward_op(*args: Any) -> list[Tensor]:
    """The gradients that are wanted."""
    incoming = BackwardArgs(*args)
    record = SAVED.get(incoming.state.data_ptr())
    if not incoming.state.numel():
        raise PlanError(
            "attend: this graph was traced where nothing wanted gradients, so its forward kept nothing for a backward: "
            "trace it again with inputs or parameters that want them"
        )
    if record is None:
        raise PlanError(
            "attend: the backward of a compiled function was given a copy of what its forward left behind: hooks that "
            "move saved tensors elsewhere (`save_on_cpu`) do not go with attend under torch.compile"
        )
    pairs = zip(record.results, (incoming.dout, incoming.dlse, incoming.dweights), strict=True)
    results, output_grads = zip(*[(x, dx) for x, dx in pairs if x is not None and dx is not None], strict=True)
    leaves = [record.leaves[name] for name in incoming.names.split()]
    with recorded_by_autograd():
        grads = torch.autograd.grad(results, leaves, output_grads, retain_graph=True, materialize_grads=True)
    return [_own(grad) for grad in grads]


@backward_op.register_fake
def _(*args: Any) -> list[Tensor]:
    incoming = BackwardArgs(*args)
    sizes = iter(incoming.sizes)
    shapes = [list(islice(sizes, axes)) for axes in incoming.axes]
    dtypes = [getattr(torch, name) for name in incoming.dtypes.split()]
    return [incoming.dout.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]


COMPILED = "attend inside of a function that torch.compile compiles"


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    op = OperatorArgs.of(inputs)
    leaves = {name: op.tensor(name) for name in op.wanted}
    ctx.save_for_backward(output[-1], *leaves.values())
    ctx.names = list(leaves)
    ctx.returned = op.options.return_lse, op.options.return_weights
    ctx.lists = {name: len(getattr(op, name)) for name in ("tensors", "ints", "floats")}


def _backward(ctx: Any, dout: Tensor, dlse: Tensor, dweights: Tensor, _: Tensor) -> tuple[Any, ...]:
    state, *leaves = ctx.saved_tensors
    output_grads = [dx if returned else None for dx, returned in zip((dlse, dweights), ctx.returned, strict=True)]
    wanted = {name: x for name, x in zip(ctx.names, leaves, strict=True) if ctx.needs_input_grad[FIELDS.index(name)]}
    dtypes = " ".join(str(x.dtype).removeprefix("torch.") for x in wanted.values())
    sizes = [size for x in wanted.values() for size in x.shape]
    args = (state, dout, *output_grads, " ".join(wanted), dtypes, [x.ndim for x in wanted.values()], sizes)
    gradients = differentiable_once(
        COMPILED,
        [*leaves, dout, *output_grads],
        lambda: torch.ops.truemask.attend_backward(*args),
        first="leave the function uncompiled, and ",
    )
    grads = dict(zip(wanted, gradients, strict=True))
    lists = {name: [None] * n for name, n in ctx.lists.items() if name == "tensors" or not n}  # torch's own rule
    return tuple((grads | lists).get(name) for name in FIELDS)


attend_op.register_autograd(_backward, setup_context=_remember)
