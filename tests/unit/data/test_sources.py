"""Every kind of source on generated data: what is found, in which order, and what bad inputs cost."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import vila2.data.folder as folder_module
import vila2.data.llava_json as llava_module
from tests.unit.data.odd_images import jpeg
from tests.unit.data.tars import write_tar
from vila2.data.shards import expand_braces, open_source
from vila2.data.source import Source
from vila2.errors import OutputError, SourceError
from vila2.types import ErrorKind, Sample

PICTURE = jpeg()


def read_all(source: Source) -> list[Sample]:
    """All samples; on the way, random access is held against reading in order."""
    found: list[Sample] = []
    for shard in source.shards:
        whole = list(shard.read())
        assert len(whole) == len(shard)
        assert [(s.shard, s.index) for s in whole] == [(shard.name, i) for i in range(len(shard))]
        chosen = list(range(len(whole)))[::2]
        assert list(shard.read(chosen[::-1])) == [whole[i] for i in chosen]
        found += whole
    names = [shard.name for shard in source.shards]
    assert len(set(names)) == len(names)
    return found


def kinds(samples: list[Sample]) -> list[ErrorKind | None]:
    return [sample.error.kind if sample.error else None for sample in samples]


def put(path: Path, data: bytes | str = PICTURE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


# -- what is named, and what kind it is ------------------------------------------------------------


def test_brace_patterns() -> None:
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("a{8..11}") == ["a8", "a9", "a10", "a11"]
    assert expand_braces("a{0..11}")[:2] == ["a0", "a1"]
    assert expand_braces("{x,y}/{0..1}") == ["x/0", "x/1", "y/0", "y/1"]
    assert expand_braces("plain") == ["plain"]
    assert expand_braces("{00000..00012}.tar")[12] == "00012.tar"
    for bad in ("a{3..1}", "a{b}", "{0..99999999}", "{000..999}{000..999}{0..9}"):
        with pytest.raises(SourceError, match="pattern"):
            expand_braces(bad)


def test_tars_by_file_folder_and_pattern(tmp_path: Path) -> None:
    for i in range(3):
        write_tar(tmp_path / "sub" / f"{i:05d}.tar", [(f"{i}.jpg", PICTURE)]) if i else put(
            tmp_path / "sub" / "x.parquet"
        )
    write_tar(tmp_path / "sub" / "00000.tar", [("0.jpg", PICTURE)])
    by_folder = open_source(tmp_path)
    assert by_folder.kind == "webdataset"  # img2dataset leaves Parquet files beside its tars
    assert [shard.name for shard in by_folder.shards] == [f"sub/{i:05d}.tar" for i in range(3)]
    by_braces = open_source(str(tmp_path / "sub" / "{00000..00003}.tar"))
    assert [shard.name for shard in by_braces.shards] == [f"{i:05d}.tar" for i in range(4)]
    assert kinds(read_all(by_braces)) == [None, None, None, ErrorKind.MISSING_FILE]
    by_glob = open_source(str(tmp_path / "sub" / "*[12].tar"))
    assert [s.key for s in read_all(by_glob)] == ["1", "2"]
    single = open_source(tmp_path / "sub" / "00001.tar")
    assert [s.key for s in read_all(single)] == ["1"]
    assert single.fingerprint == f"webdataset {tmp_path}/sub/00001.tar (1 shards)"
    assert by_folder.fingerprint == open_source(tmp_path).fingerprint


def test_a_relative_spec_and_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", PICTURE)])
    absolute = open_source(tmp_path / "a.tar").fingerprint
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_source("a.tar").fingerprint == absolute
    assert open_source("~/a.tar").fingerprint == absolute
    assert len(open_source("{a,a}.tar")) == 1
    assert len(open_source("~/{a,b}.tar").shards) == 2


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tar.gz", b"\x1f\x8b\x08\0 gzip", "compressed"),
        ("a.tgz", b"\x1f\x8b\x08\0 gzip", "compressed"),
        ("a.tar", b"\x1f\x8b\x08\0 gzip", "compressed"),
        ("a.tar.zst", b"\x28\xb5\x2f\xfd zstd", "compressed"),
        ("a.csv", b"1,2", "looked for"),
        ("a.json", b"", "it is empty"),
        ("a.json", b"[]", "no records"),
        ("a.json", b'"text"', "begins with"),
        ("a.json", b"\xff\xfe[\0", "begins with"),
        ("a.jsonl", b"[1, 2]", "begins with"),
        ("a.tar", bytes(10240), "holds no samples"),
    ],
)
@pytest.mark.parametrize("in_folder", [False, True])
def test_what_is_refused(tmp_path: Path, name: str, data: bytes, message: str, in_folder: bool) -> None:
    put(tmp_path / name, data)
    if in_folder and not name.endswith(("gz", "zst", "tar")):
        message = "nothing to caption"
    with pytest.raises(SourceError, match=message) as caught:
        open_source(tmp_path if in_folder else tmp_path / name)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="does not exist; looked for"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(SourceError, match="no file fits"):
        open_source(str(tmp_path / "{0..3}.tar"))
    with pytest.raises(SourceError, match="no file fits"):
        open_source(str(tmp_path / "*.tar"))
    with pytest.raises(SourceError, match="nothing to caption"):
        open_source(tmp_path)
    with pytest.raises(SourceError, match="image root"):
        open_source(tmp_path, image_root=tmp_path / "nowhere")
    with pytest.raises(SourceError, match="is not a folder"):
        open_source(f"folder:{put(tmp_path / 'a.jpg')}")
    for kind in ("webdataset", "parquet", "llava"):
        with pytest.raises(SourceError, match=f"no {kind} files"):
            open_source(f"{kind}:{tmp_path}")


def test_a_folder_of_two_kinds_is_refused_unless_one_is_named(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("0.jpg", PICTURE)])
    put(tmp_path / "b.jpg")
    with pytest.raises(SourceError, match=f"webdataset:{tmp_path}"):
        open_source(tmp_path)
    assert open_source(f"webdataset:{tmp_path}").kind == "webdataset"
    assert open_source(f"folder:{tmp_path}").kind == "folder"


# -- folders of images -----------------------------------------------------------------------------


def test_folder(tmp_path: Path) -> None:
    put(tmp_path / "b" / "2.PNG")
    put(tmp_path / "b" / "10.jpeg")
    put(tmp_path / "a.jpg")
    put(tmp_path / "a.txt", "a caption\n")
    put(tmp_path / "b" / "2.caption", "from .caption")
    put(tmp_path / "b" / "10.json", '{"text": "from json", "size": 3}')
    put(tmp_path / "c.webp", "")
    put(tmp_path / "d.gif")
    put(tmp_path / "d.txt", b"\xff")
    for skipped in ("notes.txt", ".hidden.jpg", "._a.jpg", ".git/x.jpg", "x.svg"):
        put(tmp_path / skipped)
    found = read_all(open_source(tmp_path))
    assert [s.key for s in found] == ["a.jpg", "b/10.jpeg", "b/2.PNG", "c.webp", "d.gif"]
    assert [s.original for s in found] == ["a caption", "from json", "from .caption", "", ""]
    assert found[0].image == PICTURE
    assert found[1].fields == {"text": "from json"}
    assert kinds(found) == [None, None, None, ErrorKind.EMPTY_FILE, ErrorKind.BAD_TEXT]


def test_folder_follows_links_once(tmp_path: Path) -> None:
    put(tmp_path / "outside" / "real.jpg")
    root = tmp_path / "root"
    put(root / "a" / "1.jpg")
    (root / "loop").symlink_to(root)
    (root / "b").symlink_to(tmp_path / "outside")
    (root / "link.jpg").symlink_to(tmp_path / "outside" / "real.jpg")
    (root / "dead.jpg").symlink_to(tmp_path / "nowhere")
    found = read_all(open_source(root))
    assert [s.key for s in found] == ["a/1.jpg", "b/real.jpg", "dead.jpg", "link.jpg"]
    assert kinds(found) == [None, None, ErrorKind.MISSING_FILE, None]


def test_folder_with_odd_names_and_odd_files(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.jpg")).write_bytes(PICTURE)
    put(tmp_path / "new\nline.jpg")
    put(tmp_path / "日.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    found = read_all(open_source(tmp_path, index_dir=tmp_path / "index"))
    by_key = {s.key: s for s in found}
    assert set(by_key) == {"\\xff.jpg", "new\nline.jpg", "日.jpg", "pipe.jpg"}
    assert by_key["\\xff.jpg"].image == PICTURE
    assert by_key["pipe.jpg"].error is not None
    assert by_key["pipe.jpg"].error.kind is ErrorKind.READ_ERROR


def test_folder_shards_and_the_saved_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_module, "IMAGES_PER_SHARD", 3)
    for i in range(7):
        put(tmp_path / "in" / f"{i}.jpg")
    first = open_source(tmp_path / "in", index_dir=tmp_path / "index")
    assert [len(shard) for shard in first.shards] == [3, 3, 1]
    before = {(s.shard, s.index): s.key for s in read_all(first)}
    put(tmp_path / "in" / "0a.jpg")  # comes second in the order
    (tmp_path / "in" / "5.jpg").unlink()
    again = open_source(tmp_path / "in", index_dir=tmp_path / "index")
    found = read_all(again)
    assert {(s.shard, s.index): s.key for s in found} == before
    assert again.fingerprint == first.fingerprint
    assert kinds(found).count(ErrorKind.MISSING_FILE) == 1
    assert len(read_all(open_source(tmp_path / "in", index_dir=tmp_path / "other"))) == 7


def test_a_damaged_listing_is_not_made_again(tmp_path: Path) -> None:
    put(tmp_path / "in" / "1.jpg")
    open_source(tmp_path / "in", index_dir=tmp_path / "index")
    (listing,) = (tmp_path / "index").iterdir()
    listing.write_bytes(b"damage")
    with pytest.raises(OutputError, match="damaged"):
        open_source(tmp_path / "in", index_dir=tmp_path / "index")


# -- LLaVA JSON ------------------------------------------------------------------------------------


RECORDS: list[Any] = [
    {
        "id": "a",
        "image": "x/1.jpg",
        "source": "web",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat is thät?"},
            {"from": "gpt", "value": "A cat, 日本."},
            {"from": "human", "value": "More?"},
            {"from": "gpt", "value": "No."},
        ],
    },
    {"id": "a", "image": "x/1.jpg", "caption": "plain"},
    {"id": 7, "image": ["x/1.jpg", "x/2.jpg"], "conversations": []},
    {"id": "one", "image": ["x/2.jpg"]},
    {"image": "x/1.jpg"},
    {"id": "text only", "conversations": [{"from": "human", "value": "hello"}]},
    {"id": "gone", "image": "x/none.jpg"},
    {"id": "up", "image": "../secret.jpg"},
    {"id": "inner up", "image": "x/../x/1.jpg"},
    {"id": "abs", "image": "/etc/hostname"},
    {"id": "drive", "image": "C:/x.jpg"},
    {"id": "link", "image": "escape/secret.jpg"},
    {"id": "folder", "image": "x"},
    {"id": "type", "image": 5},
    {"id": "types", "image": ["x/1.jpg", None]},
    {"id": "none", "image": []},
    {"id": "turns", "image": "x/1.jpg", "conversations": "text"},
    {"id": "half", "image": "x/1.jpg", "caption": "\ud800"},
    {"id": "halfpath", "image": "\ud800.jpg"},
    {"id": "nul", "image": "a\0b.jpg"},
    {"id": "under", "image": "x/1.jpg/3.jpg"},
    ["not an object"],
    None,
    12,
]
EXPECTED_KEYS = ["a", "a#2", "7#0", "7#1", "one", "@4", "text only", "gone", "up", "inner up", "abs", "drive"]
EXPECTED_KEYS += ["link", "folder", "type", "types", "none", "turns", "half", "halfpath", "nul", "under"]
EXPECTED_KEYS += ["@21", "@22", "@23"]
E = ErrorKind
EXPECTED_KINDS = [None, None, None, None, None, None, E.NO_IMAGE, E.MISSING_FILE, *[E.UNSAFE_PATH] * 5]
EXPECTED_KINDS += [E.READ_ERROR, E.BAD_RECORD, E.BAD_RECORD, E.NO_IMAGE, E.BAD_RECORD, E.BAD_TEXT, E.BAD_TEXT]
EXPECTED_KINDS += [E.BAD_RECORD, E.MISSING_FILE, E.BAD_RECORD, E.BAD_RECORD, E.BAD_RECORD]


def llava_folder(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    put(root / "x" / "1.jpg")
    put(root / "x" / "2.jpg", jpeg(seed=2))
    put(tmp_path / "secret.jpg")
    (root / "escape").symlink_to(tmp_path)
    return root


@pytest.mark.parametrize("layout", ["list", "indented", "ascii", "lines", "lines with BOM and blanks"])
def test_llava(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llava_module, "_CHUNK", 50)  # records cross the pieces in which a list is read
    root = llava_folder(tmp_path)
    lines = [json.dumps(r, ensure_ascii=layout == "ascii" or "\\ud800" in json.dumps(r)) for r in RECORDS]
    if layout.startswith("lines"):
        bom, gap = ("\ufeff", "\n \n") if "BOM" in layout else ("", "\n")
        path = put(tmp_path / "a.jsonl", bom + gap.join(lines))
    else:
        gap = ",\n    " if layout == "indented" else ","
        path = put(tmp_path / "a.json", "\ufeff [" + gap.join(lines) + "]\n")
    source = open_source(path, image_root=root, index_dir=tmp_path / "index")
    found = read_all(source)
    assert [s.key for s in found] == EXPECTED_KEYS
    assert dict(zip(EXPECTED_KEYS, kinds(found), strict=True)) == dict(
        zip(EXPECTED_KEYS, EXPECTED_KINDS, strict=True)
    )
    assert found[0].original == "A cat, 日本."
    assert found[0].fields["question"] == "What is thät?"
    assert found[0].fields["source"] == "web"
    assert (found[1].original, found[1].image) == ("plain", PICTURE)
    assert (found[2].image, found[3].image) == (PICTURE, jpeg(seed=2))
    for sample in found:
        if sample.error:
            sample.error.message.encode()
    assert read_all(open_source(path, image_root=root, index_dir=tmp_path / "index")) == found


def test_llava_bad_lines_cost_themselves(tmp_path: Path) -> None:
    put(tmp_path / "1.jpg")
    good = b'{"id": "a", "image": "1.jpg"}\n'
    path = put(
        tmp_path / "a.jsonl", good + b"{broken\n" + b'{"id": "b", "image": "1.jpg", "x": "\xff"}\n' + good
    )
    found = read_all(open_source(path))
    assert kinds(found) == [None, E.BAD_RECORD, E.BAD_TEXT, None]
    assert [s.key for s in found] == ["a", "@1", "b", "a#2"]


@pytest.mark.parametrize("text", ['[{"image": "a"}, {"image": ', '[{"image": "a"} oops]', "[1, 2"])
def test_llava_list_that_ends_early_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(SourceError, match="no record can be read at byte"):
        open_source(put(tmp_path / "a.json", text))


@pytest.mark.parametrize("chunk", range(1, 9))
def test_llava_numbers_are_not_split_between_pieces(
    tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llava_module, "_CHUNK", chunk)
    source = open_source(put(tmp_path / "a.json", json.dumps(list(range(100, 140)))))
    assert kinds(read_all(source)) == [E.BAD_RECORD] * 40


def test_many_equal_ids_stay_quick(tmp_path: Path) -> None:
    put(tmp_path / "1.jpg")
    path = put(tmp_path / "a.jsonl", '{"id": "a", "image": "1.jpg"}\n' * 20_000)
    (shard,) = open_source(path).shards
    assert [s.key for s in shard.read([0, 1, 19_999])] == ["a", "a#2", "a#20000"]


# -- Parquet ---------------------------------------------------------------------------------------


def parquet(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_parquet_bytes(tmp_path: Path) -> None:
    path = parquet(
        tmp_path / "a.parquet",
        {
            "Key": ["a", "b", "b", None, "e"],
            "jpg": [PICTURE, b"", None, jpeg(seed=1), PICTURE],
            "TEXT": ["t0", "t1", "t2", None, "t4"],
            "url": ["u"] * 5,
            "number": [1] * 5,
        },
        row_group_size=2,
    )
    found = read_all(open_source(path))
    assert [s.key for s in found] == ["a", "b", "b#2", "@3", "e"]
    assert kinds(found) == [None, E.EMPTY_FILE, E.NO_IMAGE, None, None]
    assert (found[0].image, found[0].original, found[0].fields) == (
        PICTURE,
        "t0",
        {"Key": "a", "TEXT": "t0", "url": "u"},
    )
    assert found[3].original == ""


def test_parquet_struct_and_paths(tmp_path: Path) -> None:
    root = llava_folder(tmp_path)
    cells = [
        {"bytes": PICTURE, "path": "ignored.jpg"},
        {"bytes": None, "path": "x/2.jpg"},
        {"bytes": None, "path": None},
        None,
        {"bytes": None, "path": "../secret.jpg"},
    ]
    path = parquet(tmp_path / "a.parquet", {"image": cells, "id": list(range(5))})
    found = read_all(open_source(path, image_root=root))
    assert [s.key for s in found] == list("01234")
    assert kinds(found) == [None, None, E.NO_IMAGE, E.NO_IMAGE, E.UNSAFE_PATH]
    assert found[1].image == jpeg(seed=2)
    path = parquet(
        root / "b.parquet", {"file_name": ["x/1.jpg", "x/3.jpg", None], "caption": ["c", "d", "e"]}
    )
    found = read_all(open_source(path))
    assert kinds(found) == [None, E.MISSING_FILE, E.NO_IMAGE]
    assert (found[0].key, found[0].original) == ("@0", "c")


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.dictionary(pa.int32(), pa.binary())])
def test_parquet_types(tmp_path: Path, kind: pa.DataType) -> None:
    values = (
        pa.array([PICTURE, PICTURE], pa.binary()).cast(kind)
        if not pa.types.is_dictionary(kind)
        else (pa.array([PICTURE, PICTURE]).dictionary_encode())
    )
    captions = pa.array(["c", "c"]).dictionary_encode()
    path = parquet(tmp_path / "a.parquet", {"photo": values, "caption": captions})
    assert [(s.image, s.original) for s in read_all(open_source(path))] == [(PICTURE, "c")] * 2


def test_parquet_folder_with_bad_files(tmp_path: Path) -> None:
    good = parquet(tmp_path / "d" / "2.parquet", {"image": [PICTURE] * 3})
    put(tmp_path / "d" / "0.parquet", "")
    put(tmp_path / "d" / "1.parquet", good.read_bytes()[:-20])
    parquet(tmp_path / "d" / "3.parquet", {"other": [1, 2]})
    source = open_source(tmp_path / "d")
    assert [len(shard) for shard in source.shards] == [1, 1, 3, 2]
    assert kinds(read_all(source)) == [E.EMPTY_FILE, E.BAD_RECORD, None, None, None, E.NO_IMAGE, E.NO_IMAGE]


def test_parquet_without_images_is_refused(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"caption": ["a"], "url": ["b"]})
    with pytest.raises(SourceError, match="the columns are caption, url"):
        open_source(path)
    with pytest.raises(SourceError, match="holds no samples"):
        open_source(parquet(tmp_path / "b.parquet", {"image": pa.array([], pa.binary())}))


def test_parquet_damage_inside_costs_its_row_group(tmp_path: Path) -> None:
    images = [np.random.default_rng(i).bytes(3000) for i in range(12)]
    path = parquet(
        tmp_path / "a.parquet", {"image": images}, row_group_size=4, compression="zstd", use_dictionary=False
    )
    metadata = pq.read_metadata(path)
    start = metadata.row_group(1).column(0).data_page_offset
    damaged = bytearray(path.read_bytes())
    damaged[start : start + 200] = os.urandom(200)
    path.write_bytes(damaged)
    found = list(open_source(path).shards[0].read())
    assert kinds(found) == [None] * 4 + [E.READ_ERROR] * 4 + [None] * 4
    assert [s.index for s in found] == list(range(12))
    assert [s.image for s in found[8:]] == images[8:]


def test_parquet_text_that_is_not_utf8(tmp_path: Path) -> None:
    texts = pa.array([b"ok", b"\xff\xfe", b"ok"], pa.binary()).view(pa.string())
    path = parquet(tmp_path / "a.parquet", {"image": [PICTURE] * 3, "text": texts})
    assert kinds(read_all(open_source(path))) == [None, E.BAD_TEXT, None]


def test_parquet_reads_only_what_is_asked(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet", {"image": [b"%d" % i for i in range(1000)]}, row_group_size=100)
    shard = open_source(path).shards[0]
    assert [s.image for s in shard.read([5, 250, 251, 999])] == [b"5", b"250", b"251", b"999"]
    assert list(shard.read([])) == []
    with pytest.raises(IndexError):
        list(shard.read([1000]))
