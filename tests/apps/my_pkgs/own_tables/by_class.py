"""The code hands the models over, and mixins make their references."""

from __future__ import annotations

import os

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import (
    BeanQueue,
    TaskModelMixin,
    TaskModelRefWorkerMixin,
    WorkerModelMixin,
    WorkerRefMixin,
)

db = SQLAlchemy()


class Task(TaskModelMixin, TaskModelRefWorkerMixin, db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "task"
    bq_worker_table = "worker"
    bq_worker_class = "Worker"


class Worker(WorkerModelMixin, WorkerRefMixin, db.Model):  # type: ignore[name-defined, misc]
    __tablename__ = "worker"
    bq_task_class = "Task"


bq = BeanQueue(db=db, task_model=Task, worker_model=Worker)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    bq.init_app(app)
    return app


@bq.processor(channel="letters")
def post(number: int) -> int:
    return number
