"""The second stage of MiSLAS (Zhong et al., "Improving Calibration for Long-Tailed Recognition", CVPR 2021, section
3.2): the classifier goes on learning, slowly, behind a learned scale for each class.
"""
from torch import nn

from nbn_timm.key_values import check_number
from nbn_timm.second_stages.lws import LearnableWeightScaling, ScaledClassifier
from nbn_timm.second_stages.second_stage import FLAG, register_second_stage


@register_second_stage('mislas')
class MiSLAS(LearnableWeightScaling):
    """Train the classifier further at a fraction of the learning rate, and a scale for each class at the whole one.

    The logits are s_c (w_c x + b_c); s begins with 1, w and b with what the first stage has learned. The authors train
    them by label-aware smoothing on class-aware draws, while the network has no gradient but, as in their code
    (dvlab-research/MiSLAS, commit 0fc381e), new BatchNorm statistics: `--no-freeze-bn`. Their first stage is mixup.

    The result is an ordinary model of the same architecture, with the scales folded into weight and bias. What is said
    of several experts and of rectified classifiers in `LearnableWeightScaling` holds here too.

    Args:
        classifier_rate: Of the learning rate, that of weight and bias; the authors have 0.2 for CIFAR-100-LT at factor
            100, 0.1 at smaller ones, and 0.05 for ImageNet-LT, Places-LT and iNaturalist.

    Raises:
        InputError: A setting out of range.
    """

    name = 'mislas'
    needs = {'loss': 'label_aware_smoothing'}

    def __init__(self, classifier_rate: float = 0.2) -> None:
        self.classifier_rate = check_number('--stage mislas', FLAG, 'classifier_rate', classifier_rate, above=True)

    def trained(self, model: nn.Module) -> nn.Module:
        """Classifiers and scales."""
        return nn.ModuleList(module for module in model.modules() if isinstance(module, ScaledClassifier))

    def rates(self, model: nn.Module) -> dict[nn.Module, float]:
        """The slow part."""
        return {module.classifier: self.classifier_rate for module in model.modules()
                if isinstance(module, ScaledClassifier)}
