"""The registry, where a worker finds processors by name, and the imports that fill it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import types
import typing as t

from .exceptions import ConfigError
from .log import log
from .processor import AnyProcessor


class Origin(t.NamedTuple):
    """Where a processor comes from: what tells it from others of its name."""

    #: Where ``@bq.processor()`` stands: file and line.
    file: str
    line: int
    #: The function's code, below its decorators; None of what is compiled or hidden.
    code: types.CodeType | None
    module: dict[str, t.Any]
    #: importlib.reload() runs a module in its old globals, but gives it a new spec.
    spec: t.Any

    @classmethod
    def of(cls, func: t.Any, frame: types.FrameType) -> Origin:
        """Tell where a function comes from.

        :param frame: where it is made a processor.
        """
        inner = inspect.unwrap(func)
        module = getattr(inner, "__globals__", frame.f_globals)
        code = getattr(inner, "__code__", None)
        return cls(frame.f_code.co_filename, frame.f_lineno, code, module, module.get("__spec__"))

    def is_of(self, other: Origin) -> bool:
        """Tell whether it is the same function, which an app factory makes anew, say."""
        return (self.file, self.line, self.code) == (other.file, other.line, other.code)

    def follows(self, other: Origin) -> bool:
        """Tell whether it comes from a later run of the same module, or from later input."""
        interactive = self.module.get("__name__") == "__main__"
        if self.file != other.file:
            return interactive  # each cell of a notebook is a file of its own
        again = self.module is not other.module or self.spec is not other.spec
        return again or (interactive and self.line == other.line)  # at the prompt, all are <stdin>

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Registry:
    """The processors of one BeanQueue, by module and function name."""

    def __init__(self) -> None:
        self._processors: dict[tuple[str, str], AnyProcessor] = {}
        self._origins: dict[tuple[str, str], Origin] = {}

    def __len__(self) -> int:
        return len(self._processors)

    def __iter__(self) -> t.Iterator[AnyProcessor]:
        return iter(self._processors.values())

    def add(self, processor: AnyProcessor, origin: Origin) -> None:
        """Add a processor.

        The same function may come again, as it does where an app factory defines it, and so may
        another one where a module is loaded again, or a cell of a notebook.

        :raises ValueError: if there is another function of that module and name beside it.
        """
        key = processor.module, processor.func_name
        if (known := self._origins.get(key)) is not None:
            again = origin.is_of(known)
            if not again and not origin.follows(known):
                raise ValueError(
                    f"There are two processors called {processor.name}, at {known} and {origin}."
                    " Tasks find theirs by module and name: rename one."
                )
            say = log.info if again else log.warning
            say("%s, from %s, replaces that from %s", processor.name, origin, known)
        self._processors[key] = processor
        self._origins[key] = origin

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
