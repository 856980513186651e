"""What the stethoscope accepts. Apart from analysis.py, so that flags are read without torch."""

from __future__ import annotations

QUESTION_LIMIT = 1536  # characters, as LVLM-Interpret cuts them
TOKEN_LIMIT = 1024  # generated tokens
FILE_LIMIT = 20 * 2**20  # bytes of an uploaded picture
PIXEL_LIMIT = 50_000_000
SESSION_MINUTES = 60  # for which a visitor's answers are kept after their last use
CLOSED_MINUTES = 5  # the same once the page is closed
SESSION_MEMORY = 2048  # MiB that all visitors' answers may take
SESSION_LIMIT = 1000  # visitors that are known at once
LOGIN_MINUTES = 60  # after which wrong passwords are forgotten
LOGIN_DELAY = 30  # seconds at most that a further password waits
