"""What a push must not carry: paths, names, addresses and tokens of whoever sends it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qlora.errors import ExportError
from qlora.events import Notice, Recorder
from tests.push_hub import MAIL, TOKEN, USER, PushHub, an_export, push, push_hub

__all__ = ["push_hub"]


def test_no_path_name_address_or_token_is_in_anything_that_arrives(
    tmp_path: Path, push_hub: PushHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home" / "maria_owner_7"
    work = home / "work"
    for name, value in {"HOME": str(home), "USER": "maria_owner_7", "HOSTNAME": "anvil-of-maria"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef-wandb")
    home.mkdir(parents=True)
    (home / ".gitconfig").write_text('[user]\n  name = Maria\n  email = "maria@git.example.net"\n')
    said = {
        "format": "hf", "tensors": 2, "merged": 1, "merge_base": "nf4", "checks": [{"name": "w", "ok": True}],
        "base": f"{work}/bases/llama", "evaluation": {"rows": f"{work}/rows of mine/rows.jsonl", "by": "maria_owner_7"},
        "note": "/mnt/disk7/maria/elsewhere/rows.jsonl",
    }  # fmt: skip
    card = f"""---
tags: [qlora]
---

# On {work}/runs/support and file://{home}/x/notes.md

Asked by maria_owner_7 on anvil-of-maria <maria@private.example.com>, key 0123456789abcdef-wandb, {TOKEN}.
C:\\Users\\maria_owner_7\\data.jsonl, ~/secret/rows.jsonl and https://huggingface.co/owner/base stay apart.
"""
    folder = an_export(
        work / "runs" / "hf", revision=None, README__md=card.encode(), export__json=json.dumps(said).encode(),
        Modelfile=f'FROM ./x.gguf\nSYSTEM """Write to maria@private.example.com, files in {work}/a.txt"""\n'.encode(),
    )  # fmt: skip
    sink = Recorder()
    push(folder, sink=sink)
    arrived = push_hub.everything()
    for text in ("maria_owner_7", "anvil-of", "maria@", "0123456789abcdef-wandb", TOKEN, MAIL, str(tmp_path), "disk7"):
        assert text.encode() not in arrived, text
    assert b"https://huggingface.co/owner/base" in arrived and b"FROM ./x.gguf" in arrived
    files = push_hub.repos[f"{USER}/support"].files
    sent = json.loads(files["export.json"])
    assert (sent["base"], sent["evaluation"]["rows"], sent["note"]) == ("llama", "rows.jsonl", "rows.jsonl")
    assert b"base_model" not in files["README.md"]  # type: ignore[operator]
    notice = next(one for one in sink.events if isinstance(one, Notice) and "left out of what is sent" in one.message)
    assert notice.message.startswith("Modelfile, README.md, export.json: ") and (notice.count or 0) >= 6
    agents = {head["user-agent"] for _, _, head, _ in push_hub.received}
    assert len(agents) == 1 and agents.pop().startswith("qlora/")
    for file, data in {
        "config__json": json.dumps({"_name_or_path": f"{work}/base"}).encode(),
        "chat_template__jinja": b"{# by maria@git.example.net #}",
        "tokenizer__json": json.dumps({"x": str(home)}).encode(),
        "big__gguf": bytes(100_000) + str(work).encode() + bytes(5_000_000),
        "notes__md": b"see /home/somebody/x",
        "LICENSE": TOKEN.encode(),
    }.items():
        name, count = file.replace("__", "."), len(push_hub.received)
        odd = an_export(work / f"odd-{name}", revision=None, **{file: data})
        with pytest.raises(ExportError, match=rf"{name}: holds .* (in line|at byte) [0-9].*is not pushed"):
            push(odd)
        assert all(method == "GET" or "/preupload/" in path for method, path, _, _ in push_hub.received[count:])
