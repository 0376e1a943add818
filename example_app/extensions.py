"""The extensions, made once and bound to the app by ``create_app``."""

from __future__ import annotations

from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase

from flask_beanqueue import BeanQueue


class Base(DeclarativeBase):
    """The base of all models, the queue's included."""


db = SQLAlchemy(model_class=Base)
bq = BeanQueue(db=db)
