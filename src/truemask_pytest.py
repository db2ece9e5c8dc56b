"""A pytest plugin for any project with models: the fixture `assert_no_leak`, which fails with the report as its text.

    def test_my_model_does_not_see_the_future(assert_no_leak):
        assert_no_leak(MyModel().eval(), torch.randint(100, (2, 12)), mask="causal")

pytest finds it where truemask is installed; `-p no:truemask` leaves it out. It stands outside of the package, so that a
test run that does not ask for the fixture imports neither torch nor truemask.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="session")
def assert_no_leak() -> Callable[..., Any]:
    """`truemask.assert_no_leak(model, batch, mask=None, ...)`: fails if an output depends on what its mask hides."""
    import truemask

    return truemask.assert_no_leak
