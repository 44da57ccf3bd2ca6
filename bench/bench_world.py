"""How fast the world makes scenes: scenes a second on one core, truth and pixels, after the caches are warm.

    python bench/bench_world.py

CPU-seconds, not seconds: other processes do not change them much. The bar is 500 scenes a second at 128 pixels.
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

from common import append_row, facts

from vila2.world import World, WorldSettings, texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-row", action="store_true", help="print only; leave bench/results alone")
    args = parser.parse_args()

    for size, style, split in (
        (120, "fluent", "pretrain"),
        (128, "fluent", "pretrain"),
        (128, "second", "heldout"),
    ):
        world = World(WorldSettings(image_size=size, style=style))
        rate(world, split, args.scenes, image)
        for name, work in {
            "truth": truth,
            "truth, image": image,
            "truth, image, texts": image_and_texts,
        }.items():
            rates = [rate(world, split, args.scenes, work) for _ in range(args.rounds)]
            print(f"{size} px {style:7} {split:9} {name:20} {median(rates):7.0f} scenes per CPU-second")
            if not args.no_row:
                append_row(
                    "world",
                    {
                        **facts(),
                        "threads": 1,
                        "image_size": size,
                        "style": style,
                        "split": split,
                        "makes": name,
                        "scenes": args.scenes,
                        "rounds": args.rounds,
                        "scenes_per_cpu_s": median(rates),
                        "slowest": min(rates),
                    },
                )


def truth(world: World, split: str, index: int) -> None:
    world.scene(split, index)


def image(world: World, split: str, index: int) -> None:
    world.render(world.scene(split, index))


def image_and_texts(world: World, split: str, index: int) -> None:
    scene = world.scene(split, index)
    world.render(scene)
    texts.alt_text(scene)
    texts.detailed_caption(scene)
    texts.questions(scene)


def rate(world: World, split: str, scenes: int, work: Callable[[World, str, int], None]) -> float:
    started = time.process_time()
    for index in range(scenes):
        work(world, split, index)
    return scenes / (time.process_time() - started)


if __name__ == "__main__":
    main()
