"""What backends declare: in words that exist, for every option, and what is not declared is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from truemask.backends.backend import ANY_DEVICE, BIASES, Backend, Capabilities
from truemask.backends.base import OPTIONS, Request
from truemask.backends.registry import BACKENDS
from truemask.backends.sdpa import Sdpa

ASKED: dict[str, Any] = dict.fromkeys(OPTIONS, True) | {"bias": "object", "transform": "vmap or torch.func"}
DEVICES = ("cpu", "cuda", "mps")


def request(device: str = "cpu", dtype: torch.dtype = torch.float32, **options: Any) -> Request:
    return Request(1, 1, 1, 65, 65, 16, 16, dtype, torch.device(device), **options)


def able(backend: Backend, device: str) -> Capabilities | None:
    return backend.devices.get(device) or backend.devices.get(ANY_DEVICE)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_what_is_declared_are_names_of_the_request(backend: Backend) -> None:
    for capabilities in backend.devices.values():
        assert capabilities.options <= set(OPTIONS)
        assert capabilities.biases <= BIASES
        assert capabilities.dtypes is None or capabilities.dtypes <= set(backend.tolerance)
    assert set(backend.words) <= {"device", "dtype", *OPTIONS}


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
@pytest.mark.parametrize("device", DEVICES)
def test_a_backend_has_words_for_all_that_it_lacks_and_for_nothing_else(backend: Backend, device: str) -> None:
    """One option at a time: refused, in words of its own, or honoured."""
    bare = set(backend.lacking(request(device)))
    assert bool(able(backend, device)) or bare
    for name in OPTIONS:
        reasons = set(backend.lacking(request(device, **{name: ASKED[name]}))) - bare
        declared = able(backend, device) or backend.devices["cpu"]
        lacks = name not in declared.options or (name == "bias" and "object" not in declared.biases)
        assert len(reasons) == lacks, name
        assert not any("the backend" in reason for reason in reasons), f"{backend.name} has no words for {name}"


def test_an_option_that_nobody_has_heard_of_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sdpa, "words", {})
    assert Sdpa().lacking(request(softcap=True)) == ["softcap: the backend 'sdpa' has none"]


def test_objections_come_in_the_order_in_which_they_are_declared() -> None:
    options = {name: ASKED[name] for name in OPTIONS}
    reasons = Sdpa().lacking(request("cuda", **options))
    assert [reason.split(":")[0] for reason in reasons] == [
        "softcap",
        "dropout",
        "return_weights",
        "the gradient of a bias",
        "vmap or torch.func",
        "return_lse",
        "sink_logits",
    ]
