"""Settings for all tests."""

from hypothesis import settings

# The same examples in every run, so that a failure can be repeated; no deadline, since machines differ in speed.
settings.register_profile("lossbook", deadline=None, derandomize=True)
settings.load_profile("lossbook")


def pytest_make_parametrize_id(val, argname):
    """Bytes are named by their argument: packed files hold the time, and two processes must collect the same names."""
    return argname if isinstance(val, bytes) else None
