"""The extension: wires a queue to Flask-SQLAlchemy and to apps."""

from __future__ import annotations

import importlib
import sys
import threading
import typing as t
import uuid

import sqlalchemy as sa
from flask import Flask, has_app_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.engine import Engine

from .cli import bq_cli
from .config import PREFIX, Config
from .current import this_app
from .engine import fence
from .engine import outcome as outcomes
from .engine.checks import check_engine, check_pool_is_there
from .engine.handover import listen_writes, tell_uncommitted
from .engine.notify import listen_events
from .engine.queue import Queue
from .exceptions import ConfigError
from .models.make import make_models
from .options import Options, check_channel, check_count, check_text
from .processor import AnyProcessor, Decorator, Exceptions, Processor
from .registry import Origin, Registry, import_packages
from .retry import RetryPolicy

if t.TYPE_CHECKING:
    from .engine.listener import Source
    from .engine.worker import Worker


class BeanQueue(Queue):
    """A task queue in the PostgreSQL of a Flask app.

    :param app: an app whose Flask-SQLAlchemy is set up, if it is known already.
    :param db: the Flask-SQLAlchemy extension. With it, or with ``app``, the models are there at
        once; otherwise :meth:`init_app` makes them.
    :param bind_key: the bind in which the queue's tables live, if not the default database.
    :param task_model: an own model in place of ``bq.Task``, made with :class:`TaskModelMixin`;
        likewise ``worker_model`` and ``event_model``.
    """

    def __init__(
        self,
        app: Flask | None = None,
        db: SQLAlchemy | None = None,
        *,
        bind_key: str | None = None,
        task_model: type[t.Any] | None = None,
        worker_model: type[t.Any] | None = None,
        event_model: type[t.Any] | None = None,
    ) -> None:
        if app is not None:
            check_app(app)
        self.registry = Registry()
        self._bind_key = bind_key
        self._own_models = {
            "TASK_MODEL": task_model,
            "WORKER_MODEL": worker_model,
            "EVENT_MODEL": event_model,
        }
        for setting, model in self._own_models.items():
            if model is not None and not isinstance(model, type):
                raise TypeError(
                    f"{setting.lower()} must be a model's class, not {model!r}. A dotted name"
                    f" goes into {PREFIX}{setting}."
                )
        if db is not None:
            self._use(db)
            # With models still to come from the app's config, the rest waits for it.
            if app is None:
                try:
                    self._make_models()
                except BaseException:
                    del db.metadata.info["beanqueue"]  # let the next try have it
                    raise
        if app is not None:
            self.init_app(app)

    def init_app(self, app: Flask) -> None:
        """Set an app up for the queue. Call it after ``db.init_app(app)``.

        :raises RuntimeError: if the app has no Flask-SQLAlchemy or already has a BeanQueue, or its
            database cannot carry the queue.
        :raises TypeError: if it is no app.
        :raises ConfigError: if a ``BQ_…`` setting cannot be used.
        """
        check_app(app)
        if "beanqueue" in app.extensions:
            raise RuntimeError(
                "A BeanQueue is already registered on this app. Import and use that one, or drop"
                " the second init_app: BeanQueue(app) calls it, too."
            )
        db = app.extensions.get("sqlalchemy")
        if db is None:
            raise RuntimeError(
                "This app has no Flask-SQLAlchemy yet. Call db.init_app(app) before"
                " bq.init_app(app); with BeanQueue(app), make SQLAlchemy(app) first."
            )
        self._use(db)
        config = Config.load(app.config)
        self._make_models(config)
        engine = self.engine(app)
        check_engine(engine, self.models.tables)
        fence.listen_engine(engine)
        for name, value in vars(config).items():
            app.config.setdefault(f"{PREFIX}{name}", value)
        engine.update_execution_options(bq_settings=app.config)
        tell_uncommitted(app, db)
        app.extensions["beanqueue"] = self
        app.shell_context_processor(lambda: {"bq": self})
        app.cli.add_command(bq_cli)

    def _use(self, db: SQLAlchemy) -> None:
        if self._db is db:
            return
        if not isinstance(db, SQLAlchemy):
            raise TypeError(f"db must be Flask-SQLAlchemy's SQLAlchemy(), not {db!r}")
        if self._db is not None:
            raise RuntimeError(
                "This BeanQueue belongs to another SQLAlchemy() than the app's. Make a BeanQueue"
                " for each."
            )
        if db.metadata.info.setdefault("beanqueue", self) is not self:
            raise RuntimeError(
                "This SQLAlchemy() has a BeanQueue already. One does for all apps: import it and"
                " call its init_app."
            )
        self._db = db

    def _make_models(self, config: Config | None = None) -> None:
        own = dict(self._own_models)
        if config is not None:
            for setting in own:
                if (name := getattr(config, setting)) is not None:
                    own[setting] = load_model(f"{PREFIX}{setting}", name)
                    if self._models is not None and own[setting] is not self._model(setting):
                        raise ConfigError(
                            f"{PREFIX}{setting} is {name}, but this BeanQueue has"
                            f" {self._model(setting)!r} already. Give the class to the constructor,"
                            " or make it as BeanQueue(), whose models wait for init_app."
                        )
        if self._models is None:
            self._models = make_models(
                self.db, self._bind_key, own["TASK_MODEL"], own["WORKER_MODEL"], own["EVENT_MODEL"]
            )
            listen_events(self._models.task)
            listen_writes(self._models.task)
            fence.listen_states(self)

    def _model(self, setting: str) -> t.Any:
        assert self._models is not None
        return getattr(self._models, setting.removesuffix("_MODEL").lower())

    # What it is bound to.

    def config(self, app: Flask) -> Config:
        """The settings of an app, as they are now: they may be changed until a worker starts.

        :raises ConfigError: if one of them cannot be used.
        """
        if app.extensions.get("beanqueue") is not self:
            raise RuntimeError(
                f"The app {app.name!r} is not set up for this BeanQueue. Call bq.init_app(app)."
            )
        return Config.load(app.config)

    def engine(self, app: Flask) -> Engine:
        """The engine of the database that holds an app's queue."""
        bind_key = self.Task.__table__.metadata.info.get("bind_key")
        with app.app_context():
            engines = self.db.engines
            if bind_key not in engines:
                where = (
                    "SQLALCHEMY_DATABASE_URI"
                    if bind_key is None
                    else f"SQLALCHEMY_BINDS[{bind_key!r}]"
                )
                raise RuntimeError(f"The queue lives in the bind {bind_key!r}: set {where}.")
            return engines[bind_key]

    # Processors and tasks.

    def processor(
        self,
        channel: str = "default",
        *,
        retry_policy: RetryPolicy | None = None,
        retry_exceptions: Exceptions | None = None,
        auto_complete: bool = True,
    ) -> Decorator:
        """Make a function the processor of tasks.

        Parameters called ``db``, ``task`` and ``savepoint`` are filled in by the worker: the
        session, the ``bq.Task``, and a savepoint that is released when the function returns. All
        others are the task's arguments.

        :param channel: where its tasks wait.
        :param retry_policy: says after which time a task that failed runs again; without one it is
            FAILED at once.
        :param retry_exceptions: the exceptions after which the policy is asked; all, unless said.
        :param auto_complete: whether the task is DONE when the function returns. If not, it stays
            PROCESSING until :meth:`complete` or :meth:`fail`.
        """
        if callable(channel):
            raise TypeError('Write @bq.processor(channel="…"), or @bq.processor() for the default.')
        options = Options(channel)

        def decorate(func: t.Callable[..., t.Any]) -> AnyProcessor:
            processor: AnyProcessor = Processor(
                self,
                func,
                options,
                retry_policy=retry_policy,
                retry_exceptions=retry_exceptions,
                auto_complete=auto_complete,
            )
            self.registry.add(processor, Origin.of(func, sys._getframe(1)))
            return processor

        return t.cast(Decorator, decorate)

    def complete(self, task_id: uuid.UUID | str, *, result: t.Any = None) -> None:
        """End a task that ``auto_complete=False`` left PROCESSING: it is DONE.

        It happens in ``db.session`` and takes effect with its commit.

        :param result: kept in the task's row.
        :raises LookupError: if there is no such task.
        :raises TaskStateError: if the task has ended already, or its processor is still running.
        """
        fence.end(self, as_uuid(task_id), lambda claim: outcomes.ended(claim, result=result))

    def fail(self, task_id: uuid.UUID | str, *, error: str) -> None:
        """End a task that ``auto_complete=False`` left PROCESSING: it is FAILED, for good.

        It happens in ``db.session`` and takes effect with its commit.

        :param error: the reason, kept in the task's row and an event.
        :raises LookupError: if there is no such task.
        :raises TaskStateError: if the task has ended already, or its processor is still running.
        """
        if not isinstance(error, str):
            raise TypeError(f"error must be text, not {error!r}; write error=str(e)")
        fence.end(self, as_uuid(task_id), lambda claim: outcomes.ended(claim, error=error))

    # Workers.

    def process_tasks(
        self,
        channels: t.Sequence[str] = (),
        *,
        app: Flask | None = None,
        concurrency: int | None = None,
        burst: bool = False,
        name: str | None = None,
    ) -> None:
        """Do tasks until SIGTERM, SIGINT, SIGHUP or SIGQUIT: the loop behind ``flask bq worker``.

        :param channels: whose tasks to do; every channel that a processor names, if none is given.
        :param app: the app in whose contexts the tasks run; ``current_app``, unless given.
        :param concurrency: tasks to run at once, in threads; ``BQ_CONCURRENCY``, unless given.
        :param burst: return when no task is due.
        :param name: what the worker is called; host and process id, unless given.
        :raises WorkerDied: if another worker found this one dead, or it has lost a thread.
        """
        own_process = not burst and threading.current_thread() is threading.main_thread()
        worker = self.worker(
            channels, app=app, concurrency=concurrency, burst=burst, name=name, watched=own_process
        )
        worker.run()

    def worker(
        self,
        channels: t.Sequence[str] = (),
        *,
        app: Flask | None = None,
        concurrency: int | None = None,
        burst: bool = False,
        name: str | None = None,
        source: Source | None = None,
        watched: bool = False,
    ) -> Worker:
        """Make the worker that :meth:`process_tasks` runs, for those who need its ``stop()``.

        :param source: what tells it of news; a LISTEN connection of its own, unless given.
        :param watched: whether the process is the worker's, and ends itself when none of its
            threads gets a turn (``BQ_WATCHDOG``).
        """
        from .engine.worker import Worker  # which a web process does without

        if app is None:
            if not has_app_context():
                raise RuntimeError("Give app=, or call this in an app context.")
            app = this_app()
        check_app(app)
        if isinstance(channels, str) or not isinstance(channels, t.Iterable):
            example = channels if isinstance(channels, str) else "default"
            raise TypeError(
                f"channels is a sequence of names, not {channels!r}: write"
                f" channels=({example!r},), or leave it out for those of all processors."
            )
        channels = tuple(channels)
        for channel in channels:
            check_channel(channel)
        if concurrency is not None:
            check_count("concurrency", concurrency)
        if name is not None:
            check_text("name", name)
        config = self.config(app)
        self._make_models(config)  # which are made by now, and the same
        sessions = fence.watch(self)
        import_packages(config.PROCESSOR_PACKAGES)
        channels = tuple(dict.fromkeys(channels)) or self.registry.channels
        if not channels:
            raise RuntimeError(
                "There is nothing to work on: no channel was given, and no processor is registered."
                " Import the modules of your processors in the app factory, or name them in"
                " BQ_PROCESSOR_PACKAGES."
            )
        engine = self.engine(app)
        check_pool_is_there(engine, sessions)
        check_engine(engine, self.models.tables)
        return Worker(
            app,
            self,
            self.registry,
            config,
            engine,
            channels,
            concurrency=concurrency,
            burst=burst,
            name=name,
            source=source,
            watched=watched and config.WATCHDOG,
        )


def check_app(app: t.Any) -> None:
    if isinstance(app, SQLAlchemy):
        raise TypeError("The app must be a Flask app. Write BeanQueue(db=db) to hand the db over.")
    if not isinstance(app, Flask):
        raise TypeError(f"app must be a Flask app, not {app!r}")


def as_uuid(task_id: t.Any) -> uuid.UUID:
    wanted = f"A task's id is wanted, a UUID or its text, not {task_id!r}. Of a task, pass task.id."
    if not isinstance(task_id, (uuid.UUID, str)):
        raise TypeError(wanted)
    try:
        return uuid.UUID(str(task_id))
    except ValueError:
        raise ValueError(wanted) from None


def load_model(setting: str, name: str) -> type[t.Any]:
    """Import a model by its dotted name.

    :raises ConfigError: naming the setting.
    """
    module, _, attribute = name.rpartition(".")
    try:
        model = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ConfigError(f"{setting} names {name}, which cannot be imported: {error}") from error
    if not isinstance(model, type) or sa.inspect(model, raiseerr=False) is None:
        raise ConfigError(f"{setting} names {name}, which is no model but {model!r}.")
    return t.cast(type[t.Any], model)
