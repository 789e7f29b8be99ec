"""The audit: machine code, occupancy and hazards by hand, the baseline, compilation, the commands, tuning."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton_testing import HAS_TRITON

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from xfm_fast.kernels import tune
from xfm_fast.kernels.audit import baseline, machine_code
from xfm_fast.kernels.audit.compiling import Row, Task, compile_all, shipped_kernels
from xfm_fast.kernels.audit.machine_code import occupancy, register_limit
from xfm_fast.kernels.triton import launch
from xfm_fast.kernels.triton.launch import CompileRequest, LaunchConfig

ROOT = Path(__file__).resolve().parents[2]
RESOURCES = " Function toy:\n  REG:40 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:480 TEXTURE:0 SURFACE:0 SAMPLER:0\n"
# Two loops, one in the other; the inner one waits for a barrier behind the end, as Blackwell's code does, and jumps
# back; the end traps in a branch to itself and is padded.
LISTING = """
.text.toy:
        /*0000*/                   S2R R10, SR_CTAID.X ;
.L_x_0:
        /*0010*/                   LDG.E R2, [R2.64] ;
.L_x_1:
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
$__internal_0_$trap:
        /*00d0*/                   STL [R1], R2 ;
        /*00e0*/                   RET.REL.NODEC R2 `(toy) ;
.L_x_4:
        /*00f0*/                   BRA `(.L_x_4);
        /*0100*/                   NOP ;
"""


def test_listing_and_its_natural_loops() -> None:
    code = machine_code.parse(LISTING, RESOURCES)
    assert (code.registers, code.stack_bytes, code.static_shared_bytes) == (40, 16, 1024)
    assert len(code.instructions) == 15  # without the trap and the padding
    assert (code.instructions[6].predicate, code.instructions[8].target) == ("UP1", 0xD0)
    # The jump from 0xc0 back to 0x40 makes no loop: 0x40 is also reached from 0x30.
    loops = machine_code.natural_loops(code.instructions)
    assert [loop.instructions[0].address for loop in loops] == [0x10, 0x20, 0xA0]
    # The loop at 0x10 contains another, that at 0xa0 only waits.
    (main,) = code.inner_loops
    assert [i.address for i in main.instructions] == [
        0x20,
        0x30,
        0x40,
        0x50,
        0x60,
        0xA0,
        0xB0,
        0xC0,
    ]
    assert main.tensor_core == 1


def test_occupancy_by_hand() -> None:
    for arch, figures, blocks in (
        # 100 registers × 32 = 3,200 → 3,328 in units of 256: 4 a quarter of 16,384, where 96 would allow 5.
        (80, {"registers": 100, "shared_bytes": 0, "warps": 4}, 4),
        # 48 KB and 1 KB of reserve fit three times into 164 KB.
        (80, {"registers": 32, "shared_bytes": 48 * 1024, "warps": 4}, 3),
        (120, {"registers": 16, "shared_bytes": 0, "warps": 1}, 24),
        (100, {"registers": 64, "shared_bytes": 1024, "warps": 4, "tensor_memory": 256}, 2),
        (120, {"registers": 32, "shared_bytes": 100 * 1024, "warps": 4}, 0),
    ):
        assert occupancy(arch, **figures) == blocks
    for warps, registers, cliff in ((8, 100, 128), (4, 130, 168), (8, 129, 255)):
        assert register_limit(90, registers=registers, shared_bytes=0, warps=warps) == cliff


PRODUCT, WAIT, WRITE = (
    "HGMMA.64x64x16.F32 R24, gdesc[UR8], R24, gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "STS [R4], R5",
)


@pytest.mark.parametrize(
    ("lines", "warps", "writes"),
    [
        ((PRODUCT, WAIT, WRITE), 8, 1),
        ((PRODUCT, WAIT, WRITE), 4, 0),
        ((PRODUCT, WAIT, "BAR.SYNC 0x0", WRITE), 8, 0),
        # The wait of a turn and the write of the next; and a wait that leaves a product running.
        ((WRITE, PRODUCT, WAIT), 8, 1),
        ((PRODUCT, WAIT.replace("0x0", "0x1"), WRITE), 8, 0),
    ],
)
def test_a_write_behind_a_wait_needs_a_barrier_between_groups_of_warps(
    lines: tuple[str, ...], warps: int, writes: int
) -> None:
    text = [".L_0:", "LDG.E R90, [R92.64]", *lines, "@P0 BRA `(.L_0)", "EXIT"]
    numbered = [
        line if line.endswith(":") else f"        /*{16 * n:04x}*/   {line} ;"
        for n, line in enumerate(text)
    ]
    loop = machine_code.parse("\n".join(["toy:", *numbered]), RESOURCES).main_loop
    assert machine_code.unfenced_writes(loop, warps) == writes
    assert machine_code.tensor_waits(loop) == 1


HOPPER = """
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
$L__BB0_1:
	FENCE
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r3,%r4}, %rd2, %rd3, %p1, 1, 1, 0, 0;
	wgmma.mma_async.sync.aligned.m64n32k16.f32.bf16.bf16 {%r3,%r4}, {%r5,%r6}, %rd3, %p1, 1, 1, 1;
	cp.async.wait_group 0;
	@%p2 bra 	$L__BB0_1;
"""


@pytest.mark.parametrize(
    ("fence", "unfenced"), [("fence.proxy.async.shared::cta;", 0), ("bar.sync 0;", 2)]
)
def test_copies_without_a_fence_before_hoppers_products_are_counted(
    fence: str, unfenced: int
) -> None:
    """What is waited for at the end of a turn is read at the beginning of the next."""
    ptx = HOPPER.replace("FENCE", fence)
    assert machine_code.unfenced_copies(ptx) == unfenced
    assert machine_code.register_operands(ptx) == 1


def row_of(**changes: Any) -> Row:
    row = Row(
        key="", kernel="toy", variant="head_dim=64", config="BLOCK_M=64 warps=4 stages=2", arch=90, dtype="bf16",
        registers=100, shared_bytes=1024, shared_limit=232448, occupancy=4, tensor_core={"HGMMA": 8},
        instructions=900, loop_instructions=300, loop_tensor_core=8, loop_waits=2,
    )  # fmt: skip
    row = replace(row, **changes)
    return replace(row, key=f"toy | {row.variant} | sm_{row.arch} | {row.dtype}")


def compare(row: Row, compiler: str = "triton 1") -> baseline.Comparison:
    accepted = baseline.Accepted("triton 1", {row_of().key: baseline.figures(row_of())})
    return baseline.compare([row], accepted, compiler=compiler, shipped={row.key})


def test_worse_figures_are_named() -> None:
    for change, named in (
        ({"registers": 101}, "registers 100 → 101"),
        ({"occupancy": 3}, "occupancy 4 → 3"),
        ({"tensor_core": {"HMMA": 8}}, "HGMMA"),
        ({"error": "CompilationError: no"}, "CompilationError: no"),
        ({"loop_waits": 8}, "waits_per_tensor_core 0.25 → 1.0"),
        ({"warnings": ["C7515"]}, "C7515"),
    ):
        comparison = compare(row_of(**change))
        (line,) = comparison.worse
        assert row_of().key in line
        assert named in line
        assert not comparison.better


def test_equal_and_better_figures_pass_and_another_compiler_is_held_to_what_does_not_depend_on_it() -> (
    None
):
    assert compare(row_of()) == baseline.Comparison([], [])
    comparison = compare(row_of(registers=90, occupancy=5))
    assert not comparison.worse
    assert "registers 100 → 90, occupancy 4 → 5" in comparison.better[0]
    other = compare(row_of(registers=140, instructions=1200), "triton 2")
    assert not other.worse
    assert "triton 2" in other.note
    assert compare(row_of(stack_bytes=64), "triton 2").worse


def test_accepting_keeps_other_rows(tmp_path: Path) -> None:
    path = tmp_path / "accepted.json"
    other, gone = row_of(arch=80), row_of(dtype="fp16")
    baseline.accept([row_of(), other, gone], compiler="triton 1", path=path)
    baseline.accept([row_of(registers=120)], compiler="triton 1", forget={gone.key}, path=path)
    accepted = baseline.read(path)
    assert accepted.rows.keys() == {row_of().key, other.key}
    assert accepted.rows[row_of().key]["registers"] == 120
    assert baseline.read(path, arches=(80,)).rows.keys() == {other.key}
    assert not baseline.read(path, kernels=("else",)).rows
    for rows, compiler in (([row_of(error="no")], "triton 1"), ([row_of()], "triton 2")):
        with pytest.raises(ValueError, match=r"toy|triton 2"):
            baseline.accept(rows, compiler=compiler, path=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match=path.name):
        baseline.read(path)


@pytest.mark.slow
def test_a_compiler_that_dies_loses_one_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "toy_fatal.py").write_text("import os\nos._exit(7)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    request = CompileRequest(None, {}, {}, {}, {})
    tasks = [
        Task(module, "kernel", request, 80, module) for module in ("toy_fatal", "no_such_module")
    ]
    fatal, absent = compile_all(tasks, jobs=1, cache_dir=tmp_path / "cache").values()
    assert "compiler died" in fatal.error
    assert "no_such_module" in absent.error


COMMAND = """
import sys
from pathlib import Path
from xfm_fast.cli.app import main

if sys.argv[1]:
    # It imports Triton, which then interprets its own functions.
    from xfm_fast.kernels.audit import baseline

    baseline.BASELINE = Path(sys.argv[1])
raise SystemExit(main(sys.argv[2:]))
"""


def audit(
    *arguments: str, cache: Path, accepted: Path | str = ""
) -> subprocess.CompletedProcess[str]:
    # The audit compiles even where the tests interpret.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment["XDG_CACHE_HOME"] = str(cache)
    command = [sys.executable, "-c", COMMAND, str(accepted), "audit", *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )


@pytest.mark.slow
def test_command(tmp_path: Path) -> None:
    accepted, rows = tmp_path / "accepted.json", tmp_path / "rows.json"
    selection = ["--kernel", "ordered_sum", "--arch", "80"]
    done = audit(*selection, "--accept", "--json", str(rows), cache=tmp_path, accepted=accepted)
    assert done.returncode == 0, done.stderr
    written = json.loads(rows.read_text())
    assert {(row["kernel"], row["arch"]) for row in written} == {("ordered_sum", 80)}
    # A form with the hash of its accepted figures is skipped, one with another is compared: it is worse.
    content = json.loads(accepted.read_text())
    key = next(iter(content["rows"]))
    content["rows"][key] |= {"registers": content["rows"][key]["registers"] - 1, "made_of": "other"}
    accepted.write_text(json.dumps(content))
    done = audit(*selection, "--changed", cache=tmp_path, accepted=accepted)
    assert done.returncode == 1
    assert "1 of" in done.stdout
    assert "(0 compiled" in done.stdout
    assert f"{key}: registers " in done.stdout


def test_every_specification_describes_its_kernel() -> None:
    for spec in shipped_kernels():
        for arch in (80, 86, 90, 103, 120):
            for variant in spec.variants:
                request = spec.request(variant, "bf16", arch)
                assert list(request.signature) == spec.kernel.arg_names
                assert request.attrs


@pytest.mark.slow
def test_shipped_kernels_are_as_good_as_accepted(tmp_path: Path) -> None:
    done = audit(cache=tmp_path)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr


IN_USE = LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64}, 4, 2)
TOY = launch.KernelSpec(
    name="toy",
    kernel=None,
    variants=({"head_dim": 64}, {"head_dim": 64, "mask": True}),
    config=lambda variant, dtype, arch: (
        launch.tuned_config("toy", variant["head_dim"], dtype, arch) or IN_USE
    ),
    constants=lambda *_: {},
)


@pytest.mark.parametrize(
    ("times", "spilling", "best", "rejected"),
    [
        ({32: 3.0, 64: 2.0, 128: 1.0}, None, 128, 0),
        # What spills is not timed; and every form must pass, not only that which is timed.
        ({32: 1.5, 64: 2.0, 128: 1.0}, (128, False), 32, 1),
        ({32: 1.5, 64: 2.0, 128: 1.0}, (128, True), 32, 0),
    ],
)
def test_the_fastest_configuration_without_spills_wins(
    times: dict[int, float], spilling: tuple[int, bool] | None, best: int, rejected: int,
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    """With a timer that reads the configuration, and an audit that rejects what the test says."""

    def examine(forms: list[Any], **_: Any) -> list[Row]:
        spills = [
            (form.config.tiles["BLOCK_M"], "mask" in form.variant) == spilling for form in forms
        ]
        return [row_of(stack_bytes=8 * spill) for spill in spills]

    monkeypatch.setattr(tune, "compile_rows", examine)
    choice = tune.search(
        TOY, 64, "bf16", 90, timer=lambda call: times[call()],
        workload=lambda *kernel: lambda: TOY.config({"head_dim": 64}, "bf16", 90).tiles["BLOCK_M"],
        grid=[LaunchConfig({"BLOCK_M": m, "BLOCK_N": 64}, 4, 2) for m in sorted(times)],
    )  # fmt: skip
    assert choice.config.tiles["BLOCK_M"] == best
    assert (choice.before, choice.seconds, choice.rejected) == (2.0, times[best], rejected)
    tune.write([choice], 90, "a GPU", tmp_path)
    path = tune.write([replace(choice, size=32)], 90, "a GPU", tmp_path)
    assert json.loads(path.read_text())["toy"].keys() == {"bf16/64", "bf16/32"}
    monkeypatch.setattr(launch, "_TUNING", tmp_path)
    launch._tuned.cache_clear()
    assert launch.tuned_config("toy", 64, "bf16", 90) == choice.config
    launch._tuned.cache_clear()


@pytest.mark.parametrize(("arch", "plain", "fragments"), [(80, [64, 80], []), (90, [80], [64])])
def test_hopper_tunes_the_kernel_that_it_launches(
    arch: int, plain: list[int], fragments: list[int]
) -> None:
    specs = {spec.name: spec for spec in shipped_kernels()}
    assert tune.sizes(specs["relpos_forward"], [64, 80], arch) == plain
    assert tune.sizes(specs["relpos_forward_fragments"], [64, 80], arch) == fragments
    # Forms with a mask exist for one head dimension; a norm has no tiles to choose.
    assert tune.sizes(specs["varlen_dkdv_masked"], [64, 80], arch) == [64]
    assert not tune.sizes(specs["add_layer_norm_forward"], [64, 80], arch)
    grid = tune.candidates("relpos_forward_fragments")
    assert {(c.tiles["BLOCK_M"], c.tiles["BLOCK_N"], c.num_warps) for c in grid} == {(128, 64, 8)}
