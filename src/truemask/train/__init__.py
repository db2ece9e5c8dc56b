"""Training on bytes of real text: rows of packed documents, checkpoints, a loop. Used by the command line only.

Nouns: a *corpus* (files as documents), a *run* (a folder with its choices and checkpoints), a *row* of packed
documents. The words: docs/internals/glossary.md.
"""
