"""Packing: many sequences in few rows, so that nothing is computed for padding, and no token reads another sequence.

Nouns: a *sample*, a *row* (several samples behind each other), a *tree* (a prompt with its completions beside each
other). What masks such rows does not come in: that is `Mask.packed` and `tree`. The words:
docs/internals/glossary.md.
"""
