"""Who runs a call, why, and what is kept for the next one like it (law 8).

Nouns: a *proposal* (a backend's price and how it would run), the *selection* (the cheapest willing one), the *plan
cache*. Nothing that depends on the values of q, k and v comes in. The words: docs/internals/glossary.md.
"""
