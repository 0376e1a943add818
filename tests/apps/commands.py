"""An app for the command line, whose processors are elsewhere: see BQ_PROCESSOR_PACKAGES."""

from __future__ import annotations

import os

from flask import Flask
from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

db = SQLAlchemy()
bq = BeanQueue(db=db)


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    bq.init_app(app)
    return app
