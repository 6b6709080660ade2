"""In a process of its own: the stages that its command line names, on the device that a command would choose."""

from __future__ import annotations

import sys

from qlora import third_party
from qlora.cli import cards
from qlora.doctor import stages
from qlora.events import Recorder


def main() -> None:
    third_party.no_word_to_developers()
    third_party.draw_no_bars()
    third_party.let_waiting_threads_sleep()
    stages.serve(sys.argv[1:], _settle)


def _settle() -> list[str]:
    """Choose the card as every command does, and say what was chosen. Raises HardwareError."""
    recorder = Recorder()
    cards.settle(recorder)
    return [str(event.as_dict()["message"]) for event in recorder.of("notice")]


if __name__ == "__main__":
    main()
