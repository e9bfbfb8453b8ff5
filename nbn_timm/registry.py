"""Classes by name: a decorator registers them, a setting chooses them."""
import importlib
import pkgutil
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

from nbn_timm.errors import InputError, nearest

T = TypeVar('T')
MemberT = TypeVar('MemberT')


class Registry(dict[str, type[T]]):
    """The classes of one kind by name, in the order in which they were registered.

    Args:
        kind: What each of them is, in one or two words for messages, as 'loss'.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def register(self, name: str) -> Callable[[type[MemberT]], type[MemberT]]:
        """Class decorator: add the class under `name`, which must be free."""
        def add(member: type[MemberT]) -> type[MemberT]:
            if name in self:
                raise ValueError(f"the {self.kind} '{name}' is registered twice: {self[name]} and {member}")
            self[name] = member  # type: ignore[assignment]
            return member
        return add

    def find(self, name: str) -> type[T]:
        """The class of that name.

        Raises:
            InputError: There is none; the nearest name is given.
        """
        if name not in self:
            raise InputError(f"unknown {self.kind} '{name}' (there are {', '.join(self)}){nearest(name, self)}")
        return self[name]


def import_modules(package: str, path: Iterable[str]) -> None:
    """Import every module of a package's folder, so that each registers what it holds.

    Args:
        package: `__name__` of the package.
        path: Its `__path__`.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f'{package}.{module.name}')


def refuse_unknown(
        what: str,
        given: Iterable[str],
        settings: Collection[str],
        known: Collection[str] | None = None,
) -> None:
    """Refuse settings that a thing does not have.

    Args:
        what: The thing, for the message.
        given: Names of settings.
        settings: Those that it has.
        known: Those that the message names, if these are more.

    Raises:
        InputError: Names the first that it has not, and the nearest one.
    """
    known = known or settings
    for key in given:
        if key not in settings:
            raise InputError(f"{what} has no setting '{key}' (it has {', '.join(known) or 'none'})"
                             f'{nearest(key, known)}')
