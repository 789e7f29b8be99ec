"""The official code from a user's clone, in a process that stays and answers requests one after another.

The clone needs its own process: its top-level modules are called `models` and `utils`, it prints during construction,
and it was written for the libraries of 2021, so that it gets stand-ins for imports that evaluation does not use and for
functions that newer libraries lack. The clone stays unchanged. Tensors pass a pipe as safetensors; that takes
some milliseconds, where the official model takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import json
import multiprocessing
import os
import sys
import tempfile
import types
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM

from . import Engine, Pairs, score_together, search_images
from .public_modules import beit_settings, roberta_settings

CLONE_MARK = "models/xfm.py"
_TRANSFORMERS_HELPERS = (
    "apply_chunking_to_forward",
    "find_pruneable_heads_and_indices",
    "prune_linear_layer",
)
_DOCUMENTATION = (
    "add_code_sample_docstrings",
    "add_start_docstrings",
    "add_start_docstrings_to_model_forward",
    "replace_return_docstrings",
)


def official_code_engine(model: XFM, clone: Path) -> Engine:
    """Return the clone's retrieval model with our weights; raises `UnavailableError` if its code does not run here."""
    process = _Process(model.config, clone)
    process.ask("weights", **model.state_dict())

    def embed_texts(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return process.ask("embed-text", ids=input_ids, mask=attention_mask)

    def rerank(pairs: Pairs) -> Tensor:
        return process.ask("rerank", **pairs._asdict())

    return Engine(
        embed_images=lambda pixels: process.ask("embed-image", pixels=pixels),
        embed_texts=embed_texts,
        rerank=rerank,
        search=partial(search_images, model, embed_texts, partial(score_together, rerank)),
    )


class _Process:
    """The process of a clone, which ends with this object."""

    def __init__(self, config: XFMConfig, clone: Path) -> None:
        self._pipe, other_end = multiprocessing.Pipe()
        settings = str(clone.resolve()), config.model_dump(), torch.get_num_threads()
        process = multiprocessing.get_context("spawn").Process(
            target=_serve, args=(other_end, *settings), daemon=True
        )
        process.start()
        other_end.close()
        weakref.finalize(self, process.terminate)

    def ask(self, work: str, **tensors: Tensor) -> Tensor:
        """Return the answer to a request, or raise `UnavailableError`."""
        content = save({name: tensor.contiguous() for name, tensor in tensors.items()})
        try:
            self._pipe.send_bytes(work.encode())
            self._pipe.send_bytes(content)
            error, answer = self._pipe.recv_bytes().decode(), self._pipe.recv_bytes()
        except (EOFError, OSError):
            raise UnavailableError("the process of the official code has ended") from None
        if error:
            raise UnavailableError(f"the official code failed: {error}")
        return load(answer)["result"]


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    # transformers asks find_spec about some of these.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    sys.modules[name] = module
    return module


def _install_stand_ins() -> None:
    """Replace imports that evaluation does not use, and add to transformers what the clone needs of version 4.12."""
    _module("utils", read_json=lambda path: json.loads(Path(path).read_text(encoding="utf-8")))
    _module("models.model_vqkd", vqkd_encoder_base_decoder_3x768x12_clip=None)
    modeling: Any = importlib.import_module("transformers.modeling_utils")
    elsewhere: Any = importlib.import_module("transformers.pytorch_utils")
    base: Any = modeling.PreTrainedModel

    def without_chunks(forward: Callable[..., Any], _size: int, _dim: int, *tensors: Any) -> Any:
        return forward(*tensors)

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("pruning heads")

    for name in _TRANSFORMERS_HELPERS:
        default = without_chunks if name == "apply_chunking_to_forward" else refuse
        setattr(modeling, name, getattr(elsewhere, name, default))

    def invert(self: Any, mask: Any) -> Any:
        wide = mask[:, None, None, :] if mask.dim() == 2 else mask[:, None]
        return (1.0 - wide.to(self.dtype)) * -1e9

    def initialise(self: Any) -> None:
        head, body = getattr(self, "lm_head", None), getattr(self, "roberta", None)
        if head is not None and body is not None:
            head.decoder.weight = body.embeddings.word_embeddings.weight

    base.get_head_mask = lambda self, mask, layers, *_: [None] * layers
    base.invert_attention_mask = invert
    base.init_weights = initialise
    configuration: Any = importlib.import_module("transformers.configuration_utils")
    settings = getattr(configuration, "PreTrainedConfig", None) or configuration.PretrainedConfig
    defaults = {
        "chunk_size_feed_forward": 0,
        "is_decoder": False,
        "add_cross_attention": False,
        "use_cache": True,
    }
    for name, value in defaults.items():
        if not hasattr(settings, name):
            setattr(settings, name, value)
    documentation: Any = importlib.import_module("transformers.file_utils")
    for name in _DOCUMENTATION:
        setattr(documentation, name, lambda *_, **__: lambda function: function)


def _build(config: XFMConfig, folder: Path) -> Any:
    """Build the official retrieval model at some sizes, with fresh weights."""
    # Parts of these paths select classes of the clone: "roberta" the text encoder, "base" the vision encoder.
    text, vision = folder / "roberta", folder / "vision_base.json"
    text.mkdir()
    roberta = {
        "model_type": "roberta",
        **roberta_settings(config),
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "initializer_range": 0.02,
    }
    beit = {"ckpt": "", "vision_width": config.vision_width, "patch_size": config.patch_size}
    (text / "config.json").write_text(json.dumps(roberta))
    vision.write_text(json.dumps(beit))
    module: Any = importlib.import_module("models.beit2")
    # The official constructor has the base and large sizes only.
    module.beit_base_patch16 = lambda **options: module.VisionTransformer(
        **(beit_settings(config) | options)
    )
    official: Any = importlib.import_module("models.model_retrieval")
    return official.XFMForRetrieval(
        {
            "use_beit_v2": True,
            "vision_config": str(vision),
            "image_res": config.image_size,
            "patch_size": config.patch_size,
            "local_attn_depth": config.local_attn_depth,
            "text_encoder": str(text),
            "text_num_hidden_layers": config.text_layers,
            "text_fusion_start_at": config.text_layers,
            "fusion_num_hidden_layers": config.fusion_layers,
            "fusion_fusion_start_at": 0,
            "embed_dim": config.embed_dim,
            "temp": config.temperature,
            "num_masking_patches": config.num_masking_patches,
            "min_num_patches": config.min_num_patches,
        }
    )


def _serve(pipe: Connection, clone: str, config: dict[str, Any], threads: int) -> None:
    """Answer requests with an error (or an empty string) and a result, until the pipe closes or a request fails."""
    warnings.filterwarnings("ignore")
    # The clone prints.
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sys.dont_write_bytecode = True
    sys.path.insert(0, clone)
    model: Any = None
    with torch.inference_mode():
        while True:
            try:
                work, tensors = pipe.recv_bytes().decode(), load(pipe.recv_bytes())
            except (EOFError, OSError):
                return
            try:
                if model is None:
                    model, result = _load(XFMConfig(**config), tensors), torch.empty(0)
                else:
                    result = _answer(model, work, tensors)
            except BaseException as error:  # of foreign code
                pipe.send_bytes(f"{type(error).__name__}: {error}"[:500].encode())
                pipe.send_bytes(b"")
                return
            pipe.send_bytes(b"")
            pipe.send_bytes(save({"result": result.contiguous()}))


def _load(config: XFMConfig, weights: dict[str, Tensor]) -> Any:
    """Load our weights into the clone's model."""
    _install_stand_ins()
    with tempfile.TemporaryDirectory() as folder:
        model = _build(config, Path(folder)).eval()
    # The fine-tuning classes hold the language encoder without its masked-language wrapper.
    state = {
        name.replace("text_encoder.roberta.", "text_encoder.", 1): tensor
        for name, tensor in weights.items()
    }
    unused = (
        "lm_head",
        "lm_cap_head",
        "fusion_encoder.roberta.embeddings",
        "position_ids",
        "relative_position_index",
        "fusion_proj",
    )
    missing = model.load_state_dict(state, strict=False).missing_keys
    missing = [name for name in missing if not any(word in name for word in unused)]
    if missing:
        raise KeyError(f"{len(missing)} weights have no source, such as {missing[0]}")
    return model


def _answer(model: Any, work: str, tensors: dict[str, Tensor]) -> Tensor:
    """Compute the result of a request."""
    if work == "embed-image":
        return model.get_vision_embeds(tensors["pixels"])[0]
    if work == "embed-text":
        return model.get_text_embeds(tensors["ids"], tensors["mask"])
    images = tensors["images"][tensors["image_of"]]
    fused = model.get_cross_embeds(
        image_embeds=images,
        image_atts=torch.ones(images.shape[:2], dtype=torch.long),
        text_ids=tensors["mask"],  # their shape alone is read where embeddings are given
        text_atts=tensors["mask"],
        text_embeds=tensors["embeds"],
    )
    return model.itm_head(fused[:, 0, :])[:, 1]
