"""The configuration names the models, and where the processors are."""

from __future__ import annotations

import os

from flask import Flask

from flask_beanqueue import BeanQueue

from .models import db

bq = BeanQueue()


def create_app() -> Flask:
    app = Flask(__name__)
    app.config.from_mapping(
        SQLALCHEMY_DATABASE_URI=os.environ["DATABASE_URL"],
        BQ_PROCESSOR_PACKAGES=["my_pkgs.own_tables.processors"],
        BQ_BATCH_SIZE=10,
        BQ_TASK_MODEL="my_pkgs.own_tables.models.Task",
        BQ_WORKER_MODEL="my_pkgs.own_tables.models.Worker",
    )
    db.init_app(app)
    bq.init_app(app)
    return app
