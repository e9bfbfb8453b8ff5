"""Images to try a network on."""
import torch
from timm.models import get_model_input_config
from torch import nn

__all__ = ['try_images']


def try_images(model: nn.Module, number: int = 1) -> torch.Tensor:
    """Noise [number, C, H, W] of the size that a model of timm's takes, the same each time.

    It is on the device, and has the type, of the model's first floating-point parameter; on the device meta it has no
    values.
    """
    channels, height, width = get_model_input_config(model)['input_size']
    # timm's cfg may not know for which size the part that makes patches was made.
    made_for = next((size for part in model.children() if (size := getattr(part, 'img_size', None))), None)
    like = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), torch.zeros(0))
    noise = torch.randn(number, channels, *(made_for or (height, width)), generator=torch.Generator().manual_seed(0))
    return noise.to(like.device, like.dtype)
