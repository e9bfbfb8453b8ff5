"""ResNet-18 for 32x32 images, plain and with NBN in the last stage.

It is timm's ResNet-18 with a stem of one 3x3 convolution without stride or pooling, the network that papers on
adversarial robustness call ResNet-18 on CIFAR (YisenWang/MART, wutong16/Adversarial_Long-Tail; kuangliu/pytorch-cifar).
For 10 classes it has 11,173,962 parameters.
"""
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock

from nbn_timm.layers import add_nbn
from nbn_timm.layers.head import LINEAR
from nbn_timm.layers.norm import CAPPED

from ._cfgs import cifar_cfgs
from ._pretrained import build_zoo_model, register_aliases
from .resnet_nbn import ResNetWithHead

__all__ = ['ResNet18Cifar']

default_cfgs = generate_default_cfgs({
    name: cfg for form in ('', '_nbn', '_nbn_lr') for name, cfg in cifar_cfgs(f'resnet18_cifar{form}', stride=8).items()
})


class ResNet18Cifar(ResNetWithHead):
    """timm's ResNet-18 for small images.

    Args:
        nbn: NBN in `layer4`, as in `ResNetNbn`.
        head, head_kwargs: Kind of the classifier and its settings, see `ResNetCifar`.
        gradient, share_alpha: Of NBN, see `ResNetNbn`.
        in_chans: Number of input channels.
        zero_init_last: As in timm's `ResNet`, for plain BatchNorm layers.
        **kwargs: See timm's `ResNet`.
    """

    def __init__(
            self,
            nbn: bool = False,
            head: str = LINEAR,
            head_kwargs: dict[str, float] | None = None,
            gradient: str = CAPPED,
            share_alpha: bool = True,
            in_chans: int = 3,
            zero_init_last: bool = False,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        super().__init__(BasicBlock, (2, 2, 2, 2), in_chans=in_chans,  # type: ignore[arg-type]
                         zero_init_last=zero_init_last, device=device, dtype=dtype, **kwargs)
        stem = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False, device=device, dtype=dtype)
        nn.init.kaiming_normal_(stem.weight, mode='fan_out', nonlinearity='relu')
        self.conv1 = stem  # type: ignore[assignment]
        self.maxpool = nn.Identity()  # type: ignore[assignment]
        for index, info in enumerate(self.feature_info):
            info['reduction'] = 2 ** max(index - 1, 0)
        if nbn:
            add_nbn(self, ('layer4',), r'bn2$|downsample', share_alpha=share_alpha, gradient=gradient)
        self._choose_head(head, head_kwargs)


def _create(variant: str, pretrained: bool, **kwargs) -> ResNet18Cifar:
    return build_zoo_model(ResNet18Cifar, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3, 4)), **kwargs)


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs) -> ResNet18Cifar:
    """ResNet-18 for CIFAR."""
    return _create('resnet18_cifar', pretrained, **kwargs)


@register_model
def resnet18_cifar_nbn(pretrained: bool = False, **kwargs) -> ResNet18Cifar:
    """ResNet-18 for CIFAR with NBN."""
    return _create('resnet18_cifar_nbn', pretrained, **dict(dict(nbn=True), **kwargs))


@register_model
def resnet18_cifar_nbn_lr(pretrained: bool = False, **kwargs) -> ResNet18Cifar:
    """ResNet-18 for CIFAR with NBN and logit rectification."""
    return _create('resnet18_cifar_nbn_lr', pretrained, **dict(dict(nbn=True, head='rectified'), **kwargs))


register_aliases(__name__, default_cfgs)
