"""X-FM, a foundation model of text and images, exact and fast, and an engine that accelerates other encoders.

Public names are imported on first use, so the command line answers before PyTorch is loaded.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xfm_fast import graphs as graphs
    from xfm_fast.config import XFMConfig as XFMConfig
    from xfm_fast.finetuning.prediction import load as load
    from xfm_fast.models.xfm import XFM as XFM
    from xfm_fast.replace import accelerate as accelerate
    from xfm_fast.replace import accelerated as accelerated
    from xfm_fast.replace import register_attention as register_attention
    from xfm_fast.tasks.retrieval import Retriever as Retriever

__version__ = "0.1.0"

# A link in a checkout, a folder in an installation.
if find_spec(f"{__name__}.kernels") is None:
    raise ImportError(
        f"{__file__}: the links to kernels, export and benchmarks are missing; run pip install --editable ."
    )

_HOMES = {
    "XFM": "xfm_fast.models.xfm",
    "XFMConfig": "xfm_fast.config",
    "load": "xfm_fast.finetuning.prediction",
    "Retriever": "xfm_fast.tasks.retrieval",
    "accelerate": "xfm_fast.replace",
    "accelerated": "xfm_fast.replace",
    "register_attention": "xfm_fast.replace",
}

__all__ = [
    "XFM",
    "Retriever",
    "XFMConfig",
    "__version__",
    "accelerate",
    "accelerated",
    "graphs",
    "load",
    "register_attention",
]


def __getattr__(name: str) -> Any:
    if name == "graphs":
        return import_module("xfm_fast.graphs")
    if name not in _HOMES:
        raise AttributeError(f"module 'xfm_fast' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_AUTO_CONFIG = "transformers.models.auto.configuration_auto"


def _register(module: Any) -> None:
    from xfm_fast.models.auto import XFMAutoConfig

    module.AutoConfig.register(XFMAutoConfig.model_type, XFMAutoConfig, exist_ok=True)


class _AutoConfigHook:
    """Finder that registers X-FM with transformers when its `AutoConfig` is imported."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        spec: Any = PathFinder.find_spec(fullname, path) if fullname == _AUTO_CONFIG else None
        if spec is not None:
            execute = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (execute(module), _register(module))
        return spec


if _AUTO_CONFIG in sys.modules:
    _register(import_module(_AUTO_CONFIG))
sys.meta_path.insert(0, _AutoConfigHook())
