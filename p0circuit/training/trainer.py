"""Train a small language model whose P0 sink can be studied, and keep its history.

1. Corpus -> tokenizer -> one long stream of tokens (`corpus.py`), cached beside the run.
2. A batch is a function of (seed, step) alone: each row is a first token (BOS, or one drawn uniformly), then a crop.
3. AdamW, warm-up, cosine decay. With the TNLM loss the prediction made at P0 is not trained (paper, v2, section on
   training methods), which frees that position to become a register.
4. Log-spaced checkpoints are kept as Hugging Face directories under `trace/`: the training trace.
5. Every `save_every` steps the whole state goes to disk; an interrupted run goes on from there with the same result.
6. At the end: the model, its losses as a table, and its card, with the command that makes it again.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from p0circuit import text
from p0circuit.errors import NotFiniteError, P0Error
from p0circuit.io import write_atomically, write_json
from p0circuit.models.architecture_edits import edit_hf_model, gates_of
from p0circuit.training import corpus
from p0circuit.training.card import write_card
from p0circuit.training.variants import TrainConfig, build_model


@dataclass
class TrainState:
    """The moving parts of a run: what has to be on disk for it to go on with the same result."""

    model: PreTrainedModel
    optimizer: torch.optim.AdamW
    step: int = 0
    log: list[dict[str, float]] = field(default_factory=list)


def checkpoint_steps(steps: int, count: int) -> list[int]:
    """About `count` log-spaced steps from 0 to `steps`, both included, no step twice."""
    if count == 1:
        return [steps]
    first = min(16, steps)
    spaced = np.geomspace(first, steps, count - 1)
    return sorted({0, *(round(float(step)) for step in spaced)})


def learning_rate_at(config: TrainConfig, step: int) -> float:
    """Linear warm-up, then a cosine from the peak down to `final_learning_rate` times the peak."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    floor = config.final_learning_rate
    return config.learning_rate * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def batch_at(config: TrainConfig, stream: np.ndarray, step: int, bos: int) -> Int[Tensor, "batch pos"]:
    """The rows of one step. They depend on (seed, step) alone, so that a resumed run sees the same data."""
    rng = np.random.default_rng([config.seed, step])
    starts = rng.integers(0, len(stream) - config.length, config.batch)
    rows = np.stack([stream[start : start + config.length] for start in starts]).astype(np.int64)
    with_bos = rng.random(config.batch) < config.bos_share
    drawn = rng.integers(0, config.vocab_size, config.batch)
    # A first token stands *before* the crop's text: the row keeps its length and loses its last token.
    replaced = with_bos | config.random_first
    first = np.where(with_bos, bos, drawn)
    rows[replaced] = np.concatenate([first[replaced, None], rows[replaced, :-1]], axis=1)
    return torch.from_numpy(rows)


def next_token_loss(
    logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"], loss_at_p0: bool = True
) -> Float[Tensor, ""]:
    """Mean cross-entropy in nats of the next token; without the prediction made at P0 it is the TNLM loss."""
    start = 0 if loss_at_p0 else 1
    predictions, targets = logits[:, start:-1], ids[:, start + 1 :]
    return torch.nn.functional.cross_entropy(predictions.flatten(0, 1).float(), targets.flatten())


def build_optimizer(config: TrainConfig, model: PreTrainedModel) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas)


def train_step(config: TrainConfig, state: TrainState, ids: Int[Tensor, "batch pos"]) -> float:
    """One update; returns the training loss in nats per token."""
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate_at(config, state.step)
    output = state.model(input_ids=ids, **({"output_router_logits": True} if config.experts else {}))
    loss = trained = next_token_loss(output.logits, ids, config.loss_at_p0)
    if config.experts:
        # Without it a few experts would do all the work. It is no part of the loss that is reported.
        trained = loss + config.router_loss * output.aux_loss
    state.optimizer.zero_grad(set_to_none=True)
    trained.backward()
    torch.nn.utils.clip_grad_norm_(state.model.parameters(), config.clip)
    state.optimizer.step()
    state.step += 1
    return loss.item()


@torch.no_grad()
def validation_loss(config: TrainConfig, model: PreTrainedModel, held_out: np.ndarray, batches: int = 8) -> float:
    """Mean loss in nats per token on fixed crops of the held-out files, rows made as in training.

    The prediction made at P0 is left out for every recipe, so that those with and without the TNLM loss compare.
    """
    fixed = replace(config, seed=1_000_003)
    model.eval()
    losses = []
    for number in range(batches):
        ids = batch_at(fixed, held_out, number, text.BOS_ID)
        losses.append(next_token_loss(model(input_ids=ids).logits, ids, loss_at_p0=False).item())
    model.train()
    return float(np.mean(losses))


def save_state(path: Path, state: TrainState) -> None:
    """Weights, optimizer moments, step and log in one safetensors file, written atomically."""
    tensors = {f"model.{name}": p.detach().contiguous() for name, p in state.model.named_parameters()}
    moments = state.optimizer.state_dict()["state"]
    for index, entry in moments.items():
        for name, value in entry.items():
            tensors[f"optimizer.{index}.{name}"] = value.contiguous()
    metadata = {"step": str(state.step), "log": json.dumps(state.log)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=metadata))


def load_state(path: Path, state: TrainState) -> None:
    """Put a saved run back into `state`, in place."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    with torch.no_grad():
        for name, parameter in state.model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, name = key.split(".")
            moments.setdefault(int(index), {})[name] = value
    groups = state.optimizer.state_dict()["param_groups"]
    state.optimizer.load_state_dict({"state": moments, "param_groups": groups})
    state.step = int(metadata["step"])
    state.log = json.loads(metadata["log"])


def save_model(directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None) -> None:
    """Write a Hugging Face directory in float16; the model itself is left as it is.

    The config comes last: a directory that has one is complete.
    """
    half = {name: tensor.to(torch.float16) for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        half.pop("lm_head.weight", None)
    config = model.config.to_dict() | {"dtype": "float16", "architectures": [type(model).__name__]}
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    write_atomically(directory / "model.safetensors", lambda path: save_file(half, path, metadata={"format": "pt"}))
    write_json(directory / "config.json", dict(sorted(config.items())))


def prepare_corpus(config: TrainConfig, out: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray, np.ndarray]:
    """The tokenizer and the training and held-out token streams, made once and kept in `out`/work.

    Raises:
        P0Error: the corpus has no files, or too few tokens for one row.
    """
    work = out / "work"
    kind, _, name = config.corpus.partition("hub:")
    if config.corpus == "python":
        files = text.corpus_files()
    elif name and not kind:
        files = text.dataset_rows(name)
    else:
        files = text.text_files(Path(config.corpus))
    training = [file for file in files if not file.held_out] or files
    held_out = [file for file in files if file.held_out] or files
    if not (work / "tokenizer").exists():
        tokenizer = corpus.train_tokenizer(corpus.tokenizer_sample(training), config.vocab_size)
        write_atomically(work / "tokenizer", lambda path: tokenizer.save_pretrained(path) and None)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    streams = []
    for name, part in (("training", training), ("held_out", held_out)):
        path = work / f"{name}.npy"
        if not path.exists():
            stream = corpus.token_stream(part, tokenizer)

            def write(temporary: Path, stream: np.ndarray = stream) -> None:
                with temporary.open("wb") as file:
                    np.save(file, stream)

            write_atomically(path, write)
        streams.append(np.load(path, mmap_mode="r"))
        if len(streams[-1]) <= config.length:
            raise P0Error(
                f"the {name} files of corpus {config.corpus!r} hold {len(streams[-1])} tokens; "
                f"expected more than one row of {config.length}"
            )
    return tokenizer, streams[0], streams[1]


def train(
    config: TrainConfig, out: Path, save_every: int = 500, on_step: Callable[[int, float], None] | None = None
) -> Path:
    """Train a model as `config` says and leave it in `out`, with its trace; returns `out`.

    A second call with the same arguments goes on where an interrupted one stopped, and gives the same weights. A
    finished run is left as it is.
    `on_step` is told (step, loss) after every step.

    Raises:
        P0Error: `out` holds a run of another configuration, or the corpus is too small.
        NotFiniteError: the loss is no longer a number.
    """
    out.mkdir(parents=True, exist_ok=True)
    recorded = out / "train_config.json"
    if recorded.exists() and read_config(recorded) != config:
        raise P0Error(f"{str(out)!r} holds a run of another configuration ({recorded.name}); choose an empty directory")
    if (out / "config.json").exists():
        # Written last of all: the run is finished.
        return out
    write_json(recorded, asdict(config))

    tokenizer, stream, held_out = prepare_corpus(config, out)
    model = build_model(config)
    if config.architecture_edits:
        edit_hf_model(model, config.architecture_edits, gates_of(model))
    state = TrainState(model, build_optimizer(config, model))
    saved = out / "work" / "state.safetensors"
    if saved.exists():
        load_state(saved, state)
    keep = set(checkpoint_steps(config.steps, config.checkpoints))
    model.train()
    loss = float("nan")
    while True:
        if state.step in keep and not any(row["step"] == state.step for row in state.log):
            save_model(out / "trace" / f"step-{state.step:06d}", model, None)
            tokens = state.step * config.batch * config.length
            row = {"step": state.step, "tokens": tokens, "train_loss": loss if state.step else None}
            row["validation_loss"] = validation_loss(config, model, held_out)
            state.log.append(row)
            save_state(saved, state)
        if state.step == config.steps:
            break
        loss = train_step(config, state, batch_at(config, stream, state.step, text.BOS_ID))
        if not math.isfinite(loss):
            raise NotFiniteError(
                f"the loss became {loss} at step {state.step}; lower the learning rate ({config.learning_rate})"
            )
        if on_step is not None:
            on_step(state.step, loss)
        if state.step % save_every == 0 and state.step not in keep:
            save_state(saved, state)
    write_log(out / "trace.csv", state.log)
    write_card(out, config, sum(parameter.numel() for parameter in model.parameters()))
    save_model(out, model, tokenizer)
    return out


def read_config(path: Path) -> TrainConfig:
    """The configuration of a run; fields that its version did not know yet have their defaults."""
    given: dict[str, Any] = json.loads(path.read_text())
    given["betas"] = tuple(given["betas"])
    return TrainConfig(**given)


def write_log(path: Path, log: list[dict[str, float]]) -> None:
    """The losses at the kept checkpoints, as CSV."""

    def write(temporary: Path) -> None:
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, log[0].keys())
            writer.writeheader()
            writer.writerows(log)

    write_atomically(path, write)
