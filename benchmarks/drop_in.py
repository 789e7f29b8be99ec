"""What `accelerate` is worth: models of transformers and timm as they come, against the same models accelerated.

Both are in one process with the same weights and inputs, called in turns. A speed is reported beside the difference of
the outputs, and not at all where that is more than rounding.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.benchmarks import machine
from xfm_fast.benchmarks.measuring import GemmProbe, Measurement, contended, interleave, ratio_interval
from xfm_fast.benchmarks.suite import DTYPES, FP32_BAND, Document, Progress, choose_dtypes
from xfm_fast.errors import InputError, XFMError
from xfm_fast.replace import Reranker, accelerate

_ROUNDS = 5
_BUDGET_S = 20.0
# Words of a caption of COCO make 10 to 16 tokens, and its readers pad to 40.
_CAPTION = (10, 16, 40)


@dataclass(frozen=True)
class DropInOptions:
    """What to measure.

    Attributes:
        only: keys of `CASES`; None for all.
        quick: two layers instead of twelve and two rounds, to see that everything runs.
    """

    only: tuple[str, ...] | None = None
    quick: bool = False
    dtypes: tuple[str, ...] | None = None
    threads: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Work:
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
class Case:
    """A model that people have.

    Attributes:
        key: for `--only`.
        name: says the amount of work.
        package: where the model comes from.
        unit: what a call's items are.
        accelerate: the arguments of `accelerate`.
        make: the number of layers to the work.
    """

    key: str
    name: str
    package: str
    unit: str
    accelerate: dict[str, Any]
    make: Callable[[int], Work]


def _texts(count: int, shortest: int, longest: int, padded: int, pad: int) -> tuple[Tensor, Tensor]:
    """Ids of texts of lengths evenly spread between the two, and their mask."""
    lengths = torch.linspace(shortest, longest, count).round().long()
    mask = torch.arange(padded) < lengths[torch.randperm(count)][:, None]
    return torch.where(mask, torch.randint(1000, 20000, mask.shape), pad), mask.long()


def _roberta(layers: int) -> Work:
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=50265,
        max_position_embeddings=514,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=1,
        num_hidden_layers=layers,
    )
    ids, mask = _texts(32, *_CAPTION, pad=1)

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask).last_hidden_state[mask.bool()]

    return Work(RobertaModel(config), call, 32)


def _passages(layers: int) -> Work:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(num_hidden_layers=layers)
    config.num_labels = 1
    ids, mask = _texts(16, 30, 128, 128, pad=0)
    # A query of ten tokens, then a passage.
    types = (torch.arange(128) >= 10).long().expand_as(ids) * mask

    def call(model: nn.Module) -> Tensor:
        return model(input_ids=ids, attention_mask=mask, token_type_ids=types).logits

    return Work(BertForSequenceClassification(config), call, 16)


def _captions_of_an_image(layers: int) -> Work:
    from transformers import BlipTextConfig, BlipTextModel

    config = BlipTextConfig(num_hidden_layers=layers, num_attention_heads=12, is_decoder=True, encoder_hidden_size=768)
    ids, mask = _texts(16, *_CAPTION, pad=0)
    image = torch.randn(1, 577, 768)

    def call(model: nn.Module) -> Tensor:
        dtype = next(model.parameters()).dtype
        states = image.to(dtype).expand(len(ids), -1, -1)
        out = model(input_ids=ids, attention_mask=mask, encoder_hidden_states=states, is_decoder=False)
        return out.last_hidden_state[:, 0]

    return Work(BlipTextModel(config), call, 16)


def _texts_of_an_image(layers: int) -> Work:
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

    return Work(model, call, 64, adapted)


def _beit(layers: int) -> Work:
    import timm

    pixels = torch.randn(8, 3, 224, 224)
    model = timm.create_model("beitv2_base_patch16_224", pretrained=False, depth=layers)

    def call(model: nn.Module) -> Tensor:
        return model(pixels.to(next(model.parameters()).dtype))

    return Work(model, call, 8)


CASES = (
    Case(
        "roberta",
        "RoBERTa-base, 32 captions of 10-16 tokens padded to 40",
        "transformers",
        "texts",
        {"unpad": True},
        _roberta,
    ),
    Case(
        "bert-rerank",
        "BERT-base cross-encoder, a query with 16 passages of 30-128 tokens padded to 128",
        "transformers",
        "pairs",
        {"unpad": True},
        _passages,
    ),
    Case(
        "blip-rerank",
        "BLIP's BERT with cross-attention, an image of 577 tokens with 16 captions of 10-16 tokens padded to 40",
        "transformers",
        "pairs",
        {"unpad": True},
        _captions_of_an_image,
    ),
    Case(
        "memory-rerank",
        "BERT-base with cross-attention, an image of 577 tokens with 64 captions of 10-16 tokens padded to 40: "
        "Reranker against all pairs as one padded batch",
        "transformers",
        "pairs",
        {},
        _texts_of_an_image,
    ),
    Case("beit", "BEiT-v2-B/16 at 224 px, 8 images", "timm", "images", {}, _beit),
)


def run(options: DropInOptions, progress: Progress | None = None, command: Sequence[str] = ()) -> Document:
    """Measure this machine. An interruption (Ctrl-C) ends the run early and keeps the rows measured so far.

    Raises:
        InputError: an unknown case.
        UnavailableError: an unknown type.
    """
    progress = progress or Progress()
    cases = _chosen(options.only)
    torch.set_num_threads(options.threads or machine.default_threads())
    document = Document.begun(options, command, benchmark="drop-in", device="cpu")
    names, absent = choose_dtypes(options.dtypes)
    progress.begin(len(cases))
    for case in cases:
        progress.stage(case.name)
        row = {"key": case.key, "name": case.name, "unit": case.unit}
        document.rows.extend(row | {"dtype": name, "status": "absent", "reason": why} for name, why in absent.items())
        if find_spec(case.package) is None:
            why = f"{case.package} is not installed; pip install {case.package}"
            document.rows.append(row | {"dtype": None, "status": "absent", "reason": why})
            continue
        try:
            measured = _measure(case, names, options, progress)
        except (XFMError, RuntimeError, TypeError, AttributeError, ImportError) as error:
            # Somebody else's model: whatever it raises, the others are measured.
            reason = f"{type(error).__name__}: {error}"
            document.rows.append(row | {"dtype": None, "status": "failed", "reason": reason})
            continue
        except KeyboardInterrupt:
            document.content["interrupted"] = True
            break
        document.rows.extend(row | found for found in measured)
    return document


def _chosen(only: tuple[str, ...] | None) -> list[Case]:
    known = [case.key for case in CASES]
    unknown = [key for key in only or () if key not in known]
    if unknown:
        raise InputError(f"case {', '.join(unknown)!r} is unknown; choose from {', '.join(known)}")
    return [case for case in CASES if only is None or case.key in only]


def _measure(case: Case, names: list[str], options: DropInOptions, progress: Progress) -> list[dict[str, Any]]:
    torch.manual_seed(options.seed)
    work = case.make(2 if options.quick else 12)
    model = work.model.eval()
    variants = {"original fp32": partial(work.call, model)}
    report = ""
    for name in names:
        dtype = DTYPES[name]
        if name != "fp32":
            variants[f"original {name}"] = partial(work.call, copy.deepcopy(model).to(dtype))
        if work.adapted is not None:
            variants[f"fast {name}"] = partial(work.adapted, dtype)
            continue
        fast = copy.deepcopy(model)
        report = str(accelerate(fast, dtype=None if name == "fp32" else dtype, **case.accelerate))
        variants[f"fast {name}"] = partial(work.call, fast)
    probes = {name: GemmProbe(DTYPES[name]) for name in names}
    measured = interleave(
        variants,
        list(probes.values()),
        warmups=dict.fromkeys(variants, 1),
        rounds=2 if options.quick else _ROUNDS,
        budget_s=0 if options.quick else _BUDGET_S,
        on_step=progress.step,
    )
    if measured.interrupted:
        raise KeyboardInterrupt
    return [_row(name, measured, work.items, probes[name]) | {"report": report.splitlines()} for name in names]


def _row(name: str, measured: Measurement, items: int, probe: GemmProbe) -> dict[str, Any]:
    original, fast = measured.series["original fp32"], measured.series[f"fast {name}"]
    same = measured.series.get(f"original {name}") if name != "fp32" else None
    error = _error(fast.output, original.output)
    # A type that rounds more may err twice as far as the original does in it.
    own = 0.0 if same is None else _error(same.output, original.output)
    band = FP32_BAND if same is None else 2 * own + torch.finfo(DTYPES[name]).eps
    row = {"dtype": name, "status": "measured", "items": items, "parity": {"error": error, "band": band}}
    if not error <= band:
        return row | {"status": "parity failed", "reason": f"error {error:.1e} exceeds {band:.1e}"}
    rates = measured.probes[DTYPES[name]]
    return row | {
        "fast": fast.summary(items),
        "original": original.summary(items),
        "original_same_dtype": None if same is None else same.summary(items),
        "ratio": original.median / fast.median,
        "ratio_interval": list(ratio_interval(original.seconds, fast.seconds)),
        "ratio_same_dtype": None if same is None else same.median / fast.median,
        "probe": {
            "library": probe.library,
            "flops_per_s": rates,
            "median_flops_per_s": statistics.median(rates),
            "contended": contended(rates),
        },
        "memory_method": measured.memory_method,
    }


def _error(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
