"""The command `etude`. Commands are loaded when they are used, so help and lists answer at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from etude.experience.errors import UserError, unknown
from etude.learning.ranks import speaks

# name: (module, arguments, summary)
COMMANDS = {
    "list": ("catalogue", "[--worlds | --policies | --parts] [--json]", "methods by family, or what they run on"),
    "show": ("catalogue", "METHOD [--json]", "one method: its source, equations, options"),
    "train": (
        "training",
        "METHOD [--world W] [--policy P] ...",
        "learn; `etude train METHOD --help` shows its options",
    ),
    "resume": ("training", "RUN", "go on with a run that was cut"),
    "eval": ("using", "POLICY --world W", "held-out accuracy with its interval"),
    "chat": ("using", "POLICY", "talk to a policy"),
    "export": ("using", "RUN PATH", "a Hugging Face folder, or the run's log as .parquet or .jsonl"),
    "merge": ("merge", "BASE TUNED --out DIR", "a policy and what was tuned from it as one, by their weights"),
    "verify": ("verify", "METHOD... [--family F] [--quick]", "run the claims of methods against their baselines"),
    "compare": ("compare", "METHOD METHOD ... [--budget tokens=N]", "methods side by side, on equal terms"),
    "matrix": ("matrix", "[--json FILE]", "which parts fit together, by running every pair"),
    "evidence": ("evidence", "[--write] [--json]", "what every method's claim gave"),
    "bench": ("bench", "[engine | learner | grpo | load | scale] [--json FILE]", "speed against TRL and transformers"),
    "view": ("view.command", "[FOLDER] [--port N]", "runs, trajectories and the catalogue in a browser"),
    "doctor": ("doctor", "[--json]", "what is installed, what is missing, how fast this machine is"),
    "completion": ("completion", "bash | zsh", "a script that completes commands in a shell"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 0, 2 for bad input, 130 when interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"etude {version('etude')}")
        return 0
    name, rest = words[0], words[1:]
    try:
        if name not in COMMANDS:
            raise unknown("command", name, COMMANDS)
        module = import_module(f"etude.app.{COMMANDS[name][0]}")
        getattr(module, name if name != "list" else "list_")(rest)
        return 0
    except SystemExit as stop:  # `--help` was printed
        return int(stop.code or 0)
    except UserError as error:
        if speaks():
            print(f"etude: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stop:
        if speaks():
            print(": ".join(["etude: interrupted", *map(str, stop.args)]), file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has gone, as `| head` does.
        sys.stderr.close()
        return 0
    except Exception:
        if speaks():
            raise
        return 1


def usage() -> str:
    """The text of `etude --help`."""
    width = max(len(f"{n} {a}") for n, (_, a, _) in COMMANDS.items() if len(a) < 30)
    lines = ["etude: models that learn from their own experience", "", "usage: etude COMMAND ...", ""]
    for name, (_, arguments, summary) in COMMANDS.items():
        head = f"{name} {arguments}"
        if len(head) > width:
            lines += [f"  {head}", f"  {'':{width}}  {summary}"]
        else:
            lines.append(f"  {head:{width}}  {summary}")
    return "\n".join([*lines, "", "`etude COMMAND --help` says more about one."])


if __name__ == "__main__":
    sys.exit(main())
