"""What a second stage of one pass may look at in a run: above all, what a network's classifier is given."""
from collections.abc import Collection, Iterator
from typing import Any

import torch
from timm.task import evaluation_sample_limit
from torch import nn
from torch.utils.data import Dataset

from nbn_timm.errors import InputError
from nbn_timm.second_stages import FitData
from nbn_timm.training.plan import Plan


def fit_data(plan: Plan) -> FitData:
    """What a fitted stage may look at in a run."""
    settings, world = plan.settings, plan.world

    def classifier_inputs(
            model: nn.Module,
            modules: Collection[nn.Module],
            dataset: Dataset,
    ) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
        return inputs_of(model, modules, plan.eval_loader(dataset), settings.precision.autocast,
                         settings.precision.channels_last)

    return FitData(
        plan.splits, classifier_inputs, plan.evaluator, world.device, settings.run.eval_metric, world.distributed,
        settings.run.watch_test, settings.run.seed, plan.two_views)


@torch.no_grad()
def inputs_of(
        model: nn.Module,
        modules: Collection[nn.Module],
        loader: Any,
        amp_dtype: torch.dtype | None = None,
        channels_last: bool = False,
) -> Iterator[tuple[list[torch.Tensor], torch.Tensor]]:
    """What some modules of a model are given, in float32 and in the order of `modules`, and the labels [B].

    Args:
        model: In eval mode.
        modules: Each is called once for a batch of images.
        loader: Yields (images, labels); its padding of an uneven distributed split is left out.
        amp_dtype: Autocast to this type.
        channels_last: Give the model channels-last images.

    Raises:
        InputError: A module was not called, or was given numbers that are not finite.
    """
    seen: dict[nn.Module, torch.Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[module] = inputs[0]

    hooks = [module.register_forward_pre_hook(keep) for module in modules]
    left = evaluation_sample_limit(loader)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    try:
        for images, target in loader:
            seen.clear()
            with torch.autocast(images.device.type, dtype=amp_dtype, enabled=amp_dtype is not None):
                model(images.contiguous(memory_format=memory_format))
            if len(seen) < len(hooks):
                raise InputError(f'{type(model).__name__} does not call its classifier in evaluation, so that what '
                                 'it is given cannot be read: use another second stage, such as crt')
            if left is not None:
                target = target[:left]
                left -= len(target)
            inputs = [seen[module][:len(target)].float() for module in modules]
            if not all(bool(part.isfinite().all()) for part in inputs):
                raise InputError('the network gave features that are NaN or infinite: its weights have diverged, or '
                                 'float16 overflowed (try --amp-dtype bfloat16)')
            yield inputs, target
    finally:
        for hook in hooks:
            hook.remove()
