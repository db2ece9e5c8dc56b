"""What `diagnose` looks for, one file for each kind of mistake: each rule asks the context and yields findings.

Nouns: the *context* (a mask, its lengths, what it is meant to be), a *rule* (a function of it), a *finding*. Nothing
that looks at a model comes in: that is `auditing`. The words: docs/internals/glossary.md.
"""
