"""Exports of models of sentence-transformers: the folder, the module that runs it, the comparison on sentences.

The folder has what the library saves, with `onnx/model.onnx` in place of the weights, as sentence-transformers, fastembed
and Text Embeddings Inference read it. `ExportedTransformer` is the library's `Transformer` over the graph of any runtime,
so prompts, truncation, pooling and normalisation stay the library's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.errors import CheckpointError, InputError, UnavailableError, needs
from xfm_fast.io import read_json

from .expected import Reference, keep_reference
from .findings import Comparison, Feed, Findings, chunks, rank_check, threshold_of
from .graphs import DTYPES, in_dtype
from .layers import with_children
from .manifest import Check, GraphRecord, Manifest, RankCheck
from .request import USES, Use
from .runtimes import Runtime, first_line
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
    """The graph of an export in place of a model of transformers, from inputs by name to outputs by name in fp32."""

    def __init__(self, session: GraphSession, config: Any) -> None:
        super().__init__()
        self.session, self.config, self.device = session, config, session.device
        self.record = session.manifest.graphs[0]

    def forward(self, **features: Any) -> dict[str, Tensor]:
        """Run the graph on the features that it takes."""
        if "token_type_ids" not in features and "input_ids" in features:
            features["token_type_ids"] = torch.zeros_like(features["input_ids"])
        inputs = {tensor.name: features[tensor.name] for tensor in self.record.inputs}
        outputs = self.session.in_batches(self.record.name, inputs)
        return {name: value.float() for name, value in outputs.items()}


class ExportedTransformer(Transformer):
    """The library's `Transformer` module over an export: `SentenceTransformer(modules=[ExportedTransformer.load(folder), ...])`."""

    def _load_model(
        self,
        model_name_or_path: str,
        transformer_task: Any,
        config: Any,
        *_: Any,
        session: GraphSession | None = None,
        **__: Any,
    ) -> Any:
        session = session or GraphSession.load(model_name_or_path)
        session.padding_id = session.example_id = config.get_text_config().pad_token_id or 0
        return GraphModel(session, config)


def open_exported(session: GraphSession) -> Any:
    """Open the model of an export in sentence-transformers; raises `CheckpointError` if its files do not fit."""
    folder = session.folder
    class_name = next(name for name, use in USES.items() if use == session.manifest.use)
    try:
        first = read_json(folder / "modules.json")[0]["type"]
        return getattr(sentence_transformers, class_name)._load_with_module_classes(
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


@dataclass(frozen=True)
class Samples:
    """What an export is compared on: texts, pairs of texts, or images `[N, 3, H, W]` as the model takes them."""

    items: Sequence[Any]
    origin: str

    @classmethod
    def of_texts(cls, texts: Sequence[str], use: Use, origin: str) -> Samples:
        """Make samples of texts: some longer by joining, or queries paired with all others."""
        if use == "ranking":
            side = max(isqrt(len(texts)), 1)
            pairs = [(query, text) for query in texts[:side] for text in texts[-side:]]
            return cls(pairs, f"{len(pairs)} pairs of {origin}")
        joined = [" ".join(texts[: 2**power]) for power in range(1, 6)]
        return cls([*texts, *joined], f"{len(texts) + len(joined)} sentences of {origin}")


def generated_samples(model: Any, count: int = 48) -> Samples:
    """Generate samples without data: texts of random tokens, or noise."""
    generator = torch.Generator().manual_seed(0)
    tokenizer = model[0].tokenizer
    if tokenizer is None:
        raise InputError("there is nothing to compare on; give examples")
    texts = []
    for length in torch.randint(1, 24, (count,), generator=generator).tolist():
        ids = torch.randint(len(tokenizer), (length,), generator=generator)
        texts.append(tokenizer.decode(ids, skip_special_tokens=True))
    return Samples.of_texts(texts, use_of(model), "random tokens")


def keep_results(
    manifest: Manifest, folder: Path, model: Any, samples: Samples | None = None
) -> Reference:
    """Write the reference of the model into the folder of an export: its results on every sample alone."""
    samples = generated_samples(model) if samples is None else samples
    truth = _all_results(model, samples.items)
    rounding = {}
    if manifest.dtype != "fp32":
        rounded = _all_results(in_dtype(model, DTYPES[manifest.dtype]), samples.items)
        rounding = {name: float((rounded[name] - truth[name]).abs().max()) for name in rounded}
    content = json.dumps([*samples.items]).encode()
    tensors = {"samples": torch.frombuffer(bytearray(content), dtype=torch.uint8), **truth}
    reference = Reference(tensors, rounding)
    manifest.examples = samples.origin
    keep_reference(manifest, folder, reference)
    return reference


def _all_results(model: Any, items: Sequence[Any]) -> dict[str, Tensor]:
    """Return results of a model, one item at a time, and the tokens of each."""
    model = model.eval()
    results: dict[str, list[Tensor]] = {"tokens": []}
    for item in items:
        features = _features(model, [item])
        results["tokens"].append(_token_mask(features).sum()[None])
        for name, value in _results(model, features).items():
            results.setdefault(name, []).append(value)
    return {name: torch.cat(values) for name, values in results.items()}


def _features(model: Any, items: Sequence[Any]) -> dict[str, Any]:
    features = model.preprocess([tuple(item) if isinstance(item, list) else item for item in items])
    return {
        name: value.to(model.device) if isinstance(value, Tensor) else value
        for name, value in features.items()
    }


def _token_mask(features: Mapping[str, Any]) -> Tensor:
    return features["attention_mask"].bool()


def _results(model: Any, features: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return what the modules of a model compute, by the names of the graph's outputs; tokens without padding."""
    with torch.inference_mode():
        computed = model(dict(features))
    results = {}
    for name, feature in _RESULTS.items():
        value = computed.get(feature)
        if value is None or value.shape[-1] > _WIDEST_TOKEN and value.dim() > 2:
            continue
        value = value.float().cpu()
        results[name] = value[_token_mask(features).cpu()] if value.dim() > 2 else value
    return results


class LibraryComparison(Comparison):
    """An export of a model of sentence-transformers compared, from texts to the results of all its modules."""

    @cached_property
    def items(self) -> list[Any]:
        """Samples of the reference."""
        return json.loads(self.tensors["samples"].numpy().tobytes())

    @cached_property
    def model(self) -> Any:
        """The export in sentence-transformers."""
        session = GraphSession(
            self.folder, self.open_runtime(self.manifest), manifest=self.manifest
        )
        session.warm_up()
        self.description = session.description
        return open_exported(session)

    def _rows(self, *, judging: bool) -> Tensor:
        """Return the samples, by index, of which those that judge 8 bits are not those that fit them."""
        return torch.arange(int(judging), len(self.items), 2)

    def run(self) -> tuple[list[Check], list[RankCheck]]:
        """See `Comparison.run`."""
        model, record = self.model, self.manifest.graphs[0]
        threshold = threshold_of(self.manifest)
        rows = torch.arange(len(self.items))
        if self.manifest.options.get("arithmetic"):
            rows = self._rows(judging=True)
        findings, shapes, graph = Findings(record.name), [], list[Mapping[str, Tensor]]()
        model[0].model.register_forward_hook(lambda module, args, outputs: graph.append(outputs))
        ends = self.tensors["tokens"].cumsum(0)
        results: dict[str, Tensor] = {}
        for size in dict.fromkeys((1, min(2, len(rows)), len(rows))):
            for chunk in chunks(len(rows), size):
                chosen = rows[chunk]
                features = _features(model, [self.items[row] for row in chosen.tolist()])
                results = _results(model, features)
                tokens = torch.cat(
                    [torch.arange(end - count, end) for end, count in zip(
                        ends[chosen], self.tensors["tokens"][chosen], strict=True)]
                )
                for name, value in results.items():
                    index = tokens if name == "last_hidden_state" else chosen
                    findings.add(name, value, self.tensors[name][index])
                if "sentence_embedding" in graph[-1]:
                    pooled = graph[-1]["sentence_embedding"].cpu()
                    findings.add("sentence_embedding", pooled, self.tensors["sentence_embedding"][chosen])
                shape = [*features[record.inputs[0].name].shape]
                if shape not in shapes:
                    shapes.append(shape)
        return findings.checks(shapes, threshold, self.reference, self.manifest.dtype), []
