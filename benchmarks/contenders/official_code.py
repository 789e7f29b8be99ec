"""The official code from a user's clone, in a process that stays and answers requests one after another.

The clone needs its own process: its top-level modules are called `models` and `utils`, it prints during construction,
and it was written for the libraries of 2021, so that it gets stand-ins for imports that evaluation does not use and for
functions that newer libraries lack. Nothing is written into the clone. Requests are lines of JSON, tensors files; that
takes some milliseconds, where the official model takes seconds.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import time
import types
import warnings
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from xfm_fast.config import XFMConfig
from xfm_fast.errors import UnavailableError
from xfm_fast.models.xfm import XFM

from .engine import Built, Clock, ComposedSearch, Pairs
from .public_modules import beit_settings, roberta_settings

_PATIENCE_S = 60
_TRANSFORMERS_HELPERS = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")
_DOCUMENTATION = (
    "add_code_sample_docstrings", "add_start_docstrings", "add_start_docstrings_to_model_forward",
    "replace_return_docstrings",
)  # fmt: skip


class OfficialCodeEngine(ComposedSearch):
    """The clone's retrieval model with the weights of a model; `UnavailableError` if its code does not run here."""

    def __init__(self, model: XFM, clone: Path, scratch: Path) -> None:
        if not (clone / "models" / "xfm.py").is_file():
            raise UnavailableError(f"{clone} has no models/xfm.py; name a clone of the official repository")
        self.model = model
        self._folder = Path(tempfile.mkdtemp(dir=scratch, prefix="official-"))
        weights = self._folder / "weights.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, weights)
        settings = {
            "clone": str(clone.resolve()),
            "weights": str(weights),
            "threads": torch.get_num_threads(),
            "config": model.config.model_dump(),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(settings)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        weakref.finalize(self, _end, self._process)
        self._read()
        weights.unlink()

    def embed_images(self, pixels: Tensor, clock: Clock) -> Tensor:
        return self._ask("embed-image", pixels=pixels)

    def embed_texts(self, input_ids: Tensor, attention_mask: Tensor, clock: Clock) -> Tensor:
        return self._ask("embed-text", ids=input_ids, mask=attention_mask)

    def rerank(self, pairs: Pairs, clock: Clock) -> Tensor:
        return self._ask("rerank", **pairs._asdict())

    def _ask(self, work: str, **tensors: Tensor) -> Tensor:
        inputs, outputs = self._folder / "inputs.safetensors", self._folder / "outputs.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, inputs)
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"work": work, "inputs": str(inputs), "outputs": str(outputs)}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise UnavailableError("the process of the official code has ended") from None
        self._read()
        return load_file(outputs)["result"]

    def _read(self) -> None:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        message = json.loads(line) if line else {"error": f"its process ended with status {self._process.wait()}"}
        if "error" in message:
            raise UnavailableError(f"the official code failed: {message['error']}")


def _end(process: subprocess.Popen[str]) -> None:
    """The process ends with its input."""
    assert process.stdin is not None
    assert process.stdout is not None
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    process.stdout.close()


def build(model: XFM, clone: Path, scratch: Path) -> Built:
    """Start the process and wait until its model is loaded."""
    begun = time.perf_counter()
    engine = OfficialCodeEngine(model, clone, scratch)
    return Built(engine, load_s=time.perf_counter() - begun)


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    # transformers asks find_spec about some of these.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    sys.modules[name] = module
    return module


def _install_stand_ins() -> None:
    """Replace imports that evaluation does not use, and functions that are missing here."""

    def drop_path(x: Any, rate: float = 0.0, training: bool = False) -> Any:
        if rate and training:
            raise NotImplementedError("training")
        return x

    _module("utils", read_json=lambda path: json.loads(Path(path).read_text(encoding="utf-8")))
    _module("models.model_vqkd", vqkd_encoder_base_decoder_3x768x12_clip=None)
    major, minor = (int(part) for part in importlib.metadata.version("transformers").split(".")[:2])
    if (major, minor) < (4, 30):
        _module("transformers.dependency_versions_check", dep_version_check=lambda *_, **__: None)
    _modernise_transformers()
    try:
        importlib.import_module("timm.models.layers")
        importlib.import_module("timm.models.registry")
    except ImportError:
        _module("timm")
        _module("timm.models")
        _module(
            "timm.models.layers",
            drop_path=drop_path,
            trunc_normal_=torch.nn.init.trunc_normal_,
            to_2tuple=lambda value: tuple(value) if isinstance(value, tuple | list) else (value, value),
        )
        _module("timm.models.registry", register_model=lambda function: function)


def _modernise_transformers() -> None:
    """Give a current transformers the helpers of version 4.12 that the clone calls in evaluation."""
    modeling: Any = importlib.import_module("transformers.modeling_utils")
    base: Any = modeling.PreTrainedModel
    missing = [name for name in _TRANSFORMERS_HELPERS if not hasattr(modeling, name)]
    if not missing and hasattr(base, "get_head_mask") and hasattr(base, "invert_attention_mask"):
        return
    elsewhere: Any = importlib.import_module("transformers.pytorch_utils")

    def without_chunks(forward: Callable[..., Any], _size: int, _dim: int, *tensors: Any) -> Any:
        return forward(*tensors)

    def refuse(*_: Any, **__: Any) -> Any:
        raise NotImplementedError("pruning heads")

    for name in missing:
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
    defaults = {"chunk_size_feed_forward": 0, "is_decoder": False, "add_cross_attention": False, "use_cache": True}
    for name, value in defaults.items():
        if not hasattr(settings, name):
            setattr(settings, name, value)
    documentation: Any = importlib.import_module("transformers.file_utils")
    for name in _DOCUMENTATION:
        setattr(documentation, name, lambda *_, **__: lambda function: function)


def _build(config: XFMConfig, folder: Path) -> Any:
    """The official retrieval model at the given sizes, with fresh weights."""
    # Parts of these paths select classes of the clone: "roberta" the text encoder, "base" the vision encoder.
    text, vision = folder / "roberta", folder / "vision_base.json"
    text.mkdir()
    roberta = {
        "model_type": "roberta", **roberta_settings(config), "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout, "initializer_range": 0.02,
    }  # fmt: skip
    (text / "config.json").write_text(json.dumps(roberta))
    vision.write_text(json.dumps({"ckpt": "", "vision_width": config.vision_width, "patch_size": config.patch_size}))
    beit: Any = importlib.import_module("models.beit2")
    # The official constructor has the base and large sizes only.
    beit.beit_base_patch16 = lambda **options: beit.VisionTransformer(**(beit_settings(config) | options))
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


def _serve(settings: dict[str, Any], send: Callable[[dict[str, Any]], None]) -> None:
    """Answer the requests on standard input until it ends."""
    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    sys.dont_write_bytecode = True
    sys.path.insert(0, settings["clone"])
    _install_stand_ins()
    with tempfile.TemporaryDirectory() as folder:
        model = _build(XFMConfig(**settings["config"]), Path(folder)).eval()
    # The fine-tuning classes hold the language encoder without its masked-language wrapper.
    state = {
        name.replace("text_encoder.roberta.", "text_encoder.", 1): tensor
        for name, tensor in load_file(settings["weights"]).items()
    }
    unused = (
        "lm_head", "lm_cap_head", "fusion_encoder.roberta.embeddings", "position_ids", "relative_position_index",
        "fusion_proj",
    )  # fmt: skip
    missing = model.load_state_dict(state, strict=False).missing_keys
    lacking = [name for name in missing if not any(part in name for part in unused)]
    if lacking:
        raise KeyError(f"{len(lacking)} weights have no source, such as {lacking[0]}")
    send({"ready": True})
    with torch.inference_mode():
        for line in sys.stdin:
            request = json.loads(line)
            given = load_file(request["inputs"])
            if request["work"] == "embed-image":
                result = model.get_vision_embeds(given["pixels"])[0]
            elif request["work"] == "embed-text":
                result = model.get_text_embeds(given["ids"], given["mask"])
            else:
                images = given["images"][given["image_of"]]
                fused = model.get_cross_embeds(
                    image_embeds=images,
                    image_atts=torch.ones(images.shape[:2], dtype=torch.long),
                    text_ids=given["mask"],  # their shape alone is read where embeddings are given
                    text_atts=given["mask"],
                    text_embeds=given["embeds"],
                )
                result = model.itm_head(fused[:, 0, :])[:, 1]
            save_file({"result": result.contiguous()}, request["outputs"])
            send({"done": True})


def main() -> int:
    """Serve the clone with the settings of the command line; the last line of output is the result or the error."""
    warnings.filterwarnings("ignore")
    # Answers keep standard output; what the clone prints goes to standard error.
    out = os.dup(1)
    os.dup2(2, 1)

    def send(message: dict[str, Any]) -> None:
        os.write(out, (json.dumps(message) + "\n").encode())

    try:
        _serve(json.loads(sys.argv[1]), send)
        result: dict[str, Any] = {"ended": True}
    except BaseException as error:  # of foreign code
        result = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.flush()
    send(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
