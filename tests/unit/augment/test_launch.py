"""Commands of a step's own: words without a shell, every rank, failures and interrupts."""

import sys
import threading
from pathlib import Path

import pytest

from vila2.augment.context import Stopped
from vila2.augment.launch import LOG, command_line, launch
from vila2.augment.recipe import Launcher
from vila2.errors import UsageError, VilaError
from vila2.recaption.interrupt import Interrupts

PYTHON = "{python} -c 'import sys; CODE' {arguments}"


def code(text: str) -> str:
    return PYTHON.replace("CODE", text)


def test_words_are_split_and_never_read_by_a_shell() -> None:
    words = command_line("srun -J {name} 'a b' {arguments}", ["train", "x; rm -rf $HOME"], {"name": "n 1"})
    assert words == ["srun", "-J", "n 1", "a b", "train", "x; rm -rf $HOME"]
    joined = command_line("sh -c 'exec vila2-fast {arguments}'", ["train", "a b"], {})
    assert joined == ["sh", "-c", "exec vila2-fast train 'a b'"]
    assert command_line("{python}", [], {}) == [sys.executable]
    with pytest.raises(UsageError, match="launch command"):
        command_line("a 'b", [], {})


def test_the_arguments_have_their_place() -> None:
    with pytest.raises(ValueError, match=r"must hold \{arguments\}"):
        Launcher(command="torchrun train")


def test_every_rank_runs(tmp_path: Path) -> None:
    launcher = Launcher(command=code("print(sys.argv[1:])"), processes=3)
    launch(launcher, ["recaption", "s"], "round-1/recaption", tmp_path, Interrupts())
    lines = sorted((tmp_path / LOG).read_text().splitlines())
    assert lines == [str(["recaption", "s", "--rank", str(r), "--world-size", "3"]) for r in range(3)]


def test_a_failure_says_the_last_line(tmp_path: Path) -> None:
    launcher = Launcher(command=code('print("out of memory"); sys.exit(4)'))
    with pytest.raises(VilaError, match="ended with 4: out of memory"):
        launch(launcher, [], "x", tmp_path, Interrupts())
    with pytest.raises(UsageError, match="cannot start 'no-such-command-here'"):
        launch(Launcher(command="no-such-command-here {arguments}"), [], "x", tmp_path, Interrupts())


def test_one_that_fails_ends_the_others(tmp_path: Path) -> None:
    text = 'import time; sys.exit(3) if "0" == sys.argv[2] else time.sleep(600)'
    launcher = Launcher(command=code(text), processes=2)
    with pytest.raises(VilaError, match="ended with"):
        launch(launcher, [], "x", tmp_path, Interrupts())


def test_an_interrupt_is_passed_on(tmp_path: Path) -> None:
    interrupts = Interrupts()
    text = 'import time\ntry:\n    open("here", "w").close(); time.sleep(600)\nexcept KeyboardInterrupt: sys.exit(130)'
    script = tmp_path / "wait.py"
    script.write_text(f"import os, sys; os.chdir({str(tmp_path)!r})\n{text}\n")

    def ask() -> None:
        while not (tmp_path / "here").exists():
            pass
        interrupts.request()

    thread = threading.Thread(target=ask)
    thread.start()
    with pytest.raises(Stopped):
        launch(Launcher(command=f"{{python}} {script} {{arguments}}"), [], "x", tmp_path, interrupts)
    thread.join()
