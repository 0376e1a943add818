"""The example app: its views, its processor, its demo."""

import io
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager

import PIL.Image
import psutil
import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy import event, func, select

from example_app import create_app, processors, with_driver
from example_app.extensions import bq, db
from example_app.models import Image, Thumbnail
from example_app.pictures import SIZES
from example_app.samples import samples

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def app(database_url: str) -> Iterator[Flask]:
    app = create_app(database_url)
    app.config["TESTING"] = True
    with app.app_context():
        db.create_all()
    yield app
    with app.app_context():
        db.engine.dispose()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


def picture(size: tuple[int, int] = (600, 300), **options: object) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size, "teal").save(buffer, "PNG", **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG file of a few bytes that says it has this many pixels."""
    body = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = b""
    for kind, content in ((b"IHDR", body), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")):
        chunks += struct.pack(">I", len(content)) + kind + content
        chunks += struct.pack(">I", zlib.crc32(kind + content))
    return b"\x89PNG\r\n\x1a\n" + chunks


def upload(client: FlaskClient, *files: tuple[str, bytes], **options: object):
    pictures = [(io.BytesIO(data), name) for name, data in files]
    return client.post("/pictures", data={"pictures": pictures}, **options)


def work(app: Flask) -> None:
    """Do what is due."""
    result = app.test_cli_runner().invoke(args=["bq", "worker", "images", "--burst"])
    assert result.exit_code == 0, result.output


def counts(app: Flask) -> tuple[int, int, int]:
    """How many pictures, thumbnails and tasks there are."""
    with app.app_context():
        models = (Image, Thumbnail, bq.Task)
        return tuple(db.session.scalar(select(func.count()).select_from(m)) for m in models)


@contextmanager
def counted_commits() -> Iterator[list[sa.orm.Session]]:
    commits: list[sa.orm.Session] = []

    def count(session: sa.orm.Session) -> None:
        commits.append(session)

    event.listen(db.session, "after_commit", count)
    try:
        yield commits
    finally:
        event.remove(db.session, "after_commit", count)


def test_upload_saves_pictures_and_their_tasks_with_one_commit(app, client):
    with counted_commits() as commits:
        response = upload(client, ("one.png", picture()), ("two.png", picture()))
    assert response.status_code == 303
    assert len(commits) == 1
    assert counts(app) == (2, 6, 6)
    with app.app_context():
        for image in db.session.scalars(select(Image)):
            assert image.state == "pending"
            for thumbnail in image.thumbnails:
                assert thumbnail.task.state == "PENDING"
                assert thumbnail.task.channel == "images"
                assert thumbnail.task.kwargs == {"size": thumbnail.size}


def test_upload_whose_commit_fails_leaves_neither_picture_nor_task(app, client):
    def fail(session):
        session.flush()
        raise RuntimeError("The power is gone.")

    event.listen(db.session, "before_commit", fail)
    try:
        with pytest.raises(RuntimeError, match="power"):
            upload(client, ("one.png", picture()))
    finally:
        event.remove(db.session, "before_commit", fail)
    assert counts(app) == (0, 0, 0)


@pytest.mark.parametrize(
    ("files", "status", "words"),
    [
        ([("empty.png", b"")], 400, "empty.png is empty."),
        ([("notes.txt", b"words")], 400, "notes.txt is not named like a picture"),
        ([("", b"")], 400, "Choose one or more pictures first."),
        ([], 400, "Choose one or more pictures first."),
        ([("large.png", bytes(2048))], 413, "too much at once"),
    ],
    ids=["empty", "not named like a picture", "no name", "none", "too large"],
)
def test_refused_upload_says_why_and_leaves_nothing(app, client, files, status, words):
    app.config["MAX_CONTENT_LENGTH"] = 2048
    response = upload(client, *files)
    assert response.status_code == status
    assert words in response.text
    assert counts(app) == (0, 0, 0)


def test_good_pictures_are_taken_though_others_are_refused(app, client):
    response = upload(
        client, ("notes.txt", b"words"), ("one.png", picture()), follow_redirects=True
    )
    assert "notes.txt is not named like a picture" in response.text
    assert "one.png" in response.text
    assert counts(app) == (1, 3, 3)


def test_file_names_are_shown_without_folders_and_never_as_markup(client):
    page = upload(client, ("me/<b>\t.png", picture()), follow_redirects=True).text
    assert "&lt;b&gt;.png" in page
    assert "<b>" not in page
    assert "me/" not in page


def test_posts_from_other_sites_are_refused(app, client):
    headers = {"Origin": "https://elsewhere.example"}
    assert upload(client, ("one.png", picture()), headers=headers).status_code == 403
    assert client.post("/pictures/1/retry", headers={"Origin": "null"}).status_code == 403
    assert counts(app) == (0, 0, 0)
    headers = {"Origin": "http://localhost"}
    assert upload(client, ("one.png", picture()), headers=headers).status_code == 303


def test_the_worker_makes_a_thumbnail_of_each_size(app, client):
    upload(client, ("one.png", picture((600, 300))))
    work(app)
    with app.app_context():
        made = db.session.scalars(select(Thumbnail).order_by(Thumbnail.size)).all()
        assert [(t.size, t.width, t.height) for t in made] == [(s, s, s // 2) for s in SIZES]
        ids = [t.id for t in made]
    page = client.get("/").text
    assert "3 of 3 thumbnails ready" in page
    for id, size in zip(ids, SIZES, strict=True):
        assert f"/thumbnails/{id}.webp" in page
        response = client.get(f"/thumbnails/{id}.webp")
        assert response.mimetype == "image/webp"
        with PIL.Image.open(io.BytesIO(response.data)) as thumbnail:
            assert thumbnail.size == (size, size // 2)
        known = {"If-None-Match": response.headers["ETag"]}
        assert client.get(f"/thumbnails/{id}.webp", headers=known).status_code == 304


def test_a_small_picture_is_not_blown_up_and_a_turned_one_is_turned_back(app, client):
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was held sideways
    upload(client, ("one.png", picture((90, 60), exif=exif)))
    work(app)
    with app.app_context():
        sizes = {(t.width, t.height) for t in db.session.scalars(select(Thumbnail))}
    assert sizes == {(60, 90)}


def test_thumbnails_that_are_not_there_are_not_found(client):
    assert client.get("/thumbnails/1.webp").status_code == 404
    upload(client, ("one.png", picture()))
    assert client.get("/thumbnails/1.webp").status_code == 404


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"Dear diary, this is not a picture.", "This is not a picture"),
        (picture()[:200], "The picture is damaged: image file is truncated"),
        (bomb(8000, 8000), "The picture is too large: more than 50 million pixels."),
        (bomb(10000, 10000), "The picture is too large: more than 50 million pixels."),
        (bomb(200000, 200000), "The picture is too large: more than 50 million pixels."),
    ],
    ids=["text", "truncated", "large", "larger", "bomb"],
)
def test_a_broken_picture_fails_at_once_with_a_readable_reason(app, client, data, words):
    upload(client, ("one.png", data))
    work(app)
    with app.app_context():
        for task in db.session.scalars(select(bq.Task)):
            assert (task.state, task.attempts) == ("FAILED", 1)
    page = client.get("/").text
    assert page.count(words) == 2  # what the page shows, and how the script knows it has changed
    assert "Try again" in page
    assert "PictureError" not in page
    assert "Traceback" not in page


def test_trouble_that_may_pass_is_met_with_another_attempt(app, client, monkeypatch):
    def shrink(data, size):
        raise MemoryError

    upload(client, ("one.png", picture()))
    with monkeypatch.context() as patch:
        patch.setattr(processors, "shrink", shrink)
        work(app)
    with app.app_context():
        for task in db.session.scalars(select(bq.Task)):
            assert (task.state, task.attempts) == ("PENDING", 1)
            task.scheduled_at = func.now()
        assert db.session.scalar(select(Image)).state == "pending"
        db.session.commit()
    work(app)
    assert "3 of 3 thumbnails ready" in client.get("/").text


def test_trouble_that_stays_is_named(app, client, monkeypatch):
    def shrink(data, size):
        raise LookupError("It is not in the drawer.")

    monkeypatch.setattr(processors, "shrink", shrink)
    upload(client, ("one.png", picture()))
    work(app)
    assert "Something went wrong: LookupError." in client.get("/").text


def test_try_again_gives_each_failed_thumbnail_a_new_task_with_one_commit(app, client):
    upload(client, ("one.png", b"words"))
    work(app)
    with counted_commits() as commits:
        response = client.post("/pictures/1/retry")
    assert response.status_code == 303
    assert len(commits) == 1
    with app.app_context():
        assert {t.task.state for t in db.session.scalars(select(Thumbnail))} == {"PENDING"}
        states = db.session.scalars(select(bq.Task.state)).all()
    assert sorted(states) == ["FAILED"] * 3 + ["PENDING"] * 3
    client.post("/pictures/1/retry")
    assert counts(app) == (1, 3, 6)


def test_a_cancelled_task_is_shown_and_can_be_tried_again(app, client):
    upload(client, ("one.png", picture()))
    with app.app_context():
        db.session.execute(sa.update(bq.Task).values(state="CANCELLED"))
        db.session.commit()
    assert "Its task was cancelled." in client.get("/").text
    client.post("/pictures/1/retry")
    work(app)
    assert "3 of 3 thumbnails ready" in client.get("/").text


def test_a_picture_can_be_removed_before_the_worker_gets_to_it(app, client):
    upload(client, ("one.png", picture()))
    assert client.post("/pictures/1/remove").status_code == 303
    assert counts(app) == (0, 0, 3)
    work(app)
    with app.app_context():
        assert set(db.session.scalars(select(bq.Task.state))) == {"DONE"}
    assert client.post("/pictures/1/remove").status_code == 303


def test_the_fragment_holds_only_the_pictures_asked_for(client):
    upload(client, ("one.png", picture()), ("two.png", picture()), ("three.png", picture()))
    fragment = client.get("/pictures?id=1&id=3&id=99&id=x").text
    assert re.findall(r"<h2[^>]*>(.*)</h2>", fragment) == ["three.png", "one.png"]
    assert "<html" not in fragment


@pytest.mark.parametrize(
    ("url", "with_its_driver"),
    [
        ("postgres://me@there/db", "postgresql+psycopg2://me@there/db"),
        ("postgresql://me@there/db", "postgresql+psycopg2://me@there/db"),
        ("postgresql+psycopg://me@there/db", "postgresql+psycopg://me@there/db"),
    ],
)
def test_a_database_url_without_a_driver_means_psycopg2(url, with_its_driver):
    assert with_driver(url) == with_its_driver


def test_a_missing_database_url_is_said_without_a_traceback():
    done = run("flask", "--app", "example_app", "run")
    assert done.returncode != 0
    assert "Error: DATABASE_URL is not set." in done.stderr
    assert "Traceback" not in done.stderr


# The demo


def environment(**variables: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("DATABASE_URL", "PORT", "ONCE")}
    return kept | variables


def run(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *args]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True, timeout=90
    )


@contextmanager
def demo(**variables: str) -> Iterator[subprocess.Popen[str]]:
    """The demo in a process group of its own, once its samples are ready."""
    with subprocess.Popen(
        [sys.executable, "-m", "example_app.demo"],
        cwd=ROOT,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            for line in process.stdout:
                if line.startswith("Open http"):
                    break
            yield process
        finally:
            process.terminate()


@pytest.fixture
def port() -> str:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def worker_states(database_url: str) -> list[str]:
    app = create_app(database_url)
    with app.app_context():
        try:
            return list(db.session.scalars(select(bq.Worker.state)))
        finally:
            db.session.remove()
            db.engine.dispose()


def test_the_demo_prints_a_line_for_each_thumbnail_and_ends_by_itself_if_told(database_url, port):
    done = run("example_app.demo", DATABASE_URL=database_url, PORT=port, ONCE="1")
    assert (done.returncode, done.stderr) == (0, "")
    lines = re.findall(r"^(\S.*\S) +(\d+) px +(\d+) ms$", done.stdout, re.MULTILINE)
    expected = sorted((name, str(size)) for name, _ in samples() for size in SIZES)
    assert sorted((name, size) for name, size, _ in lines) == expected
    assert worker_states(database_url) == ["SHUTDOWN"]


@pytest.mark.parametrize(
    "stop",
    [
        lambda pid: os.killpg(pid, signal.SIGINT),
        lambda pid: os.kill(pid, signal.SIGINT),
        lambda pid: os.kill(pid, signal.SIGTERM),
    ],
    ids=["Ctrl-C", "SIGINT", "SIGTERM"],
)
def test_the_demo_stops_all_that_it_started(database_url, port, stop):
    with demo(DATABASE_URL=database_url, PORT=port) as process:
        children = psutil.Process(process.pid).children(recursive=True)
        assert len(children) == 2
        stop(process.pid)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")
    assert not any(child.is_running() for child in children)
    assert worker_states(database_url) == ["SHUTDOWN"]


@pytest.mark.parametrize(("name", "args"), [("web server", "run"), ("worker", "bq")])
def test_the_demo_says_it_when_a_child_ends_early(database_url, port, name, args):
    with demo(DATABASE_URL=database_url, PORT=port) as process:
        children = psutil.Process(process.pid).children()
        next(child for child in children if args in child.cmdline()).kill()
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"The {name} ended early." in errors
    assert "Traceback" not in errors
    assert not any(child.is_running() for child in children)


def test_the_demo_says_it_when_the_port_is_busy_and_starts_nothing(database_url):
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = run("example_app.demo", DATABASE_URL=database_url, PORT=port)
    assert done.returncode == 1
    assert f"Port {port} is not free" in done.stderr
    assert "PORT=" in done.stderr
    assert "Traceback" not in done.stderr
    engine = sa.create_engine(with_driver(database_url))
    assert sa.inspect(engine).get_table_names() == []
    engine.dispose()


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({}, "DATABASE_URL is not set."),
        ({"DATABASE_URL": "postgresql://127.0.0.1:1/x"}, "The database does not answer: "),
        ({"PORT": "http"}, "PORT must be a number from 1 to 65535, not 'http'."),
    ],
    ids=["no database", "wrong database", "wrong port"],
)
def test_the_demo_says_what_is_missing(port, variables, words):
    done = run("example_app.demo", **{"PORT": port, **variables})
    assert done.returncode == 1
    assert words in done.stderr
    assert "Traceback" not in done.stderr
