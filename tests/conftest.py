"""What all tests share: how hard Hypothesis tries. `HYPOTHESIS_PROFILE=deep` tries much harder."""

import os

from hypothesis import HealthCheck, settings

settings.register_profile("usual", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("deep", deadline=None, max_examples=20_000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "usual"))
