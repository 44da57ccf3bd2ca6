"""The comparison with peers goes on when one of them cannot be built, loaded or run, and its row says why."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.syspath_prepend(ROOT / "bench")
    import bench_peers
    from peers import environments

    for module in (bench_peers, environments):
        monkeypatch.setattr(module, "CACHE", tmp_path)
    return bench_peers


def worker_script(folder: Path, body: str) -> str:
    script = folder / "worker.py"
    script.write_text(f"from workers import serve\n{body}\n", encoding="utf-8")
    return str(script)


def start(bench: Any, tmp_path: Path, body: str) -> Any:
    one = bench.Contender("peer", "int8", worker_script(tmp_path, body), 4, has_precisions=False)
    one.images = 3
    with ExitStack() as stack:
        one.start(tmp_path, 2, stack)
        one.run(2, seed=0)
    return one


def test_a_peer_that_runs(bench: Any, tmp_path: Path) -> None:
    body = "serve({'batch': 9}, lambda q: {'tokens': [[1, 2]] * q['images'], 'prompt_tokens': 5})"
    one = start(bench, tmp_path, body)
    assert (one.reason, one.batch, one.prompt_tokens, len(one.seconds)) == ("", 9, 5, 1)
    ours = bench.Contender(bench.OURS, "int8", "", 64, images=3, seconds=[one.seconds[0] / 2])
    row = bench.row(one, [ours, one], 2, [{"int8": 50.0}], {})
    assert row["ours_times"] == pytest.approx(2)
    assert row["of_ceiling"] == pytest.approx(row["images_per_s"] * 2)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("raise RuntimeError('no such precision')", "not loaded: RuntimeError: no such precision"),
        ("serve({}, lambda q: 1 // 0)", "not run: ZeroDivisionError"),
        ("serve({}, lambda q: {'tokens': [[1]] * 3, 'prompt_tokens': 5})", "made 3 tokens, not 3 times 2"),
    ],
)
def test_a_peer_that_fails(bench: Any, tmp_path: Path, body: str, reason: str) -> None:
    one = start(bench, tmp_path, body)
    assert one.reason.startswith(reason)
    row = bench.row(one, [one], 2, [{"int8": 50.0}], {})
    assert row["reason"] == one.reason
    assert (row["images_per_s"], row["ours_times"], row["of_ceiling"]) == ("", "", "")


def test_a_peer_that_cannot_be_built(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peers.environments import Environment

    place = Environment("nobody", "nothing", packages=())
    convert = Environment(
        "nobody", "nothing", packages=(), convert=("sh", "-c", "echo SomeError: why >&2; exit 3")
    )
    monkeypatch.setattr(Environment, "_install", lambda self: self.folder.mkdir(exist_ok=True))
    for environment, reason in ((place, ""), (convert, "not built: SomeError: why")):
        one = bench.Contender("peer", "int8", "absent.py", 4, environment=environment)
        one.build(tmp_path)
        assert one.reason == reason
        with ExitStack() as stack:
            one.start(tmp_path, 2, stack)
            one.run(2, seed=0)
        assert one.reason.startswith(reason or "not loaded")
        assert not one.seconds


def test_a_recipe_that_changes_is_installed_again(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peers.environments import Environment

    installed = []

    def install(self: Environment) -> None:
        installed.append(self.packages)
        self.folder.mkdir(exist_ok=True)

    monkeypatch.setattr(Environment, "_install", install)
    for packages in (("a==1",), ("a==1",), ("a==2",)):
        Environment("somebody", "a", packages=packages).build(tmp_path)
    assert installed == [("a==1",), ("a==2",)]
