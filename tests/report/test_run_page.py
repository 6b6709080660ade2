"""The page of runs: all of it is there, strangers' text is text, and it stays small."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path

import pytest

from qlora.report.page import CHILDREN
from qlora.report.run_page import page_of
from tests.report.cases import FIGURES
from tests.report.pages import ATTACKS, browser, judged, opened
from tests.report.runs_told import end, line, run_in, start, step, whole


def test_everything_of_a_run_is_on_its_page(tmp_path: Path) -> None:
    lines = [*whole(), line("exam", 90, figures=FIGURES)]
    text = judged(page_of([run_in(tmp_path / "ours", lines, "[train]\nseed = 7\n")])).text
    for words in (
        *("Loss, nats a token", "Learning rate", "Gradient norm", "Tokens a second", "Peak memory, GiB"),
        *("predicted and measured", "What happened", "untuned and tuned", "Exam", "how near to the trained model"),
        *("Rows", "train.seed", "Versions", "micro-batch 2 becomes 1", "80.0 %", "900 rows", "gguf-q4", "2.13"),
    ):
        assert words in text, words
    assert "Not shown" not in text and "alice" not in text


@pytest.mark.parametrize("attack", ATTACKS)
def test_text_of_strangers_is_text(tmp_path: Path, attack: str) -> None:
    figures = json.loads(json.dumps(FIGURES))
    figures["advice"], figures["dropped"] = [attack], {attack: 3}
    lines = [*whole(words=attack), line("exam", 90, figures=figures), line(attack)]
    recipe = f"[train]\nseed = {json.dumps(attack)}\n{json.dumps(attack)} = 1\n"
    one = run_in(tmp_path / "a", lines, recipe, attack)
    one.notes.append(attack)
    other = run_in(tmp_path / "b", [*whole()], "", f"{attack}2")
    for runs in ([one], [one, other]):
        made = page_of(runs)
        parsed = judged(made)
        assert set(parsed.tags) <= {*CHILDREN, "html", "head", "meta", "link", "title", "style", "body", "main"}
        assert not {"\x1b", "\u202e", "\x00", "\r"} & set(made)


def test_secrets_stay_out(tmp_path: Path) -> None:
    token = "hf_" + "a1B2" * 9
    run = run_in(tmp_path, [*whole(words=f" {token}")], f'[model]\nbase = "{token}"\n', token)
    assert token not in page_of([run])


def test_runs_beside_each_other_show_what_differs(tmp_path: Path) -> None:
    recipe = '[train]\nseed = {seed}\nlearning_rate = 1e-4\n[model]\nbase = "x"\n'
    runs = [
        run_in(tmp_path / "a", [*whole()], recipe.format(seed=1)),
        run_in(tmp_path / "b", [*whole(30)], recipe.format(seed=2)),
        run_in(tmp_path / "c", [start(versions={"torch": "2.12"}), step(1)], recipe.format(seed=2)),
        run_in(tmp_path / "d", [start(), step(1)]),
    ]
    made = page_of(runs)
    parsed = judged(made)
    found = re.search(r"<h2>What differs.*?</section>", made, re.DOTALL)
    assert found and re.findall(r"<tr><td><code>([^<]+)</code>", found[0]) == [*("train.seed", "version of torch")]
    assert "version of torch" not in page_of(runs[:2])
    assert "without a recipe that can be read: d" in parsed.text and "no end recorded at step 1" in parsed.text
    (loss,) = re.findall(r"<h3>Loss, nats a token</h3><svg.*?</svg>", made)
    assert {f'"line c{colour} d0"' for colour in (0, 1)} <= set(re.findall(r'class=("line[^"]+")', loss))


def test_what_could_not_be_read_is_said_with_counts(tmp_path: Path) -> None:
    lines = [start(), step(1, 9), step(2, 4), "mine\n", line("telepathy"), line("eval", step="x"), step(3)[:50]]
    text = judged(page_of([run_in(tmp_path, lines)])).text
    for words in ("1 lines of the events are none of ours", "last line of the events is cut short", "'telepathy'"):
        assert words in text
    assert "the kind 'eval' have other values" in text and "the clock went back 1 times" in text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    for number, lines in enumerate(([start()], [step(1)], [line("notice", topic="a", message="b")], [end(0, 0)])):
        judged(page_of([run_in(tmp_path / str(number), lines)]))


def test_a_live_page_asks_to_be_opened_again(tmp_path: Path) -> None:
    run = run_in(tmp_path, [*whole()])
    live, still = page_of([run], live=True), page_of([run])
    judged(live)
    assert '<meta http-equiv="refresh" content="5">' in live and "refresh" not in still


def test_twenty_thousand_steps_are_small(tmp_path: Path) -> None:
    made = page_of(
        [run_in(tmp_path, [start(), *(step(n, loss=2 + n * 7 % 13) for n in range(1, 20_001)), end(9, 20_000)])]
    )
    assert len(made) < 300_000
    judged(made)


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="there is no Chromium here")
def test_a_browser_draws_it_and_asks_for_nothing(tmp_path: Path) -> None:
    """A server that waits for whoever is lured to it; nobody comes, and the console is silent."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.1)
        lure = f"http://127.0.0.1:{server.getsockname()[1]}/x"
        words = f"<img src='{lure}'></style><style>@import '{lure}';</style><script src={lure}></script>"
        (tmp_path / "a.html").write_text(page_of([run_in(tmp_path / "run", [*whole(words=words)])]))
        assert "CONSOLE" not in opened(tmp_path / "a.html", tmp_path, 400)
        with pytest.raises(TimeoutError):
            server.accept()


def test_of_runs_beside_each_other_the_best_evaluation_is_a_number(tmp_path: Path) -> None:
    told = [line("eval", step=at, loss=loss, rows=1) for at, loss in ((1, float("nan")), (2, 0.7531))]
    lines = [start(), step(1, tokens_per_second=float("nan")), step(2, tokens_per_second=float("nan")), *told]
    text = judged(page_of([run_in(tmp_path / "a", lines), run_in(tmp_path / "b", [*whole()])])).text
    assert "0.7531" in text and "not a number" not in text
