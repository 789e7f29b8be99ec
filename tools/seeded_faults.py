"""Faults put into kernels, losses and metrics, one at a time: does a test see each of them?

`make mutants` copies the tree, puts one fault after the other into the copy, runs the tests that cover the file until
one fails, and writes `seeded_faults.json`: every fault with the test that caught it. A fault that no test catches is
printed, and the exit code is 1.

In plain Python faults are generated: every operator, comparison and number of a function is a place for one, and of
these places two are drawn by a fixed seed. Triton's sources are not Python when they run, and of random faults in them
many change nothing, so theirs are written by hand below.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).with_suffix(".json")
_OF_A_FUNCTION = 2
_SECONDS = 600
_SLOW_TO_IMPORT = (
    "torch",
    "torchvision",
    "triton",
    "hypothesis",
    "scipy.stats",
    "pydantic",
    "safetensors.torch",
)

# The tests that shall see faults of a file, the quickest first.
COVERED_BY: dict[str, tuple[str, ...]] = {
    "kernels/reference.py": (
        "tests/kernels/test_contract.py",
        "tests/kernels/test_varlen_cpu.py",
        "tests/kernels/test_losses_cpu.py",
        "tests/kernels/test_cpu.py",
        "tests/kernels/test_hard_negatives.py",
        "tests/kernels/test_fp8.py",
        "tests/models/test_golden.py",
    ),
    "xfm_fast/objectives/losses.py": (
        "tests/objectives/test_losses.py",
        "tests/objectives/test_step_golden.py",
        "tests/objectives/test_step_twin.py",
        "tests/training/test_setup.py",
    ),
    "xfm_fast/tasks/captioning.py": ("tests/tasks/test_caption_metrics.py",),
    "xfm_fast/tasks/grounding.py": ("tests/tasks/test_grounding.py",),
    "xfm_fast/tasks/weak_grounding.py": ("tests/tasks/test_heatmap.py",),
    "xfm_fast/tasks/text.py": ("tests/tasks/test_classification.py",),
    "xfm_fast/tasks/reranking.py": ("tests/tasks/test_retrieval.py",),
    "xfm_fast/tasks/vqa.py": ("tests/tasks/test_vqa.py",),
    "kernels/triton/attention_tiles.py": (
        "tests/kernels/test_triton_contract.py",
        "tests/kernels/test_triton_attention.py",
    ),
    "kernels/triton/bias_attention.py": (
        "tests/kernels/test_triton_contract.py",
        "tests/kernels/test_triton_attention.py",
    ),
    "kernels/triton/cross_entropy.py": (
        "tests/kernels/test_triton_contract.py",
        "tests/kernels/test_triton_rows.py",
    ),
    "kernels/triton/layers.py": (
        "tests/kernels/test_triton_contract.py",
        "tests/kernels/test_triton_rows.py",
    ),
    "kernels/triton/relpos_attention.py": ("tests/kernels/test_triton_contract.py",),
    "kernels/triton/relpos_table.py": (
        "tests/kernels/test_triton_contract.py",
        "tests/kernels/test_triton_attention.py",
    ),
    "kernels/triton/rows.py": (
        "tests/kernels/test_triton_contract.py",
        "tests/kernels/test_triton_rows.py",
    ),
    "kernels/triton/varlen_attention.py": (
        "tests/kernels/test_triton_contract.py",
        "tests/kernels/test_triton_attention.py",
    ),
}
# Of these tests, that which is likeliest to see a fault of a function comes first.
_FIRST = {
    "linear_cross_entropy": "test_losses_cpu",
    "token_log_likelihood": "test_losses_cpu",
    "hard_negative_weights": "test_hard_negatives",
    "varlen_attention": "test_varlen_cpu",
}
# Functions that faults are generated in: all of a file, or these. Checks of arguments have tests of their own.
GENERATED: dict[str, tuple[str, ...]] = {
    "kernels/reference.py": (),
    "xfm_fast/objectives/losses.py": (
        *(
            "contrastive_loss",
            "contrastive_rows",
            "same_image",
            "check_features",
            "matching_loss",
            "hard_negative_weights",
        ),
        *(
            "sample_hard_negatives",
            "masked_lm_loss",
            "masked_token_loss",
            "masked_image_loss",
            "masked_image_terms",
        ),
        *(
            "_check_boxes",
            "_mean_over_boxes",
            "box_l1_loss",
            "box_giou_loss",
            "generalized_iou",
            "_corners",
            "_quotient",
        ),
    ),
    "xfm_fast/tasks/captioning.py": (
        "bleu",
        "rouge_l",
        "cider_d",
        "_ngrams",
        "_common_subsequence",
    ),
    "xfm_fast/tasks/grounding.py": ("pixel_iou", "box_accuracy"),
    "xfm_fast/tasks/weak_grounding.py": ("best_box",),
    "xfm_fast/tasks/text.py": ("f1_score", "correlations"),
    "xfm_fast/tasks/reranking.py": (
        "recall",
        "candidate_recall",
        "_shares",
        "top_candidates",
        "_contained",
    ),
    "xfm_fast/tasks/vqa.py": ("strip_punctuation", "vqa_accuracy", "exact_match"),
}
_PASSED_OVER = ("check_", "_check_")

BY_HAND: dict[str, tuple[tuple[str, str], ...]] = {
    "kernels/triton/cross_entropy.py": (
        ('tl.where(offsets < columns, logits, float("-inf"))', "logits"),
        ("maximum = tl.maximum(tl.max(logits, 0), -3.0e38)", "maximum = tl.max(logits, 0)"),
        ("tl.load(sum_ptr + row) * tl.exp(before - maximum)", "tl.load(sum_ptr + row)"),
        ("(1 - smoothing) * loss + smoothing *", "loss + smoothing *"),
        ("total / vocabulary - maximum", "total / columns - maximum"),
        ("(target < 0) | (target >= vocabulary)", "(target < 0) | (target > vocabulary)"),
        ("error - (1 - smoothing)", "error - 1"),
        ("tl.where(coefficient == 0.0, 0.0, coefficient * error)", "coefficient * error"),
        ("here = (target >= start)", "here = (target > start)"),
        ("wide += _wide_product", "wide = _wide_product"),
        ("total += _wide_product(x, y)", "total = _wide_product(x, y)"),
    ),
    "kernels/triton/layers.py": (
        (
            "tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + eps)",
            "tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH)",
        ),
        (
            "centred = tl.where(inside, values - mean[:, None], 0.0)",
            "centred = values - mean[:, None]",
        ),
        ("scaled - normalised * projection[:, None] - mean", "scaled - mean"),
        ("dgamma += tl.sum(ds * x, 0)", "dgamma += tl.sum(ds, 0)"),
        ("partials + programs * WIDTH, dbias", "partials + programs * WIDTH, dweight"),
        (">= drop_below, keep_scale, 0.0)", ">= drop_below, 1.0, 0.0)"),
        (
            "values *= load_fp32(row_scale_ptr + rows // rows_per_scale",
            "values *= load_fp32(row_scale_ptr + rows * 0",
        ),
        ("(position >= 0) & (position < positions)", "(position >= 0)"),
        ("dtype_row += tl.sum(ds, 0)", "dtype_row += tl.sum(dnormed, 0)"),
    ),
    "kernels/triton/rows.py": (
        ("sums += tl.load(pointers", "sums = tl.load(pointers"),
        ("0.3989422804014327", "0.3979422804014327"),
        ("tl.exp(-0.5 * z * z)", "tl.exp(-z * z)"),
        ("dbias += tl.sum(dy, 0)", "dbias = tl.sum(dy, 0)"),
        ("        z += bias\n", ""),
        ("(entry != skipped) & ", ""),
        ("sums += tl.load(addresses", "sums = tl.load(addresses"),
        ("output.to(tl.int64) * count * WIDTH", "output.to(tl.int64) * WIDTH"),
    ),
    "kernels/triton/varlen_attention.py": (
        ("begin // BLOCK + s <= tile", "begin // BLOCK + s < tile"),
        ("    dk_a = dk_a * SCALE\n", ""),
        ("        dv_a = tl.where(allowed, dv_a, 0.0)\n", ""),
        ("dq_a * SCALE, dq_b * SCALE", "dq_a, dq_b * SCALE"),
    ),
    "kernels/triton/attention_tiles.py": (
        ("acc_a * shrink[:, None]", "acc_a"),
        ("row_sum = row_sum * shrink + ", "row_sum = row_sum + "),
        (
            "rescale / tl.where(attended, row_sum, 1.0)",
            "1.0 / tl.where(attended, row_sum, 1.0)",
        ),
        (
            "row_max * SCALE + tl.log2(row_sum) / LOG2E",
            "row_max * SCALE + tl.log2(row_sum) * LOG2E",
        ),
        ("dweights - delta[None, :]", "dweights"),
        ('finite_max = tl.where(new_max == float("-inf"), 0.0, new_max)', "finite_max = new_max"),
        ("dropped = tl.where(keep, weights * rescale, 0.0)", "dropped = weights"),
        ('lse = tl.where(lse == float("-inf"), float("inf"), lse)', "lse = lse"),
        ("tl.cast(head, tl.int64) |", "tl.cast(head * 0, tl.int64) |"),
        ("delta -= tl.load(dlse_ptr", "delta += tl.load(dlse_ptr"),
    ),
    "kernels/triton/relpos_attention.py": (
        ("dk_a * SCALE, dk_b * SCALE", "dk_a, dk_b * SCALE"),
        ("            ds_ptr += stride_ds\n", ""),
        ("mask = inside & (", "mask = inside | ("),
        ("inverse = (1.0 / row_sum)[:, None]", "inverse = (0.0 * row_sum + 1.0)[:, None]"),
    ),
    "kernels/triton/relpos_table.py": (
        (
            "tl.where(rows > 0, column_class, patches + 2)",
            "tl.where(rows > 0, column_class, patches + 1)",
        ),
        ("(height - 1) * span + width - 1", "(width - 1) * span + width - 1"),
        ("tl.where(value < -LARGEST, -LARGEST, value)", "value"),
        ("sign = -1 if TURNED else 1", "sign = 1"),
        ("of_first_row += tl.load(base + patch,", "of_first_row = tl.load(base + patch,"),
    ),
    "kernels/triton/bias_attention.py": (
        ("new_max <= _HIDDEN / SCALE", 'new_max == float("-inf")'),
        ("b % period * stride_bg", "b // period * stride_bg"),
        ("dk_a * SCALE, dk_b * SCALE", "dk_a, dk_b * SCALE"),
    ),
}


@dataclass(frozen=True)
class Fault:
    """A change of one place: the line as it is, and as it becomes."""

    file: str
    function: str
    before: str
    after: str
    text: str
    """The whole file with the fault in it."""

    @property
    def key(self) -> tuple[str, str, str]:
        return self.file, self.before, self.after


def faults() -> Iterator[Fault]:
    """Those that are generated, then those by hand."""
    for file, functions in GENERATED.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        for name, places in _functions(source):
            if name.startswith(_PASSED_OVER) or (functions and name not in functions):
                continue
            found = [(*place, new) for place in places for new in _replacements(place[2])]
            drawn = random.Random(f"{file} {name}").sample(found, min(_OF_A_FUNCTION, len(found)))
            for start, stop, old, new in sorted(drawn, key=lambda each: each[:2]):
                text = source[:start] + new + source[stop:]
                yield _fault(file, name, source, text, start, old, new)
    for file, changes in BY_HAND.items():
        source = (ROOT / file).read_text(encoding="utf-8")
        for old, new in changes:
            match = _pattern(old).search(source)
            if match is None:
                raise ValueError(f"{file} has no code {old!r}; write the fault anew in BY_HAND")
            start, stop = match.span()
            text = source[:start] + new + source[stop:]
            yield _fault(file, "", source, text, start, match[0], new)


def _pattern(code: str) -> re.Pattern[str]:
    """Match code however the formatter breaks it into lines."""
    if code.endswith("\n"):
        return re.compile(re.escape(code))
    return re.compile(r"\s*".join(map(re.escape, re.findall(r"\w+|[^\w\s]", code))))


def _fault(
    file: str, function: str, source: str, text: str, start: int, old: str, new: str
) -> Fault:
    first = source.rfind("\n", 0, start) + 1
    stop = source.find("\n", start + len(old.rstrip("\n")))
    before = source[first:stop]
    after = (
        before[: start - first] + new.rstrip("\n") + before[start - first + len(old.rstrip("\n")) :]
    )
    return Fault(file, function, before.strip(), after.strip(), text)


Place = tuple[int, int, str]
_OPERATORS = {
    ast.Lt: ("<", "<="), ast.LtE: ("<=", "<"), ast.Gt: (">", ">="), ast.GtE: (">=", ">"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Add: ("+", "-"), ast.Sub: ("-", "+"),
    ast.Mult: ("*", "/"), ast.Div: ("/", "*"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
    ast.And: ("and", "or"), ast.Or: ("or", "and"),
}  # fmt: skip
_OPPOSITES = (("amax", "amin"), ("max", "min"), ("maximum", "minimum"), ("clamp_min", "clamp_max"))
_NAMES = {a: b for pair in _OPPOSITES for a, b in (pair, pair[::-1])}


def _replacements(old: str) -> tuple[str, ...]:
    if old in _NAMES:
        return (_NAMES[old],)
    for symbol, other in _OPERATORS.values():
        if old == symbol:
            return (other,)
    if old in ("True", "False"):
        return (str(old == "False"),)
    if old in ("~", "not "):
        return ("",)
    return (repr(ast.literal_eval(old) + 1),)


def _functions(source: str) -> Iterator[tuple[str, list[Place]]]:
    """Every function and method, and its places for a fault: start, end and what stands there."""
    lines = [0]
    for line in source.encode().splitlines(keepends=True):
        lines.append(lines[-1] + len(line))
    data = source.encode()

    def at(line: int, column: int) -> int:
        return len(data[: lines[line - 1] + column].decode())

    def between(left: ast.AST, right: ast.AST, symbol: str) -> Place | None:
        start = at(left.end_lineno, left.end_col_offset)  # type: ignore[attr-defined]
        stop = at(right.lineno, right.col_offset)  # type: ignore[attr-defined]
        place = source.find(symbol, start, stop)
        return None if place < 0 else (place, place + len(symbol), symbol)

    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        found: list[Place | None] = []
        rest: list[ast.AST] = list(function.body)
        while rest:
            node = rest.pop()
            # What is said to the user, and the conditions under which it is said, are tested where they are raised.
            if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.FunctionDef)) or (
                isinstance(node, ast.If) and any(isinstance(each, ast.Raise) for each in node.body)
            ):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if isinstance(node, ast.keyword) and node.arg == "strict":
                continue
            rest += ast.iter_child_nodes(node)
            if isinstance(node, ast.AnnAssign):
                rest.remove(node.annotation)
            if isinstance(node, ast.Compare) and type(node.ops[0]) in _OPERATORS:
                found.append(
                    between(node.left, node.comparators[0], _OPERATORS[type(node.ops[0])][0])
                )
            elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
                found.append(between(node.left, node.right, _OPERATORS[type(node.op)][0]))
            elif isinstance(node, ast.BoolOp):
                found.append(between(node.values[0], node.values[1], _OPERATORS[type(node.op)][0]))
            elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Invert, ast.Not)):
                start = at(node.lineno, node.col_offset)
                symbol = "~" if isinstance(node.op, ast.Invert) else "not "
                found.append((start, start + len(symbol), symbol))
            elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
                start, stop = (
                    at(node.lineno, node.col_offset),
                    at(node.end_lineno or 0, node.end_col_offset or 0),
                )
                found.append((start, stop, source[start:stop]))
            elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
                stop = at(node.end_lineno or 0, node.end_col_offset or 0)
                found.append((stop - len(node.attr), stop, node.attr))
        yield function.name, sorted({place for place in found if place is not None})


class Copy:
    """A copy of the tree, with processes that have imported what is slow to import before a fault is put in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        files = subprocess.run(
            ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True
        ).stdout
        for name in filter(None, files.decode().split("\0")):
            if (ROOT / name).exists():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, folder / name, follow_symlinks=False)
        # The checkout may have its parts under xfm_fast as links that git does not know.
        for link in (path for path in (ROOT / "xfm_fast").iterdir() if path.is_symlink()):
            if not (folder / "xfm_fast" / link.name).is_symlink():
                (folder / "xfm_fast" / link.name).symlink_to(os.readlink(link))

    def first_failure(self, tests: tuple[str, ...], deselected: Sequence[str] = ()) -> str | None:
        """The test that fails first; None where all pass."""
        begun, log = time.perf_counter(), self.folder / "pytest.log"
        child = os.fork()
        if not child:
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            self._run(tests, deselected)
        while not (ended := os.waitpid(child, os.WNOHANG))[0]:
            if time.perf_counter() - begun > _SECONDS:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.05)
        if (code := os.waitstatus_to_exitcode(ended[1])) == 0:
            return None
        lines = log.read_text(errors="replace").splitlines()
        failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
        # Such as `FAILED tests/a.py::test_b[c d] - AssertionError: ...`.
        how = failed[-1].partition(" ")[2].partition(" - ")[0] if failed else ""
        return how or f"{tests[0]}: the process ended by {code}"

    def _run(self, tests: tuple[str, ...], deselected: Sequence[str]) -> None:
        import pytest

        sys.dont_write_bytecode = True
        os.chdir(self.folder)
        sys.path[:] = [
            str(self.folder),
            *(path for path in sys.path if path and Path(path).resolve() != ROOT),
        ]
        options = [
            "-x",
            "-q",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            f"--rootdir={self.folder}",
            "--no-header",
        ]
        options += [f"--deselect={test}" for test in deselected]
        code = pytest.main([*options, "-c", "pyproject.toml", *tests])
        sys.stdout.flush()
        os._exit(int(code))


Key = tuple[str, str, str]


def _known() -> dict[Key, dict[str, Any]]:
    if not RESULTS.exists():
        return {}
    return {
        (row["file"], row["before"], row["after"]): row
        for row in json.loads(RESULTS.read_text())["faults"]
    }


def _write(rows: list[dict[str, Any]]) -> None:
    caught = sum(bool(row["caught_by"]) for row in rows)
    content = {"caught": caught, "of": len(rows), "faults": rows}
    temporary = RESULTS.with_name(f".{RESULTS.name}.{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def main() -> int:
    """Put every fault in, one after the other; 1 where one is not caught."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", default="", help="only faults of files whose path holds this")
    parser.add_argument(
        "--anew", action="store_true", help="those too that an earlier run has caught"
    )
    parser.add_argument(
        "--deselect", action="append", default=[], help="a test that fails here without any fault"
    )
    parser.add_argument(
        "--unchecked", action="store_true", help="the tests are known to pass without a fault"
    )
    options = parser.parse_args()
    os.environ.setdefault("TRITON_INTERPRET", "1")
    for name in _SLOW_TO_IMPORT:
        __import__(name)
    import torch

    torch.set_num_threads(1)
    places = {fault.key: fault for fault in faults()}
    with tempfile.TemporaryDirectory(prefix="xfm-faults-") as folder:
        copy = Copy(Path(folder))
        clean: set[str] = set()
        for key, fault in places.items():
            # Read anew each time: another process may try others meanwhile.
            tried = _known().get(key)
            if options.file not in fault.file or (
                tried and tried["caught_by"] and not options.anew
            ):
                continue
            first = _FIRST.get(fault.function, "")
            tests = tuple(
                sorted(
                    COVERED_BY[fault.file],
                    key=lambda test, name=first: not name or name not in test,
                )
            )
            for test in (test for test in tests if test not in clean and not options.unchecked):
                # What fails without a fault says nothing about one.
                if (failure := copy.first_failure((test,), options.deselect)) is not None:
                    raise SystemExit(f"{failure} fails without any fault; mend it first")
                clean.add(test)
            path = copy.folder / fault.file
            whole = path.read_text(encoding="utf-8")
            path.write_text(fault.text, encoding="utf-8")
            # What caught it before is quickest.
            recorded = tried["caught_by"] if tried else None
            caught = copy.first_failure((recorded,), options.deselect) if recorded else None
            caught = caught or copy.first_failure(tests, options.deselect)
            path.write_text(whole, encoding="utf-8")
            print(f"{caught or 'SURVIVED'}: {fault.file}: {fault.after}", flush=True)
            row = {
                "file": fault.file,
                "function": fault.function,
                "before": fault.before,
                "after": fault.after,
            }
            done = _known() | {key: row | {"caught_by": caught}}
            _write([done[key] for key in places if key in done])
    known = _known()
    rows = [known[key] for key in places if key in known]
    _write(rows)
    survived = sum(not row["caught_by"] for row in rows)
    print(f"{len(rows) - survived} of {len(rows)} faults are caught")
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main())
