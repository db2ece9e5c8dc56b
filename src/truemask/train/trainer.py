"""The training loop: a generator of steps, which a progress bar, a curve and a test watch in their own ways."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from truemask.train.baselines import measure_baselines
from truemask.train.checkpoint import load_model, load_optimizer, read_checkpoint, save_checkpoint
from truemask.train.config import TrainConfig, TrainError
from truemask.train.corpus import Corpus, read_corpus
from truemask.train.model import batch_loss, bits_per_byte, build_model
from truemask.train.rows import Rows, held_out_rows

MIN_RATE_SHARE = 0.05  # of the learning rate, reached when the run is done
RISE_SHARE = 0.1  # share of the run after which the learning rate has risen in any case
LOG_NAME = "log.jsonl"


@dataclass(frozen=True)
class Step:
    """One step of training, as it is shown and logged."""

    step: int
    share: float  # of the run that is done
    bits: float  # per label of this step's batch
    lr: float
    tokens: int  # trained on so far
    seconds: float  # of the run so far
    tokens_per_second: float
    held_out: float | None  # bits per byte, when it was measured


class Trainer:
    """A run: its model, optimizer, data and clock. `run` goes on from wherever they stand."""

    def __init__(self, config: TrainConfig, folder: Path | None = None, *, corpus: Corpus | None = None) -> None:
        """A new run. Without a `folder` nothing is written."""
        self.config, self.folder = config, folder
        self.mask = config.expression()
        self.corpus = corpus if corpus is not None else read_corpus(config)
        self.rows = Rows(self.corpus.train, config.length, config.batch, config.seed)
        self.test_rows = held_out_rows(self.corpus.held_out, config.length, config.evaluate_rows)
        self.baselines = measure_baselines(self.corpus.train, self.test_rows)
        self.model = build_model(config)
        self.optimizer = _optimizer(self.model, config)
        self.step, self.tokens = 0, 0
        self.seconds, self.training_seconds = 0.0, 0.0  # on the clock, and of that in steps

    @classmethod
    def resume(cls, where: str | Path, **changes: Any) -> Trainer:
        """Go on from the newest complete checkpoint of a run, exactly as if it had never stopped.

        Raises:
            TrainError: no such run, or its files have changed since.
        """
        checkpoint = read_checkpoint(where)
        config = TrainConfig.from_json({**checkpoint.config.to_json(), **changes})
        trainer = cls(config, checkpoint.path.parent)
        if trainer.corpus.digest != checkpoint.state["corpus"]:
            raise TrainError(
                f"{trainer.corpus.source} is no longer the text that {checkpoint.path} was trained on, so the run "
                f"cannot go on as if it had never stopped; start a new one"
            )
        load_model(checkpoint, trainer.model)
        load_optimizer(checkpoint, trainer.model, trainer.optimizer)
        trainer._restore(checkpoint.state)
        return trainer

    @property
    def share(self) -> float:
        """How much of the run is done, from 0 to 1."""
        share = self.step / self.config.steps if self.config.steps else self.seconds / (60 * (self.config.minutes or 1))
        return min(1.0, share)

    def run(self, stop: Callable[[], bool] = lambda: False) -> Iterator[Step]:
        """Train until the run is done, or `stop` says so between two steps; either way it ends with a checkpoint."""
        self.model.train()
        saved, last = self.step, time.perf_counter()
        while self.share < 1 and not stop():
            start = time.perf_counter()
            bits, lr = self._train_one()
            self.training_seconds += time.perf_counter() - start
            due = self.step % self.config.evaluate_every == 0 or self.config.steps == self.step
            held_out = self.held_out_bits() if due else None
            now = time.perf_counter()
            self.seconds, last = self.seconds + now - last, now  # whoever watches is on the clock too
            yield self._log(bits, lr, held_out)
            if self.step % self.config.save_every == 0:
                saved = self._save()
        if saved != self.step:
            self._save()

    def held_out_bits(self) -> float:
        """Bits per byte on the held-out rows."""
        return bits_per_byte(self.model, self.test_rows, self.mask, self.config.batch)

    def _train_one(self) -> tuple[float, float]:
        lr = self.config.lr * schedule(self.step, self.config.warmup, self.share)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        loss = batch_loss(self.model, self.rows.next(), self.mask)
        bits = float(loss.detach()) / math.log(2)
        if not math.isfinite(bits):
            raise TrainError(f"the loss is {bits} at step {self.step + 1}; try a smaller --lr than {self.config.lr}")
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.step += 1
        self.tokens += self.config.batch * self.config.length
        return bits, lr

    def _log(self, bits: float, lr: float, held_out: float | None) -> Step:
        speed = self.tokens / max(self.training_seconds, 1e-9)
        step = Step(self.step, self.share, bits, lr, self.tokens, self.seconds, speed, held_out)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with (self.folder / LOG_NAME).open("a") as file:
                file.write(json.dumps(step.__dict__) + "\n")
        return step

    def _save(self) -> int:
        if self.folder is not None:
            state = {
                "data": self.rows.state,
                "corpus": self.corpus.digest,
                "tokens": self.tokens,
                "seconds": self.seconds,
                "training_seconds": self.training_seconds,
            }
            save_checkpoint(self.folder, self.step, self.config, self.model, self.optimizer, state)
        return self.step

    def _restore(self, state: dict[str, Any]) -> None:
        self.rows.restore(state["data"])
        self.step, self.tokens = int(state["step"]), int(state["tokens"])
        self.seconds, self.training_seconds = float(state["seconds"]), float(state["training_seconds"])
        _forget_after(self.folder, self.step)


def schedule(step: int, warmup: int, share: float) -> float:
    """The learning rate's factor: up in a straight line, down along a cosine to a twentieth.

    The way up takes `warmup` steps, or a tenth of the run where that is shorter.

    >>> [round(schedule(step, 2, step / 4), 2) for step in range(4)]
    [0.5, 0.86, 0.53, 0.19]
    """
    cosine = MIN_RATE_SHARE + (1 - MIN_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * share))
    return min(1.0, max((step + 1) / warmup, share / RISE_SHARE)) * cosine


def _optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW; matrices decay, gains and biases do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)


def _forget_after(folder: Path | None, step: int) -> None:
    """Drop the log's lines beyond the step that a run goes on from."""
    if folder is None or not (folder / LOG_NAME).is_file():
        return
    lines = (folder / LOG_NAME).read_text().splitlines(keepends=True)
    earlier = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    fresh = folder / f".{LOG_NAME}"
    fresh.write_text("".join(earlier))
    fresh.replace(folder / LOG_NAME)
