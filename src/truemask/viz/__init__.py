"""Pictures of masks of any size, in text, as SVG and as PNG.

Nouns: a *panel* (one sample and head), *shares* (how much of a square of cells is let through). Whatever has tiles
can be drawn: no class of mask comes in, but in `plot`, which reads text and stands above masks. The words:
docs/internals/glossary.md.
"""
