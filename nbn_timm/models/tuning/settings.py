"""Settings of fine-tuning a part of a network."""
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nbn_timm.layers.head import HEADS
from nbn_timm.settings import Settings, Values, all_of, not_with, only_with, setting

from .tuning import TUNINGS

FLAG = '--tune-kwargs'
HEAD_STARTS = ('random', 'class_means', 'file')


def _kept(name: str, others: Values) -> str | None:
    return 'has no effect with --resume, which goes on with the weights of the run' if (
        others.resume not in (None, 'auto')) else None


@dataclass(frozen=True)
class TuneSettings(Settings):
    """What of a pretrained network is fine-tuned, and the classifier that is put on it."""

    title = 'fine-tuning of a part'

    tune: str | None = setting(
        None, 'train the classifier and, of the network, only this: biases, norms, or new parameters (LoRA, '
        'AdaptFormer, visual prompts)', choices=lambda: tuple(TUNINGS), inherited=True, unset='all of it is trained',
        effect=all_of(not_with('stage'), not_with('freeze'), not_with('freeze_epochs')))
    tune_kwargs: Mapping[str, Any] = setting({}, 'its own settings', inherited=True, effect=only_with('tune'))
    head: str | None = setting(
        None, "put a new classifier of this kind in the place of the model's", choices=tuple(HEADS), inherited=True,
        unset="the model's")
    head_kwargs: Mapping[str, Any] = setting({}, 'its own settings, as the scale of a cosine head', inherited=True,
                                             effect=only_with('head'))
    head_start: str = setting(
        HEAD_STARTS[0], 'class vectors that the classifier starts with: random ones, the mean features of the training '
        'images of each class by the network as it starts, or those in --head-file', choices=HEAD_STARTS,
        effect=all_of(not_with('stage'), _kept))
    head_file: str | None = setting(
        None, "safetensors file with 'vectors' [classes, features] in the order of the classes, such as features of "
        'their names by a text encoder', metavar='FILE', is_file=True, effect=only_with('head_start', 'file'))

    def as_model_kwargs(self) -> dict[str, Any]:
        """What the constructor of a network of the package must be told of its classifier."""
        if self.head is None:
            return {}
        return {'head': self.head, **({'head_kwargs': dict(self.head_kwargs)} if self.head_kwargs else {})}
