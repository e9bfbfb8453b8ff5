"""Sharded training (FSDP2) of networks whose layers share an alpha: what docs/freezing.md says of it, over gloo."""
import pytest
import timm
import torch
import torch.distributed as dist
from forks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import nbn_timm  # noqa: F401  (registers the models)


def network(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model('resnet20_nbn', num_classes=3, **kwargs)


def train_both(groups: tuple[str, ...], share_alpha: bool) -> None:
    """Train a sharded network beside a whole one; outputs, weights and keys are the same."""
    dist.init_process_group('gloo')
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    whole, sharded = network(share_alpha=share_alpha), network(share_alpha=share_alpha)
    for name in groups:
        fully_shard(sharded.get_submodule(name), mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    images = torch.randn(4, 3, 16, 16)  # the same in all processes
    for model in (whole, sharded):
        optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1, momentum=0.9)
        for _ in range(2):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(whole.eval()(images), sharded.eval()(images))
    gathered = {name: value.full_tensor() if hasattr(value, 'full_tensor') else value
                for name, value in sharded.state_dict().items()}
    torch.testing.assert_close(gathered, dict(whole.state_dict()))
    dist.destroy_process_group()


def refuse_groups_of_a_stage() -> None:
    dist.init_process_group('gloo')
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    for second in ('layer3.1', ''):
        sharded = network()
        fully_shard(sharded.layer3[0], mesh=mesh)
        with pytest.raises((TypeError, ValueError, RuntimeError, NotImplementedError, AssertionError)):
            fully_shard(sharded.get_submodule(second), mesh=mesh)
    dist.destroy_process_group()


@pytest.mark.parametrize('size', [1, 2])
@pytest.mark.parametrize(('groups', 'share_alpha'), [
    ((), True), (('layer3',), True), (('layer3.0', 'layer3.1', 'layer3.2'), False)],
    ids=['whole', 'stage', 'blocks with an alpha each'])
def test_a_sharded_network_learns_what_a_whole_one_does(groups, share_alpha, size):
    run_ranks(train_both, groups, share_alpha, size=size)


def test_torch_refuses_to_shard_the_blocks_of_a_stage_that_shares_its_alpha():
    run_ranks(refuse_groups_of_a_stage, size=1)
