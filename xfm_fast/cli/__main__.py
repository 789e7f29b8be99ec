"""`python -m xfm_fast.cli`, for torchrun."""

from xfm_fast.cli import main

if __name__ == "__main__":
    main()
