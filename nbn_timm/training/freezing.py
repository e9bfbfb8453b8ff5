"""What of a network does not learn: a first part for good, or all but the classifier for some epochs."""
from collections.abc import Collection

from timm.models import group_parameters
from torch import nn

from nbn_timm.errors import InputError, nearest
from nbn_timm.layers.frozen import freeze_nbn, is_frozen, keep_statistics, moves_statistics, unfreeze_nbn
from nbn_timm.models.transfer import classifier_names

BACKBONE = 'backbone'


def parameters_up_to(model: nn.Module, last: str) -> frozenset[str]:
    """Names of the parameters from the input of a timm model to the end of a part, by its `group_matcher`.

    Args:
        model: Of timm's.
        last: A stage, block or layer, by its module name; 'backbone' is all but the classifier.

    Raises:
        InputError: There is no such part, or the model does not tell its parts.
    """
    classifier = tuple(f'{name}.' for name in classifier_names(model))
    backbone = {name for name, _ in model.named_parameters() if not name.startswith(classifier)}
    if last == BACKBONE:
        return frozenset(backbone)
    if not hasattr(model, 'group_matcher'):
        raise InputError(f'{type(model).__name__} does not tell its parts in their order: give --freeze {BACKBONE}')
    own = [name for name in backbone if f'{name}.'.startswith(f'{last}.')]
    coarse = last in _stages(model)
    groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)  # type: ignore[operator]
    if not own:
        known = [BACKBONE, *_stages(model)]
        raise InputError(f"--freeze '{last}' is no part of {type(model).__name__} before its classifier (there are "
                         f'{", ".join(known)}, and their blocks){nearest(last, known)}')
    end = max(groups[name] for name in own)
    return frozenset(name for name in backbone if groups[name] <= end)


def _stages(model: nn.Module) -> list[str]:
    """Module names of the stages, and of what precedes them."""
    groups = group_parameters(model, model.group_matcher(coarse=True))  # type: ignore[operator]
    found: list[str] = []
    for names in groups.values():
        parts = [name.split('.') for name in names]
        first = parts[0]
        common = next((count for count in range(len(first) - 1, 0, -1)
                       if all(part[:count] == first[:count] for part in parts)), 1)
        found.append('.'.join(first[:common]))
    classifier = classifier_names(model)
    return [name for name in dict.fromkeys(found) if not any(f'{one}.'.startswith(f'{name}.') for one in classifier)]


class Freezing:
    """Freezes and thaws parts of a network by the epoch, so that an epoch is the same in a run that was resumed.

    What is frozen gets no gradient, and its BatchNorm and NBN layers keep their statistics, see `freeze_nbn`.

    Args:
        model: Of timm's; it is frozen for epoch 0 at once.
        last: See `parameters_up_to`; None freezes nothing for good.
        head_epochs: In which the classifier alone learns.
        keep_statistics: Of BatchNorm and NBN in what learns as well, see `layers.frozen.keep_statistics`.

    Raises:
        InputError: As `parameters_up_to`, or nothing would learn.
    """

    def __init__(
            self,
            model: nn.Module,
            last: str | None,
            head_epochs: int = 0,
            keep_statistics: bool = False,
    ) -> None:
        self.model = model
        self.head_epochs = head_epochs
        self.keep_statistics = keep_statistics
        self.learns = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        self.always = parameters_up_to(model, last) if last else frozenset()
        self.backbone = parameters_up_to(model, BACKBONE) if head_epochs else self.always
        if not self.learns - self.backbone:
            raise InputError(f'{type(model).__name__} has no classifier that could learn while all else is frozen: '
                             'leave out --freeze and --freeze-epochs')
        self.frozen: Collection[str] = frozenset()
        self._freeze(self.always)

    def set_epoch(self, epoch: int) -> None:
        """Be told that `epoch` (0-based) begins."""
        frozen = self.backbone if epoch < self.head_epochs else self.always
        if frozen != self.frozen:
            self._freeze(frozen)

    def _freeze(self, names: Collection[str]) -> None:
        parameters = dict(self.model.named_parameters())
        owners = {name.rpartition('.')[0] for name in names}
        for name, module in self.model.named_modules():
            if moves_statistics(module) and name in owners:
                freeze_nbn(module)
            elif moves_statistics(module) and is_frozen(module):
                unfreeze_nbn(module)
        if self.keep_statistics:
            keep_statistics(self.model)
        for name in self.learns:
            parameters[name].requires_grad_(name not in names)
        self.frozen = names
