"""The way in: `vila2-fast COMMAND`. A command's file is imported when it is needed, and nothing heavy with it.

Exit codes: 0 done, 1 a failed run, 2 wrong usage, 3 bad inputs under --strict, 130 interrupted.
"""

import os
import sys
from importlib import import_module
from typing import Any

import rich_click as click
from click.exceptions import Exit

from vila2 import __version__
from vila2.errors import VilaError

# name -> "module:command", in the order that --help shows
COMMANDS = {
    "recaption": "vila2.cli.recaption:recaption",
    "serve": "vila2.cli.serve:serve",
    "verify": "vila2.cli.verify:verify",
    "export": "vila2.cli.export:export",
    "train": "vila2.cli.train:train",
    "loop": "vila2.cli.loop:loop",
    "report": "vila2.cli.report:report",
    "prompts": "vila2.cli.prompts:prompts",
    "evaluate": "vila2.cli.evaluate:evaluate",
    "bench": "vila2.cli.bench:bench",
    "world": "vila2.cli.world:world",
    "inspect": "vila2.cli.inspect:inspect",
    "build": "vila2.cli.build:build",
    "engines": "vila2.cli.engines:engines",
    "convert": "vila2.cli.convert:convert",
    "doctor": "vila2.cli.doctor:doctor",
    "completion": "vila2.cli.completion:completion",
}
INTERRUPTED = 130


class LazyGroup(click.RichGroup):
    """A group whose commands are imported one by one, on first use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), name)
        return command


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="vila2-fast")
def cli() -> None:
    """Recaption image sets with a VILA or LLaVA checkpoint: exact, resumable, on any machine.

    \b
    vila2-fast recaption photos/ --model CHECKPOINT --out captions/
    vila2-fast verify captions/
    vila2-fast export captions/ --format jsonl
    """


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. An error is one line on stderr.

    VILA2_TRACEBACK=1 shows where an unexpected error came from.
    """
    try:
        result: Any = cli.main(args=arguments, prog_name="vila2-fast", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        return _fail(_usage_line(error), error.exit_code)
    except VilaError as error:
        return _fail(str(error), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("interrupted", INTERRUPTED)
    except Exception as error:
        if os.environ.get("VILA2_TRACEBACK"):
            raise
        detail = " ".join(str(error).split())
        return _fail(f"{type(error).__name__}: {detail} (VILA2_TRACEBACK=1 shows where)", 1)


def _usage_line(error: click.ClickException) -> str:
    message = " ".join(error.format_message().split())
    if isinstance(error, click.UsageError) and error.ctx is not None:
        return f"{message} (see: {error.ctx.command_path} --help)"
    return message


def _fail(message: str, code: int) -> int:
    """Where a launcher started several processes, each says which it is."""
    count = os.environ.get("WORLD_SIZE", "1")
    of = "" if count == "1" else f"process {os.environ.get('RANK', '?')} of {count}: "
    print(f"error: {of}{message}", file=sys.stderr)
    return code
