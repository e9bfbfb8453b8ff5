"""RIDE's second stage: a module that decides, image by image, whether the next expert is worth its cost.

Source: Wang et al., "Long-tailed Recognition by Routing Diverse Distribution-Aware Experts", ICLR 2021, section 3.3,
and `EAResNet` in its code (frank-xwang/RIDE-LongTailRecognition, commit ab8be5c).
"""
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from nbn_timm.errors import InputError

from .ride import MultiExpert

TOP_K, HIDDEN = 30, 16  # of the router: logits that it sees, width of its hidden layers

__all__ = ['ExpertRouter', 'RoutedExperts', 'router_settings']


class ExpertRouter(nn.Module):
    """The expert assignment module: after each expert but the last, a logit for asking the next one.

    It sees the last expert's pooled features, at unit length and through a small hidden layer of that expert's own, and
    the greatest logits of the mean so far. The last layer is the same after every expert.

    Args:
        num_experts: E.
        num_features: Length of an expert's pooled features.
        top_k: How many logits it sees.
        hidden: Width of the hidden layers.
    """

    def __init__(self, num_experts: int, num_features: int, top_k: int, hidden: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.hidden = nn.ModuleList(nn.Linear(num_features, hidden) for _ in range(num_experts - 1))
        self.decide = nn.Linear(top_k + hidden, 1)

    def init_kaiming_normal(self) -> None:
        """Start the weights as RIDE's CIFAR networks do; biases stay as torch made them, as there."""
        for layer in (*self.hidden, self.decide):
            nn.init.kaiming_normal_(layer.weight)  # type: ignore[arg-type]

    def forward(self, features: torch.Tensor, mean_logits: torch.Tensor, expert: int) -> torch.Tensor:
        """Decision logits [B] after `expert`; above 0 the next expert is asked.

        Args:
            features: Of that expert, [B, D].
            mean_logits: Of the experts up to that one, [B, C].
            expert: Index, 0 to E - 2.
        """
        hidden = F.relu(self.hidden[expert](F.normalize(features, dim=1)))
        top = torch.topk(mean_logits, self.top_k, dim=1).values
        return self.decide(torch.cat([top, hidden], dim=1)).squeeze(1)


class RoutedExperts(nn.Module):
    """A finished multi-expert network and its router. The network is frozen and stays in eval mode.

    In evaluation it maps images [B, 3, H, W] to logits [B, C], the mean over the experts that each image was given. In
    training it returns the decisions [B, E - 1] and the logits of each expert [B, E, C], for `RoutingLoss`.

    Args:
        network: A RIDE network with two experts or more.
        top_k, hidden: See `ExpertRouter`.

    Raises:
        InputError: The network has no experts to choose from, or fewer classes than `top_k`.
    """

    def __init__(self, network: nn.Module, top_k: int = TOP_K, hidden: int = HIDDEN) -> None:
        super().__init__()
        if not isinstance(network, MultiExpert) or network.num_experts < 2:
            raise InputError(f'{type(network).__name__} has no experts to choose from: routing takes a RIDE network '
                             'with at least 2')
        if network.fc.expert_weights is not None:
            raise InputError('the experts of this network are weighted, and a router takes their mean: give the '
                             'checkpoint from before --stage expert_aggregation')
        if not 1 <= top_k <= network.num_classes:
            raise InputError(f'top_k is {top_k}, but there are {network.num_classes} classes: give a number from 1 to '
                             f'{network.num_classes}')
        self.network = network.requires_grad_(False).eval()
        self._counted: dict[tuple[int, int, int], tuple[int, ...]] = {}
        self.num_experts = network.num_experts
        self.num_classes = network.num_classes
        self.pretrained_cfg = getattr(network, 'pretrained_cfg', {})
        self.router = ExpertRouter(self.num_experts, network.head_hidden_size // self.num_experts, top_k, hidden)

    def train(self, mode: bool = True) -> 'RoutedExperts':
        """Set the mode of the router; the network's BatchNorm statistics are frozen with it."""
        super().train(mode)
        self.network.eval()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        return self._all_decisions(x) if self.training else self.route(x)[0]

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Ask the experts in turn, each only about the images that the router is not yet content with.

        Returns:
            Mean logits [B, C] in float32, and how many experts each image was given [B].
        """
        shared = self.network.forward_shared(x)
        features, logits = self.network.forward_expert(shared, 0)
        total = logits.float()
        used = torch.ones(len(x), dtype=torch.int64, device=x.device)
        asking = torch.arange(len(x), device=x.device)  # images still asking
        for expert in range(1, self.num_experts):
            goes_on = self.router(features, total[asking] / expert, expert - 1) > 0
            asking, shared = asking[goes_on], rows(shared, goes_on)
            if not len(asking):
                break
            features, logits = self.network.forward_expert(shared, expert)
            total = total.index_add(0, asking, logits.float())
            used[asking] += 1
        return total / used[:, None], used

    def forward_first(self, x: torch.Tensor, num_experts: int) -> torch.Tensor:
        """Mean logits [B, C] of the first experts, with the decisions that lead there: what `route` computes for an
        image that is given that many.
        """
        shared = self.network.forward_shared(x)
        total = x.new_zeros(len(x), self.num_classes, dtype=torch.float32)
        for expert in range(num_experts):
            features, logits = self.network.forward_expert(shared, expert)
            total = total + logits
            if expert < self.num_experts - 1:
                self.router(features, total / (expert + 1), expert)
        return total / num_experts

    def multiply_adds(self, input_size: tuple[int, int, int]) -> tuple[int, ...]:
        """Multiply-adds of one image [C, H, W] that is given 1, 2, ..., E experts; counted once for each size."""
        if input_size not in self._counted:
            meta = deepcopy(self).to('meta').eval()
            image = torch.zeros(1, *input_size, device='meta')
            amounts = []
            for num_experts in range(1, self.num_experts + 1):
                with FlopCounterMode(display=False) as counter, torch.no_grad():
                    meta.forward_first(image, num_experts)
                amounts.append(counter.get_total_flops() // 2)  # it counts a multiply-add as two
            self._counted[input_size] = tuple(amounts)
        return self._counted[input_size]

    def _all_decisions(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            shared = self.network.forward_shared(x)
            answers = [self.network.forward_expert(shared, expert) for expert in range(self.num_experts)]
            logits = torch.stack([expert_logits for _, expert_logits in answers], dim=1)
            mean_so_far = running_means(logits)
        decisions = [self.router(answers[expert][0], mean_so_far[:, expert], expert)
                     for expert in range(self.num_experts - 1)]
        return torch.stack(decisions, dim=1), logits


def rows(shared: Any, chosen: torch.Tensor) -> Any:
    """The part of the chosen images, bool [B], of what `forward_shared` gives: maps [B, ...], or a tuple of such."""
    return tuple(maps[chosen] for maps in shared) if isinstance(shared, tuple) else shared[chosen]


def running_means(logits: torch.Tensor) -> torch.Tensor:
    """Logits of each expert [B, E, C] to the means of the first 1, 2, ..., E experts, in float32."""
    counts = torch.arange(1, logits.shape[1] + 1, device=logits.device)
    return logits.float().cumsum(dim=1) / counts[:, None]


def router_settings(state_dict: Mapping[str, torch.Tensor]) -> dict[str, Any] | None:
    """Arguments of the `RoutedExperts` that a state dict with this package's names is of; None without a router."""
    if 'router.decide.weight' not in state_dict:
        return None
    hidden = state_dict['router.hidden.0.weight'].shape[0]
    return dict(top_k=state_dict['router.decide.weight'].shape[1] - hidden, hidden=hidden)
