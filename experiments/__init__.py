"""The losses on public data at full size, one file a chapter; records go to ``data/results``."""
