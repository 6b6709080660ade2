"""The whole way on the shipped quickstart: it learns the products, and what is exported is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora import api
from qlora.events import Recorder
from qlora.export.artifacts import ExportOptions
from qlora.model.cpu_matmul import fast_matmul
from qlora.recipe.reading import load_recipe
from qlora.rewards.compare import same_answer
from tests.export import llama

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart.toml"
BASE = ROOT / "recipes" / "quickstart" / "base"
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The quickstart, trained as the README does it; its folder and its last event."""
    recorder = Recorder()
    recipe = load_recipe(RECIPE, [f"output.dir={tmp_path_factory.mktemp('runs')}"])
    result = api.train(recipe, name="quickstart", sink=recorder)
    return result.run_dir, recorder.of("end")[0].as_dict()


def evaluation_rows(tokenizer: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids (1, S) and which of them are trained, by transformers alone."""
    found = []
    for line in (ROOT / "recipes" / "quickstart" / "eval.jsonl").read_text().splitlines():
        row = tokenizer.apply_chat_template(
            json.loads(line)["messages"], return_dict=True, return_assistant_tokens_mask=True, return_tensors="pt"
        )
        found.append((row["input_ids"], torch.as_tensor(row["assistant_masks"]).view(1, -1).bool()))
    return found


def logprobs(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), fast_matmul(ids.device):
        return torch.log_softmax(model(input_ids=ids).logits[0].float(), -1)


def plain(folder: Path, quantized: bool) -> Any:
    """A model opened by transformers alone, in NF4 with double quantization or in bf16."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    chosen = {"quantization_config": config} if quantized else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **chosen).eval()


def test_it_learns(run: tuple[Path, dict[str, Any]]) -> None:
    _, end = run
    assert end["exact_match_before"] <= 0.05
    assert end["exact_match_after"] >= 0.85
    assert end["tokens"] <= 160_000 and end["steps"] <= 400


def test_plain_peft_measures_the_same_loss(run: tuple[Path, dict[str, Any]]) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    folder, end = run
    model = PeftModel.from_pretrained(plain(BASE, quantized=True), folder / "adapter", autocast_adapter_dtype=False)
    total, count = 0.0, 0
    for ids, mask in evaluation_rows(AutoTokenizer.from_pretrained(folder / "adapter")):
        chosen = logprobs(model, ids)[:-1].gather(1, ids[0, 1:, None])[:, 0]
        total -= float(chosen[mask[0, 1:]].sum())
        count += int(mask[0, 1:].sum())
    print(f"plain peft {total / count:.6f}, ours {end['eval_loss']:.6f}")
    assert abs(total / count - end["eval_loss"]) < 1e-3


@pytest.mark.parametrize("merge_base", ["nf4", "full"])
def test_the_merged_model_is_the_trained_one(run: tuple[Path, dict[str, Any]], tmp_path: Path, merge_base: Any) -> None:
    from peft import PeftModel
    from transformers import AutoTokenizer

    folder, _ = run
    done = api.merge_and_export(
        folder, merge_base=merge_base, out=tmp_path / "out", options=ExportOptions(verify=False)
    )
    merged = plain(done.folder, quantized=False)
    trained = PeftModel.from_pretrained(plain(BASE, quantized=True), folder / "adapter", autocast_adapter_dtype=False)
    divergence, positions, clear, agreeing = 0.0, 0, 0, 0
    for ids, _ in evaluation_rows(AutoTokenizer.from_pretrained(tmp_path / "out")):
        p, q = logprobs(trained, ids), logprobs(merged, ids)
        divergence += float((p.exp() * (p - q)).sum())
        positions += ids.shape[1]
        top = p.topk(2, dim=-1)
        sure = top.values[:, 0] - top.values[:, 1] > 0.5
        clear += int(sure.sum())
        agreeing += int((q.argmax(-1) == top.indices[:, 0])[sure].sum())
    print(
        f"merged on {merge_base}: mean KL {divergence / positions:.2e} nats, {agreeing} of {clear} sure answers equal"
    )
    if merge_base == "nf4":
        assert divergence / positions <= 1e-3
        assert agreeing == clear


@pytest.fixture(scope="module")
def exported(run: tuple[Path, dict[str, Any]]) -> Any:
    """All formats in one call, as `qlora-export` does it."""
    pytest.importorskip("xllamacpp", reason="the runtime of the extra [gguf]")
    return api.merge_and_export(run[0], to=("hf", "gguf"), quants=("f16", "q8_0", "q4_k_m", "iq4_xs"))


def test_llama_cpp_answers_the_questions_as_the_trained_model_does(
    run: tuple[Path, dict[str, Any]], exported: Any
) -> None:
    from transformers import AutoTokenizer

    folder, end = run
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    lines = (ROOT / "recipes" / "quickstart" / "eval.jsonl").read_text().splitlines()
    rows = [json.loads(line)["messages"] for line in lines]
    prompts = [
        tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        for row in rows
    ]
    ends = (tokenizer.eos_token_id,)
    for quant, points in (("f16", 0.03), ("q8_0", 0.03), ("q4_k_m", 0.10)):
        file = next((folder / "export" / f"gguf-{quant}").glob("*.gguf"))
        answers = llama.greedy(file, prompts, ends)
        texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in answers]
        right = [same_answer(text, row[-1]["content"]) for text, row in zip(texts, rows, strict=True)]
        share = sum(right) / len(right)
        print(f"{quant}: {share:.1%} of {len(right)} answers, trained {end['exact_match_after']:.1%}")
        assert abs(share - end["exact_match_after"]) <= points + 1e-9


def test_the_table_of_the_quickstart(exported: Any) -> None:
    table = {line.name: line for line in exported.fidelity}
    for line in exported.fidelity:
        print(f"{line.name}: mean KL {line.kl:.2e}, perplexity {line.perplexity:.4f}, same token {line.top1:.1%}")
    assert exported.merge_base == "nf4"
    assert table["gguf-f16"].kl <= 1e-3 and table["hf"].kl <= 1e-3
    assert table["gguf-f16"].kl < table["gguf-q8_0"].kl < table["gguf-q4_k_m"].kl < 0.05


def test_the_rows_own_importance_weighs_the_errors_of_iq4_xs(
    run: tuple[Path, dict[str, Any]], exported: Any, tmp_path: Path
) -> None:
    """What it is asked for: errors, weighed by what the rows use, are smaller. KL of so small a model is not: rounded
    one way or the other it is 0.9e-3 to 1.3e-3 nats, with importance above or below.
    """
    from gguf import GGUFReader, dequantize

    options = ExportOptions(imatrix=True)
    place = {"merge_base": "nf4", "out": tmp_path / "out", "options": options}
    weighed = api.merge_and_export(run[0], to="gguf", quants=["iq4_xs"], **place)
    plainly, own = (next(e.kl for e in r.fidelity if e.name == "gguf-iq4_xs") for r in (exported, weighed))
    print(f"iq4_xs: mean KL {plainly:.2e} without, {own:.2e} with the importance matrix")
    assert own < 0.005

    def tensors(folder: Path) -> dict[str, Any]:
        (file,) = (file for file in folder.glob("*.gguf") if file.name != "imatrix.gguf")
        return {tensor.name: tensor for tensor in GGUFReader(file).tensors}

    export = run[0] / "export"
    true, plain, with_rows = (tensors(f) for f in (export / "gguf-f16", export / "gguf-iq4_xs", weighed.folder))
    sums = {tensor.name: tensor.data for tensor in GGUFReader(weighed.folder / "imatrix.gguf").tensors}
    errors = []
    for name, tensor in plain.items():
        if f"{name}.in_sum2" in sums and tensor.tensor_type == with_rows[name].tensor_type:
            right = dequantize(true[name].data, true[name].tensor_type)
            weights = sums[f"{name}.in_sum2"].reshape(-1)
            weighs = [
                float(((dequantize(one.data, one.tensor_type) - right) ** 2 @ weights).sum())
                for one in (tensor, with_rows[name])
            ]
            errors.append(weighs[1] / weighs[0])
    print(f"weighed errors of {len(errors)} tensors: {min(errors):.2f} to {max(errors):.2f} of those without")
    assert len(errors) > 10 and max(errors) < 1 and sum(errors) < 0.95 * len(errors)
