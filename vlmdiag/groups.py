"""The token groups of a prompt, the same everywhere. The papers' "user text" is user + template."""

GROUPS = (
    "bos",
    "system",
    "vision",
    "image_markup",  # ids that a processor puts around or between image tokens
    "user",  # the question
    "template",  # role strings
    "generated",
)
PAD = -1  # padding is in no group
VISION = GROUPS.index("vision")
