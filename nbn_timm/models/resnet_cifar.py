"""ResNet for 32x32 images (CIFAR), plain and with NBN in the last stage.

Source: He et al., "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2: 3x3 stem, three
stages of n blocks with 16, 32 and 64 channels (depth 6n + 2), shortcuts of type A, without parameters. ResNet-32 for
100 classes has 470,004 parameters.

`resnet14_wide` is ours, for training at a small cost: depth 14, 16, 64 and 160 channels, and shortcuts of type B, so
that most operations are where images are small already.
"""
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import checkpoint_seq, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock

from nbn_timm.errors import InputError
from nbn_timm.layers import CosineLinear, NormalizedBatchNorm2d, RectifiedLinear, add_nbn
from nbn_timm.layers.head import LINEAR
from nbn_timm.layers.norm import CAPPED

from ._cfgs import cifar_cfgs
from ._pretrained import build_zoo_model, register_aliases
from .cifar_network import CifarNetwork

__all__ = ['ResNetCifar', 'take_indices']

default_cfgs = generate_default_cfgs({
    name: cfg
    for base in ('resnet14_wide', 'resnet20', 'resnet32', 'resnet44', 'resnet56')
    for form in ('', '_nbn', '_nbn_lr')
    for name, cfg in cifar_cfgs(f'{base}{form}').items()
})


class PadShortcut(nn.Module):
    """Shortcut of type A: every second pixel, and as many zero channels before as after, [B, C, H, W] to
    [B, out_channels, ceil(H/2), ceil(W/2)].
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.padding = (out_channels - in_channels) // 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class ResNetCifar(CifarNetwork):
    """ResNet of depth 6n + 2 for small images.

    Args:
        num_blocks: n, blocks in each of the three stages.
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Number of input channels.
        global_pool: Pooling before the classifier, see timm's `create_classifier`.
        channels: Channels of the three stages.
        nbn: NBN in the last stage: the last BatchNorm of each block, as in `ResNetNbn`.
        head: Kind of the classifier: 'linear', 'rectified' (logit rectification), 'cosine' or 'cosplus'.
        head_kwargs: Settings of a cosine head, `scale`, and of a cosplus head, `gamma` too.
        conv_shortcut: Shortcuts of type B, a 1x1 convolution and BatchNorm, where the shape changes; else of type A.
        gradient, share_alpha: Of NBN, see `ResNetNbn`.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
            self,
            num_blocks: int,
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            channels: tuple[int, int, int] = (16, 32, 64),
            nbn: bool = False,
            head: str = LINEAR,
            head_kwargs: dict[str, float] | None = None,
            conv_shortcut: bool = False,
            gradient: str = CAPPED,
            share_alpha: bool = True,
            drop_rate: float = 0.0,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, head, head_kwargs)
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}

        if not isinstance(channels, Sequence) or len(channels) != 3:
            raise InputError(f'channels is {channels}: give the channels of three stages, such as [16,32,64]')
        width = channels[0]
        self.conv1 = nn.Conv2d(in_chans, width, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=width, reduction=1, module='act1')]
        self.layer1 = _stage(width, channels[0], num_blocks, 1, conv_shortcut, **dd)
        self.layer2 = _stage(channels[0], channels[1], num_blocks, 2, conv_shortcut, **dd)
        self.layer3 = _stage(channels[1], channels[2], num_blocks, 2, conv_shortcut, **dd)
        self.feature_info += [
            dict(num_chs=channels[i], reduction=2 ** i, module=f'layer{i + 1}') for i in range(3)]

        self._make_head(channels[-1], global_pool, **dd)
        if nbn:
            add_nbn(self, ('layer3',), r'bn2$', share_alpha=share_alpha, gradient=gradient)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Kaiming-normal convolutions and classifier, as the field's CIFAR ResNets have."""
        for module in self.modules():
            if isinstance(module, CosineLinear):
                module.reset_parameters()
            elif isinstance(module, nn.Conv2d | nn.Linear | RectifiedLinear):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, NormalizedBatchNorm2d):
                nn.init.ones_(module.weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns that group parameters by stage (coarse) or block."""
        return dict(stem=r'^conv1|bn1', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: int | list[int] | None = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Features and the outputs of the stem (0) and of the stages (1 to 3), as in timm's models.

        Args:
            x: Images [B, in_chans, H, W].
            indices: Outputs to take: the last n if an int, all if None.
            norm: Has no effect, there is no final norm layer.
            stop_early: Do not run stages after the last output taken.
            output_fmt: 'NCHW'.
            intermediates_only: Leave out the final features.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt '{output_fmt}' is unknown: these feature maps are NCHW")
        take, last = take_indices(indices)
        maps = [self.act1(self.bn1(self.conv1(x)))]
        stages = (self.layer1, self.layer2, self.layer3)
        for stage in stages[:last] if stop_early else stages:
            checkpointing = self.grad_checkpointing and not torch.jit.is_scripting()
            maps.append(checkpoint_seq(stage, maps[-1]) if checkpointing else stage(maps[-1]))
        if len(maps) == 4:
            maps[3] = self._last_maps(maps)
        intermediates = [found for index, found in enumerate(maps) if index in take]
        return intermediates if intermediates_only else (maps[-1], intermediates)

    @torch.jit.ignore
    def _last_maps(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """What stands for the output of the last stage, from those of the stem and of all stages."""
        return maps[3]

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages after the last intermediate wanted, and the head; returns the indices kept."""
        take, last = take_indices(indices)
        for stage in range(last + 1, 4):
            setattr(self, f'layer{stage}', nn.Sequential())
        if last < 3:
            self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if prune_head or last < 3:
            self.reset_classifier(0, '')
        return take

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, H, W] to the last feature maps [B, num_features, H/4, W/4]."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq([self.layer1, self.layer2, self.layer3], x, flatten=True)
        return self.layer3(self.layer2(self.layer1(x)))



def _conv_shortcut(in_channels: int, channels: int, stride: int, **dd) -> nn.Sequential:
    """Shortcut of type B."""
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False, **dd), nn.BatchNorm2d(channels, **dd))


def _stage(
        in_channels: int, channels: int, num_blocks: int, stride: int, conv_shortcut: bool = False, **dd,
) -> nn.Sequential:
    shortcut: nn.Module | None = None
    if stride > 1:
        shortcut = (_conv_shortcut(in_channels, channels, stride, **dd) if conv_shortcut
                    else PadShortcut(in_channels, channels))
    first = BasicBlock(in_channels, channels, stride, downsample=shortcut, **dd)
    return nn.Sequential(first, *[BasicBlock(channels, channels, **dd) for _ in range(num_blocks - 1)])


def take_indices(indices: int | list[int] | None) -> tuple[list[int], int]:
    """The outputs asked for, of the four there are, and the greatest of them."""
    every = list(range(4))
    if indices is None:
        indices = every
    elif isinstance(indices, int):
        if not 0 < indices <= 4:
            raise ValueError(f'the last {indices} intermediates were asked for, but there are 4: give 1 to 4')
        indices = every[-indices:]
    if any(not -4 <= index < 4 for index in indices):
        raise ValueError(f'intermediates {list(indices)} were asked for, but there are 4: give 0 to 3, or -4 to -1')
    take = [every[index] for index in indices]
    return take, max(take)


def _create(variant: str, pretrained: bool, **kwargs) -> ResNetCifar:
    return build_zoo_model(ResNetCifar, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3)), **kwargs)


_WIDE: dict[str, Any] = dict(num_blocks=2, channels=(16, 64, 160), conv_shortcut=True)


@register_model
def resnet14_wide(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-14 for CIFAR with 16, 64 and 160 channels."""
    return _create('resnet14_wide', pretrained, **dict(_WIDE, **kwargs))


@register_model
def resnet14_wide_nbn(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-14 for CIFAR with 16, 64 and 160 channels, with NBN."""
    return _create('resnet14_wide_nbn', pretrained, **dict(dict(_WIDE, nbn=True), **kwargs))


@register_model
def resnet14_wide_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-14 for CIFAR with 16, 64 and 160 channels, with NBN and logit rectification."""
    return _create('resnet14_wide_nbn_lr', pretrained, **dict(dict(_WIDE, nbn=True, head='rectified'), **kwargs))


@register_model
def resnet20(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-20 for CIFAR."""
    return _create('resnet20', pretrained, **dict(dict(num_blocks=3), **kwargs))


@register_model
def resnet20_nbn(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-20 for CIFAR with NBN."""
    return _create('resnet20_nbn', pretrained, **dict(dict(num_blocks=3, nbn=True), **kwargs))


@register_model
def resnet20_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-20 for CIFAR with NBN and logit rectification."""
    return _create('resnet20_nbn_lr', pretrained, **dict(dict(num_blocks=3, nbn=True, head='rectified'), **kwargs))


@register_model
def resnet32(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-32 for CIFAR."""
    return _create('resnet32', pretrained, **dict(dict(num_blocks=5), **kwargs))


@register_model
def resnet32_nbn(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-32 for CIFAR with NBN."""
    return _create('resnet32_nbn', pretrained, **dict(dict(num_blocks=5, nbn=True), **kwargs))


@register_model
def resnet32_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-32 for CIFAR with NBN and logit rectification."""
    return _create('resnet32_nbn_lr', pretrained, **dict(dict(num_blocks=5, nbn=True, head='rectified'), **kwargs))


@register_model
def resnet44(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-44 for CIFAR."""
    return _create('resnet44', pretrained, **dict(dict(num_blocks=7), **kwargs))


@register_model
def resnet44_nbn(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-44 for CIFAR with NBN."""
    return _create('resnet44_nbn', pretrained, **dict(dict(num_blocks=7, nbn=True), **kwargs))


@register_model
def resnet44_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-44 for CIFAR with NBN and logit rectification."""
    return _create('resnet44_nbn_lr', pretrained, **dict(dict(num_blocks=7, nbn=True, head='rectified'), **kwargs))


@register_model
def resnet56(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-56 for CIFAR."""
    return _create('resnet56', pretrained, **dict(dict(num_blocks=9), **kwargs))


@register_model
def resnet56_nbn(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-56 for CIFAR with NBN."""
    return _create('resnet56_nbn', pretrained, **dict(dict(num_blocks=9, nbn=True), **kwargs))


@register_model
def resnet56_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetCifar:
    """ResNet-56 for CIFAR with NBN and logit rectification."""
    return _create('resnet56_nbn_lr', pretrained, **dict(dict(num_blocks=9, nbn=True, head='rectified'), **kwargs))


register_aliases(__name__, default_cfgs)
