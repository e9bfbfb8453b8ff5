"""RIDE: networks whose last stages are experts that share the first ones, plain and with NBN.

Sources: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021
(frank-xwang/RIDE-LongTailRecognition, commit ab8be5c); with NBN, Bao et al., IEEE TIP 2024 (yuxiangbao/NBN, commit
7365e21), where every BatchNorm of an expert's last stage is normalised and each expert has one alpha.

The experts of RIDE are narrower than the single network (`reduced`), those of the NBN release have its full width. By
default the networks for 224 pixels are as in the NBN release and `resnet32_ride` is as in RIDE, which alone has it.
"""
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn
from timm.layers import get_device_dtype
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, Bottleneck, ResNet

from nbn_timm.errors import InputError
from nbn_timm.layers import ExpertHead, ExpertStage, NormalizedBatchNorm2d, add_nbn
from nbn_timm.layers.head import LINEAR
from nbn_timm.layers.norm import CAPPED

from ._cfgs import cifar_cfgs, imagenet_cfgs
from ._pretrained import AUTHORS_ARCHIVE, build_zoo_model, register_aliases
from .resnet_cifar import ResNetCifar

__all__ = ['MultiExpert', 'ResNetRide', 'ResNetCifarRide']

NUM_EXPERTS = 3  # as released
MOST_EXPERTS = 100  # papers have at most seven

_FORMS = ('', '_nbn', '_nbn_lr')
_THREE_HEADS = ('fc.0', 'fc.1', 'fc.2')

default_cfgs = generate_default_cfgs({
    **{name: cfg for arch in ('resnet10_ride', 'resnext50_ride') for form in _FORMS
       for name, cfg in imagenet_cfgs(f'{arch}{form}', _THREE_HEADS).items()},
    **{name: cfg for form in _FORMS
       for name, cfg in imagenet_cfgs(f'resnet50_ride{form}', _THREE_HEADS, url=AUTHORS_ARCHIVE).items()},
    **{name: cfg for form in _FORMS for name, cfg in cifar_cfgs(f'resnet32_ride{form}', _THREE_HEADS).items()},
})


class MultiExpert(nn.Module):
    """What makes a timm-like network one of several experts; mixed in before the network's class.

    In evaluation, and in training unless `set_expert_logits` was called, the output is the mean of the experts'
    logits [B, C]. The stages from `first_expert_stage` on are `ExpertStage`s, which concatenate the experts' maps on
    channels, and `fc` is an `ExpertHead`. `method` is the name by which people know such networks.
    """

    method = 'RIDE'

    if TYPE_CHECKING:  # of the network's class; TorchScript would take annotations for declarations
        num_classes: int
        num_features: int
        head_hidden_size: int
        feature_info: Any
        global_pool: Any
        fc: Any

    def _make_experts(self, stages: tuple[str, ...], num_experts: int, head: str, shared: bool = True) -> None:
        """Give each expert its own copy of the last stages, and a head. Weights must be initialised afterwards.

        Without `shared` what comes before them has the experts' channels side by side already.
        """
        if not isinstance(num_experts, int) or not 1 <= num_experts <= MOST_EXPERTS:
            raise InputError(f'num_experts is {num_experts}: give a whole number from 1 to {MOST_EXPERTS}')
        self.num_experts = num_experts
        self.head_kind = head
        self.expert_stages = stages
        for name in stages:
            stage = ExpertStage.from_stage(getattr(self, name), num_experts, shared_input=shared and name == stages[0])
            setattr(self, name, stage)
        for info in self.feature_info:
            if info['module'] in stages:
                info['num_chs'] *= num_experts
        self.num_features *= num_experts
        self.reset_classifier(self.num_classes)

    def _normalize_experts(self, stage: str, share_alpha: bool, gradient: str) -> None:
        """NBN in every BatchNorm of a stage, with one alpha per expert."""
        for expert in range(self.num_experts):
            add_nbn(self, stage, rf'^\d+\.{expert}\.', share_alpha=share_alpha, gradient=gradient)

    @torch.jit.ignore
    def set_expert_logits(self, enable: bool = True) -> None:
        """In training, give the logits of each expert [B, E, C] instead of their mean, for losses on experts."""
        if isinstance(self.fc, ExpertHead):
            self.fc.separate = enable

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New classifiers for `num_classes` classes, one per expert; the pooling is kept if none is named."""
        separate = isinstance(self.fc, ExpertHead) and self.fc.separate
        super().reset_classifier(min(num_classes, 1), global_pool)  # type: ignore[misc]
        self.num_classes = num_classes
        if num_classes:
            self.fc = ExpertHead(
                self.head_kind, self.head_hidden_size, num_classes, self.num_experts, self.global_pool.feat_mult(),
                **get_device_dtype(self)).train(self.training)
            self.fc.separate = separate

    @torch.jit.ignore
    def forward_shared(self, x: torch.Tensor) -> torch.Tensor:
        """Images to the feature maps that all experts start from."""
        x = self._forward_stem(x)
        for name in ('layer1', 'layer2', 'layer3'):
            if name in self.expert_stages:
                break
            x = getattr(self, name)(x)
        return x

    @torch.jit.ignore
    def forward_expert(self, shared: torch.Tensor, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """One expert's pooled features [B, D] and logits [B, C] from the output of `forward_shared`."""
        x = shared
        for name in self.expert_stages:
            x = getattr(self, name).expert(x, expert)
        features = self.global_pool(x)
        return features, self.fc[expert](features)

    def _forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class ResNetRide(MultiExpert, ResNet):
    """timm's ResNet with several experts from `layer3` on, or from `layer4` on.

    Args:
        block: Block class of all stages.
        layers: Number of blocks in each stage.
        num_experts: E.
        reduced: Experts of three quarters of the width, as in RIDE; else full width, as in the NBN release.
        share_layer3: Only `layer4` is of experts.
        head: Kind of each expert's classifier: 'linear', 'rectified' (logit rectification) or 'cosine'.
        nbn: NBN in every BatchNorm of `layer4`.
        gradient: Backward pass of NBN, 'capped' or 'released', see `NormalizedBatchNorm2d`.
        share_alpha: One alpha per expert, as released, else one for each layer.
        zero_init_last: As in timm's `ResNet`; False as in the released recipes. NBN is never zero-initialised.
        **kwargs: See timm's `ResNet`.
    """

    def __init__(
            self,
            block: type[BasicBlock] | type[Bottleneck],
            layers: tuple[int, ...],
            num_experts: int = NUM_EXPERTS,
            reduced: bool = False,
            share_layer3: bool = False,
            head: str = LINEAR,
            nbn: bool = False,
            gradient: str = CAPPED,
            share_alpha: bool = True,
            zero_init_last: bool = False,
            **kwargs,
    ) -> None:
        channels = (64, 128, 192, 384) if reduced else (64, 128, 256, 512)
        super().__init__(block, layers, channels=channels, zero_init_last=zero_init_last, **kwargs)  # type: ignore[arg-type]
        self._make_experts(('layer4',) if share_layer3 else ('layer3', 'layer4'), num_experts, head)
        if nbn:
            self._normalize_experts('layer4', share_alpha, gradient)
        self.init_weights(zero_init_last=zero_init_last)

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        super().init_weights(zero_init_last=zero_init_last)
        for module in self.modules():
            if isinstance(module, NormalizedBatchNorm2d):
                nn.init.ones_(module.weight)

    @torch.jit.ignore
    def _forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.maxpool(self.act1(self.bn1(self.conv1(x))))


class ResNetCifarRide(MultiExpert, ResNetCifar):
    """CIFAR's ResNet of depth 6n + 2 with several experts from `layer2` on, or from `layer3` on.

    Args:
        num_blocks: n, blocks in each of the three stages.
        num_experts: E.
        reduced: Experts of three quarters of the width, as in RIDE; else full width.
        channels: Of the three stages, of each expert; None as `reduced` says.
        share_layer2: Only `layer3` is of experts.
        complete: Experts are complete networks, which share nothing, as in NCL.
        head, nbn, gradient, share_alpha: As in `ResNetRide`; NBN is in every BatchNorm of `layer3`.
        **kwargs: See `ResNetCifar`.
    """

    def __init__(
            self,
            num_blocks: int,
            num_experts: int = NUM_EXPERTS,
            reduced: bool = True,
            channels: tuple[int, int, int] | None = None,
            share_layer2: bool = False,
            complete: bool = False,
            head: str = LINEAR,
            nbn: bool = False,
            gradient: str = CAPPED,
            share_alpha: bool = True,
            **kwargs,
    ) -> None:
        if complete and share_layer2:
            raise InputError('share_layer2 and complete cannot go together, a complete expert shares nothing: leave '
                             'out one')
        super().__init__(num_blocks, channels=channels or ((16, 24, 48) if reduced else (16, 32, 64)), **kwargs)
        first = 1 if complete else 3 if share_layer2 else 2
        self._make_experts(tuple(f'layer{stage}' for stage in range(first, 4)), num_experts, head, shared=not complete)
        if complete:
            self._make_stems()
        if nbn:
            self._normalize_experts('layer3', share_alpha, gradient)
        self.init_weights()

    def _make_stems(self) -> None:
        """A stem for each expert, their channels side by side in one layer."""
        dd = get_device_dtype(self)
        width = self.conv1.out_channels * self.num_experts
        self.conv1 = nn.Conv2d(self.in_chans, width, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.feature_info[0]['num_chs'] = width

    @torch.jit.ignore
    def _forward_stem(self, x: torch.Tensor) -> torch.Tensor:
        return self.act1(self.bn1(self.conv1(x)))


def _create_cifar(variant: str, pretrained: bool, **kwargs) -> ResNetCifarRide:
    return build_zoo_model(ResNetCifarRide, variant, pretrained, feature_cfg=dict(out_indices=(0, 1, 2, 3)), **kwargs)


@register_model
def resnet10_ride(pretrained: bool = False, **kwargs) -> ResNetRide:
    """ResNet-10 with several experts (RIDE)."""
    model_args: dict[str, Any] = dict(block=BasicBlock, layers=(1, 1, 1, 1))
    return build_zoo_model(ResNetRide, 'resnet10_ride', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet10_ride_nbn(pretrained: bool = False, **kwargs) -> ResNetRide:
    """ResNet-10 with several experts and NBN."""
    model_args: dict[str, Any] = dict(block=BasicBlock, layers=(1, 1, 1, 1), nbn=True)
    return build_zoo_model(ResNetRide, 'resnet10_ride_nbn', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet10_ride_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetRide:
    """ResNet-10 with several experts, NBN and logit rectification."""
    model_args: dict[str, Any] = dict(block=BasicBlock, layers=(1, 1, 1, 1), nbn=True, head='rectified')
    return build_zoo_model(ResNetRide, 'resnet10_ride_nbn_lr', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_ride(pretrained: bool = False, **kwargs) -> ResNetRide:
    """ResNet-50 with several experts (RIDE)."""
    model_args: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3))
    return build_zoo_model(ResNetRide, 'resnet50_ride', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_ride_nbn(pretrained: bool = False, **kwargs) -> ResNetRide:
    """ResNet-50 with several experts and NBN."""
    model_args: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3), nbn=True)
    return build_zoo_model(ResNetRide, 'resnet50_ride_nbn', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet50_ride_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetRide:
    """ResNet-50 with several experts, NBN and logit rectification."""
    model_args: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3), nbn=True, head='rectified')
    return build_zoo_model(ResNetRide, 'resnet50_ride_nbn_lr', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext50_ride(pretrained: bool = False, **kwargs) -> ResNetRide:
    """ResNeXt-50 32x4d with several experts (RIDE)."""
    model_args: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4)
    return build_zoo_model(ResNetRide, 'resnext50_ride', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext50_ride_nbn(pretrained: bool = False, **kwargs) -> ResNetRide:
    """ResNeXt-50 32x4d with several experts and NBN."""
    model_args: dict[str, Any] = dict(block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4, nbn=True)
    return build_zoo_model(ResNetRide, 'resnext50_ride_nbn', pretrained, **dict(model_args, **kwargs))


@register_model
def resnext50_ride_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetRide:
    """ResNeXt-50 32x4d with several experts, NBN and logit rectification."""
    model_args: dict[str, Any] = dict(
        block=Bottleneck, layers=(3, 4, 6, 3), cardinality=32, base_width=4, nbn=True, head='rectified')
    return build_zoo_model(ResNetRide, 'resnext50_ride_nbn_lr', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet32_ride(pretrained: bool = False, **kwargs) -> ResNetCifarRide:
    """ResNet-32 for CIFAR with several experts (RIDE)."""
    return _create_cifar('resnet32_ride', pretrained, **dict(dict(num_blocks=5), **kwargs))


@register_model
def resnet32_ride_nbn(pretrained: bool = False, **kwargs) -> ResNetCifarRide:
    """ResNet-32 for CIFAR with several experts and NBN."""
    return _create_cifar('resnet32_ride_nbn', pretrained, **dict(dict(num_blocks=5, nbn=True), **kwargs))


@register_model
def resnet32_ride_nbn_lr(pretrained: bool = False, **kwargs) -> ResNetCifarRide:
    """ResNet-32 for CIFAR with several experts, NBN and logit rectification."""
    model_args: dict[str, Any] = dict(num_blocks=5, nbn=True, head='rectified')
    return _create_cifar('resnet32_ride_nbn_lr', pretrained, **dict(model_args, **kwargs))


register_aliases(__name__, default_cfgs)
