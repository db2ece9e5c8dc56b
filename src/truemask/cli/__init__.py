"""The command line: `truemask tour`, `show`, `explain`, `check`, `audit`, `train`, `generate`,
`perplexity`, `bench` and `doctor`.

Nouns: a *command* (one file in `commands`, or a folder), a *console* (how it prints). What others could call does not
come in: a command asks the library and prints. The words: docs/internals/glossary.md.
"""

from truemask.cli.app import main as main
