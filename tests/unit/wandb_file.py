"""Read what a W&B run wrote offline: a log of protocol-buffer records in blocks of 32 KiB."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_HEADER, _BLOCK, _RECORD = 7, 32 * 1024, 7
_FULL, _FIRST, _LAST = 1, 2, 4


@dataclass
class Offline:
    """What an offline run holds."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, str] = field(default_factory=dict)  # name or pattern -> x-axis
    history: list[dict[str, Any]] = field(default_factory=list)
    exited: bool = False


def read_offline(folder: Path, patience: float = 20.0) -> Offline:
    """Return what the one ended offline run below a folder holds; W&B may still be writing it for a moment."""
    end = time.monotonic() + patience
    found = Offline()
    while not found.exited and time.monotonic() < end:
        time.sleep(0.05)
        paths = list(folder.rglob("*.wandb"))
        assert len(paths) <= 1
        found = _read(paths[0]) if paths else found
    return found


def _read(path: Path) -> Offline:
    found = Offline()
    for payload in _records(path.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(payload)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found.run = record.run
            found.config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            found.config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "metric":
            found.metrics[record.metric.name or record.metric.glob_name] = record.metric.step_metric
        elif kind == "history":
            items = record.history.item
            found.history.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
        elif kind == "exit":
            found.exited = True
    return found


def _records(content: bytes) -> Iterator[bytes]:
    at, parts = _HEADER, b""
    while at + _RECORD <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _RECORD:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + _RECORD])
        parts += content[at + _RECORD : at + _RECORD + length]
        at += _RECORD + length
        if kind in (_FULL, _LAST):
            yield parts
            parts = b""
