"""Speculation: cheap guesses of what comes next, all of them checked in one forward.

Nouns: a *draft* (a tree of guessed tokens behind the one that was chosen last), a *drafter* (who makes them), a
*reader* (a model that reads drafts and keeps what was right), *places* (where the keys of each sample lie),
*accepted* (guesses that are what the model chose). The caches of transformers do not come in: that is `interop`. The
words: docs/internals/glossary.md.
"""
