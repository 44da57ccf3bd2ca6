"""Data in and out: sources of samples, image decoding, and the output folder with its parts, manifest and locks.

No torch in here: a test, a verifier or an exporter runs without it.
"""
