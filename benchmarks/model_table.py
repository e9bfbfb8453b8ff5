"""Parameters and multiply-adds of the zoo, as the Markdown table of README: `python benchmarks/model_table.py`.

Multiply-adds of convolutions and linear layers for one image, see cost.py; thousands of classes change the classifier
alone.
"""
import timm
from cost import multiply_adds, parameters

import nbn_timm  # noqa: F401

MODELS = [
    'resnet10_nbn', 'resnet50_nbn', 'resnet101_nbn', 'resnet152_nbn', 'resnext50_nbn', 'resnext101_nbn',
    'resnet10_ride_nbn', 'resnet50_ride_nbn', 'resnext50_ride_nbn',
    'resnet14_wide_nbn', 'resnet20_nbn', 'resnet32_nbn', 'resnet44_nbn', 'resnet56_nbn', 'resnet32_ride_nbn',
    'resnet14_wide_shike_nbn', 'resnet32_shike_nbn', 'resnet32_bbn', 'wrn_16_2_nbn', 'resnet18_cifar_nbn',
    'wrn_34_10_nbn',
]


def count(name: str) -> tuple[int, int, tuple[int, int, int]]:
    """Parameters, multiply-adds and input size of a model with its default number of classes."""
    model = timm.create_model(name, device='meta')
    size = model.pretrained_cfg['input_size']
    return parameters(model), multiply_adds(model, size), size


def main() -> None:
    print('| model | input | classes | parameters | multiply-adds |\n|---|---|---|---|---|')
    for name in MODELS:
        number, macs, size = count(name)
        classes = timm.get_pretrained_cfg(name).num_classes
        amount = f'{macs / 1e9:.2f} G' if macs >= 1e9 else f'{macs / 1e6:.1f} M'
        print(f'| `{name}` | {size[-1]} | {classes} | {number:,} | {amount} |')


if __name__ == '__main__':
    main()
