"""The registry, where a worker finds processors by name, and the imports that fill it."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import types
import typing as t

from .config import ConfigError
from .log import log
from .processor import AnyProcessor


class Source(t.NamedTuple):
    """What tells a processor's function from others of its name."""

    #: All code in it, each with its file. That of the function itself is not enough: all wrappers
    #: that one decorator makes share it.
    codes: list[tuple[str, types.CodeType]]
    file: str
    line: int
    module: dict[str, t.Any]
    #: importlib.reload() runs a module in its old globals, but gives it a new spec.
    spec: t.Any

    @classmethod
    def of(cls, processor: AnyProcessor) -> Source:
        functions = functions_in(processor.func)
        codes = [(each.__code__.co_filename, each.__code__) for each in functions]
        if not functions:  # compiled ones
            return cls(codes, processor.module, 0, {}, None)
        inner = max(  # and not what a decorator brings along
            reversed(functions),
            key=lambda each: (
                each.__code__.co_name == processor.func_name,
                each.__globals__.get("__name__") == processor.module,
            ),
        )
        code, module = inner.__code__, inner.__globals__
        return cls(codes, code.co_filename, code.co_firstlineno, module, module.get("__spec__"))

    def follows(self, other: Source) -> bool:
        """Tell whether it comes from a later run of the same module, or from later input."""
        interactive = self.module.get("__name__") == "__main__"
        if self.file != other.file:
            return interactive  # each cell of a notebook is a file of its own
        again = self.module is not other.module or self.spec is not other.spec
        return again or (interactive and self.line == other.line)  # at the prompt, all are <stdin>

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


def functions_in(func: t.Any) -> list[types.FunctionType]:
    """List the functions that a callable is made of: its own, and those that decorators hide."""
    found: list[types.FunctionType] = []
    left = [func]
    while left:
        each = left.pop()
        each = getattr(each, "__func__", each)  # of a method
        wrapped = getattr(each, "__wrapped__", None)
        inside: t.Iterable[t.Any] = ()
        if isinstance(each, types.FunctionType):
            if each in found:
                continue
            found.append(each)
            # A wrapper may have taken over the name, and nothing else, of what it calls.
            if wrapped is None and each.__name__ != each.__code__.co_name:
                empty = types.CellType()
                cells = each.__closure__ or ()
                inside = [cell.cell_contents for cell in cells if cell != empty]
        elif isinstance(each, functools.partial):
            inside = [each.func]
        else:
            inside = [type(each).__call__, *getattr(each, "__dict__", {}).values()]
        kinds = (types.FunctionType, types.MethodType)
        left += [value for value in inside if isinstance(value, kinds)]
        if wrapped is not None:
            left.append(wrapped)
    return found


class Registry:
    """The processors of one BeanQueue, by module and function name."""

    def __init__(self) -> None:
        self._processors: dict[tuple[str, str], AnyProcessor] = {}
        self._sources: dict[tuple[str, str], Source] = {}

    def __len__(self) -> int:
        return len(self._processors)

    def __iter__(self) -> t.Iterator[AnyProcessor]:
        return iter(self._processors.values())

    def add(self, processor: AnyProcessor) -> None:
        """Add a processor.

        The same function may come again, as it does where an app factory defines it, and so may
        another one where a module is loaded again, or a cell of a notebook.

        :raises ValueError: if there is another function of that module and name beside it.
        """
        key = processor.module, processor.func_name
        source = Source.of(processor)
        if (known := self._sources.get(key)) is not None:
            again = known.codes == source.codes
            if not again and not source.follows(known):
                raise ValueError(
                    f"There are two processors called {processor.name}, at {known} and {source}."
                    " Tasks find theirs by module and name: rename one."
                )
            say = log.info if again else log.warning
            say("%s, from %s, replaces that from %s", processor.name, source, known)
        self._processors[key] = processor
        self._sources[key] = source

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
