"""One table of cases per family of operator rules."""

import pytest

pytest.register_assert_rewrite("tests.support.operators")
