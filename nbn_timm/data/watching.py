"""A folder that is watched: pictures as they appear, each once, and none before it is written."""
import os
from collections.abc import Callable, Collection
from dataclasses import dataclass

from nbn_timm.data.pictures import find_images

_PATIENCE = 10  # looks at an unchanged file that cannot be read, before it is taken for damaged


@dataclass
class _Seen:
    """What is known of a file."""

    state: tuple[int, int] = (-1, -1)  # size and time of change
    unchanged: int = 0  # looks since
    done: bool = False
    damaged: bool = False


class FolderWatch:
    """Looks at a folder, and all below it.

    A picture is ready when it has not changed between two looks. One that cannot be read may still be on its way: it is
    tried again at every look, and taken for damaged when it stays as it is; if it changes afterwards, it is tried
    again.

    Args:
        folder: Which.
        answered: Names of files that are left out.
        name: What a file is called among these.
    """

    def __init__(self, folder: str, answered: Collection[str] = (), name: Callable[[str], str] = str) -> None:
        self.folder = folder
        self._answered = answered
        self._name = name
        self._seen: dict[str, _Seen] = {}

    def ready(self) -> list[str]:
        """Look, and give the pictures that are to be answered now, in natural order."""
        found = []
        for path in find_images([self.folder]).files:
            seen = self._seen.setdefault(path, _Seen())
            if seen.done or self._name(path) in self._answered:
                continue
            try:
                status = os.stat(path)
            except OSError:  # gone again
                continue
            state = status.st_size, status.st_mtime_ns
            if state != seen.state:
                self._seen[path] = _Seen(state)
            elif not seen.damaged:
                seen.unchanged += 1
                if state[0]:
                    found.append(path)
        return found

    def gives_up(self, path: str) -> bool:
        """Whether a ready file that cannot be read is damaged, rather than not yet written."""
        return self._seen[path].unchanged >= _PATIENCE

    def done(self, path: str, read: bool) -> None:
        """Say what became of a ready file."""
        seen = self._seen[path]
        seen.done = read
        seen.damaged = not read and self.gives_up(path)
