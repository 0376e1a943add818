"""The gallery at work: a web server, a worker, and some pictures to start with.

``python -m example_app.demo`` takes the database from ``DATABASE_URL`` and the port from ``PORT``.
With ``ONCE=1`` it ends after its own pictures.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import IO, NamedTuple

import click
from flask import Flask
from sqlalchemy import func, select
from sqlalchemy.exc import OperationalError

from . import create_app
from .extensions import bq, db
from .models import Image, Thumbnail
from .pictures import SIZES
from .samples import samples

HOST = "127.0.0.1"
TIME_LIMIT = 60.0  # seconds, for the start and the samples together
GRACE = 10.0  # seconds, for a child to end


class Trouble(Exception):
    """The demo cannot go on; the message says why."""


class Child(NamedTuple):
    name: str
    process: asyncio.subprocess.Process
    output: IO[bytes]

    def said(self) -> str:
        self.output.seek(0)
        return self.output.read().decode(errors="replace").strip() or "(It said nothing.)"


def main() -> None:
    try:
        port = free_port(os.environ.get("PORT") or "5000")
        app = create_app()
        with app.app_context():
            db.create_all()  # the queue's tables, too: its models are models of db
        asyncio.run(run(app, port, once=os.environ.get("ONCE") == "1"))
    except KeyboardInterrupt:  # before anything was started
        sys.exit(130)
    except OperationalError as error:
        sys.exit(f"The database does not answer: {error.orig}")
    except click.ClickException as error:
        sys.exit(error.format_message())
    except Trouble as error:
        sys.exit(str(error))


def free_port(text: str) -> int:
    if not (text.isdecimal() and 0 < int(text) < 65536):
        raise Trouble(f"PORT must be a number from 1 to 65535, not {text!r}.")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, int(text)))
        except OSError as error:
            raise Trouble(
                f"Port {text} is not free ({error.strerror}). Choose another, such as PORT=5050."
            ) from error
    return int(text)


async def run(app: Flask, port: int, *, once: bool) -> None:
    """Run the children and the show, until the show ends, or a child does, or a signal comes."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)

    worker_name = f"demo {uuid.uuid4().hex[:8]}"
    web_args = ["run", "--host", HOST, "--port", str(port), "--no-reload", "--no-debugger"]
    async with (
        child("web server", *web_args) as web,
        child("worker", "bq", "worker", "images", "--name", worker_name) as worker,
    ):
        stopped = asyncio.create_task(stop.wait())
        ends = {asyncio.create_task(each.process.wait()): each for each in (web, worker)}
        work = asyncio.create_task(show(app, port, worker_name, once=once))
        await asyncio.wait({work, stopped, *ends}, return_when=asyncio.FIRST_COMPLETED)
        if work.done() and work.exception():  # perhaps because of an end that shows next
            await asyncio.wait({stopped, *ends}, timeout=1, return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set():
            work.cancel()
            if once:
                raise Trouble("Stopped before the end.")
            return
        for end, each in ends.items():
            if end.done():
                work.cancel()
                raise Trouble(f"The {each.name} ended early. It said:\n{each.said()}")
        try:
            work.result()
        except Trouble as error:
            raise Trouble(f"{error}\nThe worker said:\n{worker.said()}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Trouble(
                f"The upload failed: {error}\nThe web server said:\n{web.said()}"
            ) from error


@contextlib.asynccontextmanager
async def child(name: str, *args: str) -> AsyncIterator[Child]:
    """Run ``flask --app example_app …``, and end it when the block ends."""
    with tempfile.TemporaryFile() as output:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "flask", "--app", "example_app", *args),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            process_group=0,  # Ctrl-C is for the demo alone; it ends its children, each once.
        )
        try:
            yield Child(name, process, output)
        finally:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), GRACE)
            except TimeoutError:
                process.kill()
                await process.wait()


async def show(app: Flask, port: int, worker_name: str, *, once: bool) -> None:
    """Upload the samples as a browser would, and tell of each thumbnail."""
    missing = 0
    try:
        async with asyncio.timeout(TIME_LIMIT):
            await until(answers, port)
            await until(runs, app, worker_name)
            for name, data in samples():
                missing += await show_one(app, port, name, data)
    except TimeoutError:
        raise Trouble(f"The samples were not ready after {TIME_LIMIT:.0f} seconds.") from None
    if missing:
        raise Trouble(f"{missing} thumbnails could not be made.")
    if not once:
        say(f"\nOpen http://{HOST}:{port} and add pictures of your own. Ctrl-C ends the demo.")
        await asyncio.Event().wait()


async def show_one(app: Flask, port: int, name: str, data: bytes) -> int:
    """Upload a picture and print a line for each thumbnail.

    :return: how many failed.
    """
    last_id = await asyncio.to_thread(newest, app)
    begin = time.perf_counter()
    await asyncio.to_thread(post, port, name, data)
    shown: set[int] = set()
    failed = 0
    while len(shown) < len(SIZES):
        for size, state, reason in await asyncio.to_thread(thumbnails, app, name, last_id):
            if size in shown or state == "pending":
                continue
            shown.add(size)
            failed += state == "failed"
            milliseconds = (time.perf_counter() - begin) * 1000
            outcome = reason if state == "failed" else f"{milliseconds:>5.0f} ms"
            say(f"{name:<22}{size:>4} px  {outcome}")
        await asyncio.sleep(0.01)
    return failed


async def until(condition: Callable[..., bool], *args: object) -> None:
    while not await asyncio.to_thread(condition, *args):
        await asyncio.sleep(0.05)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def runs(app: Flask, worker_name: str) -> bool:
    with app.app_context():
        query = select(bq.Worker).filter_by(name=worker_name, state="RUNNING")
        return db.session.scalar(query) is not None


def newest(app: Flask) -> int:
    with app.app_context():
        return db.session.scalar(select(func.max(Image.id))) or 0


def thumbnails(app: Flask, name: str, after: int) -> list[tuple[int, str, str]]:
    """Size, state and, if it failed, the reason of each thumbnail of a picture."""
    with app.app_context():
        query = select(Thumbnail).join(Thumbnail.image).where(Image.name == name, Image.id > after)
        found = db.session.scalars(query.order_by(Thumbnail.id))
        return [(t.size, t.state, t.reason if t.state == "failed" else "") for t in found]


def post(port: int, name: str, data: bytes) -> None:
    """Send a picture as the form on the page does."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="pictures"; filename="{name}"\r\n'
    body = f"{head}\r\n".encode() + data + f"\r\n--{boundary}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with contextlib.closing(http.client.HTTPConnection(HOST, port, timeout=TIME_LIMIT)) as web:
        web.request("POST", "/pictures", body, headers)
        with web.getresponse() as response:
            if response.status != 303:
                raise http.client.HTTPException(f"{name} was answered with {response.status}")


def say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    main()
