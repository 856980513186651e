"""The engine room of the five diagnoses. Commands and notebooks import common.py; this package
never does."""

from pathlib import Path

CHECKOUT = (
    Path(__file__).resolve().parent.parent
)  # the repository, or site-packages where a wheel was installed
