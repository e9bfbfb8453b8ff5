"""A progress line that a person can read, and on a terminal a bar."""
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta

from tqdm import tqdm

from nbn_timm.bars import bar


class Progress:
    """Rate and time left of a run, measured over its present epoch.

    With a bar there are no lines on a terminal but that of each epoch's end; a file gets all of them.

    Args:
        epochs: Of the whole run.
        updates_per_epoch: Optimizer steps.
        interval: Updates between lines; the last update of an epoch always gives one.
        emit: Receives each line; None for processes that stay silent.
        clock: Seconds.
        with_bar: Draw a bar on the standard error.
    """

    def __init__(
            self,
            epochs: int,
            updates_per_epoch: int,
            interval: int,
            emit: Callable[[str], None] | None = None,
            clock: Callable[[], float] = time.monotonic,
            with_bar: bool = False,
    ) -> None:
        self.epochs = epochs
        self.updates_per_epoch = updates_per_epoch
        self.interval = interval
        self.emit = emit
        self.clock = clock
        self.with_bar = with_bar
        self._bar: tqdm | None = None
        self._done = 0

    def start(self, epoch: int, done: int = 0, seconds: float = 0.0) -> None:
        """Begin timing `epoch` (0-based), or go on where so many updates are done and took so long."""
        self.end()
        self.epoch = epoch
        self.began = self.clock() - seconds
        self._done, self._loss = done, ''
        if self.with_bar:
            self._bar = bar(self.updates_per_epoch, f'epoch {epoch + 1}/{self.epochs}', initial=done,
                            bar_format='{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}')

    @property
    def seconds(self) -> float:
        """Since the epoch began."""
        return self.clock() - self.began

    def due(self, update: int) -> bool:
        """Whether update number `update` (0-based) ends with a line."""
        return (update + 1) % self.interval == 0 or update + 1 == self.updates_per_epoch

    def line(self, update: int, loss: float, lr: float, images: int) -> str:
        """Describe the state after update `update`: mean loss and number of images so far in this epoch."""
        done = update + 1
        width = len(str(self.updates_per_epoch))
        return (f'epoch {self.epoch + 1}/{self.epochs}  step {done:>{width}}/{self.updates_per_epoch}  '
                f'loss {loss:.4f}  lr {lr:.3g}  {self._rate(done, images)}')

    def advance(self, images: int) -> None:
        """Move the bar on by an update, with the number of images so far in this epoch; waits for no device."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(f'{self._loss}{self._rate(self._done, images)}', refresh=False)
            self._bar.update()

    def show(self, update: int, loss: float, lr: float, images: int) -> None:
        """Emit `line(...)`, or tell the bar the loss."""
        if self._bar is not None:
            self._loss = f'loss {loss:.4f}  '
            if update + 1 == self.updates_per_epoch:
                self.end()
            elif _on_same_terminal():
                return
        if self.emit is not None:
            self.emit(self.line(update, loss, lr, images))

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _rate(self, done: int, images: int) -> str:
        seconds = max(self.seconds, 1e-9)
        updates_left = (self.epochs - self.epoch) * self.updates_per_epoch - done
        left = timedelta(seconds=round(seconds / done * updates_left))
        return f'{images / seconds:,.0f} images/s  {left} left'


def _on_same_terminal() -> bool:
    """Whether lines would get in the way of the bar."""
    with suppress(ValueError, AttributeError):
        return sys.stdout.isatty()
    return False
