"""Say what each rule for batch size and length of training gives for a run, side by side."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig

from lightning_mup import train
from lightning_mup.budget import count
from lightning_mup.commands.horizon_rows import HEADER, Case, Facts, rows, spread
from lightning_mup.commands.words import configured
from lightning_mup.compose_errors import explain
from lightning_mup.core.decay_amount import Run
from lightning_mup.core.method import find_method
from lightning_mup.core.plan import aligned
from lightning_mup.core.spec import Role

EXAMPLE = (
    "examples: lightning-mup recommend experiment=llama_640m; lightning-mup recommend model=llama_190m method=adamw "
    "data.batch_size=512 budget.steps=null budget.tokens=4e9 --base data.batch_size=128 budget.tokens=1e9"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words that the command takes.

    Examples:
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parser.parse_args(["method=muon", "--base", "data.batch_size=64"]).base
        ['data.batch_size=64']
    """
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="the run: overrides of conf/train.yaml")
    what = "in which the run that was tuned differs, beside the size that model.base gives it"
    parser.add_argument("--base", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help=what)


def run(args: argparse.Namespace) -> int:
    """Print what each rule says, and how far they are apart; return 0.

    Raises:
        ValueError: the words do not compose, name a sweep, or the run has no length.
    """
    config, base = (_one(words) for words in ([*args.words], [*args.words, *args.base]))
    try:
        case = case_of(config, base)
    except HydraException as error:
        raise ValueError(explain(error, config=config)) from error
    found = rows(case)
    print(f"the run:  {case.run}\nits base: {case.base}\n")
    print("\n".join(aligned([HEADER, *(row.cells() for row in found)])))
    print("\n" + "\n".join(spread(found)))
    return 0


def case_of(config: DictConfig, base: DictConfig) -> Case:
    """Return what a run's configuration, and that of the run whose numbers it takes over, mean to the rules.

    Args:
        config: of the run.
        base: of the run that was tuned, at any size: its size becomes that of its ``model.base``.

    Raises:
        ValueError: a number is out of range, or there is no budget.
    """
    run, tuned = facts_of(config), facts_of(train.base_config(base))
    if not config.method.lr > 0:
        raise ValueError(f"method.lr must be positive, got {config.method.lr!r}; give the rate of the base")
    specs = [param.spec for param in train.plan_of(config).params]
    hidden = next((spec for spec in specs if spec.role is Role.HIDDEN), specs[0])
    method = find_method(config.method.optimizer)
    settings = {**method.defaults, **train.flattened(config.method.options)}
    decays = instantiate(config.weight_decay, _convert_="all") if config.weight_decay else None
    width = int(train.base_config(config).model.width)
    fractions = [decays.amount.fraction(_lengths(part, width)) if decays else 0.0 for part in (run, tuned)]
    return Case(
        run=run,
        base=tuned,
        method=method.name,
        rules=tuple(config.rules.names),
        schedule=str(config.schedule._target_).rpartition(".")[2],
        normalized=method.degree(hidden, settings) == 0,
        lr=float(config.method.lr),
        weight_decay=fractions[0] * (decays.policy.factor(hidden) if decays else 1.0),
        base_weight_decay=fractions[1],
    )


def facts_of(config: DictConfig) -> Facts:
    """Count a configuration's parameters, tokens and steps; nothing is allocated.

    Raises:
        ValueError: there is no budget, or a batch without tokens.
    """
    sizes = {
        "data.batch_size": config.data.batch_size,
        "data.context": config.data.context,
        "trainer.accumulate_grad_batches": config.trainer.accumulate_grad_batches,
    }
    for key, size in sizes.items():
        if not (isinstance(size, int) and size >= 1):
            raise ValueError(f"{key} must be a whole number >= 1, got {size!r}; give {key}=1 or more")
    shape = train.shape_of(config)
    extent = train.extent_of(config, config.data, shape)
    return Facts(
        params=count(shape),
        non_embedding_params=count(shape, embeddings=False),
        batch=extent.tokens_per_step // config.data.context,
        tokens_per_step=extent.tokens_per_step,
        steps=extent.steps,
    )


def _one(words: Sequence[str]) -> DictConfig:
    """Return the configuration of one run."""
    config, sweep = configured(words)
    parsed = OverridesParser.create().parse_overrides(list(words))
    swept = [str(word.input_line) for word in parsed if word.is_sweep_override()]
    if sweep is not None or swept:
        raise ValueError(f"{swept or list(words)} name a sweep; give the words of one run, without sweep=")
    return config


def _lengths(facts: Facts, width: int) -> Run:
    return Run(steps=lambda: facts.steps, width=lambda: width)
