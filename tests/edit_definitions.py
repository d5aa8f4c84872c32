"""What every edit does to attention, as its formula says it: whole matrices in float64, nothing of
the toolkit but the edits' own parameters. Logits first, then weights, then z, in the order of the
edits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from interp import edits as E
from interp_hooks.edit import Edit
from interp_hooks.heads import Head

Tensor = torch.Tensor


@dataclass
class Attention:
    """One attention call: q (batch, heads, queries, d), k and v (batch, kv_heads, keys, d), who
    sees whom (batch, heads or 1, queries, keys), token positions (batch, …) from the first real
    token and slots of rows and columns."""

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    sees: Tensor
    q_token: Tensor
    k_token: Tensor
    q_slot: Tensor
    k_slot: Tensor
    scaling: float
    softcap: float | None = None
    sinks: Tensor | None = None
    window: bool = False  # the call's own sliding window
    last: int = 1  # the model's last layer
    hidden: Tensor | None = None  # (batch, queries, d_model), the stream that enters the layer
    #: positions (n,) → (n, d, d), how keys there were turned; None where they were not
    turn: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        self.repeat = self.q.shape[1] // self.k.shape[1]
        self.q, k, v = self.q.double(), self.k.double(), self.v.double()
        self.keys, self.values = (x.repeat_interleave(self.repeat, 1) for x in (k, v))
        s = self.scaling * (self.q @ self.keys.transpose(-1, -2))
        self.s = self.softcap * torch.tanh(s / self.softcap) if self.softcap else s
        self.sees = self.sees.expand(self.s.shape)
        sinks = torch.full((self.s.shape[1],), -torch.inf) if self.sinks is None else self.sinks
        self.sink = sinks.double()[None, :, None, None].expand(*self.s.shape[:3], 1)
        self.sigma: float | Tensor | None = None  # sigmoid attention with this offset

    @property
    def decode(self) -> bool:
        return self.s.shape[2] == 1 and int(self.q_slot[0]) > 0

    def softmax(self) -> Tensor:
        s = self.s.masked_fill(~self.sees, -torch.inf)
        if self.sigma is not None:
            return torch.sigmoid(s + self.sigma)
        a = torch.softmax(torch.cat([s, self.sink], -1), -1)[..., :-1]
        return a.nan_to_num(0.0)  # rows that see nothing

    def heads(self, edit: Any) -> list[int]:
        heads = edit.concerned
        return (
            list(range(self.s.shape[1]))
            if heads is None
            else [h.head for h in heads if h.layer == self.layer]
        )

    def where(self, keys: Any) -> Tensor:
        """(batch, 1, 1, keys) bool: the columns of a set of keys."""
        if isinstance(keys, Tensor):
            full = torch.nn.functional.pad(keys, (0, 1000))[:, self.k_slot]
            return full[:, None, None].expand(len(self.k_token), 1, 1, -1)
        token = self.k_token[:, None, None]
        if keys == "initial":
            return token == 0
        if isinstance(keys, E.Span):
            return (token >= keys.start) & (token < keys.stop)
        return torch.isin(token, torch.tensor(keys, dtype=torch.long))

    def rows(self, edit: Any) -> Tensor:
        """(batch, 1, queries, 1) bool."""
        token, queries = self.q_token[:, None, :, None], getattr(edit, "queries", None)
        if queries is None:
            return torch.ones_like(token, dtype=torch.bool)
        return (token >= queries[0]) & (token < (math.inf if queries[1] is None else queries[1]))


def number(edit: Any, values: Any, head: int, layer: int) -> float:
    if isinstance(values, dict):
        return next(float(v) for h, v in values.items() if (h.layer, h.head) == (layer, head))
    return float(values)


def chosen(
    x: Attention, edit: Any, old: Tensor, make: Callable[[int], Tensor], rows: Tensor | None = None
) -> Tensor:
    """`old` (batch, heads, queries, n) with make(head) (batch, queries, n) in the edit's heads and
    rows."""
    new, rows = old.clone(), x.rows(edit) if rows is None else rows
    for h in x.heads(edit):
        new[:, h] = torch.where(rows[:, min(h, rows.shape[1] - 1)], make(h), old[:, h])
    return new


# --- before the softmax
# -----------------------------------------------------------------------------------------


def temperature(x: Attention, edit: E.Temperature) -> None:
    n = (x.q_token + 1).clamp_min(1).double()[..., None]
    t = 1 + math.exp(-math.exp(edit.beta)) * n.log() if edit.rule == "ssa" else torch.ones_like(n)
    x.s = chosen(x, edit, x.s, lambda h: x.s[:, h] * t / number(edit, edit.tau, h, x.layer))


def paint(x: Attention, edit: E.PAINT) -> None:
    def raised(h: int) -> Tensor:
        s = x.s[:, h]
        return torch.where(
            x.where(edit.keys)[:, 0], s + number(edit, edit.alpha, h, x.layer) * s.abs(), s
        )

    last = torch.zeros_like(x.rows(edit))
    last[:, :, -1] = True
    x.s = chosen(x, edit, x.s, raised, last)


def seka(x: Attention, edit: E.SEKA) -> None:
    """k' = R (k + g M k), of keys that are R k."""
    keys, where = x.keys.clone(), x.where(edit.keys)[:, 0, 0]  # (batch, keys)
    tokens = x.k_token.expand(len(keys), -1)
    for head, matrix in zip(edit.heads, edit.matrices.double(), strict=True):
        if head.layer != x.layer:
            continue
        for b in range(len(keys)):
            for j in where.expand(len(keys), -1)[b].nonzero().flatten().tolist():
                place = tokens[b, j : j + 1].clamp_min(0)
                r = torch.eye(keys.shape[3]).double() if x.turn is None else x.turn(place)[0]
                k = keys[b, head.head * x.repeat, j]
                new = r @ ((r.T @ k) + float(edit.gain) * matrix @ (r.T @ k))
                keys[b, head.head * x.repeat : (head.head + 1) * x.repeat, j] = new
    x.keys = keys
    s = x.scaling * (x.q @ keys.transpose(-1, -2))
    x.s = x.softcap * torch.tanh(s / x.softcap) if x.softcap else s


def streaming_sees(x: Attention, sink: int, recent: int) -> Tensor:
    """Streaming visibility; layers with a window of their own keep it."""
    if x.window:
        return x.sees
    near = x.q_slot[:, None] - x.k_slot < recent
    first = (x.k_token[:, None, None] >= 0) & (x.k_token[:, None, None] < sink)
    return x.sees & (near | first)


def shown(x: Attention, edit: Any, there: Callable[[int, int, int, int], bool]) -> None:
    """Only keys for which there(sample, head, row, column) stay, in the edit's heads."""
    if x.window:
        return
    sees = x.sees.clone()
    for b, h, i, j in sees.nonzero().tolist():
        if h in x.heads(edit):
            sees[b, h, i, j] = there(b, h, i, j)
    x.sees = sees


def sharded(x: Attention, edit: E.Sharded) -> None:
    def there(b: int, h: int, i: int, j: int) -> bool:
        kv, token = h // x.repeat, int(x.k_token[b if len(x.k_token) > 1 else 0, j])
        recent = int(x.q_slot[i] - x.k_slot[j]) < edit.local
        return recent or token // edit.block % edit.stride == kv % edit.stride

    shown(x, edit, there)


def searched(q: Tensor, k: Tensor, n: int, keep: int, block: int, real: Tensor) -> set[int]:
    """HiP: what one head's queries (rows, d) find among the keys in columns 0 … n − 1."""
    count = math.ceil(keep / block)
    if n <= count * block:
        return set(range(n))
    ranges = [(i * n // count, (i + 1) * n // count) for i in range(count)]
    for _ in range(math.ceil(math.log2(math.ceil(n / count) / block) - 1e-9)):
        halves = [(a, (a + b + 1) // 2) for a, b in ranges]
        halves += [((a + b + 1) // 2, b) for a, b in ranges]

        def score(one: tuple[int, int]) -> float:
            a, b = one
            at = min((a + b) // 2, n - 1)
            return -math.inf if a >= b or not real[at] else float((q @ k[at]).max())

        ranges = sorted(halves, key=score, reverse=True)[:count]
    return {i for a, b in ranges for i in range(a, b)}


def hierarchical_topk(x: Attention, edit: E.HierarchicalTopk) -> None:
    found: dict[tuple[int, int, int], set[int]] = {}
    tokens = x.k_token.expand(len(x.q), -1)
    for b in range(x.q.shape[0]):
        for h in range(x.q.shape[1]):
            for start in range(0, x.q.shape[2], edit.block_q):
                q = x.q[b, h, start : start + edit.block_q]
                n = min(x.keys.shape[2], int(x.q_slot[start + len(q) - 1] - x.k_slot[0]) + 1)
                found[b, h, start // edit.block_q] = searched(
                    q, x.keys[b, h], n, edit.keep, edit.block_k, tokens[b] >= 0
                )

    def there(b: int, h: int, i: int, j: int) -> bool:
        near = int(x.q_slot[i] - x.k_slot[j]) < edit.recent or 0 <= tokens[b, j] < edit.sink
        return bool(near) or j in found[b, h, i // edit.block_q]

    shown(x, edit, there)


def streaming(x: Attention, edit: E.Streaming) -> None:
    if x.heads(edit):
        x.sees = streaming_sees(x, edit.sink, edit.recent)


def sigmoid(x: Attention, edit: E.SigmoidAttention) -> None:
    if edit.bias is not None:
        x.sigma = edit.bias
    elif edit.length is not None:
        x.sigma = -math.log(edit.length)
    else:
        x.sigma = -x.sees[:, :, -1:].sum(-1, keepdim=True).double().clamp_min(1).log()


def uniform(x: Attention, edit: E.Ablate) -> None:
    x.s = chosen(x, edit, x.s, lambda h: torch.zeros_like(x.s[:, h]))
    if x.sinks is not None:
        x.sink = chosen(x, edit, x.sink, lambda h: torch.full_like(x.sink[:, h], -torch.inf))


def mass(a: Tensor, where: Tensor) -> Tensor:
    return (a * where).sum(-1, keepdim=True)


def reweighed(x: Attention, a: Tensor, edit: Any, keys: Any, gain: Callable[[int], Any]) -> Tensor:
    rest = (1 - a.sum(-1, keepdim=True)) * (x.sinks is not None)  # the share of a sink logit

    def make(h: int) -> Tensor:
        new = torch.where(x.where(keys)[:, 0], gain(h) * a[:, h], a[:, h])
        return (new / (new.sum(-1, keepdim=True) + rest[:, h])).nan_to_num(0.0)

    return chosen(x, edit, a, make)


def scale_tokens(x: Attention, a: Tensor, edit: E.ScaleTokens) -> Tensor:
    return reweighed(x, a, edit, edit.keys, lambda h: float(edit.gain))


def spotlight(x: Attention, a: Tensor, edit: E.SpotLight) -> Tensor:
    keys = x.where(edit.keys)
    share = mass(a, keys)
    low = (share > 0) & (share < float(edit.target))
    gain = torch.where(low, float(edit.target) / share.where(low, 1), 1.0)
    return reweighed(x, a, edit, edit.keys, lambda h: gain[:, h])


def zero_tuning(x: Attention, a: Tensor, edit: E.ZeroTuning) -> Tensor:
    return reweighed(x, a, edit, "initial", lambda h: number(edit, edit.gamma, h, x.layer))


def moved(a: Tensor, donors: Tensor, receivers: Tensor, share: float) -> Tensor:
    freed, have = share * mass(a, donors), mass(a, receivers)
    new = torch.where(donors, (1 - share) * a, torch.where(receivers, a * (1 + freed / have), a))
    return torch.where(have > 0, new, a)


def move_mass(x: Attention, a: Tensor, edit: E.MoveMass) -> Tensor:
    receivers = x.where(edit.receivers)
    donors = x.where(edit.donors) & ~receivers
    return chosen(
        x, edit, a, lambda h: moved(a[:, h], donors[:, 0], receivers[:, 0], float(edit.share))
    )


def act(x: Attention, a: Tensor, edit: E.ACT) -> Tensor:
    counted = x.sees & (x.q_token >= 0)[:, None, :, None]
    count = counted.sum(2)
    received = (a * counted).sum(2) / count.clamp_min(1)  # (batch, heads, keys)
    n = (x.k_token >= 0).sum(-1)[:, None, None]
    limit = edit.alpha / n if edit.threshold is None else edit.threshold
    sinks = (received > limit) & (x.k_token > 0)[:, None] & (count >= edit.min_rows)
    return chosen(
        x, edit, a, lambda h: moved(a[:, h], sinks[:, h, None], ~sinks[:, h, None], 1 - edit.beta)
    )


def var(x: Attention, a: Tensor, edit: E.VAR) -> Tensor:
    if not edit.last_layer and x.layer == x.last:
        return a
    image, none = x.where(edit.image), torch.zeros_like(x.where(edit.image))
    sinks = [
        s.get(x.layer) if isinstance(s, dict) else s for s in (edit.text_sinks, edit.visual_sinks)
    ]
    text, visual = (none if s is None else x.where(s) for s in sinks)
    visual, text, rest = visual & image, text & ~image, image & ~visual
    code, share = edit.preset == "code", 1 - edit.p if edit.preset == "code" else edit.p
    whole, sunk = mass(a, image), mass(a, visual)
    looks = (whole >= edit.image_mass) & (
        (sunk <= edit.rho * whole) if code else (whole - sunk >= edit.rho * whole)
    )
    if isinstance(edit.image, Tensor):
        stop = torch.stack([(row.nonzero()[-1, 0] + 1) for row in edit.image])[:, None]
        rows = x.q_slot >= stop
    else:
        rows = x.q_token >= edit.image.stop
    gate = looks & rows.expand(len(a), -1)[:, None, :, None]
    return chosen(
        x, edit, a, lambda h: moved(a[:, h], (text | visual)[:, 0], rest[:, 0], share), gate
    )


def soft_pag(x: Attention, a: Tensor, edit: E.SoftPAG) -> Tensor:
    own = (x.q_slot[:, None] == x.k_slot) & x.sees

    def make(h: int) -> Tensor:
        u = number(edit, edit.u, h, x.layer) * own[:, h].any(-1, keepdim=True)
        return (1 - u) * a[:, h] + u * own[:, h]

    return chosen(x, edit, a, make)


def scale_heads(x: Attention, z: Tensor, edit: E.ScaleHeads) -> Tensor:
    gains = {(h.layer, h.head): float(g) for h, g in zip(edit.heads, edit.values, strict=True)}
    return chosen(x, edit, z, lambda h: z[:, h] * gains[x.layer, h])


def shift_heads(x: Attention, z: Tensor, edit: E.ShiftHeads) -> Tensor:
    by_head = dict(zip(edit.heads, edit.vectors, strict=True))
    return chosen(
        x, edit, z,
        lambda h: z[:, h] + edit.strength * torch.as_tensor(by_head[Head(x.layer, h)]).double(),
    )  # fmt: skip


def rotate_heads(x: Attention, z: Tensor, edit: E.RotateHeads) -> Tensor:
    by_head = dict(zip(edit.heads, edit.vectors, strict=True))

    def make(h: int) -> Tensor:
        v = torch.as_tensor(by_head[Head(x.layer, h)]).double()
        along = (z[:, h] * v).sum(-1, keepdim=True) / (v * v).sum() * v
        left = z[:, h] - edit.strength * along
        return left / left.norm(dim=-1, keepdim=True) * z[:, h].norm(dim=-1, keepdim=True)

    return chosen(x, edit, z, make).nan_to_num(0.0)


def zero(x: Attention, z: Tensor, edit: E.Ablate) -> Tensor:
    return z if edit.mode == "uniform" else chosen(x, edit, z, lambda h: torch.zeros_like(z[:, h]))


def vhr(x: Attention, z: Tensor, edit: E.VHR) -> Tensor:
    """In a prompt, with scope "decode", the last row alone."""
    if edit.scope == "decode" and not x.decode:
        made = vhr(x, z, replace(edit, scope="all"))
        return torch.cat([z[:, :, :-1], made[:, :, -1:]], 2)
    if edit.selected is not None:
        each = len(z) // len(edit.selected)
        new = z.clone()
        for sample, layer, head in edit.selected.nonzero().tolist():
            if layer == x.layer:
                new[sample * each : (sample + 1) * each, head] *= float(edit.alpha)
        return new
    return chosen(x, edit, z, lambda h: float(edit.alpha) * z[:, h])


def gate(x: Attention, z: Tensor, edit: E.Gate) -> Tensor:
    """The streaming half is of the weights before rules."""
    sees, x.sees = x.sees, streaming_sees(x, edit.sink, edit.recent)
    other = x.softmax() @ x.values
    x.sees = sees
    new = z.clone()
    for h in range(z.shape[1]):
        kv = h // x.repeat
        if isinstance(edit.alpha, dict):
            a = next(
                (float(v) for g, v in edit.alpha.items() if (g.layer, g.head) == (x.layer, kv)), 1.0
            )
        else:
            a = float(
                edit.alpha[x.layer, kv]
                if isinstance(edit.alpha, Tensor) and edit.alpha.ndim
                else edit.alpha
            )
        new[:, h] = a * z[:, h] + (1 - a) * other[:, h]
    return z if x.window else new


def softplus(x: Attention, z: Tensor, edit: E.SoftplusReweight) -> Tensor:
    q, k = (t / t.norm(dim=-1, keepdim=True) for t in (x.q, x.keys))
    n = x.sees.sum(-1, keepdim=True).double()
    a = (
        torch.nn.functional.softplus(
            math.log(q.shape[-1]) * n.clamp_min(1).log() * (q @ k.transpose(-1, -2))
        )
        * x.sees
    )
    a = (a / a.sum(-1, keepdim=True)).nan_to_num(0.0)
    if edit.power is not None:
        a = torch.relu(n * a - 1) ** edit.power * (n >= 4) * x.sees
        a = (a / a.sum(-1, keepdim=True)).nan_to_num(0.0)
    return chosen(x, edit, z, lambda h: a[:, h] @ x.values[:, h])


def head_gate(x: Attention, z: Tensor, edit: E.HeadGate) -> Tensor:
    heads = z.shape[1]
    shared = math.ceil(edit.shared * heads)
    keep = math.ceil(edit.keep * heads) if isinstance(edit.keep, float) else edit.keep
    new, norms = z.clone(), x.q.norm(dim=-1)  # (batch, heads, queries)
    for h in range(shared, heads):
        longer = (norms[:, shared:] > norms[:, h : h + 1]).sum(1)  # (batch, queries)
        new[:, h] = torch.where((longer < keep)[..., None], z[:, h], 0)
    return new


def routed_heads(x: Attention, z: Tensor, edit: E.RoutedHeads) -> Tensor:
    """A token at a time: MoH §3.2."""
    assert x.hidden is not None
    heads, new = z.shape[1], z.clone()
    shared = math.ceil(edit.shared * heads)
    keep = math.ceil(edit.keep * heads) if isinstance(edit.keep, float) else edit.keep
    w = edit.weights[x.layer].double()
    for b in range(z.shape[0]):
        for i in range(z.shape[2]):
            t = x.hidden[b, i].double()
            t = t / (t.square().mean() + 1e-6).sqrt()
            ours, score, side = (w[rows] @ t for rows in (
                slice(shared), slice(shared, heads), slice(heads, None)))  # fmt: skip
            best = sorted(range(heads - shared), key=lambda j: -float(score[j]))[:keep]
            total = sum(math.exp(float(score[j])) for j in best)
            a, c = 2 * torch.softmax(side, 0) if shared else torch.ones(2).double()
            for h in range(heads):
                if h < shared:
                    g = float(a) * shared * float(torch.softmax(ours, 0)[h])
                    g = 1.0 if edit.straight else g
                elif h - shared in best:
                    g = float(c) * len(best) * math.exp(float(score[h - shared])) / total
                    g = 1.0 if edit.straight else g
                else:
                    g = 0.0
                new[b, h, i] = g * z[b, h, i]
    return new


def overwrite_row(x: Attention, z: Tensor, edit: E.OverwriteRow) -> Tensor:
    new = z.clone()
    for b in range(len(z)):
        queries, keyed = x.q_token.expand(len(z), -1)[b], x.k_token.expand(len(z), -1)[b]
        query = edit.query[b] if isinstance(edit.query, list) else edit.query
        row = int((queries == (queries.max() if query is None else query)).nonzero())
        lists = edit.keys if isinstance(edit.keys[0], list) else [edit.keys]
        keys = lists[b if len(lists) > 1 else 0]
        weights = edit.weights or [1 / len(keys)] * len(keys)
        weights = weights[b] if isinstance(weights[0], list) else weights
        for h in x.heads(edit):
            values = [w * x.values[b, h, keyed == k][0] for k, w in zip(keys, weights, strict=True)]
            new[b, h, row] = torch.stack(values).sum(0)
    return new


#: of keys and masks, before those of logits
INPUTS: dict[type, Any] = {
    E.SEKA: seka, E.Streaming: streaming, E.Sharded: sharded, E.HierarchicalTopk: hierarchical_topk,
}  # fmt: skip
BEFORE: dict[type, Any] = {
    E.Temperature: temperature, E.PAINT: paint, E.SigmoidAttention: sigmoid,
}  # fmt: skip
WEIGHTS: dict[type, Any] = {
    E.ScaleTokens: scale_tokens,
    E.SpotLight: spotlight,
    E.ZeroTuning: zero_tuning,
    E.MoveMass: move_mass,
    E.ACT: act,
    E.VAR: var,
    E.SoftPAG: soft_pag,
}
OUTPUT: dict[type, Any] = {
    E.ScaleHeads: scale_heads,
    E.ShiftHeads: shift_heads,
    E.RotateHeads: rotate_heads,
    E.Ablate: zero,
    E.VHR: vhr,
    E.Gate: gate,
    E.SoftplusReweight: softplus,
    E.HeadGate: head_gate,
    E.RoutedHeads: routed_heads,
    E.OverwriteRow: overwrite_row,
}


def applies(x: Attention, edit: Edit) -> bool:
    if isinstance(edit, E.VHR) and edit.scope == "decode" and edit.first:
        return True
    return edit.scope == "all" or (edit.scope == "decode") == x.decode


def z_of(x: Attention, edits: Sequence[Edit]) -> Tensor:
    """(batch, queries, heads, d) float64 after the edits."""
    mine = [e for e in edits if applies(x, e)]
    for edit in mine:
        if type(edit) in INPUTS:
            INPUTS[type(edit)](x, edit)
    for edit in mine:
        if isinstance(edit, E.Ablate) and edit.mode == "uniform":
            uniform(x, edit)
        elif type(edit) in BEFORE:
            BEFORE[type(edit)](x, edit)
    a = x.softmax()
    for edit in mine:
        a = WEIGHTS[type(edit)](x, a, edit) if type(edit) in WEIGHTS else a
    z = a @ x.values
    for edit in mine:
        z = OUTPUT[type(edit)](x, z, edit) if type(edit) in OUTPUT else z
    return z.transpose(1, 2)
