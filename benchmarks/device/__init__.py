"""The first hour on a GPU in one command: everything measured within a budget, each row kept as soon as it is there.

    python3 -m xfm_fast.benchmarks.device --budget 540 --out DIR

The program itself needs the standard library alone. Its stages are processes of their own with limits of their own, so
that one that hangs, dies or lacks a package is a row that says so, and the next one begins.
"""
