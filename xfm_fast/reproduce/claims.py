"""The paper's two claims on tiny models: stop-gradient preserves language, MIM guidance improves vision.

Language: an encoder learns English until it beats a bigram table, then trains on pairs with more or
less text, a strong or weak contrastive loss, and the gradients of the fusion losses stopped or not.
Vision: an encoder learns codes of images without captions; MIM then continues on these images, with
different targets, beside pairs of captioned images, and linear probes read attributes that only the
captions name.
"""

from __future__ import annotations

import ast
import copy
import hashlib
import json
import math
import os
import platform
import re
import shutil
import statistics
import subprocess
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from xfm_fast.batches import IGNORED, Batch
from xfm_fast.data.images import evaluation_transform
from xfm_fast.data.masking import MaskingOptions
from xfm_fast.data.options import PairStreamOptions, TextStreamOptions
from xfm_fast.data.shapes.language import captions
from xfm_fast.data.shapes.scenes import COLOURS, SHAPES, TEXTURES, render, scene
from xfm_fast.data.streams import Stream
from xfm_fast.errors import needs
from xfm_fast.io import read_json, write_bytes
from xfm_fast.models.xfm import ALL_HEADS, XFM
from xfm_fast.objectives import pretraining_losses
from xfm_fast.reproduce import Progress, check_same_study, page
from xfm_fast.tokenizer import CaptionTokenizer
from xfm_fast.training.distributed import Losses
from xfm_fast.training.loop import train
from xfm_fast.training.recipe import Recipe, load_recipe

with needs("vision"):
    from scipy import stats
    from scipy.cluster.vq import kmeans2

STEM = "claims-tiny-shapes"
RECIPE = "pretrain_tiny_shapes"
# No recipe was chosen on the scenes of this seed.
_SEED = 7
_VOCABULARY, _TOKENS, _CODES = 2000, 48, 64
# Sentences and scenes to measure losses, to fit probes and to test them; no run trains on them.
_MEASURED, _FITTED, _TESTED, _UNSEEN = 1200, 1200, 600, 10_000_000
_PACKAGE_LISTS, _LIST_READER = Path("/var/lib/apt/lists"), "/usr/lib/apt/apt-helper"

SHARES = {"0": 0, "1/8": 7, "1/2": 1}
"""Share of updates on text -> updates on pairs per update on text."""
WEIGHTS = (0.0, 0.1, 1.0)
"""Factors of the contrastive loss."""
_LANGUAGE = (
    "model.text_width=128",
    "model.text_layers=4",
    "model.text_intermediate=256",
    "streams.images=null",
    f"streams.text.max_tokens={_TOKENS}",
    "streams.text.masking={probability: 0.25, most: 12}",
)
_VISION = (
    "model.patch_size=4",
    "model.num_masking_patches=24",
    "model.min_num_patches=4",
    f"model.codebook_size={_CODES}",
    "streams.text=null",
    "streams.images.paths=images_test.jsonl",
    "streams.images.batch_size=24",
)
_PAIRS = ("streams.pairs.losses=[itc,itm,imlm]", "streams.pairs.batch_size=24", "steps=120")


class Part(NamedTuple):
    """A training run of the study."""

    start: str | None
    """Part whose encoder it starts from; the remaining weights are random."""
    overrides: tuple[str, ...]
    itc: float = 1.0
    """Factor of the contrastive loss."""
    target: Literal["codes", "guided", "frozen"] = "guided"
    """Target of MIM."""


def dose(share: str, itc: float, *, stop: bool) -> str:
    """Return the name of a part of the language study."""
    return f"text {share}, ITC × {itc:g}, {'with' if stop else 'without'} stop-gradient"


def _dose(share: str, itc: float, stop: bool) -> Part:
    text = ["streams.text=null"]
    if every := SHARES[share]:
        text = [f"streams.text.every={every}", "streams.text.batch_size=16"]
        text.append("updates=[[text],[pairs]]")
    gradient = f"method.stop_gradient={str(stop).lower()}"
    return Part("language", (*_LANGUAGE, *text, *_PAIRS, gradient), itc)


_IMAGES_TOO = (*_VISION, *_PAIRS, "updates=[[images],[pairs]]")
PARTS = {
    "language": Part(
        None,
        (
            *_LANGUAGE,
            "streams.pairs=null",
            "updates=[[text]]",
            "streams.text.batch_size=64",
            "optimizer.lr=2e-3",
            "schedule.min_lr=2e-3",
            "schedule.warmup=0.1334",
            "steps=2250",
            "checkpoint.every=250",
        ),
    ),
    **{
        dose(share, itc, stop=stop): _dose(share, itc, stop)
        for share, itc, stop in product(SHARES, WEIGHTS, (True, False))
    },
    "vision": Part(
        None, (*_VISION, "streams.pairs=null", "updates=[[images]]", "steps=600"), target="codes"
    ),
    "codes": Part("vision", _IMAGES_TOO, target="codes"),
    "guided": Part("vision", _IMAGES_TOO),
    "frozen": Part("vision", _IMAGES_TOO, target="frozen"),
    "no MIM": Part("vision", (*_VISION, *_PAIRS, "streams.images=null", "updates=[[pairs]]")),
}
COMPARED = (
    *(
        (dose(share, itc, stop=False), dose(share, itc, stop=True))
        for share, itc in product(SHARES, WEIGHTS)
    ),
    ("guided", "no MIM"),
    ("guided", "codes"),
    ("guided", "frozen"),
    ("codes", "no MIM"),
)
"""Part, and the part to subtract, paired by seed."""


def run_claims(
    out: Path,
    *,
    seeds: int = 5,
    overrides: Sequence[str] = (),
    on_change: Progress = lambda results: None,
) -> dict[str, Any]:
    """Train and measure every part with every seed, one after the other; returns the results.

    The first stages are trained once. Finished parts are reused and killed ones resume; a signal ends the
    study with parts in `missing`.
    """
    out = out.absolute()
    check_same_study(out, tuple(overrides))
    if not (out / "text.json").is_file():
        _write_text(out)
    for seed, name in _plan(seeds):
        if not _result(out, seed, name).is_file():
            if not _run(out, seed, name, overrides):
                break
            on_change(read_results(out, seeds))
    return read_results(out, seeds)


def _plan(seeds: int) -> Iterator[tuple[int, str]]:
    for seed, (name, part) in product(range(seeds), PARTS.items()):
        if part.start is not None or seed == 0:
            yield seed, name


def documents() -> Iterator[tuple[str, str, str]]:
    """Yield source, name and text of every eighth package description of apt, and of Python's documentation."""
    # Packages of one source have text in common and, mostly, the beginning of the name.
    pattern = re.compile(
        r"Package: (?:lib|python3?-)?(\w{1,5}).*?Description-en: (.*)", flags=re.DOTALL
    )
    for path in sorted(_PACKAGE_LISTS.glob("*_Translation-en*")):
        command = [_LIST_READER, "cat-file", path]
        listing = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout.decode()
        for entry in listing.split("\n\n")[::8]:
            if match := pattern.match(entry):
                yield "Debian's package descriptions", match[1], match[2].replace("\n", "\n\n", 1)
    for name, text in topics.items():
        yield "Python's documentation", name, text
    for path in sorted(Path(os.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node)
                if text:
                    yield "Python's documentation", path.stem, text


def is_held_out(name: str) -> bool:
    """Return whether a document is held out, as a sixteenth of them is."""
    return zlib.crc32(name.encode()) % 16 == 0


def _write_text(out: Path) -> None:
    """Write the training and held-out sentences, the tokenizer, and `text.json`, which describes them."""
    sentences: dict[str, tuple[str, str]] = {}
    for source, name, text in documents():
        for passage in re.split(r"(?<=[.:;])\s+|\n\s*\n", text.replace("\n .\n", "\n\n")):
            sentence = " ".join(passage.split())
            if sentence.isascii() and 6 <= len(sentence.split()) <= 32:
                sentences.setdefault(sentence, (source, name))
    learnt = [text for text, (_, name) in sentences.items() if not is_held_out(name)]
    held_out = sorted(sentences.keys() - set(learnt), key=lambda text: zlib.crc32(text.encode()))
    described = (text for index in range(2000) for text in captions(scene(_SEED, index)))
    tokenizer = CaptionTokenizer.train_on_texts([*learnt, *described], _VOCABULARY)
    tokenizer.save(out / "tokenizer.json")
    learnt_ids = tokenizer.encode_ids(learnt, _TOKENS)
    held_out_ids = tokenizer.encode_ids(held_out[:_MEASURED], _TOKENS)
    content = "\n".join(sentences).encode()
    description = {
        "sentences": Counter(source for source, _ in sentences.values()),
        "held_out": len(held_out),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "bigram": bigram_cost(learnt_ids, held_out_ids, _VOCABULARY),
    }
    for name, texts in {"learnt": learnt, "held_out": held_out}.items():
        lines = [json.dumps({"desc": text}) + "\n" for text in texts]
        write_bytes({out / f"{name}.jsonl": "".join(lines).encode()})
    write_bytes({out / "text.json": json.dumps(description, indent=1).encode()})


def bigram_cost(
    learnt: Iterable[Sequence[int]], held_out: Iterable[Sequence[int]], size: int
) -> float:
    """Compute the nats per token of a table of bigrams, interpolated with frequencies.

    The first token of a text is excepted. The weights are those of Witten and Bell (1991); every token
    counts once more than it occurs.
    """
    first, second = _bigrams(learnt)
    counts = torch.bincount(first * size + second, minlength=size * size).view(size, size).double()
    frequencies = (counts.sum(0) + 1) / (counts.sum() + size)
    types = (counts > 0).sum(1, keepdim=True).clamp_min(1)
    table = (counts + types * frequencies) / (counts.sum(1, keepdim=True) + types)
    first, second = _bigrams(held_out)
    return -table[first, second].log().mean().item()


def _bigrams(rows: Iterable[Sequence[int]]) -> Tensor:
    return torch.tensor([bigram for row in rows for bigram in pairwise(row)]).t()


def _result(out: Path, seed: int, name: str) -> Path:
    return out / f"seed-{seed}" / (re.sub(r"[^a-z0-9.]+", "-", name.lower()) + ".json")


def _run(out: Path, seed: int, name: str, overrides: Sequence[str]) -> bool:
    """Train and measure a part; returns False if a signal stopped it."""
    part, path = PARTS[name], _result(out, seed, name)
    folder = path.with_suffix("")
    settings = (
        "device=cpu",
        "streams.regions=null",
        f"streams.text.paths={out / 'learnt.jsonl'}",
        f"data={out / 'world'}",
        f"shapes={{seed: {_SEED}, train: 1000, val: 2, test: 4000, known: 500, resolution: 32}}",
        f"seed={seed}",
        f"checkpoint.folder={folder}",
        f"tokenizer={out / 'tokenizer.json'}",
        f"model.vocab_size={_VOCABULARY}",
    )
    recipe = load_recipe(RECIPE, (*settings, *part.overrides, *overrides))
    torch.manual_seed(seed)
    model = XFM(recipe.model, heads=(*ALL_HEADS, "codes"))
    if part.start is not None:
        start = XFM.from_pretrained(_result(out, 0, part.start).with_suffix("") / "model")
        prefixes = ("vision_encoder.", "lm_head.")
        if part.start == "language":
            prefixes = ("text_encoder.",)
        weights = start.state_dict().items()
        copied = {name: weight for name, weight in weights if name.startswith(prefixes)}
        model.load_state_dict(copied, strict=False)
    result = train(recipe, model=model, objective=losses_for(part, recipe, model))
    if result.interrupted:
        return False
    with torch.inference_mode():
        measure = object_probes if "vision" in (name, part.start) else language_metrics
        metrics = measure(result.model.eval(), out)
    write_bytes({path: json.dumps(metrics, indent=1).encode()})
    # The models of the first stages are needed again; checkpoints of every run would fill the disk.
    shutil.rmtree(folder / "checkpoints" if part.start is None else folder)
    return True


def losses_for(part: Part, recipe: Recipe, start: XFM) -> Losses:
    """Return the losses of a part, whose training starts with the weights of `start`."""
    mim_target = None
    if part.target == "codes":
        centres = codebook(recipe.model.image_size, recipe.model.patch_size)
        mim_target = partial(nearest_codes, centres)
    elif part.target == "frozen":
        mim_target = copy.deepcopy(start).eval().encode_image

    def losses_of(model: XFM, batch: Batch, *, losses: Iterable[str]) -> dict[str, Tensor]:
        values = pretraining_losses(
            model,
            batch,
            losses=[name for name in losses if name != "itc" or part.itc],
            stop_gradient=recipe.method.stop_gradient,
            mim_target=mim_target,
        )
        if "itc" in values:
            values["itc"] = part.itc * values["itc"]
        return values

    return losses_of


@cache
def codebook(image_size: int, patch_size: int) -> Tensor:
    """Cluster the patches of images without captions: centres `[V, 3 P²]`."""
    patches = _patches(_images(range(500), image_size), patch_size).flatten(0, 1).unique(dim=0)
    generator = torch.Generator().manual_seed(_SEED)
    initial = patches[torch.randperm(len(patches), generator=generator)[:_CODES]]
    centres, _ = kmeans2(patches.numpy(), initial.numpy(), minit="matrix")
    return torch.from_numpy(centres)


def nearest_codes(centres: Tensor, pixels: Tensor) -> Tensor:
    """Return the nearest centres of the patches of images `[B, 3, R, R]`: codes `[B, N]`."""
    patches = _patches(pixels, math.isqrt(centres.shape[1] // 3))
    return torch.cdist(patches, centres).argmin(-1)


def _patches(pixels: Tensor, size: int) -> Tensor:
    return F.unfold(pixels, size, stride=size).transpose(1, 2)


def _images(indices: Iterable[int], size: int) -> Tensor:
    transform = evaluation_transform(size)
    scenes = (scene(_SEED, index, "test") for index in indices)
    return torch.stack([transform(Image.fromarray(render(drawn, 32))) for drawn in scenes])


def language_metrics(model: XFM, out: Path) -> dict[str, float]:
    """Measure nats per hidden token of held-out English and of new captions, and probe the order of words."""
    tokenizer = CaptionTokenizer.from_files(out / "tokenizer.json")
    mask_token = tokenizer.mask_token_id
    lines = (out / "held_out.jsonl").read_text().splitlines()
    sentences = [json.loads(line)["desc"] for line in lines]
    text = TextStreamOptions(shuffle=False, max_tokens=_TOKENS, masking=MaskingOptions(0.15, 7))
    pairs = PairStreamOptions(shuffle=False, augment=False, max_tokens=32)
    stream = partial(Stream, config=model.config, tokenizer=tokenizer, batch_size=50, seed=0)
    texts = stream([{"desc": sentence} for sentence in sentences[:_MEASURED]], text)
    captioned = stream(out / "world" / "pairs_known.jsonl", pairs)
    probed = sentences[_MEASURED : _MEASURED + _FITTED + _TESTED]
    return {
        "nats": hidden_token_loss(model, texts, "mlm", mask_token),
        "captions": hidden_token_loss(model, captioned, "imlm", mask_token),
        "order": order_probe(model, tokenizer, probed),
    }


def hidden_token_loss(model: XFM, stream: Stream[Any], name: str, mask_token: int) -> float:
    """Average the loss of an epoch, in which the mask token hides every token to predict."""
    losses = []
    for index in range(len(stream)):
        batch = stream.batch(index)
        ids, positions = batch.masked_input_ids, batch.masked_positions
        tokens = torch.where(batch.masked_labels == IGNORED, ids.gather(1, positions), mask_token)
        batch = replace(batch, masked_input_ids=ids.scatter(1, positions, tokens), layout=None)
        losses.append(pretraining_losses(model, batch, losses=[name])[name].item())
    return statistics.fmean(losses)


def order_probe(model: XFM, tokenizer: CaptionTokenizer, sentences: Sequence[str]) -> float:
    """Probe mean text features for swapped words in the middle of every second sentence."""
    rows = [sentence.split() for sentence in sentences]
    for words in rows[1::2]:
        middle = len(words) // 2
        words[middle - 1 : middle + 1] = words[middle], words[middle - 1]
    ids, mask = tokenizer.encode([*map(" ".join, rows)], _TOKENS, pad_to_longest=True)
    features = model.encode_text(ids, mask).sum(1) / mask.sum(1, keepdim=True)
    return probe(features, torch.arange(len(rows))[:, None] % 2 > 0)


def object_probes(model: XFM, out: Path) -> dict[str, float]:
    """Probe mean image features for attributes of objects in images without captions."""
    indices = range(_UNSEEN, _UNSEEN + _FITTED + _TESTED)
    features = model.encode_image(_images(indices, model.config.image_size)).mean(1)
    scenes = [scene(_SEED, index, "test").things for index in indices]
    metrics = {}
    for name, words in {"colour": COLOURS, "shape": SHAPES, "texture": TEXTURES}.items():
        values = [{getattr(thing, name) for thing in things} for things in scenes]
        targets = torch.tensor([[word in present for word in words] for present in values])
        metrics[name] = probe(features, targets)
    return metrics


def probe(features: Tensor, targets: Tensor) -> float:
    """Fit linear probes of features `[N, D]` for binary targets `[N, K]`; returns their mean AUC in percent.

    They are fitted by least squares to the first rows, and tested on the last.
    """
    x = F.pad(features.double(), (0, 1), value=1.0)
    weights = torch.linalg.lstsq(x[:_FITTED], targets[:_FITTED].double()).solution
    scores = x[_FITTED:] @ weights
    ranks = []
    for column, truth in zip(scores.unbind(1), targets[_FITTED:].unbind(1), strict=True):
        ranks.append((column[truth][:, None] - column[~truth]).sign().mean().item())
    return 50 + 50 * statistics.fmean(ranks)


def read_results(out: Path, seeds: int) -> dict[str, Any]:
    """Read the metrics of all parts by seed, differences with 95% intervals, the text, and missing parts."""
    results: dict[str, dict[int, dict[str, float]]] = {name: {} for name in PARTS}
    missing = []
    for seed, name in _plan(seeds):
        path = _result(out, seed, name)
        if path.is_file():
            results[name][seed] = read_json(path)
        else:
            missing.append([name, seed])
    differences = []
    for name, baseline in COMPARED:
        compared = sorted(results[name].keys() & results[baseline].keys())
        if not compared:
            continue
        metrics = {}
        for metric in results[name][compared[0]]:
            metrics[metric] = mean_interval(
                [results[name][seed][metric] - results[baseline][seed][metric] for seed in compared]
            )
        differences.append(
            {"part": name, "minus": baseline, "seeds": len(compared), "metrics": metrics}
        )
    return {
        "python": platform.python_version(),
        "text": read_json(out / "text.json"),
        "parts": results,
        "differences": differences,
        "missing": missing,
    }


def mean_interval(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean and half of its 95% interval (Student's t); None for a single value."""
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return mean, None
    quantile = float(stats.t.ppf(0.975, count - 1))
    return mean, quantile * statistics.stdev(values) / math.sqrt(count)


def markdown(results: dict[str, Any]) -> str:
    """Write the results as a Markdown page."""
    text, rows = results["text"], []
    for name, by_seed in results["parts"].items():
        runs = list(by_seed.values())
        metrics = runs[0] if runs else {}
        intervals = {metric: mean_interval([run[metric] for run in runs]) for metric in metrics}
        rows.append((name, len(runs), intervals))
    for row in results["differences"]:
        rows.append((f"{row['part']} − {row['minus']}", row["seeds"], row["metrics"]))
    tables = []
    for metrics in (("nats", "captions", "order"), ("colour", "shape", "texture")):
        table = [["part", "seeds", *metrics]]
        for name, count, intervals in rows:
            if metrics[0] in intervals:
                cells = [_format_interval(*intervals[metric]) for metric in metrics]
                table.append([name, str(count), *cells])
        tables.append(table)
    sources = " and ".join(
        f"{count:,} sentences of {source}" for source, count in text["sentences"].items()
    )
    explanation = (
        f"Tiny models, Python {results['python']}. Text: {sources}, {text['bytes']:,} bytes, SHA-256 "
        f"{text['sha256'][:16]}…; {text['held_out']:,} are held out, by document, and cost {text['bigram']:.2f} nats "
        "a token by a table of bigrams. nats: per hidden token of held-out text; captions: per hidden token of new "
        "captions beside their images; order: a linear probe of text features for two words that changed places. "
        "colour, shape, texture: linear probes of image features for attributes in images without captions. Probes: "
        "area under the ROC curve in percent, chance 50. Means over seeds ± half the 95% interval (Student's t); "
        "differences are paired by seed."
    )
    return page("The two claims of the paper in miniature", explanation, *tables)


def _format_interval(mean: float, half: float | None) -> str:
    return f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"
