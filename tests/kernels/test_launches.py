"""Every launch of the model, specialised and compiled for GPUs that are not there."""

from __future__ import annotations

import json
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
MOST_WAITS_OF = {
    "bias, 16": 1.0,
    "bias, 32": 0.5,
    "bias, windows": 0.5,
    "bias, 48": 0.67,
    "bias, 80": 0.4,
}
ALL = [case for case in CASES if case != "captions"]


def launches(*cases: str, arch: int = 90, count: bool = False) -> list[dict[str, Any]]:
    """What `tests.kernels.launches` prints."""
    command = [
        sys.executable,
        "-m",
        "tests.kernels.launches",
        *cases,
        "--arch",
        str(arch),
        *["--count"] * count,
    ]
    done = subprocess.run(
        command, env=compiling_environment(), capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    # Triton warns of launches that leave its default of FMA fusion open.
    assert "fp_fusion" not in done.stderr.lower(), done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(found: list[dict[str, Any]], most_waits: float) -> None:
    for row in found:
        assert not row["stack_bytes"], f"{row['kernel']} spills {row['stack_bytes']} B"
        assert not row["serialised"], (
            f"{row['kernel']}: ptxas serialises its products ({row['serialised']})"
        )
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
            assert not row["loop_stores_to_shared"], (
                f"{row['kernel']}: a tile is not copied ahead of its use"
            )
    # Gradients of 16 heads of 11,600 tokens are more than 32 bits count.
    (summed,) = (row for row in found if row["kernel"].endswith(".batch_sum_kernel"))
    assert summed["integer_products"] == ["i64"]


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
    found = launches(
        "relpos",
        "varlen",
        "varlen, short",
        "norms",
        "embedding",
        "activation",
        "vocabulary",
        arch=arch,
    )
    assert not [row for row in found if row["stack_bytes"]]


AMD = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from xfm_fast.kernels.audit.compiling import shipped_kernels

arch, warp = sys.argv[1], int(sys.argv[2])
for spec in shipped_kernels():
    if not spec.arches:
        form = next((v for v in spec.variants if v.get("head_dim") == 64), spec.variants[0])
        made = spec.request(form, spec.dtypes[-1], 0)
        source = ASTSource(made.kernel, made.signature, made.constexprs, made.attrs)
        compiled = triton.compile(source, target=GPUTarget("hip", arch, warp), options=made.options)
        products = sum(compiled.asm["amdgcn"].count(name) for name in ("v_mfma", "v_wmma"))
        assert bool(products) == spec.tensor_core, spec.name
        assert compiled.metadata.shared <= (163840 if arch == "gfx950" else 65536), spec.name
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arch", "warp"), [("gfx942", 64), ("gfx950", 64), ("gfx1100", 32), ("gfx1201", 32)]
)
def test_kernels_compile_for_amd(arch: str, warp: int, tmp_path: Path) -> None:
    """Half precision multiplies by the matrix cores, in the shared memory that there is (160 KB on gfx950, else 64)."""
    environment = compiling_environment() | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", AMD, arch, str(warp)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
