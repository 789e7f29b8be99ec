"""The command line, `xfm-fast`."""

from xfm_fast.cli.app import main

__all__ = ["main"]
