"""The command line, `xfm-fast`."""

import sys

from xfm_fast.errors import UnavailableError, needs

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        with needs("cli"):
            from xfm_fast.cli.app import main as run
    except UnavailableError as error:
        sys.exit(f"error: {error}")
    run()
