"""Which rewards a run has, what it keeps of them, and with which it goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora.errors import RewardError
from qlora.recipe.sections import TrainSection
from qlora.rewards.sources import MAX_FILE_BYTES, RECORD_FILE, of_run, reward_sources, write_record
from tests.rewards.cases import function_of

SOURCE = "def score(completions):\n    return [0.0] * len(completions)\n"


def grpo(*rewards: str, weights: tuple[float, ...] | None = None) -> TrainSection:
    return TrainSection(objective="grpo", rewards=rewards, reward_weights=weights)


def test_rewards_stand_in_the_order_of_recipe_and_command(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    given = ("exact_match", f"json_schema:{tmp_path / 'a.json'}")
    found = reward_sources(grpo(*given, weights=(1, 2, 3)), [function_of(tmp_path, SOURCE)])
    assert [one.name for one in found] == ["exact_match", "json_schema:a.json", "rewards.py:score"]
    assert [len(one.data) for one in found] == [0, 2, len(SOURCE)]
    assert reward_sources(TrainSection(), ()) == ()


def test_nothing_is_run_by_looking_at_it(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    reward_sources(grpo(), [function_of(tmp_path, f"open({str(marker)!r}, 'w')\n")])
    assert not marker.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("rewards.py", "is not FILE.py:FUNCTION"),
        ("rewards:score", "is not FILE.py:FUNCTION"),
        ("rewards.py:", "is not FILE.py:FUNCTION"),
        ("rewards.py:a.b", "is not FILE.py:FUNCTION"),
        ("gone.py:score", "no such file"),
        ("folder.py:score", "cannot be read"),
        ("large.py:score", "cannot be read"),
        ("latin.py:score", "is not UTF-8 text"),
    ],
)
def test_what_names_no_function_is_told(given: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "large.py").write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    (tmp_path / "latin.py").write_bytes(b"# \xe4")
    with pytest.raises(RewardError, match=said) as error:
        reward_sources(grpo(), [given])
    assert given in error.value.what or given.partition(":")[0] in error.value.what


def test_a_schema_is_read_as_bounded_json(tmp_path: Path) -> None:
    for text, said in (
        ("{", "is not valid JSON"),
        ("[" * 100 + "]" * 100, "nested deeper"),
        ("[]", "is no JSON schema"),
    ):
        (tmp_path / "a.json").write_text(text)
        with pytest.raises(RewardError, match=said):
            reward_sources(grpo(f"json_schema:{tmp_path / 'a.json'}"), ())
    with pytest.raises(RewardError, match="no such file"):
        reward_sources(grpo(f"json_schema:{tmp_path / 'b.json'}"), ())


def test_rewards_that_do_not_fit_the_recipe_are_refused(tmp_path: Path) -> None:
    function = function_of(tmp_path, SOURCE)
    with pytest.raises(RewardError, match="has no reward"):
        reward_sources(grpo(), ())
    with pytest.raises(RewardError, match=r'train.objective = "sft" draws no answers'):
        reward_sources(TrainSection(), [function])
    with pytest.raises(RewardError, match="2 numbers for 3 rewards"):
        reward_sources(grpo("exact_match", "regex:a", weights=(1, 2)), [function])
    with pytest.raises(RewardError, match="one of them twice"):
        reward_sources(grpo(), [function, function])


def test_a_run_goes_on_with_what_it_began_with(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    train, function = grpo(f"json_schema:{tmp_path / 'a.json'}"), function_of(tmp_path, SOURCE)
    run = tmp_path / "run"
    run.mkdir()
    of_run(train, [function], run)  # it had not begun
    write_record(run, of_run(train, [function]))
    assert of_run(train, [function], run)
    with pytest.raises(RewardError, match=r"judged by rewards.py:score, and none is given") as missing:
        of_run(train, [], run)
    assert f"mode='resume' `rewards` {function}" in missing.value.hint
    (tmp_path / "rewards.py").write_text(f"{SOURCE}# mended\n")
    with pytest.raises(RewardError, match=r"rewards.py: has changed since the run began"):
        of_run(train, [function], run)
    (tmp_path / "rewards.py").write_text(SOURCE)
    (tmp_path / "a.json").write_text("true")
    with pytest.raises(RewardError, match=r"a.json: has changed since the run began"):
        of_run(train, [function], run)
    (run / RECORD_FILE).write_text("{}")
    with pytest.raises(RewardError, match="which rewards the run began with is not known"):
        of_run(train, [function], run)


def test_a_run_without_functions_takes_none_later(tmp_path: Path) -> None:
    train, function = grpo("exact_match"), function_of(tmp_path, SOURCE)
    write_record(tmp_path, of_run(train, []))
    assert of_run(train, [], tmp_path)
    with pytest.raises(RewardError, match=r"judged by no function, and rewards.py:score is given") as error:
        of_run(train, [function], tmp_path)
    assert error.value.hint.startswith("leave `rewards` out")
