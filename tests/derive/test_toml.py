"""Rule tables as files: canonical, hashed, and read with suspicion."""

import json
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from widthwise.derive import DeriveError, architecture, derive, read_toml, write_toml

TABLE = derive(architecture("gated_deltanet", scaling="mixed"), "sgd")
TEXT = write_toml(TABLE)


def test_round_trip_byte_for_byte() -> None:
    again = read_toml(TEXT)
    assert again == TABLE
    assert again.hash == TABLE.hash
    assert write_toml(again) == TEXT


def test_derivations_are_reproducible() -> None:
    assert write_toml(derive(architecture("gated_deltanet", scaling="mixed"), "sgd")) == TEXT


def test_an_edited_file_is_refused() -> None:
    edited = TEXT.replace('lr = "-h/2"', 'lr = "-h"', 1)
    assert edited != TEXT
    with pytest.raises(DeriveError, match="changed after it was derived"):
        read_toml(edited)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('lr = "1"', "lr = \"__import__('os').abort()\""),
        ('lr = "1"', "lr = 1.0"),
        ('lr = "1"', 'lr = "1"\nextra = 3'),
        ('optimizer = "sgd"', "optimizer = 3"),
        ('role = "embeddings"', "role = []"),
        ("[[rules]]", "[[rulez]]"),
        ('regime = "practical"', ""),
    ],
)
def test_malformed_files_are_refused(old: str, new: str) -> None:
    assert old in TEXT
    with pytest.raises(DeriveError):
        read_toml(TEXT.replace(old, new, 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(TEXT) - 1), st.text(max_size=8))
def test_garbled_files_are_refused_or_equal(position: int, noise: str) -> None:
    garbled = TEXT[:position] + noise + TEXT[position + len(noise) :]
    with suppress(DeriveError):
        assert read_toml(garbled) == TABLE  # noise in the comment, or none at all


def test_oversized_and_foreign_files() -> None:
    for text in ("x" * 500_000, "a." * 15_000 + "a = 1", "a = " + "1" * 5000, "a = 1\n", "{}", "[" * 5000):
        with pytest.raises(DeriveError):
            read_toml(text)


def test_the_json_contract() -> None:
    content = json.loads(json.dumps(TABLE.as_dict()))
    assert {
        "architecture",
        "optimizer",
        "scaling",
        "regime",
        "assumptions",
        "rules",
        "tensors",
        "findings",
        "hash",
    } <= set(content)
    assert {
        "role",
        "parameters",
        "shape",
        "init_std",
        "multiplier",
        "lr",
        "weight_decay",
        "eps",
        "binding",
        "assumed",
    } <= set(content["rules"][0])
    assert {"name", "forward", "gradient", "coherent_in"} == set(content["tensors"][0])
    assert {"kind", "where", "exponent", "message", "cure"} == set(content["findings"][0])
    assert {rule["role"] for rule in content["rules"]} == {
        "embeddings",
        "q_proj",
        "k_proj",
        "v_proj",
        "q_conv1d",
        "k_conv1d",
        "v_conv1d",
        "a_proj",
        "b_proj",
        "A_log",
        "dt_bias",
        "g_proj",
        "o_norm",
        "o_proj",
        "attn_norm",
        "mlp_norm",
        "gate_proj",
        "up_proj",
        "down_proj",
        "norm",
        "lm_head",
        "o_scale",
    }
    assert {
        "x",
        "h",
        "q",
        "k",
        "v",
        "q_normed",
        "S",
        "k_normed",
        "z_alpha",
        "z_beta",
        "alpha",
        "beta",
        "o",
        "o_normed",
        "y",
        "logits",
    } <= {tensor["name"] for tensor in content["tensors"]}
    assert all(rule["multiplier"] == "0" for rule in content["rules"] if rule["role"] not in ("o_scale", "lm_head"))
