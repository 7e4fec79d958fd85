"""Forks stand for ``python -m``: output, variables, status, signals and the end of whoever started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import warm
from tests.support import ROOT, command, environment, python

PROGRAM = """
import os, random, sys, time
what, *rest = sys.argv[1:]
mask, imported = os.umask(0), "transformers" in sys.modules
print(os.getpid(), os.environ["DUALTOK_WORD"], os.getcwd(), mask, random.random(), imported, flush=True)
if what == "wait":
    time.sleep(60)
print(rest, file=sys.stderr)
sys.exit(what if what == "message" else int(what))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory that holds the program as a module."""
    made = tmp_path_factory.mktemp("program")
    (made / "warm_program.py").write_text(PROGRAM)
    return made


def start(folder: Path, *arguments: str, word: str = "a", afresh: bool = False) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("warm_program", *arguments, afresh=afresh),
        env=environment(DUALTOK_WORD=word),
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def wait_until_gone(process: int) -> None:
    deadline = time.monotonic() + 20
    while psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.02)


@pytest.mark.parametrize("arguments", [("0", "x", "y z"), ("3",), ("message",)])
def test_a_fork_says_and_returns_what_a_new_process_does(folder: Path, arguments: tuple[str, ...]) -> None:
    seen, before = [], os.umask(0o031)
    for afresh in (False, True):
        process = start(folder, *arguments, word="b c", afresh=afresh)
        output, errors = process.communicate(timeout=60)
        _, *words, _, imported = output.split()
        assert imported == str(not afresh)
        seen.append((words, errors, process.returncode))
    os.umask(before)
    assert seen[0] == seen[1]
    assert seen[0][0] == ["b", "c", str(folder), str(0o031)]


def test_forks_draw_different_numbers_and_know_their_own_variables(folder: Path) -> None:
    outputs = [start(folder, "0", word=word).communicate(timeout=60)[0].split() for word in "ab"]
    assert [words[1] for words in outputs] == ["a", "b"]
    assert outputs[0][4] != outputs[1][4]


def test_a_signal_reaches_the_fork_and_its_end_is_told(folder: Path) -> None:
    process = start(folder, "wait")
    assert process.stdout is not None
    fork = int(process.stdout.readline().split()[0])
    assert fork != process.pid
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    wait_until_gone(fork)
    process.communicate()


def test_a_fork_ends_with_whoever_started_it(folder: Path) -> None:
    process = start(folder, "wait")
    assert process.stdout is not None
    fork = int(process.stdout.readline().split()[0])
    process.kill()
    wait_until_gone(fork)
    process.communicate()


def test_the_server_ends_with_the_process_that_needed_it(tmp_path: Path) -> None:
    own = {**os.environ, warm.SHARED: "/nowhere/server /another/tree"}  # of a copy of the tree, with other modules
    done = subprocess.run(
        [sys.executable, "-c", "from tests import warm; print(warm.launcher()[-1])"],
        cwd=ROOT,
        env=own,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    address = done.stdout.strip()
    deadline = time.monotonic() + 20
    while any(address in " ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"])):
        assert time.monotonic() < deadline, "it is still there"
        time.sleep(0.05)
    assert not Path(address).exists()


SERVES = """
import subprocess
from tests import warm
warm.share({"DUALTOK_WORD": "of the server"})
own = [*warm.launcher(), "-c", "import os, sys; print('torch' in sys.modules, os.getenv('DUALTOK_WORD'))"]
done = subprocess.run(own, capture_output=True, text=True)
print(warm.launcher(), done.returncode, done.stdout + done.stderr)
"""


def test_a_fork_may_have_a_server_of_its_own() -> None:
    address, *rest = printed("-c", SERVES, **{warm.SHARED: "", "DUALTOK_WORD": "own"})
    assert warm.launcher()[0] not in address
    assert rest == ["0", "True", "own"]


def printed(*arguments: str, **variables: str) -> list[str]:
    done = subprocess.run(
        python(*arguments),
        env=environment(**variables),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout.split()


def test_a_program_and_a_script_are_forked_and_so_is_what_they_start(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import subprocess, sys\n"
        "print(sys.argv[1], 'torch' in sys.modules, sys.path[0])\n"
        "child = [sys.executable, '-u', '-c', 'import sys; print(sys.argv[1:], \"torch\" in sys.modules)', 'b']\n"
        "sys.stdout.flush(); subprocess.run(child, check=True)\n"
    )
    assert printed(str(script), "a") == ["a", "True", str(tmp_path), "['b']", "True"]


def test_what_a_fork_cannot_do_is_started_anew() -> None:
    asks = "import sys; print('torch' in sys.modules, hash('x'))"
    assert printed("-c", asks)[0] == "True"
    first, second = (printed("-c", asks, PYTHONHASHSEED=seed) for seed in ("1", "1"))
    assert first == second
    assert first[0] == "False"
    assert printed("-c", asks, PYTHONPATH="/nowhere")[0] == "False"
    assert printed("-I", "-c", asks)[0] == "False"


SPAWNING = """
import multiprocessing, os, sys
def work(queue, lock, number):
    with lock:
        queue.put((number, "transformers" in sys.modules))
if __name__ == "__main__":
    spawn = multiprocessing.get_context(sys.argv[1])
    spawn.set_forkserver_preload(["transformers"])
    queue, lock = spawn.Queue(), spawn.Lock()
    workers = [spawn.Process(target=work, args=(queue, lock, number)) for number in range(2)]
    for worker in workers:
        worker.start()
    print(sorted(queue.get() for _ in workers), flush=True)
    for worker in workers:
        worker.join()
    for _ in range(3):  # workers that have hardly begun are asked to end
        with spawn.Pool(2) as pool:
            print(pool.map(abs, [-1, 2]), flush=True)
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_what_multiprocessing_spawns_is_forked_and_ends_when_it_is_asked(tmp_path: Path, method: str) -> None:
    (tmp_path / "spawning.py").write_text(SPAWNING)
    shown = " ".join(printed(str(tmp_path / "spawning.py"), method))
    assert shown == "[(0, True), (1, True)] [1, 2] [1, 2] [1, 2]"
