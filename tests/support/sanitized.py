"""What can't be tested in a build with sanitizers."""

import os

import pytest

SANITIZED = bool(os.environ.get("KEVEN_SANITIZED"))

# A false alarm: new threads of a forked child get stacks of threads that did not come along, with the red zones there.
no_new_threads_in_a_forked_child = pytest.mark.skipif(
    SANITIZED, reason="AddressSanitizer mistakes stacks of new threads in a forked child for those of the parent's"
)
