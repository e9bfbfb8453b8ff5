"""Wide ResNets for 32x32 images, plain and with NBN in the last stage.

Source: Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016, section 2, as the field of adversarial robustness
has them (yaodongyu/TRADES, YisenWang/MART, wutong16/Adversarial_Long-Tail): pre-activation blocks, three stages of n
blocks with 16, 32 and 64 channels times the width (depth 6n + 4). Keys are those of these codes. WRN-34-10 for 10
classes has 46,160,474 parameters.
"""
from collections import OrderedDict
from typing import Any

import torch
import torch.nn as nn
from timm.models import checkpoint_seq, generate_default_cfgs, register_model

from nbn_timm.layers import NormalizedBatchNorm2d, RectifiedLinear, add_nbn, nbn_layers
from nbn_timm.layers.head import LINEAR
from nbn_timm.layers.norm import CAPPED, share_scale

from ._cfgs import cifar_cfgs
from ._pretrained import build_zoo_model, register_aliases
from .cifar_network import CifarNetwork
from .resnet_cifar import take_indices

__all__ = ['WideResNetCifar']

default_cfgs = generate_default_cfgs({
    name: cfg
    for depth_and_width in ('16_2', '34_10')
    for form in ('', '_nbn', '_nbn_lr')
    for name, cfg in cifar_cfgs(f'wrn_{depth_and_width}{form}').items()
})


class PreActBlock(nn.Module):
    """BatchNorm, ReLU and convolution, twice, and a shortcut, which is a 1x1 convolution where the channels change.

    Args:
        in_channels, channels: Of input and output.
        stride: Of the first convolution.
        drop_rate: Dropout between the convolutions.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1, drop_rate: float = 0.0, **dd: Any) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(channels, **dd)
        self.act2 = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(drop_rate) if drop_rate else nn.Identity()
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, **dd)
        self.same_channels = in_channels == channels
        self.convShortcut = nn.Identity() if self.same_channels else nn.Conv2d(
            in_channels, channels, 1, stride, bias=False, **dd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.act1(self.bn1(x))
        shortcut = x if self.same_channels else self.convShortcut(out)
        return shortcut + self.conv2(self.drop(self.act2(self.bn2(self.conv1(out)))))


class WideResNetCifar(CifarNetwork):
    """Wide ResNet of depth 6n + 4 for small images.

    Args:
        num_blocks: n, blocks in each of the three stages.
        width: Factor of the channels 16, 32 and 64.
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Number of input channels.
        global_pool: Pooling before the classifier, see timm's `create_classifier`.
        nbn: NBN for the last BatchNorm of each block of the last stage and for the one before the classifier.
        head, head_kwargs: Kind of the classifier and its settings, see `ResNetCifar`.
        gradient, share_alpha: Of NBN, see `ResNetNbn`.
        drop_rate: Dropout before the classifier.
        block_drop_rate: Dropout inside the blocks, 0.3 in some of the paper's networks.
    """

    def __init__(
            self,
            num_blocks: int,
            width: int,
            num_classes: int = 100,
            in_chans: int = 3,
            global_pool: str = 'avg',
            nbn: bool = False,
            head: str = LINEAR,
            head_kwargs: dict[str, float] | None = None,
            gradient: str = CAPPED,
            share_alpha: bool = True,
            drop_rate: float = 0.0,
            block_drop_rate: float = 0.0,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__(num_classes, in_chans, drop_rate, head, head_kwargs)
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}

        channels = (16, 16 * width, 32 * width, 64 * width)
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False, **dd)
        self.block1 = _stage(channels[0], channels[1], num_blocks, 1, block_drop_rate, **dd)
        self.block2 = _stage(channels[1], channels[2], num_blocks, 2, block_drop_rate, **dd)
        self.block3 = _stage(channels[2], channels[3], num_blocks, 2, block_drop_rate, **dd)
        self.bn1 = nn.BatchNorm2d(channels[3], **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=channels[0], reduction=1, module='conv1')]
        self.feature_info += [
            dict(num_chs=channels[i], reduction=2 ** (i - 1), module=f'block{i}') for i in range(1, 4)]

        self._make_head(channels[-1], global_pool, **dd)
        if nbn:
            add_nbn(self, ('block3', 'bn1'), r'bn2$|^$', share_alpha=share_alpha, gradient=gradient)
            if share_alpha:
                share_scale(nbn_layers(self).values())
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        """Convolutions by He's rule for what goes out, as in the authors' code; the classifier by torch's, bias 0."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, nn.Linear | RectifiedLinear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            elif isinstance(module, NormalizedBatchNorm2d):
                nn.init.ones_(module.weight)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that group parameters by stage (coarse) or block."""
        return dict(stem=r'^conv1', blocks=[
            (r'^block(\d+)' if coarse else r'^block(\d+)\.layer\.(\d+)', None), (r'^bn1', (99999,))])

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
            norm: Give the last stage's output after the final BatchNorm and ReLU.
            stop_early: Do not run stages after the last output taken.
            output_fmt: 'NCHW'.
            intermediates_only: Leave out the final features.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt '{output_fmt}' is unknown: these feature maps are NCHW")
        take, last = take_indices(indices)
        intermediates = []
        x = self.conv1(x)
        if 0 in take:
            intermediates.append(x)
        stages = (self.block1, self.block2, self.block3)
        for index, stage in enumerate(stages[:last] if stop_early else stages, start=1):
            x = self._run(stage, x)
            if index in take:
                intermediates.append(self.act1(self.bn1(x)) if norm and index == 3 else x)
        if intermediates_only:
            return intermediates
        return (x if stop_early and last < 3 else self.act1(self.bn1(x))), intermediates

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """Drop the stages after the last intermediate wanted, norm and head; returns the indices kept."""
        take, last = take_indices(indices)
        for stage in range(last + 1, 4):
            setattr(self, f'block{stage}', nn.Sequential())
        if prune_norm or last < 3:
            self.bn1, self.act1 = nn.Identity(), nn.Identity()  # type: ignore[assignment]
        if last < 3:
            self.num_features = self.head_hidden_size = self.feature_info[last]['num_chs']
        if prune_head or last < 3:
            self.reset_classifier(0, '')
        return take

    def _run(self, stage: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(stage.layer, x)
        return stage(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, H, W] to the last feature maps [B, num_features, H/4, W/4]."""
        x = self.conv1(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq([self.block1, self.block2, self.block3], x, flatten=True)
        else:
            x = self.block3(self.block2(self.block1(x)))
        return self.act1(self.bn1(x))



def _stage(in_channels: int, channels: int, num_blocks: int, stride: int, drop_rate: float, **dd: Any) -> nn.Sequential:
    blocks = [PreActBlock(channels if index else in_channels, channels, 1 if index else stride, drop_rate, **dd)
              for index in range(num_blocks)]
    return nn.Sequential(OrderedDict(layer=nn.Sequential(*blocks)))


def _create(variant: str, pretrained: bool, **kwargs) -> WideResNetCifar:
    return build_zoo_model(WideResNetCifar, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3)), **kwargs)


@register_model
def wrn_16_2(pretrained: bool = False, **kwargs) -> WideResNetCifar:
    """WRN-16-2 for CIFAR."""
    return _create('wrn_16_2', pretrained, **dict(dict(num_blocks=2, width=2), **kwargs))


@register_model
def wrn_16_2_nbn(pretrained: bool = False, **kwargs) -> WideResNetCifar:
    """WRN-16-2 for CIFAR with NBN."""
    return _create('wrn_16_2_nbn', pretrained, **dict(dict(num_blocks=2, width=2, nbn=True), **kwargs))


@register_model
def wrn_16_2_nbn_lr(pretrained: bool = False, **kwargs) -> WideResNetCifar:
    """WRN-16-2 for CIFAR with NBN and logit rectification."""
    return _create('wrn_16_2_nbn_lr', pretrained,
                   **dict(dict(num_blocks=2, width=2, nbn=True, head='rectified'), **kwargs))


@register_model
def wrn_34_10(pretrained: bool = False, **kwargs) -> WideResNetCifar:
    """WRN-34-10 for CIFAR."""
    return _create('wrn_34_10', pretrained, **dict(dict(num_blocks=5, width=10), **kwargs))


@register_model
def wrn_34_10_nbn(pretrained: bool = False, **kwargs) -> WideResNetCifar:
    """WRN-34-10 for CIFAR with NBN."""
    return _create('wrn_34_10_nbn', pretrained, **dict(dict(num_blocks=5, width=10, nbn=True), **kwargs))


@register_model
def wrn_34_10_nbn_lr(pretrained: bool = False, **kwargs) -> WideResNetCifar:
    """WRN-34-10 for CIFAR with NBN and logit rectification."""
    return _create('wrn_34_10_nbn_lr', pretrained,
                   **dict(dict(num_blocks=5, width=10, nbn=True, head='rectified'), **kwargs))


register_aliases(__name__, default_cfgs)
