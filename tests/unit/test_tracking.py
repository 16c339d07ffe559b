"""W&B runs: one per folder, offline where they must be, with the axes that are said."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from lightning_mup.tracking import WandbRun, close, is_offline
from tests.unit.wandb_file import read_offline


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / ".netrc"))


def test_what_an_offline_run_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbRun(tmp_path, mode="offline", group="widths", job_type="muon", name="256", x_axis="flops")
    logger.log_hyperparams({"model.net.width": 256})
    logger.log_metrics({"train/loss": 2.5, "tokens": 10.0, "flops": 60.0}, step=4)
    logger.log_table("parametrization", columns=["role"], data=[["hidden"]])
    close([logger])
    found = read_offline(tmp_path)
    assert (found.run.run_id, found.run.display_name) == (logger.version, "256")
    assert (found.run.run_group, found.run.job_type, found.run.project) == ("widths", "muon", "lightning_mup")
    assert found.config["model.net.width"] == 256
    assert found.metrics["train/*"] == found.metrics["update/*"] == "flops"
    assert {"tokens", "flops"} <= set(found.metrics)
    row = next(row for row in found.history if "train/loss" in row)
    assert (row["train/loss"], row["tokens"], row["flops"], row["trainer/global_step"]) == (2.5, 10, 60, 4)
    assert list(tmp_path.rglob("*.table.json"))
    assert found.exited


def test_a_folder_has_one_run(tmp_path: Path) -> None:
    first, again = WandbRun(tmp_path / "a", mode="offline"), WandbRun(tmp_path / "a", mode="offline")
    other = WandbRun(tmp_path / "b", mode="offline")
    assert first.version == again.version != other.version


def test_runs_of_one_process_do_not_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in ("a", "b"):
        logger = WandbRun(tmp_path / name, mode="offline")
        logger.log_metrics({"train/loss": 1.0}, step=0)
        close([logger])
    ids = {read_offline(tmp_path / name).run.run_id for name in ("a", "b")}
    assert len(ids) == 2


def test_offline_without_an_account() -> None:
    assert is_offline("auto")


def test_offline_where_the_server_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # nobody listens at the discard port
    assert is_offline("auto")


def test_online_with_an_account_and_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert not is_offline("auto")


def test_account_in_netrc(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.getsockname()[1]}")
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / ".netrc").write_text("machine 127.0.0.1 login user password key\n")
        (tmp_path / "home" / ".netrc").chmod(0o600)
        assert not is_offline("auto")


@pytest.mark.parametrize(("mode", "offline"), [("online", False), ("offline", True), ("dryrun", True)])
def test_the_environment_decides(monkeypatch: pytest.MonkeyPatch, mode: str, offline: bool) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    assert is_offline("auto") is offline


def test_checkpoints_need_online(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoints=True needs W&B online"):
        WandbRun(tmp_path, mode="offline", checkpoints=True)


def test_misspelt_settings(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'offline'"):
        WandbRun(tmp_path, mode="ofline")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="did you mean 'tokens'"):
        WandbRun(tmp_path, mode="offline", x_axis="token")  # type: ignore[arg-type]
