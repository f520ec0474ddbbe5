# SPDX-License-Identifier: Apache-2.0
"""The command line tells errors in one line and starts timed commands with a wait policy."""

import sys
import types

import pytest

from l0kernels import cli
from l0kernels._version import __version__


@pytest.fixture
def failing_command(monkeypatch):
    """A command whose run raises what the test puts into `failing_command.error`."""
    module = types.ModuleType("failing")

    def run(args):
        raise module.error

    module.add_arguments = lambda parser: parser.add_argument("--size", type=int)
    module.run = run
    monkeypatch.setitem(sys.modules, "failing", module)
    monkeypatch.setitem(cli.COMMANDS, "fail", ("failing", "fail"))
    return module


@pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, FileNotFoundError])
def test_bad_input_is_one_line_and_exit_code_2(failing_command, capsys, kind):
    failing_command.error = kind("expected 3 classes,\n got 4")
    assert cli.main(["fail", "--size", "3"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "l0kernels: expected 3 classes, got 4\n"
    assert captured.out == ""


def test_debug_shows_the_traceback(failing_command):
    failing_command.error = ValueError("expected 3 classes, got 4")
    with pytest.raises(ValueError, match="got 4"):
        cli.main(["fail", "--debug"])


def test_a_defect_is_not_told_as_bad_input(failing_command):
    failing_command.error = KeyError("weight")
    with pytest.raises(KeyError):
        cli.main(["fail"])


def test_ctrl_c_ends_without_a_traceback(failing_command, capsys):
    failing_command.error = KeyboardInterrupt()
    assert cli.main(["fail"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["nonsense"], ["info", "--nonsense"]])
def test_unknown_words_exit_with_code_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    assert "usage: l0kernels" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"l0kernels {__version__}\n"


@pytest.mark.parametrize("command", ["train", "bench"])
def test_commands_explain_themselves(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: l0kernels {command}" in capsys.readouterr().out


POLICY = """
import os, sys
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("MALLOC_MMAP_MAX_"), flush=True)
from l0kernels import cli
sys.argv = ["l0kernels", sys.argv[1]]
cli._settle_environment(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "before", "seen"),
    [
        ("bench", None, "None None\npassive 0\n"),
        ("train", None, "None None\npassive None\n"),
        ("bench", "active", "active None\nactive 0\n"),
        ("train", "active", "active None\n"),
        ("info", None, "None None\n"),
    ],
)
def test_timed_commands_start_with_what_they_are_timed_with(python, command, before, seen):
    done = python("-c", POLICY, command, OMP_WAIT_POLICY=before, MALLOC_MMAP_MAX_=None)
    assert done.stdout == seen, done.stderr
