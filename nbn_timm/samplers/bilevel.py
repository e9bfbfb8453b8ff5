"""What teaches BALMS's sampler: an SGD step on the classifier, differentiated with respect to the sampling rates.

Source: Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, and
the code released with it. A second stage with a frozen backbone runs, for every batch,

    noise = pick_noise(sampler.rate_logits, counts, targets, generator)
    gradient, meta_loss = meta_update(
        sampler.rate_logits, classifier, features, targets, noise, meta_features, meta_targets, loss, lr)
    sampler.rate_logits.grad = gradient
    adam.step()                                 # Adam over [sampler.rate_logits]

and then the ordinary step of the classifier on the same batch. `features` are of a batch that the sampler has drawn,
`meta_features` of a class-balanced one. With several processes the features and targets of all of them are gathered
first and the noise has a generator of the same seed everywhere: every process then computes the same update.
"""
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, grad_and_value

CHUNK = 2 ** 24  # random numbers that `pick_noise` holds at a time


class PickNoise(NamedTuple):
    """The Gumbel noise g by which B images were picked among N, as far as the rates' gradient needs it."""

    picked: torch.Tensor  # exp(g) of the picked image, [B]
    per_class: torch.Tensor  # sum of exp(g) over the images of each class, [B, C]


@torch.no_grad()
def pick_noise(
        rate_logits: torch.Tensor,
        counts: torch.Tensor,
        targets: torch.Tensor,
        generator: torch.Generator | None = None,
) -> PickNoise:
    """Draw the noise of a Gumbel-softmax over all N images, given which image it has picked.

    The released code draws the noise first and takes the largest of log sigmoid(w) + g. Here the images come from the
    sampler, with the same probabilities, and the noise is drawn from its distribution given the pick, so that images
    can be loaded ahead and an epoch stays a function of its seed. As exponential clocks with rates r = sigmoid(w):
    the first to ring does so after a time that is exponential with the sum of all rates, whichever it is, and each
    other one an exponential time with its own rate later. exp(g) is 1 / (r times the time).

    Args:
        rate_logits: w, [C], of which the picks were drawn; on any device.
        counts: Images per class among which they were drawn, [C]; at least 1 for the classes in `targets`.
        targets: Class of each picked image, int64 [B]; the noise is drawn on their device.
        generator: Of that device; None takes the global one.
    """
    rates = rate_logits.to(targets.device).sigmoid()
    counts = counts.to(device=rates.device, dtype=torch.int64)
    first = torch.empty(len(targets), device=rates.device, dtype=rates.dtype).exponential_(generator=generator)
    first = first / (counts * rates).sum()
    class_of = torch.repeat_interleave(counts)  # [N]
    begin = counts.cumsum(0) - counts
    per_class = []
    for rows in torch.arange(len(targets), device=rates.device).split(max(CHUNK // len(class_of), 1)):
        later = torch.empty(len(class_of), len(rows), device=rates.device, dtype=rates.dtype)
        later.exponential_(generator=generator)
        # Images of a class are alike, so the picked one may as well be the first of them.
        later[begin[targets[rows]], torch.arange(len(rows), device=rates.device)] = 0
        later += torch.outer(rates, first[rows])[class_of]
        sums = torch.zeros(len(counts), len(rows), device=rates.device, dtype=rates.dtype)
        per_class.append(sums.index_add_(0, class_of, later.reciprocal_()).T)
    return PickNoise(1 / (rates[targets] * first), torch.cat(per_class))


def meta_update(
        rate_logits: torch.Tensor,
        classifier: nn.Module,
        features: torch.Tensor,
        targets: torch.Tensor,
        noise: PickNoise,
        meta_features: torch.Tensor,
        meta_targets: torch.Tensor,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        lr: float,
        momentum: float = 0.0,
        weight_decay: float | Mapping[str, float] = 0.0,
        velocity: Mapping[str, torch.Tensor] | None = None,
        nesterov: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient by which BALMS's sampler learns; nothing is changed.

    With the soft share s_b(w) = r(y_b) exp(g_b) / sum over all images of r exp(g), which the Gumbel-softmax gives the
    image that it picked, the loss of image b is weighted by 1 + s_b(w) - s_b(w_now): the straight-through estimator,
    of value 1. The classifier takes one step of SGD on the mean of the weighted losses, and the gradient is that of its
    cross-entropy on the meta batch afterwards.

    Args:
        rate_logits: w, [C]; on any device, all else is on one.
        classifier: Maps features [B, D] to logits [B, C]; those of its parameters that need a gradient are trained.
        features: Of the picked images, [B, D].
        targets: Their classes, int64 [B].
        noise: As `pick_noise` gives it.
        meta_features: Of a class-balanced batch, [M, D].
        meta_targets: Its classes, int64 [M].
        loss: Maps logits and targets to the loss of each image [B]; balanced softmax in BALMS.
        lr: Of the classifier's optimizer, as are `momentum`, `weight_decay`, `velocity` and `nesterov`.
        momentum: Of torch.optim.SGD.
        weight_decay: Of torch.optim.SGD, of all parameters or by parameter name.
        velocity: Momentum buffers by parameter name, where there are some already.
        nesterov: The momentum is Nesterov's.

    Returns:
        The gradient with respect to w [C], on its device, and the cross-entropy on the meta batch, in float32 or the
        wider type of the features.
    """
    dtype = torch.promote_types(torch.float32, features.dtype)
    parameters = {name: parameter.detach() for name, parameter in classifier.named_parameters()
                  if parameter.requires_grad}

    def logits(weights: dict[str, torch.Tensor], inputs: torch.Tensor) -> torch.Tensor:
        buffers = {name: buffer.clone() for name, buffer in classifier.named_buffers()}
        return functional_call(classifier, {**weights, **buffers}, (inputs.to(dtype),))

    def meta_loss(rate_logits: torch.Tensor) -> torch.Tensor:
        share = pick_share(rate_logits, targets, noise)
        image_weights = 1 + share - share.detach()

        def weighted_loss(weights: dict[str, torch.Tensor]) -> torch.Tensor:
            return (image_weights * loss(logits(weights, features), targets)).mean()

        stepped = _sgd_step(parameters, grad(weighted_loss)(parameters), lr, momentum, weight_decay, velocity, nesterov)
        return F.cross_entropy(logits(stepped, meta_features), meta_targets)

    with torch.autocast(features.device.type, enabled=False):
        gradient, value = grad_and_value(meta_loss)(rate_logits.detach().to(features.device))
    return gradient.to(rate_logits.device), value


def _sgd_step(
        parameters: Mapping[str, torch.Tensor],
        gradients: Mapping[str, torch.Tensor],
        lr: float,
        momentum: float,
        weight_decay: float | Mapping[str, float],
        velocity: Mapping[str, torch.Tensor] | None,
        nesterov: bool,
) -> dict[str, torch.Tensor]:
    """The parameters after one step of torch.optim.SGD, as new tensors that depend on the gradients."""
    stepped = {}
    for name, gradient in gradients.items():
        decay = weight_decay[name] if isinstance(weight_decay, Mapping) else weight_decay
        decayed = gradient + decay * parameters[name]
        # The first step's buffer is its gradient, as torch and `higher` have it.
        buffer = decayed + momentum * velocity[name] if velocity and name in velocity else decayed
        stepped[name] = parameters[name] - lr * (decayed + momentum * buffer if nesterov else buffer)
    return stepped


def pick_share(rate_logits: torch.Tensor, targets: torch.Tensor, noise: PickNoise) -> torch.Tensor:
    """Soft share [B] that the Gumbel-softmax (temperature 1) gives the images it picked, of classes `targets` [B]."""
    rates = rate_logits.sigmoid()
    return rates[targets] * noise.picked / (noise.per_class @ rates)
