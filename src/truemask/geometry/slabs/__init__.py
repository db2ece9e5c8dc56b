"""The exact form of a mask: which cells it lets through, as few affine runs instead of cells.

Nouns: a *line* (numbers that go on in equal steps), a *slab* (rows whose runs of keys begin and end on lines), a
*normal form* (one order of unions and intersections, so that one meaning is worked out once). Nothing that knows what
a mask is comes in. The words: docs/internals/glossary.md.
"""
