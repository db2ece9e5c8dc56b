"""The words of the language: each says of a cell, by itself, whether the query may attend to the key.

Nouns: a *band* (between two diagonals or block borders), a *pattern* (repeats or is drawn), *data along an axis*
(flags, labels) or over both (dense, block patterns, trees). Nothing that combines masks comes in: that is `compose`.
The words: docs/internals/glossary.md.
"""
