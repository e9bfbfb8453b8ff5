"""A part of an epoch, which a loader gives as if it were all of it."""
from typing import NamedTuple


class Part(NamedTuple):
    """A part of an epoch in batches of one process: from `begin` on, and before `end`, or to the end of the epoch.

    Where an epoch has parts, all random generators begin anew with each, from seeds that `begin` enters.
    """

    begin: int = 0
    end: int | None = None

    def images(self, batch_size: int) -> slice:
        """Its images among those of the process."""
        return slice(self.begin * batch_size, None if self.end is None else self.end * batch_size)


WHOLE = Part()
