"""What the command line answers without training anything."""

import json
import os
import re
import resource
import subprocess
import sys

import pytest

from app_cli import ETUDE, on_terminal, refused, runner
from etude.app.flags import _flags, parse
from etude.app.main import COMMANDS
from etude.methods.catalog import CATALOG
from etude.worlds.registry import world_names

WORKING = [e.slug for e in CATALOG.values() if e.works]


@pytest.fixture
def etude(capfd):
    return runner(capfd)


def spent(*command):
    """Seconds of processor time that a command took, the best of three."""
    best = float("inf")
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, capture_output=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best


@pytest.mark.parametrize(
    "words", [["--help"], ["list"], ["list", "--json"], ["list", "--worlds"], ["completion", "bash"]]
)
def test_help_and_lists_answer_at_once(words):
    assert spent(*ETUDE, *words) < 0.5


def test_light_commands_import_nothing_heavy():
    code = (
        "import sys, etude; from etude.app.main import main\n"
        "for words in (['--help'], ['list'], ['list', '--worlds'], ['list', '--policies'], ['completion', 'zsh']):\n"
        "    assert main(words) == 0\n"
        "heavy = {'torch', 'transformers', 'reasoning_gym', 'scipy', 'datasets'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_help_names_every_command(etude):
    for words in (["--help"], []):
        said = etude(*words)
        assert said.code == 0
        assert all(f"\n  {name} " in said.out for name in COMMANDS)


@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "train"] + [f"train {s}" for s in WORKING])
def test_every_flag_says_what_it_is(etude, command):
    said = etude(*command.split(), "--help")
    assert said.code == 0
    for entry in re.split(r"^│ (?=--)", said.out, flags=re.MULTILINE)[1:]:
        flag, *words = entry.partition("(default:")[0].replace("│", "").replace("{None}|", "").split()
        assert [w for w in words if w.islower() and w[0] not in "[{"], f"{flag} of `etude {command}` has no help"


def test_list(etude):
    table = etude("list").out
    assert "95" in table.split()
    for slug in WORKING:
        words = [line.split()[:3] for line in table.splitlines()]
        assert any([slug, "works"] in (w[:2], w[1:]) for w in words)  # a method of a paper has its number before
    rows = json.loads(etude("list", "--json").out)
    assert {r["slug"]: r["status"] for r in rows} == {
        e.slug: "works" if e.works else "planned" for e in CATALOG.values()
    }
    assert json.loads(etude("list", "--worlds", "--json").out) == {"worlds": world_names()}
    assert "smollm2" in json.loads(etude("list", "--policies", "--json").out)
    parts = json.loads(etude("list", "--parts", "--json").out)
    assert "uniform" in parts["curriculum"]
    assert "grpo" in parts["objective"]
    assert "easy-to-hard" in etude("list", "--parts").out


def test_show(etude):
    assert "2402.03300" in etude("show", "grpo").out
    assert "kl_coef" in etude("show", "grpo").out
    assert json.loads(etude("show", "sft", "--json").out)["options"]["optim"]["schedule"] == "cosine"
    assert "planned" in etude("show", "calm").out
    assert "did you mean grpo" in refused(etude("show", "grop"))


def test_doctor(etude):
    found = json.loads(etude("doctor", "--json").out)
    assert found["packages"]["torch"]["version"]
    assert found["machine"]["gflops"] > 0
    assert "GB/s" in etude("doctor").out


def test_doctor_says_how_to_get_what_is_missing(etude, monkeypatch):
    import etude.app.doctor as doctor

    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(
        doctor, "machine", lambda: {"cores": 1, "threads": 1, "accelerator": "", "gflops": 1, "copy_gb_per_s": 1}
    )
    said = etude("doctor").out
    assert "make smollm2" in said
    assert "pip install 'etude[hf]'" in said


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("frob", "unknown command 'frob'"),
        ("lst", "did you mean list"),
        ("show", "show needs METHOD"),
        ("export run", "export needs PATH"),
        ("list --wrlds", "unknown flag '--wrlds': did you mean --worlds"),
        ("list --worlds 3", "unexpected '3'"),
        ("train", "train needs a method first"),
        ("train --steps 3", "train needs a method first"),
        ("train grpo --stepz 3", "unknown flag '--stepz': did you mean --steps"),
        ("train grpo --optim.lrr=3", "did you mean --optim.lr"),
        ("train grpo --lora-rank 3", "did you mean --lora.rank"),
        ("train grpo --steps", "--steps needs a value"),
        ("train grpo --steps x", "--steps takes a whole number, not 'x'"),
        ("train grpo --optim.lr x", "--optim.lr takes a number, not 'x'"),
        ("train grpo --normalise frob", "--normalise takes one of 'token', 'sequence'"),
        ("completion fish", "bash or zsh"),
    ],
)
def test_misuse_of_flags_is_one_line(etude, words, line):
    assert line in refused(etude(*words.split()))


def test_flags_that_are_suggested_are_the_flags_there_are(etude):
    from dataclasses import dataclass, field

    @dataclass(frozen=True)
    class Inner:
        deep_one: int = 1  # a number

    @dataclass(frozen=True)
    class Outer:
        flat_one: float = 1.0  # a number
        on: bool = True  # a switch
        inner: Inner = field(default_factory=Inner)

    globals().update(Inner=Inner)
    assert sorted(_flags(Outer)) == ["--flat-one", "--inner.deep-one", "--no-on"]
    assert parse(Outer, ["--inner.deep-one", "2", "--no-on"], "x") == Outer(on=False, inner=Inner(2))


def test_a_reader_that_goes_away_is_no_error():
    etude = subprocess.Popen([*ETUDE, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    etude.stdout.close()
    assert etude.stderr.read() == b""
    assert etude.wait(20) == 0


def test_completion_in_a_real_bash(tmp_path):
    script = tmp_path / "completion"
    script.write_text(subprocess.run([*ETUDE, "completion", "bash"], check=True, capture_output=True, text=True).stdout)
    rc = tmp_path / "rc"
    rc.write_text(f"PS1='$ '; bind 'set enable-bracketed-paste off'; etude() {{ echo \"<$*>\"; }}; source {script}\n")
    typed = b"etude tra\tgrp\t--policy smol\t--world countd\t\netude compl\tzs\t\nexit\n"
    shown = on_terminal(["/bin/bash", "--noprofile", "--rcfile", os.fspath(rc), "-i"], typed)
    assert "<train grpo --policy smollm2 --world countdown>" in shown
    assert "<completion zsh>" in shown
