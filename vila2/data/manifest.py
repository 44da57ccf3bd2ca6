"""`manifest.json` of an output folder: what decides its captions, so that no folder ever mixes two runs."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vila2.data.files import DEAD_AFTER_S, atomic_write, make_folder, remove_leftovers, write_error
from vila2.data.parts import list_parts
from vila2.errors import OutputError

FILE_NAME = "manifest.json"
_ABSENT = "(not set)"


@dataclass(frozen=True, slots=True)
class Manifest:
    """`settings` decide the captions (source, model digest, prompts, sampling, ...) and must be the same in every
    run into a folder; `versions` say what wrote it first and may differ. Both hold only what JSON can."""

    settings: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def load(cls, out_dir: Path) -> "Manifest | None":
        """The manifest of a folder, or None if it has none yet. Raises OutputError."""
        path = out_dir / FILE_NAME
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            return cls(dict(stored["settings"]), dict(stored["versions"]))
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise OutputError(f"cannot read {path}: {exc.strerror}") from exc
        except (ValueError, KeyError, TypeError) as exc:
            raise OutputError(f"{path} is not a manifest ({exc}); use a new output folder") from exc

    def ensure(self, out_dir: Path) -> "Manifest":
        """Write this manifest into a new folder, or check it against the one there, and return the one there.

        Of several processes that start at once, one writes and the others check. Raises OutputError.
        """
        stored = Manifest.load(out_dir)
        if stored is None:
            if list_parts(out_dir):
                raise OutputError(f"{out_dir} holds parts but no {FILE_NAME}; use a new output folder")
            make_folder(out_dir)
            path = out_dir / FILE_NAME
            try:
                remove_leftovers(out_dir, FILE_NAME, DEAD_AFTER_S)
                atomic_write(path, self._as_json().encode(), exclusive=True)
                return self
            except FileExistsError:
                stored = Manifest.load(out_dir)
            except OSError as exc:
                raise write_error(path, exc) from exc
        if stored is None:
            raise OutputError(f"{out_dir / FILE_NAME} came and went; is another program at work there?")
        stored.check(self, out_dir)
        return stored

    def check(self, new: "Manifest", out_dir: Path) -> None:
        """Raise OutputError, naming each setting in which `new` differs with both values."""
        there, now = _flatten(self.settings), _flatten(json.loads(new._as_json())["settings"])
        names = [name for name in {**there, **now} if there.get(name, _ABSENT) != now.get(name, _ABSENT)]
        if names:
            differences = "; ".join(
                f"{name} was {_shown(there.get(name, _ABSENT))}, is now {_shown(now.get(name, _ABSENT))}"
                for name in names
            )
            raise OutputError(
                f"{out_dir} was made with other settings ({differences}); repeat those, or use a new folder"
            )

    def _as_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False, default=str) + "\n"


def _flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _shown(value: Any) -> str:
    text = value if value == _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:117]}..."
