"""A project as users lay it out: images and files, each with a package of processors."""

from __future__ import annotations

import os

from flask import Flask

from .commands import commands
from .extensions import bq, db


def create_app() -> Flask:
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
    db.init_app(app)
    bq.init_app(app)
    app.register_blueprint(commands)
    return app
