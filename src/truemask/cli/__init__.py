"""The command line: `truemask tour`, `show`, `explain`, `train` and `generate`."""

from truemask.cli.app import main as main
