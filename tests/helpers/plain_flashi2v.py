"""FlashI2V in plain torch, as the paper reads: one process, whole tensors, any float dtype (meant for fp64).

It shares no code with the framework, so that each can be measured against the other. Weights are a dictionary under the
names of FlashI2V's main branch (original Wan's, and four more layers).

Shape suffixes: B samples, C latent channels, T H W latent frames, rows and columns; S tokens, d width, n heads,
D head size, L text rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EPSILON = 1e-6
Velocity = Callable[[Tensor, Tensor], Tensor]


def high_pass(image_BCHW: Tensor, ratio_B: Tensor) -> Tensor:
    """Magnitude of an image without its low frequencies, which hold ``ratio`` of its spectrum's magnitude."""
    height, width = image_BCHW.shape[-2:]
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    radius_HW = (rows[:, None] ** 2 + columns**2).to(image_BCHW.dtype).sqrt()
    spectrum_BCHW = torch.fft.fftshift(torch.fft.fft2(image_BCHW), dim=(-2, -1))
    share_BHW = (spectrum_BCHW.abs() ** 2 + 1e-12).sqrt().mean(dim=1)
    order = radius_HW.flatten().argsort(stable=True)
    kept = []
    for share_HW, ratio in zip(share_BHW, ratio_B, strict=True):
        cumulative = share_HW.flatten()[order].cumsum(0)
        index = (cumulative < ratio * cumulative[-1]).sum().clamp(max=len(order) - 1)
        kept.append(radius_HW >= radius_HW.flatten()[order[index]])  # the ring that is reached stays
    filtered_BCHW = spectrum_BCHW * torch.stack(kept).unsqueeze(1)
    return (torch.fft.ifft2(torch.fft.ifftshift(filtered_BCHW, dim=(-2, -1))).abs() ** 2 + 1e-12).sqrt()


def rotate(heads_BnSD: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Rotary positions in three dimensions: each axis turns its own share of the channel pairs."""
    size = heads_BnSD.shape[-1]
    axes = [size - 4 * (size // 6), 2 * (size // 6), 2 * (size // 6)]
    places = torch.cartesian_prod(*(torch.arange(length, dtype=torch.float64) for length in grid))
    angles_SD = torch.cat([
        place_S[:, None] * 10000.0 ** (-torch.arange(0, axis, 2, dtype=torch.float64) / axis)
        for place_S, axis in zip(places.unbind(-1), axes, strict=True)
    ], dim=1)
    turn = torch.polar(torch.ones_like(angles_SD), angles_SD)
    pairs = torch.view_as_complex(heads_BnSD.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turn).flatten(-2).to(heads_BnSD.dtype)


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """Over the whole width, before it is split into heads."""
    return x * (x.square().mean(dim=-1, keepdim=True) + EPSILON).rsqrt() * weight


def layer_norm(x: Tensor) -> Tensor:
    """Without weight and bias."""
    return F.layer_norm(x, x.shape[-1:], eps=EPSILON)


@dataclass(frozen=True)
class PlainFlashI2V:
    """The model.

    Attributes:
        weights: tensors under the main branch's names.
        heads: attention heads.
        repeat_first: whether phi sees the image repeated over time (npu branch), or alone (main branch).
    """

    weights: Mapping[str, Tensor]
    heads: int
    repeat_first: bool = False

    def loss(
        self, latents_BCTHW: Tensor, noise_BCTHW: Tensor, sigma_B: Tensor, text_BLX: Tensor, image_BC1HW: Tensor,
        ratio_B: Tensor,
    ) -> Tensor:
        """E |v(x_t) - (n - z)|^2 with x_t = sigma n + (1 - sigma) z."""
        sigma = sigma_B.view(-1, 1, 1, 1, 1)
        noisy_BCTHW = sigma * noise_BCTHW + (1 - sigma) * latents_BCTHW
        velocity = self.velocity(noisy_BCTHW, 1000 * sigma_B, text_BLX, image_BC1HW, ratio_B)
        return (velocity - (noise_BCTHW - latents_BCTHW)).square().mean()

    def velocity(
        self, noisy_BCTHW: Tensor, timestep_B: Tensor, text_BLX: Tensor, image_BC1HW: Tensor, ratio_B: Tensor
    ) -> Tensor:
        """The DiT on x_t - phi(z0), guided by the image's high frequencies in every frame."""
        frames = noisy_BCTHW.shape[2]
        features_BCHW = high_pass(image_BC1HW[:, :, 0], ratio_B)
        features_BCTHW = features_BCHW.unsqueeze(2).expand(-1, -1, frames, -1, -1)
        return self.dit(noisy_BCTHW - self.phi(image_BC1HW, frames), timestep_B, text_BLX, features_BCTHW)

    def phi(self, image_BC1HW: Tensor, frames: int) -> Tensor:
        """Two convolutions with a SiLU between."""
        image = image_BC1HW.expand(-1, -1, frames, -1, -1) if self.repeat_first else image_BC1HW
        hidden = F.silu(self.convolution("learnable_proj.proj.0", image, padding="same"))
        return self.convolution("learnable_proj.proj.2", hidden, padding="same")

    def dit(self, x_BCTHW: Tensor, timestep_B: Tensor, text_BLX: Tensor, features_BCTHW: Tensor) -> Tensor:
        """Wan's transformer; the features' embedding is added to the tokens."""
        patch = self.weights["patch_embedding.weight"].shape[2:]
        embedded = self.convolution("patch_embedding", x_BCTHW, stride=patch)
        features = self.convolution("fourier_embedding.0", features_BCTHW, stride=patch)
        embedded = embedded + self.convolution("fourier_embedding.1", features)
        grid = tuple(embedded.shape[2:])
        tokens_BSd = embedded.flatten(2).transpose(1, 2)

        half = self.weights["time_embedding.0.weight"].shape[1] // 2
        angles = timestep_B.double()[:, None] * 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=1).to(x_BCTHW.dtype)
        time_Bd = self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", sinusoid)))
        modulation_B6d = self.linear("time_projection.1", F.silu(time_Bd)).unflatten(1, (6, -1))
        hidden = F.gelu(self.linear("text_embedding.0", text_BLX), approximate="tanh")
        text_BLd = self.linear("text_embedding.2", hidden)

        block = 0
        while f"blocks.{block}.modulation" in self.weights:
            tokens_BSd = self.block(f"blocks.{block}", tokens_BSd, text_BLd, modulation_B6d, grid)
            block += 1
        shift, scale = (self.weights["head.modulation"] + time_Bd[:, None]).chunk(2, dim=1)
        patches_BSP = self.linear("head.head", layer_norm(tokens_BSd) * (1 + scale) + shift)
        pieces = patches_BSP.unflatten(2, (*patch, -1)).unflatten(1, grid)
        # [B, t, h, w, pt, ph, pw, C] -> [B, C, t pt, h ph, w pw]
        return pieces.permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x_BCTHW.shape)

    def block(
        self, name: str, x_BSd: Tensor, text_BLd: Tensor, modulation_B6d: Tensor, grid: tuple[int, int, int]
    ) -> Tensor:
        """Self-attention, attention to the text, feed-forward."""
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
            self.weights[f"{name}.modulation"] + modulation_B6d
        ).chunk(6, dim=1)
        normed = layer_norm(x_BSd) * (1 + scale_1) + shift_1
        x_BSd = x_BSd + gate_1 * self.attention(f"{name}.self_attn", normed, normed, grid)
        normed = layer_norm(x_BSd) * self.weights[f"{name}.norm3.weight"] + self.weights[f"{name}.norm3.bias"]
        x_BSd = x_BSd + self.attention(f"{name}.cross_attn", normed, text_BLd, None)
        normed = layer_norm(x_BSd) * (1 + scale_2) + shift_2
        hidden = F.gelu(self.linear(f"{name}.ffn.0", normed), approximate="tanh")
        return x_BSd + gate_2 * self.linear(f"{name}.ffn.2", hidden)

    def attention(self, name: str, x_BSd: Tensor, source: Tensor, grid: tuple[int, int, int] | None) -> Tensor:
        """softmax(q k / sqrt(D)) v over all of ``source``; positions only where a grid is given."""
        query = rms_norm(self.linear(f"{name}.q", x_BSd), self.weights[f"{name}.norm_q.weight"])
        key = rms_norm(self.linear(f"{name}.k", source), self.weights[f"{name}.norm_k.weight"])
        value = self.linear(f"{name}.v", source)
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        if grid is not None:
            query, key = rotate(query, grid), rotate(key, grid)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        return self.linear(f"{name}.o", (scores.softmax(dim=-1) @ value).transpose(1, 2).flatten(2))

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x W^T + b."""
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def convolution(self, name: str, x_BCTHW: Tensor, **how: object) -> Tensor:
        """A convolution over time, rows and columns."""
        return F.conv3d(x_BCTHW, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **how)


def euler_states(velocity: Velocity, noise_BCTHW: Tensor, sigmas: list[float]) -> list[Tensor]:
    """The state after each step of y <- y + v(y, 1000 sigma) (next sigma - sigma)."""
    states = [noise_BCTHW]
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        timestep_B = torch.full((len(noise_BCTHW),), 1000 * sigma, dtype=noise_BCTHW.dtype)
        states.append(states[-1] + velocity(states[-1], timestep_B) * (following - sigma))
    return states[1:]


def shifted_sigmas(steps: int, shift: float) -> list[float]:
    """From 1 to 0 in even steps, then shift s / (1 + (shift - 1) s)."""
    even = [1 - step / steps for step in range(steps + 1)]
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]


def guided(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """v_u + g (v_c - v_u)."""
    def velocity(state: Tensor, timestep_B: Tensor) -> Tensor:
        unguided = unconditional(state, timestep_B)
        return unguided + scale * (conditional(state, timestep_B) - unguided)

    return velocity
