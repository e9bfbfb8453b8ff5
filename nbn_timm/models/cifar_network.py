"""What the networks for 32x32 images have in common that are none of timm's: pooling, classifier, checkpointing."""
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import create_classifier, get_device_dtype

from nbn_timm.layers import convert_head

__all__ = ['CifarNetwork']


class CifarNetwork(nn.Module):
    """A network with a head as timm's have it; `forward_features` is its own.

    Args:
        num_classes: Number of classes; 0 leaves the classifier out.
        in_chans: Number of input channels.
        drop_rate: Dropout before the classifier.
        head, head_kwargs: Kind of the classifier and its settings, see `ResNetCifar`.
    """

    def __init__(
            self,
            num_classes: int,
            in_chans: int,
            drop_rate: float,
            head: str,
            head_kwargs: dict[str, float] | None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.head_kind = head
        self.head_kwargs = dict(head_kwargs or {})
        self.grad_checkpointing = False

    def _make_head(self, num_features: int, global_pool: str, **dd: Any) -> None:
        """Pooling and classifier of features [B, num_features]."""
        self.num_features = num_features
        self.global_pool, self.fc = create_classifier(num_features, self.num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = num_features * self.global_pool.feat_mult()
        self.fc = convert_head(self.fc, self.head_kind, self.head_kwargs)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade compute for memory in training by recomputing blocks."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> nn.Module | str:
        """The classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new classifier for `num_classes` classes; the pooling is kept if none is named."""
        self.num_classes = num_classes
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        self._make_head(self.num_features, pool_type, **get_device_dtype(self))
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [B, in_chans, H, W] to the last feature maps."""
        raise NotImplementedError

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Feature maps to logits [B, num_classes], or to pooled features."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))
