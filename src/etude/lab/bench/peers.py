"""The libraries that people use now, given our weights, prompts and lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from etude.experience.errors import missing
from etude.policies.lm import LM
from etude.policies.tokenizers import CharTokenizer
from etude.policies.zoo import save_policy


def transformers_model(lm: LM) -> Any:
    """The same network in `transformers`, in float32 and with its fastest attention here."""
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        raise missing("transformers", "bench", "comparing with transformers") from None
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with TemporaryDirectory() as scratch:
        save_policy(lm, Path(scratch) / "lm")
        return AutoModelForCausalLM.from_pretrained(Path(scratch) / "lm", dtype=torch.float32).eval()


def transformers_tokenizer(own: CharTokenizer) -> Any:
    """Characters as a `transformers` tokenizer; agrees with ours on text without control tokens and words."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    bos, eos, pad, unk = "<bos>", "<eos>", "<pad>", "<unk>"
    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(own.tokens)}, unk_token=unk))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    inner.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, own.bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=bos, eos_token=eos, pad_token=pad, unk_token=unk, padding_side="left"
    )


def generator(
    model: Any, contexts: Sequence[np.ndarray], tokens: int, stops: Sequence[int] = (), sample: bool = True
) -> Callable[[], list[list[int]]]:
    """`transformers.generate` on these contexts: a function that gives what each row wrote, up to its stop."""
    longest = max(map(len, contexts))
    ids = torch.zeros(len(contexts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, context in enumerate(contexts):  # padded on the left
        ids[row, longest - len(context) :] = torch.from_numpy(context.astype(np.int64))
        mask[row, longest - len(context) :] = 1
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "top_p": 1.0} if sample else {"do_sample": False}
    options |= {"eos_token_id": list(stops)} if stops else {"eos_token_id": None, "min_new_tokens": tokens}

    def run() -> list[list[int]]:
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=tokens, pad_token_id=0, **options)
        rows = out[:, longest:].tolist()
        return [row[: next((i + 1 for i, t in enumerate(row) if t in stops), len(row))] for row in rows]

    return run
