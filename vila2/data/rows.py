"""One row of the output, a (sample, prompt) and what became of it, and its Parquet schema."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import pyarrow as pa

from vila2.types import ErrorKind, FinishReason, Status

_TEXT = pa.string()
SCHEMA = pa.schema(
    [
        pa.field("key", _TEXT, nullable=False),
        pa.field("shard", _TEXT, nullable=False),
        pa.field("index", pa.int64(), nullable=False),
        pa.field("prompt", _TEXT, nullable=False),
        pa.field("caption", _TEXT, nullable=False),
        pa.field("original", _TEXT, nullable=False),
        pa.field("status", _TEXT, nullable=False),
        pa.field("error_kind", _TEXT),
        pa.field("error", _TEXT),
        pa.field("num_prompt_tokens", pa.int32(), nullable=False),
        pa.field("num_tokens", pa.int32(), nullable=False),
        pa.field("finish_reason", _TEXT, nullable=False),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("image_digest", _TEXT, nullable=False),
        pa.field("model_digest", _TEXT, nullable=False),
        pa.field("round", pa.int32(), nullable=False),
    ],
    metadata={"vila2_schema": "1"},
)
# Columns in which values repeat; the others are stored plain.
DICTIONARY_COLUMNS = ["shard", "prompt", "status", "error_kind", "finish_reason", "model_digest", "round"]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the output. A size is 0 where the image was not decoded; `prompt` is the prompt's name."""

    key: str
    shard: str
    index: int
    prompt: str
    status: Status
    model_digest: str
    caption: str = ""
    original: str = ""
    error_kind: ErrorKind | None = None
    error: str | None = None
    num_prompt_tokens: int = 0
    num_tokens: int = 0
    finish_reason: FinishReason = FinishReason.ERROR
    width: int = 0
    height: int = 0
    image_digest: str = ""
    round: int = 0

    def __post_init__(self) -> None:
        if (self.status is Status.ERROR) != (self.error_kind is not None):
            raise ValueError(f"status {self.status.value} with error_kind {self.error_kind} (row {self.key})")

    @property
    def place(self) -> tuple[str, int, str]:
        """What identifies the row, and the order of rows in a part."""
        return self.shard, self.index, self.prompt


def to_table(rows: Iterable[Row]) -> pa.Table:
    """Rows as a table with SCHEMA. Half surrogate pairs in texts, which UTF-8 cannot hold, become `?`."""
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for row in rows:
        for name, values in columns.items():
            value = getattr(row, name)
            values.append(_plain(value) if isinstance(value, str) else value)
    return pa.table(columns, schema=SCHEMA)


def _plain(value: str) -> str:
    text: str = value.value if isinstance(value, Status | ErrorKind | FinishReason) else value
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def from_record(record: dict[str, Any]) -> Row:
    """The Row of one record of a part."""
    values = {field.name: record[field.name] for field in fields(Row)}
    values["status"] = Status(values["status"])
    values["finish_reason"] = FinishReason(values["finish_reason"])
    values["error_kind"] = ErrorKind(values["error_kind"]) if values["error_kind"] is not None else None
    return Row(**values)
