"""Exports of models of sentence-transformers: the folder, the module that runs it, the comparison on sentences.

The folder has what the library saves, with `onnx/model.onnx` in place of the weights: sentence-transformers, fastembed
and Text Embeddings Inference read it. `ExportedTransformer` is the library's `Transformer` over graphs of any runtime,
so prompts, truncation, pooling and normalisation stay the library's.
"""

from __future__ import annotations

import copy
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
from .findings import (
    Comparison,
    Feed,
    Findings,
    chunks,
    judge_agreement,
    rank_agreement,
    threshold_of,
)
from .graphs import DTYPES, in_dtype
from .layers import with_children
from .manifest import LIBRARY_OUTPUTS, Check, GraphRecord, Manifest, RankCheck
from .request import USES, GraphName, Use
from .runtimes import first_line
from .session.graphs import GraphSession

with needs("hf"):
    import sentence_transformers
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.base.modules.transformer import TRANSFORMER_TASK_DEFAULTS

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
# Wider tokens are logits over the vocabulary of a sparse encoder, which no graph returns.
_WIDEST_TOKEN = 8192
_NEIGHBOURS = 10


def use_of(model: Any) -> Use:
    """Return what a model computes; raises an `XFMError` for one that has no export."""
    names = (cls.__name__ for cls in type(model).__mro__ if cls.__name__ in USES)
    if (name := next(names, None)) is None:
        raise InputError(
            f"a {type(model).__name__} cannot be exported; give an X-FM, or one of {', '.join(USES)}"
        )
    if not isinstance(model[0], Transformer):
        raise UnavailableError(
            f"the model begins with {type(model[0]).__name__}, which is not a transformer; use it as it is"
        )
    return USES[name]


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
    transformer = with_children(model[0], model=_Described(model[0].model))
    first = next(iter(model._modules))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with_children(model, **{first: transformer}).save_pretrained(
            scratch, create_model_card=False
        )
        _adapt(folder, model)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _adapt(folder: Path, model: Any) -> None:
    """Write the settings of a saved model as its other readers, and earlier versions of the library, expect them."""

    def edit(name: str, change: Callable[[Any], object]) -> None:
        if (path := folder / name).is_file():
            content = read_json(path)
            change(content)
            path.write_text(json.dumps(content, indent=2), encoding="utf-8")

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
        modalities = config["modality_config"], config["module_output_name"]
        if TRANSFORMER_TASK_DEFAULTS.get(task) == modalities:
            del config["modality_config"], config["module_output_name"]
            if task == "feature-extraction":
                del config["transformer_task"]
        # A tokenizer without a limit says 10^30.
        if (length := model.max_seq_length) is not None and length < 1 << 30:
            config |= {"max_seq_length": length, "do_lower_case": model[0].do_lower_case}

    edit("modules.json", name_modules)
    edit("sentence_bert_config.json", spell_transformer)
    # Some readers truncate to the lesser of two lengths, of which one was never the model's.
    edit("tokenizer_config.json", lambda config: config.pop("max_length", None))


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
            names = {tensor.name for tensor in record.inputs}
            if features.keys() >= names:
                inputs = {name: features[name] for name in names}
                outputs = self.session.in_batches(record.name, inputs)
                return {name: value.float() for name, value in outputs.items()}
        raise InputError(
            f"no graph of this export takes {features.get('modality', 'these')} inputs; use the model itself"
        )


class ExportedTransformer(Transformer):
    """The library's `Transformer` over an export: the first of `SentenceTransformer(modules=[...])`."""

    def _load_model(
        self, model_name_or_path: str, transformer_task: Any, config: Any, *_: Any, **options: Any
    ) -> Any:
        session = options.get("session") or GraphSession.load(model_name_or_path)
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
    folder, manifest = session.folder, session.manifest
    name = next(name for name, use in USES.items() if use == manifest.use)
    try:
        first = read_json(folder / "modules.json")[0]["type"]
        model = getattr(sentence_transformers, name)._load_with_module_classes(
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
    for graph in manifest.graphs:
        longest = session.longest(graph.name, "length")
        if longest is not None and longest < (model.max_seq_length or longest + 1):
            model.max_seq_length = longest
    outputs = {tensor.name for graph in manifest.graphs for tensor in graph.outputs}
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
    images: Sequence[Any]
    origin: str

    @classmethod
    def of(cls, texts: Sequence[str], images: Sequence[Any], use: Use, origin: str) -> Samples:
        """Make samples of texts, some shortened, empty or joined; or pairs, a few queries with many texts."""
        if use == "ranking":
            pairs = [(query, text) for query in texts[:4] for text in texts[-12:]]
            return cls(pairs, (), f"{len(pairs)} pairs of {origin}")
        short = ["", *(" ".join(text.split()[:words]) for words, text in enumerate(texts[:6], 1))]
        joined = [" ".join(texts[: 2**power]) for power in range(1, 6)]
        samples = [*texts, *short, *joined]
        return cls(samples, images, f"{len(samples)} texts of {origin}")


class _Inputs:
    """The samples of a graph, as a reference stores them: texts in JSON, or pixels."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.pixels, texts = tensors.get("pixel_values"), list[Any]()
        if self.pixels is None:
            texts = json.loads(tensors["texts"].numpy().tobytes())
        self.texts = [tuple(text) if isinstance(text, list) else text for text in texts]
        self.count = len(texts) if self.pixels is None else len(self.pixels)

    def features(self, model: Any, rows: Sequence[int]) -> dict[str, Any]:
        """Return the features of some samples, as the model makes them."""
        if self.pixels is None:
            features = model.preprocess([self.texts[row] for row in rows])
        else:
            dtype = next(model.parameters(), self.pixels).dtype
            features = {"pixel_values": self.pixels[[*rows]].to(dtype), "modality": "image"}
        return {
            name: value.to(model.device) if isinstance(value, Tensor) else value
            for name, value in features.items()
        }

    def run(self, model: Any, rows: Sequence[int]) -> dict[str, Tensor]:
        """Run a model on samples; returns results by the names of the graph's outputs, and the tokens of each row."""
        features = self.features(model, rows)
        with torch.inference_mode():
            computed = model(dict(features))
        results = {
            name: computed[feature].float().cpu()
            for feature, name in LIBRARY_OUTPUTS.items()
            if feature in computed
        }
        tokens, mask = results.get("last_hidden_state"), features.get("attention_mask")
        if mask is None:
            mask = torch.ones(len(rows), 1 if tokens is None else tokens.shape[1])
        mask = mask.bool().cpu()
        if tokens is not None:
            results["last_hidden_state"] = tokens[mask]
            if tokens.shape[2] > _WIDEST_TOKEN:
                del results["last_hidden_state"]
        return results | {"tokens": mask.sum(1)}

    def run_each(self, model: Any) -> dict[str, Tensor]:
        """Run a model on every sample alone."""
        rows = [self.run(model, [row]) for row in range(self.count)]
        return {name: torch.cat([results[name] for results in rows]) for name in rows[0]}


def keep_results(manifest: Manifest, folder: Path, model: Any, samples: Samples) -> Reference:
    """Write the reference of the model into the folder of an export: its results on every sample alone."""
    model = model.eval()
    rounded = None if manifest.dtype == "fp32" else in_dtype(model, DTYPES[manifest.dtype])
    tensors: dict[str, Tensor] = {}
    rounding: dict[str, float] = {}
    for record in manifest.graphs:
        is_image = record.inputs[0].name == "pixel_values"
        if not (samples.images if is_image else samples.texts):
            raise InputError(
                f"there is nothing to compare {record.name} on; give {'images' if is_image else 'texts'} too"
            )
        if is_image:
            stored = {"pixel_values": model.preprocess([*samples.images])["pixel_values"]}
        else:
            texts = bytearray(json.dumps([*samples.texts]).encode())
            stored = {"texts": torch.frombuffer(texts, dtype=torch.uint8)}
        inputs = _Inputs(stored)
        truth = inputs.run_each(model)
        tensors |= {f"{record.name}.{name}": value for name, value in (stored | truth).items()}
        for name, value in ({} if rounded is None else inputs.run_each(rounded)).items():
            rounding[f"{record.name}.{name}"] = float((value - truth[name]).abs().max())
    reference = Reference(tensors, rounding)
    manifest.examples = samples.origin
    keep_reference(manifest, folder, reference)
    return reference


class LibraryComparison(Comparison):
    """An export of a model of sentence-transformers compared, from texts to the results of all its modules."""

    @cached_property
    def session(self) -> GraphSession:
        """The graphs in a runtime."""
        runtime = self.open_runtime(self.manifest)
        session = GraphSession(self.folder, runtime, manifest=self.manifest)
        session.warm_up()
        self.description = session.description
        return session

    @cached_property
    def model(self) -> Any:
        """The export in sentence-transformers."""
        return open_exported(self.session)

    def reference_of(self, graph: str) -> Reference:
        """Return the reference of a graph."""
        start = f"{graph}."

        def within(values: Mapping[str, Any]) -> dict[str, Any]:
            names = (name for name in values if name.startswith(start))
            return {name.removeprefix(start): values[name] for name in names}

        return Reference(within(self.tensors), within(self.reference.rounding))

    def rows(self, graph: GraphName, *, judging: bool | None = None) -> Tensor:
        """Return the samples, by index, that a graph takes; every second one to judge 8 bits or to fit their scales."""
        tokens = self.reference_of(graph).tensors["tokens"]
        rows = torch.arange(len(tokens))
        if judging is not None:
            rows = rows[int(judging and len(rows) > 1) :: 2]
        longest = self.session.longest(graph, "length")
        rows = rows if longest is None else rows[tokens[rows] <= longest]
        if not len(rows):
            raise ExportError(
                f"graph {graph!r} takes {longest} tokens, and all samples are longer; export it for longer texts"
            )
        return rows

    def feeds(self, record: GraphRecord, *, judging: bool = False) -> list[Feed]:
        """See `Comparison.feeds`: every second sample, in batches of some."""
        inputs, session = _Inputs(self.reference_of(record.name).tensors), self.session
        rows = self.rows(record.name, judging=judging)
        feeds = []
        for chunk in chunks(
            len(rows), min(4, len(rows), session.longest(record.name, "batch") or 4)
        ):
            features = inputs.features(self.model, rows[chunk].tolist())
            features = {tensor.name: features[tensor.name] for tensor in record.inputs}
            prepared, _, _ = session.prepare(record.name, features)
            feeds.append(
                {
                    name: (value.float() if value.is_floating_point() else value).cpu().numpy()
                    for name, value in prepared.items()
                }
            )
        return feeds

    def run(self) -> tuple[list[Check], list[RankCheck]]:
        """See `Comparison.run`."""
        checks: list[Check] = []
        ranks: list[RankCheck] = []
        threshold, manifest = threshold_of(self.manifest), self.manifest
        quantised = bool(manifest.options.get("arithmetic"))
        unit = torch.finfo(torch.bfloat16 if quantised else DTYPES[manifest.dtype]).eps
        for record in manifest.graphs:
            reference = self.reference_of(record.name)
            rows = self.rows(record.name, judging=quantised or None)
            shapes, findings, results = self._compare(record, reference.tensors, rows)
            checks += findings.checks(shapes, threshold, reference, manifest.dtype)
            # All rows at once came last.
            name = "logits" if "logits" in results else "sentence_embedding"
            value, truth = results[name], reference.tensors[name][rows]
            if name == "logits":
                tie = max(1e-5, 2 * unit * float(truth.abs().max()))
                agreement = rank_agreement(value.T, truth.T, tie)
            else:
                tie = max(1e-5, 2 * unit)
                agreement = neighbour_agreement(value, truth, tie)
            ranks += judge_agreement(record.name, agreement, tie, threshold)
        return checks, ranks

    def _compare(
        self, record: GraphRecord, tensors: Mapping[str, Tensor], rows: Tensor
    ) -> tuple[list[list[int]], Findings, dict[str, Tensor]]:
        """Run samples one by one, in twos and together; returns shapes, errors, and the results of the last run."""
        inputs, findings = _Inputs(tensors), Findings(record.name)
        tokens = torch.arange(int(tensors["tokens"].sum())).split(tensors["tokens"].tolist())
        shapes, results, outputs = set[tuple[int, int]](), dict[str, Tensor](), dict[str, Tensor]()
        hook = self.model[0].model.register_forward_hook(lambda _, __, out: outputs.update(out))
        for size in dict.fromkeys((1, min(2, len(rows)), len(rows))):
            for chunk in chunks(len(rows), size):
                batch = rows[chunk]
                results = inputs.run(self.model, batch.tolist())
                shapes.add((len(batch), int(results.pop("tokens").max())))
                # What the graph itself pooled is compared besides what the library pools.
                pooled = [
                    (name, outputs[name].cpu()) for name in outputs if name == "sentence_embedding"
                ]
                for name, value in (*results.items(), *pooled):
                    index = batch
                    if name == "last_hidden_state":
                        index = torch.cat([tokens[row] for row in batch])
                    findings.add(name, value, tensors[name][index])
        hook.remove()
        return [list(shape) for shape in sorted(shapes)], findings, results


def neighbour_agreement(
    features: Tensor, truth: Tensor, tie: float, count: int = _NEIGHBOURS
) -> tuple[int, float, float] | None:
    """Compare the nearest neighbours of each row among the others by cosine; None for a single row.

    Returns the number of neighbours, and the shares that are kept, with ties counted as equal and without.
    """
    count = min(count, len(truth) - 1)
    if count < 1:
        return None
    cosines = [
        (rows @ rows.T).fill_diagonal_(-torch.inf)
        for rows in (nn.functional.normalize(rows.double(), dim=-1) for rows in (features, truth))
    ]
    (_, indices), (values, exact) = (table.topk(count) for table in cosines)
    within = cosines[1].gather(1, indices) >= values[:, -1:] - tie
    identical = (indices[:, :, None] == exact[:, None, :]).any(2)
    return within.numel(), float(within.double().mean()), float(identical.double().mean())
