"""Understanding a mask: what is likely wrong with it, why a cell is as it is, and what layers of it let through.

Nouns: a *finding*, a *witness* (a cell that shows it), a *reach* (what can influence a position through all layers).
Nothing that runs a model comes in: that is `auditing`. The words: docs/internals/glossary.md.
"""
