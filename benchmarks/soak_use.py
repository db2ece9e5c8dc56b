"""Requests of several threads to one model, each under a mask of its own or under none, against the same ones alone.

    python benchmarks/soak_use.py [--requests 2000] [--threads 8] [--seed 0] [--quick] [--json FILE]

Each request follows from the seed and its number: which model, which mask (or no `tm.use` at all), what batch (bare,
with pads on the left or right, under a tensor of its own), and what it asks for: logits, a few tokens more, or the
gradients of layers that are recomputed, in the block, behind it, or inside another one. Logits and gradients *differ*
when they are further than `CLOSE` of the largest from those of the request alone, tokens when one is another. What has
*grown* at the end is counted too. The exit status is 1 if anything differed or grew.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from random import Random
from typing import Any, NamedTuple

import torch
from harness import Table, finish, megabytes, memory_now, options
from torch import Tensor, nn
from torch.nn.functional import pad

import truemask as tm
from truemask.attention.planning.cache import CACHE
from truemask.interop import scopes
from truemask.interop.checkpointing import RecordedCalls
from truemask.interop.huggingface import configs
from truemask.interop.huggingface.masks import ModelMask

CLOSE, QUICK, WORDS, LONGEST, MEMORY = 1e-4, 40, 61, 40, 2
REMEMBERED = (scopes.ActiveUse, scopes.ScopedValue, configs.Account, ModelMask, RecordedCalls)
Batch = dict[str, Tensor]


# -- models ------------------------------------------------------------------------------------------------------------


def transformers_model(name: str, training: bool = False) -> Any:
    """A tiny model with random weights; one in training has its layers recomputed."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    own: dict[str, Any] = {"Mistral": {"sliding_window": 12}}.get(name, {})
    config = getattr(transformers, f"{name}Config")(**sizes, **own, num_hidden_layers=2, vocab_size=WORDS)
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, None, 1
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    if training:
        model.train().activation_checkpointing_enable({"use_reentrant": False})
        return model
    return model.eval().requires_grad_(False)


def x_transformers_model() -> Any:
    """The same of x-transformers, with what its layers do not see: memory tokens, and a window of its own."""
    import x_transformers

    torch.manual_seed(0)
    stack = x_transformers.Decoder(dim=32, depth=2, heads=4, attn_dim_head=8, attn_max_attend_past=20)
    sizes: dict[str, Any] = {"num_tokens": WORDS, "max_seq_len": 2 * LONGEST, "num_memory_tokens": MEMORY}
    net = x_transformers.TransformerWrapper(attn_layers=stack, **sizes)
    return x_transformers.AutoregressiveWrapper(net).eval().requires_grad_(False)


# -- requests ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What one thread asks of one model. `asked`: under `mask`; otherwise there is no block at all."""

    model: str
    does: str
    batch: str
    asked: bool
    mask: tm.Mask | None
    other: tm.Mask
    where: str
    samples: int
    length: int
    seed: int


def drawn_mask(random: Random) -> tm.Mask:
    """A mask that lets every token see itself."""
    near = tm.window(random.randint(1, 9))
    kinds: list[Callable[[], tm.Mask]] = [
        lambda: near,
        lambda: tm.causal,
        lambda: near | (tm.causal & tm.prefix(random.randint(1, 6))),
        lambda: tm.causal & tm.dilated(random.randint(2, 4)),
        lambda: tm.causal & (near | tm.strided(random.randint(2, 5))),
        lambda: tm.per_head([near, tm.causal, tm.window(2), tm.window(5)]),
    ]
    return random.choice(kinds)()


def drawn_request(seed: int, number: int) -> Request:
    """The request of this number."""
    random = Random(f"{seed} {number}")
    model = random.choice(["Llama", "Llama", "Mistral", "x-transformers", "recomputed"])
    does = "gradients" if model == "recomputed" else random.choice(["logits", "logits", "tokens"])
    batches = ["bare", "left"] if does == "tokens" else ["bare", "left", "right", "tensor"]
    return Request(
        model,
        does,
        random.choice(batches),
        random.random() < 0.8,
        None if random.random() < 0.15 else drawn_mask(random),
        drawn_mask(random),
        random.choice(["in the block", "behind it", "inside another"]),
        random.randint(1, 3),
        random.randint(4, LONGEST),
        random.getrandbits(32),
    )


class Made(NamedTuple):
    """A batch: its tokens, which of them are real, and a tensor of cells if it comes with one."""

    ids: Tensor
    real: Tensor
    cells: Tensor | None


def batch_of(request: Request) -> Made:
    """The batch of a request."""
    generator = torch.Generator().manual_seed(request.seed)
    shape = request.samples, request.length
    ids = torch.randint(1, WORDS, shape, generator=generator)
    pads = torch.randint(0, request.length - 1, (request.samples, 1), generator=generator)
    pads[0] = 0
    places = torch.arange(request.length)
    real = places >= pads if request.batch == "left" else places < request.length - pads
    if request.batch in ("bare", "tensor"):
        real = torch.ones(shape, dtype=torch.bool)
    cells = None
    if request.batch == "tensor":
        cells = torch.rand(request.samples, 1, request.length, request.length, generator=generator) < 0.7
        cells = (cells | torch.eye(request.length, dtype=torch.bool)).tril()
    return Made(ids, real, cells)


def answered(request: Request, models: dict[str, Any]) -> Tensor:
    """What a request gives."""
    model, made = models[request.model], batch_of(request)
    if request.does == "gradients":
        return gradients(model, request, made)
    run = from_x_transformers if request.model == "x-transformers" else from_transformers
    with torch.no_grad(), tm.use(model, request.mask) if request.asked else nullcontext():
        return run(model, request, made)


def from_transformers(model: Any, request: Request, made: Made) -> Tensor:
    if request.does == "tokens":
        return model.generate(made.ids, attention_mask=made.real.long(), max_new_tokens=4, do_sample=False)
    return logits(model, made)


def logits(model: Any, made: Made) -> Tensor:
    """The logits of the tokens that are real."""
    given: dict[str, Any] = {"attention_mask": made.cells}
    if made.cells is None:
        given = {"attention_mask": made.real.long(), "position_ids": (made.real.cumsum(1) - 1).clamp(min=0)}
    return model(made.ids, use_cache=False, **given).logits[made.real]


def from_x_transformers(model: Any, request: Request, made: Made) -> Tensor:
    starts = {"seq_start_pos": (~made.real).sum(1)} if request.batch == "left" else {}
    if request.does == "tokens":
        prompts = {"prompt_lens": made.real.sum(1)} if request.batch == "left" else {}
        return model.generate(made.ids, 4, temperature=0.0, **prompts)
    given: dict[str, Any] = {}
    if made.cells is not None:  # memory tokens are rows and keys in front, which see all and are seen by all
        given["attn_mask"] = pad(made.cells, (MEMORY, 0, MEMORY, 0), value=True)
    given |= {"mask": made.real} if request.batch == "right" else {}
    return model.net(made.ids, **starts, **given)[made.real]


def gradients(model: Any, request: Request, made: Made) -> Tensor:
    """Those of all parameters, which no other thread shares."""
    with tm.use(model, request.mask) if request.asked else nullcontext():
        loss = logits(model, made).square().mean()
        if request.where == "in the block":
            return _gradients(loss, model)
    with tm.use(model, request.other) if request.where == "inside another" else nullcontext():
        return _gradients(loss, model)


def _gradients(loss: Tensor, model: nn.Module) -> Tensor:
    return torch.cat([each.flatten() for each in torch.autograd.grad(loss, list(model.parameters()))])


# -- the run -----------------------------------------------------------------------------------------------------------


def differs(found: Tensor | Exception, alone: Tensor | Exception) -> str:
    """How an answer is another one than that of the same request alone; empty if it is not."""
    if isinstance(found, Exception) or isinstance(alone, Exception):
        return "" if repr(found) == repr(alone) else f"{found!r} instead of {alone!r}"
    if found.shape != alone.shape:
        return f"{list(found.shape)} instead of {list(alone.shape)}"
    if not found.is_floating_point():
        return "" if torch.equal(found, alone) else "other tokens"
    away = float((found - alone).abs().max())
    scale = float(alone.abs().max())
    return "" if away <= CLOSE * scale else f"{away:.3g} of {scale:.3g}"


def remembered() -> Counter[str]:
    """What is alive of all that a use makes, and what stands on the models."""
    gc.collect()
    found = Counter(type(each).__name__ for each in gc.get_objects() if type(each) in REMEMBERED)
    return found + Counter({"accounts": len(configs.ACCOUNTS), "lasting": len(scopes.LASTING)})


def attributes(models: dict[str, Any]) -> list[set[str]]:
    """The names of what stands on the parts of models, hooks among them."""
    parts = [part for model in models.values() for part in model.modules()]
    return [{*vars(part), *map(str, part._forward_hooks), *map(str, part._forward_pre_hooks)} for part in parts]


def attempt(request: Request, models: dict[str, Any]) -> Tensor | Exception:
    """The answer, or the error that is one."""
    try:
        return answered(request, models)
    except Exception as error:
        return error.with_traceback(None)


@dataclass
class Soak:
    """A run: the requests, their answers alone and together, and what was there before and in between."""

    given: argparse.Namespace
    models: dict[str, Any]
    requests: list[Request]

    def run(self) -> None:
        """Every request alone, and then all by many threads."""
        stood, began = attributes(self.models), time.perf_counter()
        self.alone = [attempt(request, self.models) for request in self.requests]
        before, memory, between = remembered(), memory_now("VmRSS"), time.perf_counter()
        with ThreadPoolExecutor(self.given.threads) as pool:
            together = list(pool.map(lambda request: attempt(request, self.models), self.requests))
        self.seconds = between - began, time.perf_counter() - between
        self.faults = [differs(found, own) for found, own in zip(together, self.alone, strict=True)]
        kept = sum(each.nbytes for each in together if isinstance(each, Tensor))
        self.memory, self.grown = memory_now("VmRSS") - memory - kept, remembered() - before
        now = attributes(self.models)
        self.left = [name for names, others in zip(now, stood, strict=True) for name in names - others]

    @property
    def well(self) -> bool:
        return not any(self.faults) and not self.grown and not self.left

    def counts(self) -> Table:
        """Requests by model."""
        title = f"{len(self.requests):,} requests by {self.given.threads} threads, seed {self.given.seed}"
        table = Table(title, ("", "requests", "without a block", "refused", "differ"))
        for name in ("all", *self.models):
            own = [n for n, request in enumerate(self.requests) if name in ("all", request.model)]
            bare = sum(not self.requests[n].asked for n in own)
            refused = sum(isinstance(self.alone[n], Exception) for n in own)
            different = sum(bool(self.faults[n]) for n in own)
            cells = (f"{count:,}" for count in (len(own), bare, refused, different))
            table.add(name, *cells, requests=len(own), differ=different)
        return table

    def growth(self) -> Table:
        """What is there that was not."""
        table = Table("What has grown", ("", ""))
        table.add("uses, values, accounts, masks, records", f"{sum(self.grown.values())}", **dict(self.grown))
        table.add("attributes and hooks of models", f"{len(self.left)}", left=self.left)
        table.add("memory beyond the answers, while the threads ran", megabytes(self.memory), bytes=self.memory)
        entries = CACHE.info().entries
        table.add(f"plans kept, of {CACHE.most_plans:,} at most", f"{entries:,}", plans=entries)
        table.note = f"alone {self.seconds[0]:.0f} s, together {self.seconds[1]:.0f} s"
        return table

    def wrong(self) -> Table:
        """Each answer that was another one, and what was refused alone too."""
        table = Table("What differs", ("request", "how"))
        for number, fault in enumerate(self.faults):
            if fault:
                table.add(f"{number}: {self.requests[number]}", fault, number=number)
        errors = Counter(repr(each)[:110] for each in self.alone if isinstance(each, Exception))
        for error, times in errors.items():
            table.add(f"refused alone too, {times} times", error, times=times)
        if not table.rows:
            table.add("none", "")
        return table


def soaked(given: argparse.Namespace) -> Soak:
    """A run, done."""
    models = {name: transformers_model(name) for name in ("Llama", "Mistral")}
    models |= {"x-transformers": x_transformers_model(), "recomputed": transformers_model("Llama", training=True)}
    soak = Soak(given, models, [drawn_request(given.seed, number) for number in range(given.requests)])
    soak.run()
    return soak


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the requests; the text."""
    return run(arguments)[0]


def run(arguments: Sequence[str] | None = None) -> tuple[str, bool]:
    """The text, and whether all went well."""
    given = options(
        __doc__,
        arguments,
        requests={"type": int, "default": 2000, "metavar": "N"},
        threads={"type": int, "default": 8, "metavar": "N"},
        seed={"type": int, "default": 0, "metavar": "N"},
    )
    given.requests = min(given.requests, QUICK) if given.quick else given.requests
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # requests share the processor; each of them is small
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", tm.ConventionWarning)  # masks reach beyond windows on purpose
            soak = soaked(given)
    finally:
        torch.set_num_threads(threads)
    return finish([soak.counts(), soak.growth(), soak.wrong()], given), soak.well


if __name__ == "__main__":
    sys.exit(not run()[1])
