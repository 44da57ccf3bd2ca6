"""What a page shows, made by hand: texts that try to be code among them."""

from typing import Any

EVIL = "</script><script>window.broken = 1</script><img src=http://a.example/ onerror='window.broken=2'> <!-- & \u2028"


def figure(value: float) -> dict[str, Any]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "seeds": [value]}


def make_data(rows: int) -> dict[str, Any]:
    """A loop of two rounds with `rows` images."""
    models = ["round-0", "round-1", "control-steps"]
    metrics = {
        name: {model: figure(0.3 + 0.1 * i) for i, model in enumerate(models)}
        for name in ("objects.f1", EVIL)
    }
    told = [
        {"by": "original", "text": EVIL, "status": "ok", "right": [], "wrong": ["cat"]},
        {"by": "round-1", "text": "a dog", "status": "ok", "right": ["dog"], "wrong": []},
    ]
    bad = {**told[1], "right": [], "wrong": ["cow"], "status": "truncated", "text": "a cow"}
    gallery = [
        {"key": f"k{i:05d}", "image": "", "truth": "dog", "texts": [told[0], bad if i % 4 == 0 else told[1]]}
        for i in range(rows)
    ]
    summary = {
        "captions": 4,
        "status": {"ok": 4},
        "errors": {EVIL: 1},
        "rates": {"retried": 0.1},
        "captions_per_s": 3.0,
        "captioner": {"images_encoded": 4, "images_shared": 8},
    }
    line = {
        "step": EVIL,
        "kind": "recaption",
        "finished": "f",
        "seconds": 1.0,
        "device": "cpu",
        "digest": "d" * 32,
        "settings": {"prompt": ["ocr", EVIL]},
    }
    cost = {"seconds": 4000.0, "cpu_hours": 1.0, "gpu_hours": 0.0, "cost": 2.0, "images": 10.0, "steps": 1.0}
    return {
        "out": EVIL, "seeds": [0], "models": models, "best": {"0": 1}, "better": {"objects.f1": "higher"},
        "shares": ["objects.f1", EVIL], "metrics": {"test": metrics, "dev": metrics},
        "against": {split: [{"model": "round-1", "other": EVIL, "gains": {"objects.f1": figure(0.2)}}]
                    for split in ("test", "dev")},
        "captions": {"round-1": {"words": 5.0}}, "cost": {"train": cost}, "currency": EVIL,
        "encodes": ["one encode for all", EVIL],
        "recipe": {"saturation": {"metrics": ["objects.f1"]}, "x": EVIL}, "ledger": [{**line, "metrics": summary}],
        "gallery": gallery,
    }  # fmt: skip
