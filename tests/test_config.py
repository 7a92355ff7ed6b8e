"""`SLA2Config` accepts what the op can do and refuses the rest in words that help."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from sla2_compile import SLA2Config


def test_the_defaults_are_cautious_and_full_precision() -> None:
    assert dataclasses.asdict(SLA2Config()) == {
        "sparsity": 0.75,
        "block_q": 128,
        "block_k": 64,
        "feature_map": "softmax",
        "qk_format": None,
        "pv_format": None,
        "fake_quant": False,
        "tail": "pooled",
        "mixing": "row",
        "token_grid": None,
        "min_seq_len": 2048,
        "exact_prefix": 0,
        "exact_suffix": 0,
        "infer_layout": True,
        "site_sparsity": (),
        "include": (),
        "exclude": (),
        "strict": False,
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": 0},
        {"sparsity": 0.999999},
        {"block_q": 16, "block_k": 256},
        {"feature_map": "elu", "tail": "linear", "mixing": "block"},
        {"qk_format": "int8", "pv_format": "fp8"},
        {"qk_format": "fp8"},
        {"token_grid": (21, 30, 52), "exact_prefix": 512, "exact_suffix": 1},
        {"min_seq_len": 0, "strict": True, "include": ("blocks.*",), "exclude": ("*.attn2",)},
    ],
)
def test_every_documented_value_is_accepted_and_kept(settings: dict[str, Any]) -> None:
    config = SLA2Config(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


@pytest.mark.parametrize(
    "name, value, kind",
    [
        ("sparsity", 1.0, ValueError),
        ("sparsity", -0.1, ValueError),
        ("sparsity", 97, ValueError),
        ("sparsity", float("nan"), ValueError),
        ("sparsity", "0.97", TypeError),
        ("sparsity", True, TypeError),
        ("sparsity", None, TypeError),
        ("block_q", 100, ValueError),
        ("block_q", 0, ValueError),
        ("block_q", 512, ValueError),
        ("block_q", 64.0, TypeError),
        ("block_k", 8, ValueError),
        ("block_k", None, TypeError),
        ("feature_map", "gelu", ValueError),
        ("feature_map", None, ValueError),
        ("qk_format", "int4", ValueError),
        ("qk_format", False, ValueError),
        ("pv_format", "int8", ValueError),
        ("tail", "none", ValueError),
        ("tail", ["pooled"], ValueError),
        ("mixing", "head", ValueError),
        ("token_grid", (1, 2), ValueError),
        ("token_grid", (1, 2, 0), ValueError),
        ("token_grid", (1.0, 2, 3), ValueError),
        ("token_grid", (True, 2, 3), ValueError),
        ("token_grid", 64, ValueError),
        ("token_grid", "123", ValueError),
        ("min_seq_len", -1, ValueError),
        ("min_seq_len", 2.5, TypeError),
        ("exact_prefix", -1, ValueError),
        ("exact_prefix", True, TypeError),
        ("exact_suffix", "1", TypeError),
        ("include", 3, TypeError),
        ("include", (3,), TypeError),
        ("exclude", None, TypeError),
        ("strict", 1, ValueError),
        ("strict", "yes", ValueError),
    ],
)
def test_a_wrong_value_is_an_error_that_says_which_what_and_how(name: str, value: Any, kind: type[Exception]) -> None:
    with pytest.raises(kind) as error:
        SLA2Config(**{name: value})
    text = str(error.value)
    assert text.startswith(f"{name}: expected ")
    _, got, remedy = text.partition(f"got {value!r}; ")
    assert got
    assert remedy


def test_settings_are_given_by_name() -> None:
    with pytest.raises(TypeError):
        SLA2Config(0.97)  # type: ignore[misc]


def test_a_config_cannot_be_changed_and_equal_ones_are_one_key() -> None:
    config = SLA2Config(token_grid=(4, 8, 8), include="blocks.*")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.sparsity = 0.5  # type: ignore[misc]
    assert {config: 1}[SLA2Config(token_grid=(4, 8, 8), include=("blocks.*",))] == 1


def test_lists_and_single_patterns_become_tuples() -> None:
    patterns: Any = (name for name in ("a", "b"))
    config = SLA2Config(token_grid=[4, 8, 8], include="blocks.*", exclude=patterns)  # type: ignore[arg-type]
    assert (config.token_grid, config.include, config.exclude) == ((4, 8, 8), ("blocks.*",), ("a", "b"))


def test_a_replaced_field_is_checked_too() -> None:
    assert dataclasses.replace(SLA2Config(), sparsity=0.97).sparsity == 0.97
    with pytest.raises(ValueError, match="tail: expected"):
        dataclasses.replace(SLA2Config(), tail="none")


@pytest.mark.parametrize("sparsity, units", [(0, 0), (0.97, 970_000), (0.1 + 0.2, 300_000), (1 / 3, 333_333)])
def test_sparsity_reaches_the_op_as_millionths(sparsity: float, units: int) -> None:
    assert SLA2Config(sparsity=sparsity).sparsity_units == units


def test_options_are_the_fields_of_the_config() -> None:
    assert SLA2Config.from_options(None) == SLA2Config.from_options({}) == SLA2Config()
    assert SLA2Config.from_options({"sparsity": 0.9, "tail": "linear"}) == SLA2Config(sparsity=0.9, tail="linear")


def test_an_unknown_option_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown keys 'sparcity', 'topk'") as error:
        SLA2Config.from_options({"topk": 0.1, "sparcity": 0.9, "tail": "linear"})
    assert all(field.name in str(error.value) for field in dataclasses.fields(SLA2Config))
    assert "mode=" in str(error.value)


def test_options_that_are_no_mapping_or_have_other_keys_than_names_are_errors() -> None:
    with pytest.raises(TypeError, match="options: expected a mapping"):
        SLA2Config.from_options([("sparsity", 0.9)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown keys 1, 'topk'"):
        SLA2Config.from_options({1: 2, "topk": 3})  # type: ignore[dict-item]
