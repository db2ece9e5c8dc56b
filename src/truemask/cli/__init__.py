"""The command line: `truemask tour`, `show`, `explain`, `train`, `generate`, `bench` and `doctor`."""

from truemask.cli.app import main as main
