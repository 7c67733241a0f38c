from __future__ import annotations

import pandas as pd
import pytest

from p0circuit.interventions.circuit import circuit_graph, owner
from p0circuit.interventions.nodes import InterventionError

EDGES = pd.DataFrame(
    [
        ("embed", "mlp.0", -0.5),
        ("mlp.0", "attn.1.0.k", -0.4),
        ("mlp.0", "attn.1.0.v", 0.3),
        ("mlp.0", "attn.1.1.k", 0.01),  # too small
        ("attn.0.0", "mlp.1", -0.9),  # large, but leads nowhere that is kept
    ],
    columns=["sender", "receiver", "effect"],
)


def test_what_is_large_and_leads_to_the_sink_heads_is_kept():
    graph = circuit_graph(EDGES, ["attn.1.0", "attn.1.1"], threshold=0.05)
    assert set(graph.edges) == {("embed", "mlp.0"), ("mlp.0", "attn.1.0")}
    assert graph.edges["mlp.0", "attn.1.0"]["inputs"] == {"attn.1.0.k": -0.4, "attn.1.0.v": 0.3}
    assert graph.edges["mlp.0", "attn.1.0"]["effect"] == pytest.approx(-0.1)
    assert "attn.1.1" in graph, "a sink head stays, also when nothing was found to reach it"


def test_inputs_belong_to_their_component():
    assert [owner(name) for name in ("attn.2.1.k", "attn.2.kv0.v", "attn.2.k", "sink.k", "mlp.3", "resid_post.1")] == [
        "attn.2.1",
        "attn.2.kv0",
        "attn.2",
        "sink",
        "mlp.3",
        "resid_post.1",
    ]


def test_bad_input_is_refused():
    with pytest.raises(InterventionError, match="above 0"):
        circuit_graph(EDGES, ["attn.1.0"], threshold=0.0)
    with pytest.raises(InterventionError, match=r"lacks \['effect'\]"):
        circuit_graph(EDGES.drop(columns="effect"), ["attn.1.0"], threshold=0.1)
