"""x-transformers models under any mask: which attention they have, what a call of it hides, how both meet.

Nouns: a *layer* (an `Attention`), the *model's mask* (as an expression), a *switch* (our attention in, and out
again). The files are called as in `interop.huggingface`. The words: docs/internals/glossary.md.
"""
