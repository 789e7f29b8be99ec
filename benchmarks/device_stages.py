"""The stages of `benchmarks.device`: functions of a `Context`, each in its own process.

Imports of Triton and of the model are local, so that every stage runs with the packages it needs alone.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from itertools import cycle, islice
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
from .measure import Backend, Benchmark, Case, Run
from .record import OURS, Document, plain
from .timing import DTYPES, Clocked, one_line

Call = Callable[[], object]
Cases = Callable[[Run, float], Iterator[Case]]
_CPU = torch.device("cpu")
# Tokens of captions in COCO, 13 on average.
_CAPTION_LENGTHS = (11, 12, 13, 14, 15)
# Image sizes and batches of the encoder.
ENCODER_SIZES, ENCODER_BATCHES = (224, 384), (1, 8, 64, 256)
_STEP_PAIRS = 96
_TUNED = (
    "relpos_forward",
    "relpos_forward_fragments",
    "relpos_dkdv",
    "relpos_dq",
    "varlen_forward",
)


def check_stages(context: Context) -> None:
    """Add a row of the versions that decide what can run, and the reasons of the stages that cannot."""
    remarks = [f"PyTorch {torch.__version__}", f"Python {sys.version.split()[0]}"]
    for package in ("triton", "pydantic", "pytest"):
        if importlib.util.find_spec(package) is None:
            remarks.append(f"no {package}")
    broken, absent = STAGES[1:], dict[str, str]()
    try:
        gpu = context.device.type == "cuda"
        broken = tuple(stage for stage in broken if stage.gpu or "triton" in stage.needs)
        if gpu:
            major, minor = torch.cuda.get_device_capability()
            name = torch.cuda.get_device_name()
            remarks.append(f"{name}, compute capability {major}.{minor}")
            if "no triton" not in remarks:
                arch = 10 * major + minor
                remarks.append("Triton {}, ptxas {}".format(*compiler_versions(arch)))
                if (fault := compiler_fault(arch)) is not None:
                    absent, note = _unprepared(fault, arch)
                    remarks.append(note)
                _launch_one(context.device)
    except Exception as error:  # of CUDA, of a broken installation, of a kernel that is wrong
        absent = {stage.name: one_line(error) for stage in broken}
        remarks.append(one_line(error))
    for stage in STAGES[1:]:
        reason = why_absent(stage, context.device_name) or absent.get(stage.name)
        print(f"{stage.name}: {reason or 'can run'}")
    context.append(absent=absent)
    context.add("check", "what can run here", "device", reason="; ".join(remarks), unit="stages")


def _launch_one(device: torch.device) -> None:
    """Compile and run a kernel without attention, and compare it with its definition."""
    from xfm_fast.kernels import ops, reference

    x, weight = torch.randn(64, 768, device=device), torch.ones(768, device=device)
    output = ops.layer_norm(x, weight, weight, 1e-5, backend="triton")
    expected = reference.layer_norm(x, weight, weight, 1e-5)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def _unprepared(fault: str, arch: int) -> tuple[dict[str, str], str]:
    """Return the reasons of attention stages without prepared kernels, and a note.

    The stage `operations` has a reason in every such row.
    """
    folder, stages = os.environ.get(prepared.ENVIRONMENT), set[str]()
    reason = note = f"{fault}; or name prepared kernels with --kernels"
    if folder:
        try:
            manifest = prepared.install(Path(folder), arch)
            stages, note = set(manifest.purposes), f"attention from {folder}: {manifest}"
            reason = f"{fault}; its launches are not among the prepared kernels"
        except InputError as error:
            reason = note = f"{fault}; {error}"
    unprepared = (stage.name for stage in STAGES if stage.attends and stage.name not in stages)
    return dict.fromkeys(unprepared, reason), note


def describe_machine(context: Context) -> None:
    """Add hardware, system and versions, and whether the peak of the GPU is known."""
    facts = machine.describe()
    context.append(machine=facts)
    if context.device.type == "cuda":
        reason = None
        if machine.data_sheet(context.device) is None:
            reason = "no data sheet of it is known: shares of its peak are left out"
        context.add("machine", facts["gpus"][0]["name"], "PyTorch sees it", reason=reason)


def measure_cases(context: Context, benchmark: Benchmark) -> None:
    """Add the rows of a benchmark with a `deadline`, each case as soon as it is measured."""
    written = 0

    def keep(document: Document) -> None:
        nonlocal written
        for row in document.rows[written:]:
            context.append(row=plain(row))
        written = len(document.rows)

    options = SimpleNamespace(device=context.device_name, dtype=context.dtype, quick=context.small)
    benchmark(options, keep=keep, deadline=time.perf_counter() + context.left)


def cases(title: str, reference: str) -> Callable[[Cases], Callable[[Context], None]]:
    """Make a stage of a generator of cases from a `Run` and a deadline."""

    def decorate(generator: Cases) -> Callable[[Context], None]:
        benchmark = Benchmark("device", title, reference, generator)
        return partial(measure_cases, benchmark=benchmark)

    return decorate


@cases("Rates of a copy, and of GEMMs in every dtype that the device multiplies", "torch")
def measure_ceilings(run: Run, deadline: float) -> Iterator[Case]:
    """Yield a large copy, and a square GEMM in every dtype."""
    device, small, gpu = run.device, run.options.quick, run.device.type == "cuda"
    case = partial(
        Case,
        "ceiling",
        rounds=7,
        max_rounds=7,
        deadline=deadline,
        block=lambda prepare: Clocked(prepare, device),
    )
    copied = (2 << 30) if gpu and not small else 64 << 20
    source = torch.ones(copied // 4, dtype=torch.float32, device=device)
    copy: Call = partial(torch.empty_like(source).copy_, source)
    yield case(
        f"copy of {copied >> 20} MiB",
        [Backend("torch", "fp32", lambda: lambda: copy)],
        count=lambda *_: {"needed_flops": 0, "bytes": 2 * copied},
    )
    size = 8192 if gpu else 2048
    size = 512 if small else size
    # A GPU multiplies zeros faster than random numbers.
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    # TF32 stays on once it is set, so it is the last.
    for dtype in ("bf16", "fp16", "fp8", "tf32") if gpu else ("fp32", "bf16"):
        backend = Backend("torch", dtype, lambda dtype=dtype: partial(_gemm, dtype, x, y))
        try:
            _gemm(dtype, x, y)()
        except Exception as error:  # this card or this PyTorch lacks the dtype
            backend.lacking = "not offered", one_line(error)
        yield case(
            f"GEMM {size} × {size} × {size}",
            [backend],
            count=lambda *_: {"needed_flops": 2 * size**3},
        )


def _gemm(dtype: str, x: Tensor, y: Tensor) -> Call:
    if dtype == "fp8":
        a, b = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)
        scale = torch.ones(len(x), 1, device=x.device)
        return partial(torch._scaled_mm, a, b.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    torch_dtype = half.get(dtype, torch.float32)
    return partial(torch.mm, x.to(torch_dtype), y.to(torch_dtype).t())


def compile_launches(context: Context) -> None:
    """Run every backend of every case once, with a process per core, so that no later stage waits for a compiler."""
    from .work.kernels import case_names

    start, failures = time.monotonic(), list[str]()
    # All backends in bf16, ours in fp16.
    launches = [
        (name, dtype, context.device, context.small, dtype == "fp16")
        for dtype in ("bf16", "fp16")
        for name in case_names(context.device, DTYPES[context.dtype])
    ]
    processes = min(len(os.sched_getaffinity(0)), len(launches))
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results = [pool.apply_async(run_case, launch) for launch in launches]
        for (name, dtype, *_), result in zip(launches, results, strict=True):
            try:
                result.get(max(0.1, context.left))
            except Exception as error:  # of any library, or TimeoutError
                failures.append(f"{name} in {dtype}: {one_line(error)}")
    context.add(
        "precompile",
        f"{len(launches)} launches",
        OURS,
        unit="launches",
        items=len(launches),
        seconds=[time.monotonic() - start],
        status="failed" if failures else "measured",
        reason="; ".join(failures)[:600] or None,
    )


def run_case(name: str, dtype: str, device: torch.device, small: bool, ours_alone: bool) -> None:
    """Run the backends of a case once in every direction; errors of ours are raised."""
    from .work import kernels

    op = kernels.CASES[name](device, kernels.DTYPES[dtype], small)
    for direction in op.work:
        for backend in op.backends(dtype, direction, band=0.0):
            if backend.lacking is not None or (ours_alone and backend.name != OURS):
                continue
            with nullcontext() if backend.name == OURS else suppress(Exception):
                backend.build()()()
    if device.type == "cuda":
        torch.cuda.synchronize()


_OUTCOME = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
_NODE = re.compile(r"tests/kernels/(test_\w+\.py)(?:::(\S+))?")


def run_tests(context: Context) -> None:
    """Run the Triton tests, compiled on a GPU and interpreted without, and add a row per module."""
    for root in (Path(__file__).resolve().parents[1], Path.cwd()):
        if (root / "tests" / "kernels" / "triton_testing.py").is_file():
            break
    else:
        reason = "this is no checkout: it has no tests"
        context.add("tests", "Triton tests", "pytest", status="absent", reason=reason)
        return
    compiled, environment, start = context.device.type == "cuda", dict(os.environ), time.monotonic()
    paths = sorted((root / "tests/kernels").glob("test_triton_*.py"))
    tests = [path.relative_to(root).as_posix() for path in paths]
    command = [
        sys.executable,
        *["-m", "pytest", "--tb=line", "-rs", "-p", "no:cacheprovider", "--color=no", "-v"],
    ]
    if compiled:
        # A module that lacks a package is one error, and the others run.
        command += ["-m", "gpu and not slow", "--continue-on-collection-errors"]
        command += [*tests, "tests/kernels/test_gpu.py"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", str(len(os.sched_getaffinity(0)))]
    else:
        environment["TRITON_INTERPRET"] = "1"
        command += ["-m", "not gpu and not slow"]
        command += (
            ["tests/kernels/test_triton_contract.py", "-k", "gelu"] if context.small else tests
        )
    log, incomplete = context.out / "pytest.txt", None
    with log.open("w") as output:
        try:
            limit = max(1.0, context.left - 1)
            run = partial(subprocess.run, cwd=root, env=environment, timeout=limit, check=False)
            run(command, stdout=output, stderr=output)
        except subprocess.TimeoutExpired:
            incomplete = "the rest was not reached in time"
    text = log.read_text(errors="replace")
    modules = _outcomes(text)
    add = partial(context.add, "tests", unit="tests")
    backend = "compiled" if compiled else "interpreted"
    for module, outcomes in modules.items():
        failed, passed = outcomes["failed"] + outcomes["error"], outcomes["passed"]
        remarks = [
            f"{len(names)} {outcome}" for outcome, names in sorted(outcomes.items()) if names
        ]
        if failed:
            remarks.append(", ".join(failed[:6]))
        if outcomes["skipped"]:
            remarks += sorted(set(re.findall(r"cannot run: (.*?);", text)))[:1]
        if incomplete:
            remarks.append(incomplete)
        if failed:
            status = "failed"
        elif incomplete:
            status = "partial"
        else:
            status = "measured" if passed else "absent"
        add(module, backend, status=status, items=len(passed), reason=", ".join(remarks))
    if not modules:
        reason = incomplete or "pytest ran none; see pytest.txt"
        add("Triton tests", backend, status="failed", items=0, reason=reason)
    passed = sum(len(outcomes["passed"]) for outcomes in modules.values())
    add("all modules", backend, items=passed, seconds=[time.monotonic() - start])


def _outcomes(text: str) -> dict[str, defaultdict[str, list[str]]]:
    """Return the tests of every module by outcome, from the progress lines of pytest."""
    modules: dict[str, defaultdict[str, list[str]]] = {}
    # Behind the progress lines, a summary names failures again.
    for line in text.partition("short test summary")[0].splitlines():
        node, outcome = _NODE.search(line), _OUTCOME.search(line)
        if node and outcome:
            outcomes = modules.setdefault(node[1], defaultdict(list))
            outcomes[outcome[1].lower()].append(node[2] or "")
    return modules


def run_sanitizer(context: Context) -> None:
    """Run memcheck and racecheck on small launches of every op, forward and backward."""
    # PyTorch's allocator gives out parts of large blocks, in which no access out of bounds is noticed.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for tool in ("memcheck", "racecheck"):
        add = partial(context.add, "sanitizer", tool, "compute-sanitizer")
        if context.left < 3:
            context.add_out_of_time("sanitizer", tool, "compute-sanitizer")
            continue
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
        command += context.command("launch_ops", small=True)
        start, limit = time.monotonic(), context.left - 1
        try:
            run = partial(subprocess.run, env=environment, timeout=limit, check=False)
            process = run(command, capture_output=True, text=True)
        except subprocess.TimeoutExpired:
            add(status="partial", reason=f"not done in {limit:.0f} s")
            continue
        print(process.stdout[-20_000:], process.stderr[-5_000:])
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", process.stdout)
        lines = summary or process.stderr.strip().splitlines()
        reason = lines[-1].strip()[:300] if lines else f"exit code {process.returncode}"
        if process.returncode == 0 and summary:
            add(reason=reason, seconds=[time.monotonic() - start])
        else:
            add(reason=reason, status="failed")


def launch_ops(context: Context) -> None:
    """Run every op of ours once, forward and backward, at small shapes."""
    _launch_cases(context.device, ("fp16",), small=True)


def _launch_cases(device: torch.device, dtypes: Sequence[str], small: bool) -> None:
    from .work.kernels import case_names

    for dtype in dtypes:
        for name in case_names(torch.device("cuda"), torch.float16):
            run_case(name, dtype, device, small, ours_alone=True)


def measure_ops(context: Context) -> None:
    """Measure every case of `bench kernels`."""
    from .work import kernels

    measure_cases(context, kernels.run)


def _random_model(
    device: torch.device, dtype: str, small: bool, image_size: int, **modules: Any
) -> Any:
    """Return the base model, or tiny if small, with random weights."""
    from xfm_fast.models.xfm import XFM
    from xfm_fast.testing import preset_config, random_state

    config = preset_config("tiny" if small else "base").replace(image_size=image_size)
    with torch.device("meta"):
        model = XFM(config, **modules)
    state = random_state(config, modules["heads"], 0)
    tensors = {name: state[name].to(device, DTYPES[dtype]) for name in model.state_dict()}
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


@cases("The vision encoder", "eager")
def measure_encoder(run: Run, deadline: float) -> Iterator[Case]:
    """Yield the encoder at several sizes: eager, CUDA graph, fp8, and compiled at two of them."""
    from xfm_fast import flops
    from xfm_fast.graphs import Shapes, capture
    from xfm_fast.kernels import ops

    def eager(model: Any, pixels: Tensor) -> Call:
        return partial(model.encode_image, pixels)

    def graph(model: Any, pixels: Tensor) -> Call:
        return partial(capture(model, Shapes(images=(len(pixels),))).encode_image, pixels)

    def fp8(model: Any, pixels: Tensor) -> Call:
        return ops.use_fp8()(partial(model.encode_image, pixels))

    def compiled(model: Any, pixels: Tensor) -> Call:
        return partial(torch.compile(model.encode_image, dynamic=False), pixels)

    dtype, small = run.dtypes[0], run.options.quick
    sizes, batches = ((32,), (1, 2)) if small else (ENCODER_SIZES, ENCODER_BATCHES)
    for size in sizes:
        model = _random_model(run.device, dtype, small, size, heads=(), encoders=("vision",))
        for batch in batches:
            pixels = torch.randn(batch, 3, size, size, device=run.device, dtype=DTYPES[dtype])
            forms = {"eager": eager, "CUDA graph": graph, "fp8": fp8}
            # Compiling takes half a minute each.
            if (size, batch) in ((224, 64), (224, 1)):
                forms["torch.compile"] = compiled
            needed = flops.image_encoder(model.config, batch).total
            yield Case(
                "encoder",
                f"vision encoder, {batch} image{'s' if batch > 1 else ''} of {size}",
                [
                    Backend(name, "fp8" if name == "fp8" else dtype, partial(form, model, pixels))
                    for name, form in forms.items()
                ],
                "images",
                batch,
                count=lambda *_, needed=needed: {"needed_flops": needed},
                warmups=3,
                deadline=deadline,
            )


def training_step(
    device: torch.device, dtype: str, small: bool, pairs: int
) -> tuple[Call, Any, Any]:
    """Return a step of ITC, ITM, IMLM and MIM under autocast, its batch and the sizes of its model."""
    from xfm_fast.testing import preset_config, random_pairs

    from .tasks import PRETRAINING
    from .work.training import AUTOCAST, make_step

    config = preset_config("tiny" if small else "base")
    batch = random_pairs(config, _caption_lengths(pairs))
    step = make_step(PRETRAINING, config, 0, {"batch": batch}, device)
    return partial(step.run, OURS, AUTOCAST[dtype]), batch, config


def _caption_lengths(count: int) -> Tensor:
    return torch.tensor([*islice(cycle(_CAPTION_LENGTHS), count)])


@cases("A training step", OURS)
def measure_training_step(run: Run, deadline: float) -> Iterator[Case]:
    """Yield a training step, forward and backward."""
    from xfm_fast import flops

    dtype, small = run.dtypes[0], run.options.quick
    pairs = 4 if small else _STEP_PAIRS
    step, batch, config = training_step(run.device, dtype, small, pairs)
    masked = (batch.masked_labels != -100).sum(1).tolist()
    lengths = batch.attention_mask.sum(1).tolist()
    needed = flops.pretraining_step(config, lengths, masked).total
    yield Case(
        "train-step",
        f"training step, {pairs} pairs of {config.image_size} px, ITC + ITM + IMLM + MIM",
        [
            Backend(
                OURS,
                dtype,
                lambda: step,
                extra={"timed_by": "events" if run.device.type == "cuda" else "clock"},
            )
        ],
        "pairs",
        pairs,
        count=lambda *_: {"needed_flops": round(needed)},
        grad=True,
        # The first runs compile and allocate.
        warmups=2,
        rounds=10,
        deadline=deadline,
    )


def rerank_coco(context: Context) -> None:
    """Re-rank the candidates of COCO-5k on random embeddings, as far as the time goes, and add a row."""
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
    model = _random_model(
        device, context.dtype, context.small, size, heads=("contrastive", "matching")
    )
    config, generator = model.config, torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        dtype = DTYPES[context.dtype]
        return torch.randn(*shape, generator=generator, device=device, dtype=dtype)

    def features(count: int) -> Tensor:
        return F.normalize(noise(count, 64).float(), dim=-1)

    lengths = _caption_lengths(texts).to(device)
    image_embeds = noise(images, config.num_image_tokens, config.vision_width)
    image_index = ImageIndex(image_embeds, features(images))
    text_embeds = noise(int(lengths.sum()), config.text_width)
    text_index = TextIndex(text_embeds, lengths, features(texts))
    candidates = top_candidates(image_index.features, text_index.features, k, k)
    score = partial(score_candidates, ModelScorer(model), image_index, text_index)
    scored = 0

    def progress(done: int, total: int) -> None:
        nonlocal scored
        scored = done
        if context.left < 1:
            raise TimeoutError

    # Compile and allocate before the clock runs.
    score(candidates.of_images(0, 2), None, None, None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    with suppress(TimeoutError):
        score(candidates, None, None, progress)
    seconds, complete = time.perf_counter() - start, scored == candidates.pairs
    if not scored:
        name = f"COCO-5k re-ranking, {candidates.pairs} pairs"
        context.add_out_of_time("rerank", name, OURS)
        return
    tokens, counts = lengths.cpu()[candidates.texts[:scored]].unique(return_counts=True)
    needed = 0.0
    for length, count in zip(tokens.tolist(), counts.tolist(), strict=True):
        pair = flops.fusion(config, [length], first_token_only=True, self_attended=True)
        needed += count * pair.total
    reason = f"{scored / candidates.pairs:.0%} of the pairs"
    if not complete:
        total_s = seconds * candidates.pairs / scored
        reason += f"; all {candidates.pairs:,} would take {total_s:.0f} s"
    sheet = machine.data_sheet(device)
    context.add(
        "rerank",
        f"COCO-5k re-ranking at {size}, random embeddings, {scored} of {candidates.pairs} pairs",
        OURS,
        dtype=context.dtype,
        unit="pairs",
        items=scored,
        seconds=[seconds],
        status="measured" if complete else "partial",
        reason=reason,
        needed_flops=round(needed),
        mfu_data_sheet=needed / seconds / sheet.flops_per_s if sheet else None,
    )


def tune_kernels(context: Context) -> None:
    """Search configurations of the attention kernels, save them in the folder, and add rows before and after."""
    from xfm_fast.kernels import tune
    from xfm_fast.kernels.audit.compiling import describe, shipped_kernels
    from xfm_fast.kernels.triton.launch import architecture

    arch, gpu = architecture(context.device), torch.cuda.get_device_name(context.device)
    specs = {spec.name: spec for spec in shipped_kernels()}
    for name in _TUNED:
        if name in specs and not tune.sizes(specs[name], [64], arch):
            continue
        if name not in specs or context.left < 5:
            context.add_out_of_time("tune", name, "searched", dtype="bf16")
            continue
        add = partial(context.add, "tune", name, dtype="bf16")
        try:
            choice: Any = tune.search(specs[name], 64, "bf16", arch)
        except Exception as error:  # the next kernel goes on
            add("searched", status="failed", reason=one_line(error))
            continue
        tune.write([choice], arch, gpu, context.out)
        add("in use", seconds=[choice.before])
        add("searched", seconds=[choice.seconds], reason=describe(choice.config))
        if choice.flash is not None:
            add("flash-attn", seconds=[choice.flash])


def _launch_encoder() -> None:
    from xfm_fast.kernels import ops

    for size in ENCODER_SIZES:
        model = _random_model(_CPU, "bf16", False, size, heads=(), encoders=("vision",))
        for batch in ENCODER_BATCHES:
            # Larger batches are multiples of 16 as this one is.
            pixels = torch.zeros(min(batch, 16), 3, size, size, dtype=torch.bfloat16)
            with torch.no_grad():
                model.encode_image(pixels)
                with ops.use_fp8():
                    model.encode_image(pixels)


LAUNCHES: dict[str, Callable[[], object]] = {
    "operations": partial(_launch_cases, _CPU, ("bf16", "fp16"), small=False),
    "sanitizer": partial(_launch_cases, _CPU, ("fp16",), small=True),
    "encoder": _launch_encoder,
    # Launches depend on whether the number of pairs is a multiple of 16, as 96 is.
    "step": lambda: training_step(_CPU, "bf16", False, 16)[0](),
}
"""By the stage's name: a function that launches the kernels of the stage."""


def _record_launches(stage: str, arch: int) -> list[prepared.Launch] | str:
    try:
        return prepared.record(LAUNCHES[stage], arch)
    except Exception as error:  # the other stages go on
        return one_line(error)


def prepare_kernels(folder: Path, arch: int) -> int:
    """Compile the kernels that the stages launch into a folder for `--kernels`, for a GPU that is elsewhere.

    Returns 0 if every stage is in it, 1 if some are not, 2 for an error.
    """
    start, failed = time.perf_counter(), False
    launches: dict[str, list[prepared.Launch]] = {}
    for stage in LAUNCHES:
        # A process that has recorded is of no other use.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            result = pool.apply(_record_launches, (stage, arch))
        if isinstance(result, str):
            failed = True
            print(f"{stage}: left out, {result}", file=sys.stderr)
            continue
        launches[stage] = result
        print(f"{stage}: {len(result)} kernels", flush=True)
    try:
        manifest = prepared.write(folder, launches, arch, progress=partial(print, flush=True))
    except (InputError, OSError) as error:
        print(f"--prepare {folder}: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    seconds = time.perf_counter() - start
    print(
        f"{folder}: {manifest}, {size:.1f} MiB, in {seconds:.0f} s; there: --kernels {folder.name}"
    )
    return int(failed)
