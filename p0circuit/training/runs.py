"""Training runs as tables: one row per checkpoint.

`data/traces/<variant>-<seed>.csv` holds the table of a shipped run, written by `p0circuit trace --table`; its column
`first` is the option `--first` of that command. The checkpoints themselves need not be present.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from p0circuit.errors import P0Error
from p0circuit.io import data_dir, write_atomically
from p0circuit.sink import least_excess
from p0circuit.training.formation import formation_index
from p0circuit.training.variants import VARIANTS

if TYPE_CHECKING:
    import pandas as pd

LENGTH = 64
"""Tokens of the prompts that the tables were measured on."""
_REQUIRED = ("first", "step", "tokens", "loss", "excess", "norm_ratio", "concentration_causal", "induction_score")


@dataclass(frozen=True)
class Run:
    """One training run, measured on prompts with one kind of first token.

    Attributes:
        variant: name of the training configuration, as in `variants.VARIANTS`.
        seed: seed of its weights and batches.
        first: token at P0 of the prompts: "text" (the text's own), "bos" or "random".
        table: one row per checkpoint, by step; columns as in data/traces/README.md.
    """

    variant: str
    seed: int
    first: str
    table: pd.DataFrame

    @property
    def name(self) -> str:
        """Variant and seed, such as "bos-0"."""
        return f"{self.variant}-{self.seed}"

    def __getitem__(self, column: str) -> Float[np.ndarray, " checkpoint"]:
        """A column of the table, NaN where it has no value."""
        return self.table[column].to_numpy(dtype=np.float64)

    @functools.cached_property
    def share(self) -> Float[np.ndarray, " checkpoint"]:
        """Share of the run's tokens that each checkpoint has been trained on.

        It is the share of the run's steps where the table has no tokens; the two are equal for a constant batch size.
        """
        progress = self["tokens"] if np.isfinite(self["tokens"]).all() else self["step"]
        return progress / progress[-1]

    @functools.cached_property
    def formation(self) -> int | None:
        """Index of the checkpoint at which the sink has emerged; None if there is no sink at the end."""
        return formation_index(self["excess"], least_excess(LENGTH))

    @property
    def formation_share(self) -> float:
        """Share of the tokens by which the sink has emerged; 1, its lower bound, if there is no sink at the end."""
        return 1.0 if self.formation is None else float(self.share[self.formation])


def shipped_runs(folder: Path | None = None) -> list[Run]:
    """Read all runs in a folder, one for each kind of first token, by name.

    Args:
        folder: a folder of tables named <variant>-<seed>.csv; the shipped tables if None.

    Raises:
        P0Error: there are no tables, or one lacks a column.

    Example:
        runs = shipped_runs()
        print(runs[0].name, runs[0].formation_share)
    """
    import pandas as pd

    folder = folder or data_dir() / "traces"
    paths = sorted(folder.glob("*.csv"))
    if not paths:
        raise P0Error(f"no traces in {str(folder)!r}; expected <variant>-<seed>.csv as `p0circuit trace` makes them")
    runs = []
    for path in paths:
        table = pd.read_csv(path)
        variant, seed = variant_and_seed(path)
        if missing := [name for name in _REQUIRED if name not in table]:
            raise P0Error(f"{path} lacks {', '.join(missing)}; make it with `p0circuit trace RUN --table`")
        for first, rows in table.groupby("first", sort=True):
            runs.append(Run(variant, seed, str(first), rows.sort_values("step").reset_index(drop=True)))
    return runs


def shipped_runs_by_first(name: str) -> dict[str, Run]:
    """Return the shipped run of this name by first token of the prompts; empty if no such run is shipped.

    Args:
        name: variant and seed, as in "bos-0".
    """
    return {run.first: run for run in shipped_runs() if run.name == name}


def variant_and_seed(path: Path) -> tuple[str, int]:
    """Read variant and seed from the file name of a run's table.

    Args:
        path: path of the table.

    Raises:
        P0Error: the file is not named <variant>-<seed>.csv.
    """
    variant, _, seed = path.stem.rpartition("-")
    if not variant or not seed.isdecimal() or path.suffix != ".csv":
        raise P0Error(f"{str(path)!r} is not named <variant>-<seed>.csv as a run's table is, as in bos-0.csv")
    return variant, int(seed)


def save_run(path: Path, table: pd.DataFrame) -> Path:
    """Add the rows of a trace to a run's table; rows with the same `first` are replaced.

    Args:
        path: the file, named <variant>-<seed>.csv.
        table: rows of a trace, with a column `first`.

    Returns:
        `path`.

    Raises:
        P0Error: the file is not named <variant>-<seed>.csv.
    """
    import pandas as pd

    variant_and_seed(path)
    if path.is_file():
        stored = pd.read_csv(path)
        table = pd.concat([pd.DataFrame(stored[~stored["first"].isin(table["first"])]), table])
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return write_atomically(path, lambda temporary: temporary.write_text(text))


def as_trained(runs: Iterable[Run]) -> list[Run]:
    """Select, of each run, the prompts that begin as its training rows did.

    These are prompts after BOS if every training row began with BOS, and prompts without BOS otherwise. For variants
    that the package does not know, prompts after BOS are preferred.

    Args:
        runs: runs, each with one or several kinds of first token.

    Returns:
        Every run once.
    """
    by_name: dict[str, dict[str, Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, {})[run.first] = run
    selected = []
    for by_first in by_name.values():
        config = VARIANTS.get(next(iter(by_first.values())).variant)
        order = ("bos", "text", "random") if config is None or config.bos_share == 1 else ("text", "bos", "random")
        selected.append(next(by_first[first] for first in order if first in by_first))
    return selected


def of_variant(runs: Iterable[Run], variant: str) -> list[Run]:
    """Return the runs of one variant, by seed.

    Args:
        runs: runs of any variants.
        variant: name of the variant.
    """
    return sorted((run for run in runs if run.variant == variant), key=lambda run: run.seed)


def seeds_in_common(*groups: Sequence[Run]) -> list[tuple[Run, ...]]:
    """Match the runs of several variants by seed.

    Args:
        *groups: the runs of each variant.

    Returns:
        One tuple for each seed that all variants have, with a run of each variant.
    """
    by_seed = [{run.seed: run for run in group} for group in groups]
    return [tuple(runs[seed] for runs in by_seed) for seed in sorted(set.intersection(*map(set, by_seed)))]
