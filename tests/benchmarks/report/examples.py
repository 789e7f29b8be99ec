"""Documents of every benchmark, made up and quick."""

from __future__ import annotations

import random
import statistics
from typing import Any

from xfm_fast.benchmarks.record import (
    SCHEMA_VERSION,
    Baseline,
    Comparison,
    Data,
    Document,
    Extra,
    Model,
    Parity,
    Probe,
    Result,
    Skip,
    Status,
)

MACHINE: dict[str, Any] = {
    "cpu": "Example CPU", "cpu_features": ["AVX2", "AVX-512"], "cores_physical": 2, "cores_logical": 4, "threads": 2,
    "memory_gb": 16.0, "memory_available_gb": 12.0, "load_average": [0.1, 0.2, 0.1], "gpus": [], "system": "Linux",
    "python": "3.12.1", "torch": "2.9.0", "mkl": True, "onednn": True, "versions": {"numpy": "2.1", "triton": None},
    "xfm_fast": "0.1.0", "commit": "0123456789abcdef", "dirty": False,
}  # fmt: skip
LABELS = {
    "xfm-fast": "xfm-fast",
    "official-algorithm": "official algorithm, plain PyTorch",
    "compile": "torch.compile",
    "onnxruntime": "ONNX Runtime",
}
# Times of one run relative to the official algorithm's.
_PACE = {"xfm-fast": 0.31, "official-algorithm": 1.0, "compile": 0.8, "onnxruntime": 0.9}
_WORK = {
    "embed-image": ("embed 1 image of 384 px", "images", 1, 0.8, 260),
    "embed-text": ("embed 32 captions (10-13 of 40 tokens)", "texts", 32, 0.4, 12),
    "rerank": ("re-rank 1 image of 384 px x 64 captions (10-13 of 40 tokens)", "pairs", 64, 4.0, 95),
}


def _row(scenario: str, mode: Any, backend: str, dtype: str, pace: float, count: int) -> Result:
    name, unit, items, official, intensity = _WORK[scenario]
    middle = official * _PACE[backend] * (0.4 if dtype == "bf16" else 1.0) * pace
    draw = random.Random(len(scenario) + 7 * len(backend) + len(mode))
    times = [middle * (1 + 0.03 * abs(draw.gauss(0, 1))) for _ in range(count)]
    share = min(0.28 / _PACE[backend], 0.9)
    extra: Extra = {
        "peak_bytes": 2_490_000_000, "grown_bytes": 30_000_000, "load_s": 0.8, "first_call_s": 0.5,
        "needed_flops": 25_000_000_000, "bytes": 25_000_000_000 // intensity, "mfu": share, "roof": 3.4e11,
        "rate_low": 0.97 * items / middle, "rate_high": 1.02 * items / middle,
    }  # fmt: skip
    if scenario != "embed-image":
        extra |= {"tokens": 12 * items, "padded_tokens": 40 * items}
    if mode == "offline" and backend == "xfm-fast" and scenario == "rerank":
        extra["stages"] = {"image memory": 0.21, "fusion": 0.76, "matching head": 0.03}
    if mode == "single-stream":
        extra["operations"] = {"matrix products": 0.72, "attention": 0.16, "norms": 0.07, "everything else": 0.05}
    if mode == "server":
        best = 0.7 / middle
        trials = {f"{best * step:.6g}": middle * (1.5 + 2 * step**6) for step in (0.4, 0.8, 1.0, 1.2, 1.6)}
        extra |= {"max_qps": best, "bound_s": 4 * middle, "trials": trials, "p50_s": middle, "p99_s": 2 * middle}
        times = []
    return Result(
        work=scenario, mode=mode, backend=backend, label=LABELS[backend], dtype=dtype, name=name, status="measured",
        unit=unit, items=items, parity=Parity(error=1.3e-6, band=1e-5, passed=True, against="official-algorithm fp32"),
        seconds=times, contended=backend == "compile", extra=extra,
    )  # fmt: skip


def scenarios(pace: float = 1.0, *, count: int = 20, dtypes: tuple[str, ...] = ("fp32", "bf16")) -> Document:
    """All modes of three kinds of work; `pace` multiplies the times of xfm-fast."""
    rows: list[Result] = []
    for scenario in _WORK:
        for mode in ("single-stream", "offline", "server"):
            group = [
                _row(scenario, mode, backend, dtype, pace if backend == "xfm-fast" else 1.0, count)
                for backend in LABELS
                for dtype in (dtypes if backend == "xfm-fast" else ("fp32",))
            ]
            for row in group:
                if row.ours and row.seconds:
                    row.against = [
                        comparison(
                            other.backend, other.dtype, row.dtype,
                            statistics.median(other.seconds) / statistics.median(row.seconds),
                        )
                        for other in group
                        if not other.ours
                    ]  # fmt: skip
            rows += group
    rows.append(absent(rows[1], "failed", "RuntimeError: out of <memory>", backend="openvino", label="OpenVINO"))
    return document("scenario", *dtypes, rows=rows)


def comparison(backend: str, its: str, dtype: str, ratio: float) -> Comparison:
    """With an interval of some percent."""
    return Comparison(
        backend=backend, dtype=its, like_for_like=its == dtype, ratio=ratio, low=0.95 * ratio, high=1.04 * ratio
    )


def document(benchmark: str, *dtypes: str, rows: list[Result], reference: str = "official-algorithm") -> Document:
    """A document with a head."""
    own = benchmark in ("drop-in", "kernels")
    return Document(
        schema_version=SCHEMA_VERSION, benchmark=benchmark, title=f"The title of {benchmark}", reference=reference,
        date="2026-11-24T22:00:00+00:00", command=["xfm-fast", "bench", benchmark, "--out", "results"],
        options={"preset": "base", "quick": False}, device="cpu", machine=MACHINE, rows=rows,
        model=None if own else Model(
            preset="base", origin="random weights (seed 0)", trained=False, meaningful_recall=False,
            parameters=327_000_000, config={},
        ),
        data=None if own else Data(
            origin="eighteen photographs", photos=18, captions=90, vocabulary=1163,
            tokenizer="a vocabulary trained on 90 captions", skipped=[Skip(what="<b>.jpg", reason="no image & text")],
        ),
        cold_start={"imports": 2.1, "weights": 1.0, "first call": 0.5}, energy_note="no energy counter",
        probes=dict.fromkeys(
            dtypes or ["fp32"], Probe(library="MKL", gemm_flops_per_s=3.4e11, copy_bytes_per_s=1.9e10)
        ),
        baselines=[
            Baseline(backend="xfm-fast", label="xfm-fast", version="0.1.0"),
            Baseline(backend="tensorrt", label="TensorRT", reason="the package tensorrt is not installed"),
        ],
        duration_s=412.0,
    )  # fmt: skip


def pair(
    work: str, name: str, unit: str, times: dict[str, float], *, reference: str = "official-algorithm",
    contended: tuple[str, ...] = (), mode: Any = "offline", **extra: Any,
) -> list[Result]:  # fmt: skip
    """Rows of xfm-fast in each dtype, so many times as fast as the reference in fp32, which is measured in all."""
    label = {"official-algorithm": "official algorithm, eager"}.get(reference, reference)

    def row(backend: str, label: str, dtype: str, middle: float) -> Result:
        memory = {"peak_bytes": 1_400_000_000, "grown_bytes": 90_000_000, "memory_method": "high-water mark"}
        rates = {"rate_low": 32 / (1.04 * middle), "rate_high": 32 / (0.97 * middle)}
        return Result(
            work=work, mode=mode, backend=backend, label=label, dtype=dtype, name=name, status="measured", unit=unit,
            items=32, parity=Parity(error=3e-6, band=1e-5, passed=True, against=f"{reference} fp32"),
            seconds=[0.97 * middle, middle, 1.04 * middle], contended=dtype in contended, extra=memory | rates | extra,
        )  # fmt: skip

    rows = []
    for dtype, factor in times.items():
        ours = row("xfm-fast", "accelerated" if reference == "untouched" else "xfm-fast", dtype, 1 / factor)
        ours.against = [
            comparison(reference, kind, dtype, factor * (1.0 if kind == "fp32" else 0.5))
            for kind in dict.fromkeys(("fp32", dtype))
        ]
        rows.append(ours)
    return rows + [row(reference, label, dtype, 1.0 if dtype == "fp32" else 0.5) for dtype in times]


def absent(row: Result, status: Status, reason: str, **more: Any) -> Result:
    """A row without numbers."""
    kept = {"status": status, "reason": reason, "parity": None, "seconds": [], "against": [], "extra": {}}
    return row.model_copy(update=kept | more)


def suite() -> Document:
    """Two kinds of work in two dtypes; a third is not offered, and one row differs from the official results."""
    rows = pair("embed-text", "embed 32 captions (10-13 of 40 tokens)", "texts", {"fp32": 3.0, "bf16": 10.2})
    rerank = pair("rerank", "re-rank 1 image of 384 px x 64 captions", "pairs", {"fp32": 13.9, "bf16": 46.7})
    rerank[0].extra["recall"] = {f"{way}_r{depth}": 50.0 for way in ("txt", "img") for depth in (1, 5, 10)}
    rows += rerank
    rows.append(absent(rows[0], "not offered", "this processor has no fp16", dtype="fp16"))
    rows.append(absent(rows[0], "parity failed", "error 2.0e-02 exceeds 1.0e-05", work="odd", name="odd work"))
    return document("suite", "fp32", "bf16", rows=rows)


def coco() -> Document:
    """A projected evaluation."""
    rows = pair("coco", "evaluate 5,000 images x 25,010 texts, k = 256", "evaluations", {"fp32": 13.0})
    for row, hours in zip(rows, (25.6, 333.0), strict=True):
        row.items, row.seconds = 1, [3600 * hours]
        row.extra = {"stages": {"embed images": 2000.0, "re-rank": 3600 * hours}}
    rows[0].extra["receipt"] = {"official procedure": 1.93e17, "no padding": 6.7e16}
    return document("coco", rows=rows)


def train_step() -> Document:
    """A step in two dtypes, with its memory."""
    rows = pair("train-step", "training step, 8 pairs of 224 px", "pairs", {"fp32": 1.4, "bf16": 4.2})
    for row in rows:
        peak = 5_000_000_000 if row.ours else 10_000_000_000
        row.extra |= {"peak_bytes": peak, "grown_bytes": 2_000_000_000, "gradient_bytes": 1_400_000_000}
        if row.ours:
            row.extra["checkpointed_bytes"] = 3_300_000_000
    return document("train-step", "fp32", "bf16", rows=rows)


def drop_in() -> Document:
    """Two models in two dtypes, one of them contended, and one that failed."""
    report = ["module           class         replaced by", "encoder.layer.0  RobertaLayer  FusedLayer"]
    texts = "RoBERTa-base, 32 captions of 10-16 tokens padded to 40"
    rows = pair("roberta", texts, "texts", {"fp32": 3.1, "bf16": 9.8}, reference="untouched", replaced=report)
    images = "BEiT-v2-B/16 at 224 px, 8 images"
    rows += pair("beit", images, "images", {"fp32": 1.2, "bf16": 4.4}, reference="untouched", contended=("bf16",))
    rows.append(absent(rows[0], "failed", "ImportError: no such class", work="bert", name="BERT-base cross-encoder"))
    return document("drop-in", rows=rows, reference="untouched")


def kernels() -> Document:
    """An operation in two directions, with an alternative that is wrong and one that bounds the time."""
    rows: list[Result] = []
    for direction, factor in (("forward", 1.24), ("backward", 0.92)):
        made = pair("attention", "attention 8 x 197", "calls", {"fp32": factor}, reference="eager", mode=direction)
        alone = made[1].model_copy(update={"backend": "copy", "label": "copy", "extra": {"bounds": 1}, "parity": None})
        rows += [*made, alone, absent(made[1], "failed", "wrong: error 1e-2", backend="odd", label="wrong & odd")]
    return document("kernels", rows=rows, reference="eager")


def serve() -> Document:
    """A service at two numbers of clients, and its soak, which grew."""
    rows: list[Result] = []
    for clients, factor in ((1, 1.2), (32, 4.0)):
        name = f"re-rank over HTTP: an image never seen and 16 captions, {clients} clients"
        numbers = {"clients": clients, "clients_p50_s": 0.02 * clients, "clients_p99_s": 0.05 * clients}
        rows += pair("serve-new", name, "requests", {"fp32": factor}, reference="one-at-a-time", **numbers)
    rows.append(absent(rows[0], "failed", "memory grew by 99,000,000 bytes", work="serve-soak", name="all requests"))
    return document("serve", rows=rows, reference="one-at-a-time")


DOCUMENTS = {
    "suite": suite,
    "scenario": scenarios,
    "coco": coco,
    "train-step": train_step,
    "drop-in": drop_in,
    "kernels": kernels,
    "serve": serve,
}
