"""Preparation of rows: rows a second, processor seconds and peak memory, ours and TRL's in turns.

    python -m venv /tmp/trl && /tmp/trl/bin/pip install trl
    python tools/bench/data.py --tokenizer FOLDER --rows 20000 --repeats 3 --trl-python /tmp/trl/bin/python
    python tools/bench/data.py --tokenizer FOLDER --rows 1000000 --short          # memory alone, no TRL
    python tools/bench/data.py --tokenizer FOLDER --packing FILE …  # how full real packs are
    python tools/bench/data.py --tokenizer FOLDER --same-as OTHER_CLONE FILE …  # whether both make the same rows

Both sides read the same .jsonl of chats and end with packs of 2,048 tokens: ours through `prepare` and the packs of an
epoch, TRL's through `load_dataset` and the constructor of SFTTrainer with `packing`. TRL trains every token by default;
--assistant-only has it mask all but the answers, as ours does, and gives both a template with the marks that it needs.
What importing takes is not counted. Processor time and memory are those of the process and of all below it, looked at
ten times a second; memory is the sum of resident sizes, which counts pages that are shared once for each.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
MAX_LENGTH = 2048
LOOK_SECONDS = 0.1  # looking at ten processes takes a hundredth of a second itself
BEGIN, END = "begin", "end"
MARKED = (
    "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\n' }}"
    "{%- if message['role'] == 'assistant' %}"
    "{% generation %}{{- message['content'] + '<|im_end|>' }}{% endgeneration %}{{- '\n' }}{%- else %}"
    "{{- message['content'] + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


def chats(count: int, short: bool) -> Iterator[dict[str, Any]]:
    """Chats of one to four turns, of lengths as usual sets have (log-normal); `short`: one turn of a few words."""
    draw = random.Random(0)
    syllables = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "an", "er", "ing", "ou", "st")]
    words = ["".join(draw.choices(syllables, k=draw.choice((1, 2, 2, 3)))) for _ in range(20_000)]
    weights = [1 / (rank + 3) for rank in range(len(words))]
    text = draw.choices(words, weights, k=500_000)

    def say(mean: float) -> str:
        length = max(3, min(2000, int(draw.lognormvariate(0, 0.7) * mean)))
        at = draw.randrange(len(text) - length)
        return " ".join(text[at : at + length]).capitalize() + "."

    for _ in range(count):
        talk = [] if short or draw.random() < 0.7 else [{"role": "system", "content": say(12)}]
        for _ in range(1 if short else draw.choice((1, 1, 1, 2, 2, 3, 4))):
            talk.append({"role": "user", "content": say(4 if short else 16)})
            talk.append({"role": "assistant", "content": say(6 if short else 38)})
        yield {"messages": talk}


# --- the two sides, each in a process of its own --------------------------------------------------------------------


def ours(rows: str, tokenizer_folder: str, template: str) -> dict[str, Any]:
    sys.path.insert(0, str(ROOT))
    import datasets
    from transformers import AutoTokenizer

    from qlora.data.chat import ChatTokenizer
    from qlora.data.loader import TrainOrder
    from qlora.data.prepare import prepare
    from qlora.events import Sinks
    from qlora.recipe.sections import DataSection, SourceSection

    data = DataSection(train=(SourceSection(path=rows),), eval_fraction=0.0, max_length=MAX_LENGTH)
    with tempfile.TemporaryDirectory() as scratch:
        tell(BEGIN)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        tokenizer.chat_template = template or tokenizer.chat_template
        prepared = prepare(data, "-", ChatTokenizer(tokenizer, "assistant", Sinks()), 0, Path(scratch), Sinks())
        packs = TrainOrder(prepared.train, data, 0, 1).epoch_packs(0)
        tell(END)
    return {"packs": len(packs), "tokens": sum(prepared.train.lengths), "with": f"datasets {datasets.__version__}"}


def trls(rows: str, tokenizer_folder: str, template: str) -> dict[str, Any]:
    import trl
    from datasets import load_dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory() as scratch:
        settings = trl.SFTConfig(
            output_dir=scratch,
            packing=True,
            max_length=MAX_LENGTH,
            assistant_only_loss=bool(template),
            report_to=[],
            use_cpu=True,
            bf16=False,
        )
        sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        tell(BEGIN)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        tokenizer.chat_template = template or tokenizer.chat_template
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=1, **sizes))
        loaded = load_dataset("json", data_files=rows, split="train", cache_dir=scratch)
        trainer = trl.SFTTrainer(model=model, args=settings, train_dataset=loaded, processing_class=tokenizer)
        tell(END)
        tokens = sum(map(sum, trainer.train_dataset["seq_lengths"]))
        return {"packs": len(trainer.train_dataset), "tokens": tokens, "with": f"trl {trl.__version__}"}


def same(rows: str, tokenizer_folder: str, template: str) -> dict[str, Any]:
    """What a clone (BENCH_CLONE) makes of a file: a hash of all rows as they are stored, and what it says."""
    sys.path.insert(0, os.environ["BENCH_CLONE"])
    from transformers import AutoTokenizer

    from qlora.data import prepare as module
    from qlora.data.chat import ChatTokenizer
    from qlora.events import Notice, Recorder
    from qlora.recipe.sections import DataSection, SourceSection

    assert Path(str(module.__file__)).is_relative_to(os.environ["BENCH_CLONE"])
    data = DataSection(train=(SourceSection(path=rows),), max_length=MAX_LENGTH, max_bad_rows=10_000)
    tokenizer, sink = AutoTokenizer.from_pretrained(tokenizer_folder), Recorder()
    content = hashlib.sha256()
    with tempfile.TemporaryDirectory() as scratch:
        made = module.prepare(data, "-", ChatTokenizer(tokenizer, "assistant", sink), 0, Path(scratch), sink)
        for split in (made.train, made.eval):
            for row, where, source, prompt in zip(split.rows, split.wheres, split.sources, split.prompts, strict=True):
                content.update(repr((row.input_ids, row.loss_weights, where, source, prompt)).encode())
    said = [[event.topic, event.message, event.count] for event in sink.events if isinstance(event, Notice)]
    return {"rows": content.hexdigest(), "fingerprint": made.fingerprint, "said": said}


SIDES: dict[str, Callable[[str, str, str], dict[str, Any]]] = {"ours": ours, "trl": trls, "same": same}


def tell(text: str) -> None:
    print(f"\n{text}", flush=True)


# --- measuring --------------------------------------------------------------------------------------------------------


class Watch:
    """Processor seconds and resident bytes of a process and of all below it."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._root = psutil.Process(pid)
        self._seconds: dict[tuple[int, float], float] = {}
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def look(self) -> float:
        """Processor seconds so far, those of processes that have ended among them."""
        import psutil

        resident = 0
        try:
            family = [self._root, *self._root.children(recursive=True)]
        except psutil.Error:
            family = []
        for process in family:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    self._seconds[process.pid, process.create_time()] = times.user + times.system
                    resident += process.memory_info().rss
            except psutil.Error:
                continue
        self.peak_bytes = max(self.peak_bytes, resident)
        return sum(self._seconds.values())

    def _run(self) -> None:
        while not self._ended.wait(LOOK_SECONDS):
            self.look()

    def end(self) -> None:
        self._ended.set()
        self._thread.join()


def measured(side: str, python: str, rows: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [python, __file__, "--side", side, "--tokenizer", options.tokenizer, str(rows)]
    command += ["--assistant-only"] if options.assistant_only else []
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_CACHE": str(rows.parent / "hub"),
    }
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    watch, began, clock, result = Watch(process.pid), 0.0, 0.0, None
    found: dict[str, Any] = {"side": side, "load": os.getloadavg()[0]}
    for line in process.stdout:
        if line.strip() == BEGIN:
            began, clock, watch.peak_bytes = watch.look(), time.perf_counter(), 0
        elif line.strip() == END:
            found |= {"seconds": time.perf_counter() - clock, "cpu_seconds": watch.look() - began}
            found["peak_mib"] = round(watch.peak_bytes / (1 << 20))
        elif line.startswith("{"):
            result = json.loads(line)
    watch.end()
    if process.wait() or result is None:
        raise SystemExit(f"{side}: it ended with code {process.returncode}")
    full = result["tokens"] / (result["packs"] * MAX_LENGTH)
    return {**found, **result, "full": full, "rows_per_second": options.rows / found["seconds"]}


def packing_of(paths: Sequence[str], tokenizer_folder: str) -> Iterator[dict[str, Any]]:
    """How full packs of the rows of files are, as they are and mixed."""
    sys.path.insert(0, str(ROOT))
    from transformers import AutoTokenizer

    from qlora.data.chat import ChatTokenizer
    from qlora.data.packing import pack
    from qlora.data.prepare import prepare
    from qlora.events import Sinks
    from qlora.recipe.sections import DataSection, SourceSection

    chat = ChatTokenizer(AutoTokenizer.from_pretrained(tokenizer_folder), "assistant", Sinks())
    for files in (*([path] for path in paths), list(paths)):
        sources = tuple(SourceSection(path=str(Path(path).resolve())) for path in files)
        data = DataSection(train=sources, eval_fraction=0.0, max_length=MAX_LENGTH, max_bad_rows=10_000)
        with tempfile.TemporaryDirectory() as scratch:
            lengths = prepare(data, "-", chat, 0, Path(scratch), Sinks()).train.lengths
        for repeats in (1, 1_000_000 // len(lengths)):
            many = [*lengths] * repeats
            began = time.process_time()
            packs = pack(many, MAX_LENGTH)
            full = sum(many) / (len(packs) * MAX_LENGTH)
            seconds = time.process_time() - began
            names = [Path(path).name for path in files]
            yield {"files": names, "rows": len(many), "full": full, "cpu_seconds": seconds}


def same_rows(clone: Path, paths: Sequence[str], tokenizer_folder: str) -> None:
    """Ends with 1 at the first file of which the other clone makes other rows, or says something else."""
    for path in paths:
        made = []
        for tree in (ROOT, clone.resolve()):
            command = [sys.executable, __file__, "--side", "same", "--tokenizer", tokenizer_folder, path]
            environment = {**os.environ, "BENCH_CLONE": str(tree), "PYTHONPATH": str(tree)}
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            made.append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(f"{'the same' if made[0] == made[1] else 'DIFFERENT'}  {made[0]['said'][-1][1]}  {path}", flush=True)
        if made[0] != made[1]:
            raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="folder of a base's tokenizer")
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--short", action="store_true", help="rows of one short turn")
    parser.add_argument("--assistant-only", action="store_true", help="TRL masks all but the answers too")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--trl-python", help="of an environment that has trl; without it only ours is measured")
    parser.add_argument("--packing", nargs="+", metavar="FILE", help="files of rows to pack")
    parser.add_argument("--same-as", type=Path, metavar="CLONE", help="another clone of this repository")
    parser.add_argument("--out", type=Path, help="a .json file for the figures")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("files", nargs="*", help="of rows, for --same-as")
    options = parser.parse_args()
    if options.side:
        made = SIDES[options.side](options.files[0], options.tokenizer, MARKED if options.assistant_only else "")
        print(json.dumps(made), flush=True)
        return
    if options.same_as:
        same_rows(options.same_as, options.files, options.tokenizer)
        return
    figures = list(packing_of(options.packing, options.tokenizer) if options.packing else compared(options))
    if options.out:
        machine = {"cores": os.cpu_count(), "python": sys.version.split()[0], "settings": vars(options) | {"out": ""}}
        options.out.write_text(json.dumps({"machine": machine, "figures": figures}, indent=1) + "\n")
    if options.packing:
        for one in figures:
            names = ", ".join(one["files"])
            print(f"{one['rows']:>9,} rows  {one['full']:7.2%} full  {one['cpu_seconds']:6.2f} s  {names}")


def compared(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Runs of both sides in turns, each printed as it ends; and the ratio of the medians."""
    pythons = {"ours": sys.executable} | ({"trl": options.trl_python} if options.trl_python else {})
    figures = []
    print("side      rows/s  seconds  cpu s  peak MiB    full  packs    load  with", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch) / "rows.jsonl"
        with rows.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in chats(options.rows, options.short))
        for _ in range(options.repeats):
            for side, python in pythons.items():
                one = measured(side, python, rows, options)
                figures.append(one)
                print(
                    f"{side:<5} {one['rows_per_second']:>10,.0f} {one['seconds']:>8.1f} {one['cpu_seconds']:>6.1f} "
                    f"{one['peak_mib']:>9} {one['full']:>7.2%} {one['packs']:>6} {one['load']:>7.1f}  {one['with']}",
                    flush=True,
                )
    if len(pythons) > 1:
        speed = {side: median(one["rows_per_second"] for one in figures if one["side"] == side) for side in pythons}
        cost = {side: median(one["cpu_seconds"] for one in figures if one["side"] == side) for side in pythons}
        print(
            f"ours / TRL: {speed['ours'] / speed['trl']:.2f} x rows/s, {cost['ours'] / cost['trl']:.2f} x cpu seconds"
        )
    return figures


if __name__ == "__main__":
    main()
