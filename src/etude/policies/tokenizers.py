"""Text to ids and back: characters for policies trained here, `transformers` for pretrained ones.

Both fulfil `experience.protocols.Tokenizer` and live as files in a checkpoint folder. Text that
cannot be written in a vocabulary is a value (a replacement id), never an exception.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from etude.experience.errors import UserError, missing
from etude.experience.types import Ids, Message, Prompt

if TYPE_CHECKING:
    from etude.experience.protocols import Tokenizer

CHAR_FILE = "etude_tokenizer.json"
CONTROL = ("<pad>", "<bos>", "<eos>", "<unk>", "<mask>")  # never come out of text
MARKERS = ("<m0>", "<m1>", "<m2>", "<m3>")  # single tokens that a method may give a meaning
ALPHABET = ("\n", *map(chr, range(32, 127)))
REPLACEMENT = "\ufffd"  # what <unk> decodes to


class CharTokenizer:
    """One id a character: control tokens (0..4), markers (5..8), newline and printable ASCII, words.

    `words` are further single tokens ("10", "11", ...), matched greedily, longest first; those that
    the alphabet already has add nothing. A character outside the vocabulary becomes `<unk>`, which
    decodes to U+FFFD; the other control tokens decode to nothing. Raises UserError on an empty word.
    """

    pad, bos, eos, unk, mask = range(5)
    notation = "compact"

    def __init__(self, words: Sequence[str] = ()) -> None:
        if "" in words:
            raise UserError("a tokenizer word may not be empty")
        known = (*CONTROL, *MARKERS, *ALPHABET)
        self.words = tuple(w for w in dict.fromkeys(words) if w not in known)
        self.tokens = (*known, *self.words)
        self.size = len(self.tokens)
        self.stops = frozenset({self.eos})
        self._id = {t: i for i, t in enumerate(self.tokens) if i >= len(CONTROL)}
        self._text = ["", "", "", REPLACEMENT, "", *self.tokens[len(CONTROL) :]]
        longest_first = sorted((*MARKERS, *self.words), key=len, reverse=True)
        self._split = re.compile("|".join([*map(re.escape, longest_first), "."]), re.DOTALL)

    def encode(self, text: str) -> Ids:
        """int32[T]."""
        return np.array([self._id.get(piece, self.unk) for piece in self._split.findall(text)], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; ids outside the vocabulary read as U+FFFD."""
        return "".join(self._text[i] if 0 <= i < self.size else REPLACEMENT for i in map(int, ids))

    def prompt(self, prompt: Prompt) -> Ids:
        """<bos> and the text. Chat messages are lines "role: content", and "assistant: " after
        them; a lone user message is the same as its text."""
        if not isinstance(prompt, str):
            if len(prompt) == 1 and prompt[0]["role"] == "user":
                prompt = prompt[0]["content"]
            else:
                prompt = "".join(f"{m['role']}: {m['content']}\n" for m in prompt) + "assistant: "
        return np.concatenate([[self.bos], self.encode(prompt)]).astype(np.int32)

    def completion(self, text: str) -> Ids:
        """The text and <eos>."""
        return np.concatenate([self.encode(text), [self.eos]]).astype(np.int32)

    def observation(self, text: str) -> Ids:
        """The text on lines of its own."""
        return self.encode(f"\n{text}\n")

    def save(self, folder: str | Path) -> None:
        """Writes `etude_tokenizer.json`."""
        text = json.dumps({"type": "char", "words": self.words}, ensure_ascii=False, indent=1)
        (Path(folder) / CHAR_FILE).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> CharTokenizer:
        """Reads what `save` wrote. Raises UserError on a file that is not such a one."""
        path = Path(folder) / CHAR_FILE
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["type"] != "char" or not all(isinstance(w, str) for w in data["words"]):
                raise ValueError
            return cls(data["words"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path} is not a tokenizer file: want {{"type": "char", "words": [...]}}') from None


class HFTokenizer:
    """A `transformers` tokenizer with its chat template, if it has one.

    With a template a string is one user message; without, contexts are the start token and text.
    `stops` are the end-of-text token and the token with which the template ends a turn. What lies
    between two turns is read off renderings of the template, so no output is tokenised twice.
    """

    notation = "natural"

    def __init__(self, tokenizer: Any) -> None:
        self.hf = tokenizer
        self.size = len(tokenizer)
        eos = tokenizer.eos_token_id
        self.chat = bool(tokenizer.chat_template)
        self._end = tokenizer.eos_token or ""  # what ends an assistant's turn
        self._between = ""  # what the template writes after it
        self._further = ("\n", "\n")  # what it writes around a further user message
        if self.chat:
            asked, reply, further = _SAMPLE
            tail = self._render((asked, reply)).rpartition(reply["content"])[2]
            if end := re.search("|".join(map(re.escape, tokenizer.all_special_tokens)) or "(?!)", tail):
                self._end, self._between = tail[: end.end()], tail[end.end() :]
            turn = self._render((asked, reply, further), answer=True).rpartition(reply["content"])[2]
            before, _, after = turn.removeprefix(self._end).partition(further["content"])
            self._further = (before, after)
        end_ids = self.encode(self._end)
        self.stops = frozenset(int(i) for i in (*end_ids[-1:], eos) if i is not None)
        self.pad = next((int(i) for i in (tokenizer.pad_token_id, eos) if i is not None), 0)
        self.mask: int | None = tokenizer.mask_token_id

    @classmethod
    def load(cls, path: str | Path) -> HFTokenizer:
        """The tokenizer in a Hugging Face folder or GGUF file. Raises UserError if there is none."""
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise missing("transformers", "hf", "reading a pretrained tokenizer") from None
        path = Path(path)
        try:
            where: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
            if path.is_file():
                return cls(AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, **where))
            return cls(AutoTokenizer.from_pretrained(path, **where))
        except Exception as error:  # whatever the library's parsers raise about a bad file
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"no tokenizer can be read from {path}: {reason}") from error

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's own files."""
        self.hf.save_pretrained(folder)

    def encode(self, text: str) -> Ids:
        """int32[T], without a start token; special tokens written out in the text become themselves."""
        return np.asarray(self.hf(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids` without special tokens."""
        kept = [int(i) for i in ids]
        return self.hf.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prompt(self, prompt: Prompt) -> Ids:
        """The template's rendering with the generation prompt; without a template the start token
        and the text, messages on lines of their own."""
        if self.chat:
            lone: Message = {"role": "user", "content": prompt if isinstance(prompt, str) else ""}
            messages = (lone,) if isinstance(prompt, str) else prompt
            return self.encode(self._render(messages, answer=True))
        text = prompt if isinstance(prompt, str) else "".join(m["content"] + "\n" for m in prompt)
        start = [] if self.hf.bos_token_id is None else [self.hf.bos_token_id]
        return np.concatenate([start, self.encode(text)]).astype(np.int32)

    def completion(self, text: str) -> Ids:
        """The answer as the template writes the last turn, up to the token that ends it."""
        if not self.chat:
            return self.encode(text + self._end)
        asked: Message = {"role": "user", "content": "-"}
        before = self._render((asked,), answer=True)
        answer: Message = {"role": "assistant", "content": text}
        whole = self._render((asked, answer))
        if not whole.startswith(before):  # a template that writes finished turns in another way
            return self.encode(text + self._end)
        return self.encode(whole[len(before) : len(whole) - len(self._between)])

    def observation(self, text: str) -> Ids:
        """A further user turn after the token that ended the assistant's, and the generation prompt."""
        before, after = self._further
        return self.encode(before + text + after)

    def _render(self, messages: Sequence[Message], answer: bool = False) -> str:
        try:
            return self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=answer)
        except ImportError:
            raise missing("jinja2", "hf", "a chat template") from None
        except Exception as error:  # whatever a template's own code raises about these messages
            roles = ", ".join(m["role"] for m in messages)
            raise UserError(f"the chat template refuses messages with roles {roles}: {error}") from None


_SAMPLE: tuple[Message, ...] = (
    {"role": "user", "content": "QUESTION"},
    {"role": "assistant", "content": "REPLY"},
    {"role": "user", "content": "FURTHER"},
)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder or GGUF file, of whichever kind it is."""
    if (Path(folder) / CHAR_FILE).is_file():
        return CharTokenizer.load(folder)
    return HFTokenizer.load(folder)
