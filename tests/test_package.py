"""What is built of the project, to be installed and read elsewhere."""

from __future__ import annotations

import email
import email.message
import re
import tarfile
import zipfile
from pathlib import Path

import pytest
from flit_core import buildapi

ROOT = Path(__file__).parent.parent
FOLDERS = ("flask_beanqueue", "tests", "docs", "example_app", "benchmarks")
#: What tools leave behind.
LITTER = ("__pycache__", ".pyc", ".egg-info")


def files(*folders: str) -> set[str]:
    found = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    names = {path.relative_to(ROOT).as_posix() for path in found}
    return {name for name in names if not any(each in name for each in LITTER)}


@pytest.fixture
def wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> zipfile.ZipFile:
    monkeypatch.chdir(ROOT)
    return zipfile.ZipFile(tmp_path / buildapi.build_wheel(str(tmp_path)))


@pytest.fixture
def metadata(wheel: zipfile.ZipFile) -> email.message.Message:
    [name] = [name for name in wheel.namelist() if name.endswith("/METADATA")]
    return email.message_from_bytes(wheel.read(name))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == files("flask_beanqueue")
    assert "flask_beanqueue/py.typed" in names


def test_the_wheel_brings_the_command(wheel: zipfile.ZipFile) -> None:
    [name] = [name for name in wheel.namelist() if name.endswith("/entry_points.txt")]
    assert "[flask.commands]\nbq=flask_beanqueue.cli:bq_cli" in wheel.read(name).decode()


def test_the_sdist_holds_all_that_is_needed_to_test_and_to_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with tarfile.open(tmp_path / buildapi.build_sdist(str(tmp_path))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    others = {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", ".ci/run"}
    assert files(*FOLDERS) | others <= names
    assert not any(each in name for name in names for each in LITTER)


def test_the_description_has_no_link_that_is_dead_elsewhere(
    metadata: email.message.Message,
) -> None:
    text = str(metadata.get_payload())
    links = re.findall(r"\]\(([^)]*)\)", text) + re.findall(r"^\[[^\]]*\]: *(\S+)", text, re.M)
    assert links
    assert all(link.startswith(("https://", "#")) for link in links)
    named = re.findall(r"`([\w./]+\.md|example_app)`", text)
    assert len(named) > 5
    assert all((ROOT / name).exists() for name in named)


def test_the_metadata_says_where_to_look_and_what_is_tested(
    metadata: email.message.Message,
) -> None:
    assert metadata.get_all("Project-URL")
    versions = [each.rpartition(" ")[2] for each in metadata.get_all("Classifier", [])]
    assert {"3.11", "3.12", "3.13"} <= set(versions)
