"""One thread, or `TEST_THREADS`; Hypothesis draws the same examples every time: a red test is red for everybody.

`HYPOTHESIS_PROFILE=deep` draws anew and five times as much, for a look beyond what CI sees.
"""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from truemask.backends.native.library import missing

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
os.environ["TRUEMASK_COSTS"] = "avx2"  # plans are the same on every machine

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "fast", max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=SLOW_IS_FINE
)
settings.register_profile("deep", max_examples=300, deadline=None, suppress_health_check=SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is no native kernel, tests that are given its name are skipped; the rest holds without it."""
    if not missing():
        return
    no_kernel = pytest.mark.skip(reason=f"the move is whoever installs a C++ compiler: {missing()}")
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            given = [
                x for value in item.callspec.params.values() for x in (value if isinstance(value, tuple) else [value])
            ]
            if any(isinstance(x, str) and x == "native" for x in given):
                item.add_marker(no_kernel)
