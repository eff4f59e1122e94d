"""Building: quick to ask, once per cache, safe for two at once, and clear when it fails."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest

from offload_engine import sim
from offload_engine.sim import build

FAKE_COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then echo fake 1.0; exit 0; fi
echo run >> {log}
sleep 0.2
while [ "$1" != -o ]; do shift; done
echo library > "$2"
"""


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """A compiler that notes its runs, and an empty cache."""
    log, path = tmp_path / "log", tmp_path / "g++"
    log.touch()
    path.write_text(FAKE_COMPILER.format(log=log))
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))
    monkeypatch.setenv("OFFLOAD_ENGINE_CACHE", str(tmp_path / "cache"))
    return log


def test_importing_it_loads_no_torch_and_builds_nothing():
    code = (
        "import sys, offload_engine.sim as sim, offload_engine.sim.pytest_plugin\n"
        "sim.why_unavailable()\n"
        "assert 'torch' not in sys.modules, 'torch'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_asking_is_quick(device):
    started = time.perf_counter()
    assert sim.why_unavailable() is None
    assert time.perf_counter() - started < 0.1


def test_a_second_call_uses_what_the_first_has_built(compiler):
    assert build.library() == build.library()
    assert compiler.read_text().split() == ["run"]
    assert [path.suffix for path in build.library().parent.iterdir()] == [".so"]


def test_two_that_build_at_once_both_get_a_whole_library(compiler):
    built = []
    threads = [threading.Thread(target=lambda: built.append(build.library())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built[0] == built[1]
    assert built[0].read_text() == "library\n"


def test_another_compiler_makes_another_library(compiler, monkeypatch, tmp_path):
    first = build.library()
    (tmp_path / "g++").write_text((tmp_path / "g++").read_text().replace("1.0", "2.0"))
    assert build.library() != first


def test_a_compiler_that_fails_is_quoted(compiler, tmp_path):
    (tmp_path / "g++").write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "error: no such thing" >&2\nexit 1\n'
    )
    with pytest.raises(sim.SimUnavailable, match="error: no such thing"):
        build.library()


def test_without_a_compiler_it_says_so(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler" in sim.why_unavailable()
    with pytest.raises(sim.SimUnavailable, match="no C\\+\\+ compiler"):
        build.library()
