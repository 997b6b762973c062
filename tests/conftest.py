# SPDX-License-Identifier: Apache-2.0
"""How hypothesis looks for examples: the same ones in every run, however slow the machine.

A change is evaluated by its own tests, not by luck. To look for new examples: pytest --hypothesis-profile=explore
"""

from hypothesis import settings

settings.register_profile("steady", deadline=None, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=2_000)
settings.load_profile("steady")
