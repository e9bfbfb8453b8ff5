"""The bottleneck head: what the neck and the head of the distribution-balanced authors compute."""
import numpy as np
import pytest
import timm
import torch
from torch import nn

import nbn_timm
from nbn_timm.errors import InputError
from nbn_timm.layers import BottleneckLinear, ExpertHead, convert_head
from nbn_timm.models.transfer import begin_classifier, load_pretrained_file
from nbn_timm.models.tuning.classifier import with_head
from nbn_timm.models.weight_files import save_weights
from nbn_timm.second_stages.crt import reset

pytestmark = pytest.mark.fast


def test_it_is_the_authors():
    """PFC and ClsHead of wutong16/DistributionBalancedLoss, 14460d0, without dropout, in training and evaluation."""
    torch.manual_seed(0)
    head, x = BottleneckLinear(6, 3, 4, 0.0).double(), torch.randn(5, 6).double()
    weights = {name: value.detach().numpy() for name, value in head.state_dict().items()}
    reduced = x.numpy() @ weights['reduce.weight'].T + weights['reduce.bias']
    spread = np.sqrt(reduced.var(axis=0) + 1e-5)
    expected = (reduced - reduced.mean(axis=0)) / spread @ weights['fc.weight'].T
    np.testing.assert_allclose(head(x).detach().numpy(), expected, rtol=1e-10)
    seen = {'mean': 0.1 * reduced.mean(axis=0), 'var': 0.9 + 0.1 * reduced.var(axis=0, ddof=1)}
    expected = (reduced - seen['mean']) / np.sqrt(seen['var'] + 1e-5) @ weights['fc.weight'].T
    np.testing.assert_allclose(head.eval()(x).detach().numpy(), expected, rtol=1e-10)


def test_its_weights_begin_as_the_authors():
    torch.manual_seed(0)
    head = BottleneckLinear(2048, 20)
    assert float(head.reduce.weight.detach().std()) == pytest.approx((2 / 256) ** 0.5, rel=0.01)
    assert float(head.fc.weight.detach().std()) == pytest.approx(0.01, rel=0.05) and head.drop.p == 0.5
    assert not head.reduce.bias.any() and not head.fc.bias.any()


def trained_head(*sizes):
    head = BottleneckLinear(*sizes)
    for parameter in head.parameters():
        nn.init.normal_(parameter)
    nn.init.normal_(head.norm.running_mean)
    nn.init.uniform_(head.norm.running_var, 0.5, 2)
    return head.eval()


def test_it_folds_into_one_layer():
    torch.manual_seed(0)
    model = with_head(timm.create_model('resnet20', num_classes=3), 'bottleneck', {'width': 8, 'dropout': 0.2}).eval()
    name = 'fc'
    setattr(model, name, trained_head(model.num_features, 3, 8))
    folded, x = nbn_timm.fold_nbn(model), torch.randn(4, 3, 16, 16)
    assert type(folded.fc) is nn.Linear
    torch.testing.assert_close(folded(x), model(x), rtol=1e-4, atol=1e-4)
    experts = ExpertHead('bottleneck', 12, 3, 2).eval()
    torch.testing.assert_close(experts.fuse()(x := torch.randn(4, 12)), experts(x), rtol=1e-4, atol=1e-5)


def test_another_set_of_classes_keeps_the_bottleneck(tmp_path):
    """Rows are of classes in the last layer alone."""
    def network(classes):
        return with_head(timm.create_model('resnet20', num_classes=classes), 'bottleneck', {'width': 8})

    first, second = network(5), network(3)
    first.fc = trained_head(first.num_features, 5, 8)
    save_weights(first.state_dict(), tmp_path / 'x.safetensors')
    told = load_pretrained_file(second, tmp_path / 'x.safetensors', [(0, 4), (2, 1)])
    assert 'of which 2 classes of the same name keep their rows' in told
    for part in ('reduce', 'norm'):
        for one, other in zip(first.fc.get_submodule(part).state_dict().values(),
                              second.fc.get_submodule(part).state_dict().values(), strict=True):
            assert torch.equal(one, other)
    assert torch.equal(second.fc.fc.weight[[0, 2]], first.fc.fc.weight[[4, 1]]) and not second.fc.fc.weight[1].any()


def test_it_begins_anew_without_dying():
    model = with_head(timm.create_model('resnet20', num_classes=3), 'bottleneck', {})
    begin_classifier(model)
    assert not model.fc.fc.weight.any() and model.fc.reduce.weight.any()
    reset(model.fc, 'x')
    assert model.fc.fc.weight.any()


@pytest.mark.parametrize('settings, said', [({'width': 0}, 'width=0: give a whole number'), ({'width': 2.5}, 'width'),
                                            ({'dropout': 1}, 'dropout=1: give a number from 0, below 1'),
                                            ({'scale': 2}, "no setting 'scale' in head_kwargs: it has width and")])
def test_wrong_settings_are_named(settings, said):
    with pytest.raises(InputError, match=said):
        convert_head(nn.Linear(4, 2), 'bottleneck', settings)
