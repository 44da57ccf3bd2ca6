"""Parquet files with one image a row: encoded bytes, a Hugging Face struct {bytes, path}, or a path below `image_root`.

The columns are found by type and name (case does not matter). Every file is a shard. Rows are streamed a few at a
time from the row group that holds them, so memory does not grow with the size of a row group.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vila2.data.reading import (
    MAX_IMAGE_BYTES,
    BadSample,
    pick_caption,
    read_image_file,
    safe_join,
    unique_key,
)
from vila2.data.source import pick_indices
from vila2.errors import SourceError
from vila2.types import ErrorKind, Sample, SampleError

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", "content")
PATH_COLUMNS = ("image_path", "image", "path", "file_name", "filename", "filepath", "file", "img")
KEY_COLUMNS = ("__key__", "key", "id", "image_id", "uid", "sample_id", "idx")
_ROWS_PER_READ = 32
_BUFFER_BYTES = 1 << 20  # column chunks are streamed through buffers of this size, not read whole
_READ_FAILURES = (pa.ArrowException, OSError, ValueError)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column plays which part. At least one of `image` (bytes or struct) and `path` is there."""

    image: str | None
    path: str | None
    key: str | None
    texts: tuple[str, ...]

    @property
    def wanted(self) -> list[str]:
        return list(dict.fromkeys(name for name in (self.image, self.path, self.key, *self.texts) if name))


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_image(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    if pa.types.is_struct(kind):
        return "bytes" in {kind.field(i).name for i in range(kind.num_fields)}
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)


def find_columns(schema: pa.Schema) -> Columns:
    """Choose the columns of a file. Raises BadSample when none can hold an image."""
    image = _first_named(schema, IMAGE_COLUMNS, _is_image)
    if image is None:
        binary = [column.name for column in schema if _is_image(column.type)]
        image = binary[0] if len(binary) == 1 else None
    texts = tuple(column.name for column in schema if _is_text(column.type))
    path = _first_named(schema, PATH_COLUMNS, _is_text)
    key = _first_named(schema, KEY_COLUMNS, lambda kind: _is_text(kind) or pa.types.is_integer(kind))
    if image is None and path is None:
        raise BadSample(
            ErrorKind.NO_IMAGE,
            f"no column holds images: looked for bytes in {', '.join(IMAGE_COLUMNS)} and for paths in"
            f" {', '.join(PATH_COLUMNS)}; the columns are {', '.join(schema.names) or 'none'}",
        )
    return Columns(image, path if image is None else None, key, texts)


def _first_named(schema: pa.Schema, names: Sequence[str], fits: Any) -> str | None:
    by_name = {column.name.lower(): column for column in reversed(list(schema)) if fits(column.type)}
    return next((by_name[name].name for name in names if name in by_name), None)


@dataclass
class ParquetShard:
    """One Parquet file. A file that cannot be read at all is one sample that says so."""

    path: Path
    name: str
    image_root: Path

    def __len__(self) -> int:
        return self._rows_and_failure[0]

    @property
    def failure(self) -> SampleError | None:
        """Why no row of the file can become an image, if so."""
        return self._rows_and_failure[1]

    def read(self, indices: Sequence[int] | None = None) -> Iterator[Sample]:
        chosen = pick_indices(len(self), indices)
        error = self.failure
        if error is not None or not chosen:
            yield from (Sample(self.name, i, f"@{i}", error=error) for i in chosen)
            return
        keys = self._unique_keys
        try:
            with self._open() as file:
                yield from self._groups(file, chosen, keys)
        except _READ_FAILURES as exc:  # the footer was sound when the source was listed
            raise SourceError(f"{self.path} changed while it was read: {exc}") from exc

    def _open(self) -> pq.ParquetFile:
        return pq.ParquetFile(self.path, buffer_size=_BUFFER_BYTES, pre_buffer=False)

    @cached_property
    def _rows_and_failure(self) -> tuple[int, SampleError | None]:
        try:
            if self.path.stat().st_size == 0:
                return 1, SampleError(ErrorKind.EMPTY_FILE, f"the file has 0 bytes: {self.name}")
            with self._open() as file:
                num_rows = int(file.metadata.num_rows)
                try:
                    find_columns(file.schema_arrow)
                except BadSample as exc:
                    return num_rows, exc.error
                return num_rows, None
        except FileNotFoundError:
            return 1, SampleError(ErrorKind.MISSING_FILE, f"no such file: {self.name}")
        except pa.ArrowInvalid as exc:
            return 1, SampleError(
                ErrorKind.BAD_RECORD, f"not a whole Parquet file: {self.name}: {_line(exc)}"
            )
        except _READ_FAILURES as exc:
            return 1, SampleError(ErrorKind.READ_ERROR, f"cannot read {self.name}: {_line(exc)}")

    @cached_property
    def _unique_keys(self) -> dict[int, str]:
        """The rows whose key is not simply what the key column says: repeated ones, and those without one."""
        try:
            with self._open() as file:
                column = find_columns(file.schema_arrow).key
                if column is None:
                    return {}
                values = file.read([column])[column].to_pylist()
        except _READ_FAILURES:
            return {}
        if len(set(values)) == len(values) and None not in values:
            return {}
        seen: dict[str, int] = {}
        changed: dict[int, str] = {}
        for i, value in enumerate(values):
            plain = f"@{i}" if value is None else str(value)
            key = unique_key(plain, seen)
            if key != plain or value is None:
                changed[i] = key
        return changed

    def _groups(self, file: pq.ParquetFile, chosen: Sequence[int], keys: dict[int, str]) -> Iterator[Sample]:
        columns = find_columns(file.schema_arrow)
        wanted = iter(chosen)
        row = next(wanted, None)
        first = 0
        for group in range(file.num_row_groups):
            last = first + file.metadata.row_group(group).num_rows
            rows: list[int] = []
            while row is not None and row < last:
                rows.append(row)
                row = next(wanted, None)
            if rows:
                yield from self._group(file, group, first, rows, columns, keys)
            first = last

    def _group(
        self,
        file: pq.ParquetFile,
        group: int,
        first: int,
        rows: list[int],
        columns: Columns,
        keys: dict[int, str],
    ) -> Iterator[Sample]:
        """Samples of one row group. Damage inside it costs the rows from there to its end."""
        todo = iter(rows)
        row = next(todo, None)
        try:
            batches = file.iter_batches(
                _ROWS_PER_READ, row_groups=[group], columns=columns.wanted, use_threads=False
            )
            for batch in batches:
                last = first + batch.num_rows
                while row is not None and row < last:
                    sample = self._sample(batch, row - first, row, columns, keys)
                    row = next(todo, None)
                    yield sample
                first = last
                if row is None:
                    return
            reason = "the row group ends early"
        except _READ_FAILURES as exc:
            reason = _line(exc)
        error = SampleError(ErrorKind.READ_ERROR, f"row group {group} cannot be read: {reason}")
        for lost in [row, *todo] if row is not None else []:
            yield Sample(self.name, lost, keys.get(lost, f"@{lost}"), error=error)

    def _sample(
        self, batch: pa.RecordBatch, at: int, row: int, columns: Columns, keys: dict[int, str]
    ) -> Sample:
        key = f"@{row}"
        try:
            stated = _cell(batch, columns.key, at)
            key = keys.get(row, f"@{row}" if stated is None else str(stated))
            texts = {name: _cell(batch, name, at) for name in columns.texts}
            fields = {name: text for name, text in texts.items() if text is not None}
            data = self._image(batch, at, columns, row)
        except BadSample as exc:
            return Sample(self.name, row, key, error=exc.error)
        return Sample(self.name, row, key, data, pick_caption(fields), fields)

    def _image(self, batch: pa.RecordBatch, at: int, columns: Columns, row: int) -> bytes:
        value: Any = _cell(batch, columns.image or columns.path, at)
        path: Any = value if columns.image is None else None
        if isinstance(value, dict):
            value, path = value.get("bytes"), value.get("path")
        if isinstance(value, bytes):
            if not value:
                raise BadSample(ErrorKind.EMPTY_FILE, f"the image of row {row} has 0 bytes")
            if len(value) > MAX_IMAGE_BYTES:
                raise BadSample(ErrorKind.READ_ERROR, f"row {row} is larger than {MAX_IMAGE_BYTES} bytes")
            return value
        if not isinstance(path, str) or not path:
            raise BadSample(ErrorKind.NO_IMAGE, f"row {row} has no image")
        return read_image_file(safe_join(self.image_root, path), path)


def _cell(batch: pa.RecordBatch, column: str | None, at: int) -> Any:
    """A value as Python sees it, or None without a column. Raises BadSample on text that is not UTF-8."""
    if column is None:
        return None
    try:
        return batch.column(column)[at].as_py()
    except UnicodeDecodeError as exc:
        raise BadSample(ErrorKind.BAD_TEXT, f"column {column} is not UTF-8") from exc


def _line(exc: Exception) -> str:
    return str(exc).partition("\n")[0]


def check_columns(shards: Sequence[ParquetShard]) -> None:
    """Raise SourceError when no column of the first sound file can hold an image."""
    for shard in islice(shards, 8):
        failure = shard.failure
        if failure is None:
            return
        if failure.kind is ErrorKind.NO_IMAGE:
            raise SourceError(f"{shard.path}: {failure.message}")
