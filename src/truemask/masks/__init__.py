"""The language of masks: expressions without size or tensor, each of which answers `truth` and `tile`.

Shelves: `core` (what a mask is), `compose` (masks of masks), `leaves` (the words), `formats` (text, files), `foreign`.
Pickles of masks name `restore` and `restore_data` here, and nothing else of the package. The words:
docs/internals/glossary.md.
"""

# What the operators and methods of every mask make (core/construction.py), whichever of its files is imported first.
import truemask.masks.compose.boolean
import truemask.masks.compose.packed
import truemask.masks.compose.per_axis
import truemask.masks.compose.reindex  # noqa: F401
from truemask.masks.core.data import restore_data as restore_data
from truemask.masks.core.kinds import restore as restore
