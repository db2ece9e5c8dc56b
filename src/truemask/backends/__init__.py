"""Who computes attention: `backend` is the contract, `base` its words and laws; no backend imports another.

Nouns: a *backend* (runs a call, or says in words why not), a *job* (what it is asked to run, without the values),
what is *lowered* (prepared once for a job). `registry` lists them in the order in which a plan shows them; a backend
of several files has a folder. The words: docs/internals/glossary.md.
"""
