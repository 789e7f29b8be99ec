"""Small models of every family with random weights, inputs for them, and the comparison of two copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.replace import official_replicas as replicas
from xfm_fast import accelerate
from xfm_fast.replace.swap import original_class

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")

for _package, _module, _name in (
    ("beit", "modeling_beit", "BeitRelativePositionBias"),
    ("data2vec", "modeling_data2vec_vision", "Data2VecVisionRelativePositionBias"),
):
    # transformers 5 caches the index of a window for the process; one made in inference mode serves no training.
    _bias = getattr(import_module(f"transformers.models.{_package}.{_module}"), _name)
    _index = getattr(_bias, "generate_relative_position_index", None)
    if hasattr(_index, "__wrapped__"):
        _bias.generate_relative_position_index = staticmethod(_index.__wrapped__)

Inputs = dict[str, Any]
TRANSFORMERS = int(transformers.__version__.split(".")[0])
LENGTHS = (11, 3, 6, 1, 8)
IMAGE = 32
LAYER = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 63,
}
NO_DROPOUT = {
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attention_dropout": 0.0,
}
SIZES: Inputs = {
    **LAYER,
    "vocab_size": 111,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    **NO_DROPOUT,
}
PIXELS: Inputs = {**LAYER, "image_size": IMAGE, "patch_size": 8, **NO_DROPOUT}
# The causal masks of transformers 4 overflow in float64.
CAUSAL_DTYPE, CAUSAL_BOUND = (torch.float64, 1e-12) if TRANSFORMERS > 4 else (torch.float32, 1e-5)
DROPOUTS = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "dropout",
    "mlp_dropout",
)


def build(name: str, sizes: Inputs, attention: str = "sdpa", **options: Any) -> nn.Module:
    """A model of transformers by its class name."""
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    # In transformers 4 some models have no choice of attention implementations.
    attention = attention if kind._supports_sdpa else "eager"
    return kind(kind.config_class(**sizes | options, attn_implementation=attention))


def make(
    name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **changes: Any
) -> Any:
    """A text model of transformers by its class name, in training mode without dropout."""
    model = build(name, SIZES, attention, **changes).to(dtype).train()
    with torch.no_grad():
        for parameter in model.parameters():
            # Fresh norms and biases are ones and zeros, which would hide an exchange of the two.
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


def batch(
    padding: str = "right", *, labels: bool = False, lengths: tuple[int, ...] = LENGTHS
) -> Inputs:
    """Ids and mask of texts of these lengths."""
    generator, longest = torch.Generator().manual_seed(1), max(lengths)
    places, ends = torch.arange(longest), torch.tensor(lengths)[:, None]
    if padding == "holes":
        mask = torch.rand(len(lengths), longest, generator=generator) < 0.6
        mask[:, 4] = True
    else:
        mask = places < ends if padding == "right" else places >= longest - ends
    ids = torch.randint(2, 111, mask.shape, generator=generator)
    inputs: Inputs = {"input_ids": torch.where(mask, ids, 1), "attention_mask": mask.long()}
    if labels:
        chosen = mask & (torch.rand(mask.shape, generator=generator) < 0.4)
        inputs["labels"] = torch.where(chosen, ids, -100)
    return inputs


def randomised(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The model with parameters that all leave a trace in its output: libraries start many of them at 0 or 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 0.3 if parameter.ndim <= 1 or "table" in name else parameter.shape[-1] ** -0.5
            centre = (
                1.0
                if parameter.ndim == 1 and "norm" in name.lower() and name.endswith("weight")
                else 0.0
            )
            parameter.normal_(centre, spread, generator=generator)
    return model.to(dtype).eval()


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)


def pixels(dtype: torch.dtype = torch.float64, size: int = IMAGE, images: int = 2) -> Tensor:
    return _random(images, 3, size, size, dtype=dtype)


def _texts(dtype: torch.dtype) -> Inputs:
    return batch()


def _images(dtype: torch.dtype) -> Inputs:
    return {"pixel_values": pixels(dtype)}


def _videos(dtype: torch.dtype) -> Inputs:
    return {"pixel_values": pixels(dtype, images=8).unflatten(0, (2, 4))}


def _spectra(dtype: torch.dtype) -> Inputs:
    return {"input_values": _random(2, 48, 32, dtype=dtype)}


def _images_and_texts(dtype: torch.dtype) -> Inputs:
    return {"pixel_values": pixels(dtype, images=len(LENGTHS)), **batch()}


def _noisy(dtype: torch.dtype) -> Inputs:
    return {"pixel_values": pixels(dtype), "noise": _random(2, 16).sigmoid()}


def _boxes(dtype: torch.dtype) -> Inputs:
    made = batch()
    corners = torch.randint(
        0, 30, (*made["input_ids"].shape, 2), generator=torch.Generator().manual_seed(4)
    )
    return {**made, "bbox": torch.cat((corners, corners + 5), -1)}


def _patches(dtype: torch.dtype) -> Inputs:
    real, shapes = torch.arange(16) < torch.tensor([[16], [12]]), torch.tensor([[4, 4], [3, 4]])
    patches = _random(2, 16, 3 * 64, dtype=dtype)
    return {"pixel_values": patches, "pixel_attention_mask": real.long(), "spatial_shapes": shapes}


def _fused_texts(dtype: torch.dtype) -> Inputs:
    generator = torch.Generator().manual_seed(1)
    mask = batch()["attention_mask"]
    seen = (
        (torch.rand(len(mask), 6, generator=generator) < 0.7)
        .long()
        .index_fill(1, torch.tensor([0]), 1)
    )
    return {
        "encoder_embeds": torch.randn(*mask.shape, 32, generator=generator, dtype=dtype),
        "attention_mask": mask,
        "encoder_hidden_states": torch.randn(len(mask), 6, 24, generator=generator, dtype=dtype),
        "encoder_attention_mask": seen,
    }


@dataclass(frozen=True)
class Case:
    """A family: how to build a small model, its inputs, and what holds for it."""

    layer: str  # class name of its layers
    build: Callable[..., nn.Module]  # of (attention implementation, options)
    inputs: Callable[[torch.dtype], Inputs]
    options: Inputs = field(default_factory=dict)
    unpads: bool = False
    single: bool = False  # computes a part in fp32 whatever the dtype
    whole: bool = True  # every linear weight of its layers can be packed

    def model(
        self, dtype: torch.dtype = torch.float64, attention: str = "sdpa", **options: Any
    ) -> Any:
        return randomised(self.build(attention, **self.options | options), dtype)

    @property
    def precise(self) -> tuple[torch.dtype, float]:
        return (torch.float32, 2e-5) if self.single else (torch.float64, 1e-11)


def _text(name: str, layer: str = "", inputs: Any = _texts, **options: Any) -> Case:
    flags = {flag: options.pop(flag) for flag in ("unpads", "single") if flag in options}
    return Case(
        layer or name.removesuffix("Model") + "Layer",
        partial(build, name, SIZES),
        inputs,
        options,
        **flags,
    )


def _vision(name: str, layer: str = "", inputs: Any = _images, **options: Any) -> Case:
    sizes = {"image_size": IMAGE, **NO_DROPOUT} if "Swin" in name else PIXELS
    return Case(
        layer or name.removesuffix("Model") + "Layer", partial(build, name, sizes), inputs, options
    )


def _timm(name: str, layer: str, **options: Any) -> Case:
    def build(attention: str, **changes: Any) -> nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=7, **changes)

    def images(dtype: torch.dtype) -> Inputs:
        return {"x": pixels(dtype)}

    swin = {
        "img_size": IMAGE,
        "patch_size": 4,
        "embed_dim": 24,
        "depths": (2, 2),
        "num_heads": (2, 3),
    }
    plain = {"img_size": IMAGE, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    return Case(layer, build, images, (swin if "swin" in name else plain) | options)


def _encoder(norm_first: bool, attention: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    made = partial(
        nn.TransformerEncoderLayer, 16, 4, 24, 0.0, "gelu", batch_first=True, norm_first=norm_first
    )
    return nn.TransformerEncoder(made(**options), 2, nn.LayerNorm(16), enable_nested_tensor=False)


def _sequences(dtype: torch.dtype) -> Inputs:
    return {"src": _random(3, 7, 16, dtype=dtype)}


_ROTARY: Inputs = {"hidden_size": 32, "num_attention_heads": 2}
_LOCAL: Inputs = {
    "local_attention": 4,
    "num_hidden_layers": 4,
    "global_attn_every_n_layers": 2,
    "bos_token_id": 0,
}
_DISENTANGLED: Inputs = {"relative_attention": True, "single": True}
_SWIN: Inputs = {
    "patch_size": 4,
    "embed_dim": 24,
    "depths": [2, 2],
    "num_heads": [2, 3],
    "window_size": 3,
    "mlp_ratio": 2.0,
}
_WHOLE: Inputs = _SWIN | {"window_size": 4}
_FRAMES: Inputs = {"inputs": _videos, "num_frames": 4}
_VOCABULARY: Inputs = {"vocab_size": 111, "max_position_embeddings": 40, "pad_token_id": 1}
_CLIP: Inputs = {
    "vocab_size": 111,
    "max_position_embeddings": 11,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, Case] = {
    # Texts.
    "BERT": _text("BertModel", unpads=True),
    "BERT, another activation": _text("BertModel", unpads=True, hidden_act="gelu_new"),
    "RoBERTa": _text("RobertaModel", unpads=True),
    "XLM-R": _text("XLMRobertaModel", unpads=True),
    "CamemBERT": _text("CamembertModel", unpads=True),
    "Data2Vec's texts": _text("Data2VecTextModel", unpads=True),
    "ELECTRA": _text("ElectraModel", unpads=True, embedding_size=24),
    "Megatron-BERT": _text("MegatronBertModel"),
    "RemBERT": _text("RemBertModel", input_embedding_size=24),
    "RoBERTa-PreLayerNorm": _text("RobertaPreLayerNormModel"),
    "XLM-R XL": _text("XLMRobertaXLModel"),
    "RoFormer": _text("RoFormerModel", single=True),
    "RoFormer, values too": _text("RoFormerModel", single=True, rotary_value=True),
    "CLIP's texts": _text("CLIPTextModel", "CLIPEncoderLayer", single=True, **_CLIP),
    "OWLv2's texts": _text(
        "Owlv2TextModel", "Owlv2EncoderLayer", single=True, max_position_embeddings=11
    ),
    # Images.
    "ViT": _vision("ViTModel"),
    "ViT without biases": _vision("ViTModel", qkv_bias=False, hidden_act="gelu_new"),
    "DeiT": _vision("DeiTModel"),
    "BEiT": _vision("BeitModel", use_relative_position_bias=True),
    "BEiT, shared bias": _vision(
        "BeitModel", use_shared_relative_position_bias=True, layer_scale_init_value=0.0
    ),
    "BEiT, both biases": _vision(
        "BeitModel", use_shared_relative_position_bias=True, use_relative_position_bias=True
    ),
    "Data2Vec": _vision("Data2VecVisionModel", use_relative_position_bias=True),
    "CLIP's images": _vision("CLIPVisionModel", "CLIPEncoderLayer"),
    "CLIP's images, GELU": _vision("CLIPVisionModel", "CLIPEncoderLayer", hidden_act="gelu"),
    "ViT-MSN": _vision("ViTMSNModel"),
    "I-JEPA": _vision("IJepaModel"),
    "AST": _vision("ASTModel", inputs=_spectra, max_length=48, num_mel_bins=32),
    "ViViT": _vision("VivitModel", tubelet_size=[2, 8, 8], **_FRAMES),
    "VideoMAE": _vision("VideoMAEModel", qkv_bias=False, qv_bias=False, **_FRAMES),
    "YOLOS": _vision("YolosModel", image_size=[IMAGE, IMAGE], num_detection_tokens=5),
    "DPT": _vision("DPTModel", "DPTViTLayer", backbone_out_indices=[0, 0, 1, 1]),
    "ViLT": _vision("ViltModel", inputs=_images_and_texts, **_VOCABULARY),
    "OWL-ViT": _vision("OwlViTVisionModel", "OwlViTEncoderLayer"),
    "OWLv2": _vision("Owlv2VisionModel", "Owlv2EncoderLayer"),
    "BLIP's images": _vision("BlipVisionModel", "BlipEncoderLayer"),
    "BLIP-2's images": _vision("Blip2VisionModel", "Blip2EncoderLayer"),
    "InstructBLIP's images": _vision("InstructBlipVisionModel", "InstructBlipEncoderLayer"),
    # timm.
    "timm's BEiT-v2": _timm("beitv2_base_patch16_224", "Block"),
    "timm's BEiT, shared bias": _timm(
        "beit_base_patch16_224", "Block", use_rel_pos_bias=False, use_shared_rel_pos_bias=True
    ),
    "timm's BEiT, both biases": _timm(
        "beit_base_patch16_224", "Block", use_shared_rel_pos_bias=True
    ),
    "timm's BEiT without bias": _timm(
        "beit_base_patch16_224", "Block", use_rel_pos_bias=False, init_values=None, qkv_bias=False
    ),
    "timm's ViT": _timm("vit_base_patch16_224", "Block"),
    "timm's ViT, norms of q and k": _timm(
        "vit_base_patch16_224", "Block", init_values=0.1, qk_norm=True
    ),
    "timm's ViT of CLIP": _timm("vit_base_patch16_clip_quickgelu_224", "Block"),
    "timm's ViT-SO400M": _timm("vit_so400m_patch14_siglip_224", "Block"),
    "timm's DeiT": _timm("deit_base_distilled_patch16_224", "Block"),
    "timm's BEiT-3": _timm("beit3_base_patch16_224", "Block"),
    "timm's EVA": _timm("eva_giant_patch14_224", "EvaBlock"),
    "timm's EVA-02": _timm("eva02_base_patch14_224", "EvaBlock"),
    "timm's EVA-02 large": _timm("eva02_large_patch14_224", "EvaBlock"),
    "timm's vit_relpos": _timm("vit_relpos_base_patch16_224", "RelPosBlock"),
    "timm's vit_relpos, Swin's table": _timm(
        "vit_relpos_base_patch16_224", "RelPosBlock", rel_pos_type="bias"
    ),
    "timm's vit_relpos, shared": _timm(
        "vit_relpos_base_patch16_rpn_224", "ResPostRelPosBlock", shared_rel_pos=True
    ),
    "timm's vit_srelpos": _timm("vit_srelpos_small_patch16_224", "RelPosBlock"),
    "timm's Swin": _timm("swin_tiny_patch4_window7_224", "SwinTransformerBlock", window_size=3),
    "timm's Swin, moving mask": _timm(
        "swin_tiny_patch4_window7_224", "SwinTransformerBlock", window_size=4, strict_img_size=False
    ),
    "timm's Swin V2": _timm("swinv2_tiny_window8_256", "SwinTransformerV2Block", window_size=3),
    # PyTorch, and the official code.
    "PyTorch, pre-norm": Case(
        "TransformerEncoderLayer", partial(_encoder, True), _sequences, whole=False
    ),
    "PyTorch, post-norm": Case(
        "TransformerEncoderLayer", partial(_encoder, False), _sequences, whole=False
    ),
    "official texts": Case(
        "TextLayer",
        lambda _: replicas.TextModel(replicas.TextConfig()),
        _fused_texts,
        unpads=True,
        single=True,
    ),
    "X²-VLM's texts": Case(
        "TextLayerWithoutMode",
        lambda _: replicas.TextModel(replicas.TextConfig(), replicas.TextLayerWithoutMode),
        _fused_texts,
        unpads=True,
        single=True,
    ),
    "official images": Case(
        "VisionBlock",
        lambda _: replicas.VisionTransformer(),
        lambda dtype: {"x": _random(2, 13, 32, dtype=dtype)},
    ),
}
if TRANSFORMERS >= 5:
    FAMILIES |= {
        "MPNet": _text("MPNetModel", unpads=True),
        "DistilBERT": _text(
            "DistilBertModel",
            "TransformerBlock",
            unpads=True,
            dim=48,
            n_layers=2,
            n_heads=3,
            hidden_dim=63,
            dropout=0.0,
        ),
        "ALBERT": _text(
            "AlbertModel", unpads=True, embedding_size=24, num_hidden_layers=4, num_hidden_groups=2
        ),
        "ModernBERT": _text(
            "ModernBertModel",
            "ModernBertEncoderLayer",
            unpads=True,
            single=True,
            **_ROTARY | _LOCAL,
        ),
        "NomicBERT": _text("NomicBertModel", unpads=True, **_ROTARY),
        "Jina v3": _text("JinaEmbeddingsV3Model", unpads=True, single=True),
        "ESM": _text(
            "EsmModel",
            single=True,
            position_embedding_type="rotary",
            mask_token_id=4,
            token_dropout=True,
        ),
        "LayoutLMv3": _text(
            "LayoutLMv3Model",
            inputs=_boxes,
            coordinate_size=8,
            shape_size=8,
            visual_embed=False,
            max_2d_position_embeddings=64,
        ),
        "DeBERTa-v3": _text(
            "DebertaV2Model",
            pos_att_type=["p2c", "c2p"],
            position_buckets=4,
            share_att_key=True,
            **_DISENTANGLED,
        ),
        "DeBERTa-v2": _text("DebertaV2Model", pos_att_type=["c2p"], **_DISENTANGLED),
        "SigLIP's texts": _text(
            "SiglipTextModel", "SiglipEncoderLayer", projection_size=48, **_CLIP
        ),
        "Pixio": _vision("PixioModel", mlp_ratio=2),
        "SigLIP's images": _vision("SiglipVisionModel", "SiglipEncoderLayer"),
        "SigLIP 2": _vision(
            "Siglip2VisionModel", "Siglip2EncoderLayer", inputs=_patches, num_patches=16
        ),
        "DINOv2": _vision("Dinov2Model", mlp_ratio=2),
        "DINOv2, SwiGLU": _vision("Dinov2Model", mlp_ratio=2, use_swiglu_ffn=True),
        "DINOv2 with registers": _vision("Dinov2WithRegistersModel", mlp_ratio=2),
        "DINOv3": _vision("DINOv3ViTModel", num_register_tokens=2),
        "DINOv3, gated": _vision("DINOv3ViTModel", num_register_tokens=2, use_gated_mlp=True),
        "ViT-MAE": _vision("ViTMAEModel", inputs=_noisy, mask_ratio=0.5),
        "Swin": _vision("SwinModel", **_SWIN),
        "Swin, whole windows": _vision("SwinModel", **_WHOLE),
        "Swin V2": _vision("Swinv2Model", **_SWIN),
    }


def real(values: Tensor, mask: Tensor | None) -> Tensor:
    """Outputs at real tokens, where there is one for each token."""
    return (
        values if mask is None or values.shape[: mask.ndim] != mask.shape else values[mask.bool()]
    )


def states(model: nn.Module, given: Inputs) -> Tensor:
    """The final states at real tokens."""
    # DINOv3 moves the places of its patches in training, and ViLT shuffles them.
    torch.manual_seed(5)
    out: Any = model(**given)
    return real(
        out if isinstance(out, Tensor) else out.last_hidden_state, given.get("attention_mask")
    )


def inferred(model: nn.Module, given: Inputs) -> Tensor:
    """The final states at real tokens in evaluation mode, without gradients, in fp32 or wider."""
    with torch.no_grad():
        found = states(model.eval(), given)
    return found if found.dtype == torch.float64 else found.float()


def adapted(model: nn.Module, targets: list[str], *names: str, **options: Any) -> Any:
    """The model with LoRA adapters of peft whose factors are not zero, in its own dtype."""
    peft = pytest.importorskip("peft")
    dtype, made = next(p.dtype for p in model.parameters() if p.is_floating_point()), None
    for name in names or ("default",):
        config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=targets, **options)
        if made is None:
            made = peft.get_peft_model(model, config, adapter_name=name)
        else:
            made.add_adapter(name, config)
    generator = torch.Generator().manual_seed(3)
    assert made is not None
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.copy_(
                    torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2
                )
    return made.to(dtype)


def without_chance(model: nn.Module) -> nn.Module:
    """Training mode in which nothing is drawn."""
    model.train()
    for part in model.modules():
        if isinstance(part, nn.Dropout) or hasattr(part, "drop_prob"):
            part.eval()
    return model


def gradients(model: nn.Module, run: Callable[[], Tensor]) -> dict[str, Tensor]:
    """The output, and the gradient of every parameter from a loss that weighs all of it differently."""
    model.zero_grad(set_to_none=True)
    out = run()
    weights = torch.randn(
        out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    ).to(out.dtype)
    (out * weights).sum().backward()
    found = {
        name: torch.zeros(()) if p.grad is None else p.grad for name, p in model.named_parameters()
    }
    return {"output": out.detach()} | found


def assert_close(wanted: dict[str, Tensor], found: dict[str, Tensor], bound: float) -> None:
    """Every tensor to `bound` of its largest value, or of a twentieth of the largest of all.

    The gradient of a key's bias is zero but for rounding.
    """
    assert wanted.keys() == found.keys()
    largest = max(float(value.abs().max()) for value in wanted.values())
    for name, value in wanted.items():
        scale = max(float(value.abs().max()), largest / 20)
        assert float((found[name].double() - value.double()).abs().max()) <= bound * scale, name


def assert_equal(
    original: nn.Module,
    fast: nn.Module,
    given: Inputs,
    bound: float = 1e-12,
    only_real: bool = False,
) -> None:
    """Outputs by name and gradients of every parameter."""
    mask = given.get("attention_mask") if only_real else None
    sides = []
    for model in (original, fast):
        model.zero_grad(set_to_none=True)
        outputs = {
            name: value for name, value in model(**given).items() if isinstance(value, Tensor)
        }
        generator = torch.Generator().manual_seed(2)
        total = torch.zeros((), dtype=torch.float64)
        for value in outputs.values():
            seen = real(value, mask).double()
            total = (
                total
                + (seen * torch.randn(seen.shape, generator=generator, dtype=torch.float64)).sum()
            )
        total.backward()
        found = {
            name: torch.zeros(()) if p.grad is None else p.grad
            for name, p in model.named_parameters()
        }
        sides.append(({name: real(value, mask).detach() for name, value in outputs.items()}, found))
    for wanted, found in zip(*sides, strict=True):
        assert_close(wanted, found, bound)


def with_fused_copy(model: Any, **options: Any) -> tuple[Any, Any]:
    """A model and its accelerated twin."""
    fast = copy.deepcopy(model)
    accelerate(fast, **options)
    return model, fast


def only_fused(monkeypatch: pytest.MonkeyPatch, model: nn.Module, *kinds: str) -> None:
    """Let the original forwards of these classes raise from now on."""

    def refuse(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the original forward ran")

    for kind in {original_class(part) for part in model.modules()}:
        if kind.__name__ in kinds:
            monkeypatch.setattr(kind, "forward", refuse)
