"""VILA²'s loop: rounds of recaptioning and retraining until the gain saturates, then the specialists.

`recipe` says what is done, `plan` turns it into steps without touching a file, `loop` carries them out.
"""
