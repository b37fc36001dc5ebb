"""YAML as configurations read it.

Tested are the meaning of scalars, what is refused, and that reading always ends.
"""

from __future__ import annotations

import os

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_evomoe.config import ConfigError, from_mapping, load_config, text

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.sampled_from(
        [
            "1e-5",
            "010",
            "1:30",
            "no",
            "null",
            "~",
            "2024-01-01",
            "0x1f",
            "1_0",
            ".5",
            "=",
            "<<",
            "${",
            "on",
            ".inf",
            "-",
            "? a",
            "- b",
            "a: b",
            "#",
        ]
    )
)
DATA = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(min_size=1, max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(DATA)
def test_what_is_dumped_is_read_back_by_us_and_by_yaml_1_1(data):
    written = text.dump(data)
    assert text.load(written, "x") == data
    assert yaml.safe_load(written) == data


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("1e-5", 1e-5),
        ("-1E+5", -1e5),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000", 1000),
        ("+3", 3),
        ("010", "010"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0x10", "0x10"),
        ("no", False),
        ("on", True),
        ("~", None),
        ("", None),
        ("'5'", "5"),
        ("=", "="),
    ],
)
def test_scalars(written, value):
    found = text.load(f"a: {written}", "x")["a"]
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: 'a' appears twice in one mapping (first on line 1)"),
        ("a: {b: {c: 1, c: 1}}", "'c' appears twice"),
        ("a: &x [*x]", "*x lies inside the value that it stands for"),
        ("a: !!python/object/apply:os.system [id]", "python/object/apply:os.system is not read"),
        ("a: !!int x", "is not read"),
        ("5: a", "the key '5' is not text"),
        ("? [a]\n: b", "is not text"),
        ("--- a\n--- b", "expected a single document"),
        ("[" * 10_000, "nested deeper than 16 levels"),
        ("- " * 10_000, "nested deeper than 16 levels"),
        ("a: b: c", "is not valid YAML"),
    ],
)
def test_what_is_refused(written, message):
    with pytest.raises(ConfigError) as error:
        text.load(written, "x")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "a{i}: &a{i} [" + ", ".join(["*a{j}"] * 9) + "]",
        "a{i}: &a{i} {{<<: [" + ", ".join(["*a{j}"] * 9) + "]}}",
        "a{i}: &a{i} [*a{j}]",
    ],
)
def test_aliases_that_multiply_are_refused(line):
    first = "{k: 1}" if "<<" in line else "[1]"
    lines = [f"a0: &a0 {first}", *(line.format(i=i, j=i - 1) for i in range(1, 40))]
    with pytest.raises(ConfigError, match="with its aliases written out"):
        text.load("\n".join(lines), "x")


def test_aliases_and_merge_keys_of_ordinary_size_are_read():
    assert text.load("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: {<<: *a, x: 3}", "x") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": {"x": 3},
    }


def test_a_variable_is_one_scalar(tmp_path, monkeypatch):
    path = tmp_path / "x.yaml"
    path.write_text(
        "a: ${EVOMOE_A}\nb: '${EVOMOE_A}'\nc: [${EVOMOE_B}, x]\nd: ${EVOMOE_C:-[1, 2]}  # "
        "${EVOMOE_UNSET}\ne: ${EVOMOE_E:-}\n"
    )
    monkeypatch.setenv("EVOMOE_A", "4")
    monkeypatch.setenv("EVOMOE_B", "x]\nstages: [{name: align}]  # ")
    assert text.read_file(path) == {
        "a": 4,
        "b": "4",
        "c": ["x]\nstages: [{name: align}]  #", "x"],
        "d": "[1, 2]",
        "e": None,
    }


def test_a_variable_that_is_not_replaced_is_no_text(tmp_path):
    (tmp_path / "x.yaml").write_text("checkpoint: {save: 'runs/${'}")
    with pytest.raises(ConfigError, match=r"checkpoint\.save.*must not hold \$\{"):
        load_config(tmp_path / "x.yaml")
    with pytest.raises(ConfigError, match=r"must not hold \$\{"):
        from_mapping({"checkpoint": {"save": "${HOME}"}})


def test_byte_order_mark_and_encodings(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: \xc3\xa9")
    assert text.read_file(path) == {"a": "é"}
    path.write_bytes("a: é".encode("latin-1"))
    with pytest.raises(ConfigError, match=r"is not UTF-8 \(byte 3\)"):
        text.read_file(path)


def test_only_plain_files_of_moderate_size_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.yaml").write_bytes(b"#" * (text.MAX_BYTES + 1))
    for path, message in (
        (tmp_path, "is a directory"),
        (tmp_path / "pipe", "is a pipe or a device"),
        ("/dev/zero", "is a pipe or a device"),
        ("a\0b", "cannot be read"),
        ("x" * 5000, "cannot be read"),
        (tmp_path / "large.yaml", "is larger than"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            text.read_file(path)
        assert str(error.value).count("config file") == 1
