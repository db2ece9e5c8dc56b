"""Speculation: cheap guesses of what comes next, all of them checked in one forward.

Nouns: a *draft* (a tree of guessed tokens behind the one that was chosen last), a *drafter* (who makes them), a *reader*
(a model that reads drafts and keeps what turned out right), *places* (where the keys of each sample lie), *accepted* (the
guesses that were what the model chose). What transformers' caches look like does not come in: that is `interop`. The
words: docs/internals/glossary.md.
"""
