"""estimate_acts_size.py under the name that the document gives it."""

import sys

from vlmdiag.cli import replace_by

if __name__ == "__main__":
    replace_by("scripts/estimate_acts_size.py", sys.argv[1:])
