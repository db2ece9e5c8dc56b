"""Language models that somebody trained, ours or others': opened by name, asked to write, judged by a text.

Used by the command line only. Nouns: a *text model* (weights and what turns text into tokens), a *reader* (takes a
text piece by piece into a cache). The words: docs/internals/glossary.md.
"""
