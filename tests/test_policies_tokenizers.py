"""Tokenizers: round trips, what ends a turn, and chats equal to the template of the whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from etude.experience.errors import UserError
from etude.policies.tokenizers import ALPHABET, CHAR_FILE, MARKERS, CharTokenizer, HFTokenizer, load_tokenizer

PRINTABLE = st.lists(st.sampled_from((*ALPHABET, *MARKERS))).map("".join)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The way of Qwen3: the last assistant turn is written with an empty thought, earlier ones without.
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<m0>' }}{% endif %}"
    "{{ m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def words_tokenizer(template: str | None = CHATML) -> HFTokenizer:
    """A byte-level `transformers` tokenizer made on the spot, with ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*letters, "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<m0>"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    hf.chat_template = template
    return HFTokenizer(hf)


@given(PRINTABLE)
def test_characters_round_trip_one_id_each_and_markers_one(text: str) -> None:
    tok = CharTokenizer()
    ids = tok.encode(text)
    assert len(ids) == len(text) - sum(text.count(m) * (len(m) - 1) for m in MARKERS)
    assert tok.decode(ids) == text


@given(st.text())
def test_any_text_encodes_and_what_is_unknown_shows(text: str) -> None:
    tok = CharTokenizer(words=("10", "100"))
    shown = "".join(c if c in ALPHABET else "\ufffd" for c in text)
    assert tok.decode(tok.encode(text)) == shown


@given(PRINTABLE)
def test_control_tokens_never_come_out_of_text(text: str) -> None:
    tok = CharTokenizer()
    ids = tok.encode("<bos><eos><pad><mask>" + text)
    assert ids.min(initial=99) >= len(("pad", "bos", "eos", "unk", "mask"))


def test_words_match_longest_first() -> None:
    tok = CharTokenizer(words=("1", "10", "100", "10"))
    assert tok.size == CharTokenizer().size + 2  # "1" is in the alphabet already
    assert [tok.tokens[i] for i in tok.encode("1001 10")] == ["100", "1", " ", "10"]
    assert [tok.tokens[i] for i in tok.encode("a<m1>b")] == ["a", "<m1>", "b"]


def test_contexts_completions_and_observations_of_characters() -> None:
    tok = CharTokenizer()
    assert tok.prompt("1+1").tolist() == [tok.bos, *tok.encode("1+1")]
    assert tok.prompt(({"role": "user", "content": "1+1"},)).tolist() == tok.prompt("1+1").tolist()
    chat = ({"role": "system", "content": "add"}, {"role": "user", "content": "1+1"})
    assert tok.decode(tok.prompt(chat)) == "system: add\nuser: 1+1\nassistant: "
    assert tok.completion("2")[-1] in tok.stops
    assert tok.decode(tok.observation("no")) == "\nno\n"
    assert tok.decode([tok.bos, *tok.encode("x"), tok.eos, 10**6, -1]) == "x\ufffd\ufffd"


def test_character_tokenizer_saves_and_loads(tmp_path: Path) -> None:
    tok = CharTokenizer(words=("ü", "42"))
    tok.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, CharTokenizer)
    assert again.tokens == tok.tokens
    for bad in ("{", "[]", json.dumps({"type": "bpe"}), json.dumps({"type": "char", "words": [1]})):
        (tmp_path / CHAR_FILE).write_text(bad)
        with pytest.raises(UserError, match="is not a tokenizer file"):
            CharTokenizer.load(tmp_path)
    with pytest.raises(UserError, match="empty"):
        CharTokenizer(words=("",))


def whole(tok: HFTokenizer, *contents: str) -> list[int]:
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return tok.hf.apply_chat_template(messages, tokenize=True, return_dict=False)


def test_pieces_laid_end_to_end_are_the_template_of_the_whole() -> None:
    """Less what the template writes after the end of the last turn. The same for SmolLM2: test_policies_zoo."""
    tok = words_tokenizer()
    one = np.concatenate([tok.prompt("1+1?"), tok.completion("It is 2.")]).tolist()
    assert whole(tok, "1+1?", "It is 2.")[: len(one)] == one
    assert one[-1] in tok.stops
    two = [*one, *tok.observation("-1?"), *tok.completion("1")]
    expected = whole(tok, "1+1?", "It is 2.", "-1?", "1")
    assert expected[: len(two)] == two
    assert tok.decode(expected[len(two) :]) == "\n"


def test_a_template_that_rewrites_finished_turns() -> None:
    tok = words_tokenizer(THINKING)
    assert tok.hf.decode(tok.completion("2")) == "<m0>2<|im_end|>"
    assert tok.hf.decode(tok.observation("3")) == "\n<|im_start|>user\n3<|im_end|>\n<|im_start|>assistant\n"


def test_without_a_template(tmp_path: Path) -> None:
    tok = words_tokenizer(template=None)
    assert tok.prompt("ab").tolist() == [tok.hf.bos_token_id, *tok.encode("ab")]
    assert tok.completion("c").tolist() == [*tok.encode("c"), tok.hf.eos_token_id]
    assert tok.stops == {tok.hf.eos_token_id}
    assert tok.decode(tok.observation("é")) == "\né\n"


def test_hf_tokenizer_saves_and_loads(tmp_path: Path) -> None:
    tok = words_tokenizer()
    tok.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert isinstance(again, HFTokenizer)
    assert again.stops == tok.stops
    assert again.prompt("a b").tolist() == tok.prompt("a b").tolist()


def test_what_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer can be read") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    refusing = "{{ raise_exception('only user messages') }}"
    with pytest.raises(UserError, match="the chat template refuses"):
        words_tokenizer(refusing)
