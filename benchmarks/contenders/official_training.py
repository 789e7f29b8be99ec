"""The official pretraining step in plain eager PyTorch with autograd: the yardstick of training speed and gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import box_convert, generalized_box_iou

from xfm_fast.batches import Batch, ImageBatch, PairBatch, RegionBatch, TextBatch
from xfm_fast.errors import InputError
from xfm_fast.models.heads import LMHead

from .official_algorithm import OfficialTwin, layer_norm, mlp_head

_IGNORED = -100

Negatives = tuple[list[int], list[int]]


class OfficialTrainingTwin(OfficialTwin):
    """The losses of a batch as the official training loop computes them, in one process.

    Beside what `OfficialTwin` does: negatives are drawn row by row, each row waiting for the host; positive pairs,
    negative pairs and masked captions are three passes of the fusion encoder, padded, with keys and values of the
    image for every pair; masked captions pass through the text encoder with a graph, which is then thrown away; the
    language-modelling heads compute logits over the whole vocabulary for every slot of `masked_positions`, the empty
    ones included; hidden patches are picked by boolean indexing.
    """

    def losses(
        self, batch: Batch, *, hard_negatives: tuple[Tensor, Tensor] | None = None, patch_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The scalar losses of a batch, under the names that `pretraining_losses` gives them.

        Args:
            batch: any of the four kinds.
            hard_negatives: `[B]` image for each text and `[B]` text for each image; drawn when absent.
            patch_mask: `[B, N]`, takes the place of the batch's own.

        Raises:
            InputError: masked image modelling without a patch mask.
        """
        if isinstance(batch, ImageBatch):
            return {"mim": self._masked_image(batch, self.encode_image(batch.image), patch_mask)}
        if isinstance(batch, PairBatch):
            image = self.encode_image(batch.image)
            text = self.encode_text(batch.input_ids, batch.attention_mask)
            losses = self._with_text(batch, image, text, None, batch.image_ids, hard_negatives)
            return losses | {"mim": self._masked_image(batch, image, patch_mask)}
        if isinstance(batch, RegionBatch):
            regions, whole = self.encode_regions(batch.image, batch.image_index, batch.region_mask)
            text = self.encode_text(batch.input_ids, batch.attention_mask)
            losses = self._with_text(batch, regions, text, batch.region_mask, None, hard_negatives)
            fused = self.fuse_pairs(text.detach(), batch.attention_mask, whole)
            boxes = mlp_head(self.model.bbox_head, fused[:, 0, :]).sigmoid()
            return losses | _box_losses(boxes, batch.boxes, batch.is_image)
        encoder = self.model.text_encoder
        embeds = self.encode_text(batch.masked_input_ids, batch.attention_mask)
        return {"mlm": _lm_loss(encoder.lm_head, encoder.word_embeddings, embeds, batch)}

    def _with_text(
        self,
        batch: PairBatch | RegionBatch,
        image: Tensor,
        text: Tensor,
        token_mask: Tensor | None,
        image_ids: Tensor | None,
        hard_negatives: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        """ITC, ITM and IMLM of texts `[B, L, text_width]` with an image each `[B, 1 + N, vision_width]`."""
        with torch.no_grad():
            self.model.temp.clamp_(self.config.min_temperature, self.config.max_temperature)
        features = self.project_image(image), self.project_text(text)
        itc = self._contrastive(*features, image_ids)
        if hard_negatives is None:
            negatives = self._draw_negatives(*features, image_ids)
        else:
            negatives = hard_negatives[0].tolist(), hard_negatives[1].tolist()
        itm = self._matching(text.detach(), batch.attention_mask, image, token_mask, negatives)
        masked = self.encode_text(batch.masked_input_ids, batch.attention_mask)
        if self.config.detach_text_for_mlm:
            masked = masked.detach()
        fused = self.fuse_pairs(masked, batch.attention_mask, image, token_mask)
        encoder = self.model.fusion_encoder
        return {"itc": itc, "itm": itm, "imlm": _lm_loss(encoder.lm_head, encoder.word_embeddings, fused, batch)}

    def _contrastive(self, image: Tensor, text: Tensor, image_ids: Tensor | None) -> Tensor:
        logits = image @ text.t() / self.model.temp
        if image_ids is None:
            labels = torch.arange(logits.shape[0], device=logits.device)
            return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.t(), labels)) / 2
        same = (image_ids.view(-1, 1) == image_ids.view(1, -1)).to(logits.dtype)
        targets = same / same.sum(1, keepdim=True)
        rows = -(F.log_softmax(logits, dim=1) * targets).sum(1).mean()
        columns = -(F.log_softmax(logits.t(), dim=1) * targets).sum(1).mean()
        return (rows + columns) / 2

    @torch.no_grad()
    def _draw_negatives(self, image: Tensor, text: Tensor, image_ids: Tensor | None) -> Negatives:
        similarity = image @ text.t() / self.model.temp
        of_images, of_texts = F.softmax(similarity, dim=1) + 1e-5, F.softmax(similarity.t(), dim=1) + 1e-5
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
        self, text: Tensor, attention_mask: Tensor, image: Tensor, token_mask: Tensor | None, negatives: Negatives
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
        pairs = text.shape[0]
        labels = torch.cat((torch.ones(pairs, dtype=torch.long), torch.zeros(2 * pairs, dtype=torch.long)))
        return F.cross_entropy(logits, labels.to(logits.device))

    def _masked_image(self, batch: PairBatch | ImageBatch, image: Tensor, patch_mask: Tensor | None) -> Tensor:
        patch_mask = batch.patch_mask if patch_mask is None else patch_mask
        if patch_mask is None:
            raise InputError("neither the batch nor the call has a patch_mask; masked image modelling needs one")
        hidden, target = patch_mask.bool(), image.detach()
        masked = self.encode_image(batch.image, patch_mask)
        loss = F.mse_loss(masked[:, 1:][hidden], target[:, 1:][hidden])
        if self.config.mim_patches_only:
            return loss
        return loss + F.mse_loss(masked[:, 0, :], target[:, 0, :])


def _lm_loss(head: LMHead, word_embeddings: Tensor, embeds: Tensor, batch: TextBatch) -> Tensor:
    where = batch.masked_positions.unsqueeze(2).expand(-1, -1, embeds.shape[-1])
    x = F.gelu(F.linear(torch.gather(embeds, 1, where), head.dense.weight, head.dense.bias))
    logits = F.linear(layer_norm(head.layer_norm, x), word_embeddings, head.bias)
    return F.cross_entropy(logits.flatten(0, 1), batch.masked_labels.flatten(), ignore_index=_IGNORED)


def _box_losses(predicted: Tensor, target: Tensor, is_image: Tensor) -> dict[str, Tensor]:
    target = target.to(predicted.dtype)
    counted = 1 - is_image.to(predicted.dtype)
    distance = F.l1_loss(predicted, target, reduction="none") * counted.view(-1, 1)
    corners = [box_convert(boxes, "cxcywh", "xyxy") for boxes in (predicted, target)]
    if any(bool((boxes[:, 2:] < boxes[:, :2]).any()) for boxes in corners):
        # One box with a negative side, and the official code drops the loss of all.
        overlap = torch.zeros_like(counted)
    else:
        overlap = (1 - torch.diag(generalized_box_iou(*corners))) * counted
    return {"bbox_l1": distance.sum() / counted.sum(), "bbox_giou": overlap.sum() / counted.sum()}
