"""The language of masks: expressions without size or tensor, each of which answers `truth` and `tile`."""

# What the operators and methods of every mask make (building.py), whichever of its files is imported first.
import truemask.masks.choice
import truemask.masks.combine
import truemask.masks.packing
import truemask.masks.reindex  # noqa: F401
