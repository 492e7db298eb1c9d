"""The processes of a machine compile a source once, whichever needs it first. Each error is reported in one line."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bagualu.trainer.operators import compiled
from bagualu.trainer.operators.compiled import CompileError, is_compiled, load_compiled
from bagualu.trainer.user_settings import cpp_compiler

SOURCE = """#include <c10/util/BFloat16.h>
extern "C" float rounded(float x) { return static_cast<float>(c10::BFloat16(x)) + PLUS; }
"""
can = pytest.mark.skipif(cpp_compiler() is None, reason="there is no C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "small.cpp"
    path.write_text(SOURCE)
    return path


def counting_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str = 'exec g++ "$@"') -> Path:
    """A compiler that writes a line whenever it is called, before it does what `script` says."""
    calls, path = folder / "calls", folder / "counting-compiler"
    path.write_text(f"#!/bin/sh\necho called >> {calls}\n{script}\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    return calls


@can
def test_it_is_compiled_once_and_anew_when_it_changes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counting_compiler(tmp_path, monkeypatch)
    assert not is_compiled(source, ["-DPLUS=1"])
    with ThreadPoolExecutor(4) as threads:
        libraries = list(threads.map(lambda _: load_compiled(source, ["-DPLUS=1"]), range(4)))
    assert calls.read_text().count("called") == 2  # to compile and to link
    assert is_compiled(source, ["-DPLUS=1"])
    assert [path.suffix for path in sorted((tmp_path / "cache" / "bagualu" / "compiled").iterdir())] == [".lock", ".so"]
    load_compiled(source, ["-DPLUS=1"])
    assert calls.read_text().count("called") == 2
    for library in libraries:
        assert _rounded(library) == 3
    assert _rounded(load_compiled(source, ["-DPLUS=2"])) == 4
    source.write_text(SOURCE.replace("PLUS", "5"))
    assert _rounded(load_compiled(source, ["-DPLUS=2"])) == 7


def _rounded(library: object) -> float:
    from ctypes import c_float

    function = library.rounded  # type: ignore[attr-defined]
    function.argtypes, function.restype = [c_float], c_float
    return float(function(2.001))


@can
def test_an_error_of_the_compiler_is_its_first_line(source: Path) -> None:
    with pytest.raises(CompileError, match=r"small.cpp:2:\d+: error: .PLUS. was not declared") as error:
        load_compiled(source, [])
    assert "\n" not in str(error.value)
    assert not is_compiled(source, [])


def test_so_is_an_end_without_words(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting_compiler(tmp_path, monkeypatch, "exit 3")
    with pytest.raises(CompileError, match="counting-compiler ended with 3"):
        load_compiled(source, [])


def test_a_compiler_that_hangs_is_given_up(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting_compiler(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(compiled, "_TIMEOUT_SECONDS", 0.1)
    with pytest.raises(CompileError, match="took longer than"):
        load_compiled(source, [])


def test_a_cache_that_cannot_be_written_is_said(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(CompileError, match=r"Not a directory: .*; give a folder that can be written in XDG_CACHE_HOME"):
        load_compiled(source, [])


@can
def test_a_damaged_library_is_said_and_compiled_anew_by_the_next_process(source: Path) -> None:
    library = compiled._library(source, ["-DPLUS=1"])
    library.parent.mkdir(parents=True)
    library.write_text("damaged")
    with pytest.raises(CompileError, match=r"small-.*\.so"):
        load_compiled(source, ["-DPLUS=1"])
    assert _rounded(load_compiled(source, ["-DPLUS=1"])) == 3
