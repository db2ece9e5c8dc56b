"""Masks as text and as files, and what callers may pass where a mask is taken.

Nouns: an *expression* (text that `parse` reads and `repr` writes), a *mask file* (safetensors with the expression in
its header). Conventions of other libraries do not come in: those are in `foreign`. The words:
docs/internals/glossary.md.
"""
