"""The pages."""

from __future__ import annotations

import io
import pathlib
from urllib.parse import urlsplit

from flask import (
    Blueprint,
    Response,
    abort,
    current_app,
    flash,
    redirect,
    render_template,
    request,
    send_file,
    url_for,
)
from sqlalchemy import Select, select
from sqlalchemy.orm import selectinload
from werkzeug.datastructures import FileStorage
from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.wrappers import Response as BaseResponse

from .extensions import db
from .models import Image, Thumbnail
from .pictures import FORMATS, SIZES
from .processors import make_thumbnail

SHOWN = 60

gallery = Blueprint("gallery", __name__)


@gallery.before_request
def refuse_other_sites() -> None:
    """Let no other site's page post here: browsers say where a form comes from."""
    origin = request.headers.get("Origin")
    if request.method == "POST" and origin and urlsplit(origin).netloc != request.host:
        abort(403, "This form was sent from another site.")


@gallery.get("/")
def index() -> str:
    pictures = db.session.scalars(newest_first().limit(SHOWN)).all()
    return render_template(
        "gallery.html",
        pictures=pictures,
        names=",".join(FORMATS),
        limit=current_app.config["MAX_CONTENT_LENGTH"],
    )


@gallery.get("/pictures")
def fragment() -> str:
    """The pictures with the given ids, for a page that waits for their thumbnails."""
    ids = request.args.getlist("id", type=int)[:SHOWN]
    pictures = db.session.scalars(newest_first().where(Image.id.in_(ids))).all()
    return render_template("pictures.html", pictures=pictures)


@gallery.post("/pictures")
def upload() -> BaseResponse | tuple[str, int]:
    # Of an empty form, a browser sends one file without a name.
    files = [file for file in request.files.getlist("pictures") if file.filename]
    if not files:
        flash("Choose one or more pictures first.")
    images = []
    for file in files:
        data = file.read()
        if reason := refusal(file, data):
            flash(reason)
            continue
        image = Image(name=display_name(file), data=data)
        image.thumbnails = [
            Thumbnail(size=size, task=make_thumbnail.run(size=size)) for size in SIZES
        ]
        images.append(image)
    if not images:
        return index(), 400
    # One commit saves the pictures, their thumbnails' rows and the tasks, and wakes the worker.
    # There is no moment at which a task could look for a picture that is not there yet, and no
    # failure that could leave a picture without its tasks.
    db.session.add_all(images)
    db.session.commit()
    return redirect(url_for(".index"), 303)


@gallery.post("/pictures/<int:image_id>/retry")
def retry(image_id: int) -> BaseResponse:
    """Give each failed thumbnail a new task. The old one stays as it is, for the record."""
    thumbnails = db.session.scalars(
        # Locked, so that of two clicks the second finds nothing left to do.
        select(Thumbnail).where(Thumbnail.image_id == image_id).with_for_update()
    ).all()
    for thumbnail in thumbnails:
        if thumbnail.state == "failed":
            thumbnail.task = make_thumbnail.run(size=thumbnail.size)
    db.session.commit()
    return redirect(url_for(".index", _anchor=f"picture-{image_id}"), 303)


@gallery.post("/pictures/<int:image_id>/remove")
def remove(image_id: int) -> BaseResponse:
    if image := db.session.get(Image, image_id):
        db.session.delete(image)
        db.session.commit()
    return redirect(url_for(".index"), 303)


@gallery.get("/thumbnails/<int:thumbnail_id>.webp")
def thumbnail(thumbnail_id: int) -> Response:
    found = db.get_or_404(Thumbnail, thumbnail_id)
    if found.data is None:
        abort(404)
    return send_file(io.BytesIO(found.data), mimetype="image/webp", etag=str(found.task_id))


@gallery.errorhandler(RequestEntityTooLarge)
def too_large(error: RequestEntityTooLarge) -> tuple[str, int]:
    limit = current_app.config["MAX_CONTENT_LENGTH"] // 1024**2
    flash(f"That is too much at once: an upload may have {limit} MB.")
    return index(), 413


def newest_first() -> Select[tuple[Image]]:
    tasks = selectinload(Image.thumbnails).joinedload(Thumbnail.task)
    return select(Image).order_by(Image.id.desc()).options(tasks)


def refusal(file: FileStorage, data: bytes) -> str | None:
    """Say why an uploaded file is not taken. What is inside it, the worker finds out."""
    name = display_name(file)
    if pathlib.PurePath(name).suffix.lower() not in FORMATS:
        return f"{name} is not named like a picture ({', '.join(FORMATS)})."
    if not data:
        return f"{name} is empty."
    return None


def display_name(file: FileStorage) -> str:
    """The file's name as a person would say it: without folders and control characters."""
    name = pathlib.PurePath(file.filename or "").name
    return "".join(filter(str.isprintable, name))[-100:]
