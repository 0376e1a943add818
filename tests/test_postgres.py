"""The PostgreSQL that ``make`` starts for what it runs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

TELL = "import os; print(os.environ['DATABASE_URL'])"


def told(**env: str) -> str:
    command = [sys.executable, "-m", "tests.postgres", "--fast", "--", sys.executable, "-c", TELL]
    inherited = {name: os.environ[name] for name in os.environ if name != "TEST_DATABASE_URL"}
    return subprocess.check_output(command, env=inherited | env, text=True).strip()


def test_a_database_of_the_users_own_is_not_touched() -> None:
    url = told(DATABASE_URL="postgresql://shop@db.example/shop")
    assert url.startswith("postgresql")
    assert "example" not in url


@pytest.mark.parametrize("own", [{}, {"DATABASE_URL": "postgresql://shop@db.example/shop"}])
def test_a_server_for_tests_is_used(own: dict[str, str]) -> None:
    url = "postgresql://test@db.example/postgres"
    assert told(TEST_DATABASE_URL=url, **own) == url
