"""The program that runs the official code from a user's clone, in a process and an interpreter of its own.

It imports the clone, loads weights into its retrieval model, and answers requests that come as lines of JSON on
standard input; tensors travel by way of files (`official_code` is the other end). The clone's top-level modules are
called `models` and `utils`, it prints while it constructs itself, and it was written for the libraries of 2021; so it
gets stand-ins for what it imports but does not use in evaluation, and for what newer libraries no longer offer. Nothing
is written into the clone.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.metadata
import json
import os
import sys
import tempfile
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

_TRANSFORMERS_HELPERS = ("apply_chunking_to_forward", "find_pruneable_heads_and_indices", "prune_linear_layer")


def _module(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    # transformers asks find_spec about some of these.
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(members)
    sys.modules[name] = module
    return module


def _install_stand_ins() -> list[str]:
    """Replace what the clone imports without need, and what is missing here; returns what had to be replaced."""
    import torch

    def drop_path(x: Any, rate: float = 0.0, training: bool = False) -> Any:
        if rate and training:
            raise NotImplementedError("training")
        return x

    _module("utils", read_json=lambda path: json.loads(Path(path).read_text(encoding="utf-8")))
    _module("models.model_vqkd", vqkd_encoder_base_decoder_3x768x12_clip=None)
    replaced = []
    major, minor = (int(part) for part in importlib.metadata.version("transformers").split(".")[:2])
    if (major, minor) < (4, 30):
        _module("transformers.dependency_versions_check", dep_version_check=lambda *_, **__: None)
    if _modernise_transformers():
        replaced.append("transformers")
    try:
        importlib.import_module("timm.models.layers")
        importlib.import_module("timm.models.registry")
    except ImportError:
        replaced.append("timm")
        _module("timm")
        _module("timm.models")
        _module(
            "timm.models.layers",
            drop_path=drop_path,
            trunc_normal_=torch.nn.init.trunc_normal_,
            to_2tuple=lambda value: tuple(value) if isinstance(value, tuple | list) else (value, value),
        )
        _module("timm.models.registry", register_model=lambda function: function)
    return replaced


def _modernise_transformers() -> bool:
    """Give a current transformers the helpers of version 4.12 that the clone calls in evaluation."""
    modeling: Any = importlib.import_module("transformers.modeling_utils")
    base: Any = modeling.PreTrainedModel
    missing = [name for name in _TRANSFORMERS_HELPERS if not hasattr(modeling, name)]
    if not missing and hasattr(base, "get_head_mask") and hasattr(base, "invert_attention_mask"):
        return False
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
    for name in (
        "add_code_sample_docstrings",
        "add_start_docstrings",
        "add_start_docstrings_to_model_forward",
        "replace_return_docstrings",
    ):
        setattr(documentation, name, lambda *_, **__: lambda function: function)
    return True


def _build(config: dict[str, Any], folder: Path) -> Any:
    """The official retrieval model at the given sizes, with fresh weights."""
    import torch

    # The clone decides by parts of these paths: "roberta" selects the text encoder, "base" the vision encoder.
    text, vision = folder / "roberta", folder / "vision_base.json"
    text.mkdir()
    roberta = {
        "model_type": "roberta",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["text_width"],
        "num_hidden_layers": config["text_layers"],
        "num_attention_heads": config["text_heads"],
        "intermediate_size": config["text_intermediate"],
        "max_position_embeddings": config["max_positions"],
        "type_vocab_size": config["type_vocab_size"],
        "layer_norm_eps": config["text_layer_norm_eps"],
        "hidden_act": "gelu",
        "pad_token_id": config["pad_token_id"],
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "hidden_dropout_prob": config["hidden_dropout"],
        "attention_probs_dropout_prob": config["attention_dropout"],
        "initializer_range": 0.02,
    }
    (text / "config.json").write_text(json.dumps(roberta))
    vision.write_text(
        json.dumps({"ckpt": "", "vision_width": config["vision_width"], "patch_size": config["patch_size"]})
    )
    beit: Any = importlib.import_module("models.beit2")

    def sized(img_size: int, **options: Any) -> Any:
        eps = config["vision_layer_norm_eps"]
        return beit.VisionTransformer(
            img_size=img_size,
            patch_size=config["patch_size"],
            embed_dim=config["vision_width"],
            depth=config["vision_depth"],
            num_heads=config["vision_heads"],
            mlp_ratio=config["vision_mlp_ratio"],
            norm_layer=lambda width: torch.nn.LayerNorm(width, eps=eps),
            **options,
        )

    # The official constructor knows the base and large sizes only.
    beit.beit_base_patch16 = sized
    official: Any = importlib.import_module("models.model_retrieval")
    return official.XFMForRetrieval(
        {
            "use_beit_v2": True,
            "vision_config": str(vision),
            "image_res": config["image_size"],
            "patch_size": config["patch_size"],
            "local_attn_depth": config["local_attn_depth"],
            "text_encoder": str(text),
            "text_num_hidden_layers": config["text_layers"],
            "text_fusion_start_at": config["text_layers"],
            "fusion_num_hidden_layers": config["fusion_layers"],
            "fusion_fusion_start_at": 0,
            "embed_dim": config["embed_dim"],
            "temp": config["temperature"],
            "num_masking_patches": config["num_masking_patches"],
            "min_num_patches": config["min_num_patches"],
        }
    )


def _serve(settings: dict[str, Any], say: Callable[[dict[str, Any]], None]) -> None:
    """Answer requests that come as lines on standard input, until it ends; tensors travel by way of files."""
    import torch
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(settings["threads"])
    torch.manual_seed(0)
    sys.dont_write_bytecode = True
    sys.path.insert(0, settings["clone"])
    replaced = _install_stand_ins()
    with tempfile.TemporaryDirectory() as folder:
        model = _build(settings["config"], Path(folder)).eval()
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
    say({"ready": True, "replaced": replaced})
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
            say({"done": True})


def main() -> int:
    """Serve by the settings that are given as JSON; the last line of output says how it ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("settings")
    settings = json.loads(parser.parse_args().settings)
    warnings.filterwarnings("ignore")
    # The program's own output line keeps standard output; all that the clone prints goes to standard error.
    out = os.dup(1)
    os.dup2(2, 1)

    def say(message: dict[str, Any]) -> None:
        os.write(out, (json.dumps(message) + "\n").encode())

    try:
        _serve(settings, say)
        result = {"ended": True}
    except BaseException as error:  # whatever fails in foreign code becomes one line
        result = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.flush()
    say(result)
    return 0


if __name__ == "__main__":
    # The folder of this file holds modules whose names would shadow others.
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]
    sys.exit(main())
