"""Every operator has what it claims, and what every operator has.

An operator that is registered is checked here without being named: what it claims is what is tested. By default each
law is tried on a part of the operators, which is another one for each law.
"""

from __future__ import annotations

import pytest
import torch

from tensorattn.testing import (
    check_equals_reference,
    check_finite,
    check_masks,
    check_operator,
    check_precision,
    checks_of,
)
from tensorattn.testing.laws import LAWS, NARROWER, types_of
from tensorattn.testing.variants import variants

VARIANTS = variants()
ALWAYS = (check_equals_reference, check_masks)
PART = 7


def pairs():
    for i, law in enumerate(LAWS):
        for j, variant in enumerate(VARIANTS):
            if law in checks_of(variant.name, **variant.options):
                mark = () if law in ALWAYS or (i + j) % PART == 0 else pytest.mark.thorough
                yield pytest.param(law, variant, id=f"{law.__name__}: {variant}", marks=mark)


@pytest.mark.parametrize(("law", "variant"), [*pairs()])
def test_a_law_holds(law, variant):
    for dtype in types_of(law, torch.float64):
        law(variant.name, dtype=dtype, examples=4, **variant.options)


@pytest.mark.parametrize("saturation", [0.5, 1.0])
def test_the_bound_of_the_correction_of_averaged_queries_is_its_definition(saturation):
    """Both parts of the query are in the variance that the bound is made of."""
    options = {"centered": True, "interaction": "linear", "saturation": saturation}
    check_equals_reference("kao_qkv", examples=10, **options)


@pytest.mark.thorough
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_laws_hold_on_many_cases(variant):
    check_operator(variant.name, **variant.options)


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_all_laws_hold_in_other_types(variant, dtype):
    skip = (check_precision, check_finite)
    check_operator(variant.name, dtype=dtype, examples=5, skip=skip, **variant.options)


@pytest.mark.parametrize("dtype", NARROWER, ids=str)
def test_no_type_overflows(dtype):
    for variant in VARIANTS[::4]:
        check_finite(variant.name, dtype=dtype, examples=4, **variant.options)
