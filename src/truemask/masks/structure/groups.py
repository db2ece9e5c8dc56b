"""The kinds of masks in groups, for answers that several of them share.

A group is a convenience for those who register: a kind that stands in one shares all answers of the group, so a new
kind is added to a group only if each of them holds for it.
"""

from __future__ import annotations

from truemask.masks.compose.boolean import And, Everything, Minus, Not, Nothing, Or, Xor
from truemask.masks.compose.packed import Packed, Padded, Prepended
from truemask.masks.compose.per_axis import PerHead, PerSample, Select
from truemask.masks.compose.reindex import At, Take, Transposed
from truemask.masks.leaves.bands import Blocks, Causal, Local, Window
from truemask.masks.leaves.documents import Documents, Same
from truemask.masks.leaves.matrices import BlockPattern, Dense
from truemask.masks.leaves.patterns import Dilated, Grid, Random, Strided
from truemask.masks.leaves.per_token import GlobalTokens, Keys, Padding, Prefix, Queries
from truemask.masks.leaves.predicate import Predicate
from truemask.masks.leaves.tree import Tree

CONSTANTS = (Everything, Nothing)

BOOLEAN = (And, Or, Xor, Minus, Not)  # each cell follows from the same cell of the parts
PER_AXIS = (PerHead, PerSample)
REINDEXED = (At, Take, Transposed)
LAID_OUT = (Packed, Padded, Prepended)  # rows with more in them than the part counts
COMPOSED = (*BOOLEAN, *PER_AXIS, Select, *REINDEXED, *LAID_OUT)

BACKWARD = (Causal, Window)
DISTANCES = (Local, Dilated)
PLACES = (Blocks, Strided, Grid, Prefix, GlobalTokens, BlockPattern)  # they count from the start of the row
FLAGS = (Keys, Queries)
LABELS = (Documents, Same)
CELLS = (Dense, Predicate)  # they do not say why they hide a pair
LEAVES = (*BACKWARD, *DISTANCES, *PLACES, Random, Padding, *FLAGS, *LABELS, Tree, *CELLS)
