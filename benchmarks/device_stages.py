"""The stages of `benchmarks.device`: functions of a `Context`, each in its own process.

Imports of Triton and of the model are local, so that every stage runs where what it needs is installed.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xfm_fast.errors import InputError
from xfm_fast.kernels import prepared
from xfm_fast.kernels.backend import compiler_fault, compiler_versions

from . import machine
from .device import STAGES, Context, why_absent
from .measure import Backend, Case, Run, benchmark
from .record import Document, plain
from .timing import DTYPES, Clocked, one_line, timed

Call = Callable[[], object]
# Tokens of captions in COCO, 13 on average.
_LENGTHS = (11, 12, 13, 14, 15)


def efficiency(
    device: torch.device,
    flops: float,
    seconds: float,
    *,
    speed: float = 1.0,
    traffic: float | None = None,
) -> dict[str, Any]:
    """Arithmetic of a run as fields of a row; `speed` is the rate of the dtype relative to bf16."""
    sheet = machine.data_sheet(device)
    return {
        "needed_flops": round(flops),
        "bytes": None if traffic is None else round(traffic),
        "mfu_data_sheet": flops / seconds / (speed * sheet.flops_per_s)
        if sheet and flops
        else None,
        "share_of_floor": traffic / sheet.bytes_per_s / seconds if sheet and traffic else None,
    }


def check_stages(context: Context) -> None:
    """A row of the versions that decide what can run, and the reasons of the stages that cannot, before any begins."""
    parts = [f"PyTorch {torch.__version__}", f"Python {sys.version.split()[0]}"]
    parts += [
        f"no {name}"
        for name in ("triton", "pydantic", "pytest")
        if importlib.util.find_spec(name) is None
    ]
    without, absent = STAGES[1:], dict[str, str]()
    try:
        capability = torch.cuda.get_device_capability() if context.device.type == "cuda" else None
        without = tuple(stage for stage in without if stage.gpu or "triton" in stage.needs)
        if capability is not None:
            parts.append(
                f"{torch.cuda.get_device_name()}, compute capability {capability[0]}.{capability[1]}"
            )
        if capability is not None and "no triton" not in parts:
            arch = 10 * capability[0] + capability[1]
            parts.append("Triton {}, ptxas {}".format(*compiler_versions(arch)))
            if (fault := compiler_fault(arch)) is not None:
                absent, note = _unprepared(fault, arch)
                parts.append(note)
            _launch_one(context.device)
    except Exception as error:  # of CUDA, of a broken installation, of a kernel that is wrong
        absent = {stage.name: one_line(error) for stage in without}
        parts.append(one_line(error))
    for stage in STAGES[1:]:
        print(
            f"{stage.name}: {why_absent(stage, context.device_name) or absent.get(stage.name) or 'can run'}"
        )
    context.append(absent=absent)
    context.add("check", "what can run here", "device", reason="; ".join(parts), unit="stages")


def _launch_one(device: torch.device) -> None:
    """Compile and run a kernel without attention, against its definition."""
    from xfm_fast.kernels import ops, reference

    x, weight = torch.randn(64, 768, device=device), torch.ones(768, device=device)
    found = ops.layer_norm(x, weight, weight, 1e-5, backend="triton")
    torch.testing.assert_close(
        found, reference.layer_norm(x, weight, weight, 1e-5), atol=1e-5, rtol=1e-5
    )


def _unprepared(fault: str, arch: int) -> tuple[dict[str, str], str]:
    """The stages of attention without prepared kernels, and a note; `operations` has a reason in every such row."""
    folder, purposes = os.environ.get(prepared.ENVIRONMENT), set[str]()
    reason = note = f"{fault}; or name prepared kernels with --kernels"
    if folder:
        try:
            manifest = prepared.install(Path(folder), arch)
            purposes, note = set(manifest.purposes), f"attention from {folder}: {manifest}"
            reason = f"{fault}; its launches are not among the prepared kernels"
        except InputError as error:
            reason = note = f"{fault}; {error}"
    return {
        stage.name: reason for stage in STAGES if stage.attends and stage.name not in purposes
    }, note


def describe_machine(context: Context) -> None:
    """Hardware, system and versions, and whether the peak of the GPU is known."""
    facts = machine.describe()
    context.append(machine=facts)
    if context.device.type == "cuda":
        known = machine.data_sheet(context.device) is not None
        reason = None if known else "no data sheet of it is known: shares of its peak are left out"
        context.add("machine", facts["gpus"][0]["name"], "PyTorch sees it", reason=reason)


def measure_ceilings(context: Context) -> None:
    """Rates of a large copy, and of a square GEMM in every dtype that the device multiplies."""
    device = context.device
    size = 512 if context.small else 8192 if device.type == "cuda" else 2048
    moved = 2 * (64 << 20 if context.small or device.type == "cpu" else 2 << 30)
    source = torch.ones(moved // 8, dtype=torch.float32, device=device)
    copy: Call = partial(torch.empty_like(source).copy_, source)
    _add_ceiling(
        context, f"copy of {moved // 2 >> 20} MiB", "fp32", lambda: copy, traffic=float(moved)
    )
    generator = torch.Generator().manual_seed(0)
    # A GPU multiplies zeros faster than random numbers.
    x, y = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    # TF32 stays on once it is set, so it is the last.
    rates = (
        {"bf16": 1.0, "fp16": 1.0, "fp8": 2.0, "tf32": 0.5}
        if device.type == "cuda"
        else {"fp32": 0.5, "bf16": 1.0}
    )
    for dtype, speed in rates.items():
        name = f"product {size} × {size} × {size}"
        try:
            gemm = _gemm(dtype, x, y)
            gemm()
        except Exception as error:  # this card or this PyTorch lacks the dtype
            context.add(
                "ceiling", name, "torch", dtype=dtype, status="not offered", reason=one_line(error)
            )
            continue
        _add_ceiling(
            context, name, dtype, partial(_gemm, dtype, x, y), flops=2.0 * size**3, speed=speed
        )


def _gemm(dtype: str, x: Tensor, y: Tensor) -> Call:
    if dtype == "fp8":
        a, b = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)
        scale = torch.ones(len(x), 1, device=x.device)
        return partial(torch._scaled_mm, a, b.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    return partial(torch.mm, x.to(kind), y.to(kind).t())


def _add_ceiling(
    context: Context,
    name: str,
    dtype: str,
    prepare: Callable[[], Call],
    flops: float = 0.0,
    **work: float,
) -> None:
    clock = Clocked(prepare, context.device)
    clock()
    seconds = [clock()[0] for _ in range(7)]
    share = efficiency(context.device, flops, statistics.median(seconds), **work)
    context.add(
        "ceiling",
        name,
        "torch",
        dtype=dtype,
        seconds=seconds,
        host_s=clock.host_s,
        timed_by=clock.by,
        **share,
    )


def compile_launches(context: Context) -> None:
    """A row of the time to run every backend of every case once, with a process per core, so that no later stage waits
    for a compiler.
    """
    from .work.kernels import case_names

    # All backends in bf16, ours in fp16.
    names, begun, failed = (
        case_names(context.device, DTYPES[context.dtype]),
        time.monotonic(),
        list[str](),
    )
    launches = [
        (name, dtype, context.device, context.small) for dtype in ("bf16", "fp16") for name in names
    ]
    with multiprocessing.get_context("spawn").Pool(
        min(len(os.sched_getaffinity(0)), len(launches))
    ) as pool:
        for launch, result in [(launch, pool.apply_async(run_case, launch)) for launch in launches]:
            try:
                result.get(max(0.1, context.left))
            except Exception as error:  # of any library, or TimeoutError
                failed.append(f"{launch[0]} in {launch[1]}: {one_line(error)}")
    context.add(
        "precompile", f"{len(launches)} launches", "xfm-fast", unit="launches", items=len(launches),
        seconds=[time.monotonic() - begun], status="failed" if failed else "measured",
        reason="; ".join(failed)[:600] or None,
    )  # fmt: skip


def run_case(
    name: str, dtype: str, device: torch.device, small: bool, alone: bool | None = None
) -> None:
    """Run the backends of a case once in every direction, or (by default in fp16) ours alone, which may raise."""
    from .work.kernels import CASES, DTYPES, OURS

    op, alone = (
        CASES[name](device, DTYPES[dtype], small),
        dtype == "fp16" if alone is None else alone,
    )
    for direction in op.work:
        for backend in op.backends(dtype, direction, band=0.0):
            if backend.lacking is None and (backend.name == OURS or not alone):
                with nullcontext() if backend.name == OURS else suppress(Exception):
                    backend.build()()()
    if device.type == "cuda":
        torch.cuda.synchronize()


_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
_NODE = re.compile(r"tests/kernels/(test_\w+\.py)(?:::(\S+))?")


def run_tests(context: Context) -> None:
    """Rows of the Triton tests by module, compiled on a GPU and interpreted without: passes and failures."""
    roots = Path(__file__).resolve().parents[1], Path.cwd()
    root = next(
        (root for root in roots if (root / "tests" / "kernels" / "triton_testing.py").is_file()),
        None,
    )
    if root is None:
        context.add(
            "tests",
            "Triton tests",
            "pytest",
            status="absent",
            reason="this is no checkout: it has no tests",
        )
        return
    compiled, environment, begun = context.device.type == "cuda", dict(os.environ), time.monotonic()
    tests = sorted(
        path.relative_to(root).as_posix()
        for path in (root / "tests/kernels").glob("test_triton_*.py")
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "--tb=line",
        "-rs",
        "-p",
        "no:cacheprovider",
        "--color=no",
        "-v",
        "-m",
    ]
    if compiled:
        # A module that lacks a package is one error, and the others run.
        command += [
            "gpu and not slow",
            "--continue-on-collection-errors",
            *tests,
            "tests/kernels/test_gpu.py",
        ]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(len(os.sched_getaffinity(0)))]
    else:
        environment["TRITON_INTERPRET"] = "1"
        chosen = ["tests/kernels/test_triton_contract.py", "-k", "gelu"] if context.small else tests
        command += ["not gpu and not slow", *chosen]
    log, incomplete = context.out / "pytest.txt", None
    with log.open("w") as output:
        try:
            limit = max(1.0, context.left - 1)
            subprocess.run(
                command,
                cwd=root,
                env=environment,
                stdout=output,
                stderr=output,
                timeout=limit,
                check=False,
            )
        except subprocess.TimeoutExpired:
            incomplete = "the rest was not reached in time"
    modules: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    # Behind the progress lines, a summary names failures again.
    text = log.read_text(errors="replace")
    for line in text.partition("short test summary")[0].splitlines():
        node, outcome = _NODE.search(line), _OUTCOME.search(line)
        if node and outcome:
            modules[node[1]][outcome[1].lower()].append(node[2] or "")
    add = partial(context.add, "tests", unit="tests")
    backend = "compiled" if compiled else "interpreted"
    for module, found in modules.items():
        failed = found["failed"] + found["error"]
        parts = [f"{len(names)} {outcome}" for outcome, names in sorted(found.items()) if names]
        parts += [", ".join(failed[:6])] if failed else []
        parts += (
            sorted(set(re.findall(r"cannot run: (.*?);", text)))[:1] if found["skipped"] else []
        )
        status = (
            "failed"
            if failed
            else "partial"
            if incomplete
            else "measured"
            if found["passed"]
            else "absent"
        )
        add(
            module,
            backend,
            status=status,
            items=len(found["passed"]),
            reason=", ".join(filter(None, [*parts, incomplete])),
        )
    if not modules:
        add(
            "Triton tests",
            backend,
            status="failed",
            items=0,
            reason=incomplete or "pytest ran none; see pytest.txt",
        )
    passed = sum(len(found["passed"]) for found in modules.values())
    add("all modules", backend, items=passed, seconds=[time.monotonic() - begun])


def run_sanitizer(context: Context) -> None:
    """Rows of memcheck and racecheck on small launches of every op, forward and backward."""
    # PyTorch's allocator gives out parts of large blocks, in which no access out of bounds is noticed.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        if context.left < 3:
            context.add_out_of_time("sanitizer", tool, "compute-sanitizer")
            continue
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command += context.command("launch_ops", small=True)
        begun, limit = time.monotonic(), context.left - 1
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=limit, check=False
            )
        except subprocess.TimeoutExpired:
            reason = f"not done in {limit:.0f} s"
            context.add("sanitizer", tool, "compute-sanitizer", status="partial", reason=reason)
            continue
        print(done.stdout[-20_000:], done.stderr[-5_000:])
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.stdout)
        lines = summary or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        fine = done.returncode == 0 and bool(summary)
        fields: dict[str, Any] = (
            {"seconds": [time.monotonic() - begun]} if fine else {"status": "failed"}
        )
        context.add(
            "sanitizer", tool, "compute-sanitizer", reason=lines[-1].strip()[:300], **fields
        )


def launch_ops(context: Context) -> None:
    """Every op of ours once, forward and backward, at small shapes."""
    from .work.kernels import case_names

    for name in case_names(context.device, torch.float16):
        run_case(name, "fp16", context.device, small=True)


def measure_cases(context: Context, measure: Callable[..., object], **given: Any) -> None:
    """Rows of a benchmark of the harness, each case as soon as it is measured."""
    written = 0

    def keep(document: Document) -> None:
        nonlocal written
        for row in document.rows[written:]:
            context.append(row=plain(row))
        written = len(document.rows)

    options = SimpleNamespace(device=context.device_name, dtype=context.dtype, quick=context.small)
    measure(options, keep=keep, **given)


def measure_ops(context: Context) -> None:
    """Rows of every case of `bench kernels`."""
    from .work import kernels

    measure_cases(context, kernels.run, deadline=time.perf_counter() + context.left)


def _random_model(context: Context, image_size: int, **parts: Any) -> Any:
    """The base model, or tiny if small, with random weights."""
    from xfm_fast.models.xfm import XFM

    from .inputs import preset_config, random_state

    config = preset_config("tiny" if context.small else "base").replace(image_size=image_size)
    with torch.device("meta"):
        model = XFM(config, **parts)
    needed = model.state_dict()
    state = random_state(config, parts["heads"], 0)
    model.load_state_dict(
        {name: state[name].to(context.device, DTYPES[context.dtype]) for name in needed},
        assign=True,
    )
    return model.eval().requires_grad_(False)


# Sizes and batches.
ENCODER = (224, 384), (1, 8, 64, 256)


def encoder(context: Context, image_size: int) -> Any:
    """The model with its vision encoder alone."""
    return _random_model(context, image_size, heads=(), encoders=("vision",))


def measure_encoder(context: Context) -> None:
    """Rows of the vision encoder at two sizes and four batches: eager, CUDA graph, fp8, and compiled at two points."""
    from xfm_fast import flops

    sizes, batches = ((32,), (1, 2)) if context.small else ENCODER
    # Compiling takes half a minute each.
    long = set() if context.small else {(224, 64), (224, 1)}

    def graph(model: Any, pixels: Tensor) -> Call:
        from xfm_fast.graphs import Shapes, capture

        return partial(capture(model, Shapes(images=(pixels.shape[0],))).encode_image, pixels)

    def fp8(model: Any, pixels: Tensor) -> Call:
        from xfm_fast.kernels import ops

        def run() -> object:
            with ops.use_fp8():
                return model.encode_image(pixels)

        return run

    def compiled(model: Any, pixels: Tensor) -> Call:
        return partial(torch.compile(model.encode_image, dynamic=False), pixels)

    @benchmark("encoder", title="The vision encoder", reference="eager")
    def run(run: Run) -> Iterator[Case]:
        for size in sizes:
            model = encoder(context, size)
            for batch in batches:
                pixels = torch.randn(
                    batch, 3, size, size, device=context.device, dtype=DTYPES[context.dtype]
                )
                ways = {
                    "eager": lambda model, pixels: partial(model.encode_image, pixels),
                    "CUDA graph": graph,
                }
                ways |= {
                    "fp8": fp8,
                    **({"torch.compile": compiled} if (size, batch) in long else {}),
                }
                backends = [
                    Backend(
                        name,
                        "fp8" if name == "fp8" else context.dtype,
                        partial(prepare, model, pixels),
                    )
                    for name, prepare in ways.items()
                ]
                needed = flops.image_encoder(model.config, batch).total
                yield Case(
                    "encoder", f"vision encoder, {batch} image{'s' if batch > 1 else ''} of {size}", backends,
                    "images", batch, count=lambda *_, needed=needed: {"needed_flops": needed}, warmups=3,
                    deadline=time.perf_counter() + context.left,
                )  # fmt: skip

    measure_cases(context, run)


def training_step(context: Context, pairs: int) -> tuple[Call, Any]:
    """A step of ITC, ITM, IMLM and MIM, forward and backward under autocast, and its batch."""
    from .inputs import preset_config
    from .tasks import PRETRAINING
    from .work.training import AUTOCAST, make_step

    config = preset_config("tiny" if context.small else "base")
    batch = random_pairs(config, pairs)
    step = make_step(PRETRAINING, config, 0, {"batch": batch}, context.device)
    return lambda: step.run("xfm-fast", AUTOCAST[context.dtype]), batch


def measure_training_step(context: Context) -> None:
    """A row of pairs per second of a training step."""
    from xfm_fast import flops

    from .inputs import preset_config

    config, pairs = preset_config("tiny" if context.small else "base"), 4 if context.small else 96
    step, batch = training_step(context, pairs)
    seconds: list[float] = []
    for number in range(12):
        _, taken = timed(step, context.device)
        # The first two compile and allocate.
        seconds += [taken] if number >= 2 else []
        if seconds and context.left < 2 * taken:
            break
    masked = (batch.masked_labels != -100).sum(1).tolist()
    needed = flops.pretraining_step(config, batch.attention_mask.sum(1).tolist(), masked).total
    context.add(
        "train-step", f"training step, {pairs} pairs of {config.image_size} px, ITC + ITM + IMLM + MIM", "xfm-fast",
        dtype=context.dtype, unit="pairs", items=pairs, seconds=seconds,
        timed_by="events" if context.device.type == "cuda" else "clock",
        **efficiency(context.device, needed, statistics.median(seconds)),
    )  # fmt: skip


def random_pairs(config: Any, pairs: int) -> Any:
    """A `PairBatch` of random pixels and captions of the usual lengths, three tokens of each masked."""
    from xfm_fast.batches import PairBatch

    draw = torch.Generator().manual_seed(0)
    lengths = torch.tensor([_LENGTHS[number % len(_LENGTHS)] for number in range(pairs)])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    first = max(config.pad_token_id, config.bos_token_id, config.eos_token_id) + 1
    ids = torch.randint(first, config.vocab_size, mask.shape, generator=draw).masked_fill(
        ~mask, config.pad_token_id
    )
    positions = torch.stack(
        [1 + torch.randperm(int(n) - 2, generator=draw)[:3].sort().values for n in lengths]
    )
    return PairBatch(
        input_ids=ids,
        attention_mask=mask.long(),
        masked_input_ids=ids.scatter(1, positions, config.vocab_size - 1),
        masked_positions=positions,
        masked_labels=ids.gather(1, positions),
        patch_mask=torch.rand(pairs, config.num_patches, generator=draw).argsort(1)
        < config.num_masking_patches,
        image=torch.randn(pairs, 3, config.image_size, config.image_size, generator=draw),
    )


def rerank_coco(context: Context) -> None:
    """A row of pairs per second over the candidates of COCO-5k, on random embeddings, as far as the time goes."""
    from xfm_fast import flops
    from xfm_fast.tasks.reranking import (
        ImageIndex,
        ModelScorer,
        TextIndex,
        score_candidates,
        top_candidates,
    )

    device = context.device
    images, texts, k, size = (20, 60, 8, 32) if context.small else (5000, 25_010, 256, 384)
    # Not in inference mode: its tensors have no version, so that nothing could be cached between passes.
    model = _random_model(context, size, heads=("contrastive", "matching"))
    config, draw = model.config, torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=DTYPES[context.dtype])

    lengths = torch.tensor(
        [_LENGTHS[number % len(_LENGTHS)] for number in range(texts)], device=device
    )
    image_index = ImageIndex(
        noise(images, config.num_image_tokens, config.vision_width),
        F.normalize(noise(images, 64).float(), dim=-1),
    )
    text_index = TextIndex(
        noise(int(lengths.sum()), config.text_width),
        lengths,
        F.normalize(noise(texts, 64).float(), dim=-1),
    )
    candidates = top_candidates(image_index.features, text_index.features, k, k)
    scored = 0

    def progress(done: int, total: int) -> None:
        nonlocal scored
        scored = done
        if context.left < 1:
            raise TimeoutError

    # Compile and allocate before the clock runs.
    score_candidates(
        ModelScorer(model), image_index, text_index, candidates.of_images(0, 2), None, None, None
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    with suppress(TimeoutError):
        score_candidates(
            ModelScorer(model), image_index, text_index, candidates, None, None, progress
        )
    seconds, complete = time.perf_counter() - begun, scored == candidates.pairs
    if not scored:
        context.add_out_of_time(
            "rerank", f"COCO-5k re-ranking, {candidates.pairs} pairs", "xfm-fast"
        )
        return
    tokens, counts = lengths.cpu()[candidates.texts[:scored]].unique(return_counts=True)
    needed = sum(
        count * flops.fusion(config, [length], first_token_only=True, self_attended=True).total
        for length, count in zip(tokens.tolist(), counts.tolist(), strict=True)
    )
    reason = f"{scored / candidates.pairs:.0%} of the pairs"
    if not complete:
        reason += (
            f"; all {candidates.pairs:,} would take {seconds * candidates.pairs / scored:.0f} s"
        )
    context.add(
        "rerank", f"COCO-5k re-ranking at {size}, random embeddings, {scored} of {candidates.pairs} pairs", "xfm-fast",
        dtype=context.dtype, unit="pairs", items=scored, seconds=[seconds],
        status="measured" if complete else "partial", reason=reason, **efficiency(device, needed, seconds),
    )  # fmt: skip


def tune_kernels(context: Context) -> None:
    """Rows of the attention kernels before and after the search of their configurations, saved in the folder."""
    from xfm_fast.kernels import tune
    from xfm_fast.kernels.audit.compiling import describe, shipped_kernels
    from xfm_fast.kernels.triton.launch import architecture

    arch, gpu = architecture(context.device), torch.cuda.get_device_name(context.device)
    specs = {spec.name: spec for spec in shipped_kernels()}
    for name in (
        "relpos_forward",
        "relpos_forward_fragments",
        "relpos_dkdv",
        "relpos_dq",
        "varlen_forward",
    ):
        if name in specs and not tune.sizes(specs[name], [64], arch):
            continue
        if name not in specs or context.left < 5:
            context.add_out_of_time("tune", name, "searched", dtype="bf16")
            continue
        try:
            choice: Any = tune.search(specs[name], 64, "bf16", arch)
        except Exception as error:  # the next kernel goes on
            context.add(
                "tune", name, "searched", dtype="bf16", status="failed", reason=one_line(error)
            )
            continue
        tune.write([choice], arch, gpu, context.out)
        context.add("tune", name, "in use", dtype="bf16", seconds=[choice.before])
        context.add(
            "tune",
            name,
            "searched",
            dtype="bf16",
            seconds=[choice.seconds],
            reason=describe(choice.config),
        )
        if choice.flash is not None:
            context.add("tune", name, "flash-attn", dtype="bf16", seconds=[choice.flash])
