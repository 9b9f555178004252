"""What can't be tested in a build with sanitizers."""

import os

import pytest

SANITIZED = bool(os.environ.get("KEVEN_SANITIZED"))

# False alarms: new threads of a forked child get stacks of threads that did not come along, with the red zones there,
# and ThreadSanitizer sees no order between them and the thread that has forked.
no_new_threads_in_a_forked_child = pytest.mark.skipif(
    SANITIZED, reason="sanitizers mistake new threads in a forked child for the parent's"
)
