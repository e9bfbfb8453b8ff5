"""Fine-tuning of the biases or of the norms alone, which puts nothing into a network."""
from torch import nn

from nbn_timm.layers import NormalizedAffine
from nbn_timm.layers.layer_norm import is_stateless

from .tuning import Tuning, blocks_of, register_tuning

__all__ = ['BiasTuning', 'NormTuning']


@register_tuning('bias')
class BiasTuning(Tuning):
    """The biases of the blocks. Source: Zaken et al., "BitFit", ACL 2022, as LIFT has it."""

    def learns(self, model: nn.Module) -> set[str]:
        """All parameters that end in 'bias'."""
        return {name for name, _ in blocks_of(model) if name.endswith('bias')}


@register_tuning('norm')
class NormTuning(Tuning):
    """Weights and biases of the norms of the blocks, of NBN alpha too, as LIFT has it for LayerNorm and BatchNorm."""

    def learns(self, model: nn.Module) -> set[str]:
        """The parameters of BatchNorm, LayerNorm, GroupNorm, RmsNorm and NBN layers."""
        norms = {name for name, module in model.named_modules()
                 if isinstance(module, nn.modules.batchnorm._BatchNorm | NormalizedAffine) or is_stateless(module)}
        return {name for name, _ in blocks_of(model)
                if {name.rpartition('.')[0], name.removesuffix('.scale.alpha')} & norms}
