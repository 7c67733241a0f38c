"""Limits of the sink (C11): repeated tokens, prefixes, length, other text, windows, learned positions.

Sink heads are chosen on other samples. Each step changes one thing in the same rows. Where a sliding window would mask
P0, steps 1 to 4 use the first tokens of the rows, as many as the narrowest window holds.

1. *Repeated tokens.* The first token is repeated r times, over the tokens after it; r = 1 is the text itself, the last
   r is a row of one token. P0 counts as imitated from the smallest r at which the last copy (or the one at position 8,
   if that comes first) gets at least half of P0's score. *Control*: random tokens instead of the copies, all different
   and none of them the first token.
2. *The criterion.* The excess score in a row of one token (P0's score minus that of position 8, the same token) over
   that on the text. Where only tokens enter the stream (rotary positions, ALiBi, or none), equal tokens have equal
   streams at all positions, so at most a quarter may be left. With learned positions P0 differs whatever its token is,
   so at least half must be left. *Control*: rows of different tokens after the same first one.
3. *Prefix.* The text after m random tokens: the scores of the text's first token and of the new first token.
4. *Other text.* English, code, random tokens, of the same length.
5. *Length.* From 16 tokens up to the limit of context, texts and memory; longer rows are fewer.
6. *Windows.* Queries whose window has moved past P0, in the layers that have a window, all heads: their attention to P0
   must be 0. In the same rows: the attention of windowed sink heads to the oldest visible key (has the sink moved
   there?), and the attention of other sink heads to P0 from the same queries. The longest length counts.
Paper: sections on boundary cases; Gu et al. 2025 (arXiv 2410.10781) on repeated tokens and positions; Yona et al. 2025
(arXiv 2503.08908) on repeated tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from p0circuit import sink
from p0circuit.errors import P0Error
from p0circuit.experiments.base import Experiment, NotApplicable, is_large, second_half
from p0circuit.experiments.claim import Claim, Criterion
from p0circuit.experiments.conditions import text_like
from p0circuit.experiments.sink_under_study import StudiedSink, studied_sink
from p0circuit.hooked_model import HookedModel
from p0circuit.interventions.pairs import shifted_pair
from p0circuit.models import ModelInfo, describe
from p0circuit.models.vocabulary import sampleable_vocabulary
from p0circuit.prompts import SHIPPED_TEXTS, PromptSet, natural_text, random_tokens
from p0circuit.recording.batch_size import ATTENTION_COPIES
from p0circuit.recording.quantities import Batch, Quantity, score_at
from p0circuit.recording.record import record
from p0circuit.results import Result
from p0circuit.sink import CONTROL, uniform_excess
from p0circuit.stats import Interval, bootstrap, ratio_interval

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_ROTARY, _LEARNED = "excess_left_of_one_repeated_token", "excess_kept_with_learned_positions"
_HIDDEN = "attention_to_p0_from_queries_that_cannot_see_it"
# The attention of one row of the longest prompts may take this much memory.
_ROW_BYTES = 2 * 2**30
_ENDS = ("value", "low", "high", "n")


@dataclass(frozen=True)
class LimitsConfig:
    """Settings of `Limits`.

    Attributes:
        repetitions: numbers of copies of the first token.
        prefixes: numbers of random tokens before the text.
        lengths: tokens per row.
        samples: maximum number of prompts for a prefix, a length or another text.
        tokens: maximum number of tokens in all rows of a length.
    """

    repetitions: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    prefixes: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    lengths: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024, 2048)
    samples: int = 128
    tokens: int = 16_384


class Limits(Experiment[LimitsConfig]):
    """The sink under repeated tokens, prefixes, other texts, lengths and windows."""

    id = "limits"
    title = "The limits of the sink"
    config_type = LimitsConfig
    claim = Claim(
        id="C11",
        title="Limits",
        source="Peng et al., arXiv 2603.06591, boundary cases; Gu et al., arXiv 2410.10781, on repeated tokens",
        statement="One token from end to end has no sink where nothing tells positions apart, and keeps it with "
        "learned positions; a window that hides P0 has no sink at it.",
        measure="The excess score of sink heads on one token from end to end over that on text; the attention to P0 "
        "of queries whose window has moved past it.",
        criteria=(
            Criterion(_ROTARY, "<=", 0.25, if_measured=True),
            Criterion(_LEARNED, ">=", 0.5, if_measured=True),
            Criterion(_HIDDEN, "<=", 0, if_measured=True),
        ),
        control="Rows of the same length whose tokens are all different.",
    )

    def passes(self, model: HookedModel, prompts: PromptSet) -> float:
        """Declare the runs without position information and with windows."""
        config, rows, length, info = self.config, second_half(prompts), prompts.length, describe(model)
        scan_rows = min(rows, config.samples)
        repeated = 2 * (len(_counts(config.repetitions, length)) - 1) * rows * length
        prefixes = sum(scan_rows * (length + shift) for shift in config.prefixes if _fits(info, length + shift))
        texts = (1 + (len(SHIPPED_TEXTS) if model.tokenizer is not None else 0)) * scan_rows * length
        others = [other for other in config.lengths if CONTROL + 1 < other != length and _fits(info, other)]
        lengths = sum(_rows_of(other, scan_rows, config.tokens) * other for other in others)
        return (repeated + prefixes + texts + lengths) / (prompts.n * length)

    def quick(self, info: ModelInfo) -> Limits:
        """Return a version for large models with fewer samples and conditions."""
        if not is_large(info):
            return self
        lengths = (16, 32, 64, 128, 256, 512)
        return Limits(LimitsConfig((1, 2, 8), (1, 8, 32), lengths, samples=8, tokens=2048))

    def measure(self, model: HookedModel, prompts: PromptSet) -> Result:
        """Measure the sink under each change.

        Args:
            model: the model to measure.
            prompts: natural text.

        Raises:
            NotApplicable: there is no sink, or no query attends to both P0 and position 8.
        """
        import pandas as pd

        info = describe(model)
        in_view = min([prompts.length, *(window for window in info.window if window)])
        if in_view <= CONTROL + 1:
            raise NotApplicable(
                f"{in_view} tokens are in view at once; P0 and position {CONTROL}, which it is compared with, need at "
                f"least {CONTROL + 2}"
            )
        studied = studied_sink(model, _beginning(prompts, in_view))
        notes = [studied.note]
        if in_view < prompts.length:
            notes.append(f"a window of {in_view} would hide P0: all but the lengths are measured on {in_view} tokens")

        repeated, metrics = self._repetitions(model, studied, notes)
        fewer = studied.prompts.subset(slice(0, self.config.samples))
        prefixes = self._prefixes(model, fewer, studied)
        texts = self._texts(model, fewer, studied, prompts, notes)
        metrics |= {
            "excess_on_" + str(name).replace(" ", "_"): Interval(*values)
            for name, *values in texts[["text", "value", "low", "high", "n"]].itertuples(index=False)
        }
        lengths, windows = self._lengths(model, studied, prompts, notes)
        if windows:
            longest = max(windows)
            metrics |= {name: bootstrap(values) for name, values in windows[longest].items()}
            notes.append(f"windows: {longest} tokens, the window is {in_view}")
        tables = {
            "repetitions": repeated,
            "prefixes": prefixes,
            "texts": texts,
            "lengths": lengths,
        }
        if windows:
            rows = [
                (length, name, *bootstrap(values).to_json().values())
                for length, measured in windows.items()
                for name, values in measured.items()
            ]
            tables["windows"] = pd.DataFrame(rows, columns=["length", "quantity", *_ENDS])
        return Result(self.id, self.title, metrics, tables, notes=notes)

    def draw(self, result: Result) -> dict[str, Figure]:
        """Draw the scores by the number of copies, by the length of the prefix, and by the length of the text."""
        return {"limits": _sweeps(result.tables, result.model_title)}

    def _repetitions(
        self, model: HookedModel, studied: StudiedSink, notes: list[str]
    ) -> tuple[pd.DataFrame, dict[str, Interval]]:
        """Steps 1 and 2: the table, and the metrics of the criterion that is about this model's positions."""
        import pandas as pd

        prompts, learned = studied.prompts, describe(model).positions == "learned"
        counts = _counts(self.config.repetitions, prompts.length)
        others = different_tokens(model, prompts)
        rows, excess, imitated = [], {}, None
        for kind, fill in (("repeated", prompts.ids[torch.arange(prompts.n), prompts.p0, None]), ("different", others)):
            for count in counts:
                # The last copy; a copy after position 8 has few queries that could attend to it.
                copy = min(count - 1, CONTROL)
                positions = sorted({0, copy, CONTROL})
                scores = self._scores(
                    model, with_repeated_prefix(prompts, fill, count), studied, positions, f"{kind} {count}"
                )
                excess[kind, count] = scores[0] - scores[CONTROL]
                quantities = {"score of P0": scores[0], "excess": excess[kind, count]}
                if copy:
                    quantities["score of the last of them"] = scores[copy]
                    if kind == "repeated" and imitated is None and scores[copy].mean() >= scores[0].mean() / 2:
                        imitated = count
                rows += [(kind, count, name, *bootstrap(v).to_json().values()) for name, v in quantities.items()]
        all_of_it = prompts.length
        metrics = {
            (_LEARNED if learned else _ROTARY): ratio_interval(excess["repeated", all_of_it], excess["repeated", 1]),
            "excess_left_of_different_tokens": ratio_interval(excess["different", all_of_it], excess["repeated", 1]),
            "excess_on_one_repeated_token": bootstrap(excess["repeated", all_of_it]),
        }
        weak = [count for count in counts if 2 * excess["repeated", count].mean() <= excess["repeated", 1].mean()]
        notes += [
            f"P0 is imitated where its token stands {imitated} times or more: the last one has half of P0's score"
            if imitated
            else "P0 is never imitated: no copy of its token has half of P0's score",
            f"half of its excess score is gone where its token stands {weak[0]} times or more; from end to end "
            f"{metrics['excess_on_one_repeated_token']} is left, uniform attention would leave "
            f"{uniform_excess(all_of_it):.3f}"
            if weak
            else "however often its token stands there, more than half of its excess score stays",
        ]
        return pd.DataFrame(rows, columns=["tokens", "count", "quantity", *_ENDS]), metrics

    def _prefixes(self, model: HookedModel, prompts: PromptSet, studied: StudiedSink) -> pd.DataFrame:
        """Step 3."""
        import pandas as pd

        info = describe(model)
        rows = []
        for shift in (0, *self.config.prefixes):
            if not _fits(info, prompts.length + shift):
                continue
            shifted = shifted_pair(model, prompts, shift, prompts.seed).shifted if shift else prompts
            scores = self._scores(model, shifted, studied, [0, shift], f"prefix {shift}")
            for name, position in (("the text's first token", shift), ("the new first token", 0)):
                rows.append((shift, name, *bootstrap(scores[position]).to_json().values()))
        return pd.DataFrame(rows, columns=["prefix", "score_of", *_ENDS])

    def _texts(
        self, model: HookedModel, same: PromptSet, studied: StudiedSink, prompts: PromptSet, notes: list[str]
    ) -> pd.DataFrame:
        """Step 4: the excess score on each kind of text."""
        import pandas as pd

        size, special = sampleable_vocabulary(model)
        sets = {"the same text": same}
        for source in SHIPPED_TEXTS if model.tokenizer is not None else ():
            try:
                sets[source] = natural_text(model, source, same.n, same.length, prompts.seed)
            except P0Error as reason:
                notes.append(f"{source}: left out, {reason}")
        sets["random tokens"] = random_tokens(size, same.n, same.length, prompts.seed + 1, special=special)
        rows = []
        for name, text in sets.items():
            scores = self._scores(model, text, studied, [0, CONTROL], name)
            rows.append((name, *bootstrap(scores[0] - scores[CONTROL]).to_json().values()))
        return pd.DataFrame(rows, columns=["text", *_ENDS])

    def _lengths(
        self, model: HookedModel, studied: StudiedSink, prompts: PromptSet, notes: list[str]
    ) -> tuple[pd.DataFrame, dict[int, dict[str, np.ndarray]]]:
        """Steps 5 and 6: the scores by length, and the attention at lengths whose windows mask P0, by row."""
        import pandas as pd

        info, config = describe(model), self.config
        rows, windows, left_out = [], {}, {}
        for length in sorted({*config.lengths, prompts.length}):
            if length <= CONTROL + 1:
                left_out[length] = f"there is no position {CONTROL} with a query behind it"
            elif not _fits(info, length):
                left_out[length] = f"the context is {info.n_ctx} tokens"
            elif 4 * ATTENTION_COPIES * info.n_heads * length**2 > _ROW_BYTES:
                left_out[length] = "the attention of one row would not fit in memory"
            if length in left_out:
                continue
            count = _rows_of(length, min(config.samples, studied.prompts.n), config.tokens)
            try:
                text = _of_length(model, studied, prompts, length, count)
            except P0Error as reason:
                left_out[length] = str(reason)
                continue
            scores = self._scores(model, text, studied, [0, CONTROL], f"length {length}")
            for name, position in (("P0", 0), (f"position {CONTROL}", CONTROL)):
                rows.append((length, name, *bootstrap(scores[position]).to_json().values()))
            if any(window and window < length for window in info.window):
                windows[length] = self._masked(model, text, studied, info, length)
        for reason in dict.fromkeys(left_out.values()):
            which = ", ".join(str(length) for length, other in left_out.items() if other == reason)
            notes.append(f"length {which}: left out, {reason}")
        return pd.DataFrame(rows, columns=["length", "score_of", *_ENDS]), windows

    def _masked(
        self, model: HookedModel, text: PromptSet, studied: StudiedSink, info: ModelInfo, length: int
    ) -> dict[str, Float[np.ndarray, " sample"]]:
        """Step 6 at one length, for each row."""
        sizes = sorted({window for window in info.window if window and window < length})
        quantities = {size: blind_queries(size) for size in sizes}
        recording = record(model, text, list(quantities.values()), condition=f"length {length}")
        values = {size: recording[quantity].double().numpy() for size, quantity in quantities.items()}
        layers = [(layer, window) for layer, window in enumerate(info.window) if window in values]
        measured = {_HIDDEN: np.mean([values[w][:, layer, :, 0].mean(1) for layer, w in layers], axis=0)}
        oldest = [values[w][:, layer, head, 1] for layer, w in layers for at, head in studied.heads if at == layer]
        if oldest:
            measured["attention_of_windowed_sink_heads_to_the_oldest_key_in_view"] = np.mean(oldest, axis=0)
        # The same queries in the layers that see everything, judged by the narrowest window.
        free = [
            values[sizes[0]][:, layer, head, 0]
            for layer, head in studied.heads
            if (info.window[layer] or length) >= length
        ]
        if free:
            measured["attention_of_other_sink_heads_to_p0_from_the_same_queries"] = np.mean(free, axis=0)
        return measured

    def _scores(
        self, model: HookedModel, prompts: PromptSet, studied: StudiedSink, positions: Sequence[int], condition: str
    ) -> dict[int, Float[np.ndarray, " sample"]]:
        """The mean score of some positions, counted from P0, over the sink heads."""
        quantities = {position: score_at(position) for position in sorted(set(positions))}
        recording = record(model, prompts, list(quantities.values()), condition=condition)
        layers, heads = map(list, zip(*studied.heads, strict=True))
        return {
            position: recording[quantity].double()[:, layers, heads].mean(1).numpy()
            for position, quantity in quantities.items()
        }


def _counts(repetitions: Sequence[int], length: int) -> list[int]:
    """Numbers of copies of the first token: 1, those of the configuration that fit, and the length of the row."""
    return sorted({count for count in repetitions if count < length} | {1, length})


def _fits(info: ModelInfo, length: int) -> bool:
    """Whether so many tokens fit into the model's context."""
    return info.n_ctx is None or length <= info.n_ctx


def _rows_of(length: int, most: int, tokens: int) -> int:
    """The number of rows of a length: at most `most`, with at most so many tokens in all."""
    return max(1, min(most, tokens // length))


def blind_queries(window: int) -> Quantity:
    """Return the quantity [sample, layer, head, 2]: attention to P0, and to the oldest key in a window.

    Each is the mean over the queries that are at least `window` positions after P0.

    Args:
        window: size of the window, in tokens.
    """
    return Quantity(
        f"attention_of_queries_{window}_after_p0",
        ("attn.hook_pattern",),
        functools.partial(_blind_attention, window=window),
    )


def _blind_attention(pattern: Tensor, batch: Batch, window: int) -> Tensor:
    queries = torch.arange(pattern.shape[-1], device=pattern.device)
    precise = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    to_p0 = sink.attention_to(precise, batch.p0)
    oldest = (queries - window + 1).clamp(min=0).expand(*precise.shape[:2], -1)[..., None]
    to_oldest = precise.gather(-1, oldest).squeeze(-1)
    both = torch.stack([to_p0, to_oldest], dim=-1)
    blind = (queries >= batch.p0[:, None] + window).to(both)[:, None, :, None]
    return (both * blind).sum(2) / blind.sum(2)


def _beginning(prompts: PromptSet, length: int) -> PromptSet:
    """The first tokens of each row; the prompts themselves if they are not longer.

    Raises:
        NotApplicable: rows are padded, so they do not begin at the same column.
    """
    if length >= prompts.length:
        return prompts
    if not bool(prompts.attention_mask.all()):
        raise NotApplicable("these prompts are padded and longer than the model's window: give some without padding")
    description = {**prompts.description, "length": length, "beginning_of": prompts.fingerprint()}
    return PromptSet(prompts.ids[:, :length], prompts.attention_mask[:, :length], description, prompts.seed)


def with_repeated_prefix(prompts: PromptSet, fill: Tensor, count: int) -> PromptSet:
    """Replace the second to `count`-th token of each row.

    Args:
        prompts: the rows.
        fill: the new tokens, [sample, position] or [sample, 1].
        count: number of tokens at the beginning, the first included, after which the text is unchanged.
    """
    after = torch.arange(prompts.length) - prompts.p0[:, None]
    ids = torch.where((after > 0) & (after < count), fill, prompts.ids)
    return PromptSet(ids, prompts.attention_mask, {**prompts.description, "opened": count}, prompts.seed)


def different_tokens(model: HookedModel, prompts: PromptSet) -> Tensor:
    """Draw random tokens for each row, all different and none of them its first one.

    Args:
        model: the model, for its vocabulary. If it is smaller than the rows are long, tokens repeat.
        prompts: the rows; their seed is that of the draw.

    Returns:
        Token ids [sample, position].
    """
    size, special = sampleable_vocabulary(model)
    generator = torch.Generator().manual_seed(prompts.seed)
    order = torch.rand(prompts.n, size, generator=generator)
    first = prompts.ids[torch.arange(prompts.n), prompts.p0]
    # Special tokens and the first token get the largest keys, so they are drawn last.
    order[:, list(special)] = 2
    order[torch.arange(prompts.n)[first < size], first[first < size]] = 2
    tokens = order.topk(min(prompts.length, size), largest=False).indices
    return tokens.repeat(1, -(-prompts.length // tokens.shape[1]))[:, : prompts.length]


def _of_length(model: HookedModel, studied: StudiedSink, prompts: PromptSet, length: int, count: int) -> PromptSet:
    """Text like that of the prompts: their first tokens, or new text from the same source if they are shorter.

    Raises:
        P0Error: there is no text of this length.
    """
    if length <= studied.prompts.length:
        return _beginning(studied.prompts.subset(slice(0, count)), length)
    if length <= prompts.length:
        return _beginning(prompts.split()[1].subset(slice(0, count)), length)
    return text_like(model, prompts, length, count)


def _sweeps(tables: Mapping[str, pd.DataFrame], model: str) -> Figure:
    from p0circuit.figures.lines import sweeps
    from p0circuit.figures.style import Series

    repeated, prefixes, lengths = tables["repetitions"], tables["prefixes"], tables["lengths"]
    counts = list(repeated["count"].unique())

    def line(label: str, table: pd.DataFrame) -> Series:
        return Series(label, *(table[end].tolist() for end in ("value", "low", "high")))

    def of(label: str, tokens: str, quantity: str) -> Series:
        rows = repeated[(repeated["tokens"] == tokens) & (repeated["quantity"] == quantity)]
        return line(label, rows.set_index("count").reindex(counts))

    panels = {
        "First token repeated": (
            [
                of("excess of P0, copies", "repeated", "excess"),
                of("excess of P0, different tokens", "different", "excess"),
                of("score of the last copy", "repeated", "score of the last of them"),
            ],
            [*map(str, counts[:-1]), "all"],
        ),
        "Tokens put before the text": (
            [line(f"score of {name}", part) for name, part in prefixes.groupby("score_of", sort=False)],
            [str(prefix) for prefix in prefixes["prefix"].unique()],
        ),
        "Length": (
            [line(f"score of {name}", part) for name, part in lengths.groupby("score_of", sort=False)],
            [str(length) for length in lengths["length"].unique()],
        ),
    }
    x_labels = ["times it stands there", "random tokens", "tokens in a row"]
    return sweeps(panels, f"{model}: the limits of the sink", x_labels, "attention, mean over queries")
