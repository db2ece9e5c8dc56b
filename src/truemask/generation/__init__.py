"""Generation: the key/value cache, sampling, and the autoregressive wrapper. The public names are in `truemask`.

Nouns: a *prompt* (tokens to go on from), a *cache* (keys and values of what was read), a *step* (one token for each
sample). How models of other libraries generate does not come in: that is `interop`. The words:
docs/internals/glossary.md.
"""
