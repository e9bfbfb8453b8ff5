"""ResNet and ResNeXt with NBN in the last stage.

Source: Bao et al., "Normalizing Batch Normalization for Long-Tailed Recognition", IEEE TIP 2024 (arXiv 2501.03122) and
the authors' code (yuxiangbao/NBN, commit 7365e21). NBN replaces the last BatchNorm of each block of `layer4` and that
of its downsample path; they share one alpha. All else is timm's `ResNet`.
"""
import torch
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from nbn_timm.layers import NormalizedBatchNorm2d, add_nbn, convert_head
from nbn_timm.layers.head import LINEAR
from nbn_timm.layers.norm import CAPPED

from ._cfgs import imagenet_cfgs
from ._pretrained import AUTHORS_ARCHIVE, build_zoo_model, register_aliases

__all__ = ['ResNetNbn', 'ResNetWithHead']

default_cfgs = generate_default_cfgs({
    **imagenet_cfgs('resnet10_nbn'),
    **imagenet_cfgs('resnet10_nbn_lr'),
    **imagenet_cfgs('resnet50_nbn', url=AUTHORS_ARCHIVE),
    **imagenet_cfgs('resnet50_nbn_lr', url=AUTHORS_ARCHIVE),
    **imagenet_cfgs('resnet101_nbn'),
    **imagenet_cfgs('resnet101_nbn_lr'),
    **imagenet_cfgs('resnet152_nbn'),
    **imagenet_cfgs('resnet152_nbn_lr'),
    **imagenet_cfgs('resnext50_nbn', url=AUTHORS_ARCHIVE),
    **imagenet_cfgs('resnext50_nbn_lr', url=AUTHORS_ARCHIVE),
    **imagenet_cfgs('resnext101_nbn'),
    **imagenet_cfgs('resnext101_nbn_lr'),
})


class ResNetWithHead(ResNet):
    """timm's ResNet with a choice of heads, and with NBN layers that are never zero-initialised."""

    def _choose_head(self, head: str, head_kwargs: dict[str, float] | None) -> None:
        self.head_kind = head
        self.head_kwargs = dict(head_kwargs or {})
        self.fc = convert_head(self.fc, head, self.head_kwargs)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, NormalizedBatchNorm2d):
                nn.init.ones_(module.weight)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        super().reset_classifier(num_classes, global_pool)
        self.fc = convert_head(self.fc, self.head_kind, self.head_kwargs)


class ResNetNbn(ResNetWithHead):
    """timm's ResNet with NBN in `layer4` and a choice of heads.

    Args:
        block: Block class of all stages.
        layers: Number of blocks in each stage.
        head: Kind of the classifier: 'linear', 'rectified' (logit rectification), 'cosine' or 'cosplus'.
        head_kwargs: Settings of a cosine head, `scale`, and of a cosplus head, `gamma` too.
        gradient: Backward pass of NBN, 'capped' or 'released', see `NormalizedBatchNorm2d`.
        share_alpha: One alpha for the stage, as released, else one for each layer.
        zero_init_last: As in timm's `ResNet`, for the plain BatchNorm layers of the first three stages; False as in
            the released recipes. NBN layers are never zero-initialised.
        **kwargs: See timm's `ResNet`.
    """

    def __init__(
            self,
            block: type[BasicBlock] | type[Bottleneck],
            layers: tuple[int, ...],
            head: str = LINEAR,
            head_kwargs: dict[str, float] | None = None,
            gradient: str = CAPPED,
            share_alpha: bool = True,
            zero_init_last: bool = False,
            **kwargs,
    ) -> None:
        super().__init__(block, layers, zero_init_last=zero_init_last, **kwargs)  # type: ignore[arg-type]
        last = 'bn3' if block is Bottleneck else 'bn2'
        add_nbn(self, ('layer4',), rf'{last}$|downsample', share_alpha=share_alpha, gradient=gradient)
        self._choose_head(head, head_kwargs)


def _create(variant: str, pretrained: bool, **kwargs) -> ResNetNbn:
    return build_zoo_model(ResNetNbn, variant, pretrained, **kwargs)


@register_model
def resnet10_nbn(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNet-10 (one BasicBlock a stage) with NBN."""
    model_args = dict(block=BasicBlock, layers=(1, 1, 1, 1))
    return _create('resnet10_nbn', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet10_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNet-10 with NBN and logit rectification."""
    model_args = dict(block=BasicBlock, layers=(1, 1, 1, 1), head='rectified')
    return _create('resnet10_nbn_lr', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_nbn(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNet-50 with NBN."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return _create('resnet50_nbn', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNet-50 with NBN and logit rectification."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), head='rectified')
    return _create('resnet50_nbn_lr', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_nbn(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNet-101 with NBN."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3))
    return _create('resnet101_nbn', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet101_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNet-101 with NBN and logit rectification."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), head='rectified')
    return _create('resnet101_nbn_lr', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet152_nbn(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNet-152 with NBN."""
    model_args = dict(block=Bottleneck, layers=(3, 8, 36, 3))
    return _create('resnet152_nbn', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet152_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNet-152 with NBN and logit rectification."""
    model_args = dict(block=Bottleneck, layers=(3, 8, 36, 3), head='rectified')
    return _create('resnet152_nbn_lr', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext50_nbn(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNeXt-50 32x4d with NBN."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return _create('resnext50_nbn', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext50_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNeXt-50 32x4d with NBN and logit rectification."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4, head='rectified')
    return _create('resnext50_nbn_lr', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext101_nbn(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNeXt-101 32x4d with NBN."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=4)
    return _create('resnext101_nbn', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext101_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetNbn:
    """ResNeXt-101 32x4d with NBN and logit rectification."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), cardinality=32, base_width=4, head='rectified')
    return _create('resnext101_nbn_lr', pretrained, **dict(model_args, **kwargs))


register_aliases(__name__, default_cfgs)
