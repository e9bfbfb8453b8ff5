"""Training a network on attacked pictures."""
import torch
from timm.task import ClassificationTask
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nbn_timm.adversarial import ADVERSARIAL, AdversarialTraining
from nbn_timm.adversarial.settings import AdversarialSettings
from nbn_timm.attacks import Pixels, ascend, under_attack
from nbn_timm.data import DataDefaults, epoch_seed
from nbn_timm.training.distributed import World

_NEAR = 0.001  # standard deviation of a start near the picture, in pixels: of TRADES, MART and RoBal
_OWN_DRAWS = 0x5eed  # keeps the attack's numbers apart from those of the augmentation


class BatchAttack:
    """Attacks batches of training, each time with numbers of its own generator.

    The generator begins anew with every epoch, from the seed of the run, the epoch and the process, so a resumed run
    attacks as it would have, and nothing else draws other numbers because of it.

    Args:
        settings: Of adversarial training.
        method: What the attack climbs.
        pixels: The normalisation of the images.
        seed: Of the run.
        world: This process.
    """

    def __init__(
            self, settings: AdversarialSettings, method: AdversarialTraining, pixels: Pixels, seed: int, world: World,
    ) -> None:
        self.settings = settings
        self.method = method
        self.pixels = pixels
        self.seed = seed
        self.rank = world.rank
        self.generator = torch.Generator(world.device)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, begin: int = 0) -> None:
        """Begin `epoch` (0-based), or a part of it."""
        self.generator.manual_seed(epoch_seed(self.seed, epoch, self.rank, begin) ^ _OWN_DRAWS)

    def __call__(self, network: nn.Module, images: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """What the attack makes of normalised images; the network has its modes and, as asked, statistics again."""
        settings, method = self.settings, self.method
        pixels = self.pixels.of(images)

        def logits(changed: torch.Tensor) -> torch.Tensor:
            return method.logits_of(network(self.pixels.images(changed, images.dtype)))

        with under_attack(network, settings.adv_bn):
            of_picture = None
            if method.sees_picture:
                with torch.no_grad():
                    of_picture = method.logits_of(network(images))
            changed = ascend(
                lambda changed: method.objective(logits(changed), target, of_picture), pixels, self.start(pixels),
                settings.adv_eps, settings.adv_step, settings.adv_steps)
        return self.pixels.images(changed, images.dtype)

    def start(self, pixels: torch.Tensor) -> torch.Tensor:
        """Where to begin; as in the authors' codes it may lie outside of [0, 1] until the first step."""
        kind, eps = self.settings.adv_start or self.method.usual_start, self.settings.adv_eps
        if kind == 'none':
            return pixels.clone()
        noise = torch.empty_like(pixels)
        if kind == 'gaussian':
            return pixels + noise.normal_(0, _NEAR, generator=self.generator)
        return pixels + noise.uniform_(-eps if kind == 'uniform' else 0, eps, generator=self.generator)


class AdversarialTask(ClassificationTask):
    """Train a network by a method of adversarial training.

    The attack goes through the network without DistributedDataParallel, since it takes no gradients of parameters.

    Args:
        model: The network.
        criterion: The loss.
        attack: Changes each batch, and has the method.
        device: Of everything.
    """

    def __init__(
            self, model: nn.Module, criterion: nn.Module, attack: BatchAttack, device: torch.device | None = None,
    ) -> None:
        super().__init__(model, criterion, device=device, verbose=False)
        self.attack = attack

    def set_epoch(self, epoch: int, begin: int = 0) -> None:
        """Begin `epoch` (0-based), or a part of it."""
        self.attack.set_epoch(epoch, begin)

    def forward(self, input: torch.Tensor, target: torch.Tensor) -> dict[str, torch.Tensor]:
        """Images [B, 3, H, W] and labels [B] to the loss."""
        network = self.trainable_module
        inner = network.module if isinstance(network, DistributedDataParallel) else network
        attacked = self.attack(inner, input, target)
        return {'loss': self.attack.method.loss(network, self.criterion, input, attacked, target)}


def build_attack(settings: AdversarialSettings, input_format: DataDefaults, seed: int, world: World) -> BatchAttack:
    """The attack of a run with --adversarial."""
    assert settings.adversarial is not None
    method = ADVERSARIAL.find(settings.adversarial)(settings.adv_weight, settings.adv_temperature)
    return BatchAttack(settings, method, Pixels.of_format(input_format, world.device), seed, world)
