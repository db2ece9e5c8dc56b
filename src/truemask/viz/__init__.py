"""Pictures of masks of any size, in text and as SVG.

Nouns: a *panel* (one sample and head), *shares* (how much of a square of cells is let through). Whatever has tiles
can be drawn: no class of mask comes in. Files and matplotlib figures are in `masks.formats.figures`. The words:
docs/internals/glossary.md.
"""
