"""Engines of TensorRT and of TensorRT for RTX: the libraries, the shapes and the build."""

from .build import BuiltEngine, build_engine, build_engines, check_engine_file, export_engines

__all__ = ["BuiltEngine", "build_engine", "build_engines", "check_engine_file", "export_engines"]
