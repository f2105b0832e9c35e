"""YAML text becomes plain data with positions, or one error with file:line:column."""

import time
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.core.errors import RecipeError
from compress.core.positions import Mark, nested
from compress.core.yaml_source import MAX_BYTES, parse_yaml, read_yaml

SCALARS = {
    "2:4": "2:4",
    "2024-01-01": "2024-01-01",
    "12:30:45": "12:30:45",
    "2_000_000": 2_000_000,
    "1e-5": 1e-5,
    "1E5": 1e5,
    ".5": 0.5,
    "+3": 3,
    "-2.5": -2.5,
    "0x10": 16,
    "0o17": 15,
    "no": "no",
    "on": "on",
    "true": True,
    "False": False,
    "~": None,
    "null": None,
    "'5'": "5",
    '"true"': "true",
    "'a # b'": "a # b",
    "2%": "2%",
    "120MB": "120MB",
    "w4a16": "w4a16",
    "1__0": "1__0",
    "1.2.3": "1.2.3",
    "e5": "e5",
}


@pytest.mark.parametrize("text", SCALARS)
def test_a_scalar_means_what_yaml_1_2_says(text: str) -> None:
    value = parse_yaml(f"key: {text}\n", "r.yaml").data["key"]
    assert value == SCALARS[text]
    assert type(value) is type(SCALARS[text])


def test_every_node_has_its_position() -> None:
    source = parse_yaml("model: m\nstages:\n  - quantize: {method: gptq, bits: 4}\n", "r.yaml")
    assert source.keys[("stages", 0, "quantize", "bits")] == Mark(3, 30)
    assert source.values[("stages", 0, "quantize", "bits")] == Mark(3, 36)
    assert source.values[("stages", 0)] == Mark(3, 5)


REFUSED = {
    "alias": ("a: 1\nb: *x", "2:4"),
    "anchor": ("a: &x 1", "1:4"),
    "alias bomb": ("a: &a [1,1]\nb: &b [*a,*a]\nc: [*b,*b]", "1:4"),
    "cycle": ("a: &a [*a]", "1:4"),
    "tag": ("a: !!int 1", "1:4"),
    "python tag": ("a: !!python/object/apply:os.system ['echo']", "1:4"),
    "local tag": ("a: !secret x", "1:4"),
    "tagged key": ("!!str a: 1", "1:1"),
    "duplicate key": ("a: 1\nb: 2\na: 3", "3:1"),
    "duplicate key in flow": ("a: {b: 1, b: 2}", "1:11"),
    "several documents": ("a: 1\n---\nb: 2", "2:1"),
    "merge key": ("<<: {a: 1}", "1:1"),
    "list as key": ("? [1]\n: 2", "1:3"),
    "empty key": ("'': 1", "1:1"),
    "infinity": ("a: .inf", "1:4"),
    "not a number": ("a: .nan", "1:4"),
    "overflowing float": ("a: 1e999", "1:4"),
    "number over 64 bits": (f"a: {2**63}", "1:4"),
    "number of 5000 digits": ("a: " + "9" * 5000, "1:4"),
    "too deep": ("a: " + "[" * 100 + "]" * 100, "1:36"),
    "too deep in blocks": ("\n".join(" " * i + "a:" for i in range(100)), "34:34"),
    "too many values": ("a: [" + "1," * 30_000 + "]", "1:3999"),
    "NUL": ("a: \x00", "1:4"),
    "escape character": ("a: \x1b[31m", "1:4"),
    "control character": ("a: \x84", "1:4"),
    "byte order mark inside": ("a: b\ufeff", "1:5"),
    "lone surrogate": ("a: \ud800", "1:4"),
    "tab as indentation": ("a:\n\tb: 1", "2:1"),
    "unclosed list": ("a: [1", "1:6"),
    "unclosed quote": ("a: 'x", "1:6"),
    "unclosed mapping": ("a: {b: 1", "1:9"),
    "colon in a value": ("a: b: c", "1:5"),
    "list then mapping": ("- 1\nb: 2", "2:1"),
    "bad indentation": ("a:\n  b: 1\n c: 2", "3:2"),
    "reserved start": ("@a: 1", "1:1"),
    "bad escape": ('a: "\\q"', "1:6"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_yaml_is_refused_with_its_position(name: str) -> None:
    text, position = REFUSED[name]
    tracemalloc.start()
    started = time.perf_counter()
    with pytest.raises(RecipeError) as caught:
        parse_yaml(text, "r.yaml")
    seconds = time.perf_counter() - started
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.where == f"r.yaml:{position}"
    assert "\n" not in caught.value.message
    assert caught.value.excerpt is not None
    assert caught.value.excerpt.split("\n")[-1].endswith("^")
    assert peak < 50e6
    assert seconds < 30  # a parser that expands it would take hours


def test_a_caret_stands_under_the_mark_even_far_to_the_right() -> None:
    with pytest.raises(RecipeError) as caught:
        parse_yaml("a: [" + "1, " * 200 + "&x 2]", "r.yaml")
    line, caret = caught.value.excerpt.split("\n")
    assert line[len(caret) - 1] == "&"
    assert len(line) <= 100


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (b"a: \xff\xfe", ":1:4"),
        (b"a: 1\nb: caf\xe9\n", ":2:7"),
        ("a: 1".encode("utf-16"), ":1:1"),
        (b"a: 1\x00", ":1:5"),
        (b"#" * (MAX_BYTES + 1), ""),
    ],
)
def test_bytes_that_are_no_text_are_refused(tmp_path, raw: bytes, where: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(raw)
    with pytest.raises(RecipeError) as caught:
        read_yaml(path)
    assert caught.value.where == f"{path}{where}"


def test_a_byte_order_mark_at_the_start_is_accepted(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_yaml(path).data == {"a": 1}


def test_missing_files_and_folders_are_named(tmp_path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(RecipeError) as caught:
            read_yaml(path)
        assert caught.value.where == str(path)


@given(st.text(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_text_is_data_or_a_recipe_error(text: str) -> None:
    try:
        source = parse_yaml(text, "r.yaml")
    except RecipeError as error:
        assert error.where is not None and error.where.startswith("r.yaml")
    else:
        assert set(source.keys) <= set(source.values)


def test_nested_follows_keys_and_entries_and_nothing_else() -> None:
    data = {"a": [{"b": 1}]}
    assert nested(data, ("a", 0, "b")) == 1
    assert nested(data, ("a", 1)) is None
    assert nested(data, ("a", 0, "b", "c"), default=7) == 7
