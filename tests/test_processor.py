"""Processors: what they are made of, and the ways to make tasks."""

from __future__ import annotations

import copy
import datetime
import functools
import types
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from werkzeug.local import LocalProxy

from flask_beanqueue import ArgumentError, BeanQueue, DelayRetry, Processor

from .probe import query

Work = Callable[..., None]

NOON = datetime.datetime(2030, 1, 1, 12, tzinfo=datetime.UTC)
HOUR = datetime.timedelta(hours=1)


@pytest.fixture
def resize(bq: BeanQueue) -> Any:
    @bq.processor(channel="images")
    def resize(db: Any, task: Any, width: int, height: int = 1) -> int:
        """Make an image another size."""
        return width * height

    return resize


# What can be a processor.


def test_a_processor_is_still_its_function(resize: Any) -> None:
    assert resize.__name__ == "resize"
    assert resize.__doc__ == "Make an image another size."
    assert resize.__wrapped__ is resize.func
    assert resize.name == f"{__name__}.resize"
    assert repr(resize) == f"<Processor {__name__}.resize on 'images'>"
    assert resize.injected == ("db", "task")


def test_a_decorator_that_keeps_its_function_as_an_attribute_is_not_bypassed(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, database_url: str
) -> None:
    def keep(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(**kwargs: Any) -> Any:
            return ["decorated", function(**kwargs)]

        wrapper.func = function  # type: ignore[attr-defined]
        return wrapper

    @bq.processor()
    @keep
    def answer() -> int:
        return 42

    assert answer() == ["decorated", 42]
    with app.app_context():
        answer.enqueue()
        db.session.commit()
    work()
    assert query(database_url, "SELECT result FROM bq_tasks") == [(["decorated", 42],)]


OWN_NAMES = [
    *("queue", "func", "options", "module", "func_name", "signature", "injected", "_required"),
    *("retry_policy", "retry_exceptions", "auto_complete", "__call__", "__class__"),
    *(name for name in dir(Processor) if not name.startswith("_")),
]


@pytest.mark.parametrize("name", OWN_NAMES)
def test_a_functions_attribute_does_not_replace_one_of_the_processors(
    bq: BeanQueue, name: str
) -> None:
    def function(db: Any, width: int) -> int:
        return width

    function.__dict__[name] = "the function's"
    processor: Any = bq.processor()(function)
    assert getattr(processor, name) != "the function's"
    assert processor.run(width=1).kwargs == {"width": 1}
    assert processor.using(priority=1)(db=None, width=2) == 2


def test_other_attributes_of_a_function_can_be_read_from_its_processor(bq: BeanQueue) -> None:
    def function() -> None:
        pass

    function.owner = "the shop"  # type: ignore[attr-defined]
    processor: Any = bq.processor()(function)
    assert processor.owner == processor.using(priority=1).owner == "the shop"
    assert copy.copy(processor).owner == "the shop"
    with pytest.raises(AttributeError):
        processor.nothing  # noqa: B018


def test_an_object_that_is_called_keeps_its_attributes_to_itself(bq: BeanQueue) -> None:
    class Job:
        def __init__(self) -> None:
            self.__name__ = "job"
            self.queue = self.run = self.options = None

        def __call__(self, width: int) -> int:
            return width

    processor: Any = bq.processor(channel="images")(Job())
    assert processor.run(width=1).channel == "images"
    assert processor(2) == 2


def test_processors_are_found_by_module_and_name(bq: BeanQueue, resize: Any) -> None:
    assert bq.registry.get(__name__, "resize") is resize
    assert bq.registry.get("elsewhere", "resize") is None
    assert bq.registry.get(__name__, "enlarge") is None
    assert (list(bq.registry), len(bq.registry)) == ([resize], 1)


def test_the_channels_are_those_that_processors_name_in_their_order(bq: BeanQueue) -> None:
    for number, channel in enumerate(["b", "a", "b", "c"]):
        function = types.FunctionType((lambda: None).__code__, {"__name__": __name__})
        function.__name__ = f"function_{number}"
        bq.processor(channel=channel)(function)
    assert bq.registry.channels == ("b", "a", "c")


def test_the_decorator_has_to_be_called(bq: BeanQueue) -> None:
    with pytest.raises(
        TypeError, match=r'Write @bq\.processor\(channel="…"\), or @bq\.processor\('
    ):

        @bq.processor  # type: ignore[arg-type]
        def resize() -> None:
            pass


@pytest.mark.parametrize("channel", ["", "a\0b"])
def test_a_channel_without_a_name_is_refused(bq: BeanQueue, channel: str) -> None:
    with pytest.raises(ValueError, match="channel must not be empty"):
        bq.processor(channel=channel)


def test_a_channel_is_text(bq: BeanQueue) -> None:
    with pytest.raises(TypeError, match="channel must be text, not 5"):
        bq.processor(channel=5)  # type: ignore[arg-type]


def test_a_coroutine_function_is_refused(bq: BeanQueue) -> None:
    async def resize() -> None:
        pass

    with pytest.raises(TypeError, match=r"\.resize is a coroutine function.*asyncio\.run"):
        bq.processor()(resize)


def test_a_method_is_refused_with_the_way_out(bq: BeanQueue) -> None:
    way_out = r"Write a def outside of the class, or put @staticmethod above @bq\.processor"
    for first in ("self", "cls"):
        function = {"self": lambda self, width: width, "cls": lambda cls, width: width}[first]
        function.__name__ = "resize"
        with pytest.raises(TypeError, match=rf"\.resize is a method.* {first!r}.* {way_out}"):
            bq.processor()(function)
    with pytest.raises(TypeError, match=rf"\.resize is a classmethod.* {way_out}"):

        class Images:
            @bq.processor()  # type: ignore[arg-type]
            @classmethod
            def resize(cls, width: int) -> int:
                return width


def test_a_method_of_an_object_is_refused_with_the_way_out(bq: BeanQueue) -> None:
    class Images:
        def resize(self, width: int) -> int:
            return width

        @classmethod
        def enlarge(cls, width: int) -> int:
            return width

    for method in (Images().resize, Images.enlarge):
        with pytest.raises(TypeError, match=r"is a method of .*Images.*Write a def .* calls it"):
            bq.processor()(method)


def test_a_static_method_is_a_function_also_above_or_below(bq: BeanQueue) -> None:
    class Images:
        @bq.processor()
        @staticmethod
        def resize(width: int) -> int:
            return width

        @staticmethod
        @bq.processor()
        def enlarge(width: int) -> int:
            return width

    for processor in (Images.resize, Images().enlarge):
        assert processor.run(width=1).kwargs == {"width": 1}
        assert processor(width=2) == 2


def test_a_builtin_whose_parameters_nobody_knows_is_refused(bq: BeanQueue) -> None:
    with pytest.raises(
        TypeError, match=r"builtins\.dict does not say its parameters\. Write a def"
    ):
        bq.processor()(dict)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_auto_complete_is_true_or_false(bq: BeanQueue, value: Any) -> None:
    with pytest.raises(TypeError, match="auto_complete must be true or false, not"):
        bq.processor(auto_complete=value)(lambda: None)


def test_a_generator_function_is_refused(bq: BeanQueue) -> None:
    def resize() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match=r"\.resize is a generator function"):
        bq.processor()(resize)


def test_any_number_of_positional_parameters_is_refused(bq: BeanQueue) -> None:
    def resize(*sizes: int) -> None:
        pass

    with pytest.raises(TypeError, match=r"stored by name, so the parameter '\*sizes' must be"):
        bq.processor()(resize)


def test_a_positional_only_parameter_is_refused(bq: BeanQueue) -> None:
    def resize(width: int, /) -> None:
        pass

    with pytest.raises(TypeError, match="stored by name, so the parameter 'width' must be"):
        bq.processor()(resize)


def test_two_processors_of_one_name_are_refused(bq: BeanQueue, resize: Any) -> None:
    def other() -> None:
        pass

    other.__name__ = "resize"
    with pytest.raises(ValueError, match=rf"two processors called {__name__}\.resize.* rename one"):
        bq.processor()(other)
    assert bq.registry.get(__name__, "resize") is resize


def test_a_factory_may_register_its_function_again(bq: BeanQueue) -> None:
    def factory(number: int) -> Any:
        @bq.processor()
        def answer() -> int:
            return number

        return answer

    first, second = factory(1), factory(2)
    assert (first(), second()) == (1, 2)
    assert bq.registry.get(__name__, "answer") is second


@pytest.mark.parametrize("exceptions", [[OSError], (OSError, "ValueError"), "OSError", int])
def test_retry_exceptions_are_exceptions(bq: BeanQueue, exceptions: Any) -> None:
    with pytest.raises(TypeError, match="retry_exceptions must be"):
        bq.processor(retry_exceptions=exceptions)(lambda: None)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (3, r"retry_policy must be callable, such as DelayRetry\(…\), not 3"),
        (DelayRetry, r"retry_policy is the class DelayRetry; make one: DelayRetry\(…\)"),
    ],
)
def test_a_retry_policy_can_be_called_and_is_no_class(
    bq: BeanQueue, policy: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        bq.processor(retry_policy=policy)(lambda: None)


@pytest.mark.parametrize("exceptions", [OSError, (OSError, ValueError), ()])
def test_retry_exceptions_without_a_policy_are_refused(bq: BeanQueue, exceptions: Any) -> None:
    with pytest.raises(TypeError, match="retry_exceptions has no effect without a retry_policy"):
        bq.processor(retry_exceptions=exceptions)(lambda: None)


def test_a_processor_of_a_processor_is_refused(bq: BeanQueue, resize: Any) -> None:
    with pytest.raises(TypeError, match=r"\.resize on 'images'> is a processor already.*\.using\("):
        bq.processor(channel="videos")(resize)
    assert list(bq.registry) == [resize]


# run: a task that is in no session.


def test_run_makes_a_task_that_is_in_no_session(app: Flask, db: SQLAlchemy, resize: Any) -> None:
    with app.app_context():
        task = resize.run(width=2, height=3)
        assert task not in db.session
        assert not db.session.new
    assert (task.channel, task.module, task.func_name) == ("images", __name__, "resize")
    assert (task.kwargs, task.priority) == ({"width": 2, "height": 3}, 0)
    assert task.id.version == 7
    assert task.scheduled_at is None  # the database's now()


def test_run_needs_no_app(resize: Any) -> None:
    assert resize.run(width=1).kwargs == {"width": 1}


def test_arguments_may_be_given_by_position(resize: Any) -> None:
    assert resize.run(2, 3).kwargs == {"width": 2, "height": 3}
    assert resize.run(2, height=3).kwargs == {"width": 2, "height": 3}


def test_defaults_are_left_to_the_worker(resize: Any) -> None:
    assert resize.run(2).kwargs == {"width": 2}


def test_keyword_arguments_of_any_name_are_arguments(bq: BeanQueue) -> None:
    @bq.processor()
    def tag(db: Any, name: str, **tags: str) -> None:
        pass

    task: Any = tag.run("a", tags="x", kwargs="y", self="z")
    assert task.kwargs == {"name": "a", "tags": "x", "kwargs": "y", "self": "z"}
    assert tag.run(name="a").kwargs == {"name": "a"}


def test_enqueue_adds_the_task_to_the_session(app: Flask, db: SQLAlchemy, resize: Any) -> None:
    with app.app_context():
        task = resize.enqueue(width=2)
        assert task in db.session.new
        db.session.rollback()
        assert task not in db.session


@pytest.mark.parametrize("make", ["run", "enqueue"])
@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, r"\(width.*, height.* = 1\).*: missing a required argument: 'width'"),
        ((), {"width": 1, "depth": 2}, "got an unexpected keyword argument 'depth'"),
        ((1, 2, 3), {}, "too many positional arguments"),
        ((1,), {"width": 1}, "multiple values for argument 'width'"),
        ((), {"width": 1, "db": None}, "'db' is filled in by the worker; leave it out"),
        ((), {"width": 1, "task": None}, "'task' is filled in by the worker; leave it out"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(
    app: Flask,
    db: SQLAlchemy,
    resize: Any,
    make: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    message: str,
) -> None:
    with app.app_context():
        with pytest.raises(ArgumentError, match=rf"^{__name__}\.resize.*{message}"):
            getattr(resize, make)(*args, **kwargs)
        assert not db.session.new


def test_what_the_worker_fills_in_is_refused_also_where_any_name_goes(bq: BeanQueue) -> None:
    @bq.processor()
    def tag(db: Any, **tags: str) -> None:
        pass

    with pytest.raises(ArgumentError, match="'db' is filled in by the worker; leave it out"):
        tag.run(db="x")
    assert tag.run(task="x").kwargs == {"task": "x"}  # not one that this one is given


# using: options for one task.


def test_options_are_for_the_tasks_made_through_them(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, resize: Any
) -> None:
    urgent = resize.using(priority=-5, scheduled_at=NOON, channel="fast")
    with app.app_context():
        made = urgent.enqueue(width=1)
        [many] = urgent.enqueue_many([{"width": 2}])
        db.session.commit()
        for task in (made, db.session.get(bq.Task, many)):
            assert (task.priority, task.scheduled_at, task.channel) == (-5, NOON, "fast")
            assert task.func_name == "resize"
        plain = resize.enqueue(width=3)
        db.session.commit()
        assert (plain.priority, plain.channel) == (0, "images")
        assert plain.scheduled_at == plain.created_at


def test_options_add_up_and_the_last_time_counts(resize: Any) -> None:
    first = resize.using(priority=1, delay=datetime.timedelta(1))
    second = first.using(scheduled_at=NOON)
    assert isinstance(second, Processor)
    assert (second.options.priority, second.options.channel) == (1, "images")
    assert (second.options.delay, second.options.scheduled_at) == (None, NOON)
    assert (first.options.delay, first.options.scheduled_at) == (datetime.timedelta(1), None)


def test_a_delay_counts_from_the_insert_by_the_databases_clock(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, resize: Any, database_url: str
) -> None:
    later = resize.using(delay=datetime.timedelta(hours=1))
    with app.app_context():
        db.session.execute(sa.text("SELECT 1"))  # now() stands still from here on
        later.enqueue(width=1)
        later.enqueue_many([{"width": 2}])
        db.session.commit()
    found = query(
        database_url,
        "SELECT scheduled_at - created_at > interval '1 hour',"
        " scheduled_at - created_at < interval '1 hour 60 seconds' FROM bq_tasks",
    )
    assert found == [(True, True), (True, True)]


def test_a_delay_that_is_over_is_no_delay(
    app: Flask, db: SQLAlchemy, resize: Any, work: Work, database_url: str
) -> None:
    with app.app_context():
        resize.using(delay=-datetime.timedelta(hours=1)).enqueue(width=1)
        db.session.commit()
    work()
    assert query(database_url, "SELECT state FROM bq_tasks") == [("DONE",)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"scheduled_at": NOON.replace(tzinfo=None)},
            ValueError,
            "scheduled_at has no time zone: .*delay=timedelta",
        ),
        (
            {"scheduled_at": NOON, "delay": datetime.timedelta(1)},
            ValueError,
            "Give scheduled_at or delay, not both",
        ),
        ({"scheduled_at": "2030-01-01"}, TypeError, "scheduled_at must be a datetime.datetime"),
        ({"scheduled_at": NOON.date()}, TypeError, "scheduled_at must be a datetime.datetime"),
        (
            {"scheduled_at": datetime.datetime.max.replace(tzinfo=datetime.timezone.min)},
            ValueError,
            "scheduled_at is out of range",
        ),
        ({"delay": datetime.timedelta.max}, ValueError, "delay is longer than ten centuries"),
        ({"delay": datetime.timedelta.min}, ValueError, "delay is longer than ten centuries"),
        ({"delay": 5}, TypeError, "delay must be a datetime.timedelta, not 5"),
        ({"priority": "high"}, ValueError, "priority must be a whole number of 32 bits"),
        ({"priority": 2**31}, ValueError, "priority must be a whole number of 32 bits"),
        ({"priority": -(2**31) - 1}, ValueError, "whole number of 32 bits, not -2147483649"),
        ({"priority": True}, ValueError, "priority must be a whole number of 32 bits, not True"),
        ({"priority": 1.0}, ValueError, r"priority must be a whole number of 32 bits, not 1\.0"),
        ({"channel": ""}, ValueError, "channel must not be empty"),
        ({"channel": "a\udce9"}, ValueError, r"channel .* half of a surrogate pair: 'a\\udce9'"),
        ({"channel": "a\0b"}, ValueError, r"channel must not be empty or hold U\+0000: 'a\\x00b'"),
        ({"channel": b"a"}, TypeError, "channel must be text"),
        ({"channel": False}, TypeError, "channel must be text, not False"),
        ({"scheduled_at": 0}, TypeError, "scheduled_at must be a datetime.datetime, not 0"),
        ({"scheduled_at": HOUR}, TypeError, "scheduled_at must be a datetime.datetime, not"),
        ({"delay": NOON}, TypeError, "delay must be a datetime.timedelta, not"),
        ({"channel": LocalProxy(lambda: "a")}, TypeError, "channel is no str, but a LocalProxy of"),
        ({"priority": LocalProxy(lambda: 1)}, TypeError, "priority is no int, but a LocalProxy o"),
        ({"delay": LocalProxy(lambda: HOUR)}, TypeError, r"no timedelta, .* _get_current_object"),
        ({"delay": False}, TypeError, "delay must be a datetime.timedelta, not False"),
    ],
)
def test_wrong_options_are_refused(
    resize: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resize.using(**options)


# enqueue_many: one statement.


def test_many_tasks_are_one_statement(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, resize: Any
) -> None:
    statements: list[str] = []
    with app.app_context():
        sa.event.listen(
            db.engine, "before_cursor_execute", lambda *event: statements.append(event[2])
        )
        ids = resize.enqueue_many([{"width": number} for number in range(1_000)])
        db.session.commit()
        assert len(statements) == 1
        widths = dict(db.session.execute(sa.select(bq.Task.id, bq.Task.kwargs)).all())
    assert ids == sorted(ids)
    assert [widths[each]["width"] for each in ids] == list(range(1_000))
    assert [type(each) for each in ids] == [uuid.UUID] * 1_000


def test_many_tasks_are_the_same_as_single_ones(
    app: Flask, db: SQLAlchemy, resize: Any, database_url: str
) -> None:
    with app.app_context():
        resize.enqueue(width=1)
        resize.enqueue_many([{"width": 1}])
        db.session.commit()
    one, other = query(
        database_url,
        "SELECT to_jsonb(t) - '{id,created_at,scheduled_at}'::text[] FROM bq_tasks AS t",
    )
    assert one == other


def test_many_tasks_go_with_the_transaction(
    app: Flask, db: SQLAlchemy, resize: Any, database_url: str
) -> None:
    with app.app_context():
        resize.enqueue_many([{"width": 1}])
        db.session.rollback()
        with db.session.begin_nested() as savepoint:
            resize.enqueue_many([{"width": 2}])
            savepoint.rollback()
        resize.enqueue_many([{"width": 3}])
        db.session.commit()
    assert query(database_url, "SELECT kwargs FROM bq_tasks") == [({"width": 3},)]


def test_no_tasks_are_no_statement(app: Flask, db: SQLAlchemy, resize: Any) -> None:
    with app.app_context():
        assert resize.enqueue_many([]) == []
        assert resize.enqueue_many(iter(())) == []
        assert not db.session.registry().in_transaction()


def test_many_tasks_may_come_from_a_generator(
    app: Flask, db: SQLAlchemy, resize: Any, database_url: str
) -> None:
    with app.app_context():
        made = resize.enqueue_many({"width": number} for number in range(3))
        db.session.commit()
    assert len(made) == 3
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(3,)]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"depth": 1}, rf"^Item 2: {__name__}\.resize.*: missing"),
        ({"width": {1}}, r"^Item 2: .* 'width' cannot be stored as JSON"),
        ({"width": 1, "db": 1}, r"^Item 2: .* 'db' is filled in"),
        ([("width", 1)], "a dict of arguments for each task, but item 2 is of the type list$"),
        (3, "but item 2 is of the type int$"),
    ],
)
def test_a_bad_item_is_named_and_none_is_inserted(
    app: Flask, db: SQLAlchemy, resize: Any, database_url: str, bad: Any, message: str
) -> None:
    with app.app_context():
        with pytest.raises(ArgumentError, match=message):
            resize.enqueue_many([{"width": 1}, {"width": 2}, bad, {"width": 4}])
        db.session.commit()
    assert query(database_url, "SELECT count(*) FROM bq_tasks") == [(0,)]


@pytest.mark.parametrize("arguments", [{"width": 1}, {}, "width", b"width", None, 3], ids=repr)
def test_many_tasks_that_are_no_list_are_refused(
    app: Flask, db: SQLAlchemy, resize: Any, arguments: Any
) -> None:
    message = (
        f"{resize.name}: enqueue_many takes a list with a dict of arguments for each task, not"
    )
    with (
        app.app_context(),
        pytest.raises(ArgumentError, match=rf"^{message} {type(arguments).__name__}\."),
    ):
        resize.enqueue_many(arguments)


# Plain calls.


def test_a_plain_call_is_as_ever(bq: BeanQueue) -> None:
    @bq.processor()
    def double(number: int, plus: int = 0) -> int:
        return number * 2 + plus

    assert double(2) == 4
    assert double(number=2, plus=1) == 5
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        double()


def test_a_plain_call_gets_the_session(app: Flask, db: SQLAlchemy, bq: BeanQueue) -> None:
    @bq.processor()
    def look(db: Any, task: Any, savepoint: Any, number: int) -> Any:
        return db, task, savepoint.is_active, number

    with app.app_context():
        assert look(number=1) == (db.session(), None, True, 1)


def test_a_plain_call_takes_positions_as_the_function_does(
    app: Flask, db: SQLAlchemy, bq: BeanQueue
) -> None:
    @bq.processor()
    def look(db: Any, task: Any, number: int, plus: int = 0) -> Any:
        return db, task, number + plus

    with app.app_context():
        session = db.session()
        assert look(number=1) == (session, None, 1)
        assert look("session", "task", 1) == ("session", "task", 1)
        assert look("session", number=1, plus=1) == ("session", None, 2)
        with pytest.raises(TypeError, match="positional arguments"):
            look(1, 2, 3, 4, 5)


def test_what_has_no_name_is_no_processor(bq: BeanQueue) -> None:
    class AsyncToSync:
        """Of the kind that app.ensure_sync returns for a coroutine function."""

        def __call__(self, width: int) -> int:
            return width

    for nameless in (functools.partial(print, "x"), AsyncToSync(), property(AsyncToSync())):
        with pytest.raises(TypeError, match=r"has no name.* Write a def in a module that calls it"):
            bq.processor()(nameless)  # type: ignore[call-overload]
    nowhere = types.FunctionType((lambda: None).__code__, {})
    with pytest.raises(TypeError, match="has no name"):
        bq.processor()(nowhere)


def test_a_plain_call_with_everything_given_needs_no_app(resize: Any) -> None:
    assert resize(None, None, 2, 3) == 6
    assert resize(db=None, task=None, width=2, height=3) == 6


def test_a_plain_call_that_needs_the_session_needs_an_app(resize: Any) -> None:
    with pytest.raises(RuntimeError, match="application context"):
        resize(width=1)


@pytest.mark.parametrize("fails", [False, True])
def test_a_plain_call_ends_its_savepoint(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, Note: Any, fails: bool
) -> None:
    @bq.processor()
    def write(db: Any, savepoint: Any) -> None:
        db.add(Note(text="inside"))
        db.flush()
        if fails:
            raise ValueError

    with app.app_context():
        db.session.add(Note(text="outside"))
        try:
            write()
        except ValueError:
            assert fails
        assert not db.session.registry().in_nested_transaction()
        db.session.commit()
        texts = set(db.session.scalars(sa.select(Note.text)))
    assert texts == ({"outside"} if fails else {"outside", "inside"})


def test_a_plain_call_in_a_task_gets_that_task(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work
) -> None:
    seen = []

    @bq.processor()
    def inner(task: Any) -> None:
        seen.append(task.func_name)

    @bq.processor()
    def outer() -> None:
        inner()

    with app.app_context():
        outer.enqueue()
        db.session.commit()
    work()
    assert seen == ["outer"]
