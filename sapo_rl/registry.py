"""A named table of classes or functions, filled by a decorator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar, cast

from sapo_rl.errors import UserError, did_you_mean

T = TypeVar("T")
Entry = TypeVar("Entry")


class UnknownNameError(UserError, KeyError):
    """A name that the registry does not hold; the message lists those it does."""

    __str__ = Exception.__str__  # KeyError's would show the message in quotes


class Registry(Generic[T]):
    """Maps names to registered objects of one kind (`kind` is the word used in messages)."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register_module(self, name: str) -> Callable[[Entry], Entry]:
        """Return a decorator that enters its object under `name`.

        Raises:
            ValueError: another object holds that name already.
        """

        def enter(entry: Entry) -> Entry:
            if self._entries.setdefault(name, cast(T, entry)) is not entry:
                raise ValueError(f"{self.kind} '{name}' is registered twice")
            return entry

        return enter

    def get(self, name: str) -> T:
        """Return the object registered under `name`.

        Raises:
            UnknownNameError: with the nearest name and the list of all.
        """
        if name in self._entries:
            return self._entries[name]
        raise UnknownNameError(f"unknown {self.kind} '{name}'; {did_you_mean(name, self._entries)}")

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._entries))
