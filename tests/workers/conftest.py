"""Settings of the workers' tests."""

from hypothesis import settings

settings.register_profile("workers", deadline=None)  # a busy machine is not a failure
settings.load_profile("workers")
