"""Every launch of the model, specialised and compiled for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton_testing import HAS_TRITON, compiling_environment

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests.kernels.launches import CASES

# Waits of a well pipelined loop for each instruction that multiplies; serialised ones have one each.
MOST_WAITS = 0.35
# Scores are waited for once whatever the head: where a product is one to three instructions (of 16 columns each), so
# narrow is the head or its second piece, that is more of them. The numbers are those of the gradient of the bias, whose
# loop has no other product.
MOST_WAITS_OF = {"bias, 16": 1.0, "bias, 32": 0.5, "bias, windows": 0.5, "bias, 48": 0.67, "bias, 80": 0.4}
ALL = [case for case in CASES if case != "captions"]
# Folders with another Triton each, as `pip install --target` makes them.
TRITONS = [Path(folder).resolve() for folder in os.environ.get("XFM_TRITONS", "").split(os.pathsep) if folder]


def launches(*cases: str, arch: int = 90, count: bool = False, triton: Path | None = None) -> list[dict[str, Any]]:
    """What `tests.kernels.launches` prints, with the Triton in a folder or the one that is installed."""
    command = [sys.executable, "-m", "tests.kernels.launches", *cases, "--arch", str(arch), *["--count"] * count]
    environment = compiling_environment()
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join((str(triton), environment["PYTHONPATH"]))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-3000:]
    # Triton warns of launches that leave its default of FMA fusion open.
    assert "fp_fusion" not in done.stderr.lower(), done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]], most_waits: float) -> None:
    for row in found:
        assert not row["stack_bytes"], f"{row['kernel']} spills {row['stack_bytes']} B"
        assert not row["serialised"], f"{row['kernel']}: ptxas serialises its products ({row['serialised']})"
        assert row["loop_waits"] <= most_waits * row["loop_hgmma"], (
            f"{row['kernel']}: {row['loop_waits']} waits for {row['loop_hgmma']} HGMMA a turn"
        )


def test_attention_of_one_head_compiles_and_is_not_serialised() -> None:
    """One head, of one image: what is 1 becomes a constant, whose methods are not those of a number in a kernel."""
    found = launches("relpos, one head")
    assert {row["kernel"].split(".")[1] for row in found} == {
        "bias_kernel", "forward_kernel", "statistics_kernel", "dkdv_kernel", "dq_kernel",
        "batch_sum_kernel", "table_gradient_kernel",
    }  # fmt: skip
    check(found, MOST_WAITS)
    for row in found:
        # That of dk and dv writes the gradients of the scores there, on their way out.
        if row["loop_hgmma"] and not row["kernel"].endswith(".dkdv_kernel"):
            assert not row["loop_stores_to_shared"], f"{row['kernel']}: a tile is not copied ahead of its use"


def test_batches_of_captions_share_compilations() -> None:
    (counted,) = launches("captions", count=True)
    assert len(counted) > 10
    # Sums of one, two and five gradients of parameters are forms of their own; of every other kernel there are two:
    # with and without a residual, for few tokens and for many.
    assert counted.pop("rows.ordered_sum_kernel") <= 3
    assert {kernel: n for kernel, n in counted.items() if n > 2} == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL)
def test_every_launch_compiles_for_hopper(case: str) -> None:
    check(launches(case), MOST_WAITS_OF.get(case, MOST_WAITS))


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 100, 120])
def test_every_launch_of_the_model_compiles_for(arch: int) -> None:
    found = launches("relpos", "varlen", "varlen, short", "norms", "embedding", "activation", "vocabulary", arch=arch)
    assert not [row for row in found if row["stack_bytes"]]


@pytest.mark.slow
@pytest.mark.skipif(not TRITONS, reason="XFM_TRITONS names no folder with another Triton; make test-tritons does")
@pytest.mark.parametrize("triton", TRITONS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("case", ["relpos", "relpos, fragments, 64", "bias, 64", "varlen", "varlen, many waves"])
def test_other_tritons_do_not_serialise(case: str, triton: Path) -> None:
    """The assembler's words are had from Triton 3.6 on, its waits from all."""
    found = launches(case, triton=triton)
    assert found
    assert {Path(row["compiler"]).parent for row in found} == {triton / "triton"}
    check(found, MOST_WAITS)


AMD = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xfm_fast.kernels.audit.compiling import shipped_kernels

arch, warp, names = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
for spec in shipped_kernels():
    if not spec.arches and (not names or spec.name in names):
        form = next((v for v in spec.variants if v.get("head_dim") == 64), spec.variants[0])
        made = spec.request(form, spec.dtypes[-1], 0)
        source = ASTSource(made.kernel, made.signature, made.constexprs, made.attrs)
        compiled = triton.compile(source, target=GPUTarget("hip", arch, warp), options=made.options)
        products = sum(compiled.asm["amdgcn"].count(name) for name in ("v_mfma", "v_wmma"))
        assert bool(products) == spec.tensor_core, spec.name
        assert compiled.metadata.shared <= (163840 if arch == "gfx950" else 65536), spec.name
        print(spec.name)
"""


@pytest.mark.parametrize(
    ("arch", "warp", "kernels"),
    [
        ("gfx1100", 32, ("relpos_dq", "varlen_forward_short")),
        *(
            pytest.param(arch, warp, (), marks=pytest.mark.slow)
            for arch, warp in (("gfx942", 64), ("gfx950", 64), ("gfx1100", 32), ("gfx1201", 32))
        ),
    ],
)
def test_kernels_compile_for_amd(arch: str, warp: int, kernels: tuple[str, ...], tmp_path: Path) -> None:
    """Half precision multiplies by the matrix cores, in the shared memory that there is (160 KB on gfx950, else 64)."""
    environment = compiling_environment() | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", AMD, arch, str(warp), *kernels]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split()) >= set(kernels)
