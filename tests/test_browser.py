"""The example app in a real browser, with a real web server and a real worker."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select

from example_app import create_app
from example_app.extensions import bq, db
from example_app.samples import samples

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for path in map(shutil.which, NAMES) if path), None)
FLAGS = [
    *(["--no-sandbox"] if os.geteuid() == 0 else []),
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(
        CHROMIUM is None and os.environ.get("REQUIRE_BROWSER") != "1",
        reason="There is no Chromium. (With REQUIRE_BROWSER=1 this would be a failure.)",
    ),
]


@pytest.fixture
def page() -> Iterator[Any]:
    """A page in a fresh browser. Whatever its console complains of fails the test."""
    assert CHROMIUM, f"REQUIRE_BROWSER=1, but there is none of {', '.join(NAMES)}."
    from playwright.sync_api import sync_playwright

    complaints: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        yield page
        browser.close()
    assert complaints == []


@contextmanager
def flask(database_url: str, *args: str, ready: str) -> Iterator[re.Match[str]]:
    """A flask command of the example app, once a line of its log matches."""
    with subprocess.Popen(
        [sys.executable, "-m", "flask", "--app", "example_app", *args],
        cwd=ROOT,
        env=os.environ | {"DATABASE_URL": database_url},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            log = ""
            for line in process.stderr or ():
                log += line
                if match := re.search(ready, line):
                    break
            else:
                pytest.fail(f"flask {' '.join(args)} ended:\n{log}")
            yield match
        finally:
            process.terminate()


def test_a_person_uploads_pictures_sees_thumbnails_and_failures_and_tries_again(database_url, page):
    from playwright.sync_api import expect

    app = create_app(database_url)
    with app.app_context():
        db.create_all()

    def choose(name: str, data: bytes) -> None:
        file = {"name": name, "mimeType": "image/png", "buffer": data}
        page.get_by_label("Add pictures").set_input_files(file)
        page.get_by_role("button", name="Upload").click()

    def card(name: str) -> Any:
        return page.get_by_role("article", name=name)

    with flask(database_url, "run", "--port", "0", ready=r"Running on (http://\S+)") as match:
        page.goto(match[1])
        expect(page.get_by_text("Nothing here yet.")).to_be_visible()

        # No worker yet: the page waits, and fills in what comes, without being loaded again.
        name, data = next(samples())
        choose(name, data)
        expect(card(name).locator("[data-state=pending]")).to_have_count(3)
        page.evaluate("window.unchanged = true")

        with flask(database_url, "bq", "worker", "images", ready="worker .* on images"):
            expect(card(name).get_by_role("img")).to_have_count(3)
            expect(card(name)).to_contain_text("3 of 3 thumbnails ready")
            expect(page.locator("#news")).to_have_text(f"{name}: 3 of 3 thumbnails ready")
            largest = card(name).get_by_role("img", name="512 pixels")
            largest.evaluate("image => image.decode()")
            assert largest.evaluate("image => image.naturalWidth") == 512
            assert page.evaluate("window.unchanged")

            # What is no picture fails, with a reason, and may be tried again, with no more luck.
            choose("diary.png", b"Dear diary, this is not a picture.")
            expect(card("diary.png")).to_contain_text("This is not a picture")
            expect(card("diary.png").get_by_role("img")).to_have_count(0)
            with page.expect_navigation():
                page.get_by_role("button", name="Try again: diary.png").click()
            expect(card("diary.png")).to_contain_text("This is not a picture")
            expect(card("diary.png").get_by_role("button", name="Try again")).to_be_visible()

            # Nothing has happened to the other.
            expect(card(name).get_by_role("img")).to_have_count(3)

    with app.app_context():
        states = db.session.scalars(select(bq.Task.state)).all()
        db.session.remove()
        db.engine.dispose()
    assert sorted(states) == ["DONE"] * 3 + ["FAILED"] * 6
