"""Option files are read as data: numbers are numbers, and nothing in them runs."""

import math
from pathlib import Path
from typing import Any

import pytest

from sparse_sr_attn.errors import ConfigError
from sparse_sr_attn_basicsr.option_file import load, override, parse
from sparse_sr_attn_basicsr.options import OPTIONS


@pytest.mark.promise("R22")
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("5e3", 5000.0),
        ("-2.5e+1", -25.0),
        (".5e1", 5.0),
        ("1.e-8", 1e-8),
        ("!!float 1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("255.", 255.0),
        ("300000", 300000),
        ("'1e-4'", "1e-4"),
        ("e4", "e4"),
        ("1e", "1e"),
        ("x2", "x2"),
        ("~", None),
        ("true", True),
        ("[1, 2]", [1, 2]),
        ("!!python/tuple [0.4488, [1, 2]]", (0.4488, [1, 2])),
        ("{a: {b: 1e-3}}", {"a": {"b": 1e-3}}),
    ],
)
def test_values_are_what_they_look_like(text: str, value: Any) -> None:
    read = parse(text, "here")
    assert read == value
    assert type(read) is type(value)


def test_special_floats() -> None:
    assert math.isnan(parse(".nan", "here"))
    assert parse("-.inf", "here") == -math.inf


@pytest.mark.promise("R22")
@pytest.mark.parametrize(
    "text",
    [
        "name: !!python/object/apply:os.system ['touch {mark}']",
        "name: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{mark}']]",
        "name: !!python/object/new:subprocess.Popen [['touch', '{mark}']]",
        "name: !!python/name:os.system",
        "name: !!python/module:os",
        "a: [1, {{b: !!python/object/apply:os.system ['touch {mark}']}}]",
    ],
)
def test_code_in_an_option_file_is_refused_and_not_run(text: str, tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    file = tmp_path / "unsafe.yml"
    file.write_text("scale: 2\n" + text.format(mark=mark) + "\n")
    with pytest.raises(ConfigError, match=r"unsafe\.yml, line 2, column \d+: !!python/\S+ is refused"):
        load(file)
    assert not mark.exists()


def test_an_unknown_tag_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "odd.yml"
    file.write_text("name: !mine 3\n")
    with pytest.raises(ConfigError, match=r"line 1, column 7: !mine is refused"):
        load(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1, 2\nc: 3\n", r"bad\.yml, line 3, column 2: .*','.*']'"),
        ("a: 1\n\tb: 2\n", r"line 2, column 1: .*spaces"),
        ("a: 1\n  b: 2\n", r"line 2, column 4: mapping values are not allowed here"),
        ("a: 1\nb: 2\na: 3\n", r"line 3, column 1: 'a' is given twice, first on line 1"),
        ("net:\n  type: x\n  type: y\n", r"line 3, column 3: 'type' is given twice, first on line 2"),
        ("a: *nowhere\n", r"line 1, column 4: found undefined alias"),
        ("- 1\n", r"must hold a mapping from option names to values, got a list"),
        ("1: 2\n", r"must hold a mapping from option names to values"),
        ("", r"must hold a mapping from option names to values, got nothing"),
    ],
)
def test_what_is_no_option_file_is_explained(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "bad.yml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load(file)


def test_bytes_that_are_no_text_are_explained(tmp_path: Path) -> None:
    file = tmp_path / "bad.yml"
    file.write_bytes(b"name: \xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bad\.yml: is not YAML"):
        load(file)


def test_merged_maps_may_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "merge.yml"
    file.write_text("a: &base {x: 1, y: 2}\nb:\n  <<: *base\n  y: 3\n")
    assert load(file)["b"] == {"x": 1, "y": 3}


def test_a_missing_file_is_named_with_its_folder_and_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train_x2.yml").touch()
    with pytest.raises(ConfigError) as caught:
        load(tmp_path / "trian_x2.yml")
    message = str(caught.value)
    assert f"no such option file (in {tmp_path})" in message
    assert "did you mean" in message
    assert "train_x2.yml" in message


def test_a_missing_file_that_we_ship_is_pointed_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load("train_LCoAN_light_x2.yml")
    assert str(OPTIONS / "train" / "LCoAN" / "train_LCoAN_light_x2.yml") in str(caught.value)


def test_a_folder_is_no_option_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path)


def test_overrides_reach_nested_options_and_leave_the_original_alone() -> None:
    options = {"train": {"lr": 1.0, "total_iter": 10}, "name": "a", "list": [1]}
    result, remarks = override(
        options,
        ["train:lr=1e-4", "name=b=c", "list=[1, 2]", "train:total_iter=~", "train : ema = none", "scale=true"],
    )
    assert result == {
        "train": {"lr": 1e-4, "total_iter": None, "ema": None},
        "name": "b=c",
        "list": [1, 2],
        "scale": True,
    }
    assert options == {"train": {"lr": 1.0, "total_iter": 10}, "name": "a", "list": [1]}
    assert ["'ema' is new" in remarks[0], "'scale' is new" in remarks[1]] == [True, True]
    assert len(remarks) == 2


def test_a_new_name_that_looks_misspelt_is_remarked_on() -> None:
    _, remarks = override({"train": {"total_iter": 10}}, ["train:total_itr=3"])
    assert remarks == [
        "--force_yml train:total_itr=3: 'total_itr' is new, the option file has no such name "
        "(did you mean 'total_iter'?)"
    ]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("train", "must be name=value"),
        ("=3", "must be name=value"),
        ("train:=3", "must be name=value"),
        ("trian:lr=3", "there is no mapping 'trian'"),
        ("train:lr:x=3", "there is no mapping 'train:lr'"),
        ("train:lr=[1, 2", "line 1"),
        ("train:lr=!!python/object/apply:os.getcwd []", "is refused"),
    ],
)
def test_a_wrong_override_is_named(entry: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        override({"train": {"lr": 1.0}}, [entry, "nowhere:x=1"])
    assert len(caught.value.problems) == 2
    assert caught.value.problems[0].path.startswith(f"--force_yml {entry}")
    assert message in str(caught.value.problems[0])


def test_an_override_runs_no_code(tmp_path: Path) -> None:
    mark = tmp_path / "it_ran"
    text = f"[__import__('pathlib').Path('{mark}').touch()]"
    result, _ = override({"a": 1}, [f"a={text}"])  # BasicSR evaluates this
    assert not mark.exists()
    assert all(isinstance(item, str) for item in result["a"])
