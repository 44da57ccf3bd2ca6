"""The seam between recaptioning and whatever writes the captions.

`recaption` knows nothing but `Captioner`. A backend's module is imported only when that backend is asked for.
"""

from collections.abc import Iterable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from vila2.config import RecaptionSettings
from vila2.errors import UsageError
from vila2.types import Caption, CaptionRequest

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["BACKENDS", "OUR_SERVER", "Captioner", "open_captioner"]

# name -> "module:maker"; maker(settings) -> Captioner
BACKENDS = {
    "native": "vila2.backends.native:open_native",
    "http": "vila2.backends.http_captioner:open_http",
    "trtllm": "vila2.backends.trtllm:open_trtllm",
}

OUR_SERVER = "vila2-fast"  # the owner of the models that `vila2-fast serve` lists


class Captioner(Protocol):
    """Requests in, captions out."""

    model_digest: str  # of the checkpoint's content: a changed checkpoint has another digest
    model_name: str
    description: str  # what arithmetic runs where, in a few words for the person who waits

    def prepare(self, image: "NDArray[np.uint8]") -> Any:
        """One decoded RGB image (height, width, 3) -> what a request carries. Thread-safe: runs in decode threads."""
        ...

    def caption(self, requests: Iterable[CaptionRequest | None]) -> Iterator[Caption]:
        """Yield one caption for each request, in any order.

        Pulls requests only as it has room, and only in the thread that iterates the captions. A None from
        `requests` means that nothing is ready yet: go on with what you have, and yield what is finished.
        """
        ...

    def stats(self) -> dict[str, float]:
        """Counters, and seconds by stage (names that end in `_s`), since the captioner was opened."""
        ...

    def close(self) -> None: ...


def open_captioner(settings: RecaptionSettings) -> Captioner:
    """Open the backend that the settings name. VilaError (of whichever kind) when it cannot run them."""
    if settings.backend not in BACKENDS:
        raise UsageError(f"backend {settings.backend!r} is not one of: {', '.join(BACKENDS)}")
    module, _, maker = BACKENDS[settings.backend].partition(":")
    try:
        loaded = import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in ("aiohttp", "httpx"):
            raise
        raise UsageError(f'--backend http needs {error.name}: pip install "vila2-fast[http]"') from None
    captioner: Captioner = getattr(loaded, maker)(settings)
    return captioner
