"""A progress line that a person can read."""
import time
from collections.abc import Callable
from datetime import timedelta


class Progress:
    """Rate and time left of a run, measured over its present epoch.

    Args:
        epochs: Of the whole run.
        updates_per_epoch: Optimizer steps.
        interval: Updates between lines; the last update of an epoch always gives one.
        emit: Receives each line; None for processes that stay silent.
        clock: Seconds.
    """

    def __init__(
            self,
            epochs: int,
            updates_per_epoch: int,
            interval: int,
            emit: Callable[[str], None] | None = None,
            clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.epochs = epochs
        self.updates_per_epoch = updates_per_epoch
        self.interval = interval
        self.emit = emit
        self.clock = clock

    def start(self, epoch: int) -> None:
        """Begin timing `epoch` (0-based)."""
        self.epoch = epoch
        self.began = self.clock()

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return self.clock() - self.began

    def due(self, update: int) -> bool:
        """Whether update number `update` (0-based) ends with a line."""
        return (update + 1) % self.interval == 0 or update + 1 == self.updates_per_epoch

    def line(self, update: int, loss: float, lr: float, images: int) -> str:
        """Describe the state after update `update`: mean loss and number of images so far in this epoch."""
        done, seconds = update + 1, max(self.seconds, 1e-9)
        updates_left = (self.epochs - self.epoch) * self.updates_per_epoch - done
        left = timedelta(seconds=round(seconds / done * updates_left))
        width = len(str(self.updates_per_epoch))
        return (f'epoch {self.epoch + 1}/{self.epochs}  step {done:>{width}}/{self.updates_per_epoch}  '
                f'loss {loss:.4f}  lr {lr:.3g}  {images / seconds:,.0f} images/s  {left} left')

    def show(self, update: int, loss: float, lr: float, images: int) -> None:
        """Emit `line(...)`."""
        if self.emit is not None:
            self.emit(self.line(update, loss, lr, images))
