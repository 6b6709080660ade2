"""RUN_OR_MODEL is found out before anything is loaded, and opened as training had it, on the base of training alone."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qlora.ask.opened import HowToOpen, TorchModel, named, open_model, refuse_without_template
from qlora.ask.talk import Talk, prompt_of
from qlora.data.chat import ChatTokenizer, TokenRow
from qlora.data.formats import Conversation
from qlora.errors import DataError, ExportError, QloraError, TokenizerError, UserError
from qlora.events import Recorder
from tests import runs
from tests.ask.cases import GREEDY, user

HOW = HowToOpen(context=100)
SHORT = replace(GREEDY, max_tokens=12)


def test_what_a_name_means(llama: Path, adapter: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "mine"
    shutil.copytree(adapter, run / "adapter")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "x-Q8_0.gguf").write_bytes(b"GGUF...")
    (tmp_path / "one" / "mmproj-x.gguf").write_bytes(b"GGUF...")
    kinds = {run: "adapter", adapter: "adapter", llama: "model", tmp_path / "one": "gguf"}
    assert {path: named(path).kind for path in kinds} == kinds
    assert named(tmp_path / "one").name == "x-Q8_0.gguf" and named(llama).name == "llama"
    assert (named("hub:owner/name").kind, named("hub:owner/name").place) == ("model", "owner/name")


def test_what_is_none_of_them_is_refused_in_two_lines(tmp_path: Path) -> None:
    (tmp_path / "text.gguf").write_text("hello")
    (tmp_path / "empty").mkdir()
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (two / name).write_bytes(b"GGUF")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "a.gguf").symlink_to(two / "a.gguf")
    for path in ("none", "text.gguf", "empty", "two", "linked", "x" * 300):
        with pytest.raises(ExportError) as refused:
            named(tmp_path / path)
        assert refused.value.hint
    with pytest.raises(UserError):
        named("a\0b")


def test_an_adapter_is_opened_on_the_base_of_its_training(llama: Path, adapter: Path) -> None:
    sink = Recorder()
    with open_model(named(adapter), HOW, sink) as opened:
        assert isinstance(opened, TorchModel) and opened.context == 100 and opened.vocabulary == 384
        layers = {type(module).__name__ for module in opened.model.get_base_model().modules()}
        assert "Linear4bit" in layers
        asked, end = [{"role": "system", "content": "Be kind."}, user("hi")], {"role": "assistant", "content": "ok"}
        (row,) = opened.chat.encode_many([Conversation((*asked, end))])
        assert isinstance(row, TokenRow)
        prompt = prompt_of(opened, asked)
        trained = [token for token, weight in zip(row.input_ids, row.loss_weights, strict=True) if weight]
        assert row.input_ids[: len(prompt)] == prompt and row.input_ids[len(prompt)] == trained[0]
        assert trained[-1] in opened.chat.end_token_ids  # what is served is what was trained, to its end
        tuned, base = Talk(opened), Talk(opened, of_base=True)
        texts = [talk.answer(talk.ask("What is it?", SHORT), lambda _: None) for talk in (tuned, base, tuned)]
        again = Talk(opened, of_base=True)
        assert again.answer(again.ask("What is it?", SHORT), lambda _: None) == texts[1] != texts[0]
        opened.vocabulary = 200
        with pytest.raises(DataError, match="no row for"):
            prompt_of(opened, [user("hi")])
    assert all(parameter.numel() == 0 for parameter in opened.model.parameters())  # its memory is given back


def test_the_base_alone_answers_as_the_adapters_do_that_are_off(llama: Path, adapter: Path) -> None:
    answers = []
    for path in (adapter, llama):
        with open_model(named(path), HowToOpen(context=100, nf4=True), Recorder()) as opened:
            talk = Talk(opened, of_base=True)  # type: ignore[arg-type]
            answers.append(talk.answer(talk.ask("What is it?", SHORT), lambda _: None))
    assert answers[0] == answers[1]


@pytest.mark.slow
def test_another_base_is_refused(llama: Path, adapter: Path, tmp_path: Path) -> None:
    other = runs.change_unsampled_value(Path(shutil.copytree(llama, tmp_path / "other")))
    recipe = runs.write_recipe(tmp_path / "run", Path(shutil.copytree(llama, tmp_path / "own")))
    runs.train(recipe, "train.max_steps=1", "data.max_length=64", "eval.samples=0", "eval.exact_match_rows=0")
    with (
        pytest.raises(ExportError, match="another base"),
        open_model(named(runs.run_dir(recipe)), HowToOpen(base_model=other), Recorder()),
    ):
        pass
    with open_model(named(runs.run_dir(recipe)), HOW, Recorder()) as opened:  # and its own is taken
        assert opened.name == "tiny"
        ours = ChatTokenizer(opened.chat.tokenizer, "assistant", Recorder())  # type: ignore[union-attr]
        assert opened.chat.prompt_ids([user("hi")], None) == ours.prompt_ids([user("hi")], None)


def test_a_model_without_a_template_is_refused(llama: Path, tmp_path: Path) -> None:
    plain = Path(shutil.copytree(llama, tmp_path / "plain"))
    for file in plain.glob("*"):
        if file.name == "chat_template.jinja":
            file.unlink()
    with open_model(named(plain), HOW, Recorder()) as opened, pytest.raises(TokenizerError, match="no chat template"):
        refuse_without_template(opened)


def test_a_folder_that_is_damaged_is_two_lines(llama: Path, tmp_path: Path) -> None:
    broken = Path(shutil.copytree(llama, tmp_path / "broken"))
    (broken / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(QloraError), open_model(named(broken), HOW, Recorder()):
        pass
    assert torch.is_grad_enabled()
