"""What all unit tests share."""

from hypothesis import settings

# How long one case takes says how busy the machine is; a test that hangs has its timeout.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")
