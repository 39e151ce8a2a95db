"""DNO: the numeric checks of its method, its limits, how a round's pairs are made, and whole runs of both forms."""

import json
import socket
import threading
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from etude.audits.exploitability import exploitability
from etude.experience.batch import Link, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.protocols import Verdict
from etude.experience.rows import example
from etude.experience.store import Store
from etude.experience.types import Problem
from etude.feedback.judge import Fair
from etude.feedback.winrate import compared, win_rates
from etude.learning.answering import Answered
from etude.methods.api import resume, train
from etude.methods.preferences.dno import DNO, paired, valued
from etude.objectives.pairs import PairLoss, normalise_pairs
from etude.policies.mixture import Mixture
from etude.policies.zoo import load_policy, save_policy
from etude.worlds.choice import ChoiceWorld
from runs import Cut, Cutter, logged, same, weights

P = np.array([[0.5, 0.9, 0.1], [0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
PI = np.array([0.6, 0.3, 0.1])
ETA = 0.5
STEP = PI * np.exp(P @ PI / ETA) / (PI * np.exp(P @ PI / ETA)).sum()


# --- numeric checks ------------------------------------------------------------------------------


def certain(items):
    """A judge whose value is the probability itself; responses are 0, 1 and 2."""
    return [Verdict(P[int(a), int(b)], P[int(a), int(b)]) for _, a, b, _ in items]


def test_the_reward_is_the_win_rate_against_the_policy():
    assert (P @ PI).tolist() == pytest.approx([0.58, 0.30, 0.62])
    group = ["0"] * 60 + ["1"] * 30 + ["2"] * 10
    rates = win_rates(compared(Fair(certain, both=False), [Problem("p", "?")], [group])[0])
    assert rates[[0, 60, 90]] == pytest.approx([0.58, 0.30, 0.62], abs=0.003)  # itself left out


def test_a_step_goes_to_the_soft_policy_iteration():
    assert STEP.tolist() == pytest.approx([0.68206, 0.19480, 0.12314], abs=1e-5)
    margin = ETA * np.log(STEP / PI)
    assert margin[2] - margin[0] == pytest.approx(0.04)
    won, kl = STEP @ P @ PI, float((STEP * np.log(STEP / PI)).sum())
    assert won == pytest.approx(0.53038, abs=1e-5)
    assert won >= 0.5 + ETA * kl == pytest.approx(0.51447, abs=1e-5)  # monotone improvement


def optimum(value, reference, eta):
    """f64[3]: where the soft-target loss on all pairs has its least, for a policy of three logits."""
    rows = [example([1], [5 + i], value=float(value[i])) for i in range(3) for _ in range(2)]
    pairs = [(0, 2), (1, 4), (3, 5)]  # each two responses
    batch = normalise_pairs(pack(rows, [Link("pair", p, ("chosen", "rejected")) for p in pairs]))
    which = batch.actions["target"] - 5
    batch = batch.with_actions(logp_ref=torch.tensor(np.log(reference))[which])
    logits = torch.tensor(np.log(reference), requires_grad=True)
    optimiser = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-14)

    class Out:
        pass

    def loss():
        optimiser.zero_grad()
        out = Out()
        out.logp = logits.log_softmax(0)[which]
        total = PairLoss("soft", eta).loss(out, batch).total
        total.backward()
        return total

    optimiser.step(loss)
    return logits.detach().softmax(0).numpy()


def test_the_least_loss_is_at_that_step():
    assert optimum(P @ PI, PI, ETA) == pytest.approx(STEP, abs=1e-5)


def test_with_a_fixed_reward_it_is_dpo_on_the_probabilities_of_labels():
    """sigma(D*) is then the Bradley-Terry preference, and the optimum that of KL-regularised reward maximisation."""
    reward, reference = np.array([1.0, -0.5, 0.3]), np.array([0.2, 0.5, 0.3])
    wanted = reference * np.exp(reward / 0.7)
    assert optimum(reward, reference, 0.7) == pytest.approx(wanted / wanted.sum(), abs=1e-5)
    scaled = optimum(3 * reward, reference, 3 * 0.7)  # rewards and eta together change nothing
    assert scaled == pytest.approx(wanted / wanted.sum(), abs=1e-5)


def test_the_mean_of_exact_rounds_approaches_the_equilibrium_and_the_last_does_not():
    pi, seen = PI, []
    for _ in range(201):
        seen.append(pi)
        pi = pi * np.exp(P @ pi / 2.0)
        pi = pi / pi.sum()
    mean = np.mean(seen[:200], axis=0)
    assert mean == pytest.approx([0.3249, 0.3101, 0.3650], abs=1e-4)
    assert exploitability(P, mean) == pytest.approx(0.0160, abs=1e-4)
    assert exploitability(P, seen[199]) == pytest.approx(0.2886, abs=1e-4)
    assert exploitability(P, seen[200]) == pytest.approx(0.3014, abs=1e-4)


@given(st.lists(st.floats(0.0, 1.0), min_size=3, max_size=3).filter(lambda w: sum(w) > 0.01))
def test_the_policys_own_win_rate_is_one_half(weights):
    pi = np.array(weights) / sum(weights)
    assert pi @ (P @ pi) == pytest.approx(0.5)


# --- a round's pairs -----------------------------------------------------------------------------


def answered(*texts):
    rows = [example([1, 2], [ord(c) for c in t], reward=0.0) for t in texts]
    return Answered(Problem("p", "?"), list(texts), rows, texts[0] == "t")


def made(config, answers, value):
    """(chosen, rejected) texts of each pair, and the counts."""
    found, counts = paired(config, [answers], [np.array(value)], Keys(0))
    if found is None:
        return [], counts
    said = ["".join(map(chr, r.columns["target"])) for r in found.rows]
    return [(said[link.rows[0]], said[link.rows[1]]) for link in found.links], counts


def test_a_student_wins_by_less_than_a_teacher_must():
    config = DNO(pairs_each=9)
    pairs, counts = made(config, answered("t", "a", "b"), [0.7, 1.0, 0.4])
    assert pairs == [("a", "b"), ("a", "t")]  # t over b would need a gap of 0.4
    assert counts == {"pairs": 2.0, "identical": 0.0, "skipped": 0.0, "by_student": 2.0}
    pairs, counts = made(config, answered("t", "a", "b"), [1.0, 0.5, 0.0])
    assert pairs == [("t", "b"), ("t", "a")]  # a is below the floor of a positive
    assert counts["by_student"] == 0
    assert made(replace(config, pairs_each=1), answered("t", "a", "b"), [1.0, 0.5, 0.0])[0] == [("t", "b")]


def test_restrictive_pairs_begin_with_a_teacher_that_was_judged_better():
    config = DNO(pairs_each=9, admit="teacher")
    assert made(config, answered("t", "a", "b"), [0.6, 1.0, 0.0])[0] == [("t", "b")]
    pairs, counts = made(config, answered("t", "a", "b"), [0.3, 1.0, 0.6])
    assert pairs == []
    assert counts["skipped"] == 1


def test_spin_takes_the_teacher_for_the_better_without_asking():
    config = DNO(pairs_each=9, admit="spin")

    def unasked(items):
        raise AssertionError("nobody should be asked")

    answers = answered("t", "a", "t", "b")
    value = valued(config, unasked, [answers], None, 0)
    assert value[0].tolist() == [1, 0, 0, 0]
    pairs, counts = made(config, answers, value[0])
    assert pairs == [("t", "a"), ("t", "b")]
    assert counts["identical"] == 1


def test_the_exact_form_pairs_all_different_answers_once():
    config = DNO(form="exact", pairs_each=9)
    pairs, counts = made(config, answered("a", "b", "a", "c"), [0.1, 0.2, 0.1, 0.3])
    assert {frozenset(p) for p in pairs} == {frozenset("ab"), frozenset("ac"), frozenset("bc")}
    assert counts["identical"] == 1
    assert len(made(replace(config, pairs_each=2), answered("a", "b", "c"), [0, 0, 0])[0]) == 2
    assert made(config, answered("a", "a"), [0.5, 0.5])[1]["skipped"] == 1


def test_repetitive_answers_rank_last():
    config = DNO(teacher=None)
    longest = Fair(lambda items: [Verdict(float(len(a) > len(b)), 0.5) for _, a, b, _ in items], both=False)
    assert valued(config, longest, [answered("b", "ab" * 9)], None, 0)[0].tolist() == [0, 0]
    assert valued(config, longest, [answered("b", "ab")], None, 0)[0].tolist() == [0, 1]


def test_a_fitted_reward_takes_the_place_of_win_rates():
    config = DNO(form="exact", feedback="bradley-terry")
    rewards = {"?": {"a": 1.5, "b": -0.5}}
    assert valued(config, None, [answered("b", "a", "new")], rewards, 0)[0].tolist() == [-0.5, 1.5, -0.5]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rounds": 0}, "rounds must be at least 1"),
        ({"members": 1, "form": "exact"}, "members must be at least 2"),
        ({"admit": "spin", "teacher": None}, "admit=spin sets a teacher's answers before the student's"),
        ({"admit": "teacher", "form": "exact"}, "admit=teacher sets"),
        ({"feedback": "bradley-terry"}, "takes the place of the win rates of form=exact"),
        ({"floor": 1.5}, "floor is a win rate"),
        ({"margin": float("nan")}, "margin"),
        ({"older": 0.5}, "older"),
        ({"eta": 0.0}, "eta must be above 0"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UserError, match=said):
        DNO(**options)


# --- whole runs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def echo(tmp_path_factory):
    """A data file: say the digit you are shown."""
    file = tmp_path_factory.mktemp("data") / "echo.jsonl"
    lines = [{"prompt": f"{'x' * i}{d}=", "answer": str(d)} for i in range(26) for d in range(10)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(file)


PRACTICAL = {"rounds": 2, "problems": 24, "members": 6, "steps": 3, "batch": 8, "teacher": None, "validation": 8}
EXACT = {"form": "exact", "rounds": 3, "problems": 6, "members": 8, "pairs_each": 9, "steps": 4, "batch": 99}


@pytest.fixture(scope="module")
def choice(tmp_path_factory):
    """The choice world of three contexts, and a table that gives every response alike."""
    policy = load_policy("table:order=8,rows=64")
    tokens = policy.tokenizer
    with torch.no_grad():
        for i in range(3):
            context = tokens.prompt(ChoiceWorld().problem("train", i).prompt).tolist()
            policy.logits[policy.place(context), tokens.encode("01").tolist()] = 20.0
            for first in tokens.encode("01").tolist():
                policy.logits[policy.place([*context, first]), tokens.encode("012").tolist()] = 20.0
    folder = tmp_path_factory.mktemp("choice") / "policy"
    save_policy(policy, folder)
    return {"world": "choice", "world_options": {"contexts": 3}, "policy": str(folder), "max_tokens": 2,
            "eval_problems": 3, "optim": {"lr": 0.1}}  # fmt: skip


@pytest.fixture
def common(start, echo):
    return {"world": echo, "policy": start, "max_tokens": 1, "eval_problems": 8, "checkpoint_every": 2}


@pytest.mark.parametrize("form", ["practical", "exact"])
def test_a_cut_run_ends_as_if_it_had_not_been(form, common, choice, tmp_path):
    options = {**common, **PRACTICAL} if form == "practical" else {**choice, **EXACT, "checkpoint_every": 2}
    whole = train("dno", out=tmp_path / "whole", **options)
    assert whole.meter["judge"] > 0
    assert whole.meter["updates"] > 0
    wanted = logged(whole)
    assert not (whole.folder / "iterates").exists()
    for at in (3, 5, 8):  # in a fit, in the next round, near the end
        folder = tmp_path / f"cut{at}"
        with pytest.raises(Cut):
            train("dno", out=folder, reporter=Cutter(at), **options)
        again = resume(folder)
        assert logged(again) == wanted
        assert same(weights(again), weights(whole))
    assert resume(folder).meter.read() == whole.meter.read() | {"seconds": again.meter["seconds"]}


def test_the_exact_form_returns_the_mixture_of_its_iterates(choice, tmp_path):
    run = train("dno", out=tmp_path / "r", **choice, **{**EXACT, "rounds": 12, "members": 16})
    policy = load_policy(str(run.folder / "policy"))
    assert isinstance(policy, Mixture)
    assert len(policy.policies) == 12
    with Store(run.folder, read_only=True) as store:
        average, last = (
            [e["value"] for e in store.evaluations(name)] for name in ("exploitability", "exploitability_last")
        )
        loss = store.metrics("loss")["loss"].value
    assert average[0] == last[0]  # of pi_1
    assert average[-1] < average[0]
    assert loss[0] == pytest.approx(np.log(2), abs=1e-4)  # the policy is its own reference when a round begins
    assert loss[4] == pytest.approx(np.log(2), abs=1e-4)


def test_a_bradley_terry_reward_is_fitted_to_as_many_verdicts(choice, tmp_path):
    shared = {**choice, **EXACT, "eval_every": 0}
    ours = train("dno", out=tmp_path / "a", **shared)
    theirs = train("dno", out=tmp_path / "b", **shared, feedback="bradley-terry")
    assert theirs.meter["judge"] == pytest.approx(ours.meter["judge"], rel=0.25)
    assert theirs.meter["updates"] == ours.meter["updates"]
    assert theirs.meter["sampled"] == 2 * ours.meter["sampled"]


def test_the_reference_is_the_policy_of_the_round_or_the_first(common, tmp_path):
    """At the first update of a later round D is 0 for a moving reference, for a fixed one what was learnt so far."""
    margins = {}
    options = {**PRACTICAL, "problems": 60, "validation": 0, "older": 0.0, "optim": {"lr": 3e-3}}
    for reference in ("moving", "first"):
        run = train("dno", out=tmp_path / reference, **common, **options, reference=reference)
        with Store(run.folder, read_only=True) as store:
            margins[reference] = store.metrics("margin")["margin"].value
    assert margins["moving"][[0, 3]] == pytest.approx([0, 0], abs=1e-6)
    assert abs(margins["first"][0]) < 1e-6 < 1e-4 < abs(margins["first"][3])


def test_offline_answers_are_all_of_the_first_policy(common, tmp_path):
    said = {}
    options = {**PRACTICAL, "validation": 0, "optim": {"lr": 0.1}}
    for online in (True, False):
        run = train("dno", out=tmp_path / str(online), **common, **options, online=online)
        with Store(run.folder, read_only=True) as store:
            said[online] = [
                [t["text"] for t in store.trajectories(stage=f"train/round{r}/collect", limit=None)] for r in (0, 1)
            ]
    assert said[True][0] == said[False][0]
    assert said[True][1] != said[False][1]
    other = train("dno", out=tmp_path / "still", **common, **{**options, "optim": {"lr": 1e-12}}, online=True)
    with Store(other.folder, read_only=True) as store:
        still = [t["text"] for t in store.trajectories(stage="train/round1/collect", limit=None)]
    assert still == said[False][1]


def test_a_later_round_replays_older_pairs(common, tmp_path):
    run = train("dno", out=tmp_path / "r", **common, **{**PRACTICAL, "problems": 60, "validation": 0})
    with Store(run.folder, read_only=True) as store:
        pairs = store.metrics("pairs")["pairs"].value
    states = [
        json.loads((run.folder / "stages" / f"train__round{r}__collect" / "state.json").read_text()) for r in (0, 1)
    ]
    links = [len(dict(s["items"])["links"]["items"]) for s in states]
    assert links[0] == pairs[0]
    assert links[1] == pairs[1] + min(pairs[0], int(0.3 * pairs[1] / 0.7 + 1e-9))


def test_it_learns_from_a_teacher_that_is_sometimes_wrong(echo, common, tmp_path):
    """A file of completions, one in three of them wrong, and a few not there: right ones win, others are no pair."""
    lines = [json.loads(line) for line in Path(echo).read_text().splitlines()]
    taught = [
        {"prompt": d["prompt"], "completion": d["answer"] if i % 3 else "?"} for i, d in enumerate(lines) if i % 7
    ]
    (tmp_path / "teacher.jsonl").write_text("".join(json.dumps(t) + "\n" for t in taught))
    options = {**PRACTICAL, "rounds": 3, "problems": 60, "steps": 25, "batch": 16, "validation": 16,
               "teacher": str(tmp_path / "teacher.jsonl"), "nll": 0.5, "optim": {"lr": 1e-2}}  # fmt: skip
    run = train("dno", out=tmp_path / "r", **{**common, "eval_problems": 60, "max_tokens": 2}, **options)
    with Store(run.folder, read_only=True) as store:
        accuracy, rate = ([e["value"] for e in store.evaluations(n)] for n in ("accuracy", "win_rate"))
        validation = store.metrics("validation")["validation"].value
        pairs = store.metrics("pairs")["pairs"].value
    assert accuracy[-1] > 0.5 > 0.1 > accuracy[0]
    assert rate[-1] > 0.5 > rate[0]  # it has come to beat its teacher
    assert run.meter["teacher"] == 3 * 60
    assert len(validation) == 4  # before, and after every round
    assert pairs[0] > 60


def test_a_round_without_an_admissible_pair_is_skipped(common, tmp_path):
    options = {**PRACTICAL, "floor": 1.0, "student_margin": 2.0}
    run = train("dno", out=tmp_path / "r", **common, **options)
    assert run.meter["updates"] == 0
    with Store(run.folder, read_only=True) as store:
        assert store.metrics("skipped")["skipped"].value.tolist() == [24, 24]
        assert len(store.evaluations("accuracy")) == 2


def test_a_teacher_may_be_the_worlds_oracle_and_a_policy_a_foreign_one(tmp_path):
    transformers = pytest.importorskip("transformers")
    from etude.policies.foreign import ForeignLM
    from etude.policies.tokenizers import CharTokenizer

    tokens = CharTokenizer()
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=tokens.size, n_embd=32, n_layer=1, n_head=2, n_positions=64)
    save_policy(ForeignLM(transformers.AutoModelForCausalLM.from_config(config).eval(), tokens), tmp_path / "hf")
    options = {"world": "chain_sum", "policy": str(tmp_path / "hf"), "max_tokens": 6, "eval_problems": 4, "rounds": 2,
               "problems": 6, "members": 3, "steps": 2, "batch": 4, "validation": 4}  # fmt: skip
    run = train("dno", out=tmp_path / "r", **options)
    assert run.meter["updates"] == 4  # the oracle's answers win
    loaded = load_policy(str(run.folder / "policy"))
    assert isinstance(loaded, ForeignLM)
    adapted = train("dno", out=tmp_path / "lora", **options, lora={"rank": 2})
    assert adapted.meter["updates"] == 4


def test_on_random_weights_of_the_zoo(tmp_path):
    run = train("dno", out=tmp_path / "r", world="chain_sum", base=False, max_tokens=4, eval_problems=4, rounds=1,
                problems=4, members=2, steps=2, batch=4, validation=4)  # fmt: skip
    assert run.meter["updates"] == 2


# --- judges --------------------------------------------------------------------------------------


def test_a_policy_judges_by_its_scores_or_in_words(start, common, tmp_path):
    judge = tmp_path / "judge"
    save_policy(load_policy("tiny:width=16,depth=1,heads=2,ffn=16", Keys(3)), judge)
    options = {**PRACTICAL, "problems": 3, "members": 3, "validation": 0}
    by_score = train("dno", out=tmp_path / "s", **common, **options, judge={"who": str(judge), "by": "score"})
    by_reply = train("dno", out=tmp_path / "w", **common, **options, judge={"who": str(judge), "tokens": 4})
    unread = {}
    for name, run in (("score", by_score), ("reply", by_reply)):
        assert run.meter["judge"] > 0
        assert run.meter["judge"] % 2 == 0  # both orders
        with Store(run.folder, read_only=True) as store:
            unread[name] = store.metrics("unparsed")["unparsed"].value.sum()
    assert unread["score"] == 0
    assert 0 < unread["reply"] == by_reply.meter["judge"] / 2  # it babbles: every verdict is a tie
    assert by_reply.meter["updates"] == 0


@contextmanager
def chatting(reply):
    """The URL of a chat endpoint that says `reply(question)`."""
    uvicorn, _ = pytest.importorskip("uvicorn"), pytest.importorskip("httpx")
    from starlette.applications import Starlette
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def chat(request):
        body = await request.json()
        said = reply(body["messages"][0]["content"])
        return JSONResponse({"choices": [{"message": {"role": "assistant", "content": said}}]})

    async def models(request):
        return JSONResponse({"data": [{"id": "m"}]})

    app = Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)])
    with socket.socket() as heard:
        heard.bind(("127.0.0.1", 0))
        heard.listen(64)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", http="h11"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [heard]}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{heard.getsockname()[1]}"
        finally:
            server.should_exit = server.force_exit = True
            thread.join(20)


def test_an_endpoint_judges(common, tmp_path):
    def larger(question):
        first, second = (question.split(f"{name} answer:\n")[1][:1] for name in ("First", "Second"))
        return f"Verdict: {'first' if first > second else 'second'}"

    options = {**PRACTICAL, "rounds": 1, "problems": 8, "members": 3, "validation": 0, "steps": 2}
    with chatting(larger) as url:
        run = train("dno", out=tmp_path / "r", **common, **options, judge={"who": url})
    assert run.meter["judge"] > 0
    assert run.meter["updates"] == 2
    with chatting(lambda question: "I cannot say.") as url:
        run = train("dno", out=tmp_path / "s", **common, **options, judge={"who": url})
    with Store(run.folder, read_only=True) as store:
        assert store.metrics("unparsed")["unparsed"].value[0] == run.meter["judge"] / 2
    assert run.meter["updates"] == 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"judge": {"who": "nobody"}}, "unknown policy 'nobody'"),
        ({"judge": {"whom": "oracle"}}, "unknown option 'judge.whom': did you mean judge.who"),
        ({"admit": "students"}, "option admit takes one of all, teacher, spin"),
        ({"etta": 1.0}, "unknown option 'etta': did you mean eta"),
        ({"judge": {"who": "http://127.0.0.1:9"}}, "cannot be reached"),
        ({"teacher": "no/such/teacher"}, "no policy at no/such/teacher"),
        ({"teacher": "oracle:plain"}, "has no oracle"),
        ({"form": "exact", "temperature": 0.5}, "sample with temperature 1"),
        ({"world": "retry:chain_sum"}, "use a world of one turn"),
        ({"validation": 10**6}, "too few to validate"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(options, said, common, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        train("dno", out=tmp_path / "r", **{**common, **PRACTICAL, **options})
    assert "\n" not in str(error.value)
    assert not (tmp_path / "r").exists()
