"""The portable sparse backend: strips of rows with the keys that they may see, run by torch's own operators.

Nouns: a *strip* (neighbouring rows with their intervals of keys), a *batch of strips* (of one shape, run in one
call), an *interleaving* (sinks before a moving window, without copies). Nothing that other backends use comes in:
that is `shared`. The words: docs/internals/glossary.md.
"""
