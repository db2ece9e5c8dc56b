"""Masks made of masks: `&`, `|`, `^`, `-`, `~`, re-indexing, packing and padding, one mask for each head or sample.

Nouns: a *child* (a mask inside another), an *axis* (samples or heads), a *segment* (the rows and keys of one packed
sample). Nothing that holds positions or data of its own comes in: that is a leaf. The words:
docs/internals/glossary.md.
"""
