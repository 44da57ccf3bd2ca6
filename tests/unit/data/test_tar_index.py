"""Our tar reader against the standard library's on sound tars, and what it saves from damaged ones."""

import io
import os
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.data.tars import FORMATS, extents, make_tar, write_tar
from vila2.data.tar_index import Member, State, scan_tar
from vila2.data.tar_source import TarShard
from vila2.types import ErrorKind, Sample


def scan(tar: bytes) -> list[Member]:
    with tempfile.TemporaryFile() as file:
        file.write(tar)
        file.flush()
        return list(scan_tar(file.fileno(), len(tar)))


def good(tar: bytes) -> list[tuple[str, bytes]]:
    return [
        (member.name.decode(), tar[member.data : member.data + member.size])
        for member in scan(tar)
        if member.state is State.GOOD
    ]


def samples(folder: Path, tar: bytes, name: str = "a.tar") -> list[Sample]:
    path = folder / name
    path.write_bytes(tar)
    return list(TarShard(path, name).read())


def kinds(found: list[Sample]) -> list[ErrorKind | None]:
    return [sample.error.kind if sample.error else None for sample in found]


# Names of every length up to far beyond the 100 bytes of a header, in folders, with letters beyond ASCII.
name_part = st.text(st.sampled_from("ab1_-. é日"), min_size=1, max_size=90).filter(
    lambda s: s not in (".", "..")
)
names = st.lists(name_part, min_size=1, max_size=4).map("/".join)
contents = st.one_of(
    st.binary(max_size=40), st.sampled_from([511, 512, 513, 1024, 5000]).map(lambda n: b"x" * n)
)


@given(st.lists(st.tuples(names, contents), max_size=8), st.sampled_from(["gnu", "pax"]))
def test_the_same_members_as_the_standard_library(members: list[tuple[str, bytes]], form: str) -> None:
    tar = make_tar(members, form)
    with tarfile.open(fileobj=io.BytesIO(tar)) as opened:
        expected = [(m.name, opened.extractfile(m).read()) for m in opened if m.isreg()]  # type: ignore[union-attr]
        offsets = [m.offset for m in opened if m.isreg()]
    assert good(tar) == expected
    assert [member.offset for member in scan(tar)] == offsets


def test_ustar_prefix() -> None:
    name = "d" * 60 + "/" + "e" * 60 + "/" + "f" * 50 + ".jpg"
    assert good(make_tar([(name, b"data")], "ustar")) == [(name, b"data")]


def test_other_kinds_of_members_are_stepped_over() -> None:
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "c"}
    ) as tar:
        for kind in (tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE):
            entry = tarfile.TarInfo("a/b")
            entry.type, entry.linkname = kind, "elsewhere"
            tar.addfile(entry)
        entry = tarfile.TarInfo("a/c.jpg")
        entry.size = 3
        tar.addfile(entry, io.BytesIO(b"abc"))
    assert good(buffer.getvalue()) == [("a/c.jpg", b"abc")]


def test_concatenated_tars_are_read_to_the_end() -> None:
    assert good(make_tar([("a.jpg", b"1")]) + make_tar([("b.jpg", b"2")])) == [
        ("a.jpg", b"1"),
        ("b.jpg", b"2"),
    ]


def test_pax_size_and_base_256_size() -> None:
    block = bytearray(make_tar([("a.jpg", b"12345")])[:512])
    body = b"12345" + bytes(507)

    def with_size(field: bytes) -> bytes:
        block[124:136] = field
        block[148:156] = b" " * 8
        block[148:156] = b"%06o\0 " % sum(block)
        return bytes(block)

    assert good(with_size(b"\x80" + (5).to_bytes(11, "big")) + body) == [("a.jpg", b"12345")]
    assert [m.state for m in scan(with_size(b"\xff" * 12) + body)] == [State.BROKEN]  # a negative size
    pax = make_tar([("x", b"7 size=5\n".replace(b"7", b"9"))])[:1024]
    pax = _retyped(pax, b"x")
    assert good(pax + with_size(b"0" * 11 + b"\0") + body) == [("a.jpg", b"12345")]


def _retyped(header_and_data: bytes, kind: bytes) -> bytes:
    block = bytearray(header_and_data)
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block[:512])
    return bytes(block)


@pytest.mark.parametrize(
    "payload", [b"9 size=-\n", b"99 path=a\n", b"path=b\n", b"5 a=b", b"6 path\n", b"\xff\xff\xff"]
)
def test_a_pax_header_that_does_not_parse_costs_its_member(payload: bytes) -> None:
    pax = _retyped(make_tar([("x", payload)])[:1024], b"x")
    tar = pax + make_tar([("lost.jpg", b"1"), ("kept.jpg", b"2")])
    assert good(tar) == [("kept.jpg", b"2")]
    assert [m.state for m in scan(tar)] == [State.BROKEN, State.GOOD]


def test_a_sparse_member_is_named_as_such() -> None:
    sparse = _retyped(make_tar([("holes.jpg", b"1")])[:1024], b"S")
    assert [(m.state, m.name) for m in scan(sparse + make_tar([("b.jpg", b"2")]))] == [
        (State.SPARSE, b"holes.jpg"),
        (State.GOOD, b"b.jpg"),
    ]


def test_samples_and_texts(tmp_path: Path) -> None:
    found = samples(
        tmp_path,
        make_tar(
            [
                ("d/a.jpg", b"A"),
                ("d/a.txt", b"\xef\xbb\xbf alt text \n"),
                ("d/a.json", b'{"caption": "other", "url": "u", "n": 3}'),
                ("d/b.JSON", b'{"alt": "from json"}'),
                ("d/b.PNG", b"B"),
                ("e.v2.webp", b"C"),
                ("__meta__", b"skipped"),
                (".hidden.jpg", b"skipped"),
                ("no_extension", b"skipped"),
                ("f.cls", b"7"),
                ("g.jpg", b""),
                ("h.jpg", b"H"),
                ("h.txt", b"\xff\xfe"),
                ("i.jpg", b"I"),
                ("i.json", b"{not json"),
                ("j.jpg", b"J"),
                ("j.json", b"[1, 2]"),
                ("k.jpg", b"K"),
                ("k.json", b'{"caption": "half \\ud800"}'),
            ]
        ),
    )
    assert [s.key for s in found] == ["d/a", "d/b", "e", "f", "g", "h", "i", "j", "k"]
    assert [s.index for s in found] == list(range(9))
    assert (found[0].image, found[0].original) == (b"A", "alt text")
    assert found[0].fields == {"caption": "other", "url": "u"}
    assert (found[1].image, found[1].original) == (b"B", "from json")
    assert found[2].image == b"C"
    assert kinds(found[3:]) == [
        ErrorKind.NO_IMAGE,
        ErrorKind.EMPTY_FILE,
        ErrorKind.BAD_TEXT,
        ErrorKind.BAD_RECORD,
        None,
        ErrorKind.BAD_TEXT,
    ]


def test_repeated_keys(tmp_path: Path) -> None:
    found = samples(
        tmp_path,
        make_tar(
            [
                ("a.jpg", b"1"),
                ("a.jpg", b"2"),
                ("a.txt", b"t"),
                ("b.jpg", b"3"),
                ("a.jpg", b"4"),
                ("c.jpg", b"5"),
            ]
        ),
    )
    assert [(s.key, s.image) for s in found] == [
        ("a", b"1"),
        ("a", None),
        ("b", b"3"),
        ("a", None),
        ("c", b"5"),
    ]
    assert kinds(found) == [None, ErrorKind.DUPLICATE_KEY, None, ErrorKind.DUPLICATE_KEY, None]


def test_a_broken_header_costs_one_sample(tmp_path: Path) -> None:
    tar = bytearray(make_tar([(f"{i}.jpg", b"%d" % i * 700) for i in range(5)]))
    start = extents(bytes(tar))[2].start
    tar[start + 20] ^= 0x55
    found = samples(tmp_path, bytes(tar))
    assert kinds(found) == [None, None, ErrorKind.BROKEN_MEMBER, None, None]
    assert found[2].key == f"@{start}"
    assert f"byte {start}" in found[2].error.message  # type: ignore[union-attr]
    assert [s.key for s in found if not s.error] == ["0", "1", "3", "4"]


def test_a_broken_text_keeps_its_image(tmp_path: Path) -> None:
    tar = bytearray(make_tar([("a.jpg", b"A"), ("a.txt", b"t"), ("a.json", b"{}"), ("b.jpg", b"B")]))
    tar[extents(bytes(tar))[1].start] ^= 1
    found = samples(tmp_path, bytes(tar))
    assert [(s.key, s.image) for s in found] == [("a", b"A"), ("@1024", None), ("b", b"B")]


def test_a_zeroed_header_and_a_lying_size() -> None:
    whole = make_tar([("a.jpg", b"A" * 600), ("b.jpg", b"B" * 600), ("c.jpg", b"C" * 600)])
    second = extents(whole)[1].start
    zeroed = whole[:second] + bytes(512) + whole[second + 512 :]
    assert [name for name, _ in good(zeroed)] == ["a.jpg", "c.jpg"]
    lying = bytearray(whole)
    lying[second + 124 : second + 136] = b"77777777777\0"
    lying[second + 148 : second + 156] = b" " * 8
    lying[second + 148 : second + 156] = b"%06o\0 " % sum(lying[second : second + 512])
    assert [name for name, _ in good(bytes(lying))] == ["a.jpg", "c.jpg"]


@pytest.mark.parametrize("form", list(FORMATS))
def test_every_cut_keeps_all_before(form: str, tmp_path: Path) -> None:
    members = [(f"{i}{ext}", bytes([65 + i]) * 300) for i in range(3) for ext in (".jpg", ".txt")]
    tar = make_tar(members, form)
    places = extents(tar)
    for cut in range(0, places[-1].end + 100, 61):
        found = samples(tmp_path, tar[:cut])
        whole = [i for i in range(3) if cut >= places[2 * i + 1].end]
        assert [s.key for s in found if s.error is None][: len(whole)] == [str(i) for i in whole]
        at_boundary = any(cut == place.start for place in places) or cut >= places[-1].end
        if cut == 0:
            assert kinds(found) == [ErrorKind.EMPTY_FILE]
        elif not at_boundary and not any(place.end <= cut <= place.end + 512 for place in places):
            assert kinds(found)[-1] is ErrorKind.TRUNCATED_TAR


def test_what_is_no_tar_at_all(tmp_path: Path) -> None:
    assert kinds(samples(tmp_path, b"<html>" * 500)) == [ErrorKind.BROKEN_MEMBER]
    assert kinds(samples(tmp_path, b"<html>")) == [ErrorKind.TRUNCATED_TAR]
    assert samples(tmp_path, bytes(10240)) == []
    assert kinds(list(TarShard(tmp_path / "none.tar", "none.tar").read())) == [ErrorKind.MISSING_FILE]


def test_long_searches_cross_their_chunks() -> None:
    noise = os.urandom(3 << 20)
    tar = make_tar([("a.jpg", b"A")])[:1024] + noise + bytes(-len(noise) % 512) + make_tar([("b.jpg", b"B")])
    assert good(tar) == [("a.jpg", b"A"), ("b.jpg", b"B")]


def test_oversized_texts_and_images_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vila2.data.tar_source.MAX_IMAGE_BYTES", 10)
    found = samples(tmp_path, make_tar([("a.jpg", b"A" * 11), ("b.jpg", b"B")]))
    assert kinds(found) == [ErrorKind.READ_ERROR, None]


def _flip(data: st.DataObject, tar: bytearray) -> set[int]:
    """One byte in each of some blocks: no change of one byte keeps a header's checksum."""
    blocks = data.draw(st.lists(st.integers(0, len(tar) // 512 - 1), min_size=1, max_size=4, unique=True))
    places = {block * 512 + data.draw(st.integers(0, 511)) for block in blocks}
    for place in places:
        tar[place] ^= data.draw(st.integers(1, 255))
    return places


def _overwrite(data: st.DataObject, tar: bytearray) -> set[int]:
    """A stretch of one value, as a bad disk block leaves it."""
    start = data.draw(st.integers(0, len(tar) - 1))
    length = min(data.draw(st.sampled_from([1, 100, 512, 1500, 4096])), len(tar) - start)
    tar[start : start + length] = bytes([data.draw(st.sampled_from([0, 0x20, 0x37, 0xFF]))]) * length
    return set(range(start, start + length))


@settings(max_examples=150)
@given(
    st.data(),
    st.sampled_from([_flip, _overwrite]),
    st.lists(st.integers(0, 1600), min_size=1, max_size=8),
    st.sampled_from(list(FORMATS)),
)
def test_damage_costs_only_what_it_touches(
    data: st.DataObject,
    damage: Callable[[st.DataObject, bytearray], set[int]],
    sizes: list[int],
    form: str,
) -> None:
    folder = (
        "f" * 95 + "/" if form != "ustar" else ""
    )  # long names have extension headers, which can break too
    members = []
    for i, size in enumerate(sizes):
        members += [(f"{folder}{i}.jpg", bytes([i + 1]) * (size + 1)), (f"{folder}{i}.txt", b"text %d" % i)]
    tar = bytearray(make_tar(members, form))
    places = extents(bytes(tar))
    touched = damage(data, tar)
    with tempfile.TemporaryDirectory() as folder_name:
        found = samples(Path(folder_name), bytes(tar))
    saved = {(s.key, s.image, s.original) for s in found if s.error is None}
    for i, size in enumerate(sizes):
        first, last = places[2 * i], places[2 * i + 1]
        if not any(first.start <= place < last.end for place in touched):
            assert (f"{folder}{i}", bytes([i + 1]) * (size + 1), f"text {i}") in saved


@given(st.binary(max_size=3000), st.integers(0, 2))
def test_noise_never_raises(noise: bytes, num_before: int) -> None:
    tar = make_tar([(f"{i}.jpg", b"A") for i in range(num_before)])[: 1024 * num_before] + noise
    with tempfile.TemporaryDirectory() as folder_name:
        found = samples(Path(folder_name), tar)
    assert [s.key for s in found[:num_before]] == [str(i) for i in range(num_before)]


def test_the_index_is_stored_and_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_tar(tmp_path / "a.tar", [(f"{i}.jpg", b"%d" % i) for i in range(9)])
    first = list(TarShard(path, "a.tar", tmp_path / "index").read())
    monkeypatch.setattr("vila2.data.tar_source.build_index", lambda path: pytest.fail("scanned again"))
    shard = TarShard(path, "a.tar", tmp_path / "index")
    assert len(shard) == 9
    assert list(shard.read()) == first
    assert [s.image for s in shard.read([7, 2])] == [b"2", b"7"]
    with pytest.raises(IndexError, match="index 9"):
        list(shard.read([0, 9]))


def test_a_changed_tar_is_scanned_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1")])
    assert len(TarShard(path, "a.tar", tmp_path / "index")) == 1
    write_tar(path, [("a.jpg", b"1"), ("b.jpg", b"1" * 20_000)])
    assert len(TarShard(path, "a.tar", tmp_path / "index")) == 2


def test_a_damaged_index_is_made_again(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("a.jpg", b"1")])
    assert len(TarShard(path, "a.tar", tmp_path / "index")) == 1
    (stored,) = (tmp_path / "index").iterdir()
    stored.write_bytes(stored.read_bytes()[:100])
    assert [s.image for s in TarShard(path, "a.tar", tmp_path / "index").read()] == [b"1"]
