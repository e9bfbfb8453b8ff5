"""Classes by name: a decorator registers them, a setting chooses them."""
import importlib
import pkgutil
from collections.abc import Callable, Iterable
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
