"""The models of a repository, decided before anything is written; what cannot be served is an error here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xfm_fast.errors import ExportError, InputError
from xfm_fast.tokenizer import CaptionTokenizer

from ..graphs import GraphName
from ..manifest import AxisRecord, GraphRecord, Manifest
from ..request import RankLimits, RepositoryOptions, ServedDevice
from ..slots import graph_slots, largest
from .configs import ModelBackend, graph_config, most_batch, rank_config
from .served_graphs import model_name

RANK_GRAPHS: tuple[GraphName, ...] = ("vision", "text", "image_memory", "fusion")
TOKENIZER_FILE = "tokenizer.json"

# What the official evaluation cuts captions to.
_OFFICIAL_TOKENS = 40


@dataclass(frozen=True)
class PlannedModel:
    """A model of the repository.

    Attributes:
        name: of its folder.
        backend: what runs it.
        config: content of `config.pbtxt`.
        manifest: of the part of the export that lies in its version folder.
        graphs: whose files lie there.
        script: in `backends/`, the `model.py` of a Python model.
    """

    name: str
    backend: ModelBackend
    config: dict[str, Any]
    manifest: Manifest
    graphs: tuple[GraphRecord, ...]
    script: str | None


def plan_models(
    manifest: Manifest, options: RepositoryOptions, tokenizer: CaptionTokenizer | None
) -> list[PlannedModel]:
    """The models of a repository.

    Args:
        manifest: of the export.
        options: see there.
        tokenizer: of the model; the rank pipeline needs it.

    Raises:
        ExportError: the export was found to differ from its model, lacks graphs of the pipeline, or is of a kind that
            the backend does not run.
        InputError: there is no tokenizer, or an option is off.
        DataError: the tokenizer does not belong to the model.
        UnavailableError: an option that is not known.
    """
    options.check()
    if manifest.status == "failed":
        raise ExportError(
            f"this export differs from the model that it was made from ({manifest.reason}); before serving "
            "it export it again, in another dtype or for another consumer"
        )
    backend = _backend(manifest, options)
    device = _device(manifest, options.device)
    models = []
    for record in manifest.graphs:
        name = model_name(options.prefix, record.name)
        # Packages are code, which a session wants to be asked for; a repository is code as a whole.
        runtime = "aoti" if manifest.kind == "aoti" else "auto"
        config = graph_config(name, record, backend, options, device, runtime)
        files = [file for file in manifest.files if file.name in record.files]
        part = manifest.model_copy(update={"graphs": [record], "files": files})
        script = "graph" if backend == "python" else None
        models.append(PlannedModel(name, backend, config, part, (record,), script))
    if options.pipeline == "rank":
        models.append(_rank_model(manifest, options, tokenizer, device))
    return models


def _backend(manifest: Manifest, options: RepositoryOptions) -> ModelBackend:
    kind, wanted = manifest.kind, options.backend
    native: dict[str, ModelBackend] = {"tensorrt": "tensorrt", "onnx": "onnxruntime"}
    if wanted == "auto":
        return native.get(kind, "python")
    if wanted != "python" and native.get(kind) != wanted:
        remedy = f"use {native[kind]} or python" if kind in native else "use the python backend"
        raise ExportError(f"Triton's {wanted} backend does not run an export to {kind}; {remedy}")
    return wanted


def _device(manifest: Manifest, wanted: ServedDevice) -> ServedDevice:
    """The device that compiled files are bound to, else the one that is wanted."""
    bound: ServedDevice | None = None
    if manifest.kind in ("tensorrt", "tensorrt-rtx"):
        bound = "gpu"
    elif manifest.package is not None:
        bound = "gpu" if manifest.package.device == "cuda" else "cpu"
    if bound is None:
        return wanted
    if wanted not in ("auto", bound):
        raise ExportError(
            f"this export to {manifest.kind} runs on a {bound.upper()} and the device asked for is {wanted}; choose "
            f"{bound}, or make another export"
        )
    return bound


def _rank_model(
    manifest: Manifest, options: RepositoryOptions, tokenizer: CaptionTokenizer | None, device: ServedDevice
) -> PlannedModel:
    missing = [graph for graph in RANK_GRAPHS if graph not in manifest.graph_names]
    if missing:
        raise ExportError(
            f"the rank pipeline needs the graphs {', '.join(RANK_GRAPHS)} and this export lacks {', '.join(missing)}; "
            "export them with --graphs, or choose the pipeline 'graphs'"
        )
    if all(output.name != "match_logits" for output in manifest.graph("fusion").outputs):
        raise ExportError(
            "the rank pipeline needs match logits, and the model was exported without its 'matching' head; export a "
            "model with it, or choose the pipeline 'graphs'"
        )
    if tokenizer is None:
        raise InputError(
            "the rank pipeline reads captions and no tokenizer was given; give the model's with --tokenizer, or choose "
            "the pipeline 'graphs'"
        )
    tokenizer.check(manifest.xfm_config)
    if manifest.tokenizer_sha256 not in (None, tokenizer.sha256()):
        raise InputError(
            f"the vocabulary in {tokenizer.origin} has sha256 {tokenizer.sha256()[:16]}… and the export was made with "
            f"{str(manifest.tokenizer_sha256)[:16]}…; give the one that the model was trained with"
        )
    records = [_capped(manifest.graph(graph), options.most_batch) for graph in RANK_GRAPHS]
    name = model_name(options.prefix, "rank")
    config = rank_config(name, TOKENIZER_FILE, _limits(manifest, records, options.limits), options, device)
    part = manifest.model_copy(update={"graphs": records, "files": []})
    return PlannedModel(name, "python", config, part, (), "rank")


def _capped(record: GraphRecord, most: int) -> GraphRecord:
    """The graph as Triton serves it, which takes no more rows than `max_batch_size`."""
    rows = most_batch(record, most)
    if not rows or record.profiles:
        return record
    batch = AxisRecord(least=record.axes["batch"].least, most=rows)
    return record.model_copy(update={"axes": record.axes | {"batch": batch}})


def _limits(manifest: Manifest, records: Sequence[GraphRecord], wanted: RankLimits) -> RankLimits:
    longest = [largest(graph_slots(record), "length") for record in records if record.name in ("text", "fusion")]
    tokens = min(_OFFICIAL_TOKENS, wanted.tokens, manifest.xfm_config.max_text_length, *filter(None, longest))
    if tokens < 3:
        raise ExportError(
            f"the graphs of this export take texts of {tokens} tokens, which hold no word between <s> and </s>; export "
            "with a greater length"
        )
    return RankLimits(wanted.images, wanted.captions, wanted.image_bytes, wanted.caption_characters, tokens)


def check_apart(folder: Path, out: Path) -> None:
    """Raise `InputError` where the repository and the export would lie in each other."""
    export, repository = folder.resolve(), out.resolve()
    if export == repository or export in repository.parents or repository in export.parents:
        raise InputError(f"{out} and the export {folder} lie in each other; choose a folder apart for the repository")
