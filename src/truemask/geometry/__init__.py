"""Arrays only: three-valued logic, ranges and edges; on top of them `slabs` (exact) and `tiles` (from afar).

Nouns: *Kleene's logic* (EMPTY, MIXED, FULL), a *range* of a table, an *edge* of a run. Nothing here knows what a mask
is. The words: docs/internals/glossary.md.
"""
