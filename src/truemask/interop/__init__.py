"""Models of other libraries, with this library's masks and attention: `tm.use` and `tm.enable`.

Nouns: a *use* (a model, its masks, from one line to another), a *scope* (where a use holds: a context, or
everywhere), a *layer* (what attends in a model). What only one library needs is in its folder; six files
have the same names in both. The words: docs/internals/glossary.md.
"""
