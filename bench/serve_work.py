"""One side of bench/bench_serve.py: a worker that recaptions a source again and again, in process or by http.

Where there is no --url the model is loaded once, and every run goes through the command's own pipeline.
"""

import argparse
import resource
import tempfile
from pathlib import Path
from typing import Any

from workers import own_output, serve

from vila2.backends import open_captioner
from vila2.config import RecaptionSettings, make_settings
from vila2.data.verify import iter_rows
from vila2.recaption.pipeline import run


def cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source")
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--url")
    args = parser.parse_args()
    basic: dict[str, Any] = {"source": args.source, "model": args.model}
    if args.url:
        basic |= {"backend": "http", "base_url": args.url, "api_key_env": "NO_KEY"}
    else:
        basic |= {"batch_size": args.batch}
    loaded = None if args.url else open_captioner(make_settings(RecaptionSettings, {**basic, "out": "none"}))

    def recaption(question: dict[str, Any]) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            out = str(Path(folder) / "out")
            settings = make_settings(RecaptionSettings, {**basic, "out": out, "limit": question["images"]})
            start = cpu_s()
            summary = run(settings, open_model=open_captioner if loaded is None else lambda _: loaded)
            used = cpu_s() - start
            captions = [row["caption"] for row in sorted(iter_rows(Path(out)), key=lambda row: row["key"])]
        return {"captions_per_s": summary.captions_per_s, "cpu_s": used, "captions": captions}

    recaption({"images": 16})
    serve({}, recaption)


if __name__ == "__main__":
    own_output()
    main()
