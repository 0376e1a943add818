"""A picture gallery: uploads are saved by a view, thumbnails are made by a worker."""

from __future__ import annotations

import os
import secrets

from flask import Flask
from flask.cli import NoAppException

from .extensions import bq, db
from .views import gallery


def create_app(database_url: str | None = None) -> Flask:
    """Make the app; ``flask --app example_app …`` calls this without arguments.

    :param database_url: the database, instead of the one that ``DATABASE_URL`` names.
    """
    app = Flask(__name__)
    app.config.from_mapping(
        SQLALCHEMY_DATABASE_URI=with_driver(database_url or os.environ.get("DATABASE_URL", "")),
        MAX_CONTENT_LENGTH=32 * 1024 * 1024,  # of one upload, all its pictures together
        # Signs the messages that the next page shows, which need not outlive a restart. Where
        # several processes serve the app, they must share one.
        SECRET_KEY=os.environ.get("SECRET_KEY") or secrets.token_hex(),
        SESSION_COOKIE_SAMESITE="Lax",
    )
    db.init_app(app)
    bq.init_app(app)
    app.register_blueprint(gallery)
    return app


def with_driver(url: str) -> str:
    """Say psycopg2 in a URL that names no driver.

    ``postgresql://`` means psycopg2 on SQLAlchemy 2.0 and psycopg 3 on 2.1; ``postgres://``, as
    some hosts spell it, means nothing to either.
    """
    if not url:
        # Of this exception, the flask command shows the message instead of a traceback.
        raise NoAppException(
            "DATABASE_URL is not set. Name a PostgreSQL database, such as"
            " DATABASE_URL=postgresql://localhost/gallery"
        )
    scheme, separator, rest = url.partition("://")
    if scheme in ("postgres", "postgresql"):
        scheme = "postgresql+psycopg2"
    return f"{scheme}{separator}{rest}"
