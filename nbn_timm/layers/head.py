"""Classifier heads."""
import torch
import torch.nn as nn
import torch.nn.functional as F

__all__ = ['RectifiedLinear']


class RectifiedLinear(nn.Linear):
    """Linear classifier with logit rectification: its logits pass a BatchNorm1d without affine parameters.

    Every class's logit gets zero mean and unit variance over the training stream, so frequent classes cannot keep a
    head start. Source: the NBN paper (arXiv 2501.03122), `Linear_fcbn_notaffine` in the authors' code, whose key
    names `weight`, `bias`, `bn.*` are kept. In training a batch needs two samples or more; `bias` has no effect
    there, because the batch mean takes it out.

    Args:
        in_features: Length of a feature vector.
        out_features: Number of classes.
    """

    def __init__(self, in_features: int, out_features: int, device=None, dtype=None) -> None:
        super().__init__(in_features, out_features, device=device, dtype=dtype)
        self.bn = nn.BatchNorm1d(out_features, affine=False, device=device, dtype=dtype)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> 'RectifiedLinear':
        """A rectified head that takes over the weight and bias of a Linear."""
        head = cls(linear.in_features, linear.out_features, linear.weight.device, linear.weight.dtype)
        head.weight, head.bias = linear.weight, linear.bias
        return head.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bn(F.linear(x, self.weight, self.bias))

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """The same function in eval mode as a plain `nn.Linear`; `timm.models.reparameterize_model` calls this."""
        mean, var = self.bn.running_mean, self.bn.running_var
        assert mean is not None and var is not None
        std = torch.rsqrt(var + self.bn.eps)
        plain = nn.Linear(self.in_features, self.out_features, device=self.weight.device, dtype=self.weight.dtype)
        plain.weight.copy_(self.weight * std[:, None])
        plain.bias.copy_((self.bias - mean) * std)
        return plain.train(self.training)
