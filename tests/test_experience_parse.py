"""What models write is taken apart without ever raising, in linear time."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.experience.parse import Parsed, answer, parse, tool_calls, verdict

PIECES = (
    "<think>", "</think>", "<answer>", "</answer>", "<answer", ">", "\\boxed{", "\\boxed", "{", "}", "\\{", "\\",
    "Answer:", "answer is", "**", "_", "$", ".", " ", "\n", '"', "'", '{"name": "f", "arguments": {}}', '"name":', "[",
    "verdict:", "Correct", "wrong", "5", "é", "\x00", "```json\n", "<tool_call>", ",", "is", "\t",
)  # fmt: skip
TEXTS = st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=25).map("".join)


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_nothing_raises_and_spans_hold_what_they_say(text):
    for parsed in (parse(text), answer(text), verdict(text)):
        assert isinstance(parsed, Parsed)
        assert parsed.ok == (parsed.why == "")
        assert parsed.fields.keys() == parsed.spans.keys()
        for name, values in parsed.fields.items():
            assert len(values) == len(parsed.spans[name])
            for value, (start, end) in zip(values, parsed.spans[name], strict=True):
                assert 0 <= start <= end <= len(text)
                assert text[start:end].lower() == value.lower()
    called = tool_calls(text)
    assert called.ok == (called.why == "")
    assert all(isinstance(a, dict) for a in called.fields["arguments"])
    assert all(text[a] == "{" and text[b - 1] == "}" for a, b in called.spans["name"])


@pytest.mark.parametrize(
    "piece", [*PIECES, "<answer><answer>", "<a ", "{{", '{"a":', "answer ", "answer **", "verdict  "]
)
def test_time_is_linear_in_hostile_text(piece):
    text = piece * (60_000 // len(piece))
    start = time.process_time()
    for function in (parse, answer, verdict, tool_calls):
        for end in ("", "}" * 1000, "</answer>"):
            function(text + end)
    assert time.process_time() - start < 3.0  # quadratic would take a minute


def test_tags():
    good = parse("<think> 1+1 </think>\n<answer>2</answer>")
    assert good.ok
    assert (good.last("think"), good.last("answer"), good.last("x", "?")) == ("1+1", "2", "?")
    assert parse('<score kind="a">[3,4]</score>', ("score",)).fields == {"score": ("[3,4]",)}
    assert parse("anything", ()).ok


@pytest.mark.parametrize(
    ("text", "why", "answers"),
    [
        ("<think>a</think>", "<answer> is missing", ()),
        ("<think>a</think><answer>2", "<answer> is not closed", ()),
        ("<think>a</think><answer>2</answer><answer>3</answer>", "<answer> comes 2 times", ("2", "3")),
        ("<answer>2</answer><think>a</think>", "<answer> does not follow </think>", ("2",)),
        ("<think>a<answer>2</answer></think>", "<answer> does not follow </think>", ("2",)),
        ("<think>a</think></answer>", "</answer> closes nothing", ()),
        ("<think>a</think><answer><answer>2</answer>", "<answer> is opened again before it is closed", ("2",)),
    ],
)
def test_tags_that_do_not_fit_are_read_all_the_same(text, why, answers):
    parsed = parse(text)
    assert (parsed.ok, parsed.why, parsed.fields["answer"]) == (False, why, answers)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<answer>4</answer> no: <answer> 5 </answer>", "5"),
        (r"<answer>so \boxed{7}</answer>", "7"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a \{ b}", r"a \{ b"),
        (r"\boxed{3} and \boxed{4", "3"),
        ("Answer: 3.5.", "3.5"),
        ("answer: 1\nFinal Answer: **2**", "2"),
        ("**Answer:** $x+1$", "x+1"),
        ("The answer is 12. Done", "12. Done"),
        ("The answer is: 12", "12"),
        ("Answer:\n\n  7\nbye", "7"),
        (r"Answer: 5, boxed \boxed{6}", "6"),
        ("<answer>5", None),
        ("the answers are many", None),
        ("", None),
    ],
)
def test_answers(text, expected):
    parsed = answer(text)
    assert parsed.last("answer") == expected
    assert parsed.ok == (expected is not None)


def test_an_empty_answer_is_found_but_not_ok():
    assert (answer("<answer> </answer>").ok, answer("<answer> </answer>").why) == (False, "the answer is empty")
    assert answer("Answer:").fields["answer"] == ("",)


@pytest.mark.parametrize(
    ("text", "words", "expected", "ok"),
    [
        ("Line 1 is wrong ... so the final answer is Correct.", ("correct", "wrong"), "correct", True),
        ("It seems correct at first. Verdict: wrong", ("correct", "wrong"), "wrong", True),
        ("It is incorrect.", ("correct", "wrong"), None, False),
        ("correct, no, wrong", ("correct", "wrong"), "wrong", False),
        (r"step 1 holds; \boxed{-1}", ("1", "-1"), "-1", True),
        (r"\boxed{1}", ("1", "-1"), "1", True),
        ("OK\nBAD", ("OK", "BAD"), "BAD", False),
        ("", (), None, False),
    ],
)
def test_verdicts(text, words, expected, ok):
    parsed = verdict(text, words)
    assert (parsed.last("verdict"), parsed.ok) == (expected, ok)


@pytest.mark.parametrize(
    ("text", "calls", "ok"),
    [
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>', [("add", {"a": 1})], True),
        ('x {"name": "f", "parameters": {}} y\n```json\n{"name": "g"}\n```', [("f", {}), ("g", {})], True),
        ('{"name": "f", "arguments": "{\\"q\\": \\"}\\"}"}', [("f", {"q": "}"})], True),
        ('[{"name": "f", "arguments": {"s": "{ not a brace"}}]', [("f", {"s": "{ not a brace"})], True),
        ('a set { 1, 2\nthen {"name": "f", "arguments": {}}', [("f", {})], True),
        ('{"name": "f", "arguments": {"inner": {"name": "g"}}}', [("f", {"inner": {"name": "g"}})], True),
        ('he said "{" and\n{"name": "f"}', [("f", {})], True),
        ('{"name": "f", "arguments": [1]}', [], False),
        ('{"name": 3}', [], False),
        ('{"name": "f"', [], False),
        ('{"other": 1}', [], False),
        ("", [], False),
    ],
)
def test_tool_calls(text, calls, ok):
    parsed = tool_calls(text)
    assert list(zip(parsed.fields["name"], parsed.fields["arguments"], strict=True)) == calls
    assert parsed.ok is ok
