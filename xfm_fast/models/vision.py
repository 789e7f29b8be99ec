"""The BEiT-v2 vision encoder: pre-norm blocks with LayerScale and a learned relative position bias per layer.

`RelPosAttention` is its attention as a module for other models.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from xfm_fast.config import XFMConfig
from xfm_fast.errors import InputError
from xfm_fast.kernels import ops
from xfm_fast.kernels.caching import cached
from xfm_fast.kernels.flags import concatenate_biases, kind_of
from xfm_fast.models.shares import can_chunk, run_chunked, without_hooks
from xfm_fast.plans.orders import LayerModules
from xfm_fast.plans.plan import DTYPES, Layers, infers, plan_of
from xfm_fast.plans.recording import Added, Layout


class RelPosAttention(nn.Module):
    """Self-attention of a class token and a window of patches, with a learned relative position bias (BEiT).

    Queries and values have a bias, keys have none: softmax would cancel it (arXiv 2106.08254).

    Example:
        >>> attention = RelPosAttention(768, heads=12, window=(14, 14))
        >>> attention(torch.randn(8, 197, 768)).shape
        torch.Size([8, 197, 768])

    Args:
        width: size of a token; a multiple of `heads`.
        heads: number of attention heads.
        window: (height, width) in patches.
    """

    def __init__(self, width: int, heads: int, window: tuple[int, int]) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise InputError(f"heads={heads} does not divide the width of {width}")
        if min(window) < 1:
            raise InputError(f"window={window} has no patch; it is (height, width) in patches")
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.empty(width))
        self.v_bias = nn.Parameter(torch.empty(width))
        self.relative_position_bias_table = nn.Parameter(
            torch.empty((2 * window[0] - 1) * (2 * window[1] - 1) + 3, heads)
        )
        self.proj = nn.Linear(width, width)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as BEiT: truncated normal matrices, zeros elsewhere."""
        for linear in (self.qkv, self.proj):
            nn.init.trunc_normal_(linear.weight, std=0.02)
        for zero in (self.q_bias, self.v_bias, self.relative_position_bias_table, self.proj.bias):
            nn.init.zeros_(zero)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Attend over `[B, N, width]`, N = 1 + height * width; `key_mask` `[B, N]` is False for hidden keys."""
        tokens = 1 + self.window[0] * self.window[1]
        if x.ndim != 3 or x.shape[1] != tokens:
            raise InputError(
                f"x is {[*x.shape]}; a window of {self.window} patches needs [B, {tokens}, width]"
            )
        return ops.linear(self.attend(x, key_mask), self.proj.weight, self.proj.bias)

    def attend(
        self, x: Tensor, key_mask: Tensor | None = None, norm: nn.LayerNorm | None = None
    ) -> Tensor:
        """Run `forward` without the output projection, on x or `norm(x)`, for callers that fuse these."""
        bias = qkv_bias(self.q_bias, None, self.v_bias)
        if norm is None:
            qkv = ops.linear(x, self.qkv.weight, bias)
        else:
            qkv = ops.layer_norm_linear(x, norm.weight, norm.bias, norm.eps, self.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).unbind(2)
        return self.attend_heads(q, k, v, key_mask)

    def attend_heads(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None = None
    ) -> Tensor:
        """Compute the attention of q, k and v `[B, N, H, D]`: `[B, N, width]`."""
        table = self.relative_position_bias_table
        return ops.relpos_attention(q, k, v, table, self.window, key_mask=key_mask).flatten(2)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, window={self.window}"


def qkv_bias(q_bias: Tensor, k_bias: Tensor | None, v_bias: Tensor) -> Tensor:
    """Build the bias `[3 * width]` of a joint linear layer for q, k and v; cached for inference."""
    biases, widths = [q_bias, k_bias, v_bias], [len(q_bias)] * 3
    compute: Any = partial(concatenate_biases, biases, widths)
    sources = tuple(bias for bias in biases if bias is not None)
    if torch.is_grad_enabled() and any(source.requires_grad for source in sources):
        return compute()
    return cached("qkv bias", sources, compute)


# Devices that fuse the residual sum with the next norm, across blocks too. A CPU fuses the sum with the GEMM.
_JOINING = ("cuda",)


class PatchEmbed(nn.Module):
    """Projection of non-overlapping patches: a convolution, computed as one GEMM."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, width, patch, stride=patch)

    def forward(self, pixels: Tensor) -> Tensor:
        """Embed `[B, 3, R, R]` as `[B, patches, width]`, patches row-major."""
        batch, channels, height, width = pixels.shape
        p = self.patch
        patches = pixels.view(batch, channels, height // p, p, width // p, p)
        rows = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * p * p)
        return ops.linear(rows, self.proj.weight.flatten(1), self.proj.bias)


class MLP(nn.Module):
    """Linear layers of the MLP, which `Block` fuses with activation and residual."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)
        for linear in (self.fc1, self.fc2):
            nn.init.trunc_normal_(linear.weight, std=0.02)
            nn.init.zeros_(linear.bias)


class Block(nn.Module):
    """`x += γ1·Attn(LN(x)); x += γ2·MLP(LN(x))`, with stochastic depth in training."""

    def __init__(self, config: XFMConfig, drop_path: float) -> None:
        super().__init__()
        width = config.vision_width
        self.drop_path = drop_path
        self.gamma_1 = nn.Parameter(torch.full((width,), config.layer_scale_init))
        self.gamma_2 = nn.Parameter(torch.full((width,), config.layer_scale_init))
        self.norm1 = nn.LayerNorm(width, eps=config.vision_layer_norm_eps)
        self.attn = RelPosAttention(width, config.vision_heads, (config.grid, config.grid))
        self.norm2 = nn.LayerNorm(width, eps=config.vision_layer_norm_eps)
        self.mlp = MLP(width, int(width * config.vision_mlp_ratio))

    def _row_scale(self, x: Tensor) -> Tensor | None:
        """Draw the factor of every image's branch for stochastic depth."""
        if not self.training or self.drop_path == 0:
            return None
        keep = 1 - self.drop_path
        return x.new_empty(x.shape[0]).bernoulli_(keep).div_(keep)

    def forward(self, x: Tensor, key_mask: Tensor | None = None) -> Tensor:
        """Run the block on `[B, N, width]`; `key_mask` `[B, N]` is False for tokens to hide."""
        planned = None if key_mask is not None else self._run_planned(x)
        if planned is not None:
            return planned
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        # With gradients or int8, norms are fused with the GEMMs that follow them.
        if x.device.type == "cpu" and (torch.is_grad_enabled() or kind_of(fc1.weight) == "int8"):
            proj, norm = self.attn.proj, self.norm2
            context = self.attn.attend(x, key_mask, norm=self.norm1)
            x = ops.linear_residual(
                context, proj.weight, proj.bias, x, gamma=self.gamma_1, row_scale=self._row_scale(x)
            )
            return ops.layer_norm_mlp(
                x,
                norm.weight,
                norm.bias,
                norm.eps,
                fc1.weight,
                fc1.bias,
                fc2.weight,
                fc2.bias,
                gamma=self.gamma_2,
                row_scale=self._row_scale(x),
            )
        normed = ops.layer_norm(x, self.norm1.weight, self.norm1.bias, self.norm1.eps)
        normed, x = self._attend(normed, x, key_mask)
        return ops.mlp_residual(
            normed,
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            x,
            gamma=self.gamma_2,
            row_scale=self._row_scale(x),
        )

    def _run_planned(self, x: Tensor) -> Tensor | None:
        """Run the block as one call of compiled code; None without a plan."""
        attn = self.attn
        if x.dtype not in DTYPES or x.ndim != 3 or not infers(None, x):
            return None
        if type(attn) is not RelPosAttention or x.shape[1] != 1 + math.prod(attn.window):
            return None
        layers = Layers([self], Block.modules_of, [False])
        plan = plan_of(self, layers, x.dtype, x.dtype, x.shape[:-1].numel())
        if plan is None:
            return None
        table, scale = attn.relative_position_bias_table, plan.operands[0].head_size ** -0.5
        bias = ops.relpos_bias(table, attn.window, dtype=x.dtype, scale=scale)
        layout, bias = Layout(x.shape[:2], (len(x), x.shape[1], x.shape[1])).biased(bias[None])
        return plan.run(x, attn.attend_heads, layout, Added(bias=bias))

    def modules_of(self) -> LayerModules:
        """Return the modules of the block."""
        attn, mlp = self.attn, self.mlp
        return LayerModules(
            norms=(self.norm1, self.norm2),
            heads=attn.heads,
            proj=attn.proj,
            inner=(mlp.fc1,),
            fc2=mlp.fc2,
            projections=(attn.qkv,),
            qkv_biases=(attn.q_bias, None, attn.v_bias),
            gammas=(self.gamma_1, self.gamma_2),
        )

    def into_norm(
        self, normed: Tensor, x: Tensor, norm: nn.LayerNorm, *, wide: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Run the block fused with the next norm: (`norm1(x)`, x) → (`norm(out)`, out), all `[B, N, width]`.

        `norm` is `norm1` of the next block, or the final norm; `wide` as in `ops.add_layer_norm`.
        """
        normed, x = self._attend(normed, x, None)
        fc1, fc2 = self.mlp.fc1, self.mlp.fc2
        hidden = ops.linear_gelu(normed, fc1.weight, fc1.bias)
        return ops.linear_add_layer_norm(
            hidden,
            fc2.weight,
            fc2.bias,
            x,
            norm.weight,
            norm.bias,
            norm.eps,
            gamma=self.gamma_2,
            row_scale=self._row_scale(x),
            wide=wide,
        )

    def _attend(self, normed: Tensor, x: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Compute attention, residual and second norm: returns `norm2(out)` and out."""
        proj, norm = self.attn.proj, self.norm2
        return ops.linear_add_layer_norm(
            self.attn.attend(normed, key_mask),
            proj.weight,
            proj.bias,
            x,
            norm.weight,
            norm.bias,
            norm.eps,
            gamma=self.gamma_1,
            row_scale=self._row_scale(x),
        )


class VisionEncoder(nn.Module):
    """Encoder of images `[B, 3, R, R]` to tokens `[B, 1 + N, width]`.

    Token 0 is the mean of the normalised patches. With `local_attn_depth > 0` it is the normalised
    class token, and regions restrict the attention of the last blocks to their patches.
    """

    def __init__(self, config: XFMConfig) -> None:
        super().__init__()
        self.config = config
        width, depth = config.vision_width, config.vision_depth
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = PatchEmbed(config.patch_size, width)
        self.blocks = nn.ModuleList(
            Block(config, config.drop_path_rate * index / max(1, depth - 1))
            for index in range(depth)
        )
        self.fc_norm = nn.LayerNorm(width, eps=config.vision_layer_norm_eps)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        with torch.no_grad():
            # BEiT damps the residual branches of later blocks at initialisation.
            for depth, block in enumerate(self.blocks, start=1):
                assert isinstance(block, Block)
                block.attn.proj.weight /= math.sqrt(2 * depth)
                block.mlp.fc2.weight /= math.sqrt(2 * depth)

    def embed(self, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Embed class token and patches: `[B, 1 + N, width]`; `patch_mask` `[B, N]` hides patches."""
        patches = self.patch_embed(pixels)
        if patch_mask is not None:
            mask_token = self.mask_token.to(patches.dtype)
            patches = torch.where(patch_mask[:, :, None], mask_token, patches)
        return torch.cat([self.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)

    def _finish(self, x: Tensor) -> Tensor:
        norm = self.fc_norm
        return self._pool(ops.layer_norm(x, norm.weight, norm.bias, norm.eps))

    def _pool(self, normed: Tensor) -> Tensor:
        """Replace the class token by the mean of the patches."""
        if self.config.local_attn_depth > 0:
            return normed
        patches = normed[:, 1:]
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)

    def forward(self, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Encode images, with the patches of the boolean `patch_mask` `[B, N]` hidden."""
        first = self.blocks[0]
        if patch_mask is None and isinstance(first, Block):
            weight = first.mlp.fc1.weight
            if can_chunk(weight) and self._plain_blocks():
                kind = self.config, pixels.shape, pixels.dtype, kind_of(weight)
                return run_chunked(self._encode, pixels, kind)
        return self._encode(pixels, patch_mask)

    def _plain_blocks(self) -> list[Block]:
        """Return the blocks; an empty list if one is hooked or of another class, and has to be called."""
        blocks = [block for block in self.blocks if isinstance(block, Block)]
        if len(blocks) < len(self.blocks) or not without_hooks(blocks, "forward"):
            return []
        return blocks

    def _encode(self, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        x = self.embed(pixels, patch_mask)
        blocks = self._plain_blocks() if x.device.type in _JOINING else []
        if not blocks:
            for block in self.blocks:
                x = block(x)
            return self._finish(x)
        norms = [*(block.norm1 for block in blocks), self.fc_norm]
        normed = ops.layer_norm(x, norms[0].weight, norms[0].bias, norms[0].eps)
        for block, norm in zip(blocks, norms[1:], strict=True):
            # Under autocast the last norm has the dtype of a single norm.
            normed, x = block.into_norm(normed, x, norm, wide=norm is self.fc_norm)
        return self._pool(normed)

    def regions(
        self, pixels: Tensor, image_index: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode R regions of B images; `region_mask` `[R, 1 + N]` is True for the patches of a region.

        Returns two `[R, 1 + N, width]`: the region's token 0 with the image's patches, and the image.
        """
        regions, encoded = self.region_tokens(pixels, image_index, region_mask)
        images = encoded[image_index]
        if regions.shape[1] == 1:
            regions = torch.cat([regions, images[:, 1:]], dim=1)
        return regions, images

    def region_tokens(
        self, pixels: Tensor, image_index: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode regions as `regions` does, without copies of the image.

        Returns the tokens of the regions, `[R, 1, width]` (`[R, 1 + N, width]` with
        `local_attn_depth > 0`), and the images `[B, 1 + N, width]`.
        """
        if self.config.local_attn_depth <= 0:
            images = self(pixels)
            patches = images[:, 1:][image_index]
            weights = region_mask[:, 1:, None].to(patches.dtype)
            summed = (weights * patches).sum(1, keepdim=True)
            return summed / weights.sum(1, keepdim=True), images
        x = self.embed(pixels)
        shared = self.config.vision_depth - self.config.local_attn_depth
        for block in self.blocks[:shared]:
            x = block(x)
        local = x[image_index]
        for block in self.blocks[shared:]:
            local, x = block(local, region_mask), block(x)
        return self._finish(local), self._finish(x)
