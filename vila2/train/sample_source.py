"""Sources of samples (tars, folders, Parquet), as `recaption` reads them, as documents to train on."""

from bisect import bisect_right
from collections import OrderedDict
from itertools import accumulate
from pathlib import Path

from vila2.data.shards import open_source
from vila2.data.source import Source
from vila2.recaption.prompts import load_prompts
from vila2.train.examples import Conversation, Document, SkippedDocument
from vila2.train.mixture import WINDOW, derived_seed
from vila2.train.tar_turns import TarTurns
from vila2.types import Sample

_STRETCH = 64  # of a Parquet file, whose rows are read in groups; WINDOW of them are held in memory


class Samples:
    """The samples of a source by number. Where single ones are dear to read, whole stretches are, and kept a while."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self._ends = list(accumulate(len(shard) for shard in source.shards))
        self._numbers = {shard.name: number for number, shard in enumerate(source.shards)}
        self.stretch = _STRETCH if source.kind == "parquet" else 1
        self._held: OrderedDict[int, list[Sample]] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Sample:
        if self.stretch == 1:
            return self._read(index, index + 1)[0]
        first = index // self.stretch * self.stretch
        if first not in self._held:
            if len(self._held) >= 2 * WINDOW:  # two readers of one mixture need no more than their windows
                self._held.popitem(last=False)
            self._held[first] = self._read(first, min(first + self.stretch, len(self)))
        return self._held[first][index - first]

    def at(self, shard: str, index: int) -> Sample:
        """The sample `index` of a shard. Raises SkippedDocument if the source has none such."""
        number = self._numbers.get(shard)
        if number is None or not 0 <= index < len(self.source.shards[number]):
            raise SkippedDocument("missing_file", f"the source has no sample {index} of {shard!r} any more")
        return self[self._ends[number] - len(self.source.shards[number]) + index]

    def _read(self, first: int, last: int) -> list[Sample]:
        samples: list[Sample] = []
        while first < last:
            number = bisect_right(self._ends, first)
            shard = self.source.shards[number]
            start = self._ends[number] - len(shard)
            stop = min(last, self._ends[number])
            samples += shard.read(range(first - start, stop - start))
            first = stop
        return samples


class SampleSource:
    """Each sample with its original caption: alone, or with `prompt` as the answer to it.

    `prompt` is the name of one of recaption's prompts or the text of a question. Tars that were exported with the
    merge rule `qa` bring their turns with them.
    """

    def __init__(
        self, name: str, path: str, prompt: str | None = None, image_root: str | None = None
    ) -> None:
        root = None if image_root is None else Path(image_root).expanduser()
        self.name = name
        self.samples = Samples(open_source(path, image_root=root))
        self.stretch = self.samples.stretch
        self._turns = TarTurns(self.samples.source)
        self._wordings: tuple[str, ...] = ()
        if prompt is not None:
            known = load_prompts()
            self._wordings = known[prompt].texts if prompt in known else (prompt,)

    @property
    def length(self) -> int:
        return len(self.samples)

    def document(self, index: int) -> Document:
        sample = self.samples[index]
        key = f"{self.name}/{sample.shard}/{sample.key}"
        if sample.error is not None or sample.image is None:
            reason = sample.error.kind.value if sample.error else "no_image"
            raise SkippedDocument(reason, f"{key}: {sample.error.message if sample.error else 'no image'}")
        text = defused(sample.original.strip())
        turns: tuple[Conversation, ...] = tuple((turn,) for turn in self._turns.of(sample))
        if not text and not turns:
            raise SkippedDocument("no_text", f"{key}: the sample has no caption")
        if self._wordings and text:
            draw = derived_seed("wording", sample.shard, sample.index) % len(self._wordings)
            return Document(
                key, "conversation", (sample.image,), conversations=(((self._wordings[draw], text),), *turns)
            )
        return Document(key, "caption" if text else "conversation", (sample.image,), text, turns)


def defused(text: str) -> str:
    return text.replace("<image>", "<IMAGE>")
