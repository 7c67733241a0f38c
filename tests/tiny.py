"""A small untrained model with a tokenizer, as a Hugging Face directory: what the experiments and the commands run on.

Import the fixture into a `conftest.py`. Tests must leave the directory as it was.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

LAYERS, HEADS, KV_HEADS, D_MODEL = 3, 4, 2, 32


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory `tiny`: a Llama of 3 layers and 4 heads, and a byte-level BPE trained on the shipped texts."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from p0circuit.io import data_dir
    from p0circuit.training.corpus import train_tokenizer

    folder = tmp_path_factory.mktemp("models") / "tiny"
    texts = (path.read_text() for path in sorted((data_dir() / "prompts").glob("*/*.*")))
    tokenizer = train_tokenizer(texts, 384)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
