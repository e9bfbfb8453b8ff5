"""What a run keeps: its checkpoints, the best epoch so far, and its log."""
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.task import TrainingTask
from torch.amp import GradScaler

from nbn_timm.errors import InputError
from nbn_timm.evaluation import Result, label_sets
from nbn_timm.evaluation.result import no_metrics
from nbn_timm.models.weight_files import read_checkpoint
from nbn_timm.training.curriculum import Curriculum
from nbn_timm.training.log import RunLog
from nbn_timm.training.loop import EpochResult
from nbn_timm.training.middle import (
    BEGINNING,
    MIDDLE,
    EpochParts,
    Middle,
    find_middle,
    middle_state,
    restore_statistics,
)
from nbn_timm.training.plan import Plan
from nbn_timm.training.run_checkpoint import (
    BEST,
    LAST,
    Best,
    checkpoint_state,
    is_better,
    load_task,
    resume_run,
    save_checkpoint,
    save_recovery,
)

_logger = logging.getLogger(__name__)


class Keeper:
    """Keeps a run's checkpoints and log, on the first process; every process knows the best epoch.

    Args:
        plan: Of the run.
        task: Whose weights are kept.
        optimizer: Whose state is kept.
        scaler: Of float16.
        curriculum: Whose levels are kept.
    """

    def __init__(
            self,
            plan: Plan,
            task: TrainingTask,
            optimizer: torch.optim.Optimizer,
            parts: EpochParts,
            scaler: GradScaler | None = None,
            curriculum: Curriculum | None = None,
    ) -> None:
        self.plan = plan
        self.task = task
        self.optimizer = optimizer
        self.parts = parts
        self.scaler = scaler
        self.curriculum = curriculum
        self.best: Best | None = None
        self.log: RunLog | None = None
        self.resumed: Path | None = None  # a checkpoint in the middle of an epoch

    def resume(self, checkpoint: Path | None) -> tuple[int, Middle]:
        """Put the run into the state of a checkpoint, if there is one, and open the log.

        Args:
            checkpoint: To go on from.

        Returns:
            The epoch to begin (0-based), and where in it.

        Raises:
            InputError: The checkpoint is of another run.
        """
        plan, start_epoch, middle = self.plan, 0, BEGINNING
        if checkpoint is not None:
            middle = find_middle(checkpoint, read_checkpoint(checkpoint), self.parts, plan.world)
            self.resumed = checkpoint if middle.updates else None
            start_epoch, best = resume_run(
                checkpoint, self.task, self.optimizer, plan.settings.model.model, plan.record(),
                plan.splits.classes, self.scaler, self.curriculum)
            goes_on_here = checkpoint.resolve().parent == plan.folder.resolve() and (plan.folder / BEST).exists()
            self.best = best if goes_on_here else None
            self._refuse_earlier(start_epoch)
        if plan.world.is_primary:
            keeping = plan.settings.keeping
            self.log = RunLog(plan.folder, start_epoch, keeping.log_tensorboard,
                              keeping.wandb_project if keeping.log_wandb else None, plan.record())
        return start_epoch, middle

    def restore(self) -> None:
        """In the middle of an epoch: undo what its beginning has changed once more, and what processes share."""
        assert self.resumed is not None
        state = read_checkpoint(self.resumed)
        load_task(state, self.task)
        restore_statistics(self.resumed, state, self.task, self.plan.world)

    def keep_middle(self, epoch: int, middle: Middle) -> None:
        """Write a checkpoint in the middle of an epoch (0-based)."""
        state = middle_state(middle, self.parts, self.task, self.plan.world)
        if state is not None:
            save_recovery(self.plan.folder, self._state(epoch) | {MIDDLE: state})

    def _refuse_earlier(self, start_epoch: int) -> None:
        """Refuse to call an earlier epoch the last one, of a run that has ended and was to keep the best.

        Raises:
            InputError: That is asked for.
        """
        settings = self.plan.settings
        if (settings.run.kept_epoch == 'last' and start_epoch >= settings.schedule.epochs and self.best is not None
                and self.best.epoch + 1 < start_epoch):
            raise InputError(f"the run in '{self.plan.folder}' has ended with epoch {self.best.epoch + 1} of "
                             f'{start_epoch}, its best one, so --kept-epoch last comes too late: evaluate {LAST}, or '
                             'give --kept-epoch best')

    def gave_up(self, epoch: int) -> bool:
        """Whether the run ends before an epoch (0-based), since --patience epochs have brought nothing better.

        That is known from the best epoch alone, which checkpoints hold; so a resumed run ends where it would have.
        """
        settings = self.plan.settings
        patience, interval = settings.schedule.patience, settings.keeping.val_interval
        evaluated = epoch - epoch % interval  # epochs up to the last evaluation
        if patience is None or self.best is None or evaluated - (self.best.epoch + 1) < patience:
            return False
        _logger.info('Validation %s has not become better since epoch %d, so the run ends after epoch %d of %d '
                     '(--patience %d).', settings.run.eval_metric, self.best.epoch + 1, epoch, settings.schedule.epochs,
                     patience)
        return True

    def keep(
            self,
            epoch: int,
            trained: EpochResult,
            result: Result | None,
            seconds: Mapping[str, float] | None = None,
    ) -> None:
        """Log an epoch (0-based) and write its checkpoint; the validation split, or --kept-epoch, decides whether it is
        the one to end with.

        Args:
            epoch: 0-based.
            trained: What the training gave.
            result: What the evaluation gave.
            seconds: Of the parts of the epoch, for the log.
        """
        metric, is_best = self._metric(result), False
        run = self.plan.settings.run
        if metric is not None and (run.kept_epoch == 'last' or is_better(metric, self.best, run.eval_metric)):
            self.best, is_best = Best(metric, epoch), True
        if self.log is None:
            return
        training: dict[str, Any] = {
            'loss': trained.loss, 'images_per_second': round(trained.images / trained.seconds, 1)}
        unknown = dict.fromkeys(label_sets.METRICS) if self.plan.splits.label_sets else no_metrics()
        evaluated = result.metrics() if result else None if self.plan.watched is None else unknown
        self.log.write(epoch, training, evaluated, trained.lr, seconds)
        save_checkpoint(self.plan.folder, self._state(epoch, metric), is_best,
                        history=self.plan.settings.keeping.checkpoint_hist - 1)

    def close(self) -> None:
        """Finish the log, and wait until the files of the run are there for all processes."""
        if self.log is not None:
            self.log.close()
        self.plan.world.barrier()

    def _state(self, epoch: int, metric: float | None = None) -> dict[str, Any]:
        plan = self.plan
        return checkpoint_state(self.task, self.optimizer, epoch, plan.settings.model.model, plan.record(),
                                plan.splits.classes, metric, self.best, self.scaler, self.curriculum)

    def _metric(self, result: Result | None) -> float | None:
        if result is None or self.plan.splits.val is None:
            return None
        return result.metrics()[self.plan.settings.run.eval_metric]
