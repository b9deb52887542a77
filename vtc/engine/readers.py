"""Who reads a signal: functions by the name of the signal, one set in each place that holds parts of them."""

from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class Readers(dict[str, F]):
    """Signal name -> the function that reads it.

    Example:
        >>> READERS: Readers[Callable[[int], int]] = Readers()
        >>> @READERS.reads("double")
        ... def _double(x):
        ...     return 2 * x
        >>> READERS["double"](4)
        8
    """

    def reads(self, *names: str) -> Callable[[F], F]:
        """Decorator of the function that reads the signals `names`."""

        def register(reader: F) -> F:
            assert not self.keys() & set(names), f"two functions read {self.keys() & set(names)}"
            self.update(dict.fromkeys(names, reader))
            return reader

        return register
