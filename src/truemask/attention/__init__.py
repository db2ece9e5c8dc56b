"""`attend` and all of its way: the call checked, planned, lowered once, run by a backend; eager, compiled and exported.

Nouns: the *call* (checked arguments and the mask), the *plan* (which backend, and why), what is *lowered* (prepared
once for a plan, used in every call). No arithmetic comes in: that is a backend's. The words:
docs/internals/glossary.md.
"""
