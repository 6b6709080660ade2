"""`qlora-chat RUN_OR_MODEL`: ask a model, by hand, from a script, or through OpenAI's protocol."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlora.cli import common

if TYPE_CHECKING:
    from qlora.ask.opened import HowToOpen, Named
    from qlora.ask.settings import Sampling
    from qlora.stop import StopRequest

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(cls=common.Command)
def chat(
    model: Annotated[
        str,
        typer.Argument(
            metavar="RUN_OR_MODEL",
            help="A run, an adapter's folder, a model's folder, a GGUF file, or hub:owner/name.",
        ),
    ],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Ask this, print the answer and end."),
    ] = None,
    system: Annotated[str, typer.Option("--system", metavar="TEXT", help="A system prompt.")] = "",
    compare: Annotated[bool, typer.Option("--compare", help="Ask the base as well, and show both.")] = False,
    serve: Annotated[
        int | None,
        typer.Option("--serve", metavar="PORT", help="Serve OpenAI's chat protocol on 127.0.0.1 (0: any free port)."),
    ] = None,
    context: Annotated[
        int, typer.Option("--context", metavar="TOKENS", help="Tokens of a conversation, at most the model's own.")
    ] = 8192,
    nf4: Annotated[bool, typer.Option("--nf4", help="Hold a 16-bit model's linear layers in 4 bit.")] = False,
    base_model: Annotated[
        str | None,
        typer.Option("--base-model", metavar="NAME", help="Where an adapter's base lies, if it was moved."),
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="0 takes the likeliest token [0.7].")
    ] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", help="Share of the probability drawn from [0.95].")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", help="Tokens drawn from, 0 for all [0].")] = None,
    min_p: Annotated[float | None, typer.Option("--min-p", help="Least share of the likeliest one's [0].")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", help="Above 1 against repetition [1].")
    ] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="Of an answer [1024].")] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same answers again.")] = None,
) -> None:
    """Talk with a model as it was trained: template, end tokens, and the base in 4 bit under its adapter.

    In a terminal a conversation begins, and /help shows its commands. With --prompt, or a question piped in, the answer
    alone is printed on stdout, and all else on stderr.
    """

    def work() -> None:
        from qlora.ask.opened import HowToOpen, named
        from qlora.ask.settings import Sampling, changed
        from qlora.cli.conversation import as_utf8

        sampling = changed(
            Sampling(),
            temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p,
            repetition_penalty=repetition_penalty, max_tokens=max_tokens, seed=seed,
        )  # fmt: skip
        _check(prompt, compare, serve, context)
        source, said = named(model), as_utf8(system)
        how = HowToOpen(base_model, nf4, context)
        if serve is not None:
            _serve(source, how, sampling, (serve, said))
        else:
            _talk(source, how, sampling, (prompt, said, compare))

    common.run(work)


def _check(prompt: str | None, compare: bool, serve: int | None, context: int) -> None:
    """What can be seen before anything is opened. Raises UserError."""
    from qlora.errors import UserError

    if serve is not None and (prompt is not None or compare):
        raise UserError(f"--serve and {'--compare' if compare else '--prompt'} do not go together", "leave one out")
    if serve is not None and not 0 <= serve <= 65535:
        raise UserError(f"--serve {serve} is no port", "name one from 1024 to 65535, or 0 for any free one")
    if not 16 <= context <= 10_000_000:
        raise UserError(f"--context is {context}", "it lies between 16 and 10,000,000 tokens")


def _talk(source: Named, how: HowToOpen, sampling: Sampling, asked: tuple[str | None, str, bool]) -> None:
    """A conversation in the terminal, or one answer for a script."""
    from qlora.errors import ExportError, StoppedBySignal
    from qlora.events import Sinks
    from qlora.report.console import ConsoleSink, Terminal
    from qlora.stop import StopRequest

    prompt, system, compare = asked
    if compare and source.kind != "adapter":
        what = f"{source.place}: is a whole model, and its base cannot be asked beside it"
        raise ExportError(what, "name a run or an adapter's folder, or leave --compare out")
    by_hand = prompt is None and sys.stdin.isatty()
    question = "" if by_hand else _question(prompt)
    stop = StopRequest()
    screen = common.Screen(ConsoleSink(Terminal() if by_hand and sys.stdout.isatty() else _errors()), stop)
    with common.Signals(stop, screen):
        try:
            from qlora.ask.opened import open_model, refuse_without_template
            from qlora.ask.talk import Talk

            with open_model(source, how, Sinks(screen)) as opened:
                screen.close()
                refuse_without_template(opened)
                talks = [Talk(opened, system, of_base=True)] if compare else []
                talks.append(Talk(opened, system))
                if by_hand:
                    _by_hand(talks, sampling, stop)
                else:
                    _print_answers(talks, question, sampling)
        except KeyboardInterrupt:
            if not stop.is_set:
                raise
            stopped: StoppedBySignal = stop.error("nothing was answered any more", "ask again")
            raise stopped from None
        finally:
            screen.close()


def _question(prompt: str | None) -> str:
    """What a script asks: `--prompt`, else all of stdin. Raises UserError."""
    from qlora.cli.conversation import MAX_INPUT, as_utf8
    from qlora.errors import UserError

    text = as_utf8(sys.stdin.read(MAX_INPUT + 1) if prompt is None else prompt)
    if len(text) > MAX_INPUT:
        raise UserError(f"more than {MAX_INPUT:,} characters were asked", "ask something shorter")
    if not text.strip():
        raise UserError("nothing was asked", "write --prompt TEXT, or pipe a question in")
    return text.removesuffix("\n") if prompt is None else text


def _errors() -> Any:
    """stderr as plain lines: what is drawn there must not mix with an answer."""
    from qlora.report.console import Terminal

    return Terminal(sys.stderr, force_terminal=False, no_color=True)


def _by_hand(talks: list[Any], sampling: Sampling, stop: StopRequest) -> None:
    from qlora.cli.conversation import Conversation, prompt_on_stderr
    from qlora.report.console import Terminal

    console, opened = Terminal(), talks[-1].opened
    console.print(f"{opened.name}: a context of {opened.context:,} tokens; /help shows the commands, Ctrl-D ends")
    Conversation(talks, sampling, console, stop).loop(input if sys.stdout.isatty() else prompt_on_stderr)


def _print_answers(talks: list[Any], question: str, sampling: Sampling) -> None:
    """The answer on stdout as it comes, with a title where there are two."""
    from qlora.cli.conversation import MEMORY_HINT, as_utf8
    from qlora.guarded import Guarded
    from qlora.shown import block

    for column, talk in enumerate(talks):
        with Guarded("answering", MEMORY_HINT), common.answering():
            answering = talk.ask(as_utf8(question), sampling)
            if len(talks) > 1:
                print("\ntuned:" if column else "base:", flush=True)
            if answering.block is not None:  # the mark that the prompt wrote for the answer
                print(answering.block[0], flush=True)
            text = talk.answer(answering, lambda piece: print(block(piece), end="", flush=True))
            if not text.endswith("\n"):
                print(flush=True)
        if answering.writing.finish == "length":
            count = len(answering.writing.tokens)
            _errors().print(f"the answer was cut after {count} tokens: allow more with --max-tokens or --context")


def _serve(source: Named, how: HowToOpen, sampling: Sampling, at: tuple[int, str]) -> None:
    """Serve until a signal comes. The port is taken before the model is loaded."""
    from qlora.ask.opened import open_model, refuse_without_template
    from qlora.ask.server import serve
    from qlora.ask.transport import LocalServer
    from qlora.events import Sinks
    from qlora.report.console import ConsoleSink
    from qlora.stop import StopRequest

    port, system = at
    server = LocalServer(port)
    stop = StopRequest()
    screen = common.Screen(ConsoleSink(_errors()), stop)
    with common.Signals(stop, screen), server, open_model(source, how, Sinks(screen)) as opened:
        refuse_without_template(opened)
        try:
            # Not through the screen: that raises what a signal asked for, and here in threads that cannot take it.
            serve(server, opened, sampling, system, Sinks(ConsoleSink(_errors())))
        except KeyboardInterrupt:
            _errors().print("serve: ended")


if __name__ == "__main__":
    app()
