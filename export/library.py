"""Exports of models of sentence-transformers: the folder, the module that runs it, the comparison on sentences.

The folder has what the library saves, with `onnx/model.onnx` in place of the weights: sentence-transformers, fastembed
and Text Embeddings Inference read it. `ExportedTransformer` is the library's `Transformer` over graphs of any runtime,
so prompts, truncation, pooling and normalisation stay the library's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.errors import CheckpointError, ExportError, InputError, UnavailableError, needs
from xfm_fast.io import read_json

from .expected import Reference, keep_reference
from .findings import Comparison, Feed, Findings, chunks, rank_agreement, threshold_of
from .graphs import DTYPES, in_dtype
from .layers import with_children
from .manifest import Check, GraphRecord, Manifest, RankCheck
from .request import USES, Use
from .runtimes import first_line
from .session.graphs import GraphSession

with needs("hf"):
    import sentence_transformers
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.base.modules.transformer import TRANSFORMER_TASK_DEFAULTS

REFERENCE_BYTES = 64 << 20
"""Room for the results on sentences."""

# Modules by the names that every version of the library, and other readers of `modules.json`, know.
_COMMON = ("Dense", "Normalize", "Pooling", "Transformer")
_POOLING = {
    "cls_token": "cls",
    "max_tokens": "max",
    "mean_tokens": "mean",
    "mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "weightedmean_tokens": "weightedmean",
    "lasttoken": "lasttoken",
}
# Results of the library's modules by the names of the graph's outputs.
_RESULTS = {
    "last_hidden_state": "token_embeddings",
    "sentence_embedding": "sentence_embedding",
    "logits": "scores",
}
# Wider tokens are logits over a vocabulary, whose pooled form is compared.
_WIDEST_TOKEN = 8192


def use_of(model: Any) -> Use:
    """Return what a model computes; raises `InputError` for one that is not of sentence-transformers."""
    for cls in type(model).__mro__:
        if cls.__name__ in USES and cls.__module__.startswith("sentence_transformers."):
            if isinstance(model[0], Transformer):
                return USES[cls.__name__]
            raise UnavailableError(
                f"the model begins with {type(model[0]).__name__}, which is not a transformer; use it as it is"
            )
    raise InputError(
        f"a {type(model).__name__} cannot be exported; give an X-FM, SentenceTransformer, SparseEncoder or CrossEncoder"
    )


class _Described(nn.Module):
    """Saves the configuration of a transformers model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.config = copy.deepcopy(model.config)
        self.config.architectures = [type(model).__name__]

    def save_pretrained(self, folder: str, **_: Any) -> None:
        self.config.save_pretrained(folder)


def model_files(model: Any) -> dict[str, bytes]:
    """Return the files that open a model, by path: all that the library saves but the transformer's weights."""
    described = with_children(model[0], model=_Described(model[0].model))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with_children(model, **{next(iter(model._modules)): described}).save_pretrained(
            scratch, create_model_card=False
        )
        _adapt(folder, model)
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _adapt(folder: Path, model: Any) -> None:
    """Write the settings of a saved model as its other readers, and earlier versions of the library, expect them."""

    def edit(name: str, change: Callable[[Any], object]) -> None:
        if (path := folder / name).is_file():
            content = json.loads(path.read_text(encoding="utf-8"))
            change(content)
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def name_modules(modules: list[dict[str, Any]]) -> None:
        for module in modules:
            origin, _, name = module["type"].rpartition(".")
            if origin.startswith("sentence_transformers.") and name in _COMMON:
                module["type"] = f"sentence_transformers.models.{name}"
            if name == "Pooling":
                edit(f"{module['path']}/config.json", spell_pooling)

    def spell_pooling(config: dict[str, Any]) -> None:
        if isinstance(config["pooling_mode"], str):
            mode = config.pop("pooling_mode")
            config["word_embedding_dimension"] = config.pop("embedding_dimension")
            config |= {f"pooling_mode_{name}": mode == value for name, value in _POOLING.items()}

    def spell_transformer(config: dict[str, Any]) -> None:
        task = config["transformer_task"]
        if TRANSFORMER_TASK_DEFAULTS.get(task) == (
            config["modality_config"],
            config["module_output_name"],
        ):
            del config["modality_config"], config["module_output_name"]
            if task == "feature-extraction":
                del config["transformer_task"]
        if length is not None:
            config |= {"max_seq_length": length, "do_lower_case": model[0].do_lower_case}

    length, tokenizer = model.max_seq_length, model[0].tokenizer
    if length is not None and length > 1 << 30:
        length = None
    edit("modules.json", name_modules)
    edit("sentence_bert_config.json", spell_transformer)
    # Some readers truncate to the lesser of two lengths, of which one was never the model's.
    edit("tokenizer_config.json", lambda config: config.pop("max_length", None))
    special = folder / "special_tokens_map.json"
    if tokenizer is not None and not special.exists():
        special.write_text(json.dumps(tokenizer.special_tokens_map), encoding="utf-8")


def manifest_fields(model: Any, files: Mapping[str, bytes]) -> dict[str, Any]:
    """Return the fields of a manifest that depend on the model."""
    tokenizer = files.get("tokenizer.json")
    return {
        "use": use_of(model),
        "config": json.loads(files["config.json"]),
        "tokenizer_sha256": None if tokenizer is None else hashlib.sha256(tokenizer).hexdigest(),
        "all_tokens": False,
    }


class GraphModel(nn.Module):
    """The graphs of an export in place of a model of transformers."""

    def __init__(self, session: GraphSession, config: Any) -> None:
        super().__init__()
        self.session, self.config, self.device = session, config, session.device

    def forward(self, **features: Any) -> dict[str, Tensor]:
        """Run the graph that takes these features; returns its outputs by name in fp32."""
        if "input_ids" in features:
            features.setdefault("token_type_ids", torch.zeros_like(features["input_ids"]))
        for record in self.session.manifest.graphs:
            names = [tensor.name for tensor in record.inputs]
            if features.keys() >= {*names}:
                inputs = {name: features[name] for name in names}
                outputs = self.session.in_batches(record.name, inputs)
                return {name: value.float() for name, value in outputs.items()}
        raise InputError(
            f"this export takes {' or '.join(_modality(record) for record in self.session.manifest.graphs)} inputs "
            f"only; export the whole model for {features.get('modality', 'other inputs')}"
        )


class ExportedTransformer(Transformer):
    """The library's `Transformer` over an export: the first of `SentenceTransformer(modules=[...])`."""

    def _load_model(
        self, model_name_or_path: str, transformer_task: Any, config: Any, *_: Any, **options: Any
    ) -> Any:
        session = options.get("session") or GraphSession.load(model_name_or_path)
        text_config = config.get_text_config()
        session.padding_id = getattr(text_config, "pad_token_id", None) or 0
        return GraphModel(session, config)

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Add what the graph computes; a graph without tokens and logits has run the modules that follow."""
        outputs = self.model(**features)
        for name in ("last_hidden_state", "logits"):
            if name in outputs:
                return features | {self.module_output_name: outputs[name]}
        return features | {"sentence_embedding": outputs["sentence_embedding"]}


def open_exported(session: GraphSession) -> Any:
    """Open the model of an export in sentence-transformers; raises `CheckpointError` if its files do not fit."""
    folder = session.folder
    class_name = next(name for name, use in USES.items() if use == session.manifest.use)
    try:
        first = read_json(folder / "modules.json")[0]["type"]
        model = getattr(sentence_transformers, class_name)._load_with_module_classes(
            str(folder),
            {first: ExportedTransformer},
            device=str(session.device),
            backend="onnx",
            local_files_only=True,
            model_kwargs={"session": session},
        )
    except Exception as error:  # the libraries raise anything for foreign files
        raise CheckpointError(
            f"{folder} cannot be opened by sentence-transformers ({first_line(error)}); export again"
        ) from error
    for graph in session.manifest.graphs:
        longest = session.longest(graph.name, "length")
        if longest is not None and longest < (model.max_seq_length or longest + 1):
            model.max_seq_length = longest
    outputs = {tensor.name for graph in session.manifest.graphs for tensor in graph.outputs}
    if not outputs & {"last_hidden_state", "logits"}:
        for module in [*model.children()][1:]:
            module.forward = _unchanged
    return model.eval()


def _unchanged(features: dict[str, Any], **_: Any) -> dict[str, Any]:
    return features


@dataclass(frozen=True)
class Samples:
    """What an export is compared on: texts or pairs of texts, and images of Pillow."""

    texts: Sequence[Any]
    images: Sequence[Any] = ()
    origin: str = ""

    @classmethod
    def of(cls, texts: Sequence[str], images: Sequence[Any], use: Use, origin: str) -> Samples:
        """Make samples of texts, some shortened, empty or joined; or pairs, a few queries with many texts."""
        if use == "ranking":
            pairs = [(query, text) for query in texts[:4] for text in texts[-12:]]
            return cls(pairs, (), f"{len(pairs)} pairs of {origin}")
        short = ["", *(" ".join(text.split()[:words]) for words, text in enumerate(texts[:6], 1))]
        joined = [" ".join(texts[: 2**power]) for power in range(1, 6)]
        samples = [*texts, *short, *joined] if texts else []
        return cls(samples, images, f"{len(samples)} texts of {origin}")


def generated_samples(model: Any, texts: int = 48, images: int = 4) -> Samples:
    """Generate samples without data: texts of random tokens, and noise."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    words, pictures = [], []
    if (tokenizer := model[0].tokenizer) is not None:
        for length in torch.randint(1, 24, (texts,), generator=generator).tolist():
            ids = torch.randint(len(tokenizer), (length,), generator=generator)
            words.append(tokenizer.decode(ids, skip_special_tokens=True))
    for _ in range(images):
        noise = torch.randint(256, (64, 64, 3), generator=generator, dtype=torch.uint8)
        pictures.append(Image.fromarray(noise.numpy()))
    return Samples.of(words, pictures, use_of(model), "random tokens")


def keep_results(
    manifest: Manifest, folder: Path, model: Any, samples: Samples | None = None
) -> Reference:
    """Write the reference of the model into the folder of an export: its results on every sample alone."""
    samples = generated_samples(model) if samples is None else samples
    rounded = None if manifest.dtype == "fp32" else in_dtype(model, DTYPES[manifest.dtype])
    tensors: dict[str, Tensor] = {}
    rounding: dict[str, float] = {}
    for record in manifest.graphs:
        if _modality(record) == "image":
            stored = {"pixel_values": model.preprocess([*samples.images])["pixel_values"]}
        else:
            content = bytearray(json.dumps([*samples.texts]).encode())
            stored = {"texts": torch.frombuffer(content, dtype=torch.uint8)}
        inputs = Inputs(stored)
        truth = inputs.results(model)
        for name, value in (stored | truth).items():
            tensors[f"{record.name}.{name}"] = value
        for name, value in ({} if rounded is None else inputs.results(rounded)).items():
            error = (value - truth[name]).abs().max()
            rounding[f"{record.name}.{name}"] = float(error)
    reference = Reference(tensors, rounding)
    manifest.examples = samples.origin
    keep_reference(manifest, folder, reference)
    return reference


def _modality(record: GraphRecord) -> str:
    return "image" if record.inputs[0].name == "pixel_values" else "text"


class Inputs:
    """The samples of a graph, as a reference stores them."""

    def __init__(self, stored: Mapping[str, Tensor]) -> None:
        self.pixels = stored.get("pixel_values")
        self.texts: list[Any] = []
        if "texts" in stored:
            texts = json.loads(stored["texts"].numpy().tobytes())
            self.texts = [tuple(text) if isinstance(text, list) else text for text in texts]

    def __len__(self) -> int:
        return len(self.texts) if self.pixels is None else len(self.pixels)

    def features(self, model: Any, rows: Sequence[int]) -> dict[str, Any]:
        """Return the features of some samples, as the model makes them."""
        if self.pixels is None:
            features = model.preprocess([self.texts[row] for row in rows])
        else:
            pixels = self.pixels[[*rows]].to(next(model.parameters(), self.pixels).dtype)
            features = {"pixel_values": pixels, "modality": "image"}
        return {
            name: value.to(model.device) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }

    def results(self, model: Any) -> dict[str, Tensor]:
        """Return what a model computes for each sample alone, and the tokens of each."""
        results: dict[str, list[Tensor]] = {}
        for row in range(len(self)):
            features = self.features(model, [row])
            computed = run_model(model, features)
            mask = features.get("attention_mask")
            tokens = len(computed.get("last_hidden_state", ())) if mask is None else int(mask.sum())
            computed["tokens"] = torch.tensor([tokens])
            for name, value in computed.items():
                results.setdefault(name, []).append(value)
        return {name: torch.cat(values) for name, values in results.items()}


def run_model(model: Any, features: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the modules of a model compute, by the names of the graph's outputs; tokens without padding."""
    with torch.inference_mode():
        computed = model.eval()(dict(features))
    results = {}
    for name, feature in _RESULTS.items():
        if feature not in computed:
            continue
        value = computed[feature].float().cpu()
        if name == "last_hidden_state":
            # Those of a sparse encoder are logits over its vocabulary, which no graph returns.
            if value.shape[-1] > _WIDEST_TOKEN:
                continue
            mask = features.get("attention_mask")
            value = value.flatten(0, 1) if mask is None else value[mask.bool().cpu()]
        results[name] = value
    return results


class LibraryComparison(Comparison):
    """An export of a model of sentence-transformers compared, from texts to the results of all its modules."""

    @cached_property
    def model(self) -> Any:
        """The export in sentence-transformers."""
        runtime = self.open_runtime(self.manifest)
        session = GraphSession(self.folder, runtime, manifest=self.manifest)
        session.warm_up()
        self.description = session.description
        return open_exported(session)

    def reference_of(self, graph: str) -> Reference:
        """Return the reference of a graph."""
        start = f"{graph}."
        tensors, rounding = (
            {
                name.removeprefix(start): value
                for name, value in values.items()
                if name.startswith(start)
            }
            for values in (self.tensors, self.reference.rounding)
        )
        return Reference(tensors, rounding)

    def rows(self, record: GraphRecord, *, judging: bool | None) -> Tensor:
        """Return the samples, by index, that a graph takes; every second one to judge 8 bits or to fit their scales."""
        tokens = self.reference_of(record.name).tensors["tokens"]
        rows = torch.arange(len(tokens))
        if judging is not None:
            rows = rows[int(judging and len(rows) > 1) :: 2]
        longest = self.model[0].model.session.longest(record.name, "length")
        rows = rows if longest is None else rows[tokens[rows] <= longest]
        if not len(rows):
            raise ExportError(
                f"graph {record.name!r} takes {longest} tokens, and all samples are longer; export it for longer texts"
            )
        return rows

    def feeds(self, record: GraphRecord, *, judging: bool = False) -> list[Feed]:
        """See `Comparison.feeds`: every second sample, in batches of some."""
        inputs, names = (
            Inputs(self.reference_of(record.name).tensors),
            [t.name for t in record.inputs],
        )
        rows = self.rows(record, judging=judging)
        feeds = []
        for chunk in chunks(len(rows), min(4, len(rows))):
            features = inputs.features(self.model, rows[chunk].tolist())
            feeds.append({name: features[name].cpu().numpy() for name in names})
        return feeds

    def run(self) -> tuple[list[Check], list[RankCheck]]:
        """See `Comparison.run`."""
        checks: list[Check] = []
        ranks: list[RankCheck] = []
        for record in self.manifest.graphs:
            self._run(record, checks, ranks)
        return checks, ranks

    def _run(self, record: GraphRecord, checks: list[Check], ranks: list[RankCheck]) -> None:
        model, reference = self.model, self.reference_of(record.name)
        tensors, threshold = reference.tensors, threshold_of(self.manifest)
        inputs, findings = Inputs(tensors), Findings(record.name)
        judging = True if self.manifest.options.get("arithmetic") else None
        rows = self.rows(record, judging=judging)
        pooled: dict[str, Tensor] = {}
        hook = model[0].model.register_forward_hook(lambda _, __, outputs: pooled.update(outputs))
        ends, shapes, results = tensors["tokens"].cumsum(0), list[list[int]](), dict[str, Tensor]()
        for size in dict.fromkeys((1, min(2, len(rows)), len(rows))):
            for chunk in chunks(len(rows), size):
                batch = rows[chunk]
                features = inputs.features(model, batch.tolist())
                results = run_model(model, features)
                spans = zip(ends[batch], tensors["tokens"][batch], strict=True)
                tokens = torch.cat([torch.arange(end - count, end) for end, count in spans])
                for name, value in results.items():
                    index = tokens if name == "last_hidden_state" else batch
                    findings.add(name, value, tensors[name][index])
                if "sentence_embedding" in pooled:
                    truth = tensors["sentence_embedding"][batch]
                    findings.add("sentence_embedding", pooled["sentence_embedding"].cpu(), truth)
                shape = [*features[record.inputs[0].name].shape]
                if shape not in shapes:
                    shapes.append(shape)
        hook.remove()
        checks += findings.checks(shapes, threshold, reference, self.manifest.dtype)
        dtype = (
            torch.bfloat16
            if self.manifest.options.get("arithmetic")
            else DTYPES[self.manifest.dtype]
        )
        tie = max(1e-5, 2 * torch.finfo(dtype).eps)
        agreement = None
        if "sentence_embedding" in results:
            agreement = neighbour_agreement(
                results["sentence_embedding"], tensors["sentence_embedding"][rows], tie
            )
        elif results["logits"].shape[1] == 1:
            pairs = [inputs.texts[row] for row in rows.tolist()]
            agreement = rank_agreement(
                *(
                    _by_query(pairs, values)
                    for values in (results["logits"], tensors["logits"][rows])
                ),
                tie,
            )
        if agreement is not None:
            candidates, share, identical = agreement
            ranks.append(
                RankCheck(
                    graph=record.name,
                    candidates=candidates,
                    agreement=share,
                    identical=identical,
                    tie=tie,
                    least=threshold.ranks,
                    passed=share >= threshold.ranks,
                )
            )


def _by_query(pairs: Sequence[tuple[str, str]], scores: Tensor) -> Tensor:
    """Arrange scores of pairs by query and text; NaN where there is no pair."""
    queries, texts = (
        {key: n for n, key in enumerate(dict.fromkeys(side))} for side in zip(*pairs, strict=True)
    )
    table = torch.full((len(queries), len(texts)), torch.nan)
    for (query, text), score in zip(pairs, scores[:, 0], strict=True):
        table[queries[query], texts[text]] = score
    return table


def neighbour_agreement(
    features: Tensor, truth: Tensor, tie: float, count: int = 10
) -> tuple[int, float, float] | None:
    """Compare the nearest neighbours of each row among the others by cosine; None for a single row.

    Returns the number of neighbours, and the shares that are kept, with ties counted as equal and without.
    """
    count = min(count, len(truth) - 1)
    if count < 1:
        return None
    nearest, exact = (_cosines(values).topk(count) for values in (features, truth))
    at_nearest = _cosines(truth).gather(1, nearest.indices)
    within = at_nearest >= exact.values[:, -1:] - tie
    identical = (nearest.indices[:, :, None] == exact.indices[:, None, :]).any(2)
    return within.numel(), float(within.double().mean()), float(identical.double().mean())


def _cosines(rows: Tensor) -> Tensor:
    """Return the cosine of every two rows, -inf of a row with itself."""
    rows = nn.functional.normalize(rows.double(), dim=-1)
    return (rows @ rows.T).fill_diagonal_(-torch.inf)
