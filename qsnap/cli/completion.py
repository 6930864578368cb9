"""Completion for bash, zsh and fish: what can be put at the cursor, written so that the shell takes it as one word.

The shell must not obey what a VM or a snapshot is called, and a prompt must not wait or be written over: names that
cannot be typed are left out, a VM has ``_PATIENCE_S`` to answer, and every error is silence.
"""

from __future__ import annotations

import asyncio
import os
import re
import sys
from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar

import click
from click.shell_completion import (
    BashComplete,
    CompletionItem,
    FishComplete,
    ShellComplete,
    ZshComplete,
    split_arg_string,
)

from qsnap.cli.words import SHARED, verb_first

if TYPE_CHECKING:
    from qsnap.cli.common import Options
    from qsnap.vm import VM

#: Seconds that a VM has for its answer; usually it takes some hundredths.
_PATIENCE_S = 1.0


def script(cli: click.Command, shell: str) -> str:
    """What a shell is to run at its start."""
    return _made(cli, shell).source()


def answer(cli: click.Command, instruction: str) -> int:
    """Tell a shell's script what there is for the command line in its environment; an exit code."""
    shell, _, _ = instruction.partition("_")
    # Whatever a library has to say goes nowhere: below it is the user's prompt.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        sys.stdout.buffer.write(_made(cli, shell).complete().encode(errors="surrogateescape") + b"\n")
        sys.stdout.flush()
    except Exception:  # noqa: BLE001 (see above)
        return 1
    return 0


def offer(kind: str, options: Options, taken: Collection[str], incomplete: str) -> list[CompletionItem[str]]:
    """The items of that *kind* that begin with *incomplete*, without those that are *taken* already.

    :param kind: "tags" or "nodes" of the VM that the options mean, "vms", "files" or "directories".
    """
    if kind in ("files", "directories"):
        return [CompletionItem(incomplete, type="file" if kind == "files" else "dir")]
    found = dict(_vms(options) if kind == "vms" else _of_vm(kind, options))
    return [
        CompletionItem(name, help=help_ or None, kind=kind)
        for name, help_ in found.items()
        if name.startswith(incomplete) and name not in taken and name.isprintable()
    ]


def _vms(options: Options) -> Iterator[tuple[str, str]]:
    from qsnap.targets.choose import known_vms
    from qsnap.targets.config import load
    from qsnap.targets.running import running_vms

    for vm in known_vms(load(options.config), running_vms()):
        if vm.selector:
            yield vm.selector, f"process {vm.running.pid}" if vm.running else "config file"


def _of_vm(kind: str, options: Options) -> Iterable[tuple[str, str]]:
    from qsnap.cli.pick import target
    from qsnap.connecting import connect

    async def tags(vm: VM) -> list[tuple[str, str]]:
        from qsnap.cli.output.text import date

        return [(snapshot.tag, date(snapshot.date)) for snapshot in await vm.list()]

    async def nodes(vm: VM) -> list[tuple[str, str]]:
        return [(device.node, device.device) for device in (await vm.status()).devices if device.node]

    async def ask() -> list[tuple[str, str]]:
        meant = target(options)
        state_dir = options.state_dir or meant.settings.state_dir
        async with connect(meant.address, timeout_s=_PATIENCE_S, state_dir=state_dir) as vm:
            return await (tags if kind == "tags" else nodes)(vm)

    return asyncio.run(ask())


def _made(cli: click.Command, shell: str) -> ShellComplete:
    for kind in (_Bash, _Zsh, _Fish):
        if kind.name == shell:
            return kind(cli, {}, "qsnap", "_QSNAP_COMPLETE")
    raise ValueError(shell)


def _option_part(word: str) -> str:
    """``--vm=`` of ``--vm=web``: the value is completed, the word is what bash does not see and others replace."""
    return re.match(r"(--[\w-]+=)?", word)[0]  # type: ignore[index]


def _behind_verb(args: list[str], incomplete: str) -> list[str]:
    """The words before the cursor, with options that stand before the verb put behind it.

    Without a verb yet, a value and further options are completed as list takes them, and else the verb.
    """
    if not args or not args[0].startswith("-"):
        return args
    moved = verb_first(args)
    if moved != args or any(name.partition("=")[0] not in SHARED for name in args if name.startswith("-")):
        return moved
    return ["list", *args] if SHARED.get(args[-1]) or incomplete.startswith("-") else []


class _Offers(ShellComplete):
    """What all three have in common."""

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        found = super().get_completions(_behind_verb(args, incomplete), incomplete)
        # Such a tag would be taken for an option.
        return [item for item in found if "--" in args or not (item.kind == "tags" and item.value.startswith("-"))]


class _Zsh(_Offers, ZshComplete):
    # click's own has zsh insert a value whether or not it fits, and shows backslashes and colons wrongly.
    source_template: ClassVar[str] = """\
#compdef %(prog_name)s

%(complete_func)s() {
    local type value help
    local -a response values shown
    (( ! $+commands[%(prog_name)s] )) && return 1
    response=("${(@f)$(env COMP_WORDS="${words[*]}" COMP_CWORD=$((CURRENT-1)) \
%(complete_var)s=zsh_complete %(prog_name)s)}")
    for type value help in "${response[@]}"; do
        case $type in
            dir) _path_files -/ ;;
            file) _path_files -f ;;
            plain)
                values+=("$value")
                [[ $help == _ ]] && shown+=("$value") || shown+=("$value  -- $help")
                ;;
        esac
    done
    (( $#values )) && compadd -l -V unsorted -d shown -a values
}

if [[ $zsh_eval_context[-1] == loadautofunc ]]; then
    %(complete_func)s "$@"
else
    compdef %(complete_func)s %(prog_name)s
fi
"""

    def format_completion(self, item: CompletionItem[str]) -> str:
        _, incomplete = self.get_completion_args()
        help_ = " ".join((item.help or "_").split())
        return f"{item.type}\n{_option_part(incomplete)}{item.value}\n{help_}"


class _Fish(_Offers, FishComplete):
    # click's own cuts a value at its first comma, and takes fish's quotes for those of a POSIX shell.
    source_template: ClassVar[str] = """\
function %(complete_func)s
    for line in (env %(complete_var)s=fish_complete COMP_WORDS=(commandline -opc | string collect) \
COMP_CWORD=(commandline -ct | string collect) %(prog_name)s)
        set -l parts (string split -m 1 "," -- $line)
        switch $parts[1]
            case dir
                __fish_complete_directories $parts[2]
            case file
                __fish_complete_path $parts[2]
            case plain
                printf "%%s\\n" $parts[2]
        end
    end
end
complete --no-files --command %(prog_name)s --arguments "(%(complete_func)s)"
"""

    def get_completion_args(self) -> tuple[list[str], str]:
        _, *args = os.environ["COMP_WORDS"].split("\n")
        word = os.environ["COMP_CWORD"]
        option = _option_part(word)
        return args, option + re.sub(r"\\(.)", r"\1", re.sub("^['\"]", "", word.removeprefix(option)))

    def format_completion(self, item: CompletionItem[str]) -> str:
        _, incomplete = self.get_completion_args()
        return super().format_completion(_prefixed(item, _option_part(incomplete)))


def _prefixed(item: CompletionItem[str], prefix: str) -> CompletionItem[str]:
    return CompletionItem(prefix + item.value, type=item.type, help=item.help)


class _Bash(_Offers, BashComplete):
    """click's own neither quotes values nor knows that bash cuts words at ``:`` and ``=`` too."""

    source_template: ClassVar[str] = """\
%(complete_func)s() {
    local line
    COMPREPLY=()
    while IFS= read -r line; do
        case ${line%%%%,*} in
            dir) compopt -o dirnames ;;
            file) compopt -o default ;;
            plain) COMPREPLY+=("${line#*,}") ;;
        esac
    done < <(COMP_LINE=$COMP_LINE COMP_POINT=$COMP_POINT COMP_WORDBREAKS=$COMP_WORDBREAKS \
%(complete_var)s=bash_complete "$1")
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

    def source(self) -> str:
        # Not click's, which starts a bash to ask for its version.
        return ShellComplete.source(self)

    def get_completion_args(self) -> tuple[list[str], str]:
        line = self._line()
        word = _last_word(line)
        unquoted = "".join(split_arg_string(word))
        return split_arg_string(line[: len(line) - len(word)])[1:], unquoted

    def get_completions(self, args: list[str], incomplete: str) -> list[CompletionItem[str]]:
        found = super().get_completions(args, incomplete)
        return [fitting for item in found if (fitting := self._fitting(item))]

    def format_completion(self, item: CompletionItem[str]) -> str:
        return f"{item.type},{item.value}"

    def _line(self) -> str:
        # COMP_POINT counts bytes or characters, as the locale has it; at the end, the usual place, both mean all.
        line = os.environ["COMP_LINE"]
        point = int(os.environ["COMP_POINT"])
        return line if point >= len(line) else line[:point]

    def _fitting(self, item: CompletionItem[str]) -> CompletionItem[str] | None:
        """The item as bash is to write it behind the last place where it cuts the word; None where it cannot."""
        if item.type != "plain":
            return item
        word = _last_word(self._line())
        word = word.removeprefix(_option_part(word))
        quote = word[:1] if word[:1] in ("'", '"') else ""
        written = _quoted(item.value, quote)
        if written is None:
            return None
        if not quote:
            breaks = re.escape(os.environ.get("COMP_WORDBREAKS", "").replace("'", "").replace('"', ""))
            cut = re.match(rf"(?:\\.|[^\\])*(?<!\\)[{breaks}]|", word) if breaks else None
            # Where it cuts at "@", that stays with what follows (readline's rl_special_prefixes).
            prefix = cut[0].removesuffix("@") if cut else ""
            if not written.startswith(prefix):
                return None
            written = written.removeprefix(prefix)
        return CompletionItem(written)


#: A word of a shell's line, whose last quote may be open.
_WORD = re.compile(r"""\s*((?:[^\s'"\\]|\\.|'[^']*(?:'|$)|"(?:[^"\\]|\\.)*(?:"|\\?$)|\\$)*)""", re.DOTALL)


def _last_word(line: str) -> str:
    """The unfinished word at the end of a shell's line, with its quotes."""
    at = 0
    while match := _WORD.match(line, at):
        at = match.end()
        if at == len(line):
            return match[1]
    return ""


def _quoted(value: str, quote: str) -> str | None:
    """*value* as it stands in a bash command line inside of *quote*, which stays open; None if it cannot."""
    if quote == "'":
        return None if "'" in value else value
    if quote == '"':
        # "!" is history, and cannot be quoted there.
        written = re.sub(r'(["\\$`])', r"\\\1", value)
        # readline takes an escaped quote at the end for the closing one.
        return None if "!" in value else written + '"' * value.endswith('"')
    return re.sub(r"([^\w@%+=:,./-])", r"\\\1", value)
