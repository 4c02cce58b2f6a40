"""What makes the book."""

# Here, since every tool passes by, and in words that the oldest Python reads.
import sys

OLDEST = (3, 11)
if sys.version_info < OLDEST:
    sys.exit(
        "lossbook needs Python %d.%d or newer, this is %s. Use: make PYTHON=python3.12"  # noqa: UP031
        % (OLDEST[0], OLDEST[1], sys.version.split()[0])
    )
