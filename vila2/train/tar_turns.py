"""The question and answer turns in the .json members of tars that `vila2-fast export --merge qa` wrote.

Samples carry text fields alone, so the turns are read from the tar by its index.
"""

import json
import os
from pathlib import Path
from typing import Any

from vila2.data.local_index import Index
from vila2.data.source import Source
from vila2.data.tar_source import TarShard, build_index
from vila2.train.examples import SkippedDocument
from vila2.types import Sample

_OF_EXPORT = {"key", "shard", "original", "text"}


class TarTurns:
    """Turns by sample; none where the sample does not come from such a tar."""

    def __init__(self, source: Source) -> None:
        self._tars = {shard.name: shard.path for shard in source.shards if isinstance(shard, TarShard)}
        self._indices: dict[str, Index] = {}

    def of(self, sample: Sample) -> list[tuple[str, str]]:
        """The (question, answer) turns of a sample. Raises SkippedDocument if they do not parse."""
        path = self._tars.get(sample.shard)
        if path is None or not sample.fields.keys() >= _OF_EXPORT:
            return []
        record = self._record(path, sample)
        try:
            return [(str(turn["question"]), str(turn["answer"])) for turn in record.get("turns", [])]
        except (TypeError, KeyError):
            raise SkippedDocument(
                "bad_record", f"{sample.key}: its turns are no questions and answers"
            ) from None

    def _record(self, path: Path, sample: Sample) -> dict[str, Any]:
        if sample.shard not in self._indices:
            self._indices[sample.shard] = {"json": build_index(path)["json"]}
        start, size = map(int, self._indices[sample.shard]["json"][sample.index])
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            record: dict[str, Any] = json.loads(
                os.pread(fd, size, start)
            )  # it parsed when the sample was read
        finally:
            os.close(fd)
        return record
