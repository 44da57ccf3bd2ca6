"""A run in miniature, for tests that kill it: python write_some.py OUT NUM_SAMPLES ROWS_PER_PART.

Writes a manifest and the rows that are still missing, as the pipeline does, and prints how many there were.
"""

import sys
from pathlib import Path

from vila2.data.done import DoneSet
from vila2.data.lock import RunLock
from vila2.data.manifest import Manifest
from vila2.data.rows import Row
from vila2.data.writer import PartWriter
from vila2.types import FinishReason, Status

PROMPTS = ("brief", "detailed")


def row(index: int, prompt: str, shard: str = "s.tar") -> Row:
    text = f"caption {index} {prompt}"
    return Row(
        f"k{index}", shard, index, prompt, Status.OK, "m", text, finish_reason=FinishReason.STOP, num_tokens=3
    )


def write_missing(out_dir: Path, num_samples: int, rows_per_part: int) -> int:
    with RunLock(out_dir):
        Manifest({"source": "s", "sampling": {"seed": 1}}).ensure(out_dir)
        done = DoneSet.load(out_dir)
        writer = PartWriter(out_dir, rows_per_part=rows_per_part)
        for index in done.pending("s.tar", 0, num_samples, PROMPTS):
            for prompt in done.missing_prompts("s.tar", int(index), PROMPTS):
                writer.add(row(int(index), prompt))
        writer.flush()
        return writer.num_rows_committed


if __name__ == "__main__":
    print(write_missing(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))  # noqa: T201
