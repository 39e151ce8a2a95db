"""Text data from files and memory: examples, pairs, problems, a world, and one clear line for bad data."""

import json

import pytest

from etude.experience.errors import UserError
from etude.experience.protocols import World
from etude.worlds.data import DataWorld, Example, Pair, load_examples
from etude.worlds.registry import load_world

USER = {"role": "user", "content": "hi"}
HO = {"role": "assistant", "content": "ho"}
HEY = {"role": "assistant", "content": "hey"}


def jsonl(path, rows) -> str:
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    return str(path)


# --- reading -------------------------------------------------------------------------------------


def test_completions(tmp_path) -> None:
    rows = [{"prompt": "2+2=", "completion": "4"}, {"prompt": [USER], "completion": [HO]}]
    expected = [Example("2+2=", "4"), Example((USER,), "ho")]
    assert load_examples(jsonl(tmp_path / "a.jsonl", rows)) == expected
    assert load_examples(rows) == expected
    mapped = [{"q": "é?", "a": "è"}]
    columns = {"prompt": "q", "completion": "a"}
    assert load_examples(jsonl(tmp_path / "b.jsonl", mapped), columns=columns) == [Example("é?", "è")]


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'\xef\xbb\xbf{"prompt": "a", "completion": "b"}\r\n\r\n{"prompt": "c", "completion": "d"}')
    assert load_examples(file) == [Example("a", "b"), Example("c", "d")]


def test_chats(tmp_path) -> None:
    rows = [{"messages": [USER, HO, USER, HEY]}]
    assert load_examples(jsonl(tmp_path / "a.jsonl", rows), "chat") == [Example((USER, HO, USER), "hey")]


def test_preferences() -> None:
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b"},
        {"prompt": [USER], "chosen": [HO], "rejected": [HEY]},
        {"chosen": [USER, HO], "rejected": [USER, HEY]},
    ]
    assert load_examples(rows, "preference") == [
        Pair("p", "a", "b"),
        Pair((USER,), "ho", "hey"),
        Pair((USER,), "ho", "hey"),
    ]


def test_problems() -> None:
    rows = [
        {"prompt": "p", "answer": 3, "category": "easy", "difficulty": 2, "hint": "h"},
        {"prompt": "q", "answer": "x"},
    ]
    first, second = load_examples(rows, "problem")
    assert (first.answer, first.category, first.difficulty, dict(first.meta)) == ("3", "easy", 2, {"hint": "h"})
    assert (second.prompt, second.category, second.difficulty) == ("q", "", None)


def test_parquet_and_datasets(tmp_path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": "d"}]
    expected = [Example("p", "c"), Example("q", "d")]
    made = datasets.Dataset.from_list(rows)
    made.to_parquet(str(tmp_path / "a.parquet"))
    made.save_to_disk(str(tmp_path / "saved"))
    assert load_examples(tmp_path / "a.parquet") == expected
    assert load_examples(tmp_path / "saved") == expected
    assert load_examples(made) == expected
    jsonl(tmp_path / "b.jsonl", rows[:1])
    assert load_examples(tmp_path) == [*expected, expected[0]]  # a folder: its files in order
    chats = datasets.Dataset.from_list([{"messages": [USER, HO]}])
    assert load_examples(chats, "chat") == [Example((USER,), "ho")]


# --- bad data ------------------------------------------------------------------------------------

GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"a.jsonl holds no rows"),
        (b"\n \n", r"a.jsonl holds no rows"),
        (GOOD + b'{"prompt": "a", \n', r"a.jsonl, line 2: not JSON"),
        (GOOD + b"\n" + b'{"prompt": "\xff"}\n', r"a.jsonl, line 3: not UTF-8 at byte 13"),
        (GOOD + b"[1]\n", r"line 2: should be a JSON object, not list"),
        (b"[" * 100_000 + b"\n", r"line 1: n(ested|ot JSON)"),
        (b'{"prompt": "a", "text": "b"}\n', r"line 1: no column 'completion'; it has: prompt, text"),
        (b'{"prompt": "a", "completion": null}\n', r"line 1: column 'completion' is empty"),
        (b'{"prompt": 3, "completion": "b"}\n', r"column 'prompt' should be text or a list of messages, not int"),
        (b'{"prompt": [], "completion": "b"}\n', r"column 'prompt' should be text"),
        (b'{"prompt": [{"role": "user"}], "completion": "b"}\n', r"needs a role and a content"),
    ],
)
def test_bad_files_are_one_clear_line(content: bytes, message: str, tmp_path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_examples(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "kind", "message"),
    [
        ([{"messages": [USER]}], "chat", "end with a reply of the assistant"),
        ([{"messages": "hi"}], "chat", "should be a list of messages, not str"),
        ([{"chosen": "a", "rejected": "b"}], "preference", "no column 'prompt'"),
        ([{"chosen": [USER, HO], "rejected": [HO, HEY]}], "preference", "differ in their last message only"),
        ([{"prompt": "p", "answer": ["x"]}], "problem", "'answer' should be text or a number, not list"),
        ([{"prompt": "p", "answer": "1", "difficulty": "hard"}], "problem", "'difficulty' should be a number"),
        ([3], "completion", "row 0: should be a mapping"),
        ([], "completion", "the data holds no rows"),
        ([{}], "completions", "did you mean completion"),
    ],
)
def test_bad_rows_are_one_clear_line(rows, kind, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_examples(rows, kind)


def test_bad_paths(tmp_path) -> None:
    (tmp_path / "a.csv").write_text("x")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 not at all")
    (tmp_path / "empty").mkdir()
    for path, message in (
        ("none.jsonl", "no such file"),
        ("a.csv", "end in .jsonl or .parquet"),
        ("a.parquet", "not a Parquet file"),
        ("empty", "no .jsonl or .parquet file in this folder"),
    ):
        with pytest.raises(UserError, match=message) as error:
            load_examples(tmp_path / path)
        assert "\n" not in str(error.value)


# --- the world -----------------------------------------------------------------------------------


def sums(n: int = 300) -> list[dict[str, object]]:
    return [{"prompt": f"{i}+{i}=", "answer": 2 * i, "category": "odd" if i % 2 else "even"} for i in range(n)]


def test_a_world_from_rows() -> None:
    world = DataWorld(sums(), verifier="numeric")
    assert isinstance(world, World)
    assert world.categories == ("even", "odd")
    train, test = ({world.problem(s, i).prompt for i in range(world.size(s))} for s in ("train", "test"))
    assert len(train) + len(test) == 300
    assert not train & test
    assert 10 <= len(test) <= 55  # a tenth
    problem = world.problem("train", 3, "odd")
    assert problem == DataWorld(sums(), verifier="numeric").problem("train", 3, "odd")
    assert problem.category == "odd"
    assert world.score(problem, f"Answer: {problem.answer}.0").correct
    assert not world.score(problem, "?").correct
    assert world.problem("test", len(test)) == world.problem("test", 0)


def test_equal_prompts_share_a_split() -> None:
    world = DataWorld([{"prompt": "same", "answer": i} for i in range(50)])
    assert sorted((world.size("train"), world.size("test"))) == [0, 50]


def test_a_world_from_a_path(tmp_path) -> None:
    path = jsonl(tmp_path / "sums.jsonl", [{"q": "1+1=", "a": "2"}])
    world = load_world(path, columns={"prompt": "q", "answer": "a"}, test=0.0, notation="compact")
    assert (world.name, world.size("train"), world.size("test")) == ("sums", 1, 0)
    assert load_world("data", path=path, columns={"prompt": "q", "answer": "a"}, test=0.0).size("train") == 1
    with pytest.raises(UserError, match="no test rows"):
        world.problem("test", 0)
    with pytest.raises(UserError, match="unknown split"):
        world.problem("dev", 0)
    with pytest.raises(UserError, match="did you mean verifier"):
        load_world(path, verifer="exact")
    with pytest.raises(UserError, match="share from 0 to 1"):
        DataWorld(sums(), test=2)
    with pytest.raises(UserError, match="no column 'prompt'; it has: q, a"):
        load_world(path)
