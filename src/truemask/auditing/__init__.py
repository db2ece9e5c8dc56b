"""The audit: what each output of a model really depends on, seen from outside, beside what its mask promises.

Nouns: a *subject* (the model under audit), a *probe* (an input changed, an output watched), an *expected mask* (what
it is held to). No knowledge of how a library masks comes in, but as a second opinion beside what is seen. The words:
docs/internals/glossary.md.
"""
