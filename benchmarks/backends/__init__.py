"""Backends of the model: xfm-fast, the official algorithm and code, public libraries, runtimes of exports."""
