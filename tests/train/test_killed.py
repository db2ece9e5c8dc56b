"""A run that is killed at any moment, again and again, ends as one that was left alone, bit for bit.

Each life is a process of its own, which SIGKILL ends at a random moment: while it starts, in a step, in the middle of
a checkpoint. The next goes on from the newest complete checkpoint, or begins anew where there is none yet. By default
there are a few deaths; `TRUEMASK_KILLS=50 python -m pytest tests/train/test_killed.py` has as many as it says.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from tests.train.conftest import folder as folder
from truemask.cli.app import app
from truemask.train.checkpoint import checkpoints

KILLS = int(os.environ.get("TRUEMASK_KILLS", "8"))
STEPS = 20 * (KILLS + 1)
SIZE = ["--length", "31", "--dim", "16", "--depth", "1", "--heads", "2", "--batch", "3"]
OFTEN = ["--save-every", "3", "--evaluate-every", "50"]
SLOW_TO_IMPORT = [
    "truemask.cli.commands.train",
    "torch._dynamo",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
]
STARTING, STEP = 0.5, 0.02  # seconds; about what a life takes to begin, and a few steps with a checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL"),
]


def train(arguments: list[str]) -> None:
    """One life, in a process of its own: `truemask train`."""
    torch.set_num_threads(1)  # quicker for numbers as small as these
    result = CliRunner().invoke(app, ["train", *arguments])
    raise SystemExit(result.exit_code)


def life(text: Path, out: Path) -> ForkServerProcess:
    """The next one: on from the newest checkpoint, or from nothing. Its server has read modules and run nothing."""
    if checkpoints(out):
        arguments = ["--resume", str(out)]
    else:
        shutil.rmtree(out, ignore_errors=True)
        arguments = ["--data", str(text), "--out", str(out), "--steps", str(STEPS), *SIZE, *OFTEN]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, *SLOW_TO_IMPORT])
    process = context.Process(target=train, args=(arguments,))
    process.start()
    return process


def last_step(out: Path) -> int:
    """Of the log; 0 while there is none."""
    log = out / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.is_file() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def kill(process: ForkServerProcess, out: Path, step: int | None, chance: random.Random) -> None:
    """At a random moment of its beginning, or about when it has done a step."""
    while step is not None and process.is_alive() and last_step(out) < step:
        time.sleep(0.001)
    time.sleep(chance.uniform(0, STARTING if step is None else STEP))
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL, "it was over before"
    assert step is None or last_step(out) >= step


def results(out: Path) -> tuple[list[tuple[Any, ...]], dict[str, bytes]]:
    """Of each step its loss, rate and test; the last weights and the optimizer's state, as they lie on the disk."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    steps = [(line["step"], line["bits"], line["lr"], line["tokens"], line["held_out"]) for line in lines]
    return steps, {name: (checkpoints(out)[-1] / f"{name}.safetensors").read_bytes() for name in ("model", "optimizer")}


def test_a_killed_run_ends_as_one_that_was_left_alone(folder: Path, tmp_path: Path) -> None:
    chance = random.Random(16)
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    undisturbed = life(folder, alone)
    for death in range(KILLS):  # every fourth life ends while it starts, the others get farther than the one before
        step = None if death % 4 == 3 else last_step(killed) + chance.randint(1, 10)
        kill(life(folder, killed), killed, step, chance)
    for process, out in ((undisturbed, alone), (life(folder, killed), killed)):
        process.join(120)
        assert process.exitcode == 0
        assert last_step(out) == STEPS
    assert results(killed) == results(alone)
