import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bagualu.comm.errors import RecipeError
from bagualu.trainer.data.build import documents
from bagualu.trainer.data.sources import find_files, require_files
from bagualu.trainer.data.split import by_files, hash_fraction


def read(source: Path, fraction: float = 0.25) -> list[tuple[str, str, bool]]:
    files = find_files(str(source))
    return [
        (d.part.file.name, "".join(d.part.pieces()), d.validation) for d in documents(files, by_files(files, fraction), str(source))
    ]


def test_the_standard_library_is_found_without_tests_and_packages():
    names = [file.name for file in find_files("stdlib")]
    assert len(names) > 300
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages", "__pycache__"} & set(name.split("/"))]


def test_a_folder_is_split_by_the_names_of_its_files(folder):
    before = {name: validation for name, _, validation in read(folder)}
    assert before == {name: (hash_fraction(name) < 0.25) for name in before}
    assert 0 < sum(before.values()) < len(before)
    for path in folder.rglob("*.txt"):
        path.write_text("other words")
    assert {name: validation for name, _, validation in read(folder)} == before


def test_hidden_and_empty_files_are_left_out_and_line_ends_kept(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r")
    (tmp_path / "b.txt").write_bytes(b"three\n")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_bytes(b"\xff")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "index").write_bytes(b"\xff")
    assert [(name, text) for name, text, _ in read(tmp_path)] == [("a.txt", "one\r\ntwo\r"), ("b.txt", "three\n")]


def test_a_lone_file_is_cut_at_a_line(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i}\n" for i in range(100)))
    (_, train, _), (_, validation, _) = read(path)
    assert train + validation == path.read_text()
    assert train.endswith("\n")
    assert 20 <= validation.count("\n") <= 30


def test_a_missing_source_says_what_to_give():
    with pytest.raises(RecipeError, match=r"data\.source=/no/such is not there; give .* stdlib"):
        find_files("/no/such")


def test_an_empty_source_says_what_to_give(tmp_path):
    (tmp_path / "empty.txt").touch()
    for source in (tmp_path, tmp_path / "empty.txt"):
        with pytest.raises(RecipeError, match=r"holds no text; put UTF-8"):
            find_files(str(source))


def test_a_file_that_is_not_text_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.bin").write_bytes(b"abc\xff")
    with pytest.raises(RecipeError, match=r"b\.bin is not UTF-8 text \(byte 3\); convert"):
        read(tmp_path)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def as_another_user(source: Path) -> str:
    """What `require_files` says to a user who is not root."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.getuid() == 0:
                os.setgid(65534)
                os.setuid(65534)
            require_files(str(source))
            os.write(writing, b"nothing")
        except RecipeError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as stream:
        return stream.read().decode()


def test_a_file_or_folder_that_may_not_be_read_is_named(open_folder):
    (open_folder / "a").write_text("text")
    (open_folder / "b").write_text("text")
    (open_folder / "c").mkdir()
    (open_folder / "c").chmod(0o755)
    assert as_another_user(open_folder) == "nothing"
    (open_folder / "b").chmod(0)
    assert f"{open_folder}/b cannot be read (Permission denied); make it readable" in as_another_user(open_folder)
    (open_folder / "b").unlink()
    (open_folder / "c").chmod(0)
    assert f"{open_folder}/c cannot be listed (Permission denied); put it right" in as_another_user(open_folder)


def test_a_source_that_is_neither_file_nor_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(RecipeError, match=r"pipe is neither a file nor a folder; give a text file or folder"):
        find_files(str(tmp_path / "pipe"))
