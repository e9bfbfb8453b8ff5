"""SHIKE's network: experts that share all stages but the last and differ in the shallow maps that they look back at.

Source: Jin et al., "Long-Tailed Visual Recognition via Self-Heterogeneous Integration with Knowledge Excavation", CVPR
2023 (jinyan-06/SHIKE, commit 2b04b62). The maps of an expert's last stage are multiplied, value by value, by those of
an earlier stage, which a path of strided convolutions brings to the same size: of `layer1` for the first, third, ...
expert, of `layer2` for the others. Shortcuts are of type B, classifiers are cosines.

The authors' network has a second set of classifiers, 19,200 parameters of three experts and 100 classes, that waits for
the second stage. Here a second stage begins with new classifiers of its own (`--stage crt`), so there is one set:
1,257,808 parameters instead of 1,277,008.

`resnet14_wide_shike` is ours, for training at a small cost: `resnet14_wide` with experts of 96 channels.
"""
from typing import Any

import torch
import torch.nn as nn
from timm.models import checkpoint_seq, generate_default_cfgs, register_model

from ._cfgs import cifar_cfgs
from ._pretrained import build_zoo_model, register_aliases
from .resnet_cifar import ResNetCifar
from .ride import MultiExpert

__all__ = ['ResNetCifarShike']

_THREE_HEADS = ('fc.0', 'fc.1', 'fc.2')
_WIDE: dict[str, Any] = dict(num_blocks=2, channels=(16, 64, 96))

default_cfgs = generate_default_cfgs({
    name: cfg for arch in ('resnet14_wide_shike', 'resnet14_wide_shike_nbn', 'resnet32_shike', 'resnet32_shike_nbn')
    for name, cfg in cifar_cfgs(arch, _THREE_HEADS).items()
})


class DepthFusion(nn.ModuleList):
    """Each expert's last maps times its own view of the maps of an earlier stage.

    Args:
        channels: Of the three stages.
        num_experts: E; of 0 the last maps stay as they are.
    """

    def __init__(self, channels: tuple[int, int, int], num_experts: int, device=None, dtype=None) -> None:
        first, second, last = channels
        dd: dict[str, Any] = {'device': device, 'dtype': dtype}
        super().__init__(
            nn.Sequential(*_halved(second, last, **dd), nn.ReLU(inplace=True)) if expert % 2 else
            nn.Sequential(*_halved(first, second, **dd), nn.ReLU(inplace=True), *_halved(second, last, **dd))
            for expert in range(num_experts))

    def forward(self, first: torch.Tensor, second: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
        """Maps of `layer1` [B, C1, H, W], of `layer2` [B, C2, H/2, W/2] and of all experts [B, E * C3, H/4, W/4], to
        the last shape again.
        """
        views: list[torch.Tensor] = []
        for expert, view in enumerate(self):
            views.append(view(second if expert % 2 else first))
        return last * torch.cat(views, dim=1) if len(views) > 0 else last

    def expert(self, first: torch.Tensor, second: torch.Tensor, last: torch.Tensor, expert: int) -> torch.Tensor:
        """The same of one expert, whose last maps are [B, C3, H/4, W/4]."""
        return last * self[expert](second if expert % 2 else first)

    @torch.jit.ignore
    def reset_parameters(self) -> None:
        """Convolutions by torch's rule, as in the authors' code, which initialises the other ones only."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()


def _halved(in_channels: int, channels: int, **dd: Any) -> tuple[nn.Module, nn.Module]:
    """A convolution to maps of half the side."""
    return nn.Conv2d(in_channels, channels, 3, 2, padding=1, bias=False, **dd), nn.BatchNorm2d(channels, **dd)


class ResNetCifarShike(MultiExpert, ResNetCifar):
    """CIFAR's ResNet of depth 6n + 2 with several experts in `layer3`, fused with maps of different depth.

    Args:
        num_blocks: n, blocks in each of the three stages.
        num_experts: E.
        head: Kind of each expert's classifier: 'cosine', 'linear' or 'rectified' (logit rectification).
        nbn: NBN in every BatchNorm of `layer3`, with one alpha per expert; not in the fusion.
        gradient, share_alpha: Of NBN, see `ResNetRide`.
        channels: Of the three stages.
        **kwargs: See `ResNetCifar`.
    """

    method = 'SHIKE'

    def __init__(
            self,
            num_blocks: int,
            num_experts: int = 3,
            head: str = 'cosine',
            nbn: bool = False,
            gradient: str = 'capped',
            share_alpha: bool = True,
            channels: tuple[int, int, int] = (16, 32, 64),
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        super().__init__(num_blocks, channels=channels, conv_shortcut=True, device=device, dtype=dtype, **kwargs)
        self._make_experts(('layer3',), num_experts, head)
        self.fusion = DepthFusion(channels, num_experts, device=device, dtype=dtype)
        self.feature_info[-1]['module'] = 'fusion'
        if nbn:
            self._normalize_experts('layer3', share_alpha, gradient)
        self.init_weights()

    @torch.jit.ignore
    def init_weights(self) -> None:
        super().init_weights()
        if hasattr(self, 'fusion'):  # not yet while the network of one expert is made
            self.fusion.reset_parameters()

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, H, W] to the fused maps of all experts [B, num_features, H/4, W/4]."""
        x = self.act1(self.bn1(self.conv1(x)))
        if self.grad_checkpointing and not torch.jit.is_scripting():
            first = checkpoint_seq(self.layer1, x)
            second = checkpoint_seq(self.layer2, first)
            last = checkpoint_seq(self.layer3, second)
        else:
            first = self.layer1(x)
            second = self.layer2(first)
            last = self.layer3(second)
        return self.fusion(first, second, last)

    @torch.jit.ignore
    def _last_maps(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """The fused maps."""
        return self.fusion(*maps[1:])

    def prune_intermediate_layers(
            self,
            indices: int | list[int] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> list[int]:
        """As in `ResNetCifar`; without `layer3` there is nothing to fuse."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if max(take) < 3:
            self.fusion = DepthFusion((0, 0, 0), 0)
        return take

    @torch.jit.ignore
    def forward_shared(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # type: ignore[override]
        """Images to the maps that all experts start from or look back at: of `layer1` and of `layer2`."""
        first = self.layer1(self.act1(self.bn1(self.conv1(x))))
        return first, self.layer2(first)

    @torch.jit.ignore
    def forward_expert(  # type: ignore[override]
            self, shared: tuple[torch.Tensor, torch.Tensor], expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's pooled features [B, D] and logits [B, C] from the output of `forward_shared`."""
        first, second = shared
        stage: Any = self.layer3
        features = self.global_pool(self.fusion.expert(first, second, stage.expert(second, expert), expert))
        return features, self.fc[expert](features)


def _create(variant: str, pretrained: bool, **kwargs) -> ResNetCifarShike:
    feature_cfg = dict(out_indices=(0, 1, 2, 3), feature_cls='getter')
    return build_zoo_model(ResNetCifarShike, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def resnet14_wide_shike(pretrained: bool = False, **kwargs) -> ResNetCifarShike:
    """ResNet-14 of 16, 64 and 96 channels for CIFAR with experts of different depth (SHIKE)."""
    return _create('resnet14_wide_shike', pretrained, **dict(_WIDE, **kwargs))


@register_model
def resnet14_wide_shike_nbn(pretrained: bool = False, **kwargs) -> ResNetCifarShike:
    """ResNet-14 of 16, 64 and 96 channels for CIFAR with experts of different depth (SHIKE) and NBN."""
    return _create('resnet14_wide_shike_nbn', pretrained, **dict(dict(_WIDE, nbn=True), **kwargs))


@register_model
def resnet32_shike(pretrained: bool = False, **kwargs) -> ResNetCifarShike:
    """ResNet-32 for CIFAR with experts of different depth (SHIKE)."""
    return _create('resnet32_shike', pretrained, **dict(dict(num_blocks=5), **kwargs))


@register_model
def resnet32_shike_nbn(pretrained: bool = False, **kwargs) -> ResNetCifarShike:
    """ResNet-32 for CIFAR with experts of different depth (SHIKE) and NBN."""
    return _create('resnet32_shike_nbn', pretrained, **dict(dict(num_blocks=5, nbn=True), **kwargs))


register_aliases(__name__, default_cfgs)
