"""Masks seen from afar: squares of cells that are EMPTY, FULL or MIXED.

Nouns: a *tile* (a square of cells), a *tile map* (the state of every tile, kept as runs), a *quadtree* (large squares
first, smaller ones where they are MIXED). Nothing that knows what a mask is comes in; who evaluates the cells of a
MIXED tile is given. The words: docs/internals/glossary.md.
"""
