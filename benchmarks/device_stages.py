"""The stages of `benchmarks.device`: functions of a `Context`, each in its own process.

Imports of Triton and of the schema of results are local, so that every stage runs where what it needs is installed.
"""

from __future__ import annotations

import csv
import importlib.util
import multiprocessing
import os
import re
import statistics
import subprocess
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from . import machine
from .device import Context
from .timing import Clocked, one_line, timed

Call = Callable[[], object]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Tokens of captions in COCO, 13 on average.
_LENGTHS = (11, 12, 13, 14, 15)


def efficiency(
    device: torch.device, flops: float, seconds: float, *, speed: float = 1.0, traffic: float | None = None
) -> dict[str, Any]:
    """Arithmetic of a run as fields of a row; `speed` is the rate of the dtype relative to bf16."""
    sheet = machine.data_sheet(device)
    return {
        "needed_flops": round(flops),
        "bytes": None if traffic is None else round(traffic),
        "mfu_data_sheet": flops / seconds / (speed * sheet.flops_per_s) if sheet and flops else None,
        "share_of_floor": traffic / sheet.bytes_per_s / seconds if sheet and traffic else None,
    }


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
    _add_ceiling(context, f"copy of {moved // 2 >> 20} MiB", "fp32", lambda: copy, traffic=float(moved))
    generator = torch.Generator().manual_seed(0)
    # A GPU multiplies zeros faster than random numbers.
    x, y = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    # TF32 stays on once it is set, so it is the last.
    rates = {"bf16": 1.0, "fp16": 1.0, "fp8": 2.0, "tf32": 0.5} if device.type == "cuda" else {"fp32": 0.5, "bf16": 1.0}
    for dtype, speed in rates.items():
        name = f"product {size} × {size} × {size}"
        try:
            gemm = _gemm(dtype, x, y)
            gemm()
        except Exception as error:  # this card or this PyTorch lacks the dtype
            context.add("ceiling", name, "torch", dtype=dtype, status="not offered", reason=one_line(error))
            continue
        _add_ceiling(context, name, dtype, partial(_gemm, dtype, x, y), flops=2.0 * size**3, speed=speed)


def _gemm(dtype: str, x: Tensor, y: Tensor) -> Call:
    if dtype == "fp8":
        a, b = x.to(torch.float8_e4m3fn), y.to(torch.float8_e4m3fn)
        scale = torch.ones(len(x), 1, device=x.device)
        return partial(torch._scaled_mm, a, b.t(), scale, scale.t(), out_dtype=torch.bfloat16)
    torch.backends.cuda.matmul.allow_tf32 = dtype == "tf32"
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    return partial(torch.mm, x.to(kind), y.to(kind).t())


def _add_ceiling(
    context: Context, name: str, dtype: str, prepare: Callable[[], Call], flops: float = 0.0, **work: float
) -> None:
    clock = Clocked(prepare, context.device)
    clock()
    seconds = [clock()[0] for _ in range(7)]
    share = efficiency(context.device, flops, statistics.median(seconds), **work)
    context.add("ceiling", name, "torch", dtype=dtype, seconds=seconds, host_s=clock.host_s, timed_by=clock.by, **share)


def compile_launches(context: Context) -> None:
    """A row of the time to run every backend of every case once, with a process per core, so that no later stage waits
    for a compiler.
    """
    from .work.kernels import case_names

    # All backends in bf16, ours in fp16.
    names, begun, failed = case_names(context.device, DTYPES[context.dtype]), time.monotonic(), list[str]()
    launches = [(name, dtype, context.device, context.small) for dtype in ("bf16", "fp16") for name in names]
    with multiprocessing.get_context("spawn").Pool(min(len(os.sched_getaffinity(0)), len(launches))) as pool:
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


def run_case(name: str, dtype: str, device: torch.device, small: bool) -> None:
    """Run the backends of a case once in every direction, in fp16 ours alone; raises RuntimeError if ours fails."""
    from .work.kernels import CASES, DTYPES, OURS, compare

    backends = compare(CASES[name](device, DTYPES[dtype], small), only={OURS} if dtype == "fp16" else None)
    for backend in backends.values():
        for prepare in backend.runs.values():
            prepare()()
    if device.type == "cuda":
        torch.cuda.synchronize()
    if backends[OURS].missing:
        raise RuntimeError(str(backends[OURS].missing))


def run_tests(context: Context) -> None:
    """Rows of the Triton tests by module, compiled on a GPU and interpreted without: passes and failures."""
    roots = Path(__file__).resolve().parents[1], Path.cwd()
    root = next((root for root in roots if (root / "tests" / "kernels" / "triton_testing.py").is_file()), None)
    if root is None:
        context.add("tests", "Triton tests", "pytest", status="absent", reason="this is no checkout: it has no tests")
        return
    compiled = context.device.type == "cuda"
    tests = sorted(path.relative_to(root).as_posix() for path in (root / "tests/kernels").glob("test_triton_*.py"))
    arguments = ["--tb=line", "-p", "no:cacheprovider", "--color=no", "-v", "-m"]
    if compiled:
        # A module that lacks a package is one error, and the others run.
        arguments += ["gpu and not slow", "--continue-on-collection-errors", *tests, "tests/kernels/test_gpu.py"]
        if importlib.util.find_spec("xdist") is not None:
            arguments += ["-n", str(len(os.sched_getaffinity(0)))]
    else:
        os.environ["TRITON_INTERPRET"] = "1"
        chosen = ["tests/kernels/test_triton_contract.py", "-k", "gelu"] if context.small else tests
        arguments += ["not gpu and not slow", *chosen]
    import pytest

    os.chdir(root)
    outcomes = Outcomes(context, "compiled" if compiled else "interpreted")

    def end_early() -> NoReturn:
        outcomes.add_rows("the rest was not reached in time")
        os._exit(0)

    # A hanging test lets no other code of this thread run.
    timer = threading.Timer(max(0.1, context.left - 1), end_early)
    timer.daemon = True
    timer.start()
    code = pytest.main(arguments, plugins=[outcomes])
    timer.cancel()
    outcomes.add_rows(None if outcomes.modules else f"pytest ended with exit code {int(code)}")


class Outcomes:
    """A pytest plugin that counts what became of every test, by module."""

    def __init__(self, context: Context, backend: str) -> None:
        self.context, self.backend, self.begun = context, backend, time.monotonic()
        self.modules: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))

    def _count(self, node: str, outcome: str) -> None:
        module, _, test = node.partition("::")
        self.modules[Path(module).name][outcome].append(test)

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Count a test's own phase, and set-up or tear-down that did not pass."""
        if report.when == "call" or report.outcome != "passed":
            self._count(report.nodeid, report.outcome)

    def pytest_collectreport(self, report: Any) -> None:
        """Count a module that cannot be imported."""
        if report.failed:
            self._count(report.nodeid, "failed")

    def add_rows(self, incomplete: str | None) -> None:
        """A row for each module, and one for all; `incomplete` is why some tests are missing."""
        add = partial(self.context.add, "tests", unit="tests")
        for module, found in self.modules.items():
            parts = [f"{len(tests)} {outcome}" for outcome, tests in sorted(found.items())]
            parts += [", ".join(found["failed"][:6])] if found["failed"] else []
            status = "failed" if found["failed"] else "partial" if incomplete else "measured"
            reason = ", ".join([*parts, *([incomplete] if incomplete else [])])
            add(module, self.backend, status=status, items=len(found["passed"]), reason=reason)
        if not self.modules:
            add("Triton tests", self.backend, status="failed", items=0, reason=incomplete)
        passed = sum(len(found["passed"]) for found in self.modules.values())
        add("all modules", self.backend, items=passed, seconds=[time.monotonic() - self.begun])


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
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=limit, check=False)
        except subprocess.TimeoutExpired:
            reason = f"not done in {limit:.0f} s"
            context.add("sanitizer", tool, "compute-sanitizer", status="partial", reason=reason)
            continue
        print(done.stdout[-20_000:], done.stderr[-5_000:])
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", done.stdout)
        lines = summary or done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        fine = done.returncode == 0 and bool(summary)
        fields: dict[str, Any] = {"seconds": [time.monotonic() - begun]} if fine else {"status": "failed"}
        context.add("sanitizer", tool, "compute-sanitizer", reason=lines[-1].strip()[:300], **fields)


def launch_ops(context: Context) -> None:
    """Every op of ours once, forward and backward, at small shapes."""
    from .work.kernels import case_names

    for name in case_names(context.device, torch.float16):
        run_case(name, "fp16", context.device, small=True)


def measure_ops(context: Context) -> None:
    """Rows of every case of `bench kernels`, each direction as soon as it is measured."""
    from .work.kernels import CASES, OURS, case_names, measure

    for name in case_names(context.device, DTYPES[context.dtype]):
        if context.left < 1:
            context.add_out_of_time(name.split()[0], name, OURS, dtype=context.dtype)
            continue
        case = CASES[name](context.device, DTYPES[context.dtype], context.small)
        for rows in measure(case, context.device, context.dtype, left=lambda: context.left):
            for row in rows:
                context.append(row=row)


# Kernel → the head dimension or width of rows that it is launched with.
PROFILED = {
    "relpos_forward": 64, "relpos_dkdv": 64, "varlen_forward": 64, "varlen_forward_short": 64,
    "add_layer_norm_forward": 768, "bias_gelu_forward": 3072,
}  # fmt: skip
_METRICS = (
    "gpu__time_duration.sum",
    "sm__cycles_elapsed.max",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "lts__t_bytes.sum",
    "dram__bytes.sum",
)
_SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3, "s": 1.0}


def profile_kernels(context: Context) -> None:
    """Rows of six kernels under Nsight Compute; all counters are in `ncu.csv`."""
    file = context.out / "ncu.csv"
    command = [
        "ncu", "--csv", "--page", "raw", "--metrics", ",".join(_METRICS), "--clock-control", "none",
        "--profile-from-start", "off", "--log-file", str(file), *context.command("launch_kernels", small=context.small),
    ]  # fmt: skip
    try:
        code = subprocess.run(command, timeout=max(1.0, context.left - 1), check=False).returncode
        why = f"ncu ended with exit code {code}"
    except subprocess.TimeoutExpired:
        why = "ncu was not done in time"
    launches = read_counters(file)
    for name, seconds in launches:
        context.add("counters", name, "ncu", dtype="bf16", seconds=[seconds])
    if not launches:
        context.add("counters", "six kernels", "ncu", dtype="bf16", status="failed", reason=why)


def read_counters(file: Path) -> list[tuple[str, float]]:
    """(kernel function, seconds) of every launch in the output of `ncu --csv --page raw`; [] without one."""
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    start = next((number for number, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    rows = list(csv.DictReader(lines[start:]))
    # The first row has the units.
    unit = _SECONDS.get(rows[0].get(_METRICS[0]) or "", 1e-9) if rows else 1e-9
    launches = []
    for row in rows:
        try:
            launches.append((row["Kernel Name"], float((row.get(_METRICS[0]) or "").replace(",", "")) * unit))
        except ValueError:
            continue
    return launches


def launch_kernels(context: Context) -> None:
    """Every profiled kernel at the model's shape: once to compile, then once for the profiler."""
    from xfm_fast.kernels import tune

    for kernel, size in PROFILED.items():
        try:
            run = tune.model_workload(kernel, size, "bf16")
            run()
        except Exception as error:  # the others are profiled
            print(f"{kernel}: {error}")
            continue
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        run()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


def _random_model(context: Context, image_size: int, **parts: Any) -> Any:
    """The base model, or tiny if small, with random weights."""
    from xfm_fast.models.xfm import XFM

    from .inputs import preset_config, random_state

    config = preset_config("tiny" if context.small else "base").replace(image_size=image_size)
    with torch.device("meta"):
        model = XFM(config, **parts)
    needed = model.state_dict()
    state = random_state(config, parts["heads"], 0)
    model.load_state_dict({name: state[name].to(context.device, DTYPES[context.dtype]) for name in needed}, assign=True)
    return model.eval().requires_grad_(False)


def measure_encoder(context: Context) -> None:
    """Rows of the vision encoder at two sizes and four batches: eager, CUDA graph, fp8, and compiled at two points."""
    sizes, batches = ((32,), (1, 2)) if context.small else ((224, 384), (1, 8, 64, 256))
    models = {size: _random_model(context, size, heads=(), encoders=("vision",)) for size in sizes}
    points = [(size, batch) for size in sizes for batch in batches]

    def eager(model: Any, pixels: Tensor) -> Call:
        return lambda: model.encode_image(pixels)

    def graph(model: Any, pixels: Tensor) -> Call:
        from xfm_fast.graphs import Shapes, capture

        graphs = capture(model, Shapes(images=(pixels.shape[0],)))
        return lambda: graphs.encode_image(pixels)

    def fp8(model: Any, pixels: Tensor) -> Call:
        from xfm_fast.kernels import ops

        def run() -> object:
            with ops.use_fp8():
                return model.encode_image(pixels)

        return run

    def compiled(model: Any, pixels: Tensor) -> Call:
        encode = torch.compile(model.encode_image, dynamic=False)
        return lambda: encode(pixels)

    for size, batch in points:
        for name, prepare in {"eager": eager, "CUDA graph": graph, "fp8": fp8}.items():
            _add_encoder(context, models[size], name, batch, prepare)
    # Compiling takes half a minute each.
    for size, batch in [] if context.small else [(224, 64), (224, 1)]:
        _add_encoder(context, models[size], "torch.compile", batch, compiled, least_s=40.0)


def _add_encoder(
    context: Context, model: Any, backend: str, batch: int, prepare: Callable[[Any, Tensor], Call],
    least_s: float = 2.0,
) -> None:  # fmt: skip
    from xfm_fast import flops
    from xfm_fast.errors import XFMError

    size, device = model.config.image_size, context.device
    row = partial(
        context.add, "encoder", f"vision encoder, {batch} image{'s' if batch > 1 else ''} of {size}", backend,
        dtype="fp8" if backend == "fp8" else context.dtype, unit="images", items=batch,
    )  # fmt: skip
    if context.left < least_s:
        row(status="absent", reason="no time was left for it in this stage")
        return
    pixels = torch.randn(batch, 3, size, size, device=device, dtype=DTYPES[context.dtype])
    try:
        with torch.no_grad():
            seconds, host = _timed_blocks(prepare(model, pixels), device)
    except XFMError as error:
        row(status="absent", reason=str(error)[:300])
    except Exception as error:  # out of memory, the compiler: the other variants go on
        row(status="failed", reason=one_line(error))
        if device.type == "cuda":
            torch.cuda.empty_cache()
    else:
        needed, speed = flops.image_encoder(model.config, batch).total, 2.0 if backend == "fp8" else 1.0
        share = efficiency(device, needed, statistics.median(seconds), speed=speed)
        row(seconds=seconds, host_s=host, **share)


def _timed_blocks(run: Call, device: torch.device) -> tuple[list[float], float | None]:
    """Seconds of a run with all that the host does, in blocks of 50 ms, and the host's part on a GPU."""

    def block(times: int) -> tuple[float, float]:
        begun = time.perf_counter()
        for _ in range(times):
            run()
        issued = time.perf_counter() - begun
        if device.type == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begun) / times, issued / times

    for _ in range(3 if device.type == "cuda" else 1):
        block(1)
    times = max(1, round(0.05 / max(block(1)[0], 1e-6)))
    seconds = [block(times)[0] for _ in range(5)]
    return seconds, block(1)[1] if device.type == "cuda" else None


def measure_training_step(context: Context) -> None:
    """A row of pairs per second of ITC, ITM, IMLM and MIM, forward and backward, in bf16 under autocast."""
    from xfm_fast import flops

    from .inputs import preset_config
    from .tasks import PRETRAINING
    from .work.training import AUTOCAST, make_step

    config, pairs = preset_config("tiny" if context.small else "base"), 4 if context.small else 96
    batch = random_pairs(config, pairs)
    step = make_step(PRETRAINING, config, 0, {"batch": batch}, context.device)
    seconds: list[float] = []
    for number in range(12):
        _, taken = timed(lambda: step.run("xfm-fast", AUTOCAST[context.dtype]), context.device)
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
    ids = torch.randint(first, config.vocab_size, mask.shape, generator=draw).masked_fill(~mask, config.pad_token_id)
    positions = torch.stack([1 + torch.randperm(int(n) - 2, generator=draw)[:3].sort().values for n in lengths])
    return PairBatch(
        input_ids=ids,
        attention_mask=mask.long(),
        masked_input_ids=ids.scatter(1, positions, config.vocab_size - 1),
        masked_positions=positions,
        masked_labels=ids.gather(1, positions),
        patch_mask=torch.rand(pairs, config.num_patches, generator=draw).argsort(1) < config.num_masking_patches,
        image=torch.randn(pairs, 3, config.image_size, config.image_size, generator=draw),
    )


def rerank_coco(context: Context) -> None:
    """A row of pairs per second over the candidates of COCO-5k, on random embeddings, as far as the time goes."""
    from xfm_fast import flops
    from xfm_fast.tasks.reranking import ImageIndex, ModelScorer, TextIndex, score_candidates, top_candidates

    device = context.device
    images, texts, k, size = (20, 60, 8, 32) if context.small else (5000, 25_010, 256, 384)
    # Not in inference mode: its tensors have no version, so that nothing could be cached between passes.
    model = _random_model(context, size, heads=("contrastive", "matching"))
    config, draw = model.config, torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device=device, dtype=DTYPES[context.dtype])

    lengths = torch.tensor([_LENGTHS[number % len(_LENGTHS)] for number in range(texts)], device=device)
    image_index = ImageIndex(
        noise(images, config.num_image_tokens, config.vision_width), F.normalize(noise(images, 64).float(), dim=-1)
    )
    text_index = TextIndex(
        noise(int(lengths.sum()), config.text_width), lengths, F.normalize(noise(texts, 64).float(), dim=-1)
    )
    candidates = top_candidates(image_index.features, text_index.features, k, k)
    scored = 0

    def progress(done: int, total: int) -> None:
        nonlocal scored
        scored = done
        if context.left < 1:
            raise TimeoutError

    # Compile and allocate before the clock runs.
    score_candidates(ModelScorer(model), image_index, text_index, candidates.of_images(0, 2), None, None, None)
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    with suppress(TimeoutError):
        score_candidates(ModelScorer(model), image_index, text_index, candidates, None, None, progress)
    seconds, complete = time.perf_counter() - begun, scored == candidates.pairs
    if not scored:
        context.add_out_of_time("rerank", f"COCO-5k re-ranking, {candidates.pairs} pairs", "xfm-fast")
        return
    tokens, counts = lengths.cpu()[candidates.texts[:scored]].unique(return_counts=True)
    needed = sum(
        count * flops.fusion(config, [length], first_token_only=True, self_attended=True).total
        for length, count in zip(tokens.tolist(), counts.tolist(), strict=True)
    )
    reason = f"{scored / candidates.pairs:.0%} of the pairs"
    if not complete:
        reason += f"; all {candidates.pairs:,} would take {seconds * candidates.pairs / scored:.0f} s"
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
    for name in ("relpos_forward", "relpos_forward_fragments", "relpos_dkdv", "relpos_dq", "varlen_forward"):
        if name in specs and not tune.sizes(specs[name], [64], arch):
            continue
        if name not in specs or context.left < 5:
            context.add_out_of_time("tune", name, "searched", dtype="bf16")
            continue
        try:
            choice: Any = tune.search(
                specs[name], 64, "bf16", arch, timer=tune.gpu_timer, workload=tune.model_workload,
                rival=tune.flash_workload,
            )  # fmt: skip
        except Exception as error:  # the next kernel goes on
            context.add("tune", name, "searched", dtype="bf16", status="failed", reason=one_line(error))
            continue
        tune.write([choice], arch, gpu, context.out)
        context.add("tune", name, "in use", dtype="bf16", seconds=[choice.before])
        context.add("tune", name, "searched", dtype="bf16", seconds=[choice.seconds], reason=describe(choice.config))
        if choice.flash is not None:
            context.add("tune", name, "flash-attn", dtype="bf16", seconds=[choice.flash])
