"""The command as a whole: its help needs no torch, and says of each subcommand what its function says."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from truemask.cli.app import COMMANDS, app, function_of

MODULES = "import sys; from truemask.cli.app import app\ntry: app({arguments})\nfinally: print(*sys.modules)"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], []])
def test_help_and_version_import_no_torch(arguments: list[str]) -> None:
    program = MODULES.format(arguments=arguments)
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    modules = {name.split(".")[0] for name in result.stdout.splitlines()[-1].split()}
    assert "truemask" in modules
    assert modules.isdisjoint({"torch", "numpy", "matplotlib", "transformers"})


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_says_what_the_command_itself_says(command: str) -> None:
    first = (inspect.getdoc(function_of(command)) or "").split("\n\n")[0].replace("\n", " ")
    assert COMMANDS[command] == first


def test_a_mistyped_command_names_the_nearest() -> None:
    result = CliRunner().invoke(app, ["shw", "causal"])
    assert result.exit_code == 2
    assert "Did you mean 'show'?" in result.output
