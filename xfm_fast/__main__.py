"""`python -m xfm_fast`, the same as `python -m xfm_fast.cli`."""

from runpy import run_module

if __name__ == "__main__":
    run_module("xfm_fast.cli", run_name="__main__")
