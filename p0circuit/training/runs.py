"""Training runs as tables: what became of the circuit in each of the runs that come with the package.

data/traces/<variant>-<seed>.csv holds one line per checkpoint and kind of first token: what `p0circuit trace --table`
wrote, with `first` as its `--first`. The checkpoints themselves need not be there.
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

if TYPE_CHECKING:
    import pandas as pd

LENGTH = 64
"""Tokens of the prompts that the traces were measured on."""
_NEEDED = ("first", "step", "tokens", "loss", "excess", "norm_ratio", "concentration_causal", "induction_score")


@dataclass(frozen=True)
class Run:
    """One training run, seen on one kind of prompts.

    Attributes:
        variant: what was trained, as in `training.variants`.
        seed: of its weights and data.
        first: what stands at P0 of the prompts: "text", "bos" or "random".
        table: a line per checkpoint, by step.
    """

    variant: str
    seed: int
    first: str
    table: pd.DataFrame

    @property
    def name(self) -> str:
        return f"{self.variant}-{self.seed}"

    def __getitem__(self, column: str) -> Float[np.ndarray, " checkpoint"]:
        """A column of the table; NaN where there is no value."""
        return self.table[column].to_numpy(dtype=np.float64)

    @functools.cached_property
    def share(self) -> Float[np.ndarray, " checkpoint"]:
        """The share of the run's tokens that each checkpoint has seen.

        Where the trace does not tell tokens it is that of the run's steps: the same, if batches are of one size.
        """
        seen = self["tokens"] if np.isfinite(self["tokens"]).all() else self["step"]
        return seen / seen[-1]

    @functools.cached_property
    def formation(self) -> int | None:
        """The index of the checkpoint at which the sink has formed; None where there is no sink at the end."""
        return formation_index(self["excess"], least_excess(LENGTH))

    @property
    def formation_share(self) -> float:
        """The share of tokens by which the sink has formed; 1 where it has not, which is the least it can be."""
        return 1.0 if self.formation is None else float(self.share[self.formation])


def shipped_runs(folder: Path | None = None) -> list[Run]:
    """All runs in `folder` (those that come with the package if not given), on every kind of prompts, by name.

    Raises:
        P0Error: there are none, or a table lacks a column.
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
        if lacking := [name for name in _NEEDED if name not in table]:
            raise P0Error(f"{path} lacks {', '.join(lacking)}; make it with `p0circuit trace RUN --table`")
        for first, lines in table.groupby("first", sort=True):
            runs.append(Run(variant, seed, str(first), lines.sort_values("step").reset_index(drop=True)))
    return runs


def shipped_runs_by_first(name: str) -> dict[str, Run]:
    """The run of that name that comes with the package, by what stands at P0 of the prompts; empty if there is none."""
    return {run.first: run for run in shipped_runs() if run.name == name}


def variant_and_seed(path: Path) -> tuple[str, int]:
    """What the name of a run's table says.

    Raises:
        P0Error: it is not named <variant>-<seed>.csv.
    """
    variant, _, seed = path.stem.rpartition("-")
    if not variant or not seed.isdecimal() or path.suffix != ".csv":
        raise P0Error(f"{str(path)!r} is not named <variant>-<seed>.csv as a run's table is, as in bos-0.csv")
    return variant, int(seed)


def save_run(path: Path, table: pd.DataFrame) -> Path:
    """Put the lines of a trace, with their `first`, into a run's table, in the place of those that had the same.

    Raises:
        P0Error: as `variant_and_seed`.
    """
    import pandas as pd

    variant_and_seed(path)
    if path.is_file():
        kept = pd.read_csv(path)
        table = pd.concat([pd.DataFrame(kept[~kept["first"].isin(table["first"])]), table])
    text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return write_atomically(path, lambda temporary: temporary.write_text(text))


def as_trained(runs: Iterable[Run]) -> list[Run]:
    """Each run once, on prompts that begin as its training rows did: with BOS if all of them did, else with text.

    A variant that is none of the package's own is taken with BOS where it was measured so.
    """
    from p0circuit.training.variants import VARIANTS

    by_name: dict[str, dict[str, Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, {})[run.first] = run
    chosen = []
    for kinds in by_name.values():
        config = VARIANTS.get(next(iter(kinds.values())).variant)
        order = ("bos", "text", "random") if config is None or config.bos_share == 1 else ("text", "bos", "random")
        chosen.append(next(kinds[first] for first in order if first in kinds))
    return chosen


def of_variant(runs: Iterable[Run], variant: str) -> list[Run]:
    """The runs of one variant, by seed."""
    return sorted((run for run in runs if run.variant == variant), key=lambda run: run.seed)


def seeds_in_common(*groups: Sequence[Run]) -> list[tuple[Run, ...]]:
    """The runs of several variants side by side, for the seeds that all of them have."""
    by_seed = [{run.seed: run for run in group} for group in groups]
    return [tuple(runs[seed] for runs in by_seed) for seed in sorted(set.intersection(*map(set, by_seed)))]
