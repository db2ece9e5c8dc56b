"""The native CPU kernel of `csrc/`: the library for this processor, its structure, and one call of it.

Nouns: an *instruction set* (`TRUEMASK_ISA`), the *call* (a structure filled from tensors that stay in place), a
*tile* of 64 x 64. The words: docs/internals/glossary.md.
"""
