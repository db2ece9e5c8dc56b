"""Checkpoints: one folder each, written under another name and renamed when complete, without pickle.

runs/NAME/
  log.jsonl            a line per step
  mask.png             (or mask.svg where matplotlib is missing)
  step-00000500/       config.json, model.safetensors, optimizer.safetensors, state.json
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from truemask.common.formatting import suggest
from truemask.train.config import TrainConfig, TrainError

PREFIX, UNFINISHED = "step-", ".unfinished-"
RNG = "torch.rng"  # the name of the generator's state among the optimizer's tensors


@dataclass(frozen=True)
class Checkpoint:
    """What was read from one complete checkpoint."""

    path: Path
    config: TrainConfig
    state: dict[str, Any]


def save_checkpoint(
    run: Path, step: int, config: TrainConfig, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]
) -> Path:
    """Write a checkpoint; a crash at any moment leaves either all of it or nothing that `checkpoints` lists."""
    final = run / f"{PREFIX}{step:08d}"
    unfinished = run / f"{UNFINISHED}{final.name}-{os.getpid()}"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    _write(unfinished / "config.json", _json(config.to_json()))
    _write(unfinished / "model.safetensors", save(_model_tensors(model)))
    _write(unfinished / "optimizer.safetensors", save(_optimizer_tensors(model, optimizer)))
    _write(unfinished / "state.json", _json({**state, "step": step}))
    if final.exists():
        shutil.rmtree(final)
    unfinished.rename(final)
    for old in checkpoints(run)[: -config.keep]:
        shutil.rmtree(old)
    return final


def checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(path for path in run.glob(f"{PREFIX}*") if (path / "state.json").is_file())


def read_checkpoint(where: str | Path) -> Checkpoint:
    """The newest complete checkpoint of a run folder, or exactly the one that is named.

    Raises:
        TrainError: there is no such run (the message lists those there are), or it has no complete checkpoint.
    """
    path = Path(where)
    if not (path / "state.json").is_file():
        folders = checkpoints(path)
        if not folders:
            raise TrainError(_no_checkpoint(path))
        path = folders[-1]
    config = TrainConfig.from_json(json.loads((path / "config.json").read_text()))
    return Checkpoint(path, config, json.loads((path / "state.json").read_text()))


def load_model(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Copy the checkpoint's numbers into a model of the same configuration."""
    targets = _model_tensors(model)
    stored = _read_tensors(checkpoint.path / "model.safetensors")
    if stored.keys() != targets.keys():
        names = sorted(stored.keys() ^ targets.keys())
        raise TrainError(f"{checkpoint.path} does not fit this version's model; they differ in {', '.join(names[:5])}")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(stored[name])


def load_optimizer(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restore the optimizer's state and torch's generator."""
    stored = _read_tensors(checkpoint.path / "optimizer.safetensors")
    torch.set_rng_state(stored.pop(RNG))
    parameters = dict(model.named_parameters())
    for key, tensor in stored.items():
        name, _, field = key.rpartition("/")
        optimizer.state[parameters[name]][field] = tensor.clone()  # its own aligned memory


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, each shared tensor once (tied weights are one tensor under one name)."""
    tensors: dict[str, Tensor] = {name: parameter.data for name, parameter in model.named_parameters()}
    stored = model.state_dict().keys()
    tensors.update({name: buffer for name, buffer in model.named_buffers() if name in stored})
    return {name: tensor.contiguous() if not tensor.is_contiguous() else tensor for name, tensor in tensors.items()}


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {RNG: torch.get_rng_state()}
    for name, parameter in model.named_parameters():
        for field, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{field}"] = value
    return tensors


def _read_tensors(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _json(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, indent=2) + "\n").encode()


def _no_checkpoint(path: Path) -> str:
    siblings = path.parent.iterdir() if path.parent.is_dir() else ()
    runs = sorted(other.name for other in siblings if other.is_dir() and checkpoints(other))
    listing = f"runs in {path.parent}: {', '.join(runs)}" if runs else f"{path.parent} holds no runs"
    if not path.is_dir():
        return f"there is no run {path}{suggest(path.name, runs)}; {listing}; `truemask train` makes one"
    return f"{path} holds no complete checkpoint (an unfinished one is never read); {listing}"
