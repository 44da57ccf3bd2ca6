"""Texts about a scene, each a function of the scene alone: alt-text, captions, questions, a layout, instructions."""

from vila2.world.texts.alt import AltText, alt_rates, alt_text
from vila2.world.texts.captions import (
    CAPTION_PROMPTS,
    PROMPTS,
    RELATED,
    caption_for,
    detailed_caption,
    layout,
)
from vila2.world.texts.instructions import instruction
from vila2.world.texts.questions import TASKS, Question, questions

__all__ = [
    "alt_text",
    "alt_rates",
    "AltText",
    "detailed_caption",
    "caption_for",
    "CAPTION_PROMPTS",
    "PROMPTS",
    "RELATED",
    "questions",
    "Question",
    "TASKS",
    "layout",
    "instruction",
]
