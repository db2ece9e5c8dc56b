"""transformers models under any mask: which layers attend, what the model's own mask is, how both meet.

Nouns: a *layer* (a module that attends), the *model's mask* (what transformers would have masked, as an expression),
a *switch* (our attention in, and out again), a *forward context* (what the layers of one forward share). The files are
called as in `interop.x_transformers`. The words: docs/internals/glossary.md.
"""
