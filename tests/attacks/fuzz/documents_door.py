"""Documents from a stranger: files of every kind changed at random, named by file, folder and pattern, read as a run
reads them, cut into passages and put into prompts."""

from __future__ import annotations

import io
import os
import zipfile
from functools import cache
from random import Random
from typing import Any

from tests.attacks.fuzz import goods, nasty
from tests.attacks.fuzz.harness import Door, Scene
from tests.attacks.fuzz.seen import Work

ENDINGS = ("md", "html", "txt", "pdf", "docx", "epub")
NAMES = ("manual", "ma\x1b[2Jnual", "m [1]", "-m", "m\nn", "%s", "x" * 200, "\u202em")
SIGNS = ("<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", "<think>", "{passage}", "Q: ", "\0", "\u2028")


@cache
def good(ending: str) -> bytes:
    """The handbook that other tests read as well, in one kind of file."""
    from tests.data.documents.cases import written

    return written("md" if ending == "txt" else ending)


def content(ending: str, chance: Random) -> bytes:
    """A good file; or one with words of a stranger, with changed bytes, with another file's, or with an odd part."""
    data, kind = good(ending), chance.random()
    if kind < 0.2 and ending in ("md", "html", "txt"):
        words = chance.choice((*nasty.TEXTS, *SIGNS)) * chance.choice((1, 1, 50, 2_000))
        place = chance.randrange(len(data))
        return data[:place] + words[:400_000].encode("utf-8", "surrogatepass") + data[place:]
    if kind < 0.7:
        changed = bytearray(data)
        for _ in range(chance.choice((1, 3, 30, 300))):
            place = chance.randrange(len(changed))
            changed[place : place + chance.choice((0, 1, 1, 40))] = chance.randbytes(chance.choice((1, 1, 8)))
        return bytes(changed)
    if kind < 0.8:
        return good(chance.choice(ENDINGS))
    if ending in ("docx", "epub"):
        return repacked(data, chance)
    return data[: chance.randrange(len(data))]


def repacked(data: bytes, chance: Random) -> bytes:
    """An archive with a part that is gone, doubled, renamed, replaced or much too large."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        names = old.namelist()
        odd = chance.choice(names)
        for name in names:
            part = old.read(name)
            how = chance.choice(("gone", "twice", "renamed", "large", "scratched", "swapped")) if name == odd else ""
            if how == "gone":
                continue
            if how == "large":
                part += b" " * chance.choice((3 << 20, 60 << 20))
            elif how == "scratched":
                part = nasty.scratched(part, chance)
            elif how == "swapped":
                part = old.read(chance.choice(names))
            new.writestr(chance.choice(("../../x", "/etc/x", "x.php")) if how == "renamed" else name, part)
            if how == "twice":
                new.writestr(f"{name}x", part)
    return out.getvalue()


def make(scene: Scene) -> Work:
    chance = scene.chance
    folder = scene.place / "manuals"
    folder.mkdir()
    ending = chance.choice(ENDINGS)
    name = "manual" if chance.random() < 0.8 else chance.choice(NAMES)
    file = folder / f"{name}.{ending}"
    file.write_bytes(content(ending, chance))
    kind, path = chance.random(), str(file)
    if kind < 0.1:
        nasty.entry(file, chance.choice(nasty.ENTRIES), scene.bystander, huge_bytes=300 << 20)
    elif kind < 0.3:
        (folder / "good.md").write_bytes(good("md"))
        if chance.random() < 0.3:
            (folder / "a").symlink_to(chance.choice((".", "..", "/", str(scene.bystander.parent))))
        path = chance.choice((str(folder), str(folder / "*"), str(folder / "**" / "*.md"), str(folder / "[")))
    keys: dict[str, Any] = {"path": path}
    if chance.random() < 0.2:
        keys["about"] = chance.choice((*SIGNS[:4], "pumps", "\x1b[2J")).replace("\0", "")
    return lambda: use(scene, keys)


def use(scene: Scene, keys: dict[str, Any]) -> None:
    """What a run does with documents before its base is loaded, and the prompts that it would ask."""
    from qlora.recipe.reading import Recipe
    from qlora.study import material
    from qlora.study.lesson import Lesson
    from qlora.study.prompts import FRAMES, prompt_ids, prompts_for

    sink = goods.sink()
    tables = {"model": {"base": str(scene.goods.base)}, "data": {"documents": [keys]}, "study": {"labels": "hard"}}
    recipe, found = material.read(Recipe.model_validate(tables), True, sink)
    assert found is not None
    chat = goods.chat_of(scene.goods.base, os.getpid())
    lesson = Lesson.of(found, recipe, chat, sink)
    control = {number for number, token in chat.tokenizer.added_tokens_decoder.items() if token.special}
    for frame in FRAMES:
        usual = [token for token in prompt_ids(chat, frame, "a") if token in control]
        for passage in lesson.passages[:3]:
            ids = prompt_ids(chat, frame, prompts_for(passage.language).answer(frame, passage, "What?"))
            assert [token for token in ids if token in control] == usual, "a document steers the model"
    sink.close()


# Each input starts a process that reads it: a third of what is asked for says as much as it costs.
DOOR = Door("documents", make, every=3)
