"""Tars: the same bytes each time, read by the data package; and the command that writes them."""

import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vila2.cli import world as cli
from vila2.cli.main import main
from vila2.data.decode import DecodeLimits, decode_image
from vila2.data.shards import open_source
from vila2.world import SPLITS, STYLES, World, WorldSettings, read_lexicon, texts
from vila2.world.shards import TEXTS, ShardPlan, shard_bytes


def make(folder: Path, *more: str) -> int:
    return main(["world", "make", str(folder), "--scenes", "25", "--shard-size", "10", *more])


def test_make_writes_what_data_reads(tmp_path: Path) -> None:
    assert make(tmp_path / "w", "--seed", "3", "--split", "heldout") == 0
    source = open_source(tmp_path / "w")
    assert [shard.name for shard in source.shards] == [f"heldout-{number:05d}.tar" for number in range(3)]
    assert [len(shard) for shard in source.shards] == [10, 10, 5]
    world = World(WorldSettings(seed=3))
    samples = [sample for shard in source.shards for sample in shard.read()]
    for index, sample in enumerate(samples):
        scene = world.scene("heldout", index)
        assert sample.error is None
        assert sample.key == f"heldout-{index:08d}"
        assert sample.original == texts.alt_text(scene).text
        pixels = decode_image(sample.image or b"", DecodeLimits()).pixels
        assert np.abs(pixels.astype(int) - world.render(scene)).mean() < 4


def test_the_json_is_the_whole_truth(tmp_path: Path) -> None:
    import tarfile

    assert make(tmp_path / "w", "--style", "second", "--format", "png", "--text", "detailed") == 0
    with tarfile.open(tmp_path / "w" / "pretrain-00001.tar") as tar:
        members = {name: tar.extractfile(name).read() for name in tar.getnames()}  # type: ignore[union-attr]
    truth = json.loads(members["pretrain-00000013.json"])
    world = World(WorldSettings(style="second"))
    scene = world.scene("pretrain", 13)
    assert [tuple(thing["box"]) for thing in truth["objects"]] == [thing.box for thing in scene.objects]
    assert truth["counts"] == scene.counts()
    assert truth["relations"] == [[r.subject, r.predicate, r.object] for r in scene.relations()]
    assert truth["alt_kind"] == texts.alt_text(scene).kind
    assert members["pretrain-00000013.txt"].decode() == texts.detailed_caption(scene) == truth["detailed"]
    assert (np.asarray(Image.open(BytesIO(members["pretrain-00000013.png"]))) == world.render(scene)).all()


def test_the_same_command_gives_the_same_bytes_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert make(tmp_path / "a") == make(tmp_path / "b") == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == ["pretrain-00000.tar", "pretrain-00001.tar", "pretrain-00002.tar", "world.json"]
    whole = {name: (tmp_path / "a" / name).read_bytes() for name in names}
    assert whole == {name: (tmp_path / "b" / name).read_bytes() for name in names}
    (tmp_path / "b" / "pretrain-00001.tar").unlink()
    capsys.readouterr()
    assert make(tmp_path / "b") == 0
    assert "25 scenes in 3 tars (2 were there)" in capsys.readouterr().out
    assert whole == {name: (tmp_path / "b" / name).read_bytes() for name in names}


def test_a_folder_holds_one_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path / "w") == 0
    assert make(tmp_path / "w", "--seed", "9") == 2
    assert "other settings" in capsys.readouterr().err
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.tar").write_bytes(b"")
    assert make(tmp_path / "x") == 2
    assert list((tmp_path / "x").iterdir()) == [tmp_path / "x" / "mine.tar"]


def test_rates_are_options_and_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert make(tmp_path / "w", "--junk", "1", "--vague", "0") == 0
    assert "100.0% junk" in capsys.readouterr().out
    assert make(tmp_path / "v", "--junk", "0.7", "--vague", "0.7") == 2
    assert main(["world", "make", str(tmp_path / "u"), "--scenes", "0"]) == 2


def test_bytes_do_not_depend_on_where_a_scene_lies() -> None:
    plan = ShardPlan(WorldSettings(image_size=32), scenes=8)
    first = shard_bytes(plan, range(2, 5))
    shard_bytes(plan, range(8))
    assert shard_bytes(plan, range(2, 5)) == first


def test_sheet(tmp_path: Path) -> None:
    assert main(["world", "sheet", str(tmp_path / "s.png"), "--scenes", "7", "--split", "dev"]) == 0
    sheet = Image.open(tmp_path / "s.png")
    assert sheet.width > 6 * 168
    assert sheet.height > 2 * 168
    assert main(["world", "sheet", str(tmp_path / "no" / "s.png")]) == 1


def test_the_command_offers_what_the_world_has() -> None:
    assert cli.SPLITS == SPLITS
    assert tuple(STYLES) == cli.STYLES
    assert cli.TEXTS == TEXTS
    assert len(read_lexicon().names) >= 150


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from vila2.cli.main import main; main(['world', 'make', '--help']); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


def test_the_world_needs_no_torch() -> None:
    code = (
        "import sys; from vila2.world import World; w = World(); w.render(w.scene('dev', 0)); "
        "sys.exit(any(m in sys.modules for m in ('torch', 'transformers', 'pydantic')))"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
