"""The meter counts what it is told, and refuses what is no cost."""

import pytest

from etude.experience.errors import missing, unknown
from etude.experience.meter import KINDS, Meter


def test_charges_add_up_and_readings_subtract():
    meter = Meter()
    meter.charge("sampled", 3)
    before = meter.read()
    meter.charge("sampled", 2)
    meter.charge("flops", 1e18)
    assert meter["sampled"] == 5
    assert meter.since(before) == {**dict.fromkeys(KINDS, 0.0), "sampled": 2, "flops": 1e18}
    assert before["sampled"] == 3, "a reading does not change"


def test_state_comes_back():
    meter, other = Meter(), Meter()
    meter.charge("updates", 4)
    other.charge("judge", 1)
    other.load_state_dict(meter.state_dict())
    assert other.read() == meter.read()


@pytest.mark.parametrize(
    ("kind", "n", "message"),
    [
        ("tokens", 1, "unknown cost kind 'tokens'; kinds: sampled"),
        ("sampled", -1, "sampled=-1 is not a number of at least 0"),
        ("sampled", float("nan"), "sampled=nan is not"),
    ],
)
def test_what_is_no_cost_is_refused_and_not_counted(kind, n, message):
    meter = Meter()
    with pytest.raises(ValueError, match=message):
        meter.charge(kind, n)
    assert meter.read() == dict.fromkeys(KINDS, 0.0)


def test_errors_name_what_is_near_or_known():
    assert str(unknown("method", "grop", ["grpo", "sft"])) == "unknown method 'grop': did you mean grpo?"
    assert str(unknown("method", "zzz", ["grpo", "sft"])) == "unknown method 'zzz': known: grpo, sft"
    assert str(missing("peft", "hf", "LoRA")) == "LoRA needs the package peft: pip install 'etude[hf]'"
