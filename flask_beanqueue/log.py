"""The package's logger. What it is told can neither forge a line nor speak to a terminal."""

from __future__ import annotations

import logging
import re
import traceback
import typing as t

log = logging.getLogger("flask_beanqueue")

#: Control characters, ends of lines and paragraphs, what turns the direction of text, and halves of
#: surrogate pairs, which no stream takes.
CONTROL = re.compile(r"[\0-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


#: Characters that are logged of a value, or of what an exception says.
LONGEST = 10_000


def shorten(text: str, length: int) -> str:
    """Shorten a text in its middle."""
    if len(text) <= length:
        return text
    return f"{text[: length // 2]}\n… {len(text) - length} characters …\n{text[-(length // 2) :]}"


def escape(text: str, keep: str = "") -> str:
    """Write control characters as Python's literals do.

    :param keep: those that stay as they are.
    """
    return CONTROL.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


class Lines(traceback.TracebackException):
    """A traceback in which an exception takes one line, whatever its message and notes hold."""

    def format_exception_only(self, *args: t.Any, **kwargs: t.Any) -> t.Generator[str, None, None]:
        said = "".join(super().format_exception_only(*args, **kwargs))
        yield escape(shorten(said.rstrip("\n"), LONGEST), keep="\t") + "\n"


def format_exception(error: BaseException) -> str:
    """Format an exception, those behind it and those in it, as Python does, without control
    characters."""
    parts: list[traceback.TracebackException] = [traceback.TracebackException.from_exception(error)]
    for part in parts:
        part.__class__ = Lines
        for frame in part.stack:
            frame.filename = escape(frame.filename)
        parts += filter(None, [part.__cause__, part.__context__, *(part.exceptions or ())])
    return escape("".join(parts[0].format()).rstrip("\n"), keep="\n\t")


def escape_record(record: logging.LogRecord) -> bool:
    """Escape what a record is given, and its traceback as formatters print it. The exception itself
    stays for those who want it."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            arg if isinstance(arg, (int, float)) else escape(shorten(str(arg), LONGEST))
            for arg in record.args
        )
    for name in ("task_name", "task_channel"):
        if name in vars(record):
            setattr(record, name, escape(shorten(getattr(record, name), LONGEST)))
    if record.exc_info and record.exc_info[1] is not None:
        try:
            record.exc_text = format_exception(record.exc_info[1])
        except Exception as problem:  # of an exception's own attributes
            record.exc_text = f"(The traceback cannot be formatted: {type(problem).__name__})"
    return True


log.addFilter(escape_record)
