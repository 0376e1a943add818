"""The settings: where they come from, and what is refused."""

from __future__ import annotations

import dataclasses
import string
import sys
import types
import typing as t
import warnings

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from hypothesis import given
from hypothesis import strategies as st

from flask_beanqueue import BeanQueue, Config, ConfigError

from .conftest import MakeApp
from .probe import query


def test_a_setting_comes_from_the_app_else_the_environment_else_the_default() -> None:
    environ = {"BQ_BATCH_SIZE": "20", "BQ_CONCURRENCY": "30"}
    config = Config.load({"BQ_BATCH_SIZE": 10}, environ)
    assert (config.BATCH_SIZE, config.CONCURRENCY, config.MAX_CRASHES) == (10, 30, 3)


def test_an_empty_app_has_the_defaults() -> None:
    assert Config.load({}, {}) == Config()


def test_init_app_reads_the_environment(
    db: SQLAlchemy, bq: BeanQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BQ_MAX_CRASHES", "7")
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg2://nowhere.invalid/none"
    db.init_app(app)
    bq.init_app(app)
    assert (bq.config(app).MAX_CRASHES, app.config["BQ_MAX_CRASHES"]) == (7, 7)


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("PROCESSOR_PACKAGES", ["a.b", "c"], ["a.b", "c"]),
        ("PROCESSOR_PACKAGES", ("a.b",), ["a.b"]),
        ("PROCESSOR_PACKAGES", [], []),
        ("BATCH_SIZE", 1, 1),
        ("POLL_TIMEOUT", 2, 2.0),
        ("POLL_TIMEOUT", 0.5, 0.5),
        ("POLL_TIMEOUT", None, None),
        ("LISTEN", False, False),
        ("TASK_MODEL", "a.Task", "a.Task"),
        ("TASK_MODEL", None, None),
        ("UNKNOWN_GRACE", 0, 0.0),
    ],
)
def test_a_value_of_the_right_type_is_taken_from_the_app(
    name: str, value: t.Any, wanted: t.Any
) -> None:
    found = getattr(Config.load({f"BQ_{name}": value}, {}), name)
    assert (found, type(found)) == (wanted, type(wanted))


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("PROCESSOR_PACKAGES", '["a.b", "c"]', ["a.b", "c"]),
        ("PROCESSOR_PACKAGES", "[]", []),
        ("BATCH_SIZE", "100", 100),
        ("POLL_TIMEOUT", "2", 2.0),
        ("POLL_TIMEOUT", "0.5", 0.5),
        ("POLL_TIMEOUT", "null", None),
        ("LISTEN", "0", False),
        ("LISTEN", "1", True),
        ("LISTEN", "False", False),
        ("LISTEN", " true ", True),
        ("SUCCESS_EVENTS", "TRUE", True),
        ("WORKER_MODEL", "a.Worker", "a.Worker"),
    ],
)
def test_a_value_is_read_from_the_text_of_the_environment(
    name: str, text: str, wanted: t.Any
) -> None:
    found = getattr(Config.load({}, {f"BQ_{name}": text}), name)
    assert (found, type(found)) == (wanted, type(wanted))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("PROCESSOR_PACKAGES", "a.b", "must be a list of package names .*, not 'a.b'"),
        ("PROCESSOR_PACKAGES", ["a", 1], "must be a list of package names"),
        ("PROCESSOR_PACKAGES", ["a", ""], r"package names.*, not \['a', ''\]"),
        ("PROCESSOR_PACKAGES", ("",), r"package names.*, not \('',\)"),
        ("PROCESSOR_PACKAGES", [".tasks"], r"package names.*, not \['\.tasks'\]"),
        ("PROCESSOR_PACKAGES", ["a..b"], "package names"),
        ("BATCH_SIZE", "10", "must be a whole number, not '10'"),
        ("BATCH_SIZE", 1.0, "must be a whole number"),
        ("BATCH_SIZE", True, "must be a whole number"),
        ("BATCH_SIZE", None, "must be a whole number"),
        ("BATCH_SIZE", 0, "must be 1 or more, at most 2147483647, not 0"),
        ("BATCH_SIZE", 2**31, "must be 1 or more, at most 2147483647, not 2147483648"),
        ("CONCURRENCY", -1, "must be 1 or more, at most 2147483647, not -1"),
        ("CONCURRENCY", 2**31, "at most 2147483647, not 2147483648"),
        ("CONCURRENCY", False, "must be a whole number, not False"),
        ("CONCURRENCY", float("nan"), "must be a whole number, not nan"),
        ("MAX_CRASHES", 0, "must be 1 or more"),
        ("MAX_CRASHES", float("inf"), "must be a whole number, not inf"),
        ("POLL_TIMEOUT", True, "must be a number of seconds or None, not True"),
        ("POLL_TIMEOUT", 0, "above 0, at most 1000000, not 0.0"),
        ("POLL_TIMEOUT", float("inf"), "at most 1000000, not inf"),
        ("POLL_TIMEOUT", float("nan"), "above 0, at most 1000000, not nan"),
        ("POLL_TIMEOUT", 3e6, "at most 1000000"),  # select() would refuse it
        ("POLL_TIMEOUT", 10**400, "must be a number of seconds or None"),
        ("WORKER_HEARTBEAT_PERIOD", 0, "above 0"),
        ("WORKER_HEARTBEAT_TIMEOUT", float("inf"), "above 0"),
        ("SHUTDOWN_TIMEOUT", -1, "0 or more, not -1"),
        ("SHUTDOWN_TIMEOUT", float("inf"), "0 or more, not inf"),
        ("SHUTDOWN_TIMEOUT", False, "must be a number of seconds, not False"),
        ("UNKNOWN_GRACE", float("nan"), "0 or more, not nan"),
        ("LISTEN", 1, "must be true or false, not 1"),
        ("NOTIFY", "yes", "must be true or false"),
        ("EVENT_MODEL", 1, "must be text or None, not 1"),
        ("LISTEN_DATABASE_URL", 1, "must be text or None, not 1"),
        ("LISTEN_DATABASE_URL", "postgres://host/name", r"such as postgresql\+psycopg2://user@"),
        ("LISTEN_DATABASE_URL", "postgresql+asyncpg://host/name", "for psycopg2 or psycopg 3"),
        ("LISTEN_DATABASE_URL", "sqlite://", "a URL of PostgreSQL"),
        ("LISTEN_DATABASE_URL", "host", "a URL of PostgreSQL"),
    ],
)
def test_a_wrong_value_from_the_app_is_refused_by_name(name: str, value: t.Any, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^BQ_{name} .*{words}"):
        Config.load({f"BQ_{name}": value}, {})


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("PROCESSOR_PACKAGES", "my_app.tasks", r'JSON, such as \["my_app.tasks"\]'),
        ("PROCESSOR_PACKAGES", '{"a": 1}', "must be a list of package names"),
        ("PROCESSOR_PACKAGES", '[""]', r"package names.*, not \[''\]"),
        ("BATCH_SIZE", "many", "must be a whole number, not 'many'"),
        ("BATCH_SIZE", "1.5", "must be a whole number"),
        ("BATCH_SIZE", "true", "must be a whole number"),
        ("BATCH_SIZE", "9" * 12, "at most 2147483647, not 999999999999"),
        ("CONCURRENCY", "4.0", "must be a whole number, not 4.0"),
        ("CONCURRENCY", "-4", "must be 1 or more, at most 2147483647, not -4"),
        ("WORKER_HEARTBEAT_PERIOD", "NaN", "above 0, at most 1000000, not nan"),
        ("SHUTDOWN_TIMEOUT", "-Infinity", "0 or more, not -inf"),
        ("POLL_TIMEOUT", "5s", "must be a number of seconds"),
        ("POLL_TIMEOUT", "Infinity", "above 0"),
        ("LISTEN", "maybe", "must be true or false, not 'maybe'"),
    ],
)
def test_a_wrong_text_in_the_environment_is_refused_by_name(
    name: str, text: str, words: str
) -> None:
    with pytest.raises(ConfigError, match=f"BQ_{name} .*{words}"):
        Config.load({}, {f"BQ_{name}": text})


def test_an_address_that_is_refused_is_not_told() -> None:
    with pytest.raises(ConfigError) as refused:
        Config.load({"BQ_LISTEN_DATABASE_URL": "postgres://me:secret@host/name"}, {})
    assert "secret" not in str(refused.value)


def test_an_empty_variable_in_the_environment_is_an_unset_one() -> None:
    """As compose files and units leave it."""
    names = [field.name for field in dataclasses.fields(Config)]
    assert Config.load({}, {f"BQ_{name}": "" for name in names}) == Config()


def test_a_wrong_value_is_refused_at_init_app(db: SQLAlchemy, bq: BeanQueue) -> None:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg2://nowhere.invalid/none"
    app.config["BQ_BATCH_SIZE"] = "10"
    db.init_app(app)
    with pytest.raises(ConfigError, match="BQ_BATCH_SIZE"):
        bq.init_app(app)


def test_an_idle_worker_sleeps_long_where_it_listens_and_shortly_where_it_does_not() -> None:
    assert Config().poll_timeout == 30
    assert Config(LISTEN=False).poll_timeout == 1
    assert Config(POLL_TIMEOUT=7.0).poll_timeout == 7
    assert Config(POLL_TIMEOUT=7.0, LISTEN=False).poll_timeout == 7


def test_a_heartbeat_must_fit_twice_into_its_timeout() -> None:
    Config(WORKER_HEARTBEAT_PERIOD=5.0, WORKER_HEARTBEAT_TIMEOUT=10.0)
    with pytest.raises(ConfigError, match=r"TIMEOUT \(9.5 s\) .* BQ_WORKER_HEARTBEAT_PERIOD \(5 s"):
        Config(WORKER_HEARTBEAT_PERIOD=5.0, WORKER_HEARTBEAT_TIMEOUT=9.5)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("BQ_CONCURENCY", "BQ_CONCURRENCY"),
        ("BQ_PROCESSOR_PACKAGE", "BQ_PROCESSOR_PACKAGES"),
        ("BQ_HEARTBEAT_TIMEOUT", "BQ_WORKER_HEARTBEAT_TIMEOUT"),
        ("BQ_POLLTIMEOUT", "BQ_POLL_TIMEOUT"),
    ],
)
@pytest.mark.parametrize("place", ["app", "environment"])
def test_a_near_miss_is_warned_about(name: str, meant: str, place: str) -> None:
    app, environ = ({name: 1}, {}) if place == "app" else ({}, {name: "1"})
    with pytest.warns(UserWarning, match=f"{name} is no setting .* Did you mean {meant}?"):
        assert Config.load(app, environ) == Config()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("BQ_MAX_WORKER_THREADS", "Use BQ_CONCURRENCY"),
        ("BQ_DATABASE_URL", "Use SQLALCHEMY_DATABASE_URI"),
        ("BQ_POSTGRES_SERVER", "Use SQLALCHEMY_DATABASE_URI"),
        ("BQ_POSTGRES_PASSWORD", "Use SQLALCHEMY_DATABASE_URI"),
        ("BQ_METRICS_HTTP_SERVER_ENABLED", "no such server"),
        ("BQ_METRICS_HTTP_SERVER_PORT", "no such server"),
    ],
)
@pytest.mark.parametrize("place", ["app", "environment"])
def test_a_setting_of_beanqueue_is_warned_about_with_what_to_use(
    name: str, words: str, place: str
) -> None:
    app, environ = ({name: "secret"}, {}) if place == "app" else ({}, {name: "secret"})
    with pytest.warns(UserWarning, match=f"^{name} is a setting of BeanQueue.* {words}") as caught:
        assert Config.load(app, environ) == Config()
    assert "secret" not in str(caught[0].message)


def test_the_warning_points_at_the_line_that_called_init_app(db: SQLAlchemy, bq: BeanQueue) -> None:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = "postgresql+psycopg2://nowhere.invalid/none"
    app.config["BQ_CONCURENCY"] = 2
    db.init_app(app)
    with pytest.warns(UserWarning, match="BQ_CONCURENCY") as caught:
        bq.init_app(app)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    "name", ["BQ_DATASET", "BQ_PROJECT_ID", "BQ_LOCATION", "DATABASE_URL", "CONCURENCY", "BQ_"]
)
def test_other_names_are_left_alone(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Config.load({name: "x"}, {name: "x"}) == Config()


NAMES = [f"BQ_{name}" for name in vars(Config())]
HINTS = t.get_type_hints(Config)
ODD_VALUES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=10**300, max_value=10**400)
    | st.floats()
    | st.text(max_size=10)
    | st.lists(st.none() | st.integers() | st.text(max_size=10), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(), max_size=2)
)
ODD_TEXTS = st.text(alphabet=string.printable, max_size=12) | st.sampled_from(
    ["1e999", "1" * 5000, "[" * 5000, "-0", "1_000", "NaN", "null", "\ud800", "[null]", '["a"]']
)


def is_of_declared_type(name: str, value: t.Any) -> bool:
    hint = HINTS[name.removeprefix("BQ_")]
    if hint == list[str]:
        return type(value) is list and all(isinstance(item, str) for item in value)
    return type(value) in (t.get_args(hint) or (hint,))


def loads_or_names_the_setting(
    settings: dict[str, t.Any], environ: dict[str, str], name: str
) -> None:
    try:
        config = Config.load(settings, environ)
    except ConfigError as refused:
        error = refused
    else:
        for each in NAMES:
            assert is_of_declared_type(each, getattr(config, each.removeprefix("BQ_")))
        assert 0 < config.poll_timeout < 2**31 / 1000  # what select() takes
        return
    assert name in str(error)


@given(name=st.sampled_from(NAMES), value=ODD_VALUES)
def test_any_value_from_the_app_is_of_the_declared_type_or_refused_by_name(
    name: str, value: t.Any
) -> None:
    loads_or_names_the_setting({name: value}, {}, name)


@given(name=st.sampled_from(NAMES), text=ODD_TEXTS)
def test_any_text_in_the_environment_is_of_the_declared_type_or_refused_by_name(
    name: str, text: str
) -> None:
    loads_or_names_the_setting({}, {name: text}, name)


# Settings that are changed once the app is set up.


def test_a_worker_reads_the_settings_as_it_starts(
    make_app: MakeApp, db: SQLAlchemy, bq: BeanQueue, database_url: str
) -> None:
    app = make_app(db, bq)

    @bq.processor()
    def nothing() -> None:
        pass

    app.config["BQ_CONCURRENCY"] = 2
    app.config["BQ_SUCCESS_EVENTS"] = True
    app.config["BQ_PROCESSOR_PACKAGES"].append("no_such_package")
    assert bq.config(app) == Config(
        CONCURRENCY=2, SUCCESS_EVENTS=True, PROCESSOR_PACKAGES=["no_such_package"]
    )
    with pytest.raises(ConfigError, match="BQ_PROCESSOR_PACKAGES names no_such_package"):
        bq.worker(app=app)
    app.config["BQ_PROCESSOR_PACKAGES"] = []
    worker = bq.worker(app=app, burst=True)
    assert worker.concurrency == 2
    with app.app_context():
        nothing.enqueue()
        db.session.commit()
    worker.run()
    assert query(database_url, "SELECT type FROM bq_events") == [("DONE",)]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("CONCURRENCY", "two", "BQ_CONCURRENCY must be a whole number, not 'two'"),
        ("SHUTDOWN_TIMEOUT", -1, "BQ_SHUTDOWN_TIMEOUT must be a number of seconds, 0 or more"),
        ("TASK_MODEL", f"{__name__}.Flask", "BQ_TASK_MODEL names .* which is no model"),
        ("WORKER_MODEL", "own.Worker", "has .*BQWorker.* already. Give the class to"),
    ],
)
def test_a_setting_that_can_no_longer_be_changed_or_used_is_refused_then(
    make_app: MakeApp,
    db: SQLAlchemy,
    bq: BeanQueue,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    value: t.Any,
    message: str,
) -> None:
    app = make_app(db, bq)
    own = types.ModuleType("own")
    own.Worker = bq.Event  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own", own)
    app.config[f"BQ_{name}"] = value
    with pytest.raises(ConfigError, match=message):
        bq.process_tasks(["default"], app=app, burst=True)
