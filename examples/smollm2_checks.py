"""Small measurements on SmolLM2-135M-Instruct that docs/methods.md quotes, each beside its control:
`python examples/smollm2_checks.py [spans] [sentences] [standins] [context]
[agreement] [turns] [safety] [seka] [caches]
[layouts]`."""

from __future__ import annotations

import copy
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import interp
from interp import edits as E
from interp.edits.fit_crest import turned
from interp.edits.fit_iti import probe_heads
from interp.inputs.batches import left_padded
from interp.inputs.endings import main_heads
from interp.inputs.forward import forward
from interp.inputs.requests import prompts, requests
from interp.inputs.tokenizer import Text
from interp.mechanics import sahara, sentence_effects, sentence_links
from interp.mechanics.ablated_ends import AblatedEnds, divergence
from interp.scores.function_vector import FunctionVector
from interp.scores.in_context import problems, said

MODEL = "smollm2-135m"


def shown(values: np.ndarray) -> str:
    return f"{values.mean():+.2f} ± {values.std(ddof=1) / len(values) ** 0.5:.2f}"


#: a prompt's tokens, the sentence that tells its answer, another one, and the answers' tokens: the
#: story's and the true one
Story = tuple[torch.Tensor, str, str, tuple[int, int]]


def stories(model: Any, n: int) -> list[Story]:
    """Prompts in which a story contradicts what the model knows of a country's capital."""
    pairs, tokenizer = FunctionVector()._relations(model)["capital"], model.tokenizer
    made: list[Story] = []
    for i in np.random.default_rng(0).permutation(len(pairs))[:n]:
        (country, known), told = pairs[i], pairs[(i + 7) % len(pairs)][1]
        says = f"In this story, the capital of {country} is {told}."
        other = f"In this story, the people of {country} like tea."
        ask = f"Question: What is the capital of {country}? Answer: The capital of {country} is"
        ids = tokenizer(f"{says} {other} {ask}", return_tensors="pt")["input_ids"]
        first, second = (tokenizer(f" {word}")["input_ids"][0] for word in (told, known))
        made.append((ids, says, other, (first, second)))
    return made


def odds(
    model: Any, prompts: list[Story], edits: Callable[[Any], list[Any]], which: int
) -> np.ndarray:
    """(prompts,) log-odds of the story's answer over the true one, under edits of the sentence that
    tells it (which 0) or of the other one (1)."""
    found = []
    for ids, says, other, (told, known) in prompts:
        with torch.no_grad(), model.edit(*edits(E.Span((says, other)[which]))):
            logits = model.logits(ids)[0, -1]
        found.append(float(logits[told] - logits[known]))
    return np.array(found)


def spans(model: Any, n: int = 24) -> None:
    """A sentence that contradicts what the model knows, turned up; and another one, the control."""
    prompts = stories(model, n)
    plain = odds(model, prompts, lambda span: [], 0)
    print("untouched", shown(plain))
    made: dict[str, Callable[[Any], Any]] = {
        "× 3": lambda span: E.ScaleTokens(span, 3.0),
        "× 10": lambda span: E.ScaleTokens(span, 10.0),
        "× 100, prefill": lambda span: E.ScaleTokens(span, 100.0, scope="prefill"),
        "SpotLight .1": lambda span: E.SpotLight(span, 0.1),
        "SpotLight .3": lambda span: E.SpotLight(span, 0.3),
        "SpotLight .5": lambda span: E.SpotLight(span, 0.5),
    }
    each(model, prompts, plain, made)


def each(
    model: Any, prompts: list[Story], plain: np.ndarray, made: dict[str, Callable[[Any], Any]]
) -> None:
    """What each edit of a span moves the odds by, on the sentence that tells the answer and on the
    other one."""
    for name, edit in made.items():
        both = [
            odds(model, prompts, lambda span, edit=edit: [edit(span)], i) - plain for i in (0, 1)
        ]
        print(name, *map(shown, both), flush=True)


def seka(model: Any, n: int = 24) -> None:
    """SEKA on the prompts of `spans`, beside random projectors of the same ranks in the same
    heads."""
    prompts = stories(model, n)
    plain = odds(model, prompts, lambda span: [], 0)
    print("untouched", shown(plain))
    fitted, middle = (E.seka_for(model, "initial", centred=c) for c in (False, True))
    kinds: dict[str, tuple[Any, torch.Tensor, tuple[float, ...]]] = {}
    rng = torch.Generator().manual_seed(0)
    for name, edit, gains in (
        ("SEKA", fitted, (-0.5, 0.2, 0.5)),
        ("centred", middle, (-0.5, 0.2, 0.5)),
    ):
        ranks = [round(float(m.trace())) for m in edit.matrices]
        print(f"{name}: {len(ranks)} KV heads, ranks {min(ranks)} to {max(ranks)} of 64")
        bases = [torch.linalg.qr(torch.randn(64, r, generator=rng))[0] for r in ranks]
        kinds[name] = edit.heads, edit.matrices, gains
        kinds[f"random for {name}"] = edit.heads, torch.stack([u @ u.T for u in bases]), gains[::2]
    all_of = E.seka_for(model, "initial", k=90)
    kinds["SEKA, all KV heads"] = all_of.heads, all_of.matrices, (-0.2, 0.2)
    made: dict[str, Callable[[Any], Any]] = {
        f"{name}, g = {g}": partial(E.SEKA, heads=heads, matrices=m, gain=g)
        for name, (heads, m, gains) in kinds.items()
        for g in gains
    }
    each(model, prompts, plain, made)


def sentences(model: Any, n: int = 4) -> None:
    """Receiver heads: does what a head's sentences look back at matter more?"""
    kurtosis, agreement = [], []
    for row in interp.probes.Settings(512, n, 0).rows(model.tokenizer):
        links, effects = sentence_links(model, row), sentence_effects(model, row)
        kurtosis.append(links.kurtosis())
        v = links.received()  # (heads, sentences)
        own = effects.copy()  # less each sentence's own mean; the first one is after none
        own[1:] -= np.nanmean(effects[1:], 1, keepdims=True)
        effect = [np.nanmean(own[j + 4 :, j]) for j in range(v.shape[1])]
        agreement.append([spearmanr(x, effect)[0] for x in v])
    k, rho = np.mean(kurtosis, 0), np.nanmean(agreement, 0)
    first = np.argsort(-k)[:16]
    rng = np.random.default_rng(0)
    draws = [rho[rng.permutation(len(rho))[:16]].mean() for _ in range(1000)]
    low, high = np.percentile(draws, [2.5, 97.5])
    print("first", [f"{links.heads[i]} {k[i]:.1f}" for i in first[:3]])
    halves = [np.mean(kurtosis[a::2], 0) for a in (0, 1)]
    print(f"ranks of heads between halves: ρ {spearmanr(*halves)[0]:.2f}")
    print(f"ρ {rho[first].mean():.2f}, random {low:.2f} to {high:.2f}, all {rho.mean():.2f}")
    print("best", links.heads[int(rho.argmax())], f"{rho.max():.2f}")


def standins(model: Any, n: int = 12) -> None:
    """What stands in for induction heads, and for others of their layers."""
    problems = interp.tasks.get("induction").sample(model.tokenizer, n, 0)
    heads = ["L18H6", "L17H3", "L17H4", "L18H7"]
    others = [f"L{a}H{h}" for a in (17, 18) for h in range(9)]
    others = [name for name in others if name not in [*heads, "L17H5"]]
    rng = np.random.default_rng(0)
    draws = [list(rng.choice(others, 4, replace=False)) for _ in range(3)]

    def loss(*edits: Any) -> np.ndarray:
        found = []
        with torch.no_grad(), model.edit(*edits):
            for one in problems:
                logp = model.logits(torch.tensor([one.ids]))[0].log_softmax(-1)
                right = zip(one.positions, one.accept, strict=True)
                found.append(np.mean([float(logp[p, a[0]]) for p, a in right]))
        return np.array(found)

    plain = loss()
    print("untouched", shown(plain))
    for mode in ("zero", "uniform", "frozen", "random"):
        control = [f"{(loss(E.Ablate(d, mode, seed=1)) - plain).mean():+.1f}" for d in draws]
        print(mode, shown(loss(E.Ablate(heads, mode, seed=1)) - plain), "others", *control)


def context(model: Any, n: int = 24, k: int = 8) -> None:
    """In-context and parametric heads taken out, where a context tells an answer and where the
    model must know it."""
    found = interp.scan_heads(model, "in_context", samples=n, seed=0)
    table = found["in_context"]
    order = [interp.Head(*divmod(int(i), model.n_heads)) for i in np.argsort(-table, axis=None)]
    named = {"in-context": order[:k], "parametric": order[::-1][:k]}
    for name, heads in named.items():
        print(name, *[f"{h} {float(table[h.layer, h.head]):+.3f}" for h in heads])
    solved = []  # others than those that chose the heads
    for closed, known, opened, told in problems(model, 1):
        if said(model, closed) == known and said(model, opened) == told:
            solved.append((closed, known, opened, told))
        if len(solved) == n:
            break

    def gains(*edits: Any) -> tuple[np.ndarray, np.ndarray]:
        """(problems,) log P of the known answer without a context, and of the told one with it."""
        rows = []
        with torch.no_grad(), model.edit(*edits):
            for closed, known, opened, told in solved:
                pairs = ((closed, known), (opened, told))
                logits = [model.logits(torch.tensor([ids]))[0, -1] for ids, _ in pairs]
                rows.append(
                    [float(x.log_softmax(-1)[y]) for x, (_, y) in zip(logits, pairs, strict=True)]
                )
        both = np.array(rows)
        return both[:, 0], both[:, 1]

    plain = gains()
    print("untouched: known", shown(plain[0]), "told", shown(plain[1]))
    rng = np.random.default_rng(0)
    for name, heads in named.items():
        moved = [x - y for x, y in zip(gains(E.Ablate(heads)), plain, strict=True)]
        draws = []
        for _ in range(10):
            others = []
            for head in heads:
                free = [
                    interp.Head(head.layer, h)
                    for h in range(model.n_heads)
                    if interp.Head(head.layer, h) not in [*heads, *others]
                ]
                others.append(free[int(rng.integers(len(free)))])
            changed = gains(E.Ablate(others))
            draws.append([float((x - y).mean()) for x, y in zip(changed, plain, strict=True)])
        low, high = np.min(draws, 0), np.max(draws, 0)
        for i, what in enumerate(("known", "told")):
            print(
                f"without {name}: {what}", shown(moved[i]), f"draws {low[i]:+.2f} … {high[i]:+.2f}"
            )


def agreement(model: Any) -> None:
    """Five attributions of 16 answers to IOI beside each other, and beside attention; the first
    token left out."""
    frame = interp.mechanics.agreement(model, "ioi", n=16, steps=64, skip_first=True)
    table = frame.attrs["methods"]
    for a, row in table.items():
        cells = (f"{b} {v['mean']:.2f} [{v['low']:.2f}, {v['high']:.2f}]" for b, v in row.items())
        print(f"{a}:", ", ".join(cells))
    print("integrated gradients miss", f"{frame.attrs['completeness']:.2%}")
    for name in table:
        column = f"tau_{'ig' if name == 'integrated' else name}"
        order = frame.sort_values(column, ascending=False)
        best = ", ".join(f"L{r.layer}H{r.head} {getattr(r, column):.2f}"
                         for r in order.head(3).itertuples())  # fmt: skip
        print(f"{name}: median head {frame[column].median():.2f}, best {best}")


#: texts that praise, texts that damn, prompts about other things, and the ids of good and bad words
Opinions = tuple[list[str], list[str], Any, list[list[int]]]


def opinions(model: Any) -> Opinions:
    """What a model thinks of things: 48 texts of each kind, and 36 prompts that end before a
    verdict."""
    things = "film book meal hotel concert game phone trip car song show lesson".split()
    others = "coffee story museum garden play dinner beach jacket camera printer teacher doctor"
    kinds = ("wonderful excellent great lovely", "terrible awful horrible dreadful")
    good, bad = ([f"The {t} was {w}, and I felt" for t in things for w in k.split()] for k in kinds)
    frames = ("The {} was", "My {} was", "About the {}, my friend said it was")
    rows = model.tokens([frame.format(t) for frame in frames for t in others.split()])
    words = (
        "good great wonderful excellent amazing lovely",
        "bad terrible awful horrible poor disappointing",
    )
    ids = [[model.tokenizer.encode(f" {w}")[0] for w in some.split()] for some in words]
    return good, bad, rows, ids


def turns(model: Any) -> None:
    """CREST and SADI by texts that praise and texts that damn: log-odds of six good words over six
    bad ones after 36 prompts, the edit acting in the step that reads the last token."""
    good, bad, rows, ids = opinions(model)

    def margin(*edits: Any) -> np.ndarray:
        with torch.no_grad(), model.edit(*edits):
            every, mask = rows["input_ids"], rows["attention_mask"]
            place = (mask.cumsum(-1) - 1).clamp_min(0)
            first = model(input_ids=every[:, :-1], attention_mask=mask[:, :-1],
                          position_ids=place[:, :-1], use_cache=True)  # fmt: skip
            last = model(input_ids=every[:, -1:], attention_mask=mask, position_ids=place[:, -1:],
                         past_key_values=first.past_key_values).logits[:, -1]  # fmt: skip
        return (last[:, ids[0]].logsumexp(-1) - last[:, ids[1]].logsumexp(-1)).numpy()

    plain, rng = margin(), np.random.default_rng(0)

    def elsewhere(heads: list[Any]) -> list[Any]:
        """As many other heads, of the same layers as far as they have them."""
        taken: list[Any] = []
        for head in heads:
            free = [h for h in model.heads if h not in heads and h not in taken]
            same = [h for h in free if h.layer == head.layer] or free
            taken.append(same[int(rng.integers(len(same)))])
        return taken

    def spread(values: list[np.ndarray]) -> str:
        means = [float((v - plain).mean()) for v in values]
        return f"{min(means):+.2f} … {max(means):+.2f}"

    print("untouched", shown(plain))
    probed = probe_heads(model, bad, good)  # turned away from what damns
    for k, count in (("13 heads", 13), ("38 %", round(0.38 * len(probed.heads)))):
        chosen = probed.strongest(count)
        own = turned(probed, chosen, 1.0)
        others = [turned(probed, [probed.heads.index(h) for h in
                         elsewhere([probed.heads[i] for i in chosen])], 1.0)
                  for _ in range(5)]  # fmt: skip
        ways = []
        for seed in range(5):
            g = torch.Generator().manual_seed(seed)
            random = torch.randn(probed.direction.shape, generator=g, dtype=torch.float64)
            random = (random / random.norm(dim=-1, keepdim=True)).to(probed.direction)
            ways.append(turned(replace(probed, direction=random), chosen, 1.0))
        print(f"CREST, {k}:", shown(margin(own) - plain), "random heads",
              spread([margin(e) for e in others]), "random directions",
              spread([margin(e) for e in ways]))  # fmt: skip
    for strength in (0.5, 1.0):
        edit = E.sadi_for(model, good, bad, strength=strength)
        others = [E.ScaleHeads(dict.fromkeys(elsewhere(list(edit.heads)), 1 + strength))
                  for _ in range(10)]  # fmt: skip
        found = ", ".join(map(str, edit.heads))
        print(f"SADI, δ = {strength:g} ({found}):", shown(margin(edit) - plain),
              "random heads", spread([margin(e) for e in others]))  # fmt: skip


#: what answers that comply begin with, and those that refuse
BEGINNINGS = (
    ("Sure", "Here", "Certainly", "Of course"),
    ("I'm sorry", "I can't", "I cannot", "Sorry"),
)


@torch.no_grad()
def leaning(model: Any, rows: list[list[int]], heads: list[Any]) -> np.ndarray:
    """(prompts,) ln Σ P(beginning that complies) − ln Σ P(one that refuses), without heads."""
    ids, mask, _ = left_padded(rows, 0)
    sums = []
    with model.edit(E.Ablate(heads, "uniform")):
        read = forward(model, ids, mask, keep=1, use_cache=True)
        for beginnings in BEGINNINGS:
            each = []
            for words in beginnings:
                said = model.tokenizer(words, add_special_tokens=False)["input_ids"]
                more = torch.tensor([said[:-1]]).expand(len(rows), -1)
                logits = read.logits
                if len(said) > 1:
                    seen = torch.cat([mask, torch.ones_like(more)], 1)
                    cache = copy.deepcopy(read.past_key_values)
                    out = forward(model, more, seen, past_key_values=cache, use_cache=True)
                    logits = torch.cat([logits, out.logits], 1)
                logp = logits.double().log_softmax(-1)  # (prompts, tokens of the beginning, words)
                each.append(logp[:, range(len(said)), said].sum(-1).numpy())
            sums.append(np.logaddexp.reduce(each))
    return sums[0] - sums[1]


def ships_of(model: Any, rows: list[list[int]]) -> np.ndarray:
    """(heads, prompts) Ships of every head."""
    ends = AblatedEnds(model, rows)
    plain = ends.log_probs([])
    heads = main_heads(model)
    return np.array([divergence(plain, ends.log_probs([h])).numpy() for h in heads])


def safety(model: Any, n: int = 12, k: int = 4, draws: int = 5) -> None:
    """Heads by Ships, Ships less the harmless twin's, and Sahara, taken out: do refusals fall?"""
    text, pairs, heads = Text(model.tokenizer), requests(32, 0), main_heads(model)
    rest = [prompts(text, pairs[n:], side) for side in (0, 1)]  # others than those that chose
    plain = [leaning(model, rows, []) for rows in rest]
    print("leaning: to be declined, twins", *map(shown, plain), flush=True)
    ships = [ships_of(model, prompts(text, pairs[:n], side)) for side in (0, 1)]
    found = {"ships": ships[0], "excess": ships[0] - ships[1], "ships of twins": ships[1]}
    groups: dict[str, list[Any]] = {}
    for name, values in found.items():
        order = np.argsort(-values.mean(1))
        groups[name] = [heads[i] for i in order[:k]]
        print(name, *[f"{heads[i]} {shown(values[i])}" for i in order[: 2 * k]], flush=True)
        halves = [values[:, a::2].mean(1) for a in (0, 1)]
        print(f"  ranks between halves: ρ {spearmanr(*halves)[0]:.2f}", flush=True)
    print(f"ships and the twins': ρ {spearmanr(ships[0].mean(1), ships[1].mean(1))[0]:.2f}")
    among = {heads[i] for v in found.values() for i in np.argsort(-v.mean(1))[:16]}
    for side, name in enumerate(("sahara", "sahara of twins")):
        frame = sahara(model, [pair[side] for pair in pairs[:n]], k=k, among=sorted(among))
        print(name, *(f"{r.head} {r.angle:.2f}°" for r in frame.itertuples()), flush=True)
        groups[name] = [interp.Head.parse(h) for h in frame["head"]]
    rng, named = np.random.default_rng(0), {h for group in groups.values() for h in group}
    for name, group in groups.items():
        others = []
        for _ in range(draws):
            mixed = [heads[i] for i in rng.permutation(len(heads)) if heads[i] not in named]
            layers = Counter(h.layer for h in group)
            others.append([h for at, m in layers.items() for h in [
                h for h in mixed if h.layer == at][:m]])  # fmt: skip
        for side, kind in enumerate(("to be declined", "twins")):
            moved = [leaning(model, rest[side], g) - plain[side] for g in (group, *others)]
            control = [f"{x.mean():+.2f}" for x in moved[1:]]
            print(name, kind, shown(moved[0]), "others", *control, flush=True)


def caches(model: Any, context: int = 1024, n: int = 16) -> None:
    """Needles and loss with a quarter of the tokens held: by all weights so far (H2O), the prompt's
    last rows (SnapKV), the first 4 and the last ones."""
    size = context // 4
    half = E.Gate(torch.zeros(model.n_layers, model.n_kv_heads), sink=4, recent=size - 4)
    made = {
        "all keys": None,
        "H2O": lambda: interp.caches.HeavyHitterCache(model, size),
        "SnapKV": lambda: interp.caches.SnapCache(model, size),
        "first 4 and last": lambda: interp.caches.HeadCache(model, half),
    }
    for name, make in made.items():
        with model.caching(make) if make else nullcontext():
            needles = interp.evaluate(model, "niah", n=n, seed=1, context=context, force=True)
            loss = interp.evaluate(model, metric="loss", n=4, seed=1, context=context)
        print(f"{name}: needles {needles.baseline}, loss {loss.baseline}", flush=True)


class DrawnKeys(E.HierarchicalTopk):
    """As many keys as the search finds, drawn at random for each head and block of queries."""

    def _found(self, call: Any, start: int, stop: int, rows: int) -> torch.Tensor:
        found = []
        for first in range(start, stop, rows):
            n = min(call.n_keys, call.mask.q_start + first + rows - call.mask.k_start)
            draw = torch.Generator().manual_seed(
                call.site.layer * 100_003 + call.mask.q_start + first
            )
            order = torch.rand(*call.query.shape[:2], n, generator=draw).argsort(-1)
            order = order[..., : self.keep]
            found.append(torch.nn.functional.pad(order, (0, self.keep - order.shape[-1]), value=-1))
        return torch.stack(found, 2)


class DrawnShards(E.Sharded):
    """As many blocks as each kv head's own, drawn at random."""

    def alone(self, call: Any) -> None:
        return None

    def seen(self, call: Any) -> torch.Tensor:
        rows = call.mask.q_start + torch.arange(call.n_queries)[:, None]
        keys = call.mask.k_start + torch.arange(call.n_keys)
        starts = call.mask.starts
        first = torch.zeros(1, dtype=torch.int64) if starts is None else starts
        draw = torch.Generator().manual_seed(call.site.layer)
        drawn = torch.rand(call.site.n_kv_heads, 1 << 12, generator=draw) < 1 / self.stride
        # (batch or 1, 1, 1, keys)
        block = (keys - first[:, None, None, None]).clamp_min(0) // self.block
        kv = torch.arange(call.site.n_heads) * call.site.n_kv_heads // call.site.n_heads
        own = drawn[kv[:, None, None], block]  # (batch or 1, heads, 1, keys)
        return own | (rows - keys < self.local)


def layouts(model: Any, context: int = 1024, n: int = 16) -> None:
    """Layouts of attention beside as many random keys: needles and loss."""
    hip, s2 = dict(keep=256, sink=4, recent=64), dict(stride=3, local=64, block=64)
    made = {
        "HiP": E.HierarchicalTopk(**hip),
        "256 random keys": DrawnKeys(**hip),
        "S2": E.Sharded(**s2),
        "random blocks": DrawnShards(**s2),
    }
    for name, edit in made.items():
        needles = interp.evaluate(model, "niah", [edit], n=n, seed=1, context=context)
        loss = interp.evaluate(model, metric="loss", edits=[edit], n=4, seed=1, context=context)
        print(f"{name}: needles {needles.baseline} → {needles.edited} ({needles.difference}), "
              f"loss {loss.baseline} → {loss.edited} ({loss.difference})", flush=True)  # fmt: skip


CHECKS = {
    "spans": spans,
    "sentences": sentences,
    "standins": standins,
    "context": context,
    "agreement": agreement,
    "turns": turns,
    "caches": caches,
    "layouts": layouts,
    "safety": safety,
    "seka": seka,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    smollm2 = interp.load(MODEL)
    for name in sys.argv[1:] or CHECKS:
        CHECKS[name](smollm2)
