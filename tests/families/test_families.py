"""Model families of other libraries: what is converted, dense sites untouched, and exactness at sparsity 0."""

from __future__ import annotations

import inspect

import pytest
from all_families import FAMILIES, NOT_BUILT, class_names, missing_package
from check_family import check_family
from family import Family


def test_the_promised_number_of_families_is_covered() -> None:
    names = [(family.library, family.name) for family in FAMILIES]
    assert len(names) == len(set(names))
    assert len(class_names()) >= 45
    others = [family for family in FAMILIES if family.library not in ("diffusers", "timm")]
    assert len(others) >= 15


def test_every_transformer_and_unet_of_diffusers_is_covered_or_has_a_reason() -> None:
    diffusers = pytest.importorskip("diffusers")
    found = set()
    for name in dir(diffusers):
        # Some names of removed pipelines are listed and cannot be fetched.
        item = getattr(diffusers, name, None)
        folders = ("diffusers.models.transformers.", "diffusers.models.unets.")
        if inspect.isclass(item) and issubclass(item, diffusers.ModelMixin) and item.__module__.startswith(folders):
            found.add(name)
    # Other versions of diffusers have other classes.
    if diffusers.__version__ == "0.42.1":
        assert found - class_names() == set(NOT_BUILT)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "family",
    [pytest.param(x, id=x.name, marks=() if x.fast else pytest.mark.slow) for x in FAMILIES],
)
def test_a_family_converts_what_it_should_and_computes_the_same(family: Family) -> None:
    missing = missing_package(family.library)
    if missing is not None:
        pytest.skip(missing)
    check_family(family)
