from sqlalchemy.orm import Session

from .. import image_utils, models
from ..extensions import bq


@bq.processor(channel="images")
def resize_image(db: Session, task: bq.Task, width: int, height: int) -> None:  # type: ignore[name-defined]
    image = db.query(models.Image).filter(models.Image.task == task).one()
    image_utils.resize(image, size=(width, height))
    db.add(image)
