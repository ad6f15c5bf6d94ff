"""Every rule is run by some case, and names operators that exist."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from graphprune.ops import RULES
from tests.ops import (
    test_attention,
    test_convolution,
    test_creation,
    test_experts,
    test_indexing,
    test_joining,
    test_linear,
    test_losses,
    test_normalisation,
    test_pointwise,
    test_pooling,
    test_quantisation,
    test_recurrent,
    test_reduction,
    test_reshaping,
    test_vision,
    test_writing,
)
from tests.support.operators import Case, operators
from tests.support.versions import TORCH

FAMILIES: dict[str, list[Case]] = {
    "attention": test_attention.CASES,
    "convolution": test_convolution.CASES,
    "creation": [*test_creation.CASES, *test_creation.NUMBERS, test_creation.DECIDED, test_creation.NOISE],
    "experts": test_experts.CASES,
    "indexing": test_indexing.CASES,
    "joining": test_joining.CASES,
    "linear": test_linear.CASES,
    "losses": test_losses.CASES,
    "normalisation": test_normalisation.CASES,
    "pointwise": test_pointwise.CASES,
    "pooling": test_pooling.CASES,
    "quantisation": test_quantisation.CASES,
    "recurrent": test_recurrent.CASES,
    "reduction": test_reduction.CASES,
    "reshaping": test_reshaping.CASES,
    "vision": [*test_vision.CASES, *test_vision.CHOOSING],
    "writing": test_writing.CASES,
}
LATER = {"aten::_fused_rms_norm", "aten::_grouped_mm"}  # than PyTorch 2.7
# Spelt for other versions of PyTorch, or declared by other libraries, which the tests cannot count on.
ABSENT = {
    "aten::float",
    "aten::new_tensor",
    "torchvision::deform_conv2d",
    "torchvision::nms",
    "torchvision::ps_roi_align",
    "torchvision::ps_roi_pool",
    "torchvision::roi_align",
    "torchvision::roi_pool",
    "transformers::grouped_mm_fallback",
}


def families() -> Iterator[tuple[str, str, list[str]]]:
    """Yields the family, the name of the rule, and the operators that it is the rule of."""
    rules: dict[tuple[str, str], list[str]] = {}
    for operator, rule in RULES.items():
        rules.setdefault((rule.__module__.rpartition(".")[2], rule.__name__), []).append(operator)
    for (family, rule_name), names in rules.items():
        yield family, rule_name, names


@pytest.fixture(scope="module")
def seen() -> set[str]:
    """The operators, without the underscore of those in place, that the recordings of all cases hold."""
    found: set[str] = set()
    for cases in FAMILIES.values():
        for case in cases:
            found |= operators(case.build(), case.inputs(case.batch))
    return found | {name.removesuffix("_") for name in found}


def test_operators_exist() -> None:
    """Every operator that a rule is registered for exists in this PyTorch, or is listed as one that may not."""
    missing = {n for n in RULES if n != "pointwise" and not torch._C._jit_get_schemas_for_operator(n)}  # noqa: SLF001 (no public list)
    assert missing - ABSENT - (LATER if TORCH < (2, 8) else set()) == set()


def test_every_family_has_cases() -> None:
    """Each file of rules has a table of cases."""
    assert {family for family, _, _ in families()} == set(FAMILIES)


def test_every_rule_is_run(seen: set[str]) -> None:
    """Each rule decides about some operator of some case."""
    unseen = {f"{family}.{rule}" for family, rule, names in families() if not seen.intersection(names)}
    assert unseen - {"pointwise.pointwise"} == set()
