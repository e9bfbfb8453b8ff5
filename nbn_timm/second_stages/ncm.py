"""Nearest class mean (Kang et al., "Decoupling Representation and Classifier for Long-Tailed Recognition", ICLR 2020,
section 4.2; feature forms of Wang et al., "SimpleShot", arXiv 1911.04623).
"""
from collections.abc import Collection, Mapping

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from nbn_timm.errors import InputError
from nbn_timm.key_values import check_choice
from nbn_timm.layers import ClassVectors, ExpertHead
from nbn_timm.second_stages.classifier import (
    classifier_of,
    linear_classifiers,
    replace_module,
    vector_classifiers,
    vectors,
    write_linear,
)
from nbn_timm.second_stages.second_stage import FLAG, FitData, FitReport, FittedSecondStage, register_second_stage

FEATURES = ('un', 'l2n', 'cl2n')
COMPARISONS = ('euclidean', 'dot')


class CentroidLinear(ClassVectors):
    """Linear classifier on features at unit length: W (x - m) / |x - m| + b, in float32 under autocast as well.

    Args:
        in_features: Length of a feature vector, D.
        out_features: Number of classes, C.
    """

    mean: torch.Tensor

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.register_buffer('mean', torch.zeros(in_features, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(F.normalize(x.to(self.weight.dtype) - self.mean, dim=1), self.weight, self.bias)


@register_second_stage('ncm')
class NearestClassMean(FittedSecondStage):
    """Classify by the mean features of each class over the training set; nothing is trained.

    With x' the feature vector in its form and c the mean of a class's training vectors x', logits are 2 c.x' - |c|^2,
    which rank classes as the Euclidean distance does, or c.x'. Centroids are not normalised again, as in the
    authors' code. The training images are seen under the evaluation transform. Each of several experts has centroids
    of its own features.

    The result is an ordinary model of the same architecture where a linear classifier ranks the same: for 'un', and for
    the dot product of a single network. Else each classifier becomes a `CentroidLinear`, which `validate.py` knows by
    its entry `mean`.

    Args:
        features: 'un' as they are, 'l2n' at unit length, 'cl2n' minus the mean of all training images, then at unit
            length.
        metric: 'euclidean' or 'dot'.
    """

    keeps_classifier = False

    def __init__(self, features: str = 'cl2n', metric: str = 'euclidean') -> None:
        self.features = check_choice('--stage ncm', FLAG, 'features', features, FEATURES)
        self.metric = check_choice('--stage ncm', FLAG, 'metric', metric, COMPARISONS)

    @classmethod
    def restore(cls, model: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> nn.Module:
        """The model with the normalising classifiers that a checkpoint has, if it has them."""
        if hasattr(model, 'get_classifier'):
            for name, classifier in vector_classifiers(model).items():
                if f'{name}.mean' in state_dict:
                    replace_module(model, name, CentroidLinear(classifier.in_features, classifier.out_features))
        return model

    def fit(self, model: nn.Module, data: FitData) -> FitReport:
        """Compute the centroids in a pass over the training images, two for 'cl2n', and make them the classifier."""
        single = not isinstance(classifier_of(model), ExpertHead)
        linear = self.features == 'un' or (self.metric == 'dot' and single)
        classifiers = linear_classifiers(model, 'ncm') if linear else vector_classifiers(model)
        if not classifiers:
            raise InputError(f'the classifier of {type(model).__name__} is not on feature vectors, which alone can be '
                             'normalised: give --stage-kwargs features=un')
        means: list[torch.Tensor] = [torch.zeros((), device=data.device) for _ in classifiers]
        if self.features == 'cl2n':
            sums, counts = self._class_sums(model, classifiers.values(), means, data, unit_length=False)
            means = [(total.sum(dim=0) / counts.sum()).float() for total in sums]
        sums, counts = self._class_sums(model, classifiers.values(), means, data, self.features != 'un')
        empty = torch.nonzero(counts == 0).flatten().tolist()
        if empty:
            names = data.splits.class_counts.names if data.splits.class_counts else [str(label) for label in empty]
            raise InputError(f"class '{names[empty[0]] if len(names) > empty[0] else empty[0]}' has no training image "
                             'and so no centroid: use another second stage, or a training set that has all classes')
        for (name, classifier), mean, total in zip(classifiers.items(), means, sums, strict=True):
            centroids = total / counts[:, None]
            weight, bias = centroids, torch.zeros_like(centroids[:, 0])
            if self.metric == 'euclidean':
                weight, bias = 2 * centroids, -(centroids ** 2).sum(dim=1)
            if linear:
                shift = weight @ mean.double() if self.features == 'cl2n' else 0.0
                write_linear(classifier, weight, bias - shift)
            else:
                replace_module(model, name, _centroid_linear(weight, bias, mean, classifier))
        form = 'the linear classifier of the model' if linear else 'a linear classifier of normalised features'
        return FitReport([f'ncm       centroids of {int(counts.sum()):,} training images ({self.features} features, '
                          f'{self.metric} similarity) as {form}'])

    @staticmethod
    def _class_sums(
            model: nn.Module,
            classifiers: Collection[nn.Module],
            means: list[torch.Tensor],
            data: FitData,
            unit_length: bool,
    ) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Sums over the training images of each class, [C, D] in float64 for each classifier, and their numbers [C]."""
        num_classes: int = model.num_classes  # type: ignore[assignment]
        counts = torch.zeros(num_classes, dtype=torch.float64, device=data.device)
        sums: list[torch.Tensor] = []
        assert data.splits.train is not None
        for inputs, target in data.classifier_inputs(model, classifiers, data.splits.train):
            features = [vectors(part) - mean for part, mean in zip(inputs, means, strict=True)]
            if unit_length:
                features = [F.normalize(part, dim=1) for part in features]
            sums = sums or [counts.new_zeros(num_classes, part.shape[1]) for part in features]
            for total, part in zip(sums, features, strict=True):
                total.index_add_(0, target, part.double())
            counts += torch.bincount(target, minlength=num_classes)
        if data.distributed:
            for total in (*sums, counts):
                dist.all_reduce(total)
        return sums, counts


def _centroid_linear(
        weight: torch.Tensor,
        bias: torch.Tensor,
        mean: torch.Tensor,
        classifier: nn.Module,
) -> CentroidLinear:
    """A classifier with these values in the place of another one."""
    old: torch.Tensor = classifier.weight  # type: ignore[assignment]
    new = CentroidLinear(weight.shape[1], weight.shape[0], old.device, old.dtype)
    with torch.no_grad():
        new.weight.copy_(weight)
        new.bias.copy_(bias)
        new.mean.copy_(mean.expand_as(new.mean))
    return new.train(classifier.training)
