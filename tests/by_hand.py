"""RIDE networks written out from the tensors of a released checkpoint: functions on names, and no module of ours.

They follow the released codes (yuxiangbao/NBN, commit 7365e21, and frank-xwang/RIDE-LongTailRecognition, commit
ab8be5c) as the facts about their keys and formulas describe them: evaluation only.
"""
from collections.abc import Mapping

import torch
import torch.nn.functional as F

Weights = Mapping[str, torch.Tensor]


def norm(weights: Weights, name: str, x: torch.Tensor, alpha: torch.Tensor | None = None) -> torch.Tensor:
    """BatchNorm with running statistics, or NBN."""
    weight, bias = weights[f'{name}.weight'], weights[f'{name}.bias']
    if alpha is not None:
        weight, bias = weight / (weight.norm() + 1e-6) * alpha, bias / (bias.norm() + 1e-6) * alpha
    return F.batch_norm(x, weights[f'{name}.running_mean'], weights[f'{name}.running_var'], weight, bias)


def block(weights: Weights, name: str, x: torch.Tensor, stride: int, groups: int, alpha=None) -> torch.Tensor:
    """A residual block of two or of three convolutions; stride in the 3x3 convolution; shortcut B or A."""
    if f'{name}.conv3.weight' in weights:
        out = F.relu(norm(weights, f'{name}.bn1', F.conv2d(x, weights[f'{name}.conv1.weight']), alpha))
        out = F.conv2d(out, weights[f'{name}.conv2.weight'], stride=stride, padding=1, groups=groups)
        out = F.relu(norm(weights, f'{name}.bn2', out, alpha))
        out = norm(weights, f'{name}.bn3', F.conv2d(out, weights[f'{name}.conv3.weight']), alpha)
    else:
        out = F.conv2d(x, weights[f'{name}.conv1.weight'], stride=stride, padding=1)
        out = F.relu(norm(weights, f'{name}.bn1', out, alpha))
        out = norm(weights, f'{name}.bn2', F.conv2d(out, weights[f'{name}.conv2.weight'], padding=1), alpha)
    if f'{name}.downsample.0.weight' in weights:
        x = norm(weights, f'{name}.downsample.1', F.conv2d(x, weights[f'{name}.downsample.0.weight'], stride=stride),
                 alpha)
    elif x.shape[1] != out.shape[1]:
        pad = (out.shape[1] - x.shape[1]) // 2
        x = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, pad, pad))
    return F.relu(out + x)


def stage(weights: Weights, name: str, x: torch.Tensor, stride: int, groups: int = 1, alpha=None) -> torch.Tensor:
    """All blocks `name`.0, `name`.1, ..."""
    index = 0
    while f'{name}.{index}.conv1.weight' in weights:
        x = block(weights, f'{name}.{index}', x, stride if index == 0 else 1, groups, alpha)
        index += 1
    return x


def expert_features(weights: Weights, images: torch.Tensor, experts: int, groups: int = 1) -> list[torch.Tensor]:
    """Pooled features [B, D] of each expert."""
    cifar = not any(name.startswith('layer4') for name in weights)
    x = F.conv2d(images, weights['conv1.weight'], stride=1 if cifar else 2, padding=1 if cifar else 3)
    x = F.relu(norm(weights, 'bn1', x))
    if not cifar:
        x = F.max_pool2d(x, 3, 2, 1)
    x = stage(weights, 'layer1', x, 1, groups)
    if not cifar:
        x = stage(weights, 'layer2', x, 2, groups)
    middle, last = ('layer2', 'layer3') if cifar else ('layer3', 'layer4')
    if f'{middle}.0.conv1.weight' in weights:
        x = stage(weights, middle, x, 2, groups)
    features = []
    for expert in range(experts):
        alpha = weights['scale_factor'][expert] if 'scale_factor' in weights else None
        y = stage(weights, f'{middle}s.{expert}', x, 2, groups) if f'{middle}s.0.0.conv1.weight' in weights else x
        features.append(stage(weights, f'{last}s.{expert}', y, 2, groups, alpha).mean(dim=(2, 3)))
    return features


def expert_logits(weights: Weights, images: torch.Tensor, experts: int, groups: int = 1) -> torch.Tensor:
    """Logits of each expert [B, E, C]: of linear, rectified or (transposed, without bias) cosine classifiers."""
    logits = []
    for expert, features in enumerate(expert_features(weights, images, experts, groups)):
        weight, bias = weights[f'linears.{expert}.weight'], weights.get(f'linears.{expert}.bias')
        if bias is None:
            unit = weight / weight.norm(dim=0)
            logits.append(30 * (features / features.norm(dim=1, keepdim=True)) @ unit)
            continue
        out = features @ weight.T + bias
        if f'linears.{expert}.bn.running_mean' in weights:
            out = ((out - weights[f'linears.{expert}.bn.running_mean'])
                   / (weights[f'linears.{expert}.bn.running_var'] + 1e-5).sqrt())
        logits.append(out)
    return torch.stack(logits, dim=1)


def routed(weights: Weights, image: torch.Tensor, experts: int, top_k: int) -> tuple[torch.Tensor, int]:
    """One image [1, 3, H, W] through RIDE's assignment module: logits [C] and the number of experts asked."""
    features, logits = expert_features(weights, image, experts), expert_logits(weights, image, experts)[0]
    for asked in range(1, experts + 1):
        mean = logits[:asked].mean(dim=0)
        if asked == experts:
            break
        unit = features[asked - 1][0] / features[asked - 1][0].norm()
        hidden = F.relu(weights[f'expert_help_pred_hidden_fcs.{asked - 1}.weight'] @ unit
                        + weights[f'expert_help_pred_hidden_fcs.{asked - 1}.bias'])
        seen = torch.cat([mean.sort(descending=True).values[:top_k], hidden])
        answer = weights['expert_help_pred_fc.weight'][0] @ seen + weights['expert_help_pred_fc.bias'][0]
        if torch.sigmoid(answer) <= 0.5:
            break
    return mean, asked
