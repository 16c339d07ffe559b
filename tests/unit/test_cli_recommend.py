"""`lightning-mup recommend`: each rule's number against its formula written out here, its range, and errors."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import pytest
import torch

from lightning_mup import train
from lightning_mup.cli import main
from lightning_mup.commands.horizon_rows import BATCH, DECAY, LR, Case, Row, rows, spread
from lightning_mup.commands.recommend import case_of
from lightning_mup.commands.words import configured
from lightning_mup.horizon import power_lr, power_plateau

Result = Callable[..., tuple[int, str, str]]
N, HIDDEN = 185_680_896, 134_217_728  # of llama_190m, from the reference's table
STEPS = 28_332  # 20 tokens per parameter
TOKENS = STEPS * 131_072
SMALL = ("model.net.width=128", "model.base.width=64", "budget.steps=500", "data.batch_size=32", "data.context=64")


@pytest.fixture
def lightning_mup(capsys: pytest.CaptureFixture[str]) -> Result:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return code, *capsys.readouterr()

    return run


def case(*words: str, base: Sequence[str] = ()) -> Case:
    return case_of(configured(list(words))[0], configured([*words, *base])[0])


def said(of: Case) -> dict[tuple[str, str], Row]:
    return {(row.quantity, row.rule): row for row in rows(of)}


# -- numbers ----------------------------------------------------------------------------------------------------------


def test_facts_of_the_reference_base() -> None:
    found = case("experiment=llama_190m", "method=adam")
    for facts in (found.run, found.base):
        assert (facts.params, facts.non_embedding_params) == (N, HIDDEN)
        assert (facts.steps, facts.tokens, facts.batch) == (STEPS, TOKENS, 128)
    assert (found.lr, found.weight_decay, found.base_weight_decay) == (4e-3, 2e-4, 2e-4)
    assert (found.method, found.rules, found.schedule, found.normalized) == ("adam", ("mup",), "linear", True)


def test_numbers_at_the_base_itself() -> None:
    found = said(case("experiment=llama_190m", "method=adam"))
    assert found[LR, "config"].value == 4e-3
    law = 1.79 * math.exp(-0.713 * math.log(HIDDEN) + 0.307 * math.log(TOKENS))
    assert found[LR, "step law, N of the base"].value == pytest.approx(law, rel=1e-12)
    assert found[LR, "step law, N of the run"].value == pytest.approx(law, rel=1e-12)
    assert found[LR, "power scheduler"].value == pytest.approx(128 * 4.6 / TOKENS**0.51, rel=1e-12)
    for rule in ("square-root batch", "linear batch", "1/sqrt(tokens)", "tokens^-0.32"):
        assert found[LR, rule].value == 4e-3  # nothing differs from the base
        assert found[LR, rule].how == "config x 1"
    assert found[BATCH, "config"].value == 131_072
    assert found[BATCH, "step law"].value == pytest.approx(0.58 * math.exp(0.571 * math.log(TOKENS)), rel=1e-12)
    assert found[DECAY, "config"].value == 2e-4
    assert found[DECAY, "EMA time scale"].value == pytest.approx(2e-4, rel=1e-12)
    lines = 1 / (1.08 * (TOKENS / N) ** -0.527 * STEPS)
    assert found[DECAY, "Power Lines"].value == pytest.approx(lines, rel=1e-12)


def test_base_is_the_model_of_the_base_at_its_own_length() -> None:
    """640M at 20 tokens per parameter against 190M at 20 of its own: horizon and decay rules have something to say."""
    of = case("experiment=llama_640m", "method=adam")
    large = 639_797_248
    steps = 20 * large // 131_072
    assert (of.run.params, of.run.steps, of.base.params, of.base.steps) == (large, steps, N, STEPS)
    found = said(of)
    ratio = steps / STEPS
    assert found[LR, "1/sqrt(tokens)"].value == pytest.approx(4e-3 / math.sqrt(ratio), rel=1e-12)
    assert found[LR, "tokens^-0.32"].value == pytest.approx(4e-3 * math.exp(-0.32 * math.log(ratio)), rel=1e-12)
    assert found[LR, "square-root batch"].value == 4e-3
    assert found[DECAY, "config"].value == pytest.approx(1e-4, rel=1e-12)  # 1/width: twice the width
    assert found[DECAY, "EMA time scale"].value == pytest.approx(2e-4 / ratio, rel=1e-12)
    small = 1.79 * HIDDEN**-0.713 * (steps * 131_072) ** 0.307
    assert found[LR, "step law, N of the base"].value == pytest.approx(small, rel=1e-12)
    assert found[LR, "step law, N of the run"].value == pytest.approx(small * 4**-0.713, rel=1e-12)  # 4x in hidden


def test_base_words_say_at_which_batch_and_length_it_was_tuned() -> None:
    base = ["data.batch_size=8", "budget.steps=100"]
    of = case(*SMALL, "method=adamw", "trainer.accumulate_grad_batches=2", base=base)
    assert of.run.tokens == 500 * 32 * 2 * 64
    assert (of.run.batch, of.base.batch, of.base.tokens) == (64, 16, 100 * 16 * 64)
    found = said(of)
    lr = of.lr
    assert found[LR, "square-root batch"].value == pytest.approx(2 * lr)
    assert found[LR, "linear batch"].value == pytest.approx(4 * lr)
    assert found[LR, "1/sqrt(tokens)"].value == pytest.approx(lr / math.sqrt(20))
    assert found[LR, "tokens^-0.32"].value == pytest.approx(lr * 20**-0.32)
    assert "batch is not the base's" in found[LR, "1/sqrt(tokens)"].outside
    alone = said(case(*SMALL, "method=adamw", base=["budget.steps=100"]))
    assert alone[LR, "1/sqrt(tokens)"].outside == ""


def test_time_scales_follow_the_policy() -> None:
    words = [*SMALL, "method=adamw", "weight_decay=timescale", "weight_decay.timescale=0.25"]
    found = said(case(*words, base=["budget.steps=100"]))
    assert found[DECAY, "config"].value == pytest.approx(1 / (0.25 * 500))
    assert found[DECAY, "EMA time scale"].value == pytest.approx(1 / (0.25 * 500))
    assert found[DECAY, "config"].how == "of hidden matrices; averages over 0.25 of the run"
    constant = said(case(*SMALL, "method=adamw", "weight_decay=constant", base=["budget.steps=100"]))
    assert constant[DECAY, "config"].value == 1e-4
    assert constant[DECAY, "EMA time scale"].value == pytest.approx(2e-5)
    assert constant[DECAY, "config"].how == "of hidden matrices; averages over 20 of the run"


def test_without_weight_decay_the_time_scale_has_nothing_to_keep() -> None:
    found = said(case(*SMALL, "method=adamw"))
    assert found[DECAY, "config"].value == 0
    assert math.isnan(found[DECAY, "EMA time scale"].value)
    assert found[DECAY, "EMA time scale"].cells()[2] == "-"
    assert found[DECAY, "EMA time scale"].how == "base no weight decay"


@pytest.mark.parametrize("tokens", [1e8, 3e10])
def test_power_law_of_the_rate_is_the_plateaus_inverse(tokens: float) -> None:
    assert power_plateau(power_lr(128, tokens), 128) == pytest.approx(tokens, rel=1e-9)
    assert power_lr(256, 4 * tokens) / power_lr(128, tokens) == pytest.approx(2 * 4**-0.51)
    with pytest.raises(ValueError, match=r"exponent must be < 0, got 0\.5"):
        power_lr(128, tokens, exponent=0.5)


def test_large_models_are_only_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = []
    build = train.model_of

    def model_of(config: object) -> torch.nn.Module:
        made = build(config)  # type: ignore[arg-type]
        devices.extend({str(p.device) for p in made.parameters()})
        return made

    monkeypatch.setattr(train, "model_of", model_of)
    case("experiment=llama_1.4b", "method=adam")
    assert set(devices) == {"meta"}


# -- ranges -----------------------------------------------------------------------------------------------------------


def test_what_is_outside_of_a_rules_range_says_why() -> None:
    small = said(case(*SMALL, "method=sgd", "rules=sp"))
    assert small[LR, "square-root batch"].outside == "update of sgd is not normalized"
    assert small[LR, "linear batch"].outside == ""
    assert re.fullmatch(r"optimizer is sgd; N is [\d.e+]+; D is [\d.e+]+", small[BATCH, "step law"].outside)
    assert small[LR, "power scheduler"].outside == "optimizer is sgd; rules are sp; schedule is linear"
    assert small[LR, "tokens^-0.32"].outside == "optimizer is sgd"
    muon = said(case("model=llama_190m", "method=muon_adam"))
    assert muon[LR, "linear batch"].outside == "update of muon_adam is normalized"
    assert muon[LR, "square-root batch"].outside == ""
    assert muon[DECAY, "Power Lines"].outside == "optimizer is muon_adam"
    adam = said(case("experiment=llama_190m", "method=adam", "schedule=wsd"))
    assert adam[LR, "power scheduler"].outside == adam[DECAY, "Power Lines"].outside == ""
    assert adam[LR, "step law, N of the base"].outside == ""
    assert adam[LR, "step law, N of the run"].outside == "mup scales with size by itself"
    plain = said(case("experiment=llama_190m", "method=adam", "rules=sp"))
    assert plain[LR, "step law, N of the run"].outside == ""


def test_every_row_names_its_source_and_range() -> None:
    for row in rows(case(*SMALL, "method=adamw", "weight_decay=width")):
        assert row.source
        assert row.holds or row.rule == "config"
        assert row.rule == "config" or "arXiv:" in row.source


# -- what is printed --------------------------------------------------------------------------------------------------


def test_table_and_spread_are_printed(lightning_mup: Result) -> None:
    code, out, err = lightning_mup("recommend", "model=llama_190m", "method=muon_adam", "data.batch_size=64")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].startswith("the run:  185,680,896 parameters (134,217,728 without embeddings), 2,048,000 tokens, ")
    assert "250 steps of 64 sequences" in lines[1]
    head = next(line for line in lines if line.startswith("of  "))
    config = next(line for line in lines if line.startswith("learning rate  config"))
    assert config.index("0.03125") == head.index("says")
    assert sum(line.startswith(("learning rate  ", "batch, tokens  ", "weight decay   ")) for line in lines) == 13
    assert "outside its range: optimizer is muon_adam" in out
    ends = re.fullmatch(
        r"learning rate: from ([\d.e-]+) \(.+\) to ([\d.e-]+) \(.+\), a factor of ([\d.e+]+);.*", lines[-3]
    )
    assert ends is not None
    least, most, factor = map(float, ends.groups())
    values = [row.value for row in rows(case("model=llama_190m", "method=muon_adam", "data.batch_size=64"))]
    rates = values[:8]
    assert (least, most) == (pytest.approx(min(rates), rel=1e-3), pytest.approx(max(rates), rel=1e-3))
    assert factor == pytest.approx(max(rates) / min(rates), rel=1e-2)


def row_of(value: float, rule: str = "a", outside: str = "") -> Row:
    return Row("lr", rule, value, "", "", "", outside)


def test_spread_names_ends_and_does_not_pretend() -> None:
    assert spread([row_of(0.1), row_of(0.3, "b"), row_of(0.2, "c")]) == ["lr: from 0.1 (a) to 0.3 (b), a factor of 3"]
    assert spread([row_of(0.1), row_of(0.3, "b", "far"), row_of(math.nan, "c")]) == [
        "lr: from 0.1 (a) to 0.3 (b), a factor of 3; of those not known to be outside their range 0.1 by a"
    ]
    assert spread([row_of(0.1, outside="far")]) == [
        "lr: 0.1 by a; of those not known to be outside their range there is none"
    ]
    assert spread([row_of(math.nan), row_of(0.0, "b")]) == ["lr: no rule has anything to go on"]
    assert spread([row_of(0.1), row_of(0.1, "b")]) == ["lr: 0.1 by a, b"]


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("method=muonn",), "did you mean 'muon'"),
        (("data.batchsize=3",), "did you mean"),
        (("method=adam", "--base", "data.batchsize=3"), "did you mean"),
        (("method=adam,muon",), "['method=adam,muon'] name a sweep"),
        (("sweep=width_lr",), "name a sweep; give the words of one run"),
        (("method=adam", "--base", "data.batch_size=8,16"), "['data.batch_size=8,16'] name a sweep"),
        (("budget.steps=null",), "budget must be exactly one of"),
        (("budget.tokens=1e6",), "budget must be exactly one of"),
        (("data.batch_size=0",), "data.batch_size must be a whole number >= 1, got 0"),
        (("data.context=1.5",), "data.context must be a whole number >= 1, got 1.5"),
        (("method.lr=0",), "method.lr must be positive, got 0"),
        (("model.base.widht=3",), "did you mean"),
        (("model.net.head_dim=3",), "head_dim"),
    ],
)
def test_errors_say_what_to_write(lightning_mup: Result, words: Sequence[str], message: str) -> None:
    code, out, err = lightning_mup("recommend", *words)
    assert (code, out) == (2, "")
    assert message in err
