"""How far an answer moves for a bounded change of one head's attention scores."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from interp.errors import EditError, InputError
from interp.inputs.chunks import prefill
from interp.inputs.endings import HELD, main_heads
from interp.inputs.forward import forward
from interp.inputs.text import check_seed, content
from interp.inputs.tokenizer import Text
from interp.support.checked import number, whole_number
from interp.support.html import block
from interp_hooks.edit import Edit
from interp_hooks.logits import logits_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

    from interp_hooks.call import AttentionCall
    from interp_hooks.heads import Head

#: length of the step from which the virtual direction's gradient is taken
XI = 0.1


@dataclass(frozen=True)
class Perturbation:
    """What a change of length ε of one head's scores in the last row does, a head at a time.

    Attributes:
        frame: a row a head: `slope` (‖∂ log P(y)/∂s‖₂, nats a unit of score), `lowered` and
            `raised` (change of log P(y) for ε against and along that gradient), `random` (mean size
            of the change over random directions of the same length), `kl` (KL of the next token's
            distribution for the virtual direction), `random_kl` (mean over random ones).
        answer: the token y.
        log_prob: its log-probability, untouched.
        epsilon: ε.

    Example:
        >>> found = interp.mechanics.perturbation(model, "the cat saw the dog . the cat saw the")
        >>> list(found.top(2))
        ['head', 'slope', 'lowered', 'raised', 'random', 'kl', 'random_kl']
    """

    frame: pd.DataFrame
    answer: int
    log_prob: float
    epsilon: float

    def top(self, k: int = 8, by: str = "lowered") -> pd.DataFrame:
        """The `k` heads that move the answer most."""
        order = self.frame[by].abs().sort_values(ascending=False, kind="stable").index
        return self.frame.loc[order[:k]]

    def _repr_html_(self) -> str:
        best = self.top()
        columns = list(best.columns)
        rows = [[str(row[0]), *(f"{x:.3g}" for x in row[1:])] for row in best.to_numpy().tolist()]
        about = f"ε = {self.epsilon:g}, log P of the answer {self.log_prob:.2f}"
        return block("Perturbation", about, headings=columns, rows=rows)


def perturbation(
    model: Any,
    text: Any,
    answer: str | int | None = None,
    epsilon: float = 1.0,
    draws: int = 4,
    seed: int = 0,
) -> Perturbation:
    """How far the next token's distribution moves for bounded changes of each head's scores.

    With s the scores (before the softmax) of one head's last row, and δ added to them, ‖δ‖₂ = ε:

        adversarial    δ = ∓ε g/‖g‖,  g = ∂ log P(y) / ∂s
        virtual        δ = ε g/‖g‖,   g = ∇_δ KL(P ‖ P_δ) at δ = ξ r, r random of length 1

    (adversarial and virtual adversarial training of attention, Kitada and Iyatomi 2020, arXiv
    2009.12064, and 2021, arXiv 2104.08763, taken as an analysis). Beside them stand random
    directions of the same length: a head that random changes move as far is merely in the way.

    Args:
        model: a loaded HuggingFace model with a cache.
        text: a text, a `Path` to one, or token ids.
        answer: the token y, or a text that is one token; None for the model's own next token.
        epsilon: ε, in units of scores.
        draws: random directions.
        seed: of the directions.

    Raises:
        InputError: fewer than two tokens, an answer of several, ε ≤ 0, or a model without cache.
        EditError: a model whose queries and keys are not shown.

    Example:
        >>> found = interp.mechanics.perturbation(model, "the cat saw the dog . the cat saw the")
        >>> bool((found.frame.lowered <= found.frame.raised).all()), len(found.frame)
        (True, 32)
    """
    import pandas as pd

    from interp.loading import load

    hooked = load(model)
    check_seed(seed)
    epsilon, draws = number(epsilon, "ε"), whole_number(draws, "draws, the random directions,")
    if epsilon <= 0 or draws < 1:
        raise InputError("ε is above 0, and there is at least one random direction.")
    if not hooked.has_cache:
        raise InputError(f"{hooked.name} has no cache, from which its last row could be run again.")
    ids = _ids(hooked, text)
    with hooked.clean():
        run = _LastRow(hooked, ids)
        plain = run.log_probs(1).detach()[0]
        y = _token(hooked, answer, plain)
        heads = main_heads(hooked)
        rng = torch.Generator().manual_seed(seed)
        rows: list[dict[str, float]] = []
        size = max(1, HELD // len(ids))
        for start in range(0, len(heads), size):
            rows += _measured(run, heads[start : start + size], y, plain, epsilon, draws, rng)
    frame = pd.DataFrame(rows)
    frame.insert(0, "head", [str(head) for head in heads])
    return Perturbation(frame, y, float(plain[y]), epsilon)


class _LastRow:
    """The last token of a text, run for many rows at once, each with its own change of one head's
    scores."""

    def __init__(self, model: Any, ids: Sequence[int]) -> None:
        self.model, self.keys = model, len(ids)
        with torch.no_grad():
            self._cache = prefill(model, torch.tensor([list(ids[:-1])])).past_key_values
        self._last = torch.tensor([[ids[-1]]])

    def log_probs(
        self, rows: int, heads: Sequence[Head] = (), delta: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(rows, vocabulary) log P; row i with delta[i] (keys,) added to the scores of heads[i]."""
        cache = copy.deepcopy(self._cache)
        cache.batch_repeat_interleave(rows)
        edits = [] if delta is None else [_Scores(heads, delta)]
        with self.model.edit(*edits):
            out = forward(
                self.model, self._last.repeat(rows, 1), use_cache=True, past_key_values=cache
            )
        return logits_of(out)[:, -1].float().log_softmax(-1)


class _Scores(Edit):
    """Adds delta[i] (keys,) to the scores of heads[i] in row i of the batch."""

    def __init__(self, heads: Sequence[Head], delta: torch.Tensor) -> None:
        self.heads, self.delta = list(heads), delta

    def touches(self, call: AttentionCall) -> bool:
        return call.site.is_main and any(h.layer == call.site.layer for h in self.heads)

    def before(self, call: AttentionCall) -> AttentionCall:
        if call.query is None or call.mask.dense is not None:
            raise EditError(
                f"The scores of {call.site.place} can't be changed key by key: they are not shown, "
                "or have a bias of their own."
            )
        places = [(i, h.head) for i, h in enumerate(self.heads) if h.layer == call.site.layer]
        rows, heads = (torch.tensor(x) for x in zip(*places, strict=True))
        bias = self.delta.new_zeros(len(self.heads), call.site.n_heads, self.delta.shape[1])
        bias = bias.index_put((rows, heads), self.delta[rows])
        # a layer with a window holds its last keys only
        bias = bias[..., call.mask.k_start : call.mask.k_start + call.n_keys]
        dense = bias[:, :, None].to(call.query.device)
        return replace(call, mask=replace(call.mask, dense=dense))


def _measured(
    run: _LastRow,
    heads: Sequence[Head],
    y: int,
    plain: torch.Tensor,
    epsilon: float,
    draws: int,
    rng: torch.Generator,
) -> list[dict[str, float]]:
    """The numbers of some heads, a row each."""
    n = len(heads)
    zero = torch.zeros(n, run.keys, requires_grad=True)
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(run.log_probs(n, heads, zero)[:, y].sum(), zero)
    start = _unit(torch.randn(n, run.keys, generator=rng))
    near = (XI * start).requires_grad_()
    with torch.enable_grad():
        kl = _kl(plain, run.log_probs(n, heads, near)).sum()
        (virtual,) = torch.autograd.grad(kl, near)

    @torch.no_grad()
    def moved(direction: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """(heads,) change of log P(y), and KL, for ε along a direction."""
        found = run.log_probs(n, heads, epsilon * _unit(direction))
        return (found[:, y] - plain[y]).cpu().numpy(), _kl(plain, found).cpu().numpy()

    random = [moved(torch.randn(n, run.keys, generator=rng)) for _ in range(draws)]
    columns = dict(
        slope=slope.norm(dim=1).numpy(),
        lowered=moved(-slope)[0],
        raised=moved(slope)[0],
        random=np.mean([np.abs(change) for change, _ in random], 0),
        kl=moved(virtual)[1],
        random_kl=np.mean([kl for _, kl in random], 0),
    )
    return [{name: float(values[i]) for name, values in columns.items()} for i in range(n)]


def _kl(plain: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """(rows,) KL(P ‖ P_δ) of log-probabilities (vocabulary,) and (rows, vocabulary)."""
    return (plain.exp() * (plain - other)).sum(-1)


def _unit(x: torch.Tensor) -> torch.Tensor:
    """Rows of length 1; a row of zeros, of a head that does not matter, stays."""
    length = x.norm(dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)


def _ids(model: Any, text: Any) -> list[int]:
    """The tokens of a text, or what is given as such. Raises `InputError`."""
    if isinstance(text, (list, tuple, np.ndarray, torch.Tensor)):
        ids = [int(i) for i in torch.as_tensor(text).flatten().tolist()]
    else:
        ids = Text(model.tokenizer).prompt(content(text))
    if len(ids) < 2:
        raise InputError("The last row of a text of fewer than two tokens sees nothing to change.")
    return ids


def _token(model: Any, answer: str | int | None, plain: torch.Tensor) -> int:
    """The token y. Raises `InputError` where it is none, or several."""
    if answer is None:
        return int(plain.argmax())
    if isinstance(answer, str):
        tokens = Text(model.tokenizer).encode(answer)
        if len(tokens) != 1:
            raise InputError(f"The answer {answer!r} is {len(tokens)} tokens, and y is one.")
        return int(tokens[0])
    token = whole_number(answer, "The answer's token")
    if not 0 <= token < len(plain):
        raise InputError(f"There is no token {token}; the vocabulary has {len(plain)}.")
    return token
