"""The sparse autoencoder of discrete-SAE circuits, built on SAELens (extra `sae`). Importing this
file imports sae_lens (seconds)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, StandardTrainingSAE, StandardTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata, TrainStepInput, TrainStepOutput

from interp.errors import InputError, ModelError


class MeanLossSAE(StandardTrainingSAE):
    """f = ReLU((x − b) W_enc + b_enc), x̂ = f W_dec + b, with rows of unit norm.

    loss = mean over samples and width of (x̂ − x)² + λ · mean over samples of ‖f‖₁ (O'Neill and Bui
    2024, arXiv 2405.12522, section 3). SAELens sums the squared error over the width, which would
    make the same λ d_in times weaker. The architecture stays "standard": `save_inference_model`
    writes what `sae_lens.SAE.load_from_disk` reads.
    """

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        features, before = self.encode_with_hidden_pre(step_input.sae_in)  # (samples, d_sae)
        out = self.decode(features)  # (samples, d_in)
        error = (out - step_input.sae_in).pow(2).mean()
        sparsity = step_input.coefficients["l1"] * features.sum(-1).mean()  # features are ≥ 0
        losses = {"mse_loss": error, "l1_loss": sparsity}
        return TrainStepOutput(step_input.sae_in, out, features, before, error + sparsity, losses)

    @torch.no_grad()
    def normalise(self) -> None:
        """Each feature's encoder column and decoder row to norm 1."""
        self.W_enc /= self.W_enc.norm(dim=0, keepdim=True).clamp_min(1e-12)
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12)

    @torch.no_grad()
    def project_gradients(self) -> None:
        """Take out of the gradients what would only change those norms."""
        for weight, dim in ((self.W_enc, 0), (self.W_dec, 1)):
            assert weight.grad is not None
            weight.grad -= (weight.grad * weight).sum(dim, keepdim=True) * weight


def train(
    samples: torch.Tensor,
    features: int,
    sparsity: float,
    steps: int,
    rate: float,
    seed: int,
    variance: float = 1.0,
    standardise: bool = False,
    metadata: dict[str, Any] | None = None,
) -> tuple[MeanLossSAE, float]:
    """(an autoencoder of `samples` (n, d_in), its last loss): full-batch Adam from a seed.

    standardise: divide the samples by their root mean square while training, so that λ means the
    same in every model. variance: train in the principal subspace that holds this share of the
    samples' variance; the gradients of all parameters lie in the samples' span, so with the whole
    variance nothing is lost. Both are folded into the weights.
    """
    d_in = samples.shape[1]
    centre, basis = torch.zeros(d_in), None
    scale = float(samples.pow(2).mean().sqrt()) if standardise else 1.0
    if not scale > 0:
        raise InputError("All heads give zero on these prompts, so there is nothing to encode.")
    inner = samples / scale
    if variance < 1:
        centre = inner.mean(0)
        _, sizes, rows = torch.linalg.svd(inner - centre, full_matrices=False)
        held = sizes.pow(2).cumsum(0) / sizes.pow(2).sum()
        rank = min(int((held < variance).sum()) + 1, len(sizes))
        basis = rows[:rank].T  # (d_in, rank)
        inner = (inner - centre) @ basis
    autoencoder = _new(inner.shape[1], features, sparsity, seed, metadata)
    optimiser = torch.optim.Adam(autoencoder.parameters(), lr=rate)
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        autoencoder.normalise()
        inputs = TrainStepInput(inner, {"l1": sparsity}, None, step, False)
        loss = autoencoder.training_forward_pass(inputs).loss
        optimiser.zero_grad()
        loss.backward()
        autoencoder.project_gradients()
        optimiser.step()
    autoencoder.normalise()
    return _unfolded(autoencoder, centre, basis, scale, features, sparsity, seed, metadata), float(
        loss.detach()
    )


def _new(
    d_in: int, features: int, sparsity: float, seed: int, metadata: dict[str, Any] | None
) -> MeanLossSAE:
    config = StandardTrainingSAEConfig(
        d_in=d_in,
        d_sae=features,
        dtype="float32",
        device="cpu",
        l1_coefficient=sparsity,
        apply_b_dec_to_input=True,
        normalize_activations="none",
        metadata=SAEMetadata(**(metadata or {})),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MeanLossSAE(config)


@torch.no_grad()
def _unfolded(
    inner: MeanLossSAE,
    centre: torch.Tensor,
    basis: torch.Tensor | None,
    scale: float,
    features: int,
    sparsity: float,
    seed: int,
    metadata: dict[str, Any] | None,
) -> MeanLossSAE:
    """The same function of the samples as they came: x = scale · (centre + basis · inner)."""
    d_in = len(centre)
    autoencoder = _new(d_in, features, sparsity, seed, metadata)
    up = torch.eye(d_in) if basis is None else basis
    autoencoder.W_enc.copy_(up @ inner.W_enc / scale)
    autoencoder.W_dec.copy_(scale * inner.W_dec @ up.T)
    autoencoder.b_enc.copy_(inner.b_enc)
    autoencoder.b_dec.copy_(scale * (centre + up @ inner.b_dec))
    return autoencoder.eval()


class Saved:
    """An autoencoder as an artefact of a circuit: `save(folder)` writes SAELens's inference
    files."""

    def __init__(self, sae: MeanLossSAE):
        self.sae = sae

    def save(self, folder: Path) -> None:
        self.sae.save_inference_model(folder)


def loaded(given: Any) -> list[Any]:
    """SAELens autoencoders from folders, objects, or a list of them. Raises `ModelError` or
    `InputError`."""
    autoencoders = []
    for one in given if isinstance(given, (list, tuple)) else [given]:
        if isinstance(one, (str, Path)):
            try:
                one = SAE.load_from_disk(one)
            except (OSError, ValueError, KeyError) as error:
                raise ModelError(f"There is no SAELens autoencoder in {one}: {error}.") from error
        if not isinstance(one, SAE):
            raise InputError(
                f"{type(one).__name__} is not a SAELens autoencoder, nor a folder of one."
            )
        autoencoders.append(one.eval())
    if not autoencoders:
        raise InputError("No autoencoder was given.")
    return autoencoders


@torch.no_grad()
def strongest(activations: torch.Tensor) -> torch.Tensor:
    """(…,) number of the strongest feature of activations (…, d_sae), −1 where none is active."""
    value, code = activations.max(-1)
    return torch.where(value > 0, code, -1)


@torch.no_grad()
def codes_of(
    sae: Any, z: torch.Tensor, W_O: torch.Tensor, vector: str, layer: int
) -> torch.Tensor | None:
    """(n, heads) int64: each head's code; None where the autoencoder is another layer's.

    z: (n, heads, d_head) of one layer, pooled; W_O: (heads, d_head, d_model).

    An autoencoder of per-head vectors (d_in = d_model for results, d_head for z) serves all heads.
    One on a layer's concatenated hook_z (d_in = heads · d_head) gives each head the feature that is
    strongest in its own slice of the decoder, f_c ‖W_dec[c, slice]‖, and serves that layer alone.
    """
    n, heads, d_head = z.shape
    name = str(sae.cfg.metadata.hook_name or "")
    if name.endswith("hook_z") and sae.cfg.d_in == heads * d_head:
        if f"blocks.{layer}." not in name:
            return None
        sae.turn_off_forward_pass_hook_z_reshaping()
        features = sae.encode(z.reshape(n, heads * d_head))  # (n, d_sae)
        share = sae.W_dec.reshape(-1, heads, d_head).norm(dim=-1)  # (d_sae, heads)
        return torch.stack([strongest(features * share[:, h]) for h in range(heads)], 1)
    width = d_head if vector == "z" else W_O.shape[-1]
    if sae.cfg.d_in != width:
        raise InputError(
            f"The autoencoder takes vectors of {sae.cfg.d_in} numbers; a head's {vector} in layer "
            f"{layer} has {width}."
        )
    if isinstance(sae, MeanLossSAE):  # one small product a head instead of two large ones
        bias = sae.b_enc - sae.b_dec @ sae.W_enc
        maps = (
            sae.W_enc.expand(heads, -1, -1) if vector == "z" else W_O @ sae.W_enc
        )  # (heads, d_head, d_sae)
        return torch.stack(
            [strongest(torch.relu(z[:, h] @ maps[h] + bias)) for h in range(heads)], 1
        )
    vectors = (
        z[:, h] if vector == "z" else z[:, h] @ W_O[h] for h in range(heads)
    )  # (n, width) each
    return torch.stack([strongest(sae.encode(x)) for x in vectors], 1)
