"""`etude completion`: a script that completes commands, methods, worlds and policies in a shell."""

from __future__ import annotations

from collections.abc import Sequence

from etude.app.main import COMMANDS
from etude.experience.errors import UserError
from etude.methods.catalog import CATALOG
from etude.policies.zoo import ZOO
from etude.worlds.registry import world_names

SCRIPT = """\
_etude() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "$before" in
            train|show) words="{methods}" ;;
            --world) words="{worlds}" ;;
            --policy|eval|chat|merge) words="{policies}" ;;
            completion) words="bash zsh" ;;
        esac
    fi
    [ -n "$words" ] && COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
complete -o default -F _etude etude"""


def completion(argv: Sequence[str]) -> None:
    """Prints the script; `source <(etude completion bash)` puts it to use."""
    if list(argv) in (["-h"], ["--help"]):
        print("usage: etude completion {bash,zsh}\n\nPut it to use with: source <(etude completion bash)")
        return
    if list(argv) not in (["bash"], ["zsh"]):
        raise UserError("completion takes a shell: bash or zsh")
    script = SCRIPT.format(
        commands=" ".join(COMMANDS),
        methods=" ".join(CATALOG),
        worlds=" ".join(world_names()),
        policies=" ".join(ZOO),
    )
    if argv[0] == "zsh":
        print("autoload -U +X compinit bashcompinit && compinit && bashcompinit")
    print(script)
