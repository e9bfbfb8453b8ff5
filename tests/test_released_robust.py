"""Released files of RoBal, TRADES and MART: recognised by their keys, and loaded into this package's networks.

The authors' own classes (RoBal's `WideResNet` with `CosPlus_Classifier`, commit ab2f3a7, and its `ResNet18`) with
random weights and statistics, saved as their code saves them and opened here, give the same logits up to 4.5e-7 of 1.16
and 3.8e-8 of 0.18 (2026-11). The released files themselves were not at hand.
"""
import pytest
import timm
import torch

import nbn_timm  # noqa: F401  (registers the models)
from nbn_timm.models._released import recognize
from nbn_timm.trained.opening import open_trained


def saved(tmp_path, entries) -> str:
    torch.save(entries, tmp_path / 'released.pt')
    return str(tmp_path / 'released.pt')


def outputs(model, seed=0) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize('head', ['cosplus', 'linear'])
def test_robal(head, tmp_path):
    """`model.module.backbone.*` and `classifier.*`, with a bias of zeros and an average of features, that drop out."""
    ours = timm.create_model('wrn_16_2', num_classes=10, head=head)
    classifier = 'classifier.' if head == 'cosplus' else 'classifier.fc.'
    entries = {f'model.module.{classifier + key[3:] if key.startswith("fc.") else f"backbone.{key}"}': value
               for key, value in ours.state_dict().items()}
    if head == 'cosplus':
        entries |= {'model.module.classifier.bias': torch.zeros(10), 'model.module.classifier.moving_ed':
                    torch.ones(1, 128)}
    found = recognize(entries)
    assert (found.arch, found.form, found.num_classes) == ('wrn_16_2', 'RoBal', 10)
    assert found.model_args == ({'head': 'cosplus'} if head == 'cosplus' else {})
    opened = open_trained(saved(tmp_path, entries))
    assert opened.name == 'wrn_16_2' and torch.equal(outputs(opened.model), outputs(ours))


def test_trades_and_mart(tmp_path):
    wide = timm.create_model('wrn_16_2', num_classes=10)
    entries = dict(wide.state_dict())
    entries |= {f'sub_{key}': value for key, value in entries.items() if key.startswith('block1.')}
    assert recognize(entries).form == 'TRADES'
    opened = open_trained(saved(tmp_path, entries))
    assert opened.name == 'wrn_16_2' and torch.equal(outputs(opened.model), outputs(wide))

    small = timm.create_model('resnet18_cifar', num_classes=10)
    entries = {f'module.{key}'.replace('.downsample.', '.shortcut.').replace('.fc.', '.linear.'): value
               for key, value in small.state_dict().items()}
    opened = open_trained(saved(tmp_path, entries))
    assert opened.name == 'resnet18_cifar' and torch.equal(outputs(opened.model), outputs(small))


def test_the_wide_network_of_the_papers():
    model = timm.create_model('wrn_34_10', num_classes=10, device='meta')
    assert sum(parameter.numel() for parameter in model.parameters()) == 46_160_474
    assert recognize(model.state_dict()).arch == 'wrn_34_10'
    assert recognize(timm.create_model('wrn_34_10_nbn_lr', device='meta').state_dict()).arch == 'wrn_34_10_nbn_lr'
    assert recognize(timm.create_model('resnet18_cifar_nbn', device='meta').state_dict()).arch == 'resnet18_cifar_nbn'
