"""The learned sampler of Balanced Meta-Softmax (Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual
Recognition", NeurIPS 2020); `bilevel.py` has the update that teaches it."""
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.key_values import check_number
from nbn_timm.samplers.sampler import FLAG, register_sampler
from nbn_timm.samplers.weighted import ClassWeighted


@register_sampler('meta')
class MetaSampler(ClassWeighted):
    """N independent draws of images, each with a weight of sigmoid(w_c), the learned rate of its class.

    Class c therefore has probability proportional to n_c sigmoid(w_c). This is what a hard Gumbel-softmax over the
    logarithms of all images' rates picks. The rates begin proportional to n_c ** -init_pow, scaled so that the smallest
    and the largest add up to 1; a class without images begins at 1/2.

    An epoch is a function of (seed, epoch, w). It is drawn from the w at which it begins, so w is to be in the
    checkpoint (`state_dict`) and to be the same on every rank. `pick` draws from the present w.

    Args:
        init_pow: 0 begins with all rates alike, which is instance-balanced; 1 begins class-balanced. The released
            recipes have 0.1 (ImageNet-LT) and 0.3 (Places-LT).

    Attributes:
        rate_logits: w, a parameter, float32 [C].

    Raises:
        InputError: `init_pow` is negative.
    """

    second_stage = 'balms'

    def __init__(self, *args: Any, init_pow: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        check_number("sampler 'meta'", FLAG, 'init_pow', init_pow)
        num_classes = int(self.targets.max()) + 1
        if self.class_counts is not None:
            num_classes = max(num_classes, self.class_counts.num_classes)
        rates = (self.groups.counts / len(self.targets)) ** -init_pow
        rates = rates / (rates.min() + rates.max())
        rate_logits = torch.zeros(num_classes)
        rate_logits[self.groups.labels] = torch.from_numpy(np.log(rates / (1 - rates))).float()
        self.rate_logits = nn.Parameter(rate_logits)

    def class_weights(self, counts: np.ndarray) -> np.ndarray:
        rates = self.rate_logits.detach().double().sigmoid().cpu().numpy()
        return counts * rates[self.groups.labels]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """What has been learned."""
        return {'rate_logits': self.rate_logits.detach().clone()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restore what `state_dict` gave; the parameter stays the same object.

        Raises:
            InputError: It is of another number of classes.
        """
        if state['rate_logits'].shape != self.rate_logits.shape:
            raise InputError(f"the state of sampler 'meta' has {len(state['rate_logits'])} classes and these data have "
                             f'{len(self.rate_logits)}: resume with the data it was learned on')
        with torch.no_grad():
            self.rate_logits.copy_(state['rate_logits'])
