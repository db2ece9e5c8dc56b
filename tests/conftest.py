"""One thread, or `TEST_THREADS`; Hypothesis draws the same examples every time: a red test is red for everybody.

`HYPOTHESIS_PROFILE=deep` draws anew and five times as much, for a look beyond what CI sees.
"""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(int(os.environ.get("TEST_THREADS", "1")))
os.environ["TRUEMASK_COSTS"] = "avx2"  # plans are the same on every machine

SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile(
    "fast", max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=SLOW_IS_FINE
)
settings.register_profile("deep", max_examples=300, deadline=None, suppress_health_check=SLOW_IS_FINE)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fast"))
