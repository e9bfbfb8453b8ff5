"""torchvision's heads over region proposals, with any loss of `class_loss.py` in the place of the softmax."""
import torch
import torch.nn.functional as F
from class_loss import ClassLoss
from torchvision.models.detection.roi_heads import RoIHeads, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import batched_nms, clip_boxes_to_image, remove_small_boxes

Boxes = list[torch.Tensor]
Maps = dict[str, torch.Tensor]


class LongTailRoIHeads(RoIHeads):
    """`RoIHeads` of torchvision whose classifier has a loss, and scores, of its own.

    Boxes are learned as there: for the class of each proposal, by smooth L1 with the bend at 1/9.
    """

    class_loss: ClassLoss

    @classmethod
    def take_over(cls, heads: RoIHeads, class_loss: ClassLoss) -> None:
        """Turn heads that torchvision has built into these, in place."""
        heads.__class__ = cls
        heads.class_loss = class_loss
        class_loss.initialise(heads.box_predictor.cls_score)

    def forward(self, features: Maps, proposals: Boxes, image_shapes: list[tuple[int, int]],
                targets: list[Maps] | None = None) -> tuple[list[Maps], Maps]:
        """Detections of each image and no loss, or in training the other way round."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detections(features, proposals, image_shapes), {}

    def _losses(self, features: Maps, proposals: Boxes, image_shapes: list[tuple[int, int]],
                targets: list[Maps] | None) -> Maps:
        assert targets is not None
        proposals, matched, labels, offsets = self.select_training_samples(proposals, targets)
        logits, deltas = self._predict(features, proposals, image_shapes)
        every = torch.cat(labels)
        losses = {'loss_classifier': self.class_loss(logits, every),
                  'loss_box_reg': _box_loss(deltas, every, torch.cat(offsets))}
        if self.has_mask():
            found = [one > 0 for one in labels]
            boxes = [one[there] for one, there in zip(proposals, found, strict=True)]
            losses['loss_mask'] = maskrcnn_loss(
                self._masks(features, boxes, image_shapes), boxes, [one['masks'] for one in targets],
                [one['labels'] for one in targets], [one[there] for one, there in zip(matched, found, strict=True)])
        return losses

    def _detections(self, features: Maps, proposals: Boxes, image_shapes: list[tuple[int, int]]) -> list[Maps]:
        logits, deltas = self._predict(features, proposals, image_shapes)
        sizes = [len(boxes) for boxes in proposals]
        decoded = self.box_coder.decode(deltas, proposals)[:, 1:]  # column 0 is the background's
        found = [self._best(boxes, scores, shape) for boxes, scores, shape in zip(
            decoded.split(sizes), self.class_loss.scores(logits).split(sizes), image_shapes, strict=True)]
        if self.has_mask():
            masks = self._masks(features, [one['boxes'] for one in found], image_shapes)
            for one, mask in zip(found, maskrcnn_inference(masks, [one['labels'] for one in found]), strict=True):
                one['masks'] = mask
        return found

    def _best(self, boxes: torch.Tensor, scores: torch.Tensor, shape: tuple[int, int]) -> Maps:
        """The detections of one image from boxes [N, C, 4] and scores [N, C], the surest first."""
        rows, columns = torch.where(scores > self.score_thresh)
        chosen, scores = clip_boxes_to_image(boxes[rows, columns], shape), scores[rows, columns]
        large = remove_small_boxes(chosen, min_size=1e-2)
        chosen, scores, labels = chosen[large], scores[large], columns[large] + 1
        kept = batched_nms(chosen, scores, labels, self.nms_thresh)[:self.detections_per_img]
        return {'boxes': chosen[kept], 'labels': labels[kept], 'scores': scores[kept]}

    def _predict(self, features: Maps, boxes: Boxes, image_shapes: list[tuple[int, int]]
                 ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.box_predictor(self.box_head(self.box_roi_pool(features, boxes, image_shapes)))

    def _masks(self, features: Maps, boxes: Boxes, image_shapes: list[tuple[int, int]]) -> torch.Tensor:
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes)))


def _box_loss(deltas: torch.Tensor, labels: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    objects = torch.where(labels > 0)[0]
    of_class = deltas.unflatten(1, (-1, 4))[objects, labels[objects]]
    return F.smooth_l1_loss(of_class, offsets[objects], beta=1 / 9, reduction='sum') / max(len(labels), 1)
