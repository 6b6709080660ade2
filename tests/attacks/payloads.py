"""What an attack is here: a small program, data to a loader, that would leave a marker file if any of it ran.

Each attack changes a good base, adapter, data file or recipe; nothing of it may leave the marker, and whoever is given
it gets an error in two lines.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

Attack = Callable[[Path, Path], None]  # (folder of the base, marker)


def shell(marker: Path) -> str:
    return f"touch {marker}"


class Exploit:
    """A pickle that runs a command when it is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (shell(self.marker),)


def exploit(marker: Path, protocol: int = 4) -> bytes:
    return pickle.dumps(Exploit(marker), protocol=protocol)


def torch_zip(marker: Path) -> bytes:
    """A file as torch.save writes it: a zip with a pickle in it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", exploit(marker, 2))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def torch_tar(marker: Path) -> bytes:
    """torch's oldest format."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name in ("storages", "tensors", "pickle"):
            info = tarfile.TarInfo(name)
            info.size = len(exploit(marker, 2))
            archive.addfile(info, io.BytesIO(exploit(marker, 2)))
    return buffer.getvalue()


def python_file(folder: Path, marker: Path, name: str) -> None:
    (folder / f"{name}.py").write_text(
        f"import os\nos.system({shell(marker)!r})\nclass Config: pass\nclass Model: pass\nclass Tokenizer: pass\n"
    )


def change(folder: Path, file: str, **keys: Any) -> None:
    path = folder / file
    values = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps(values | keys))


def only_weights(folder: Path, name: str, data: bytes) -> None:
    """`data` under `name` in the place of the weights."""
    for path in folder.glob("model*.safetensors*"):
        path.unlink()
    (folder / name).write_bytes(data)


def index(folder: Path, shard: Any, keys: int = 1) -> None:
    """A base of shards whose index names `shard`."""
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    weight_map = {f"model.layers.{i}.weight": shard for i in range(keys)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def raw_index(folder: Path, text: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(text)


def header(folder: Path, entries: Any, data_bytes: int = 64, length: int | None = None) -> None:
    """model.safetensors with this header and so many bytes of data."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    size = len(text) if length is None else length
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", size & (1 << 64) - 1) + text + bytes(data_bytes))


def tensor(dtype: str = "F32", shape: Any = (4, 4), offsets: Any = (0, 64)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def template(folder: Path, text: str) -> None:
    for name in ("chat_template.json", "chat_template.jinja"):
        (folder / name).unlink(missing_ok=True)
    (folder / "chat_template.jinja").write_text(text)


SECRETS = {
    "HF_TOKEN": "hf_ThisIsTheHubTokenOfATest0123",
    "WANDB_API_KEY": "0a1b2c3d4e5f60718293a4b5c6d7e8f901234567",
    "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery",
    "AWS_SECRET_ACCESS_KEY": "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "OPENAI_API_KEY": "sk-proj-abcdefghijklmnop0123",
}


def link_out(base: Path, name: str) -> None:
    secret = base.parent / "secret"
    secret.write_text("a secret of this machine")
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to(secret)


def not_a_number(base: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(base / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
