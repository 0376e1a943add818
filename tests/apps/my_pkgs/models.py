from __future__ import annotations

import sqlalchemy as sa

from .extensions import db


class Image(db.Model):  # type: ignore[name-defined, misc]
    id = sa.Column(sa.Integer, primary_key=True)
    blob_name = sa.Column(sa.Text, nullable=False)
    width = sa.Column(sa.Integer)
    height = sa.Column(sa.Integer)
    task_id = sa.Column(sa.ForeignKey("bq_tasks.id"))
    task = sa.orm.relationship("BQTask")


class File(db.Model):  # type: ignore[name-defined, misc]
    id = sa.Column(sa.Integer, primary_key=True)
    blob_name = sa.Column(sa.Text, nullable=False)
    task_id = sa.Column(sa.ForeignKey("bq_tasks.id"))
    task = sa.orm.relationship("BQTask")
