"""Faster and Mask R-CNN of torchvision on a backbone of timm's whose BatchNorm and NBN are frozen."""
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import equalization_loss  # noqa: F401  registers itself
import federated_loss  # noqa: F401
import timm
import torch
from class_loss import CLASS_LOSSES, ClassLoss
from roi_heads import LongTailRoIHeads
from timm.models import PretrainedCfg
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

import nbn_timm
from nbn_timm.errors import InputError, nearest
from nbn_timm.key_values import reason_of, refuse_unknown
from nbn_timm.settings import AT_LEAST_1, POSITIVE, PROBABILITY, Settings, only_with, setting

RATIOS = (0.5, 1.0, 2.0)  # heights of anchors over their widths


@dataclass(frozen=True)
class BackboneSettings(Settings):
    """The network that gives the maps."""

    title = 'backbone'

    model: str = setting('resnet50_nbn', "a convolutional model of timm or of this package, by name", metavar='NAME')
    pretrained: bool = setting(True, 'start from the weights of its name')
    initial_checkpoint: str | None = setting(None, 'start from the weights of this file, such as the checkpoint of a '
                                             'training with nbn-train', metavar='FILE', is_file=True)
    freeze: str | None = setting('layer1', 'the last stage that does not learn, by its module name; the norms of all '
                                 'stages are frozen in any case', metavar='STAGE')
    levels: int = setting(4, 'how many of the last stages give maps', limits=AT_LEAST_1)
    fpn_channels: int = setting(256, 'channels of the feature pyramid', limits=AT_LEAST_1)


@dataclass(frozen=True)
class DetectorSettings(Settings):
    """The heads, and the size of the images."""

    title = 'detector'

    masks: bool = setting(True, 'learn and find masks too: Mask R-CNN instead of Faster R-CNN')
    class_loss: str = setting('softmax', "loss of the box head's classifier", choices=lambda: CLASS_LOSSES)
    class_loss_kwargs: dict[str, float] = setting({}, 'settings of that loss')
    min_size: tuple[int, ...] = setting((640, 672, 704, 736, 768, 800), 'shorter side of an image; one of them at '
                                        'random in training, the last in evaluation', limits=AT_LEAST_1, nargs=0)
    max_size: int = setting(1333, 'what the longer side may be at most', limits=AT_LEAST_1)
    anchors: tuple[int, ...] = setting((32, 64, 128, 256, 512), 'sides of the anchors in pixels, one for each level of '
                                       'the pyramid, which has one more than --levels', limits=AT_LEAST_1, nargs=0)
    proposals: int = setting(1000, 'of an image, that the box head sees; twice as many of each level go into '
                             'non-maximum suppression in training, as many in evaluation', limits=AT_LEAST_1)
    box_batch: int = setting(512, 'of these, how many of an image it learns from', limits=AT_LEAST_1)
    head_channels: int = setting(1024, 'width of the box head', limits=AT_LEAST_1)
    mask_channels: int = setting(256, 'width of the mask head', limits=AT_LEAST_1, effect=only_with('masks'))
    score_threshold: float = setting(1e-4, 'detections with a lower score are left out', limits=PROBABILITY)
    detections: int = setting(300, 'of an image, at most; 300 is what LVIS allows', limits=AT_LEAST_1)
    nms_threshold: float = setting(0.5, 'overlap from which the less sure of two detections is left out',
                                   limits=POSITIVE)


class PyramidBackbone(nn.Module):
    """The maps of a timm network, and a feature pyramid over them with one more level.

    Args:
        body: Of `features_only`.
        channels: Of the pyramid.
    """

    def __init__(self, body: nn.Module, channels: int) -> None:
        super().__init__()
        self.body = body
        self.fpn = FeaturePyramidNetwork(
            body.feature_info.channels(), channels, LastLevelMaxPool())  # type: ignore[union-attr, operator]
        self.out_channels = channels

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Maps [B, channels, h, w] by name, '0' the largest and 'pool' the smallest."""
        return self.fpn(OrderedDict((str(level), one) for level, one in enumerate(self.body(images))))


def create_body(settings: BackboneSettings) -> nn.Module:
    """The backbone without a pyramid: norms and first stages frozen, see `freeze_stages`.

    Raises:
        InputError: There is no such model, stage or file, or the model has no maps or not as many.
    """
    if not timm.is_model(settings.model):
        raise InputError(f"there is no model '{settings.model}'{nearest(settings.model, timm.list_models())}")
    overlay = {'file': settings.initial_checkpoint} if settings.initial_checkpoint else None
    try:
        body = timm.create_model(
            settings.model, pretrained=settings.pretrained or overlay is not None, pretrained_cfg_overlay=overlay,
            features_only=True, out_indices=tuple(range(-settings.levels, 0)))
    except (AssertionError, AttributeError, IndexError, OSError, RuntimeError) as error:  # what timm raises
        raise InputError(f"'{settings.model}' cannot be a backbone with --levels {settings.levels} "
                         f'({reason_of(error)}): give another network, fewer levels or other weights') from error
    freeze_stages(body, settings.freeze)
    return body


def freeze_stages(body: nn.Module, last: str | None) -> None:
    """Freeze all norms of a `features_only` network, and all else up to the end of a stage, in place.

    Raises:
        InputError: There is no such stage.
    """
    nbn_timm.freeze_nbn(body)
    stages = [name for name, _ in body.named_children()]
    if last is not None and last not in stages:
        raise InputError(f"--freeze '{last}' is no stage of the backbone (there are {', '.join(stages)})"
                         f'{nearest(last, stages)}')
    for name in stages[:stages.index(last) + 1] if last else ():
        body.get_submodule(name).requires_grad_(False)


def create_class_loss(settings: DetectorSettings, image_counts: torch.Tensor, num_images: int) -> ClassLoss:
    """The loss of the box head's classifier.

    Raises:
        InputError: There is no such loss, or it has no such setting.
    """
    loss = CLASS_LOSSES.find(settings.class_loss)
    known = [name for name in loss.__init__.__annotations__ if name not in ('image_counts', 'num_images', 'return')]
    refuse_unknown(f"class loss '{settings.class_loss}'", settings.class_loss_kwargs, known)
    return loss(image_counts, num_images, **settings.class_loss_kwargs)


def create_detector(backbone: BackboneSettings, settings: DetectorSettings, image_counts: torch.Tensor,
                    num_images: int) -> FasterRCNN:
    """Faster or Mask R-CNN; called with images and targets in training, with images in evaluation, as torchvision's.

    Args:
        backbone, settings: What it is made of.
        image_counts: Training images that each of the C classes is in, [C].
        num_images: Training images.

    Raises:
        InputError: The settings do not fit each other, or see `create_body` and `create_class_loss`.
    """
    if len(settings.anchors) != backbone.levels + 1:
        raise InputError(f'--anchors has {len(settings.anchors)} sides and --levels {backbone.levels} needs '
                         f'{backbone.levels + 1}: give one for each level and one more')
    class_loss = create_class_loss(settings, image_counts, num_images)
    body = PyramidBackbone(create_body(backbone), backbone.fpn_channels)
    cfg = timm.get_pretrained_cfg(backbone.model) or PretrainedCfg()
    names = [str(level) for level in range(backbone.levels)]
    channels, columns = backbone.fpn_channels, len(image_counts) + 1
    options: dict[str, Any] = dict(
        min_size=settings.min_size, max_size=settings.max_size, image_mean=cfg.mean, image_std=cfg.std,
        rpn_anchor_generator=AnchorGenerator(tuple((side,) for side in settings.anchors),
                                             (RATIOS,) * len(settings.anchors)),
        rpn_head=RPNHead(channels, len(RATIOS)),
        rpn_pre_nms_top_n_train=2 * settings.proposals, rpn_pre_nms_top_n_test=settings.proposals,
        rpn_post_nms_top_n_train=settings.proposals, rpn_post_nms_top_n_test=settings.proposals,
        box_roi_pool=MultiScaleRoIAlign(names, output_size=7, sampling_ratio=2),
        box_head=TwoMLPHead(channels * 7 ** 2, settings.head_channels),
        box_predictor=FastRCNNPredictor(settings.head_channels, columns),
        box_batch_size_per_image=settings.box_batch, box_score_thresh=settings.score_threshold,
        box_nms_thresh=settings.nms_threshold, box_detections_per_img=settings.detections)
    if settings.masks:
        width = settings.mask_channels
        detector: FasterRCNN = MaskRCNN(
            body, mask_roi_pool=MultiScaleRoIAlign(names, output_size=14, sampling_ratio=2),
            mask_head=MaskRCNNHeads(channels, (width,) * 4, dilation=1),
            mask_predictor=MaskRCNNPredictor(width, width, columns), **options)
    else:
        detector = FasterRCNN(body, **options)
    LongTailRoIHeads.take_over(detector.roi_heads, class_loss)
    return detector
