"""Documents of every benchmark as they are written, made up and quick."""

from __future__ import annotations

import random
import statistics
from typing import Any, Literal

from xfm_fast.benchmarks import record
from xfm_fast.benchmarks.record import Baseline, Comparison, Document, Mode, Row, Trial

MACHINE: dict[str, Any] = {
    "cpu": "Example CPU",
    "architecture": "x86_64",
    "cpu_features": ["AVX2", "AVX-512"],
    "cores_physical": 2,
    "cores_logical": 4,
    "threads": 2,
    "memory_gb": 16.0,
    "memory_available_gb": 12.0,
    "load_average": [0.1, 0.2, 0.1],
    "gpus": [],
    "system": "Linux",
    "python": "3.12.1",
    "torch": "2.9.0",
    "mkl": True,
    "onednn": True,
    "versions": {"numpy": "2.1", "triton": None},
    "xfm_fast": "0.1.0",
    "commit": "0123456789abcdef",
    "dirty": False,
}
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


def samples(middle: float, count: int, seed: int, spread: float = 0.03) -> list[float]:
    """Positive times around a median, with a tail."""
    draw = random.Random(seed)
    return [middle * (1 + spread * abs(draw.gauss(0, 1))) for _ in range(count)]


def _row(scenario: str, mode: Mode, contender: str, dtype: str, pace: float, count: int) -> Row:
    name, unit, items, official, intensity = _WORK[scenario]
    middle = official * _PACE[contender] * (0.4 if dtype == "bf16" else 1.0) * pace
    times = samples(middle, count, len(scenario) + 7 * len(contender) + len(mode))
    ordered = sorted(times)

    def quantile(share: float) -> record.Interval:
        value = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
        return record.Interval(value=value, low=value * 0.97, high=value * 1.04)

    row = Row(
        work=scenario,
        mode=mode,
        contender=contender,
        label=LABELS[contender],
        dtype=dtype,
        name=name,
        point=record.Point(image_size=384),
        status="measured",
        unit=unit,
        items=items,
        parity=record.Parity(error=1.3e-6, band=1e-5, passed=True, against="official-algorithm fp32"),
        memory=record.Memory(peak_bytes=2_490_000_000, grown_bytes=30_000_000, method="high-water mark"),
        cost=record.Cost(build_s=0.0 if contender != "onnxruntime" else 31.0, load_s=0.8, first_call_s=0.5),
        energy_note="no RAPL counter: /sys/class/powercap is absent",
        conditions=record.Conditions(
            gemm_flops_per_s=[3.4e11, 3.5e11],
            copy_bytes_per_s=[1.9e10, 1.92e10],
            contended=contender == "compile",
            drift=1.01,
        ),
    )
    roof = 3.4e11 if dtype == "fp32" else 2.6e12
    share = min(0.28 / _PACE[contender], 0.9)
    efficiency = record.Efficiency(
        flops=25_000_000_000,
        needed_flops=25_000_000_000,
        mfu=share,
        utilisation=share,
        bytes=10_000_000,
        intensity=intensity,
        roof=min(roof, intensity * 1.9e10),
        roof_bound="compute" if roof < intensity * 1.9e10 else "memory",
        share_of_roof=share,
    )
    changes: dict[str, Any] = {}
    if mode == "offline":
        rate = record.Interval(value=items / middle, low=items / middle * 0.97, high=items / middle * 1.02)
        changes = {"seconds": times, "throughput": rate, "efficiency": efficiency}
        if contender == "xfm-fast" and scenario == "rerank":
            parts = (("image memory", 0.21), ("fusion", 0.76), ("matching head", 0.03))
            changes["stages"] = [record.Share(name=part, seconds=middle * share, share=share) for part, share in parts]
    else:
        changes["latency"] = record.Latency(
            samples=times, p50=quantile(0.5), p90=quantile(0.9), p99=quantile(0.99), mean=sum(times) / len(times)
        )
        parts = (("matrix products", 0.72), ("attention", 0.16), ("norms", 0.07), ("the rest", 0.05))
        changes["operations"] = [record.Share(name=part, seconds=middle * share, share=share) for part, share in parts]
    if mode == "server":
        best = 0.7 / middle
        trials = [_trial(best * step, middle, step) for step in (0.4, 0.8, 1.0, 1.2, 1.6)]
        changes |= {
            "operations": [],
            "server": record.Server(
                max_qps=best,
                bound_s=4 * official,
                bound_origin="4 x the p99 of one request of the official algorithm (fp32)",
                largest_batch=8,
                seed=0,
                trials=trials,
            ),
        }
    if scenario != "embed-image":
        useful = 12 * items
        changes["tokens"] = record.Tokens(
            useful=useful, padded=40 * items, useful_per_s=useful / middle, padded_per_s=40 * items / middle
        )
    return row.model_copy(update=changes)


def _trial(rate: float, middle: float, step: float) -> Trial:
    p99 = middle * (1.5 + 2 * step**6)
    return Trial(
        rate=rate,
        served_per_s=rate * 0.98,
        requests=120,
        late=0 if step <= 1 else 9,
        p50=middle,
        p90=middle * 1.3,
        p99=p99,
        mean_batch=1 + step,
        held=step <= 1,
        cut=step > 1.5,
    )


def scenarios(pace: float = 1.0, *, count: int = 20, dtypes: tuple[str, ...] = ("fp32", "bf16")) -> Document:
    """All modes of three kinds of work; `pace` multiplies the times of xfm-fast."""
    rows: list[Row] = []
    modes: tuple[Mode, ...] = ("single-stream", "offline", "server")
    for scenario in _WORK:
        for mode in modes:
            group = [
                _row(scenario, mode, contender, dtype, pace if contender == "xfm-fast" else 1.0, count)
                for contender in LABELS
                for dtype in (dtypes if contender == "xfm-fast" else ("fp32",))
            ]
            rows += [_compared(row, group) if row.contender == "xfm-fast" else row for row in group]
    gone = dict.fromkeys(("latency", "conditions", "memory", "cost", "parity")) | {"against": [], "operations": []}
    failed = {"status": "failed", "reason": "RuntimeError: out of <memory>"}
    rows.append(rows[1].model_copy(update={"contender": "openvino", "label": "OpenVINO"} | failed | gone))
    return _document("scenario", dtypes).model_copy(update={"rows": rows})


def _compared(row: Row, group: list[Row]) -> Row:
    def times(of: Row) -> list[float]:
        return of.seconds or (of.latency.samples if of.latency else [])

    against = []
    for other in group:
        if other.contender == row.contender:
            continue
        ratio = statistics.median(times(other)) / statistics.median(times(row))
        interval = {"low": 0.98 * ratio, "high": 1.03 * ratio}
        same = other.dtype == row.dtype
        against.append(
            Comparison(contender=other.contender, dtype=other.dtype, like_for_like=same, ratio=ratio, **interval)
        )
    return row.model_copy(update={"against": against})


def coco() -> Document:
    """A projected evaluation."""
    procedures: tuple[tuple[Literal["official-algorithm", "xfm-fast"], float], ...]
    procedures = (("official-algorithm", 333.0), ("xfm-fast", 25.0))
    evaluations = [
        record.Evaluation(
            procedure=procedure,
            dtype="fp32",
            kind="projected",
            pairs=7_682_560,
            flops=1.93e17,
            flops_per_s=1.6e11,
            seconds={"embed images": 2000.0, "embed texts": 900.0, "re-rank": hours * 3600},
            total_s=record.Interval(value=hours * 3600 + 2900, low=hours * 3590, high=hours * 3610),
        )
        for procedure, hours in procedures
    ]
    found = record.Coco(
        origin="the sizes of COCO's 5k test split",
        images=5000,
        texts=25_010,
        k=256,
        image_size=384,
        mean_length=12.6,
        padded_length=40,
        evaluations=evaluations,
        receipt=[
            record.ReceiptStep(saving="official procedure", flops=1.93e17, factor=1.0),
            record.ReceiptStep(saving="keys and values of an image projected once", flops=6.7e16, factor=2.9),
            record.ReceiptStep(saving="no padding", flops=2.1e16, factor=3.1),
        ],
        speed_up=record.Interval(value=13.0, low=12.8, high=13.2),
    )
    return _document("coco").model_copy(update={"coco": found})


def _document(benchmark: record.Benchmark, dtypes: tuple[str, ...] = ("fp32",)) -> Document:
    probes = {
        dtype: record.Probe(
            library="MKL" if dtype == "fp32" else "oneDNN",
            shape=[1280, 768, 3072],
            gemm_flops_per_s=3.4e11 if dtype == "fp32" else 2.6e12,
            copy_bytes_per_s=1.9e10,
            copy_buffer_bytes=1 << 28,
        )
        for dtype in dtypes
    }
    return Document(
        benchmark=benchmark,
        date="2026-11-24T22:00:00+00:00",
        command=["xfm-fast", "bench", benchmark, "--out", "results"],
        options={"preset": "base", "quick": False},
        device="cpu",
        machine=MACHINE,
        model=record.Model(
            preset="base",
            origin="random weights (seed 0)",
            trained=False,
            meaningful_recall=False,
            parameters=327_000_000,
            config={},
        ),
        data=record.Data(
            origin="eighteen photographs",
            photos=18,
            captions=90,
            tokenizer="a vocabulary trained on 90 captions",
            vocabulary=1163,
        ),
        cold_start=record.ColdStart(process_s=2.1, load_s=1.0, first_call_s=0.5),
        probes=probes,
        baselines=[
            Baseline(contender="xfm-fast", label="xfm-fast", works=["embed-image"], present=True, version="0.1.0"),
            Baseline(
                contender="tensorrt",
                label="TensorRT",
                works=["embed-image"],
                present=False,
                reason="the package tensorrt is not installed",
            ),
        ],
        duration_s=412.0,
    )


def pair(
    work: str,
    name: str,
    unit: str,
    times: dict[str, float],
    *,
    reference: str = "official-algorithm",
    contended: tuple[str, ...] = (),
    **more: Any,
) -> list[Row]:
    """Rows of xfm-fast in each type, so many times as fast as the reference in fp32, which is measured in all types."""
    label = {"official-algorithm": "official algorithm, eager"}.get(reference, reference)
    name_of_ours = "accelerated" if reference == "untouched" else "xfm-fast"
    conditions = record.Conditions(gemm_flops_per_s=[1e11, 1.1e11], copy_bytes_per_s=[], contended=False, drift=1.0)

    def row(contender: str, label: str, dtype: str, middle: float) -> Row:
        seconds = [0.97 * middle, middle, 1.04 * middle]
        rate = record.Interval(value=32 / middle, low=32 / seconds[-1], high=32 / seconds[0])
        return Row(
            work=work,
            contender=contender,
            label=label,
            dtype=dtype,
            name=name,
            status="measured",
            unit=unit,
            items=32,
            parity=record.Parity(error=3e-6, band=1e-5, passed=True, against=f"{reference} fp32"),
            throughput=rate,
            seconds=seconds,
            memory=record.Memory(peak_bytes=1_400_000_000, grown_bytes=90_000_000, method="high-water mark"),
            conditions=conditions.model_copy(update={"contended": dtype in contended}),
        ).model_copy(update=more)

    others = {dtype: row(reference, label, dtype, 1.0 if dtype == "fp32" else 0.5) for dtype in times}
    rows = []
    for dtype, factor in times.items():
        own = row("xfm-fast", name_of_ours, dtype, 1 / factor)
        against = []
        for kind in dict.fromkeys(("fp32", dtype)):
            ratio = factor * (1.0 if kind == "fp32" else 0.5)
            interval = {"low": 0.9 * ratio, "high": 1.05 * ratio}
            same = kind == dtype
            against.append(Comparison(contender=reference, dtype=kind, like_for_like=same, ratio=ratio, **interval))
        rows.append(own.model_copy(update={"against": against}))
    return [*rows, *others.values()]


def _absent(row: Row, status: record.Status, reason: str, **more: Any) -> Row:
    kept = {"status": status, "reason": reason, "parity": None, "throughput": None, "seconds": [], "against": []}
    return row.model_copy(update=kept | {"memory": None, "conditions": None} | more)


def suite() -> Document:
    """Two kinds of work in two types; a third type is not offered, and one row differs from the official results."""
    rows = pair("embed-text", "embed 32 captions (10-13 of 40 tokens)", "texts", {"fp32": 3.0, "bf16": 10.2})
    rerank = pair("rerank", "re-rank 1 image of 384 px x 64 captions", "pairs", {"fp32": 13.9, "bf16": 46.7})
    recall = {f"{way}_r{depth}": 50.0 for way in ("txt", "img") for depth in (1, 5, 10)}
    rerank[0] = rerank[0].model_copy(update={"recall": recall})
    rows += rerank
    rows.append(_absent(rows[0], "not offered", "this processor has no fp16", dtype="fp16"))
    rows.append(_absent(rows[0], "parity failed", "error 2.0e-02 exceeds 1.0e-05", work="odd", name="odd work"))
    skipped = [{"what": "<b>.jpg", "reason": "no image & no caption"}]
    made = _document("suite", ("fp32", "bf16"))
    assert made.data is not None
    data = made.data.model_copy(update={"skipped": [record.Skip(**skip) for skip in skipped]})
    return made.model_copy(update={"rows": rows, "data": data, "baselines": []})


def train_step() -> Document:
    """A step in two types, with its memory."""
    rows = pair("train-step", "training step, 8 pairs of 224 px", "pairs", {"fp32": 1.4, "bf16": 4.2})
    for place, row in enumerate(rows):
        use = record.Memory(
            peak_bytes=5_000_000_000 if row.ours else 10_000_000_000,
            grown_bytes=2_000_000_000 if row.ours else 3_000_000_000,
            method="high-water mark",
            before_bytes=1_800_000_000,
            parameter_bytes=1_400_000_000,
            gradient_bytes=1_400_000_000,
        )
        rows[place] = row.model_copy(update={"memory": use})
    return _document("train-step", ("fp32", "bf16")).model_copy(update={"rows": rows, "baselines": []})


def vqa() -> Document:
    """Questions answered in two types, of candidates and of a whole list."""
    asked = "5 questions to an image of 480 px"
    rows = pair("vqa", f"{asked}, 128 of 3,129 answers ranked", "questions", {"fp32": 8.0, "bf16": 15.0})
    every = f"{asked}, the best of all 3,129 answers (official: of 128)"
    rows += pair("vqa-all", every, "questions", {"fp32": 1.7, "bf16": 2.9})
    return _document("vqa", ("fp32", "bf16")).model_copy(update={"rows": rows, "baselines": []})


def drop_in() -> Document:
    """Two models in two types, one of them contended, and one that failed."""
    report = ["module           class         replaced by", "encoder.layer.0  RobertaLayer  FusedLayer"]
    texts = "RoBERTa-base, 32 captions of 10-16 tokens padded to 40"
    rows = pair("roberta", texts, "texts", {"fp32": 3.1, "bf16": 9.8}, reference="untouched", replaced=report)
    images = "BEiT-v2-B/16 at 224 px, 8 images"
    rows += pair("beit", images, "images", {"fp32": 1.2, "bf16": 4.4}, reference="untouched", contended=("bf16",))
    reason = "ImportError: no such class in this version of transformers"
    rows.append(_absent(rows[0], "failed", reason, work="bert", name="BERT-base cross-encoder", replaced=[]))
    return _document("drop-in").model_copy(update={"rows": rows, "model": None, "data": None, "baselines": []})


def kernels() -> Document:
    """An operation in two directions, with an alternative that is wrong and one that bounds the time."""
    rows: list[Row] = []
    for direction, factor in (("forward", 1.24), ("backward", 0.92)):
        made = pair("attention", "attention 8 x 197", "calls", {"fp32": factor}, reference="eager", direction=direction)
        alone = made[1].model_copy(update={"contender": "copy", "label": "copy", "bounds": True, "parity": None})
        rows += [*made, alone, _absent(made[1], "failed", "wrong: error 1e-2", contender="odd", label="wrong & odd")]
    return _document("kernels").model_copy(update={"rows": rows, "model": None, "data": None, "baselines": []})


def serve() -> Document:
    """A service at two numbers of clients, and its soak, which grew."""
    rows: list[Row] = []
    for clients, factor in ((1, 1.2), (32, 4.0)):
        told = record.Clients(
            clients=clients,
            requests=96,
            p50=record.Interval(value=0.02 * clients, low=0.018 * clients, high=0.022 * clients),
            p99=record.Interval(value=0.05 * clients),
            failures=0,
        )
        name = f"re-rank over HTTP: an image never seen and 16 captions, {clients} clients"
        rows += pair("serve-new", name, "requests", {"fp32": factor}, reference="one-at-a-time", clients=told)
    grown = {"work": "serve-soak", "name": "all kinds of requests for 10.0 minutes", "against": []}
    reason = "memory grew by 99,000,000 bytes"
    rows.append(rows[0].model_copy(update={**grown, "status": "failed", "reason": reason}))
    return _document("serve").model_copy(update={"rows": rows, "baselines": []})


DOCUMENTS = {
    "suite": suite,
    "scenario": scenarios,
    "coco": coco,
    "vqa": vqa,
    "train-step": train_step,
    "drop-in": drop_in,
    "kernels": kernels,
    "serve": serve,
}
