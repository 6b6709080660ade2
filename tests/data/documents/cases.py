"""Documents that several tests read: a handbook with everything in it, and how a recipe's source is read."""

from __future__ import annotations

import importlib.util
import io
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from qlora.data.documents.blocks import Block
from qlora.data.documents.document import Documents
from qlora.data.documents.read import read_documents
from qlora.events import Notice, Recorder

ROOT = Path(__file__).parents[3]

HANDBOOK = """\
# Handbuch der Wärmepumpen

Dieses Handbuch beschreibt die Wärmepumpen der Tarvell GmbH, die in Göteborg gebaut und seit dem 3. Mai 1987 in ganz
Europa ausgeliefert werden. Ungefähr 4.500 Anlagen wurden bisher dokumentiert, darunter auch außergewöhnliche Modelle
mit Übergrößen. Die Geschäftsführung bittet alle Händlerinnen und Händler, Änderungen unverzüglich mitzuteilen.

## Fehlercodes

When something happens, the display shows a code. "Quotation marks", an ampersand & a less-than sign < are text.

| Code | Bedeutung | Abhilfe |
| --- | --- | --- |
| E41 | kein Wasser im Kreislauf | Ventil öffnen |
| E42 | Fühler der Außentemperatur gebrochen | Fühler der Außentemperatur ersetzen |
| E43 | Druck zu hoch | Überdruckventil prüfen |

### Nach einem Fehler

1. Close the valve and wait for 3.5 minutes.
2. Open the valve again; the well-known hissing stops.

- Never use force.
  - Not even a little of it.
- Tell the manufacturer about everything extraordinary that happened.

## Preise

The TX-200 costs € 4,990.00 and includes a warranty of seven years. Installation, transportation and documentation are
not included; representatives throughout the Netherlands communicate their own conditions.

Ende des Handbuchs.
"""


@dataclass(frozen=True)
class Source:
    """A `[[data.documents]]` table."""

    path: str
    about: str = "heat pumps"
    language: str = "auto"


def read(*paths: Path | str) -> tuple[Documents, list[Notice]]:
    """The documents of these paths, and what was said of them."""
    heard = Recorder()
    documents = read_documents([Source(str(path)) for path in paths], heard)
    return documents, [event for event in heard.events if isinstance(event, Notice)]


def words_of(blocks: Sequence[Block]) -> list[str]:
    return [word for block in blocks for word in block.words()]


def writer() -> ModuleType:
    """tools/write_documents.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("write_documents", ROOT / "tools" / "write_documents.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def written(ending: str, text: str = HANDBOOK) -> bytes:
    """A Markdown text as a file of that kind."""
    from qlora.data.documents.markdown import markdown_blocks

    blocks = markdown_blocks(text)
    made = writer().WRITERS[ending](blocks, blocks[0].text)
    assert isinstance(made, bytes)
    return made


def with_members(data: bytes, **members: bytes) -> bytes:
    """The archive with these files put in, or in place of those of the same name."""
    old, out = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    named = {name.replace("__", "/").replace("_", "."): content for name, content in members.items()}
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in old.namelist():
            archive.writestr(name, named.pop(name, None) or old.read(name))
        for name, content in named.items():
            archive.writestr(name, content)
    return out.getvalue()
