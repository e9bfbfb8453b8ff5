"""RIDE's second stage: what decides how many experts an image is given (Wang et al., ICLR 2021, section 3.3)."""
from collections.abc import Mapping

import torch
from torch import nn

from nbn_timm.key_values import check_choice, check_number
from nbn_timm.losses.router_loss import POS_WEIGHT, RoutingLoss
from nbn_timm.models import RoutedExperts
from nbn_timm.models.routed_experts import HIDDEN, TOP_K, router_settings
from nbn_timm.second_stages.second_stage import FLAG, SecondStage, TrainedSecondStage, register_second_stage

INITS = ('torch', 'kaiming_normal')
_WIDEST = 65536  # hidden units; RIDE has 16


@register_second_stage('routing')
class Routing(TrainedSecondStage):
    """Train a router for a finished RIDE network; the result is a `RoutedExperts`.

    Args:
        top_k, hidden: See `ExpertRouter`.
        pos_weight: See `RoutingLoss`.
        init: How the router starts: 'torch', by torch's rule for linear layers, as RIDE's networks for ImageNet and
            iNaturalist, or 'kaiming_normal', as its networks for CIFAR.

    Raises:
        InputError: A setting out of range.
    """

    takes_mixing = False
    unused = (*SecondStage.unused, 'loss', 'loss_kwargs', 'smoothing', 'freeze_bn')

    def __init__(
            self,
            top_k: int = TOP_K,
            hidden: int = HIDDEN,
            pos_weight: float = POS_WEIGHT,
            init: str = INITS[0],
    ) -> None:
        self.top_k = check_number('--stage routing', FLAG, 'top_k', top_k, low=1, whole=True)
        self.hidden = check_number('--stage routing', FLAG, 'hidden', hidden, low=1, high=_WIDEST, whole=True)
        self.pos_weight = check_number('--stage routing', FLAG, 'pos_weight', pos_weight, above=True)
        self.init = check_choice('--stage routing', FLAG, 'init', init, INITS)

    def prepare(self, model: nn.Module) -> nn.Module:
        """The network and its router."""
        model = RoutedExperts(model, self.top_k, self.hidden)
        if self.init == 'kaiming_normal':
            model.router.init_kaiming_normal()
        return model

    def trained(self, model: nn.Module) -> nn.Module:
        """The router."""
        return model.router  # type: ignore[return-value]

    def freeze(self, model: nn.Module) -> None:
        """Nothing to do: a `RoutedExperts` keeps its network in eval mode, whatever --freeze-bn says."""

    def loss(self) -> nn.Module:
        """`RoutingLoss`."""
        return RoutingLoss(self.pos_weight)

    @classmethod
    def restore(cls, model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
        """The model with the router around it that a checkpoint has for it, if it has one."""
        settings = router_settings(state_dict)
        return model if settings is None else RoutedExperts(model, **settings)
