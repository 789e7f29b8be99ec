"""The least time that an operation can take: its arithmetic at the peak rate or its traffic, whichever is more.

FLOPs are those of the mathematics, a multiplication and an addition being two; what a kernel computes again to save
memory is its own affair. Bytes are every operand read once and every result written once.
"""

from __future__ import annotations

from dataclasses import dataclass

HEADS, HEAD_DIM, WIDTH, HIDDEN = 12, 64, 768, 3072
IMAGES = 8
VOCABULARY, LABELLED_ROWS = 50_265, 1_440
_FP32, _INT64 = 4, 8


@dataclass(frozen=True)
class GPU:
    """Peak rates: dense bf16 or fp16 on the tensor cores, and memory.

    Source: NVIDIA's data sheets, SXM boards.
    """

    name: str
    flops_per_s: float
    bytes_per_s: float


H100 = GPU("H100", 989e12, 3.35e12)
H200 = GPU("H200", 989e12, 4.8e12)
A100 = GPU("A100", 312e12, 2.04e12)
GPUS = (H200, H100, A100)


@dataclass(frozen=True)
class Work:
    """The arithmetic and traffic of an operation at one shape.

    Attributes:
        kernels: prefixes of the names of the kernels that do it.
    """

    op: str
    shape: str
    flops: float
    bytes: float
    kernels: tuple[str, ...] = ()

    def floor(self, gpu: GPU) -> float:
        """Seconds, at least."""
        return max(self.flops / gpu.flops_per_s, self.bytes / gpu.bytes_per_s)

    def bound(self, gpu: GPU) -> str:
        """The part that takes longer: `"compute"` or `"memory"`."""
        return "compute" if self.flops / gpu.flops_per_s > self.bytes / gpu.bytes_per_s else "memory"


def relpos_attention(batch: int, tokens: int, *, backward: bool = False, element: int = 2) -> Work:
    """Self-attention of images with a bias `[heads, N, N]`, read once: it stays in the second-level cache.

    The backward pass writes the gradient of the table, which is small, and reads the bias again.
    """
    operand = batch * tokens * HEADS * HEAD_DIM * element
    bias = HEADS * tokens * tokens * element
    return _attention(
        "relpos_attention", f"{batch} × {tokens}", batch * tokens * tokens, 4 * operand, bias, batch * tokens,
        backward=backward, kernels=("relpos_", "attention_backward_statistics"),
    )  # fmt: skip


def varlen_attention(
    pairs: int, queries: int, keys: int, shape: str, *, backward: bool = False, element: int = 2
) -> Work:
    """Attention of packed sequences.

    Args:
        pairs: (query, key) pairs that attend, summed over the sequences.
        queries: packed query tokens.
        keys: packed key tokens.
        shape: for the table.
        backward: the backward pass instead of the forward one.
        element: bytes of one number.
    """
    operands = 2 * (queries + keys) * HEADS * HEAD_DIM * element
    return _attention(
        "varlen_attention", shape, pairs, operands, 0, queries,
        backward=backward, kernels=("varlen_", "attention_backward_statistics"),
    )  # fmt: skip


def _attention(
    op: str, shape: str, pairs: int, operands: int, bias: int, queries: int, *, backward: bool, kernels: tuple[str, ...]
) -> Work:
    products = 5 if backward else 2  # qkᵀ again, dv, dp, dq, dk; or qkᵀ and pv
    flops = products * 2 * pairs * HEADS * HEAD_DIM
    statistics = queries * HEADS * _FP32
    # Backward: q, k, v, out and dout are read, dq, dk and dv written: twice the operands of the forward pass.
    traffic = 2 * operands if backward else operands
    chosen = tuple(k for k in kernels if backward or not k.startswith("attention_backward"))
    return Work(op + (" backward" if backward else ""), shape, flops, traffic + bias + statistics, chosen)


def add_layer_norm(rows: int, *, backward: bool = False, element: int = 2) -> Work:
    """Residual addition and LayerNorm: two tensors in, sum and norm out.

    Backward: gradients of both results and the sum are read, the gradient of both inputs, which is one, is written.
    """
    tensors = 4
    flops = (14 if backward else 9) * rows * WIDTH
    name = "add_layer_norm" + (" backward" if backward else "")
    kernels = ("add_layer_norm_backward", "ordered_sum") if backward else ("add_layer_norm_forward",)
    return Work(name, f"{rows} × {WIDTH}", flops, tensors * rows * WIDTH * element + 2 * rows * _FP32, kernels)


def embed_layer_norm(rows: int, *, element: int = 2) -> Work:
    """Word, position and type embeddings of packed tokens, summed and normalised; the type's row stays in the cache."""
    traffic = rows * (3 * WIDTH * element + 2 * _INT64)
    return Work("embed_layer_norm", f"{rows} × {WIDTH}", 10 * rows * WIDTH, traffic, ("embed_layer_norm",))


def linear_gelu(rows: int, *, backward: bool = False, element: int = 2) -> Work:
    """The first product of an MLP with its GELU; the pre-activation is kept for the backward pass, and read there."""
    product = 2 * rows * WIDTH * HIDDEN
    inner, outer, weight = rows * HIDDEN * element, rows * WIDTH * element, WIDTH * HIDDEN * element
    if backward:  # dx and dw; x, w, dy and the pre-activation in, dx and dw out
        return Work(
            "linear_gelu backward", f"{rows} × {WIDTH} → {HIDDEN}", 2 * product, 2 * (outer + weight + inner),
            ("bias_gelu_backward", "ordered_sum"),
        )  # fmt: skip
    return Work(
        "linear_gelu", f"{rows} × {WIDTH} → {HIDDEN}", product, outer + weight + 2 * inner, ("bias_gelu_forward",)
    )


def linear_cross_entropy(rows: int, vocabulary: int, *, element: int = 2) -> Work:
    """Loss over a vocabulary with its gradients: three products, and no logits in memory."""
    product = 2 * rows * WIDTH * vocabulary
    traffic = 2 * (rows * WIDTH + vocabulary * WIDTH + vocabulary) * element
    return Work(
        "linear_cross_entropy and gradients", f"{rows} × {WIDTH} → {vocabulary}", 3 * product, traffic,
        ("running_softmax", "softmax_gradient"),
    )  # fmt: skip


def model_shapes() -> list[Work]:
    """Every operation at the shapes that X-FM base gives it.

    Images of 224, 384 and 480 pixels are 197, 577 and 901 tokens. A text batch is 256 captions of 13 tokens, packed;
    cross-attention lets the 3,328 tokens of such a batch look at one image of 577.
    """
    captions, length = 256, 13
    packed = captions * length
    work: list[Work] = []
    for tokens in (197, 577, 901):
        work += [relpos_attention(IMAGES, tokens), relpos_attention(IMAGES, tokens, backward=True)]
    for backward in (False, True):
        work.append(varlen_attention(captions * length**2, packed, packed, f"{captions} × {length}", backward=backward))
        work.append(varlen_attention(packed * 577, packed, 577, f"{packed} × 577", backward=backward))
    for rows in (IMAGES * 577, packed):
        work += [add_layer_norm(rows), add_layer_norm(rows, backward=True)]
        work += [linear_gelu(rows), linear_gelu(rows, backward=True)]
    return [*work, embed_layer_norm(packed), linear_cross_entropy(LABELLED_ROWS, VOCABULARY)]
