"""Where the seconds of a run go: matrix products and attention against everything else.

    python bench/profile_step.py .cache/llava-small

Timers are put around every matrix product, every attention call and the preparation of images; what is left of the
wall clock (norms, rope, sampling, scheduling, tokenising, Python itself) is the rest. The bar is 25 % for
all that is neither product nor attention.
"""

import argparse
import importlib
from collections import defaultdict
from collections.abc import Callable
from time import perf_counter
from typing import Any

from common import CHAT, append_row, facts, noise_images

import vila2
from vila2.ops.linear import Linear

# stage -> where the function is looked up when it is called: "module:name".
TIMED = {
    "products": (  # in int8, with the norms before them and the activations after them
        "vila2.model.quantized:add_rms_norm_byte_linear",
        "vila2.model.quantized:layer_norm_byte_linear",
        "vila2.model.quantized:byte_linear",
        "vila2.model.decoder:head_top",  # the head, with the search for the best token
    ),
    "attention": (
        "vila2.engine.runner:paged_attention",
        "torch.nn.functional:scaled_dot_product_attention",
    ),
    "norms": ("vila2.model.decoder:add_rms_norm", "vila2.model.vision:layer_norm"),
    "activations": ("vila2.model.decoder:silu_mul", "vila2.model.vision:gelu"),
    "rope and cache": ("vila2.engine.runner:rope_store",),
    "patches": ("vila2.model.vision:image_patches",),
    "sampling": ("vila2.engine.sampler:_agreed",),
}
BAR = 0.25


class Stopwatch:
    """Seconds by stage. A stage inside another stage counts only once, for the outer one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.inside = False

    def wrap(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside = True
            started = perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[stage] += perf_counter() - started
                self.calls[stage] += 1
                self.inside = False

        return timed

    def patch(self, stage: str, place: str) -> None:
        module_name, _, name = place.partition(":")
        module = importlib.import_module(module_name)
        setattr(
            module, name, self.wrap(stage, getattr(module, name))
        )  # AttributeError: the table above is stale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--images", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()

    model = vila2.load(
        args.checkpoint, device="cpu", precision=args.precision, template="raw", batch_size=args.batch
    )
    watch = Stopwatch()
    for stage, places in TIMED.items():
        for place in places:
            watch.patch(stage, place)
    Linear.forward = watch.wrap("products", Linear.forward)  # type: ignore[method-assign]
    model.captioner.prepare = watch.wrap("image preparation", model.captioner.prepare)  # type: ignore[method-assign]

    model.caption(noise_images(2), prompt=CHAT, max_new_tokens=4, ignore_eos=True)
    watch.seconds.clear()
    watch.calls.clear()
    images = noise_images(args.images)
    started = perf_counter()
    model.caption(images, prompt=CHAT, max_new_tokens=args.new_tokens, ignore_eos=True)
    total = perf_counter() - started

    watch.seconds["all else"] = total - sum(watch.seconds.values())
    shares = {stage: seconds / total for stage, seconds in watch.seconds.items()}
    for stage, share in sorted(shares.items(), key=lambda item: -item[1]):
        print(f"{stage:18} {watch.seconds[stage]:8.2f} s  {share:6.1%}  {watch.calls[stage]:7} calls")
    outside = 1 - shares["products"] - shares["attention"]
    print(f"outside products and attention: {outside:.1%} of {total:.2f} s (the bar is {BAR:.0%})")
    if not args.no_row:
        stages = tuple(TIMED)
        row = {
            **facts(),
            "model": model.captioner.model_name,
            "precision": args.precision,
            "images": args.images,
            "new_tokens": args.new_tokens,
            "seconds": total,
            **{stage.replace(" ", "_"): shares.get(stage, 0.0) for stage in stages},
            "image_preparation": shares["image preparation"],
            "all_else": shares["all else"],
            "outside": outside,
        }
        append_row("profile", row)
    if outside >= BAR:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
