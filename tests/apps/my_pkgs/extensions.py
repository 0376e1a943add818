from __future__ import annotations

from flask_sqlalchemy import SQLAlchemy

from flask_beanqueue import BeanQueue

db = SQLAlchemy()
bq = BeanQueue(db=db)
