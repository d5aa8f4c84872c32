"""Edge attribution patching: every edge's effect to first order, from a few forwards and one
backward."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from interp.circuits.methods.circuit_method import Found, Method
from interp.circuits.runs.edges import STREAM, Graph, Stream, detached
from interp.circuits.runs.paired_runs import PairedRuns
from interp.circuits.runs.slopes import Slopes, products
from interp.streams.backward import Rules


@dataclass(frozen=True)
class EAP(Method):
    """score(u → v) = Σ over positions of (u(x) − u(x')) · ∂m/∂(input of v), at the clean run, mean
    over prompts.

    u: the embedding, a head's z_h W_O,h, an MLP's output; x' is the corrupted twin. v: the queries,
    keys or values of a head, an MLP, the output. Scores are signed: above 0, the edge carries what
    speaks for the right answer. They are ranked by magnitude. (Syed et al. write the difference the
    other way round, the change that patching makes.)

    A head's `effect` is the sum of its outgoing edges, which is its `attribution` with mode
    "resample" (but for norms on branches, below). Its score is its strongest outgoing edge: the
    threshold at which it enters the circuit when edges are taken strongest first, as the paper
    does; so a head counts whose effects on several receivers cancel. Query heads that share keys
    and values share the receiver, "L2KV1".

    It takes three forwards and one backward, and one step back through norm and projection for each
    receiver.

    Where a norm stands between the heads and the stream (Gemma 2 and 3, OLMo 2), u(x) and u(x') of
    a head both go through it with its scale 1/σ held at the clean run, so that the heads of a
    layer still add up to what it writes; a factor on the branch (Granite) is in u. An MLP's u is
    what it adds to the stream, norm and all, in each run. There `effect` is the head's attribution
    with the scales of these norms held, not `attribution`'s, which lets them move.

    Raises `TapError` where the stream is not the sum of what heads and MLPs write.

    Misleads:
        It is of first order, and a head's score is its strongest edge by size: negative heads stand
        beside those that help. A path that goes through a norm or a softmax far from its clean
        value is misjudged. A norm on the branch is held, so what a head does to the norm's scale,
        and so to its neighbours, is left out.
    """

    name = "eap"
    title = "Edge attribution patching"
    summary = "gradient × change along every edge: one backward pass"
    reading = (
        "The strongest edge out of this head: what the metric would change, to first order, "
        "if it were patched."
    )
    effect_reading = (
        "The sum over all edges out of the head, in which paths may cancel: above 0 the head works "
        "for the right answer, below 0 against it."
    )
    formula = "max over v of |mean Σ (u(x) − u(x')) · ∂m/∂(input of v)|"
    citation = "Syed et al. 2023, arXiv 2310.10348, section 2"
    unit = "metric"

    def find(self, runs: PairedRuns) -> Found:
        stream = Stream(runs)
        return found(stream.graph, self.scores(runs, stream) / len(runs.prompts))

    def scores(self, runs: PairedRuns, stream: Stream) -> np.ndarray:
        """(senders, receivers): summed over the prompts."""
        return edge_scores(runs, stream, self.title)


def edge_scores(
    runs: PairedRuns, stream: Stream, what: str, rules: Rules | None = None
) -> np.ndarray:
    """(senders, receivers): Σ (u(x) − u(x')) · ∂m/∂(input of v) at the clean run, summed over the
    prompts; the derivative is that of `rules`, if given."""
    scores = np.zeros(stream.graph.allowed.shape)
    slopes = Slopes(stream)
    batches = slopes.batches()
    runs.expect(len(batches))
    for pairs in batches:
        _, corrupted = runs.run(pairs, corrupted=True, keep=STREAM)
        live = slopes.live(pairs, rules=rules)
        products(slopes, [live], detached(live.activations), corrupted, scores)
        runs.step(what)
    return scores


def found(graph: Graph, scores: np.ndarray) -> Found:
    """What edges' mean scores (senders, receivers) say of heads."""
    out = scores[graph.heads]  # (heads, receivers)
    return Found(np.abs(out).max(1), out.sum(1), edges=graph.table(scores))
