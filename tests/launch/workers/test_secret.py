"""The secret of a job's agents, and what they sign with it."""

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.launch.workers import secret
from bagualu.launch.workers.rendezvous_config import Meeting
from bagualu.launch.workers.secret import Seal

LONG = "x" * 32


def test_it_is_taken_from_the_environment_and_taken_out_of_it(monkeypatch, tmp_path):
    monkeypatch.setenv(secret.VARIABLE, LONG)
    assert secret.of_the_job(tmp_path) == LONG
    assert secret.VARIABLE not in secret.os.environ
    assert list(tmp_path.iterdir()) == []


def test_without_one_the_first_agent_makes_a_file_that_only_its_user_reads(tmp_path):
    first = secret.of_the_job(tmp_path / "run")
    path = tmp_path / "run" / ".secret"
    assert path.stat().st_mode & 0o777 == 0o600
    assert len(first) == 64
    assert secret.of_the_job(tmp_path / "run") == first
    assert secret.of_the_job(tmp_path / "other") != first


def test_a_short_or_an_open_secret_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv(secret.VARIABLE, "password")
    with pytest.raises(RecipeError, match="has 8 characters; give at least 16"):
        secret.of_the_job(tmp_path)
    secret.of_the_job(tmp_path)
    (tmp_path / ".secret").chmod(0o644)
    with pytest.raises(RecipeError, match="other users can read"):
        secret.of_the_job(tmp_path)


def test_what_is_signed_counts_where_it_was_signed_for_and_nowhere_else(capsys):
    seal = Seal(LONG, "run")
    signed = seal.sign("key", "text").encode()
    assert seal.opened("key", signed) == "text"
    assert capsys.readouterr().err == ""
    for stranger, name, value in [
        (seal, "key", b"text"),
        (seal, "key", signed + b"more"),
        (seal, "key", b"\xff\xfe \x00"),
        (seal, "key", b""),
        (seal, "other", signed),
        (Seal(LONG, "another run"), "key", signed),
        (Seal("y" * 32, "run"), "key", signed),
    ]:
        assert stranger.opened(name, value) is None
    assert seal.opened("key", b"again") is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4, "one line for each seal and name"
    assert all("not signed with this job's secret; " in line and LONG not in line for line in lines)


def test_it_is_not_shown_with_the_meeting():
    assert LONG not in repr(Meeting("here", 1, "id", "job", 2, 2, LONG))
