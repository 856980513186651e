"""What the stethoscope accepts. Apart from analysis.py, so that flags are read without torch."""

from __future__ import annotations

QUESTION_LIMIT = 1536  # characters, as LVLM-Interpret cuts them
TOKEN_LIMIT = 1024  # generated tokens
FILE_LIMIT = 20 * 2**20  # bytes of an uploaded picture
PIXEL_LIMIT = 50_000_000
