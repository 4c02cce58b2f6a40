"""Settings for all tests."""

from hypothesis import settings

# The same examples in every run, so that a failure can be repeated; no deadline, since machines differ in speed.
settings.register_profile("lossbook", deadline=None, derandomize=True)
settings.load_profile("lossbook")
