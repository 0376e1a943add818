"""The registry, where a worker finds processors by name, and the imports that fill it."""

from __future__ import annotations

import importlib
import pkgutil
import typing as t

from .config import ConfigError
from .processor import AnyProcessor


class Registry:
    """The processors of one BeanQueue, by module and function name."""

    def __init__(self) -> None:
        self._processors: dict[tuple[str, str], AnyProcessor] = {}

    def __len__(self) -> int:
        return len(self._processors)

    def __iter__(self) -> t.Iterator[AnyProcessor]:
        return iter(self._processors.values())

    def add(self, processor: AnyProcessor) -> None:
        """Add a processor.

        :raises ValueError: if another function has that module and name. The same function may
            come again, as it does where an app factory defines it.
        """
        key = processor.module, processor.func_name
        known = self._processors.get(key)
        if known and getattr(known.func, "__code__", 0) is not getattr(
            processor.func, "__code__", 1
        ):
            raise ValueError(
                f"There are two processors called {processor.name}. Tasks find theirs by module"
                " and name: rename one."
            )
        self._processors[key] = processor

    def get(self, module: str, func_name: str) -> AnyProcessor | None:
        return self._processors.get((module, func_name))

    @property
    def channels(self) -> tuple[str, ...]:
        """Every channel that a processor names, in order of appearance."""
        return tuple(dict.fromkeys(processor.options.channel for processor in self))


def import_packages(names: t.Iterable[str]) -> None:
    """Import packages with all their submodules, so that their processors register.

    :raises ConfigError: for a package that is not there.
    """
    for name in names:
        try:
            package = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):  # something that it imports
                raise
            raise ConfigError(f"BQ_PROCESSOR_PACKAGES names {name}: {error}") from error
        for module in pkgutil.walk_packages(getattr(package, "__path__", ()), f"{name}."):
            if not module.name.endswith(".__main__"):
                importlib.import_module(module.name)
