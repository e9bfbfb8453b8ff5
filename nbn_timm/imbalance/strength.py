"""How strongly the prior is to be taken off the logits of a finished network: measured on validation pictures.

The rule of decision is argmax of z - (tau - t) log p + log q, with logits z of a network whose loss has taken the prior
off by the strength t (0 for cross-entropy, 1 for balanced softmax), shares p of the classes in training, and q in the
target. With tau 1 it is Bayes' rule for q, if the network were perfectly calibrated (Menon et al., "Long-Tail Learning
via Logit Adjustment", ICLR 2021, eq. 9 and 10). Networks are not, so that another tau may be better.
"""
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nbn_timm.data.classes import Classes
from nbn_timm.errors import InputError

TAUS = tuple(round(0.1 * index, 1) for index in range(21))
CONSISTENT = 1.0
_LITTLE = 0.01  # share of the target that may be left unmeasured
_NAMED = {'balanced': 'mean class accuracy', 'natural': 'accuracy'}


@dataclass(frozen=True)
class ChosenStrength:
    """A strength and what it does on the validation pictures; accuracies in percent.

    Attributes:
        tau: The strength.
        offset: What is added to the logits, float32 [C]; its mean is 0.
        accuracy, overall: In the target's shares, and in those of training.
        consistent: Accuracy in the target's shares with tau 1.
        plain: Accuracy in the shares of training by the rule that is made for them, which is about that of plain
            cross-entropy.
        why: A sentence without a full stop.
        images: Validation pictures that were counted; 0 where nothing was measured.
    """

    tau: float
    offset: torch.Tensor
    accuracy: float | None
    overall: float | None
    consistent: float | None
    plain: float | None
    why: str
    images: int

    def lines(self) -> list[str]:
        """What a person should know."""
        said = [f'strength  {self.tau:g} of logit adjustment, {self.why}']
        if self.overall is not None and self.plain is not None:
            said.append(f'cost      overall accuracy {self.overall:.2f} where classes occur as in training, '
                        f'{self.plain:.2f} by the rule made for these')
        return said


class StrengthCurve:
    """Counts of right answers for each strength, by class: integers, which add up exactly over processes.

    Args:
        classes: The training set's, with their counts.
        target: Shares of the classes in the target, float64 [C], see `target_shares`.
        trained_tau: Strength by which the training loss has taken off the prior.
        taus: Strengths to try; 1 is always among them.
        device: Of the logits.
    """

    def __init__(
            self,
            classes: Classes,
            target: torch.Tensor,
            trained_tau: float = 0.0,
            taus: Sequence[float] = TAUS,
            device: torch.device | str = 'cpu',
    ) -> None:
        self.taus = tuple(sorted({*taus, CONSISTENT}))
        counts = classes.tensor().clamp(min=1)
        self.natural, self.target = counts / counts.sum(), target
        self.trained_tau = trained_tau
        rules = [self.offset(tau) for tau in self.taus]
        natural = _centred(trained_tau * self.natural.log())
        self.rules = torch.stack([*rules, natural]).to(device)
        size = classes.num_classes
        self.images = torch.zeros(size, dtype=torch.int64, device=device)
        self.right = torch.zeros(len(self.rules), size, dtype=torch.int64, device=device)
        self.changed = torch.zeros_like(self.right)  # right or wrong where tau 1 is the other

    def offset(self, tau: float) -> torch.Tensor:
        """What the rule of a strength adds to the logits, float32 [C], with mean 0."""
        return _centred(self.target.log() - (tau - self.trained_tau) * self.natural.log())

    def update(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Count the pictures of a batch.

        Args:
            logits: [B, C], finite.
            labels: [B].
        """
        logits, labels = logits.float(), labels.long()
        right = torch.stack([(logits + rule).argmax(dim=1) == labels for rule in self.rules])  # [T, B]
        reference = right[self.taus.index(CONSISTENT)]
        ones = torch.ones_like(labels)
        self.images.index_add_(0, labels, ones)
        self.right.index_add_(1, labels, right.long())
        self.changed.index_add_(1, labels, (right != reference).long())

    def reduce(self) -> None:
        """Add up the counts of all processes of the default group."""
        for counts in (self.images, self.right, self.changed):
            dist.all_reduce(counts)

    def choose(self, allowed_drop: float | None = None, name: str = 'balanced') -> ChosenStrength:
        """The best strength for the target: another one than 1 only if it gains more than chance would.

        Chance is the standard error of the gain, from the pictures that the two rules decide otherwise. A class counts
        as if it had two pictures more, one of them decided otherwise (as by Agresti and Coull, 1998): one or two
        pictures that both rules decide alike tell next to nothing, and it is such classes that a wrong strength costs.
        So few pictures in the validation split leave tau at 1.

        Args:
            allowed_drop: Percentage points of overall accuracy that may be lost against the rule that is made for the
                shares of training; None allows any.
            name: Of the target, for the sentence.

        Raises:
            InputError: There was no picture.
        """
        images = self.images.cpu().double()
        seen = images > 0
        if not bool(seen.any()):
            raise InputError('the validation split has no picture, so no strength can be chosen on it: leave it out, '
                             'or give one with pictures')
        weights = torch.where(seen, self.target, 0.0)
        weights = weights / weights.sum() / images.clamp(min=1)  # of one picture
        natural = torch.where(seen, self.natural, 0.0)
        natural = natural / natural.sum() / images.clamp(min=1)
        right, changed = self.right.cpu().double(), self.changed.cpu().double()
        accuracy, overall = 100 * right @ weights, 100 * right @ natural
        chance_of_change = torch.where(seen, (changed + 1) / (images + 2), 0.0)
        error = 100 * ((chance_of_change * images) @ weights.square()).sqrt()
        one = self.taus.index(CONSISTENT)
        found, measured = len(self.taus), f'{int(images.sum()):,} validation pictures'
        allowed = list(range(found))
        unmeasured = int((~seen).sum())
        if unmeasured and float(self.target[~seen].sum()) > _LITTLE:
            # A strength below 1 costs the rarest classes most, and these are the ones without a picture.
            allowed = [index for index in allowed if self.taus[index] >= CONSISTENT]
            measured += (f' (none of {unmeasured:,} class{"" if unmeasured == 1 else "es"}, so no strength below 1 was '
                         'tried)')
        if allowed_drop is not None:
            floor = float(overall[-1]) - allowed_drop
            allowed = [index for index in allowed if float(overall[index]) >= floor - 1e-9] or [
                index for index in range(found) if float(overall[index]) >= floor - 1e-9] or [
                max(range(found), key=lambda index: float(overall[index]))]
        best = max(allowed, key=lambda index: (round(float(accuracy[index]), 9), -abs(self.taus[index] - CONSISTENT)))
        gain, chance = float(accuracy[best] - accuracy[one]), float(error[best])
        metric = _NAMED.get(name, 'accuracy in the shares of the target')
        if one not in allowed:
            why = (f'the best {metric} that costs at most {allowed_drop:g} points of overall accuracy, on {measured}')
        elif best == one or gain <= chance:
            best, why = one, f'{measured} show no strength that is better beyond chance'
        else:
            why = (f'the best of {len(allowed)}: {metric} {gain:+.2f} against strength 1 on {measured}, with a '
                   f'standard error of {chance:.2f}')
        return ChosenStrength(self.taus[best], self.offset(self.taus[best]), float(accuracy[best]),
                              float(overall[best]), float(accuracy[one]), float(overall[-1]), why, int(images.sum()))

    def consistent(self) -> ChosenStrength:
        """Strength 1, without any measurement."""
        return ChosenStrength(CONSISTENT, self.offset(CONSISTENT), None, None, None, None,
                              'there is no validation split to measure another one on', 0)


def _centred(offset: torch.Tensor) -> torch.Tensor:
    return (offset - offset.mean()).float()
