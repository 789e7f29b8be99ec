"""The audit: parsing machine code, occupancy, hazards, the baseline, the cache, and the command."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.triton_testing import HAS_TRITON, compiling_environment

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from xfm_fast.kernels import tune
from xfm_fast.kernels.audit import Row, baseline, hazards, sass, shipped_kernels
from xfm_fast.kernels.audit.architectures import occupancy, register_limit
from xfm_fast.kernels.audit.compiling import compile_all
from xfm_fast.kernels.audit.task import Task
from xfm_fast.kernels.triton.launch import CompileRequest, LaunchConfig

ROOT = Path(__file__).resolve().parents[2]

RESOURCES = """
Resource usage:
 Function toy:
  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:480 TEXTURE:0 SURFACE:0 SAMPLER:0
"""
# Two loops, one in the other; the inner one waits for a barrier behind the end, as Blackwell's code does, and jumps
# back; the end traps in a branch to itself and is padded.
LISTING = """
	.section	.text.toy,"ax",@progbits
toy:
.text.toy:
	//## File "toy.py", line 7
        /*0000*/                   S2R R10, SR_CTAID.X ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R2.64] ;
.L_x_1:
	//## File "toy.py", line 9
        /*0020*/                   LDGSTS.E.BYPASS.128 [R95+0x8000], desc[UR36][R36.64], !P0 ;
        /*0030*/              @!P0 BRA `(.L_x_3) ;
.L_x_2:
        /*0040*/                   UTCHMMA gdesc[UR10], gdesc[UR12], tmem[UR33], tmem[UR20], idesc[UR21], !UPT ;
        /*0050*/                   LDG.E.U16.CONSTANT R4, [R2.64] ;
        /*0060*/                   BRA.U UP1, `(.L_x_1) ;
        /*0070*/               @P2 BRA `(.L_x_0) ;
        /*0080*/               @P0 CALL.REL.NOINC `($__internal_0_$trap) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR64], R4 ;
        /*00b0*/              @!P0 BRA `(.L_x_3) ;
        /*00c0*/                   BRA `(.L_x_2) ;
        .weak           $__internal_0_$trap
$__internal_0_$trap:
        /*00d0*/                   STL [R1], R2 ;
        /*00e0*/                   RET.REL.NODEC R2 `(toy) ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4);
        /*0100*/                   NOP ;
"""


def test_listing_is_read() -> None:
    code = sass.parse(LISTING, RESOURCES)
    assert (code.registers, code.stack_bytes, code.static_shared_bytes) == (40, 16, 1024)
    assert len(code.instructions) == 15  # without the trap and the padding
    assert code.instructions[4].tensor_core
    assert code.instructions[6].predicate == "UP1"
    assert code.instructions[8].target == 0xD0
    assert code.instructions[2].operands == "[R95+0x8000], desc[UR36][R36.64], !P0"


def test_loops_are_natural_loops() -> None:
    code = sass.parse(LISTING, RESOURCES)
    # The jump from 0xc0 back to 0x40 makes no loop: 0x40 is also reached from 0x30.
    assert [loop.instructions[0].address for loop in sass.natural_loops(code.instructions)] == [0x10, 0x20, 0xA0]
    # The loop at 0x10 contains another, that at 0xa0 only waits.
    assert [loop.instructions[0].address for loop in code.inner_loops] == [0x20]
    main = code.main_loop
    assert main is not None
    assert [i.address for i in main.instructions] == [0x20, 0x30, 0x40, 0x50, 0x60, 0xA0, 0xB0, 0xC0]
    assert main.tensor_core == 1


@pytest.mark.parametrize(
    ("arch", "figures", "blocks"),
    [
        # 128 registers × 32 = 4,096 a warp; a quarter of the file, 16,384, holds 4: 16 warps, 4 blocks of 4.
        (80, {"registers": 128, "shared_bytes": 0, "warps": 4}, 4),
        # 100 registers × 32 = 3,200 → 3,328 in units of 256: 4 a quarter, where 96 would allow 5.
        (80, {"registers": 100, "shared_bytes": 0, "warps": 4}, 4),
        # 48 KB and 1 KB of reserve fit three times into 164 KB, and four times into 228 KB.
        (80, {"registers": 32, "shared_bytes": 48 * 1024, "warps": 4}, 3),
        # Warps: 64 a multiprocessor, 48 on sm_120; blocks: 32 and 24.
        (90, {"registers": 16, "shared_bytes": 0, "warps": 8}, 8),
        (120, {"registers": 16, "shared_bytes": 0, "warps": 1}, 24),
        # 512 columns of tensor memory.
        (100, {"registers": 64, "shared_bytes": 1024, "warps": 4, "tensor_memory": 256}, 2),
        # More shared memory than a block may have.
        (120, {"registers": 32, "shared_bytes": 100 * 1024, "warps": 4}, 0),
    ],
)
def test_occupancy_by_hand(arch: int, figures: dict[str, int], blocks: int) -> None:
    assert occupancy(arch, **figures) == blocks


def _row(**changes: Any) -> Row:
    row = Row(
        key="", kernel="toy", variant="head_dim=64", config="BLOCK_M=64 warps=4 stages=2", arch=90, dtype="bf16",
        registers=100, shared_bytes=1024, shared_limit=232448, occupancy=4, tensor_core={"HGMMA": 8},
        instructions=900, loop_instructions=300, loop_tensor_core=8, loop_waits=2,
    )  # fmt: skip
    row = replace(row, **changes)
    return replace(row, key=f"toy | {row.variant} | sm_{row.arch} | {row.dtype}")


def _accepted(*rows: Row, compiler: str = "triton 1") -> baseline.Accepted:
    return baseline.Accepted(compiler, {row.key: baseline.figures(row) for row in rows})


def _compare(*rows: Row, accepted: baseline.Accepted, compiler: str = "triton 1") -> baseline.Comparison:
    return baseline.compare(rows, accepted, compiler=compiler, shipped={row.key for row in rows})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"registers": 101}, "registers 100 → 101"),
        ({"occupancy": 3}, "occupancy 4 → 3"),
        ({"tensor_core": {"HMMA": 8}}, "no HGMMA any more"),
        ({"error": "CompilationError: no"}, "does not compile: CompilationError: no"),
        ({"loop_waits": 8}, "waits_per_tensor_core 0.25 → 1.0"),
        ({"warnings": ["C7515"]}, "warnings none → C7515"),
    ],
)
def test_worse_figures_are_named(change: dict[str, Any], says: str) -> None:
    comparison = _compare(_row(**change), accepted=_accepted(_row()))
    assert comparison.worse == [f"toy | head_dim=64 | sm_90 | bf16: {says}"]
    assert not comparison.better


def test_equal_and_better_figures_pass() -> None:
    assert _compare(_row(), accepted=_accepted(_row())) == baseline.Comparison([], [])
    comparison = _compare(_row(registers=90, occupancy=5, config="BLOCK_M=32"), accepted=_accepted(_row()))
    assert not comparison.worse
    (line,) = comparison.better
    assert "registers 100 → 90, occupancy 4 → 5" in line
    assert "stages=2 → BLOCK_M=32" in line


def test_another_compiler_is_held_to_what_does_not_depend_on_it() -> None:
    counts = _compare(_row(registers=140, instructions=1200), accepted=_accepted(_row()), compiler="triton 2")
    assert not counts.worse
    assert "triton 1" in counts.note
    assert "triton 2" in counts.note
    spills = _compare(_row(stack_bytes=64), accepted=_accepted(_row()), compiler="triton 2")
    assert len(spills.worse) == 1


def test_accepting_keeps_other_rows(tmp_path: Path) -> None:
    path = tmp_path / "accepted.json"
    other, gone = _row(arch=80), _row(dtype="fp16")
    baseline.accept([_row(), other, gone], compiler="triton 1", path=path)
    baseline.accept([_row(registers=120)], compiler="triton 1", forget={gone.key}, path=path)
    accepted = baseline.read(path)
    assert accepted.rows.keys() == {_row().key, other.key}
    assert accepted.rows[_row().key]["registers"] == 120
    assert baseline.in_scope(accepted, kernels=(), arches=(80,)).rows.keys() == {other.key}
    assert not baseline.in_scope(accepted, kernels=("else",), arches=(80,)).rows
    with pytest.raises(ValueError, match="toy"):
        baseline.accept([_row(error="no")], compiler="triton 1", path=path)
    with pytest.raises(ValueError, match="triton 2"):
        baseline.accept([_row()], compiler="triton 2", path=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=path.name):
        baseline.read(path)
    assert baseline.read(tmp_path / "absent.json").rows == {}


_COMPILE_TWICE = """
import json, sys
from pathlib import Path
from tests.kernels import toy_kernels
from xfm_fast.kernels.audit import compile_rows, shipped_forms

folder = Path(sys.argv[1])
specs = [toy_kernels.PRODUCT, toy_kernels.REJECTED]
counts = []
forms = shipped_forms(specs, (80, 90), ("bf16",))
rows = compile_rows(forms, cache_dir=folder, jobs=1, progress=lambda done, of: counts.append(of))
written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")}
again = compile_rows(forms[:2], cache_dir=folder, progress=lambda done, of: counts.append(of))
kept = written == {path: path.stat().st_mtime_ns for path in folder.rglob("*.json")} != {}
found = {"rows": [row.as_dict() for row in rows], "same": rows[:2] == again}
print(json.dumps(found | {"counts": counts, "kept": kept}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    environment = compiling_environment() | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", _COMPILE_TWICE, str(tmp_path_factory.mktemp("cache"))]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_matrix_product_is_measured(compiled: dict[str, Any]) -> None:
    ampere, hopper = compiled["rows"][:2]
    for row in (ampere, hopper):
        assert row["config"] == "BLOCK_M=64 BLOCK_N=64 warps=4 stages=2"
        assert 16 < row["registers"] < 200
        assert row["stack_bytes"] == 0
        # Two stages of a 64 × 64 tile of each operand.
        assert 16 * 1024 <= row["shared_bytes"] <= 33 * 1024
        assert 0 < row["loop_instructions"] < row["instructions"]
        assert row["occupancy"] >= 2
    assert list(ampere["tensor_core"]) == ["HMMA"]
    # 64 × 64 × 64 in pieces of 16 × 8 × 16, over four warps.
    assert ampere["loop_instructions"] / ampere["instructions_per_tensor_core"] == 32
    assert list(hopper["tensor_core"]) == ["HGMMA"]


def test_what_does_not_compile_is_a_row_with_an_error(compiled: dict[str, Any]) -> None:
    for row in compiled["rows"][2:]:
        assert "Error" in row["error"]
        assert row["registers"] == row["occupancy"] == 0


def test_what_was_compiled_comes_from_the_cache(compiled: dict[str, Any]) -> None:
    assert compiled["counts"] == [4] * 4
    assert compiled["same"]
    assert compiled["kept"], "nothing was compiled and written again"


def test_a_compiler_that_dies_loses_one_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def task(key: str, module: str) -> Task:
        return Task(module, "kernel", CompileRequest(None, {}, {}, {}, {}), 80, key)

    (tmp_path / "toy_fatal.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    tasks = [task("one", "toy_fatal"), task("two", "no_such_module")]
    fatal, absent = compile_all(tasks, jobs=1, cache_dir=tmp_path / "cache").values()
    assert "compiler died" in fatal.error
    assert "no_such_module" in absent.error


def loop(*lines: str) -> sass.MachineCode:
    """The machine code of a loop over these instructions and a load, without which it would not count as work."""
    text = [".L_0:", "LDG.E R90, [R92.64]", *lines, "@P0 BRA `(.L_0)", "EXIT"]
    numbered = [line if line.endswith(":") else f"        /*{16 * n:04x}*/   {line} ;" for n, line in enumerate(text)]
    return sass.parse("\n".join(["toy:", *numbered]), RESOURCES)


class TestHazards:
    def test_waits_for_the_tensor_cores_are_counted(self) -> None:
        made = loop(
            "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.ARRIVE"
        )
        assert hazards.tensor_waits(made.main_loop) == 1
        assert hazards.tensor_waits(None) == 0

    def test_a_write_behind_a_wait_needs_a_barrier_between_groups_of_warps(self) -> None:
        product, wait, write = (
            "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0",
            "WARPGROUP.DEPBAR.LE gsb0, 0x0",
            "STS [R4], R5",
        )
        bare, fenced = loop(product, wait, write), loop(product, wait, "BAR.SYNC 0x0", write)
        assert hazards.unfenced_writes(bare.main_loop, 8) == 1
        assert hazards.unfenced_writes(bare.main_loop, 4) == 0
        assert hazards.unfenced_writes(fenced.main_loop, 8) == 0
        # The wait of a turn and the write of the next; and a wait that leaves a product running.
        assert hazards.unfenced_writes(loop(write, product, wait).main_loop, 8) == 1
        assert hazards.unfenced_writes(loop(product, wait.replace("0x0", "0x1"), write).main_loop, 8) == 0

    @pytest.mark.parametrize(
        ("warps", "registers", "cliff"), [(8, 100, 128), (4, 130, 168), (4, 169, 255), (8, 129, 255)]
    )
    def test_register_cliffs(self, warps: int, registers: int, cliff: int) -> None:
        assert register_limit(90, registers=registers, shared_bytes=0, warps=warps) == cliff


HOPPER = """
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
$L__BB0_1:
	FENCE
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r3,%r4}, %rd2, %rd3, %p1, 1, 1, 0, 0;
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r3,%r4}, {%r5,%r6}, %rd3, %p1, 1, 1, 1;
	cp.async.wait_group 0;
	@%p2 bra 	$L__BB0_1;
"""


@pytest.mark.parametrize(("fence", "unfenced"), [("fence.proxy.async.shared::cta;", 0), ("bar.sync 0;", 2)])
def test_copies_without_a_fence_before_hoppers_products_are_counted(fence: str, unfenced: int) -> None:
    """What is waited for at the end of a turn is read at the beginning of the next."""
    ptx = HOPPER.replace("FENCE", fence)
    assert hazards.unfenced_copies(ptx) == unfenced
    assert hazards.register_operands(ptx) == 1


def _cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    # The audit compiles even where the tests interpret.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "xfm_fast.cli", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_command(tmp_path: Path) -> None:
    accepted, rows = tmp_path / "accepted.json", tmp_path / "rows.json"
    selection = ["audit", "--kernel", "ordered_sum", "--arch", "80"]
    # A second process would load PyTorch for half of a second's work.
    selection += ["--cache", str(tmp_path), "--ratchet", str(accepted), "--jobs", "1"]
    done = _cli(*selection, "--accept", "--json", str(rows))
    assert done.returncode == 0, done.stderr
    written = json.loads(rows.read_text())
    names = {"kernel", "config", "arch", "dtype", "registers", "stack_bytes", "shared_bytes", "tensor_core"}
    assert written
    assert all(names <= row.keys() and row["kernel"] == "ordered_sum" and row["arch"] == 80 for row in written)

    content = json.loads(accepted.read_text())
    key = next(iter(content["rows"]))
    content["rows"][key]["registers"] -= 1
    accepted.write_text(json.dumps(content))
    done = _cli(*selection)
    assert done.returncode == 1
    assert f"{key}: registers " in done.stdout
    assert "xfm-fast audit --accept" in done.stdout
    assert "(0 compiled" in done.stdout

    # A form with the hash of its accepted figures is skipped.
    done = _cli(*selection, "--changed")
    assert done.returncode == 0, done.stdout
    assert "0 of" in done.stdout
    content["rows"][key]["made_of"] = "other"
    accepted.write_text(json.dumps(content))
    done = _cli(*selection, "--changed")
    assert done.returncode == 1
    assert "1 of" in done.stdout
    assert f"{key}: registers " in done.stdout


def test_tuning_saves_what_it_finds_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a GPU that is not there, with a search that finds nothing for one kernel and is interrupted at another."""
    from xfm_fast.cli import kernels
    from xfm_fast.kernels.triton import launch

    # What imports the architecture's name while it is patched would keep it.
    shipped_kernels()
    # The command removes it; afterwards it is what it was.
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.version, "cuda", "13")
    monkeypatch.setattr(launch, "architecture", lambda device: 90)

    def search(spec: Any, size: int, dtype: str, arch: int, **_: Any) -> tune.Choice:
        if spec.name == "varlen_dq":
            raise ValueError("kernel varlen_dq: every configuration spills")
        if spec.name == "varlen_forward":
            raise KeyboardInterrupt
        return tune.Choice(spec.name, dtype, size, LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64}), 1.0, 2.0, 0, 1)

    monkeypatch.setattr(tune, "search", search)
    with pytest.raises(KeyboardInterrupt):
        kernels.tune(options=kernels.TuneOptions(head_dim=(64, 80), out=tmp_path))
    table = json.loads((tmp_path / "sm_90.json").read_text())
    # On Hopper the model never launches the plain kernel at 64.
    assert table["relpos_forward"].keys() == {"bf16/80"}
    assert table["relpos_forward_fragments"].keys() == {"bf16/64"}
    # Forms with a mask exist for one head dimension, a norm for one width.
    assert table["varlen_dkdv_masked"].keys() == {"bf16/64"}
    assert table["add_layer_norm_forward"].keys() == {"bf16/768"}
    assert "varlen_dq" not in table
    assert "not tuned: kernel varlen_dq" in capsys.readouterr().err


@pytest.mark.parametrize("arch", [80, 86, 90, 100, 103, 120])
def test_every_specification_describes_its_kernel(arch: int) -> None:
    for spec in shipped_kernels():
        for variant in spec.variants:
            for dtype in (*spec.dtypes, "fp32"):
                request = spec.request(variant, dtype, arch)
                assert list(request.signature) == spec.kernel.arg_names
                assert request.attrs


@pytest.mark.slow
def test_shipped_kernels_are_as_good_as_accepted(tmp_path: Path) -> None:
    done = _cli("audit", "--cache", str(tmp_path))
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


class TestTuning:
    """With a timer that reads the configuration, and an audit that rejects what the test says."""

    @pytest.fixture
    def spec(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        from xfm_fast.kernels.triton import launch

        in_use = LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2)
        monkeypatch.setattr(launch, "heuristic_config", lambda *_: in_use)
        launch.config_for.cache_clear()
        yield launch.KernelSpec(
            name="toy", kernel=None, variants=({"head_dim": 64}, {"head_dim": 64, "mask": True}, {"head_dim": 32}),
            types=lambda *_: {}, constants=lambda *_: {},
            config=lambda variant, dtype, arch: launch.config_for("toy", variant["head_dim"], dtype, arch),
        )  # fmt: skip
        launch.config_for.cache_clear()

    def _search(self, spec: Any, monkeypatch: pytest.MonkeyPatch, times: dict[int, float], spilling: set[Any]) -> Any:
        from xfm_fast.kernels.triton import launch

        def examine(forms: list[Any], **_: Any) -> list[Row]:
            return [_row(stack_bytes=8 * ((f.config.tiles["BLOCK_M"], "mask" in f.variant) in spilling)) for f in forms]

        timed: list[int] = []

        def timer(call: Any) -> float:
            timed.append(call())
            return times[timed[-1]]

        monkeypatch.setattr(tune, "compile_rows", examine)
        choice = tune.search(
            spec, 64, "bf16", 90, timer=timer,
            workload=lambda *kernel: lambda: launch.config_for(*kernel, 90).tiles["BLOCK_M"],
            grid=[LaunchConfig({"BLOCK_M": m, "BLOCK_N": 64}, 4, 2) for m in sorted(times)],
        )  # fmt: skip
        return choice, timed

    def test_the_fastest_wins(self, spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        choice, timed = self._search(spec, monkeypatch, {32: 3.0, 64: 2.0, 128: 1.0}, set())
        assert choice.config.tiles["BLOCK_M"] == 128
        assert (choice.before, choice.seconds, choice.timed, choice.rejected) == (2.0, 1.0, 3, 0)
        assert timed == [64, 32, 128]

    def test_what_spills_is_not_timed(self, spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        choice, timed = self._search(spec, monkeypatch, {32: 1.5, 64: 2.0, 128: 1.0}, {(128, False)})
        assert timed == [64, 32]
        assert choice.config.tiles["BLOCK_M"] == 32
        assert choice.rejected == 1

    def test_every_form_must_pass(self, spec: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        choice, timed = self._search(spec, monkeypatch, {32: 1.5, 64: 2.0, 128: 1.0}, {(128, True)})
        assert 128 in timed
        assert choice.config.tiles["BLOCK_M"] == 32

    def test_tables_are_what_launches_read(self, spec: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from xfm_fast.kernels.triton import launch

        choice, _ = self._search(spec, monkeypatch, {64: 2.0, 128: 1.0}, set())
        tune.write([choice], 90, "a GPU", tmp_path)
        path = tune.write([replace(choice, size=32)], 90, "a GPU", tmp_path)
        assert path.name == "sm_90.json"
        assert json.loads(path.read_text())["toy"].keys() == {"bf16/64", "bf16/32"}
        monkeypatch.setattr(launch, "_TUNING", tmp_path)
        launch._tuned.cache_clear()
        launch.config_for.cache_clear()
        try:
            assert launch.config_for("toy", 64, "bf16", 90) == choice.config
        finally:
            launch._tuned.cache_clear()

    @pytest.mark.parametrize(("arch", "plain", "fragments"), [(80, [64, 80], []), (90, [80], [64])])
    def test_hopper_tunes_the_kernel_that_it_launches(self, arch: int, plain: list[int], fragments: list[int]) -> None:
        specs = {spec.name: spec for spec in shipped_kernels()}
        assert tune.sizes(specs["relpos_forward"], [64, 80], arch) == plain
        assert tune.sizes(specs["relpos_forward_fragments"], [64, 80], arch) == fragments
        grid = tune.candidates("relpos_forward_fragments", 64)
        assert {(c.tiles["BLOCK_M"], c.tiles["BLOCK_N"], c.num_warps) for c in grid} == {(128, 64, 8)}
