"""What several backends compute alike: eager attention, masked products, dropout, the NaN guard, the autograd frame.

Nouns: a *kernel* (fast, and held to the laws by `containment`), a *chunk* of rows, the *implementation* of attention
with a backward of its own. No backend comes in, and nothing here chooses one. The words: docs/internals/glossary.md.
"""
