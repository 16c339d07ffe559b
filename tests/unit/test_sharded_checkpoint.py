"""A checkpoint takes its name from the one before only when it is whole, and at every moment there is one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from lightning_mup.strategies.sharded_checkpoint import last, load, replace


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "data").write_text(text)
    return path


def test_the_new_one_takes_the_name(tmp_path: Path) -> None:
    path, new = folder(tmp_path / "last.ckpt", "before"), folder(tmp_path / "new", "after")
    folder(tmp_path / "last.ckpt.old", "long before")
    replace(new, path)
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]
    assert (path / "data").read_text() == "after"


def test_a_job_that_dies_between_two_renames_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, new = folder(tmp_path / "last.ckpt", "before"), folder(tmp_path / "new", "after")
    rename = Path.rename

    def dies(self: Path, target: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", dies)
    with pytest.raises(KeyboardInterrupt):
        replace(new, path)
    found = last(path)
    assert found is not None
    assert (found / "data").read_text() == "before"
    monkeypatch.undo()
    replace(new, path)
    assert [found.name for found in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_file_of_weights_alone_is_not_gone_on_with(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    torch.save({"state_dict": net.state_dict()}, tmp_path / "weights.ckpt")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"holds the state of 0 optimizers, but 1 are to go on; give a checkpoint"):
        load(tmp_path / "weights.ckpt", net, [optimizer], strict=True, weights_only=True)
    assert load(tmp_path / "weights.ckpt", net, [], strict=True, weights_only=True) == {}
