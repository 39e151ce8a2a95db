"""Reading and changing activations at named sites, on our transformer and on `transformers` models.

Sites: `embed` (token embeddings), `layers.{i}.attn` and `layers.{i}.mlp` (what a block adds to the
residual stream), `layers.{i}.resid` (the stream after layer i), `final` (after the last norm).
Activations are [T, D] packed on our models and [B, T, D] on `transformers` ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import count
from typing import Any

from torch import Tensor, nn

from etude.experience.errors import UserError

Tap = Callable[[Tensor], Tensor | None]

_SERIAL = count(1)
_LAYERS = ("layers", "h")  # what model families call their list of layers, and the sites beside and in it
_NAMES: dict[str, tuple[str, ...]] = {
    "embed": ("embed_tokens", "wte", "embed_in"),
    "final": ("norm", "ln_f", "final_layer_norm"),
    "attn": ("self_attn", "attn", "attention"),
    "mlp": ("mlp", "feed_forward"),
}


@contextmanager
def tapped(model: nn.Module, sites: Mapping[str, Tap], active: list[int]) -> Iterator[None]:
    """While open, `f(activation)` is called at each site; a tensor it returns takes the activation's
    place. `active` holds the serial numbers of the taps that are open, for fingerprints.

    Raises UserError for a site the model does not have.
    """
    hooks = [(site_module(model, site), f) for site, f in sites.items()]
    serial = next(_SERIAL)
    with ExitStack() as stack:
        for module, f in hooks:
            stack.callback(module.register_forward_hook(_hook(f)).remove)
        active.append(serial)
        stack.callback(active.remove, serial)
        yield


def site_module(model: nn.Module, site: str) -> nn.Module:
    """The module whose output is the activation at `site`."""
    modules = dict(model.named_modules())
    lists = (name for name, m in modules.items() if isinstance(m, nn.ModuleList))
    layers = next((name for name in lists if name.rpartition(".")[2] in _LAYERS), None)
    if layers is None:
        raise UserError(f"{type(model).__name__} has no list of layers to tap")
    root = layers.rpartition(".")[0]
    found: nn.Module | None = None
    if match := re.fullmatch(r"layers\.(\d+)\.(attn|mlp|resid)", site):
        layer = f"{layers}.{match[1]}"
        names = [layer] if match[2] == "resid" else [f"{layer}.{n}" for n in _NAMES[match[2]]]
        found = next((modules[n] for n in names if n in modules), None)
    elif site in ("embed", "final"):
        found = next((m for n in _NAMES[site] if (m := modules.get(f"{root}.{n}".lstrip("."))) is not None), None)
    if found is None:
        depth = len(list(modules[layers].children()))
        raise UserError(
            f"no site {site!r}: sites are embed, final, and layers.i.attn, layers.i.mlp, layers.i.resid "
            f"with i from 0 to {depth - 1}"
        )
    return found


def _hook(f: Tap) -> Callable[[nn.Module, Any, Any], Any]:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):  # transformers: (activation, attention weights, ...)
            new = f(output[0])
            return None if new is None else (new, *output[1:])
        return f(output)

    return hook
