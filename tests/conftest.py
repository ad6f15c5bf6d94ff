"""What holds for all tests: assertions in the support modules tell what they compared, whichever test files are chosen."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("tests.support")
