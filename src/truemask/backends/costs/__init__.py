"""What the backends cost: rates that were measured, and the seconds that follow from them.

Nouns: a *rate* (seconds for one unit of work), a *table* (the rates of one processor, shipped or calibrated), a
*prediction*. Nothing that measures comes in: that is `benchmarking`. The words: docs/internals/glossary.md.
"""
