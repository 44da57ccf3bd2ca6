"""A run's side of its output folder: the manifest that guards it, the rows that go in, the errors that are redone.

`manifest.json` records what decides the captions. `index/` keeps where the source's samples lie; `parts/` holds the
rows; `summary.json` is the last run's. What is in a committed part is done.
"""

import json
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from vila2 import __version__
from vila2.backends import Captioner
from vila2.config import RecaptionSettings
from vila2.data.done import DoneSet
from vila2.data.files import atomic_write, remove_leftovers, write_error
from vila2.data.lock import RunLock
from vila2.data.manifest import FILE_NAME, Manifest
from vila2.data.parts import part_rank_and_number
from vila2.data.rows import Row
from vila2.data.shards import open_source
from vila2.data.source import Source
from vila2.data.writer import PartWriter, load_part
from vila2.errors import OutputError
from vila2.recaption.exchange import Outcome
from vila2.recaption.prompts import PromptSet, make_prompts
from vila2.types import Status

Place = tuple[str, int, str]  # shard, index, prompt
_VERSIONS_OF = ("torch", "transformers", "pyarrow", "pillow", "simplejpeg")


def index_folder(out: Path) -> Path:
    return out / "index"


def open_samples(settings: RecaptionSettings, *, keep_index: bool = True) -> Source:
    """List the source. Without `keep_index` nothing is written, but an index that a run left is used."""
    out = Path(settings.out).expanduser()
    index = index_folder(out) if keep_index or (out / FILE_NAME).exists() else None
    root = None if settings.image_root is None else Path(settings.image_root).expanduser()
    return open_source(settings.source, image_root=root, index_dir=index)


def discard_index(settings: RecaptionSettings) -> None:
    """Forget the listing of a run that failed before it claimed its folder: the source may change until the next."""
    out = Path(settings.out).expanduser()
    if not (out / FILE_NAME).exists():
        shutil.rmtree(index_folder(out), ignore_errors=True)
        if out.is_dir() and not any(out.iterdir()):
            out.rmdir()


def write_summary(settings: RecaptionSettings, summary: dict[str, Any]) -> None:
    """`summary.json`, or one file a rank where there are several. Raises OutputError."""
    rank, world = settings.rank, settings.world_size
    name = "summary.json" if world == 1 else f"summary-{rank:05d}-of-{world:05d}.json"
    path = Path(settings.out).expanduser() / name
    try:
        atomic_write(path, (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise write_error(path, error) from error


def make_manifest(
    settings: RecaptionSettings, source: Source, model_digest: str, prompts: PromptSet
) -> Manifest:
    """What decides the captions of this run. Source and model by what they are; the prompts by their wordings."""
    root = None if settings.image_root is None else str(Path(settings.image_root).expanduser().absolute())
    deciding = {
        "source": f"{source.kind}:{source.root}",  # `open_source` takes it back
        "image_root": root,
        "num_shards": len(source.shards),
        "model_digest": model_digest,
        "prompts": prompts.to_json(),
        "prompt_template": prompts.template,
        **settings.deciding(),
    }
    installed = {name: _version(name) for name in _VERSIONS_OF}
    versions = {"vila2-fast": __version__, "python": platform.python_version(), **installed}
    return Manifest(json.loads(json.dumps(deciding)), versions)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "none"


class Finished:
    """An output folder as later commands see it: its manifest, its source and its prompts."""

    def __init__(self, out: Path) -> None:
        """Raises OutputError when the folder is none of ours."""
        if not out.is_dir():
            raise OutputError(f"{out} is not a folder")
        manifest = Manifest.load(out)
        if manifest is None:
            raise OutputError(f"{out} holds no {FILE_NAME}: it is not the output of a recaption run")
        self.out = out
        self.settings = manifest.settings
        try:
            self.prompts = make_prompts(
                self.settings["prompts"], self.settings["seed"], self.settings["prompt_template"]
            )
            self.spec: str = self.settings["source"]
        except KeyError as error:
            raise OutputError(f"{out / FILE_NAME} lacks {error}; it is of another version") from None

    @property
    def source_kind(self) -> str:
        return self.spec.partition(":")[0]

    def open_source(self) -> Source:
        """The source that the captions were made from. Raises SourceError when it is gone."""
        root = self.settings.get("image_root")
        return open_source(
            self.spec, image_root=None if root is None else Path(root), index_dir=index_folder(self.out)
        )


class Output:
    """Takes outcomes as rows while a `with` block holds this rank's lock. Claim it with `open_output`."""

    def __init__(
        self, settings: RecaptionSettings, source: Source, captioner: Captioner, prompts: PromptSet
    ) -> None:
        self.folder = Path(settings.out).expanduser()
        self.settings = settings
        self.model_digest = captioner.model_digest
        self._manifest = make_manifest(settings, source, captioner.model_digest, prompts)
        self._lock = RunLock(self.folder, settings.rank, settings.world_size)
        self._redo: dict[Place, str] = {}  # an error row that is asked for again -> its part
        self._redone: dict[str, dict[Place, Row]] = {}
        self._num_redone = 0
        self._new_errors = 0

    def __enter__(self) -> "Output":
        self._manifest.ensure(self.folder)
        self._lock.__enter__()
        try:
            settings = self.settings
            if settings.world_size == 1:
                self._tidy()
            self.done = DoneSet.load(self.folder)
            self._writer = PartWriter(self.folder, settings.rank, settings.world_size, settings.rows_per_part)
            if settings.retry_errors:
                self._redo = self._find_errors()
        except BaseException:
            self._lock.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.__exit__(kind, value, trace)

    @property
    def redo(self) -> list[Place]:
        """The error rows that this run asks for again."""
        return list(self._redo)

    @property
    def num_errors(self) -> int:
        """Error rows in the folder, counting what was taken but is not committed yet."""
        return self.done.counts[Status.ERROR.value] + self._new_errors

    def add(self, outcome: Outcome) -> bool:
        """Take one outcome; True if that committed a part. Raises OutputError."""
        row = self._row(outcome)
        part = self._redo.get(row.place)
        self._new_errors += (row.status is Status.ERROR) - (part is not None)
        if part is None:
            return self._writer.add(row) is not None
        self._redone.setdefault(part, {})[row.place] = row
        self._num_redone += 1
        if self._num_redone < self.settings.rows_per_part:
            return False
        self._replace()
        return True

    def flush(self) -> None:
        """Commit every row taken so far. Raises OutputError."""
        self._writer.flush()
        self._replace()

    def write_summary(self, summary: dict[str, Any]) -> None:
        """See the function of this name. Raises OutputError."""
        write_summary(self.settings, summary)

    def _tidy(self) -> None:
        """Remove what killed runs left half-written beside the parts (those are the writer's). Alone here: safe."""
        try:
            for folder in (self.folder, index_folder(self.folder)):
                remove_leftovers(folder, "*")
        except OSError as error:
            raise write_error(self.folder, error) from error

    def _find_errors(self) -> dict[Place, str]:
        """The error rows in the parts of this rank: whoever rewrites a part is the only one to do so."""
        found: dict[Place, str] = {}
        for errors in self.done.errors:
            place = part_rank_and_number(errors.part.name)
            if place is None or place[0] % self.settings.world_size != self.settings.rank:
                continue
            rows = load_part(errors.part)
            found.update((rows[int(number)].place, errors.part.name) for number in errors.rows)
        return found

    def _replace(self) -> None:
        for part, fresh in self._redone.items():
            rows = load_part(self._writer.folder / part)
            self._writer.replace_part(part, [fresh.get(row.place, row) for row in rows])
            for place in fresh:
                del self._redo[place]
        self._redone = {}
        self._num_redone = 0

    def _row(self, outcome: Outcome) -> Row:
        loaded, error = outcome.loaded, outcome.error
        sample = loaded.job.sample
        return Row(
            key=sample.key,
            shard=sample.shard,
            index=sample.index,
            prompt=outcome.prompt,
            status=outcome.status,
            model_digest=self.model_digest,
            caption=outcome.text,
            original=sample.original,
            error_kind=None if error is None else error.kind,
            error=None if error is None else error.message,
            num_prompt_tokens=outcome.num_prompt_tokens,
            num_tokens=outcome.num_tokens,
            finish_reason=outcome.finish_reason,
            width=loaded.width,
            height=loaded.height,
            image_digest=loaded.image_digest,
            round=self.settings.round,
        )
