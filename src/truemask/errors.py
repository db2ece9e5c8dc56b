"""What goes wrong: the exceptions and the warning that this library raises on purpose."""

from __future__ import annotations


class TruemaskError(Exception):
    """The base of every error that this library raises on purpose."""


class MaskError(TruemaskError, ValueError):
    """A mask that cannot mean what was asked: a bad argument, a wrong shape, or a question beyond its data."""


class PlanError(TruemaskError, ValueError):
    """No backend can run the call; the message lists the reasons of every one of them."""


class ConventionWarning(UserWarning):
    """The call is legal and does what it says, and what it says is probably not what was meant."""
