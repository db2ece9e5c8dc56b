"""What no mask of ours reaches in a transformers model: told by the source and the names of its classes."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from functools import lru_cache

from torch import nn

from truemask.errors import MaskError

ASKING_SOURCE = "ALL_ATTENTION_FUNCTIONS.get_interface("
COMPUTES = "computes attention itself"
MIXES = "carries information between tokens without attention"
MIXER = re.compile(r"Mixer$|Mamba(Mixer|Layer)$|DeltaNet|DeltaAttention|ShortConv|RecurrentBlock$|LinearAttention$")
SELECTING_SOURCES = {
    r"_attn_implementation in \(": "selects keys for each query in a way of its own, and only under the attentions "
    "'eager' and 'sdpa' leaves that to the mask",
    r"\bsinks=": "passes `sinks=`, which `tm.use` does not know (it knows the sinks called `s_aux`)",
}


@lru_cache(maxsize=1024)
def asks_for_attention(kind: type[nn.Module]) -> bool:
    """Whether a class asks transformers for the attention function, in any of its own methods."""
    return ASKING_SOURCE in _source_of(kind)


@lru_cache(maxsize=1024)
def _selection_of(kind: type[nn.Module]) -> str:
    """What a class that asks for the attention function says with more than the mask; nothing for nearly all."""
    return next((what for pattern, what in SELECTING_SOURCES.items() if re.search(pattern, _source_of(kind))), "")


def _source_of(kind: type[nn.Module]) -> str:
    """The text of a class's own methods; empty for a class without a file."""
    functions = [value for _, value in inspect.getmembers(kind, inspect.isfunction)]
    try:
        return "\n".join(inspect.getsource(each) for each in functions if not each.__module__.startswith("torch."))
    except OSError:
        return ""


def check_selection(model: nn.Module, module: nn.Module) -> None:
    """Raise if a layer's attention means more than the mask that it passes on (law 9)."""
    what = _selection_of(type(module))
    if what and getattr(module, "indexer", module) is not None:  # None: a layer of such a model that selects nothing
        raise MaskError(
            f"{type(model).__name__} cannot run under `tm.use`: its {type(module).__name__} {what}. A mask can reach "
            "such a model only as the tensor that it takes (`tm.to_additive`)"
        )


@lru_cache(maxsize=1024)
def partitions(kind: type[nn.Module]) -> bool:
    """Whether a layer attends inside windows that its model cuts beforehand, and counts positions there."""
    home = inspect.getmodule(kind)
    try:
        return home is not None and "window_partition(" in inspect.getsource(home)
    except OSError:
        return False


def own_ways(model: nn.Module, asking: Mapping[str, nn.Module]) -> dict[str, str]:
    """How other modules carry information between tokens, by their path: what a mask does not reach.

    They are softmax attention that computes itself, and, in the same numbered layers as attention, convolutions over
    time and whatever is called a mixer. A convolution before the layers makes the tokens, and a pooling head reads
    them: these are none.
    """
    stacks = {re.split(r"\.\d+\.", path, maxsplit=1)[0] for path in asking if re.search(r"\.\d+\.", path)}
    ways: dict[str, str] = {}
    for path, module in model.named_modules():
        numbered = re.match(r"(.*?)\.\d+(\.|$)", path)
        if numbered is None or path in asking or any(path.startswith(f"{outer}.") for outer in ways):
            continue
        if _computes_itself(module):
            ways[path] = COMPUTES
        elif numbered.group(1) in stacks and _mixes(module):
            ways[path] = MIXES
    return ways


def _computes_itself(module: nn.Module) -> bool:
    """Whether a module is softmax attention by its name and projections, and nothing in it asks for the function."""
    name = type(module).__name__
    is_attention = name.endswith("Attention") and not MIXER.search(name)
    return is_attention and any(isinstance(part, nn.Linear) for part in module.modules()) and not _holds_asking(module)


def _mixes(module: nn.Module) -> bool:
    """Whether a module is called a mixer of a sequence or is a convolution over time."""
    over_time = isinstance(module, nn.Conv1d) and module.kernel_size != (1,)
    return (over_time or bool(MIXER.search(type(module).__name__))) and not _holds_asking(module)


def _holds_asking(module: nn.Module) -> bool:
    return any(asks_for_attention(type(part)) for part in module.modules())
