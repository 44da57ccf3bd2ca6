"""Which specialists share one encode of an image, and why the others have one of their own.

All specialists start from the same checkpoint, so those that do not train the tower see with the same weights: an
image goes through that tower once for all of them, and through each projector that was trained. One that trains the
tower has visual features that nobody else can use. The prompts of one specialist share its encode in any case.
"""

from vila2.augment.recipe import LoopRecipe, Specialist


def asked_together(recipe: LoopRecipe) -> tuple[Specialist, ...]:
    """Those that share the encode of an image, none if there are not two."""
    found = tuple(s for s in recipe.specialist if not _obstacle(recipe, s))
    return found if len(found) > 1 else ()


def why_alone(recipe: LoopRecipe, specialist: Specialist) -> str:
    """What keeps a specialist from sharing an encode with another; nothing if it does, or is the only one."""
    if len(recipe.specialist) < 2 or specialist in asked_together(recipe):
        return ""
    return _obstacle(recipe, specialist) or "no other specialist can share it"


def encode_plan(recipe: LoopRecipe) -> list[str]:
    """What an image costs of encodes when the specialists are asked about it, in sentences; nothing without any."""
    together = asked_together(recipe)
    said = []
    if together:
        names = ", ".join(s.name for s in together)
        said.append(f"one encode an image serves {len(together)} specialists: {names}")
    for specialist in recipe.specialist:
        why = why_alone(recipe, specialist)
        if why:
            said.append(f"{specialist.name} encodes every image by itself: {why}")
    return said


def trains_tower(specialist: Specialist) -> bool:
    """Whether its visual features differ from those of the model that it started from (LoRA on the tower included)."""
    return any("vision" in stage.train for stage in specialist.stage)


def _obstacle(recipe: LoopRecipe, specialist: Specialist) -> str:
    backend = recipe.recaption.get("backend", "native")
    if trains_tower(specialist):
        return "it trains the tower, so no other model's visual features are its own"
    if recipe.launch.recaption is not None:
        return "recaptioning is launched as commands of one model each"
    if backend != "native":
        return f"the {backend} backend encodes inside one model's server or engine"
    if any(name in recipe.recaption for name in ("prompt_file", "prompt_template")):
        return "the recipe has wordings of its own, which do not tell whose prompt they are"
    for other in recipe.specialist[: recipe.specialist.index(specialist)]:
        if set(other.prompt) & set(specialist.prompt) and not trains_tower(other):
            return f"it is asked a prompt that {other.name} is asked too"
    return ""
