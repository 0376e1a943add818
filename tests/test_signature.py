"""What a task's arguments are checked against: what is called, not what a decorator has wrapped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import ArgumentError, BeanQueue

from .probe import query

Work = Callable[..., None]


def for_tenant(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(tenant: str, *args: Any, **kwargs: Any) -> Any:
        return [tenant, function(*args, **kwargs)]

    return wrapper


def dry(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, dry_run: bool = False, **kwargs: Any) -> Any:
        return "dry" if dry_run else function(*args, **kwargs)

    return wrapper


def passing(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def by_name(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(tenant: str = "none", **kwargs: Any) -> Any:
        return [tenant, function(**kwargs)]

    return wrapper


def filling(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(width: int) -> Any:
        return function(width, height=7)

    return wrapper


def telling(function: Any) -> Any:
    """Fills a parameter in, and says so."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, height=7, **kwargs)

    whole = inspect.signature(function)
    parameters = [each for each in whole.parameters.values() if each.name != "height"]
    wrapper.__signature__ = whole.replace(parameters=parameters)  # type: ignore[attr-defined]
    return wrapper


class ForTenant:
    def __init__(self, function: Any) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, tenant: str, *args: Any, **kwargs: Any) -> Any:
        return [tenant, self.function(*args, **kwargs)]


def in_part(function: Any) -> Any:
    return functools.update_wrapper(functools.partial(function, height=7), function)


def size(width: int, height: int = 1) -> list[int]:
    return [width, height]


FITTING = [
    (passing, {"width": 2}, [2, 1]),
    (for_tenant, {"tenant": "a", "width": 2}, ["a", [2, 1]]),
    (ForTenant, {"tenant": "a", "width": 2, "height": 3}, ["a", [2, 3]]),
    (dry, {"width": 2}, [2, 1]),
    (dry, {"width": 2, "dry_run": True}, "dry"),
    (by_name, {"width": 2}, ["none", [2, 1]]),
    (by_name, {"width": 2, "tenant": "a"}, ["a", [2, 1]]),
    (filling, {"width": 2}, [2, 7]),
    (telling, {"width": 2}, [2, 7]),
    (in_part, {"width": 2}, [2, 7]),
    (in_part, {"width": 2, "height": 3}, [2, 3]),
    (functools.cache, {"width": 2}, [2, 1]),
    (staticmethod, {"width": 2}, [2, 1]),
    (lambda each: passing(for_tenant(each)), {"tenant": "a", "width": 2}, ["a", [2, 1]]),
    (lambda each: for_tenant(dry(each)), {"tenant": "a", "width": 2}, ["a", [2, 1]]),
    (lambda each: dry(for_tenant(each)), {"tenant": "a", "width": 2, "dry_run": True}, "dry"),
    (lambda each: for_tenant(telling(each)), {"tenant": "a", "width": 2}, ["a", [2, 7]]),
    (lambda each: ForTenant(telling(each)), {"tenant": "a", "width": 2}, ["a", [2, 7]]),
    (lambda each: for_tenant(in_part(each)), {"tenant": "a", "width": 2}, ["a", [2, 7]]),
    (lambda each: in_part(for_tenant(each)), {"tenant": "a", "width": 2}, ["a", [2, 7]]),
    (lambda each: functools.cache(for_tenant(each)), {"tenant": "a", "width": 2}, ["a", [2, 1]]),
]


@pytest.mark.parametrize(("decorate", "arguments", "result"), FITTING)
def test_what_fits_a_decorated_function_is_taken(
    bq: BeanQueue, decorate: Any, arguments: dict[str, Any], result: Any
) -> None:
    processor: Any = bq.processor()(decorate(size))
    assert processor.run(**arguments).kwargs == arguments
    assert processor(**arguments) == result


MISFITTING = [
    (for_tenant, {"width": 2}, "missing a required argument: 'tenant'"),
    (for_tenant, {"tenant": "a"}, "missing a required argument: 'width'"),
    (ForTenant, {"width": 2}, "missing a required argument: 'tenant'"),
    (dry, {"width": 2, "dry": True}, "unexpected keyword argument 'dry'"),
    (by_name, {"width": 2, "depth": 3}, "unexpected keyword argument 'depth'"),
    (by_name, {"tenant": "a"}, "missing a required argument: 'width'"),
    (filling, {"width": 2, "height": 3}, "unexpected keyword argument 'height'"),
    (telling, {"width": 2, "height": 3}, "unexpected keyword argument 'height'"),
    (in_part, {"height": 3}, "missing a required argument: 'width'"),
    (functools.cache, {}, "missing a required argument: 'width'"),
    (lambda each: for_tenant(filling(each)), {"tenant": "a", "width": 2, "height": 3}, "'height'"),
    (lambda each: dry(for_tenant(each)), {"width": 2}, "missing a required argument: 'tenant'"),
]


@pytest.mark.parametrize(("decorate", "arguments", "message"), MISFITTING)
def test_what_does_not_fit_a_decorated_function_is_refused(
    bq: BeanQueue, decorate: Any, arguments: dict[str, Any], message: str
) -> None:
    processor: Any = bq.processor()(decorate(size))
    with pytest.raises(ArgumentError, match=message):
        processor.run(**arguments)


@pytest.mark.parametrize(
    ("decorate", "positions", "arguments"),
    [
        (passing, (2, 3), {"width": 2, "height": 3}),
        (for_tenant, ("a", 2), {"tenant": "a", "width": 2}),
        (dry, (2,), {"width": 2}),
        (telling, (2,), {"width": 2}),
        (by_name, ("a",), {"tenant": "a"}),
    ],
)
def test_positions_are_those_of_the_call(
    bq: BeanQueue, decorate: Any, positions: tuple[Any, ...], arguments: dict[str, Any]
) -> None:
    processor: Any = bq.processor()(decorate(size))
    named = {"width": 9} if decorate is by_name else {}
    assert processor.run(*positions, **named).kwargs == arguments | named
    assert processor(*positions, **named) == processor(**arguments, **named)


def test_a_default_before_what_has_none_makes_that_one_of_the_names(bq: BeanQueue) -> None:
    @functools.wraps(size)
    def wrapper(tenant: str = "none", *args: Any, **kwargs: Any) -> Any:
        return [tenant, size(*args, **kwargs)]

    processor: Any = bq.processor()(wrapper)
    assert processor(width=2) == ["none", [2, 1]]
    assert processor.run("a", width=2).kwargs == {"tenant": "a", "width": 2}


@pytest.mark.parametrize("decorate", [for_tenant, ForTenant])
def test_a_worker_does_what_fits_a_decorated_function(
    app: Flask, db: SQLAlchemy, bq: BeanQueue, work: Work, database_url: str, decorate: Any
) -> None:
    @bq.processor()
    @decorate
    def count(db: Any, task: Any, *, width: int) -> list[Any]:
        return [db is not None, task.func_name, width]

    with app.app_context():
        count.enqueue(tenant="a", width=2)
        count.enqueue_many([{"tenant": "b", "width": 3}])
        db.session.commit()
    work()
    sql = "SELECT state, result FROM bq_tasks ORDER BY id"
    assert query(database_url, sql) == [
        ("DONE", ["a", [True, "count", 2]]),
        ("DONE", ["b", [True, "count", 3]]),
    ]


def test_a_wrapper_is_given_what_it_names_itself(app: Flask, db: SQLAlchemy, bq: BeanQueue) -> None:
    def opening(function: Any) -> Any:
        @functools.wraps(function)
        def wrapper(db: Any, savepoint: Any, **kwargs: Any) -> Any:
            return [db, savepoint.is_active, function(**kwargs)]

        return wrapper

    processor: Any = bq.processor()(opening(size))
    with app.app_context():
        assert processor(width=2) == [db.session(), True, [2, 1]]


def test_a_wrapper_that_does_not_pass_the_session_on_is_not_given_it(bq: BeanQueue) -> None:
    def look(db: Any, task: Any, width: int) -> Any:
        return db, task, width

    @functools.wraps(look)
    def wrapper(task: Any, width: int) -> Any:
        return look("its own", task, width)

    processor: Any = bq.processor()(wrapper)
    assert processor(width=2) == ("its own", None, 2)


# What cannot be called by name is refused when the processor is made.


def takes_positions(*args: Any) -> Any:
    return size(*args)


def takes_none_by_name(width: int, /, **kwargs: Any) -> Any:
    return size(width, **kwargs)


def wraps_positions(*sizes: int) -> Any:
    return sizes


@pytest.mark.parametrize(
    ("wrapper", "wrapped", "parameter"),
    [
        (takes_positions, size, r"\*args"),
        (takes_none_by_name, size, "width"),
        (lambda *args, **kwargs: None, takes_none_by_name, "width"),
        (lambda *args, **kwargs: None, wraps_positions, r"\*sizes"),
        (lambda *args, tenant, **kwargs: None, wraps_positions, r"\*sizes"),
    ],
)
def test_a_wrapper_that_cannot_be_called_by_name_is_refused(
    bq: BeanQueue, wrapper: Any, wrapped: Any, parameter: str
) -> None:
    decorated = functools.wraps(wrapped)(lambda: None)
    decorated.__code__ = wrapper.__code__
    with pytest.raises(TypeError, match=rf"the parameter '{parameter}' must be .* by name"):
        bq.processor()(decorated)
    assert len(bq.registry) == 0


def test_a_wrapper_that_does_not_say_what_it_wraps_is_refused_with_the_way_out(
    bq: BeanQueue,
) -> None:
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return size(*args, **kwargs)

    with pytest.raises(TypeError, match=r"'\*args'.* decorator's, let that use functools\.wraps"):
        bq.processor()(wrapper)
