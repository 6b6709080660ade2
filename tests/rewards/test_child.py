"""A user's function in its process: what it does to itself, it does not do to a run, and two lines say it."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from qlora.errors import RewardError
from qlora.events import Recorder
from tests.rewards.cases import PROMPTS, ROWS, function_of, rewards_of

BAD = {
    "raises": ("def score(completions):\n    raise ValueError('no\\nway')\n", r"raised ValueError: no way \(line 2\)"),
    "wrong length": ("def score(completions):\n    return [1.0]\n", "gave 1 numbers for 2 answers"),
    "nan": ("def score(completions):\n    return [0, float('nan')]\n", "gave nan for answer 1"),
    "ends": ("import os\ndef score(completions):\n    os._exit(7)\n", r"ended its process \(exit code 7\)"),
    "exits": ("import sys\ndef score(completions):\n    sys.exit(3)\n", r"ended its process \(SystemExit: 3\)"),
    "recursion": ("def score(completions):\n    return score(completions)\n", "raised RecursionError"),
    "reads": ("def score(completions):\n    return [input(), 1]\n", "raised EOFError"),
}


@pytest.mark.parametrize("name", list(BAD))
def test_what_a_function_does_wrong_is_told(name: str, tmp_path: Path) -> None:
    source, said = BAD[name]
    with (
        rewards_of(functions=[function_of(tmp_path, source)]) as rewards,
        pytest.raises(RewardError, match=f"the reward rewards.py:score {said}") as error,
    ):
        rewards.score(PROMPTS, ["5", "7"], ROWS)
    assert "mode='fresh'" in error.value.hint and "\n" not in error.value.what


UNREADY = {
    "no such function": ("def other(completions):\n    return []\n", r"has no function 'score' \(it has: other\)"),
    "no function": ("score = 3\n", "is no plain function"),
    "async": ("async def score(completions):\n    return []\n", "is no plain function"),
    "syntax": ("def score(:\n", r"raised SyntaxError: .* \(line 1\)"),
    "beside it": ("import helpers_beside\n", "not what lies beside the file"),
}


@pytest.mark.parametrize("name", list(UNREADY))
def test_a_file_without_the_function_is_told_when_it_is_opened(name: str, tmp_path: Path) -> None:
    source, said = UNREADY[name]
    (tmp_path / "helpers_beside.py").write_text("")
    with pytest.raises(RewardError, match=said), rewards_of(functions=[function_of(tmp_path, source)]):
        pass


@pytest.mark.parametrize(
    "wait", ["import time\n    time.sleep(600)", "import re\n    re.match('(a+)+$', 'a' * 64 + 'b')"]
)
def test_a_function_that_hangs_is_ended(wait: str, tmp_path: Path) -> None:
    noted = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))"
    source = f"import os\ndef score(completions):\n    {noted}\n    {wait}\n"
    with (
        rewards_of(functions=[function_of(tmp_path, source)], seconds=1) as rewards,
        pytest.raises(RewardError, match="took more than 1 seconds") as error,
    ):
        rewards.score(PROMPTS, ["5", "7"], ROWS)
    assert error.value.hint == "make it faster, or raise train.reward_timeout"
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_what_a_function_prints_is_said_once_and_changes_no_number(tmp_path: Path) -> None:
    source = "import os, sys\nprint('loaded')\ndef score(completions):\n    print('{\"scores\": [9, 9]}')\n"
    source += "    os.write(1, b'raw\\n')\n"
    source += "    sys.stderr.write('\\x1b[31mred\\n' * 100000)\n    return [float(len(c)) for c in completions]\n"
    recorder = Recorder()
    with rewards_of(functions=[function_of(tmp_path, source)], sink=recorder) as rewards:
        for _ in range(2):
            assert rewards.score(PROMPTS, ["5", "77"], ROWS) == [[1.0, 2.0]]
    (notice,) = recorder.of("notice")
    assert "rewards.py:score prints, which is said this once" in notice.as_dict()["message"]
    assert "\x1b" not in notice.as_dict()["message"]


def test_a_process_ends_with_the_block_whatever_it_does(tmp_path: Path) -> None:
    source = "import os\ndef score(completions):\n    return [os.getpid()] * len(completions)\n"
    with rewards_of(functions=[function_of(tmp_path, source)]) as rewards:
        child = int(rewards.score(PROMPTS, ["5", "7"], ROWS)[0][0])
        os.kill(child, 0)
        assert child != os.getpid()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    pytest.fail("the process went on")
