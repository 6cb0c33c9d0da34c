"""Settings of the whole suite; what the fixtures do stands in tests/support."""

import os

from hypothesis import HealthCheck, settings

pytest_plugins = [
    "tests.support.resources",
    "tests.support.kinds",
    "tests.support.injector",
    "tests.support.leaks",
    "tests.support.overtaking",
    "tests.support.skips",
    "tests.support.evidence",
    "tests.support.interpreter",
]

# No deadline: the first touch of a page in a virtual machine may take a hundred times as long as the next.
settings.register_profile("dev", deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
settings.register_profile("ci", settings.get_profile("dev"), print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "dev")
