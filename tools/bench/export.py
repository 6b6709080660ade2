"""Times exports of a random model of a given shape against `cp` of the same bytes, and counts what they take.

    python tools/bench/export.py --folder DIR [--shape 8b|tiny] [--layers N] [--jobs hf-full,q8_0] [--name NAME]

The model (Llama 3.1 8B's shape: 16 GB) is made in DIR and removed at the end; beside it lies one copy or one export at
a time, so that 8B needs 33 GB. Each job is a `qlora-export`, begun with nothing of the model in the page cache,
and its time counts from its start to its end, imports and flushing to the disk included. `cp` is timed before each job;
beside it stands `cp` with a flush, since an export does not end before its bytes are on the disk. Counted are seconds
of processors (user and system), bytes that came from the disk and went to it, resident memory at its highest (files
that are mapped included) and anonymous memory (VmHWM and RssAnon, looked at every 50 ms), and the machine's load before
the job began. Verification is off. The figures go to tools/bench/results/export-<name>.json; by itself the name is the
shape's.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TOKENIZER = ROOT / "recipes" / "quickstart" / "base"
SAMPLE_SECONDS = 0.05
SPARE_BYTES = 1 << 30  # left on the disk beside the model and one copy of it
SHARD_BYTES = 5_000_000_000
RANK = 16

# Llama 3.1 8B (its config.json); tiny has all of its parts.
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}
JOBS = {
    "hf-full": "--to hf --base full",
    "hf-nf4": "--to hf --base nf4",
    "q8_0": "--to gguf --base full --quant q8_0",
    "q4_k_m": "--to gguf --base full --quant q4_k_m",
    "q8_0+q4_k_m": "--to gguf --base full --quant q8_0 --quant q4_k_m",
}


@dataclass(frozen=True)
class Measured:
    """One job. `over_cp` and `over_cp_flushed` are against the median of all copies of the model's bytes.

    `result_bytes` is the size of what was made; read and written is what the disk saw, of the job and its children.
    """

    job: str
    seconds: float
    processor_seconds: float
    peak_resident_mib: float
    peak_anonymous_mib: float
    read_bytes: int
    written_bytes: int
    result_bytes: int
    load_before: float
    over_cp: float = 0.0
    over_cp_flushed: float = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where the model lies meanwhile (twice its size)")
    parser.add_argument("--name", help="of the results file, by itself the shape's")
    parser.add_argument("--shape", choices=SHAPES, default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
    parser.add_argument("--jobs", default="hf-full,hf-nf4,q8_0,q4_k_m", help=f"of {', '.join(JOBS)}")
    chosen = parser.parse_args()
    shape = {**SHAPES[chosen.shape], **({"num_hidden_layers": chosen.layers} if chosen.layers else {})}
    work = Path(chosen.folder).resolve() / "export-bench"
    check_room(work, shape)
    work.mkdir(parents=True)
    try:
        make_model(work / "base", shape)
        make_adapter(work / "adapter", work / "base", shape)
        report(measure(work, chosen.jobs.split(",")), chosen.name or chosen.shape, shape)
    finally:
        shutil.rmtree(work)


def check_room(work: Path, shape: dict[str, Any]) -> None:
    place = next(folder for folder in (work, *work.parents) if folder.exists())
    needed, free = 2 * model_bytes(shape) + SPARE_BYTES, shutil.disk_usage(place).free
    if free < needed:
        raise SystemExit(f"{place}: {needed / 1e9:.0f} GB are needed, {free / 1e9:.0f} GB are free; fewer --layers?")


# --- the model --------------------------------------------------------------------------------------------------------


def tensor_shapes(shape: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, inner, vocab = shape["hidden_size"], shape["intermediate_size"], shape["vocab_size"]
    small = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    layer = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, inner),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (small, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.v_proj": (small, hidden),
    }
    shapes = {"model.embed_tokens.weight": (vocab, hidden)}
    for number in range(shape["num_hidden_layers"]):
        shapes |= {f"model.layers.{number}.{name}.weight": size for name, size in layer.items()}
    return {**shapes, "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}


def model_bytes(shape: dict[str, Any]) -> int:
    return sum(2 * math.prod(size) for size in tensor_shapes(shape).values())


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    """Shards of a random block of bf16, repeated: written as fast as the disk takes it."""
    import torch

    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 24, generator=generator) * 0.02).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    for name, size in tensor_shapes(shape).items():
        if sum(2 * torch.Size(other).numel() for other in groups[-1].values()) > SHARD_BYTES:
            groups.append({})
        groups[-1][name] = size
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        weight_map |= dict.fromkeys(group, file)
        write_shard(folder / file, group, block)
    index = {"metadata": {"total_size": model_bytes(shape)}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    given = json.loads((TOKENIZER / "config.json").read_text())
    config = {**given, **shape, "head_dim": shape["hidden_size"] // shape["num_attention_heads"]}
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]], block: bytes) -> None:
    import torch

    header: dict[str, Any] = {}
    end = 0
    for name, size in shapes.items():
        start, end = end, end + 2 * torch.Size(size).numel()
        header[name] = {"dtype": "BF16", "shape": list(size), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= file.write(memoryview(block)[: min(end, len(block))])
        file.flush()
        os.fsync(file.fileno())


def make_adapter(folder: Path, base: Path, shape: dict[str, Any]) -> None:
    """A random adapter of rank 16 on every linear layer, in PEFT's layout."""
    import torch
    from safetensors.torch import save_file

    folder.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, size in tensor_shapes(shape).items():
        if name.endswith("_proj.weight"):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            for part, dims in (("lora_A", (RANK, size[1])), ("lora_B", (size[0], RANK))):
                tensors[f"{module}.{part}.weight"] = (torch.randn(dims, generator=generator) * 0.02).bfloat16()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


# --- the jobs ---------------------------------------------------------------------------------------------------------


def measure(work: Path, jobs: list[str]) -> list[Measured]:
    """Each job after a copy, so that a disk that changes its pace meets both."""
    done: list[Measured] = []
    copies: list[tuple[Measured, float]] = []
    for job in jobs:
        copies.append(timed_copy(work))
        forget(work)
        done.append(watched(job, export_command(work, job), work / "out"))
        plain, flushed = copies[-1][0].seconds, copies[-1][1]
        print(f"{job}: {done[-1].seconds:.1f} s, cp {plain:.1f} s, flushed {flushed:.1f} s", file=sys.stderr)
    plain, flushed = statistics.median(one.seconds for one, _ in copies), statistics.median(one for _, one in copies)
    rows = [copies[0][0], replace(copies[0][0], job="cp, flushed", seconds=flushed), *done]
    rows[0] = replace(rows[0], seconds=plain)
    return [replace(one, over_cp=one.seconds / plain, over_cp_flushed=one.seconds / flushed) for one in rows]


def export_command(work: Path, job: str) -> list[str]:
    """The export itself, as it is typed."""
    command = [sys.executable, "-m", "qlora.cli.export", str(work / "adapter"), "--out", str(work / "out")]
    return [*command, *JOBS[job].split(), "--no-verify", "--json"]


def timed_copy(work: Path) -> tuple[Measured, float]:
    """`cp` of the model, and its seconds with its bytes flushed to the disk."""
    forget(work)
    target, began = work / "copy", time.perf_counter()
    command = ["cp", "-r", "--reflink=never", str(work / "base"), str(target)]

    def flush() -> float:
        for path in target.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        return time.perf_counter() - began

    flushed: list[float] = []
    copied = watched("cp", command, target, lambda: flushed.append(flush()))
    return copied, flushed[0]


def forget(folder: Path) -> None:
    """Take a folder's files out of the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watched(job: str, command: list[str], made: Path, at_the_end: Callable[[], object] = lambda: None) -> Measured:
    """A command and what it took. What it `made` is weighed and removed, after `at_the_end`."""
    load, began, peak_kib = os.getloadavg()[0], time.perf_counter(), (0, 0)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    while True:
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
        if ended:
            break
        resident, anonymous = memory_kib(process.pid)
        peak_kib = max(peak_kib[0], resident), max(peak_kib[1], anonymous)
        time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit {process.returncode}")
    at_the_end()
    size = sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
    shutil.rmtree(made)
    return Measured(
        job,
        seconds,
        processor_seconds=used.ru_utime + used.ru_stime,
        peak_resident_mib=peak_kib[0] / 1024,
        peak_anonymous_mib=peak_kib[1] / 1024,
        read_bytes=used.ru_inblock * 512,  # in blocks of 512 bytes: getrusage(2) on Linux
        written_bytes=used.ru_oublock * 512,
        result_bytes=size,
        load_before=load,
    )


def memory_kib(pid: int) -> tuple[int, int]:
    """Of a process that runs: the most that was resident, and what is anonymous now."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    found = {line.partition(":")[0]: line.split()[1] for line in lines if line.endswith(" kB")}
    return int(found.get("VmHWM", 0)), int(found.get("RssAnon", 0))


# --- the figures ------------------------------------------------------------------------------------------------------


def report(measured: list[Measured], name: str, shape: dict[str, Any]) -> None:
    print(f"{'job':14} {'seconds':>8} {'x cp':>6} {'flushed':>8} {'processor s':>12} ", end="")
    print(f"{'RSS MiB':>8} {'anon':>6} {'GB read':>8} {'written':>8} {'made':>6} {'load':>5}")
    for m in measured:
        line = f"{m.job:14} {m.seconds:8.1f} {m.over_cp:6.2f} {m.over_cp_flushed:8.2f} {m.processor_seconds:12.1f} "
        line += f"{m.peak_resident_mib:8.0f} {m.peak_anonymous_mib:6.0f} {m.read_bytes / 1e9:8.2f} "
        print(f"{line}{m.written_bytes / 1e9:8.2f} {m.result_bytes / 1e9:6.2f} {m.load_before:5.1f}")
    result = {
        "command": "python " + " ".join(["tools/bench/export.py", *without_folder(sys.argv[1:])]),
        "commit": git_commit(),
        "hardware": hardware(),
        "versions": {package: installed(package) for package in ("torch", "transformers", "bitsandbytes", "numpy")},
        "threads": os.environ.get("OMP_NUM_THREADS", "all"),
        "shape": shape,
        "jobs": [asdict(m) for m in measured],
    }
    file = Path(__file__).with_name("results") / f"export-{name}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n")


def without_folder(words: list[str]) -> list[str]:
    at = words.index("--folder") if "--folder" in words else len(words)
    return [*words[:at], *words[at + 2 :], "--folder", "DIR"]


def hardware() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    return {
        "cpu": next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine()),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.split()[1]) / 2**20, 1),
    }


def git_commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
