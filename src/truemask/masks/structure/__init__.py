"""What may be asked about an expression: open functions, to each of which every kind of mask has an answer.

Nouns: an *open function* (a question with an answer registered for each kind of mask, and none by default), a *kind*
(a class of masks), a *part* (a mask within a mask). Whoever has to know how a mask is made asks here and never for its
class; a new kind of mask registers its answers here (`diagnosis` has three questions of its own), and
tests/masks/structure names those that it still owes. Cells, counts and tiles do not come in: those
a mask answers itself. The words: docs/internals/glossary.md.
"""
