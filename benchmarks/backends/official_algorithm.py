"""The official algorithm in plain PyTorch, evaluation and pretraining: the reference of speed and exactness."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfm_fast.batches import Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.errors import InputError
from xfm_fast.kernels.reference import relative_position_index
from xfm_fast.models.text import (
    Attention,
    DeepMLPHead,
    Embeddings,
    LMHead,
    MLPHead,
    ResidualNorm,
    TransformerLayer,
)
from xfm_fast.models.vision import Block, RelPosAttention
from xfm_fast.models.xfm import XFM

_MASKED = -10000.0
_NOT_SCORED = -100.0


class OfficialTwin:
    """Evaluates the parameters of an `XFM` the way the official code does.

    It performs the operations of the official eager code, in its order: texts are padded and masked by adding -10000,
    every projection is a GEMM of its own, attention is matmul + softmax + matmul, the position bias is gathered from
    its table in every block of every call, the fusion encoder projects the image tokens of every pair in every layer,
    and all positions pass through all layers although heads read only token 0. Calls share the index of the position
    table, a buffer of the official model, and no results.

    The twin reads the tensors of the model, in their dtype and under the current autocast, and gradients arrive in
    their `.grad`. In training mode, dropout and stochastic depth are where the official code has them.
    """

    def __init__(self, model: XFM) -> None:
        # Any: a model has the parts of its task.
        self.model: Any = model
        self.config = model.config
        grid = model.config.grid
        self._index = relative_position_index((grid, grid), model.device).view(-1)

    def encode_image(self, pixels: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        """Encode `[B, 3, R, R]` → `[B, 1 + N, vision_width]`: image token, then patches.

        The mask token replaces the embeddings of patches with a non-zero `patch_mask` `[B, N]`.
        """
        x = self._embed_patches(pixels, patch_mask)
        for block in self.model.vision_encoder.blocks:
            x = self._vision_block(block, x)
        return self._finish_image(x)

    def encode_regions(
        self, pixels: Tensor, image_index: Tensor, region_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Encode R regions of B images; arguments and result as for `XFM.encode_regions`."""
        region_mask = region_mask.to(pixels.dtype)
        if self.config.local_attn_depth <= 0:
            images = self.encode_image(pixels)[image_index]
            weights, patches = region_mask[:, 1:, None], images[:, 1:]
            pooled = (weights * patches).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
            return torch.cat((pooled, patches), dim=1), images
        x = self._embed_patches(pixels, None)
        blocks = self.model.vision_encoder.blocks
        shared = len(blocks) - self.config.local_attn_depth
        for block in blocks[:shared]:
            x = self._vision_block(block, x)
        local, hidden = x[image_index], _additive(region_mask, x.dtype)
        for block in blocks[shared:]:
            local, x = self._vision_block(block, local, hidden), self._vision_block(block, x)
        return self._finish_image(local), self._finish_image(x)[image_index]

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Encode ids and mask `[B, L]` → `[B, L, text_width]`, padded positions included."""
        encoder = self.model.text_encoder.roberta
        x = self._embed_tokens(encoder.embeddings, input_ids)
        mask = _additive(attention_mask, x.dtype)
        for layer in encoder.encoder.layer:
            x = self._self_attention(layer, x, mask)
            x = self._feed_forward(layer, x)
        return x

    def _embed_tokens(self, embeddings: Embeddings, input_ids: Tensor, offset: int = 0) -> Tensor:
        padding = self.config.pad_token_id
        real = input_ids.ne(padding).int()
        positions = ((real.cumsum(1).type_as(real) + offset) * real).long() + padding
        x = F.embedding(input_ids, embeddings.word_embeddings.weight, padding)
        x = x + F.embedding(torch.zeros_like(input_ids), embeddings.token_type_embeddings.weight)
        x += F.embedding(positions, embeddings.position_embeddings.weight, padding)
        return F.dropout(
            layer_norm(embeddings.LayerNorm, x), embeddings.dropout, embeddings.training
        )

    def fuse_pairs(
        self,
        text_embeds: Tensor,
        attention_mask: Tensor,
        image_embeds: Tensor,
        token_mask: Tensor | None = None,
    ) -> Tensor:
        """Fuse P texts `[P, L, text_width]` with an image `[P, M, vision_width]` each → `[P, L, text_width]`.

        Masks `[P, L]` of texts and `[P, M]` of images (by default all tokens) are non-zero for real tokens.
        """
        text_mask = _additive(attention_mask, text_embeds.dtype)
        if token_mask is None:
            token_mask = torch.ones(
                image_embeds.shape[:2], dtype=torch.long, device=image_embeds.device
            )
        image_mask = _additive(token_mask, text_embeds.dtype)
        x = text_embeds
        for layer in self.model.fusion_encoder.roberta.encoder.layer:
            x = self._self_attention(layer, x, text_mask)
            x = _attend(layer.crossattention, x, image_embeds, image_mask)
            x = self._feed_forward(layer, x)
        return x

    def decode(
        self, decoder: Any, ids: Tensor, mask: Tensor, states: Tensor, state_mask: Tensor
    ) -> Tensor:
        """Compute logits `[A, L, vocabulary]` of texts `[A, L]` by a `TextDecoder`.

        Each text has states `[A, M, width]` and their mask `[A, M]`.
        """
        x = self._embed_tokens(decoder.roberta.embeddings, ids)
        order = torch.arange(ids.shape[1], device=ids.device)
        lower = (order[None, :] <= order[:, None]).to(x.dtype)
        seen = lower * mask[:, None, :].to(x.dtype)
        causal = (1.0 - seen[:, None]) * _MASKED
        visible = _additive(state_mask, x.dtype)
        for layer in decoder.roberta.encoder.layer:
            x = self._self_attention(layer, x, causal)
            x = _attend(layer.crossattention, x, states, visible)
            x = self._feed_forward(layer, x)
        return _lm_logits(decoder.lm_head, decoder.word_embeddings, x)

    def decode_next(
        self, decoder: Any, ids: Tensor, states: Tensor, past: list[tuple[Tensor, ...]]
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        """Compute logits `[A, vocabulary]` after n more tokens `[A, n]` of each text, and the next `past`.

        `past` has for every layer the keys and values `[A, H, ..., D]` of the text, then those of the states
        `[A, M, width]`; it is empty at first.
        """
        offset = past[0][0].shape[2] if past else 0
        length = offset + ids.shape[1]
        x = self._embed_tokens(decoder.roberta.embeddings, ids, offset)
        keys = torch.arange(length, device=ids.device)
        seen = keys[None] <= keys[offset:, None]
        causal = (1.0 - seen[None, None].to(x.dtype)) * _MASKED
        visible = _additive(torch.ones(states.shape[:2], device=ids.device), x.dtype)
        cache = []
        for index, layer in enumerate(decoder.roberta.encoder.layer):
            crossed = layer.crossattention
            key, value = _memory_heads(layer.attention, x)
            if past:
                past_key, past_value, *image = past[index]
                key = torch.cat((past_key, key), dim=2)
                value = torch.cat((past_value, value), dim=2)
            else:
                image = _memory_heads(crossed, states)
            x = _attend_to(layer.attention, x, key, value, causal)
            x = _attend_to(crossed, x, image[0], image[1], visible)
            x = self._feed_forward(layer, x)
            cache.append((key, value, *image))
        return _lm_logits(decoder.lm_head, decoder.word_embeddings, x)[:, -1], cache

    def match_logits(self, fused: Tensor) -> Tensor:
        """Map fused embeddings `[P, L, text_width]` → `[P, 2]`, read from token 0."""
        return mlp_head(self.model.itm_head, fused[:, 0, :])

    def match_scores(self, fused: Tensor) -> Tensor:
        """Map fused embeddings `[P, L, text_width]` → `[P]`: the logit of "text describes image"."""
        return self.match_logits(fused)[:, 1]

    def project_image(self, image_embeds: Tensor) -> Tensor:
        """Compute the contrastive feature of the image token: `[B, 1 + N, vision_width]` → `[B, embed_dim]`."""
        return F.normalize(linear(self.model.vision_proj, image_embeds[:, 0, :]), dim=-1)

    def project_text(self, text_embeds: Tensor) -> Tensor:
        """Compute the contrastive feature of text token 0: `[B, L, text_width]` → `[B, embed_dim]`."""
        return F.normalize(linear(self.model.text_proj, text_embeds[:, 0, :]), dim=-1)

    def rerank_image(
        self, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor
    ) -> Tensor:
        """Score P candidate texts for one image, its tokens `[M, vision_width]` repeated for each → `[P]`."""
        images = image_embeds.repeat(text_embeds.shape[0], 1, 1)
        return self.match_scores(self.fuse_pairs(text_embeds, attention_mask, images))

    def rerank_text(
        self, text_embeds: Tensor, attention_mask: Tensor, image_embeds: Tensor
    ) -> Tensor:
        """Score P candidate images `[P, M, vision_width]` for one text `[L, text_width]` → `[P]`."""
        candidates = image_embeds.shape[0]
        texts, masks = text_embeds.repeat(candidates, 1, 1), attention_mask.repeat(candidates, 1)
        return self.match_scores(self.fuse_pairs(texts, masks, image_embeds))

    def retrieve(
        self, image_embeds: Tensor, text_embeds: Tensor, attention_mask: Tensor, k: int
    ) -> tuple[Tensor, Tensor]:
        """Evaluate retrieval officially: each of I images and T texts against its k best candidates.

        Returns scores `[I, T]` and `[T, I]`, -100 for pairs that were not scored.
        """
        similarity = self.project_image(image_embeds) @ self.project_text(text_embeds).t()
        of_images = torch.full_like(similarity, _NOT_SCORED)
        of_texts = torch.full_like(similarity.t(), _NOT_SCORED)
        for image, row in enumerate(similarity):
            best = row.topk(k).indices
            scores = self.rerank_image(image_embeds[image], text_embeds[best], attention_mask[best])
            of_images[image, best] = scores
        for text, row in enumerate(similarity.t()):
            best = row.topk(k).indices
            scores = self.rerank_text(text_embeds[text], attention_mask[text], image_embeds[best])
            of_texts[text, best] = scores
        return of_images, of_texts

    def _embed_patches(self, pixels: Tensor, patch_mask: Tensor | None) -> Tensor:
        encoder = self.model.vision_encoder
        projection = encoder.patch_embed.proj
        x = F.conv2d(pixels, projection.weight, projection.bias, stride=projection.stride)
        x = x.flatten(2).transpose(1, 2)
        if patch_mask is not None:
            hidden = patch_mask.unsqueeze(-1).type_as(encoder.mask_token)
            x = x * (1 - hidden) + encoder.mask_token.expand(*x.shape[:2], -1) * hidden
        return torch.cat((encoder.cls_token.expand(x.shape[0], -1, -1), x), dim=1)

    def _finish_image(self, x: Tensor) -> Tensor:
        norm = self.model.vision_encoder.fc_norm
        if self.config.local_attn_depth > 0:
            return layer_norm(norm, x)
        x = layer_norm(norm, x[:, 1:])
        pooled = F.adaptive_avg_pool1d(x.transpose(1, 2), 1)
        return torch.cat((pooled.transpose(1, 2), x), dim=1)

    def _vision_block(self, block: Block, x: Tensor, mask: Tensor | None = None) -> Tensor:
        attended = self._window_attention(block.attn, layer_norm(block.norm1, x), mask)
        x = x + _drop_path(block, block.gamma_1 * attended)
        hidden = F.gelu(linear(block.mlp.fc1, layer_norm(block.norm2, x)))
        hidden = linear(block.mlp.fc2, hidden)
        return x + _drop_path(block, block.gamma_2 * hidden)

    def _window_attention(
        self, attention: RelPosAttention, x: Tensor, mask: Tensor | None
    ) -> Tensor:
        batch, tokens, _ = x.shape
        bias = torch.cat((attention.q_bias, torch.zeros_like(attention.v_bias), attention.v_bias))
        qkv = F.linear(x, attention.qkv.weight, bias)
        heads = qkv.reshape(batch, tokens, 3, attention.heads, -1)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        q = q * q.shape[-1] ** -0.5
        scores = q @ k.transpose(-2, -1)
        position = attention.relative_position_bias_table[self._index].view(tokens, tokens, -1)
        scores = scores + position.permute(2, 0, 1).contiguous().unsqueeze(0)
        if mask is not None:
            scores = scores + mask
        context = scores.softmax(dim=-1) @ v
        return linear(attention.proj, context.transpose(1, 2).reshape(batch, tokens, -1))

    def _self_attention(self, layer: TransformerLayer, x: Tensor, mask: Tensor) -> Tensor:
        return _attend(layer.attention, x, x, mask)

    def _feed_forward(self, layer: TransformerLayer, x: Tensor) -> Tensor:
        hidden = F.gelu(linear(layer.intermediate.dense, x))
        return _residual_norm(layer.output, hidden, x)


class OfficialTrainingTwin(OfficialTwin):
    """The losses of a batch as the official training loop computes them, in one process.

    In addition to `OfficialTwin`: negatives are drawn row by row, each row waiting for the host; positive pairs,
    negative pairs and masked captions are three passes of the fusion encoder, padded, with keys and values of the
    image for every pair; masked captions pass through the text encoder with a graph, which is then discarded; the
    language-modelling heads compute logits over the vocabulary for every slot of `masked_positions`, also for empty
    ones; masked patches are selected by boolean indexing.
    """

    def losses(
        self,
        batch: Batch,
        *,
        hard_negatives: tuple[Tensor, Tensor] | None = None,
        patch_mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the losses of a batch, by the names of `pretraining_losses`.

        `hard_negatives` are the image for each text and the text for each image, both `[B]`, by default drawn;
        `patch_mask` `[B, N]` replaces that of the batch. Raises `InputError` if an image has no patch mask.
        """
        if isinstance(batch, ImageBatch):
            return {"mim": self._masked_image(batch, self.encode_image(batch.image), patch_mask)}
        if isinstance(batch, PairBatch):
            image = self.encode_image(batch.image)
            text = self.encode_text(batch.input_ids, batch.attention_mask)
            losses = self._text_losses(batch, image, text, None, batch.image_ids, hard_negatives)
            return losses | {"mim": self._masked_image(batch, image, patch_mask)}
        if isinstance(batch, RegionBatch):
            regions, images = self.encode_regions(batch.image, batch.image_index, batch.region_mask)
            text = self.encode_text(batch.input_ids, batch.attention_mask)
            losses = self._text_losses(
                batch, regions, text, batch.region_mask, None, hard_negatives
            )
            fused = self.fuse_pairs(text.detach(), batch.attention_mask, images)
            boxes = mlp_head(self.model.bbox_head, fused[:, 0, :]).sigmoid()
            target, counted = batch.boxes.to(boxes.dtype), 1 - batch.is_image.to(boxes.dtype)
            return losses | box_losses(boxes, target, counted)
        encoder = self.model.text_encoder
        embeds = self.encode_text(batch.masked_input_ids, batch.attention_mask)
        return {"mlm": _lm_loss(encoder.lm_head, encoder.word_embeddings, embeds, batch)}

    def _text_losses(
        self,
        batch: PairBatch | RegionBatch,
        image: Tensor,
        text: Tensor,
        token_mask: Tensor | None,
        image_ids: Tensor | None,
        hard_negatives: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Compute ITC, ITM and IMLM of texts `[B, L, text_width]` with an image each `[B, 1 + N, vision_width]`."""
        losses = self.contrast_and_match(
            batch.attention_mask, image, text, text.detach(), token_mask, image_ids, hard_negatives
        )
        masked = self.encode_text(batch.masked_input_ids, batch.attention_mask)
        if self.config.detach_text_for_mlm:
            masked = masked.detach()
        fused = self.fuse_pairs(masked, batch.attention_mask, image, token_mask)
        encoder = self.model.fusion_encoder
        return losses | {"imlm": _lm_loss(encoder.lm_head, encoder.word_embeddings, fused, batch)}

    def contrast_and_match(
        self,
        attention_mask: Tensor,
        image: Tensor,
        text: Tensor,
        matched: Tensor,
        token_mask: Tensor | None = None,
        image_ids: Tensor | None = None,
        hard_negatives: tuple[Tensor, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Compute ITC and ITM of texts `[B, L, text_width]` with an image each; ITM sees the texts `matched`."""
        with torch.no_grad():
            self.model.temp.clamp_(self.config.min_temperature, self.config.max_temperature)
        features = self.project_image(image), self.project_text(text)
        logits = features[0] @ features[1].t() / self.model.temp
        if image_ids is None:
            labels = torch.arange(logits.shape[0], device=logits.device)
            itc = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
        else:
            same = (image_ids.view(-1, 1) == image_ids.view(1, -1)).to(logits.dtype)
            targets = same / same.sum(1, keepdim=True)
            rows = -(F.log_softmax(logits, dim=1) * targets).sum(1).mean()
            columns = -(F.log_softmax(logits.t(), dim=1) * targets).sum(1).mean()
            itc = (rows + columns) / 2
        if hard_negatives is None:
            negatives = self.draw_negatives(*features, image_ids)
        else:
            negatives = hard_negatives[0].tolist(), hard_negatives[1].tolist()
        itm = self._matching(matched, attention_mask, image, token_mask, negatives)
        return {"itc": itc, "itm": itm}

    @torch.no_grad()
    def draw_negatives(
        self, image: Tensor, text: Tensor, image_ids: Tensor | None
    ) -> tuple[list[int], list[int]]:
        """Draw the image for each text and the text for each image, from features `[B, embed_dim]`."""
        similarity = image @ text.t() / self.model.temp
        of_images = F.softmax(similarity, dim=1) + 1e-5
        of_texts = F.softmax(similarity.t(), dim=1) + 1e-5
        if image_ids is None:
            of_images.fill_diagonal_(0)
            of_texts.fill_diagonal_(0)
        else:
            same = image_ids.view(-1, 1) == image_ids.view(1, -1)
            of_images.masked_fill_(same, 0)
            of_texts.masked_fill_(same, 0)
        images = [int(torch.multinomial(row, 1).item()) for row in of_texts]
        texts = [int(torch.multinomial(row, 1).item()) for row in of_images]
        return images, texts

    def _matching(
        self,
        text: Tensor,
        attention_mask: Tensor,
        image: Tensor,
        token_mask: Tensor | None,
        negatives: tuple[list[int], list[int]],
    ) -> Tensor:
        other_images, other_texts = negatives
        positive = self.fuse_pairs(text, attention_mask, image, token_mask)[:, 0, :]
        texts = torch.cat((text, torch.stack([text[i] for i in other_texts])))
        masks = torch.cat((attention_mask, torch.stack([attention_mask[i] for i in other_texts])))
        images = torch.cat((torch.stack([image[i] for i in other_images]), image))
        if token_mask is not None:
            token_mask = torch.cat((torch.stack([token_mask[i] for i in other_images]), token_mask))
        negative = self.fuse_pairs(texts, masks, images, token_mask)[:, 0, :]
        logits = mlp_head(self.model.itm_head, torch.cat((positive, negative)))
        labels = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        labels[: len(positive)] = 1
        return F.cross_entropy(logits, labels)

    def _masked_image(
        self, batch: PairBatch | ImageBatch, image: Tensor, patch_mask: Tensor | None
    ) -> Tensor:
        patch_mask = batch.patch_mask if patch_mask is None else patch_mask
        if patch_mask is None:
            raise InputError(
                "neither the batch nor the call has a patch_mask; masked image modelling needs one"
            )
        hidden, target = patch_mask.bool(), image.detach()
        masked = self.encode_image(batch.image, patch_mask)
        loss = F.mse_loss(masked[:, 1:][hidden], target[:, 1:][hidden])
        if self.config.mim_patches_only:
            return loss
        return loss + F.mse_loss(masked[:, 0, :], target[:, 0, :])


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """Multiply `[..., width]` by the parameters of a module."""
    return F.linear(x, layer.weight, layer.bias)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """Normalise `[..., width]` with the parameters of a module."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def mlp_head(head: MLPHead | DeepMLPHead, x: Tensor) -> Tensor:
    """Map `[P, width]` → `[P, outputs]`, layer by layer."""
    for layer in head:
        if isinstance(layer, nn.Linear):
            x = linear(layer, x)
        elif isinstance(layer, nn.LayerNorm):
            x = layer_norm(layer, x)
        else:
            x = F.gelu(x)
    return x


def box_losses(boxes: Tensor, target: Tensor, counted: Tensor) -> dict[str, Tensor]:
    """Compute L1 and GIoU of boxes `[P, 4]` (cx, cy, w, h); `counted` `[P]` is one where there is a box to predict."""
    # The operators of torchvision import PyTorch's compiler, which takes seconds.
    from torchvision.ops import box_convert, generalized_box_iou

    distance = F.l1_loss(boxes, target, reduction="none") * counted.view(-1, 1)
    corners = [box_convert(box, "cxcywh", "xyxy") for box in (boxes, target)]
    if any(bool((box[:, 2:] < box[:, :2]).any()) for box in corners):
        # For one box with a negative side, the official code drops the loss of all.
        overlap = torch.zeros_like(counted)
    else:
        overlap = (1 - torch.diag(generalized_box_iou(*corners))) * counted
    boxes_counted = counted.sum()
    return {"bbox_l1": distance.sum() / boxes_counted, "bbox_giou": overlap.sum() / boxes_counted}


def _drop_path(block: Block, branch: Tensor) -> Tensor:
    """Apply stochastic depth: drop the branch of an image at random."""
    if not block.training or not block.drop_path:
        return branch
    keep_share = 1 - block.drop_path
    survives = branch.new_empty(branch.shape[0], *[1] * (branch.ndim - 1)).bernoulli_(keep_share)
    return branch * survives.div_(keep_share)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Turn ones and zeros `[P, L]` into a mask `[P, 1, 1, L]` to be added to attention scores."""
    return (1.0 - mask[:, None, None, :].to(dtype)) * _MASKED


def _heads(projection: nn.Linear, heads: int, source: Tensor) -> Tensor:
    return linear(projection, source).unflatten(-1, (heads, -1)).permute(0, 2, 1, 3)


def _memory_heads(attention: Attention, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Project a memory `[P, M, ...]` to keys and values `[P, H, M, D]`."""
    projections = attention.self
    key = _heads(projections.key, projections.heads, memory)
    return key, _heads(projections.value, projections.heads, memory)


def _attend(attention: Attention, x: Tensor, memory: Tensor, mask: Tensor) -> Tensor:
    """Attend from x `[P, L, width]` to a memory `[P, M, ...]`, with output projection and norm."""
    return _attend_to(attention, x, *_memory_heads(attention, memory), mask)


def _attend_to(attention: Attention, x: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    projections = attention.self
    query = _heads(projections.query, projections.heads, x)
    query = query / math.sqrt(query.shape[-1])
    scores = torch.matmul(query, key.transpose(-1, -2))
    scores = scores + mask
    weights = F.dropout(scores.softmax(dim=-1), projections.dropout, projections.training)
    context = torch.matmul(weights, value)
    context = context.permute(0, 2, 1, 3).contiguous()
    return _residual_norm(attention.output, context.view(*context.shape[:2], -1), x)


def _residual_norm(module: ResidualNorm, x: Tensor, residual: Tensor) -> Tensor:
    branch = F.dropout(linear(module.dense, x), module.dropout, module.training)
    return layer_norm(module.LayerNorm, branch + residual)


def _lm_loss(head: LMHead, word_embeddings: Tensor, embeds: Tensor, batch: TextBatch) -> Tensor:
    index = batch.masked_positions.unsqueeze(2).expand(-1, -1, embeds.shape[-1])
    logits = _lm_logits(head, word_embeddings, torch.gather(embeds, 1, index))
    return F.cross_entropy(logits.flatten(0, 1), batch.masked_labels.flatten(), ignore_index=-100)


def _lm_logits(head: LMHead, word_embeddings: Tensor, embeds: Tensor) -> Tensor:
    x = F.gelu(linear(head.dense, embeds))
    return F.linear(layer_norm(head.layer_norm, x), word_embeddings, head.bias)
