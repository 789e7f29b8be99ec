"""A command line run in this process."""

from __future__ import annotations

import io
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass

from xfm_fast.cli.app import main


@dataclass(frozen=True)
class Done:
    exit_code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr


def invoke(arguments: Sequence[object]) -> Done:
    """What `xfm-fast ARGUMENTS` prints and its exit code; an error that is a bug comes through."""
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = None
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    return Done(
        code if isinstance(code, int) else 0 if code is None else 1,
        stdout.getvalue(),
        stderr.getvalue(),
    )
