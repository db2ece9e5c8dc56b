"""What a mask is: `Mask`, its equality, its questions, and how its exact form and tiles follow from its parts.

Nouns: a *part* (a number, `Data` or a mask that a mask is made of), *data* (an immutable, hashable tensor), a
*handle* (a number that stands for a mask in a compiled graph). No single kind of mask comes in: those are in `leaves`
and `compose`. The words: docs/internals/glossary.md.
"""
