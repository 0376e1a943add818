"""The project's own commands.

None of them imports the processors before it needs them: workers find those through
``BQ_PROCESSOR_PACKAGES`` alone.
"""

from __future__ import annotations

import click
from flask import Blueprint

from .extensions import bq, db
from .models import File, Image

commands = Blueprint("commands", __name__, cli_group=None)


@commands.cli.command("init-db")
def init_db() -> None:
    db.create_all()


@commands.cli.command("add-image")
@click.argument("blob_name")
def add_image(blob_name: str) -> None:
    from .images.processors import resize_image

    task = resize_image.run(width=200, height=300)
    image = Image(task=task, blob_name=blob_name)
    db.session.add(image)
    db.session.commit()


@commands.cli.command("add-file")
@click.argument("blob_name")
def add_file(blob_name: str) -> None:
    task = bq.Task(
        channel="files",
        module="my_pkgs.files.processors",
        name="upload_to_s3_for_backup",
    )
    file = File(task=task, blob_name=blob_name)
    db.session.add(task)
    db.session.add(file)
    db.session.commit()


@commands.cli.command("process-images")
def process_images() -> None:
    bq.process_tasks(channels=("images",))
