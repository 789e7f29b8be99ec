"""Commands that are still declared with typer, as a group of the one command line."""

from __future__ import annotations

from typing import Annotated

import typer
from cyclopts import App, Parameter


def bridge(commands: typer.Typer, name: str) -> App:
    """A group that hands its command line on as it is."""
    app = App(name=name, help_flags=(), version_flags=())

    @app.default
    def _hand_on(*tokens: Annotated[str, Parameter(allow_leading_hyphen=True, parse=True)]) -> None:
        commands(args=list(tokens), prog_name=f"xfm-fast {name}")

    return app
