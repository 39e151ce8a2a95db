"""Evidence files: what a claim's runs said, one JSON file a claim: `evidence/SLUG.json` and, for a method's claims in
further settings, `evidence/SLUG.WORD.json`.

Reading one trusts nothing in it: what is not an evidence file of this form is refused in a line.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import etude
from etude.experience.claims import Claim
from etude.experience.errors import UserError

FORMAT = 1
LINES = 4  # levels of a file that have lines of their own
DIGITS = 6  # significant ones that are kept
FIELDS: dict[str, type | tuple[type, ...]] = {
    "slug": str,
    "verdict": str,
    "note": str,
    "seeds": list,
    "minutes": (int, float),
    "claim": dict,
    "code": dict,
    "versions": dict,
    "machine": str,
    "items": dict,
    "arms": list,
    "endpoints": list,
}
ARM_FIELDS = ("name", "method", "role", "lr", "tuning", "runs", "curves")
ENDPOINT_FIELDS = ("name", "role", "metric", "arms", "margin", "estimate", "low", "high", "values", "holds", "why")
VERDICTS = ("reproduced", "not reproduced at this scale", "opposite", "undecided")


def evidence_folder(folder: str | Path | None = None) -> Path:
    """`folder`; by default ./evidence where there is one, else that of the checkout this package stands in."""
    if folder is not None:
        return Path(folder)
    here = Path("evidence")
    return here if here.is_dir() else Path(etude.__file__).parents[2] / "evidence"


def evidence_names(folder: str | Path | None = None) -> list[str]:
    """The names of the claims that have evidence."""
    return sorted(path.stem for path in evidence_folder(folder).glob("*.json"))


def read_evidence(slug: str, folder: str | Path | None = None) -> dict[str, Any] | None:
    """The evidence of a claim by its name (SLUG or SLUG.WORD), None where there is none.

    Raises UserError for a file that is cut off, of another format, of another method, or at odds with itself.
    """
    path = evidence_folder(folder) / f"{slug}.json"
    again = f"run `etude verify {slug}` again"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path} is cut off or no JSON: {again}") from None
    if not isinstance(record, dict):
        raise UserError(f"{path} should hold a JSON object: {again}")
    found = record.get("format")
    if found != FORMAT:
        age = "a newer etude: upgrade etude" if isinstance(found, int) and found > FORMAT else f"another etude: {again}"
        raise UserError(f"{path} has the format {found!r}, not {FORMAT}: it was written by {age}")
    if wrong := _wrong(record, slug):
        raise UserError(f"{path} {wrong}: {again}")
    return record


def write_evidence(record: Mapping[str, Any], folder: str | Path | None = None) -> Path:
    """Writes a record as `evidence/SLUG.json`, whole or not at all. Raises ValueError for one that could not be
    read back, UserError where the disk refuses."""
    if record.get("format") != FORMAT or (wrong := _wrong(record, str(record.get("slug")))):
        raise ValueError(f"this is no record of a claim: it {wrong}")
    home = evidence_folder(folder)
    path = home / f"{record['slug']}.json"
    write_json(path, record)
    return path


def write_json(path: Path, value: object) -> None:
    """Writes a JSON file whole or not at all, with numbers of DIGITS digits; those that JSON does not have become
    null. Raises UserError where the disk refuses."""
    scratch = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_text(_written(plain(value)) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def current(record: Mapping[str, Any], claim: Claim | None) -> bool:
    """Whether a record is of this claim, as it stands now."""
    return claim is not None and record["claim"] == plain(claim.plain())


def plain(value: Any) -> Any:
    """A value as JSON gives it back."""
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        rounded = float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
        return int(rounded) if rounded is not None and rounded.is_integer() else rounded
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value]


def _written(value: Any, depth: int = 0) -> str:
    """JSON with a line for every field, arm, run and endpoint, and what is below them on one line."""
    if depth == LINES or not isinstance(value, dict | list) or not value:
        return json.dumps(value)
    pad = " " * (depth + 1)
    if isinstance(value, dict):
        rows = [f"{pad}{json.dumps(name)}: {_written(inner, depth + 1)}" for name, inner in value.items()]
        return "{\n" + ",\n".join(rows) + "\n" + " " * depth + "}"
    return "[\n" + ",\n".join(f"{pad}{_written(inner, depth + 1)}" for inner in value) + "\n" + " " * depth + "]"


def _wrong(record: Mapping[str, Any], slug: str) -> str:
    """What is wrong with a record of this format, "" if nothing is."""
    for name, kind in FIELDS.items():
        if name not in record:
            return f"lacks {name!r}"
        if not isinstance(record[name], kind):
            return f"holds {name!r} as {type(record[name]).__name__}"
    if record["slug"] != slug:
        return f"is of the method {record['slug']!r}"
    if record["verdict"] not in VERDICTS:
        return f"has the verdict {record['verdict']!r}, which is none"
    seeds = record["seeds"]
    if len(set(map(str, seeds))) != len(seeds):
        return f"names a seed twice in {seeds}"
    claimed = [a.get("name") for a in record["claim"].get("arms", []) if isinstance(a, Mapping)]
    for part, fields in (("arms", ARM_FIELDS), ("endpoints", ENDPOINT_FIELDS)):
        for row in record[part]:
            lacks = next((f for f in fields if not isinstance(row, Mapping) or f not in row), None)
            if lacks:
                return f"lacks {lacks!r} in one of its {part}"
    named = [a["name"] for a in record["arms"]]
    for arm in [*named, *(str(side).partition(":")[0] for e in record["endpoints"] for side in e["arms"])]:
        if arm not in claimed:
            return f"names the arm {arm!r}, which its claim does not have"
    for arm in record["arms"]:
        if [run.get("seed") for run in arm["runs"]] != seeds:
            return f"has other seeds for the arm {arm['name']!r} than {seeds}"
    return ""
