"""The classifier: points as arrays and as tokens, its gradients, its files, and the loops that it learns through."""

import json
import math

import numpy as np
import pytest
import torch

from etude.acting.agent import PolicyAgent
from etude.acting.sample import sample
from etude.curation.examples import Examples, completion
from etude.experience.batch import normalise, pack
from etude.experience.errors import UserError
from etude.experience.keys import Keys
from etude.experience.meter import Meter
from etude.experience.protocols import Clock, Limits
from etude.experience.store import Store
from etude.experience.types import Law
from etude.learning.learner import Optim, Seat, Term, update
from etude.methods.api import train
from etude.objectives.nll import NLL
from etude.policies.classifier import Classifier, PointTokenizer, labelled
from etude.policies.zoo import load_policy, save_policy
from etude.worlds.points import PointsWorld

ALL = frozenset({"logp", "entropy", "logits", "hidden"})


def points(n=6, features=3, classes=4, seed=0):
    draw = np.random.default_rng(seed)
    return draw.normal(size=(n, features)).astype(np.float32), draw.integers(classes, size=n)


def made(depth=0, features=3, classes=4, seed=0):
    policy = Classifier(features, classes, depth, 8, Keys(seed).torch())
    if depth == 0:
        torch.nn.init.normal_(policy.head.weight, generator=Keys(seed).torch())
    return policy


@pytest.mark.parametrize("depth", [0, 2])
def test_arrays_and_tokens_are_the_same_points(depth):
    policy = made(depth)
    x, y = points()
    text = [" ".join(map(str, row)) for row in x]
    packed = pack([completion(policy.tokenizer, t, str(c), policy.limit) for t, c in zip(text, y, strict=True)])
    a, b = policy(labelled(x, y), ALL), policy(packed, ALL)
    for name in ("logp", "entropy", "hidden"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(packed.actions["target"], labelled(x, y).actions["target"])
    assert torch.equal(a.map_logits(lambda logits, at: logits), policy.scores(x))


def test_what_it_gives_is_a_softmax_regression():
    policy = made()
    x, y = points()
    logits = x @ policy.head.weight.detach().numpy().T
    logp = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    out = policy(labelled(x, y), ALL)
    assert out.logp.detach().numpy() == pytest.approx(logp[range(6), y], abs=1e-5)
    assert out.entropy.detach().numpy() == pytest.approx(-(np.exp(logp) * logp).sum(1), abs=1e-5)
    assert torch.equal(out.hidden, torch.from_numpy(x))
    (-out.logp.mean()).backward()
    error = np.exp(logp) - np.eye(4)[y]
    assert policy.head.weight.grad.numpy() == pytest.approx(error.T @ x / 6, abs=1e-6)


def test_gradients_of_a_network_agree_with_finite_differences():
    policy = made(depth=1).double()
    x, y = points()
    batch = normalise(labelled(x, y), "row")

    def loss(weight):
        out = torch.func.functional_call(policy, {"hidden.0.weight": weight}, (batch, NLL().needs))
        return NLL().loss(out, batch).total

    weight = policy.hidden[0].weight.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (weight,), eps=1e-6, atol=1e-5)


def test_a_linear_one_begins_at_the_uniform_law_and_a_deep_one_at_its_keys():
    x, y = points()
    linear = load_policy("classifier:features=3,classes=4")
    assert linear.logp(labelled(x, y)).numpy() == pytest.approx([-math.log(4)] * 6)
    deep = [load_policy("classifier:features=3,depth=1,width=5", Keys(s)) for s in (0, 0, 1)]
    assert deep[0].hidden[0].out_features == 5
    assert deep[0].fingerprint() == deep[1].fingerprint() != deep[2].fingerprint()
    wide = Classifier(400, 10, 1, 2000, Keys(0).torch())
    assert float(wide.hidden[0].weight.detach().std()) == pytest.approx((2 / 400) ** 0.5, rel=0.01)
    assert float(wide.head.weight.detach().std()) == pytest.approx((1 / 2000) ** 0.5, rel=0.02)


def test_numbers_survive_being_text_and_tokens():
    tokens = PointTokenizer(5, 3)
    x = np.array([0.0, 1e-30, -1 / 3, 3.4e38, 2.0], np.float32)
    ids = tokens.prompt(" ".join(map(str, x)))
    assert (tokens.point(ids) == x).all()
    assert tokens.decode(np.concatenate([ids, tokens.completion("2")])).split()[-1] == "2"
    assert tokens.decode(ids[2:]) == " ".join(map(str, x[2:]))


@pytest.mark.parametrize("depth", [0, 2])
def test_it_is_saved_and_loaded_without_pickle(depth, tmp_path):
    policy = made(depth)
    save_policy(policy, tmp_path / "p")
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == ["classifier.json", "classifier.safetensors"]
    again = load_policy(str(tmp_path / "p"))
    assert again.fingerprint() == policy.fingerprint()
    x, y = points()
    assert torch.equal(again.logp(labelled(x, y)), policy.logp(labelled(x, y)))
    (tmp_path / "p" / "classifier.json").write_text(json.dumps({"features": 4, "classes": 4, "depth": depth}))
    with pytest.raises(UserError, match="no classifier can be read from"):
        load_policy(str(tmp_path / "p"))


def test_the_engine_samples_classes_by_their_law():
    policy = made()
    with torch.no_grad():
        policy.head.weight.mul_(0.3)
    x, _ = points(1)
    agent = PolicyAgent(policy, limits=Limits(64))
    context = agent.tokenizer.prompt(" ".join(map(str, x[0])))
    calls = agent.generate([context] * 2000, [Keys(0).at(i) for i in range(2000)])
    assert {len(c.out) for c in calls} == {1}
    share = np.bincount([int(c.out[0]) for c in calls], minlength=4) / 2000
    wanted = policy.scores(x).softmax(-1)[0].numpy()
    assert share == pytest.approx(wanted, abs=0.04)
    assert calls[0].logp_raw[0] == pytest.approx(math.log(wanted[calls[0].out[0]]), abs=1e-5)
    best = agent.generate([context], [Keys(0)], law=Law(temperature=0.0))
    assert best[0].out[0] == wanted.argmax()


def test_groups_of_answers_are_judged_by_the_world():
    world = PointsWorld(points=20, test=5)
    policy = load_policy("classifier")
    groups = sample(
        {"actor": PolicyAgent(policy)},
        [world.problem("train", i) for i in range(20)],
        8,
        world.score,
        Clock(0, 1),
        Keys(0),
    )
    right = [m.correct == (m.text == g.problem.answer) for g in groups for m in g.members]
    assert all(right)
    assert 0.1 < np.mean([g.solved for g in groups]) < 0.4  # four classes, the uniform law


def test_it_learns_from_arrays_and_from_examples_alike():
    world = PointsWorld(points=32, test=8, features=3)
    x, y = world.arrays("train")
    tokens = PointTokenizer(3, 4)
    rows = [completion(tokens, p.prompt, p.answer, 4) for p in (world.problem("train", i) for i in range(32))]
    batches = labelled(x, y), Examples(rows).draw(0, 32, Keys(0))
    weights = []
    for batch in batches:
        policy = load_policy("classifier:features=3")
        seat = Seat(policy, Optim(lr=0.5, algorithm="sgd", clip=math.inf), 20)
        for _ in range(20):
            said = update(seat, [Term(normalise(batch, "row"), NLL())], Keys(0), Meter())
        weights.append(policy.head.weight.detach())
    assert torch.allclose(*weights, atol=1e-5)
    assert said["nll"] < 0.9 * math.log(4)


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda p: p.tokenizer.prompt("what is 2 + 2?"), "reads numbers parted by spaces, not 'what is 2"),
        (lambda p: p.tokenizer.prompt("1 2"), "reads points of 3 numbers, not 2 numbers: give it features="),
        (lambda p: p.tokenizer.prompt(({"role": "user", "content": "1 2 3"},)), "of 3 numbers, not messages"),
        (lambda p: p.tokenizer.completion("4"), "knows the classes 0 to 3, not '4'"),
        (lambda p: p.tokenizer.completion("-1"), "knows the classes 0 to 3"),
        (lambda p: p.tokenizer.observation("so?"), "answers once"),
        (lambda p: p(labelled(*points(features=5)), ALL), r"not inputs of shape \(6, 5\)"),
        (lambda p: p(labelled(*points()), frozenset({"values"})), "unknown need 'values'"),
        (lambda p: load_policy("classifier:classes=1"), "classes of at least 2"),
        (lambda p: load_policy("classifier:width=0"), "width of 'classifier' must be at least 1"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(act, said):
    with pytest.raises(UserError, match=said):
        act(made())


def test_a_row_that_is_too_short_is_refused():
    policy = made()
    row = pack([completion(PointTokenizer(2, 4), "1 2", "0", 9)])
    with pytest.raises(UserError, match="fewer before an action"):
        policy(row, ALL)


def test_a_method_for_text_learns_points_too(tmp_path):
    """Contextual bandits: a group of labels a point, rewarded where they are right."""
    run = train(
        "grpo", world="points", world_options={"points": 64, "condition": 1.0, "sharpness": 20.0}, policy="classifier",
        steps=40, problems=16, members=8, eval_every=0, eval_problems=200, out=tmp_path / "run",
        optim={"lr": 0.1, "algorithm": "adamw"},
    )  # fmt: skip
    with Store(run.folder, read_only=True) as store:
        before, after = (e["value"] for e in store.evaluations("accuracy"))
    assert before < 0.35
    assert after > before + 0.15
    assert load_policy(str(run.folder / "policy")).fingerprint()
