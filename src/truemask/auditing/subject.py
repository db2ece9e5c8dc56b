"""How the audit feeds any model: what goes in at each position, what comes out there, and everything put back after.

A model is anything called with token ids `[b, n]`, embeddings `[b, n, d]` or a dict of keywords, whose result holds a
float tensor `[b, n, ...]`. Positions can be changed in two ways: another token, or another vector in place of what the
model's input embedding gives (a hook on it), so that gradients reach the input of models that take tokens.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from truemask.auditing.placeholders import placeholders, places_of, special_tokens
from truemask.common.formatting import describe
from truemask.errors import TruemaskError

INPUT_KEYWORDS = (
    "decoder_input_ids",
    "decoder_inputs_embeds",
    "input_ids",
    "inputs_embeds",
    "ids",
    "x",
    "tokens",
    "tgt",
    "src",
)
OUTPUT_FIELDS = ("logits", "last_hidden_state", "prediction_logits")
MIN_POSITIONS = 2
SEED = 20_260_714  # every call of the model begins here, so that dropout drops the same in all of them


class AuditError(TruemaskError, ValueError):
    """A model or batch that the audit cannot feed, or a mask that does not fit them."""


class AuditedModel:
    """A model and one call of it.

    Attributes:
        model: the module.
        name: the keyword under which the audited input goes in; None if it is the first argument.
        inputs: token ids `[b, n]` or embeddings `[b, n, d]`.
        keywords: everything else that the call gets.
        embedding: the module that turns the ids into vectors, if one was found.
        features: float `[b, n, d]`, what that module gives (or `inputs`, if these are embeddings); None without it.
        writes_tokens: whether it gives a number for each token that it may be given.
        signal_places: bool `[b, n]`, the places of images, sounds and videos: no other token is ever put there.
        seed: where all random generators stand when a call begins.
    """

    def __init__(self, model: nn.Module, batch: Tensor | Mapping[str, Any]) -> None:
        if not isinstance(model, nn.Module):
            raise AuditError(f"model is {describe(model)}; expected a torch.nn.Module, called with ids or embeddings")
        self.model = model
        self.name, self.inputs, self.keywords = read_batch(batch)
        self.signal_places = places_of(self.inputs, placeholders(model))
        self.embedding: nn.Module | None = None
        self.features: Tensor | None = self.inputs.detach() if self.embedded else None
        self.writes_tokens = False
        self.seed = SEED
        self._turn = 1  # of the embedding in one call, from which on it embeds the audited input
        self._check_encoder_decoder()

    @property
    def batch(self) -> int:
        """Samples."""
        return self.inputs.shape[0]

    @property
    def length(self) -> int:
        """Positions."""
        return self.inputs.shape[1]

    @property
    def embedded(self) -> bool:
        """Whether the model is fed vectors, not tokens."""
        return self.inputs.is_floating_point()

    def call(self, inputs: Tensor | None = None, **changes: Any) -> Any:
        """One call of the model, from the same state of all random generators."""
        seed_everything(self.seed)
        inputs = self.inputs if inputs is None else inputs
        keywords = {**self.keywords, **changes}
        if self.name is not None:
            return self.model(**{self.name: inputs}, **keywords)
        return self.model(inputs, **keywords)

    def changed(self, inputs: Tensor, keywords: dict[str, Any]) -> AuditedModel:
        """The same model in another call, to be run and compared only."""
        other = copy(self)
        other.inputs, other.keywords = inputs, keywords
        return other

    def outputs(self, inputs: Tensor | None = None, **changes: Any) -> Tensor:
        """What comes out at each position, float `[b, n, e]`."""
        fed = self.inputs if inputs is None else inputs
        return per_position(self.call(inputs, **changes), fed.shape[0], fed.shape[1], type(self.model).__name__)

    def outputs_of_features(self, features: Tensor) -> Tensor:
        """The same with `features` `[b, n, d]` in the place of the embedded tokens."""
        if self.embedded:
            return self.outputs(features)
        assert self.embedding is not None
        ids, turns = self.inputs, count(1)

        def replace(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> Any:
            is_input = was_called_with(args, named, ids, ~self.signal_places)
            return features if is_input and next(turns) >= self._turn else None

        handle = self.embedding.register_forward_hook(replace, with_kwargs=True)
        try:
            return self.outputs()
        finally:
            handle.remove()

    def find_embedding(self) -> Tensor:
        """Run the call, remember who embeds the ids, and return the outputs `[b, n, e]`."""
        if self.embedded:
            return self.outputs()
        embeddings: list[tuple[nn.Module, Tensor]] = []

        def watch(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
            is_input = was_called_with(args, named, self.inputs, ~self.signal_places)
            if is_input and _fits(result, self.batch, self.length) and result.ndim == 3:
                embeddings.append((module, result.detach()))

        handles = [module.register_forward_hook(watch, with_kwargs=True) for module in self._candidates()]
        try:
            outputs = self.outputs()
        finally:
            for handle in handles:
                handle.remove()
        if embeddings:
            self.embedding, self.features = embeddings[-1 if self._has_twin() else 0]
            turns = sum(module is self.embedding for module, _ in embeddings)
            self._turn = turns if self._has_twin() else 1
        vocabulary = getattr(self.embedding, "num_embeddings", None)
        self.writes_tokens = vocabulary is not None and outputs.shape[-1] == vocabulary
        return outputs

    def _has_twin(self) -> bool:
        """Whether an encoder is given the decoder's ids: the decoder's come last."""
        if not str(self.name).startswith("decoder_"):
            return False
        others = (value for value in self.keywords.values() if isinstance(value, Tensor))
        return any(value.shape == self.inputs.shape and torch.equal(value, self.inputs) for value in others)

    def _candidates(self) -> list[nn.Module]:
        """Modules that may be the input embedding, the likeliest first."""
        modules: list[nn.Module] = [module for module in self.model.modules() if isinstance(module, nn.Embedding)]
        getter = getattr(self.model, "get_input_embeddings", None)
        try:
            first = getter() if callable(getter) else None
        except (NotImplementedError, AttributeError):  # how transformers says that a model has none
            first = None
        known = isinstance(first, nn.Module) and all(first is not module for module in modules)
        return [first, *modules] if known and isinstance(first, nn.Module) else modules

    def other_inputs(self, places: Tensor, generator: torch.Generator) -> Tensor:
        """The inputs with something else at `places`, bool `[b, n]`: other tokens, or other vectors as large.

        Where images stand (`signal_places`) the token stays.
        """
        return replaced(self.inputs, places & ~self.signal_places, lambda: self._tokens, generator)

    def other_context(self, context: Tensor, places: Tensor, generator: torch.Generator) -> Tensor:
        """The same for another sequence of the call, `[b, m]` or `[b, m, d]`, from its own range of tokens."""
        free = places & ~places_of(context, placeholders(self.model)) if context.ndim == 2 else places
        vocabulary = int(context.max()) + 1 if not context.is_floating_point() else 0
        return replaced(context, free, lambda: self._ordinary(max(2, vocabulary)), generator)

    @cached_property
    def _tokens(self) -> Tensor:
        """Tokens that mean nothing special, as far as the model's configuration says."""
        size = getattr(self.embedding, "num_embeddings", None) or int(self.inputs.max()) + 1
        ordinary = self._ordinary(size)
        if len(ordinary) < 2:
            raise AuditError("every token of the batch is 0 and no vocabulary was found: pass ids that differ")
        return ordinary

    def _ordinary(self, size: int) -> Tensor:
        """Of so many tokens those that the configuration gives no name; all but placeholders if too few are left."""
        for named in (special_tokens(self.model), placeholders(self.model)):
            ordinary = [token for token in range(size) if token not in named]
            if len(ordinary) > 1:
                return torch.tensor(ordinary)
        return torch.arange(size)

    def _check_encoder_decoder(self) -> None:
        parameters = inspect.signature(self.model.forward).parameters
        if "decoder_input_ids" in parameters and not str(self.name).startswith("decoder_"):
            raise AuditError(
                f"{type(self.model).__name__} is an encoder-decoder: to audit its decoder pass decoder_input_ids in "
                "the batch, next to input_ids; to audit its encoder pass model.get_encoder()"
            )


def replaced(value: Tensor, places: Tensor, tokens: Callable[[], Tensor], generator: torch.Generator) -> Tensor:
    """`value` `[b, n, ...]` with another token, or other numbers as large, at `places`, bool `[b, n]`."""
    at = places.to(value.device)
    if value.is_floating_point():
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        size = value.detach().double().std(correction=0).nan_to_num().clamp(min=1e-3).cpu()
        return torch.where(at[(..., *[None] * (value.ndim - at.ndim))], (noise * size).to(value), value)
    allowed = tokens()
    indices = torch.randint(len(allowed), value.shape, generator=generator)
    other = allowed[indices]
    other = torch.where(other == value.cpu(), allowed[(indices + 1) % len(allowed)], other).to(value)
    return torch.where(at, other, value)


def read_batch(batch: Tensor | Mapping[str, Any]) -> tuple[str | None, Tensor, dict[str, Any]]:
    """The name of the audited input, the input, and the other keywords of the call."""
    if isinstance(batch, Tensor):
        name, inputs, keywords = None, batch, {}
    elif isinstance(batch, Mapping):
        keywords = {str(key): value for key, value in batch.items()}
        name = next((key for key in INPUT_KEYWORDS if isinstance(keywords.get(key), Tensor)), None)
        if name is None:
            raise AuditError(
                f"batch has the keys {sorted(keywords)}, none of which is one of {', '.join(INPUT_KEYWORDS)}"
            )
        inputs = keywords.pop(name)
    else:
        raise AuditError(
            f"batch is {describe(batch)}; expected token ids [b, n], embeddings [b, n, d], or a dict of keywords"
        )
    if inputs.ndim != (3 if inputs.is_floating_point() else 2) or 0 in inputs.shape or inputs.dtype == torch.bool:
        hint = "; for one sample pass batch[None]" if inputs.ndim == (2 if inputs.is_floating_point() else 1) else ""
        raise AuditError(f"the input is {describe(inputs)}; expected whole ids [b, n] or embeddings [b, n, d]{hint}")
    if inputs.shape[1] < MIN_POSITIONS:
        raise AuditError(
            f"the input is {describe(inputs)}, a single position: nothing can be seen of who depends on whom. Expected "
            f"{MIN_POSITIONS} positions or more, [b, n] or [b, n, d]; of sound [b, 1, samples] audit the part that "
            "attends, with the vectors [b, n, d] that it is given"
        )
    return name, inputs, keywords


def per_position(result: Any, batch: int, length: int, who: str) -> Tensor:
    """The float tensor `[b, n, e]` of a result: a tensor, a tuple, or an output object with logits or hidden states."""
    tensors = list(_tensors(result))
    for tensor in tensors:
        if _fits(tensor, batch, length):
            return tensor.reshape(batch, length, -1)
    shapes = ", ".join(describe(tensor).partition(" on ")[0] for tensor in tensors) or describe(result)
    raise AuditError(
        f"{who} gave {shapes}; the audit needs a float output for each position, [{batch}, {length}, ...]. If this "
        "model gives a loss or one answer for the whole text, pass the network inside it"
    )


def first_outputs(result: Any) -> Tensor | None:
    """The first float tensor `[b, n, e]` of a result, if there is one; of a dict only what is known to be outputs.

    Anything else of three axes may be sound `[b, 1, samples]`, or channels before positions.
    """
    if isinstance(result, Mapping):
        result = [result[name] for name in OUTPUT_FIELDS if name in result]
    return next((tensor for tensor in _tensors(result) if tensor.ndim == 3 and tensor.is_floating_point()), None)


def _tensors(result: Any) -> Iterator[Tensor]:
    if isinstance(result, Tensor):
        yield result
    elif isinstance(result, Mapping) or hasattr(result, "logits") or hasattr(result, "last_hidden_state"):
        get = result.get if isinstance(result, Mapping) else lambda key: getattr(result, key, None)
        named = [get(key) for key in OUTPUT_FIELDS]
        rest = [result[key] for key in result if key not in OUTPUT_FIELDS] if isinstance(result, Mapping) else []
        yield from (value for value in [*named, *rest] if isinstance(value, Tensor))
    elif isinstance(result, (tuple, list)):
        yield from (value for value in result if isinstance(value, Tensor))


def _fits(value: Any, batch: int, length: int) -> bool:
    return (
        isinstance(value, Tensor)
        and value.ndim >= 2
        and value.is_floating_point()
        and tuple(value.shape[:2]) == (batch, length)
    )


def was_called_with(args: tuple[Any, ...], named: dict[str, Any], ids: Tensor, free: Tensor) -> bool:
    """Whether a module was called with these ids; where `free` is False the model may have put others."""
    first = next(iter((*args, *named.values())), None)
    return (
        isinstance(first, Tensor) and first.shape == ids.shape and bool(((first == ids) | ~free.to(ids.device)).all())
    )


def line_of(error: Exception) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0][:160]}"


def seed_everything(seed: int) -> None:
    """Set the generators of Python, numpy and torch."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  (the models use it, whether they should or not)
    torch.manual_seed(seed)


@contextmanager
def undisturbed(model: nn.Module, *, train: bool) -> Iterator[None]:
    """Run in the given mode; then put back modes, buffers, and the state of all random generators."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(part._buffers, name) for part in model.modules() for name in part._buffers]
    values = [registry[name] for registry, name in buffers]
    before = [(buffer, None if buffer is None else buffer.detach().clone()) for buffer in values]
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            model.train(train)
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for (registry, name), (buffer, copy) in zip(buffers, before, strict=True):
                registry[name] = buffer
                if buffer is not None and copy is not None and not torch.equal(buffer, copy):
                    buffer.copy_(copy)
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
