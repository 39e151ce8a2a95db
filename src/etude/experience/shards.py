"""A run's large arrays: append-only numbered files, read back through memory maps.

The store's database says how many bytes count; whatever lies behind them (a step that was being
written when the process died) is cut off when the run is opened again. All arrays of a step lie in one
shard, and equal contexts within a step are written once.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from etude.experience.errors import UserError
from etude.experience.types import NOTHING, RAW, Call, Ids, Law

SHARD_BYTES = 64 * 2**20  # a step that begins behind this many bytes begins a new shard
ALIGN = 4

Position = tuple[int, int]  # (shard, bytes of it that count)


class Shards:
    """The numbered files `000001.bin`, ... of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._shard, self._size = 1, 0  # where the step being written begins
        self._pending = bytearray()
        self._dirty: set[int] = set()  # shards flushed since the last sync
        self._shared: dict[bytes, int] = {}
        self._maps: dict[int, tuple[int, mmap.mmap]] = {}  # shard -> (inode, map)

    def path(self, shard: int) -> Path:
        """The file of a shard, whether it exists or not."""
        return self.folder / f"{shard:06d}.bin"

    # --- writing

    def begin(self, position: Position) -> None:
        """Begins a step at `position`, or in a new shard if that one is full."""
        self._shard, self._size = position
        if self._size >= SHARD_BYTES:
            self._shard, self._size = self._shard + 1, 0
        self._pending.clear()
        self._shared.clear()

    @property
    def shard(self) -> int:
        """The shard that holds the step being written."""
        return self._shard

    def put(self, *arrays: NDArray[Any]) -> int:
        """Adds arrays one behind the other and returns the offset of the first, a multiple of 4."""
        offset = self._size + len(self._pending)
        for array in arrays:
            self._pending += array.tobytes()
        self._pending += bytes(-len(self._pending) % ALIGN)
        return offset

    def put_once(self, array: NDArray[Any]) -> int:
        """Like `put`, but an array equal to an earlier one of this step is not written again."""
        data = array.tobytes()
        if data not in self._shared:
            self._shared[data] = self.put(array)
        return self._shared[data]

    def flush(self) -> Position:
        """Hands the step's bytes to the operating system; returns the position behind them.

        Raises OSError where they cannot be written and
        UserError if the shard is shorter than it should be.
        """
        if self._pending:
            fd = os.open(self.path(self._shard), os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                found = os.fstat(fd).st_size
                if found < self._size:
                    raise _cut_short(self.path(self._shard), found, self._size)
                data = bytes(self._pending)
                done = 0
                while done < len(data):
                    done += os.pwrite(fd, data[done:] if done else data, self._size + done)
            finally:
                os.close(fd)
            self._dirty.add(self._shard)
        return self._shard, self._size + len(self._pending)

    def sync(self) -> None:
        """Waits until all that was flushed is on the disk."""
        for path in [*(self.path(shard) for shard in sorted(self._dirty)), self.folder]:
            if path.exists():
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(fd)
                finally:
                    os.close(fd)
        self._dirty.clear()

    def discard(self, position: Position) -> None:
        """Takes back bytes that never counted, after a step that could not be written."""
        self._pending.clear()
        self._remove_after(position)
        path = self.path(position[0])
        if path.is_file() and path.stat().st_size > position[1] > 0:
            os.truncate(path, position[1])

    def rewind(self, position: Position) -> None:
        """Cuts back to an earlier position. Readers that hold a map of the longer file keep it: the
        file is replaced, since reading behind the end of a truncated one would kill them.

        Raises UserError if the shards end before `position`.
        """
        shard, size = position
        path = self.path(shard)
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise _cut_short(path, found, size)
        self._remove_after(position)
        if found > size > 0:
            part = path.with_suffix(".part")
            shutil.copyfile(path, part)
            os.truncate(part, size)
            os.replace(part, path)

    def _remove_after(self, position: Position) -> None:
        first = position[0] + (position[1] > 0)  # a shard of which nothing counts goes too
        for path in self.folder.glob("*.bin"):
            if path.stem.isdecimal() and int(path.stem) >= first:
                path.unlink()

    # --- reading

    def read(self, shard: int, offset: int, count: int, dtype: type) -> NDArray[Any]:
        """`count` values as a read-only view of the file; nothing is read until they are used.

        Raises UserError if the shard is missing or too short.
        """
        if count == 0:
            return np.empty(0, dtype)
        end = offset + count * np.dtype(dtype).itemsize
        path = self.path(shard)
        found = path.stat() if path.is_file() else None
        if found is None or found.st_size < end:
            raise _cut_short(path, found.st_size if found else 0, end)
        inode, mapped = self._maps.get(shard, (-1, None))
        if mapped is None or inode != found.st_ino or len(mapped) < end:
            with open(path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._maps[shard] = (found.st_ino, mapped)
        return np.frombuffer(mapped, dtype, count, offset)


def write_calls(shards: Shards, calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Puts the calls' arrays into the step being written; returns what `read_calls` needs, as JSON.

    Of a context only what differs from the call before (its context and output) is written, so a long
    conversation takes room in proportion to its length.
    """
    found: list[dict[str, Any]] = []
    before = np.empty(0, np.int32)
    for call in calls:
        context, out = np.asarray(call.context, np.int32), np.asarray(call.out, np.int32)
        keep = common_prefix(before, context)
        extras = {name: getattr(call, name) for name in ("weight", "pos", "branch")}
        given = [name for name, value in extras.items() if value is not None]
        blocks = [out, np.asarray(call.logp_raw, np.float32), np.asarray(call.logp_sampled, np.float32)]
        blocks += [np.asarray(extras[name], np.float32 if name == "weight" else np.int32) for name in given]
        entry: dict[str, Any] = {
            "agent": call.agent,
            "size": [len(context), len(out)],
            "keep": keep,
            "at": [shards.put_once(context[keep:]), shards.put(*blocks, np.asarray(call.author, np.int8))],
        }
        if call.law != RAW:
            entry["law"] = asdict(call.law)
        if call.stop != "stop":
            entry["stop"] = call.stop
        if call.tags:
            entry["tags"] = call.tags
        if given:
            entry["given"] = given
        found.append(entry)
        before = np.concatenate([context, out])
    return found


def read_calls(shards: Shards, shard: int, entries: Sequence[Mapping[str, Any]]) -> tuple[Call, ...]:
    """The calls that `write_calls` wrote, every array bit for bit."""
    calls: list[Call] = []
    for entry in entries:
        (c, t), (at_context, at) = entry["size"], entry["at"]
        keep = entry["keep"]
        context: Ids = shards.read(shard, at_context, c - keep, np.int32)
        if keep:
            context = np.concatenate([np.concatenate([calls[-1].context, calls[-1].out])[:keep], context])
        columns: dict[str, NDArray[Any]] = {}
        for name in ("out", "logp_raw", "logp_sampled", *entry.get("given", ())):
            count = c + t if name in ("pos", "branch") else t
            columns[name] = shards.read(shard, at, count, np.int32 if name in ("out", "pos", "branch") else np.float32)
            at += 4 * count
        columns["author"] = shards.read(shard, at, t, np.int8)
        law = entry.get("law")
        calls.append(
            Call(
                agent=entry["agent"],
                context=context,
                law=Law(**{**law, "tilt": tuple(law["tilt"])}) if law else RAW,
                stop=entry.get("stop", "stop"),
                tags=entry.get("tags", NOTHING),
                **columns,
            )
        )
    return tuple(calls)


def common_prefix(a: Ids, b: Ids) -> int:
    """How many ids two sequences share from their start."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def _cut_short(path: Path, found: int, expected: int) -> UserError:
    return UserError(f"{path} is damaged: it has {found} bytes and should have at least {expected}")
