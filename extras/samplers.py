"""Other ways down the same chain. A sampler is a list of moves that take line 4 of Algorithm 2's place in
sample.py's loop; here is a function for each sampler that returns its moves.

A move is a function (d, model, x_t, t, z, clip) -> (x, x̂_0) on tensors. d: the chain, a DDPM of as many steps as
are taken, so that a step always goes from t to t−1; t (B,) counts its steps; model(x, t) knows what to tell the
network. z ~ N(0, I) as x_t; where the sampler has no noise it is the x̂_0 of the move before, 0 for the first. The
loop replaces what the last move leaves by its x̂_0. A sampler's function gets (ddpm, chain) and its options, and
returns (moves, whether they use noise).
"""
import functools
from collections.abc import Callable, Sequence
import numpy as np
from tinygrad import Tensor
from ddpm import DDPM, column

Moves = tuple[Sequence[Callable[..., tuple[Tensor, Tensor]]], bool]

def denoise(d:DDPM, model:Callable, x_t:Tensor, t:Tensor, clip:bool) -> tuple[Tensor, Tensor]:
  """(x̂_0, ε̂) as the model sees them in x_t, whatever it predicts. ε̂ leads from x̂_0, clipped or not, to x_t."""
  out = model(x_t, t).contiguous()
  x0_hat = d.predict_x0(x_t, t, out)
  if not clip and d.predict == "eps": return x0_hat, d.answer(x_t, out)
  if clip: x0_hat = x0_hat.clip(-1, 1)
  return x0_hat, d.predict_eps(x_t, t, x0_hat)

def within(name:str, value:float, low:float, high:float):
  if not isinstance(value, int | float | np.number) or not low <= value <= high:
    raise ValueError(f"{name} must be within {low}..{high}, not {value!r}")

def table(values:np.ndarray) -> Tensor: return Tensor(values.astype(np.float32)).realize()

# *** DDIM ***

def ddim(ddpm:DDPM, chain:DDPM, eta:float=0.0) -> Moves:
  """DDIM, Song, Meng, Ermon 2021 (arXiv:2010.02502). η = 0 has no noise; η = 1 is Algorithm 2 with σ_t² = β̃_t."""
  within("eta", eta, 0, 1)
  return [functools.partial(ddim_move, eta=float(eta))], eta > 0

def ddim_move(d:DDPM, model:Callable, x_t:Tensor, t:Tensor, z:Tensor, clip:bool, eta:float=0.0):
  """Eq. 12 of DDIM: x_{t-1} = √ᾱ_{t−1} x̂_0 + √(1−ᾱ_{t−1}−σ²) ε̂ + σ z with σ² = η² β̃_t, its Eq. 16.

  With κ² = σ²/(1−ᾱ_{t−1}) = η² β_t/(1−ᾱ_t) the noise is √(1−ᾱ_{t−1}) (√(1−κ²) ε̂ + κ z)."""
  x0_hat, eps_hat = denoise(d, model, x_t, t, clip)
  if eta:
    beta, noise = d.at(d.beta, t, x_t), d.at(d.noise_std, t, x_t).square()
    kept = d.at(d.alpha, t, x_t) * d.at(d.noise_std, t - 1, x_t).square() + (1 - eta**2) * beta  # (1−κ²)(1−ᾱₜ)
    eps_hat = (kept / noise).sqrt() * eps_hat + eta * (beta / noise).sqrt() * z
  return at_time(d, x0_hat, eps_hat, t - 1), x0_hat

def at_time(d:DDPM, x0:Tensor, eps:Tensor, t:Tensor) -> Tensor:
  """Eq. 4 for t = 0 as well: √ᾱ_t x_0 + √(1−ᾱ_t) ε."""
  return d.at(d.sqrt_alpha_bar, t, x0) * x0 + d.at(d.noise_std, t, x0) * eps

# *** the probability-flow ODE ***

def ode(ddpm:DDPM, chain:DDPM) -> Moves:
  """The probability-flow ODE, Song et al. 2021 (arXiv:2011.13456), Eq. 13, by Heun's method: no noise."""
  return [heun], False

def heun(d:DDPM, model:Callable, x_t:Tensor, t:Tensor, z:Tensor, clip:bool):
  """In x/√ᾱ and √((1−ᾱ)/ᾱ) the ODE is d(x/√ᾱ) = ε̂ d√((1−ᾱ)/ᾱ) (DDIM, Eq. 14). Euler's step is DDIM's, and Heun's
  is DDIM's with the mean of ε̂ at both ends. The last step is Euler's: no model knows time 0."""
  x0_hat, eps_t = denoise(d, model, x_t, t, clip)
  euler = at_time(d, x0_hat, eps_t, t - 1).contiguous()
  eps_end = denoise(d, model, euler, (t - 1).maximum(1), clip)[1]
  eps = column(t > 1, x_t).where((eps_t + eps_end) / 2, eps_t)
  start = (x_t - d.at(d.noise_std, t, x_t) * eps) / d.at(d.sqrt_alpha_bar, t, x_t)
  return at_time(d, start, eps, t - 1), x0_hat

def dpm(ddpm:DDPM, chain:DDPM) -> Moves:
  """DPM-Solver++(2M), Lu et al. 2022 (arXiv:2211.01095), Algorithm 2: the ODE again, of second order with one
  evaluation a step. λ = log √(ᾱ/(1−ᾱ)) is its time, r_t = (λ_t − λ_{t+1}) / (λ_{t−1} − λ_t) here."""
  lam = np.log(chain.sqrt_alpha_bar[1:] / chain.noise_std[1:])  # λ_1 … λ_T; λ_0 is infinite
  w = np.zeros(chain.T + 1)                                      # 1/(2 r_t), but 0 for the first step and the last
  w[2:-1] = np.diff(lam)[:-1] / np.diff(lam)[1:] / 2
  return [functools.partial(multistep, w=table(w))], False

def multistep(d:DDPM, model:Callable, x_t:Tensor, t:Tensor, before:Tensor, clip:bool, w:Tensor):
  """D = (1 + 1/(2r)) x̂_0 − 1/(2r) x̂_0 of the step before; then DDIM's step with D in the place of x̂_0."""
  x0_hat = denoise(d, model, x_t, t, clip)[0].contiguous()
  D = x0_hat + column(w[t], x_t) * (x0_hat - before)
  return at_time(d, D, d.predict_eps(x_t, t, D), t - 1), x0_hat

# *** the reverse SDE, predictor and corrector, annealed Langevin dynamics ***

def sde(ddpm:DDPM, chain:DDPM) -> Moves:
  """The reverse-time VP-SDE by Euler-Maruyama, Song et al. 2021, Eq. 6."""
  return [functools.partial(reverse_sde, B=table(-np.log1p(-chain.beta)))], True

def reverse_sde(d:DDPM, model:Callable, x_t:Tensor, t:Tensor, z:Tensor, clip:bool, B:Tensor):
  """Eq. 6 and 11 of Song et al. 2021: dx = [−½ β(t) x − β(t) ∇log q(x)] dt + √β(t) dw, backwards in time.

  The noise of the step, B = ∫ β(τ) dτ = −log α_t, and the score −ε̂/√(1−ᾱ_t) are those of the discrete chain."""
  x0_hat, eps_hat = denoise(d, model, x_t, t, clip)
  B, score = column(B[t], x_t), -eps_hat / d.at(d.noise_std, t, x_t)
  return x_t + B * (x_t / 2 + score) + B.sqrt() * z, x0_hat  # xₜ₋₁ = xₜ + B (½ xₜ + ∇log q) + √B z

def pc(ddpm:DDPM, chain:DDPM, snr:float=0.16) -> Moves:
  """Predictor-corrector, Song et al. 2021, Algorithms 3 and 5: at each t a Langevin step, then the reverse SDE.

  The corrector comes first, as in the authors' code. Its step is 2 α_t (snr ‖z‖/‖score‖)², where √(1−ᾱ_t) stands
  for the ratio of the norms, so that no image depends on its batch. α_t is the whole chain's."""
  within("snr", snr, 1e-9, 1e9)
  alpha = ddpm.alpha[np.searchsorted(ddpm.times, chain.times)]
  return [functools.partial(langevin_move, r=table(2 * snr**2 * alpha)), *sde(ddpm, chain)[0]], True

def langevin(ddpm:DDPM, chain:DDPM, inner:int=5, r:float=0.2) -> Moves:
  """Annealed Langevin dynamics, NCSN (Song & Ermon 2019, arXiv:1907.05600), Algorithm 1: `inner` steps at each t.

  α_i/2 of NCSN is r (1−ᾱ_t) here. NCSN has r = 0.1 and 100 steps at each of 10 levels of noise; more levels and fewer
  steps mix better with a larger r. As in NCSN, x is not rescaled between levels: what the loop
  yields with t−1 has the noise of t."""
  within("inner", inner, 1, 10**6)
  if inner % 1: raise ValueError(f"inner must be a whole number, not {inner}")
  within("r", r, 1e-9, 1 - 1e-9)
  return int(inner) * [functools.partial(langevin_move, r=table(np.full(chain.T + 1, r)))], True

def langevin_move(d:DDPM, model:Callable, x_t:Tensor, t:Tensor, z:Tensor, clip:bool, r:Tensor):
  """x + δ ∇log q(x) + √(2δ) z with the step δ = r (1−ᾱ_t); t stays. r: a table, r[t]."""
  x0_hat, eps_hat = denoise(d, model, x_t, t, clip)
  noise, step = d.at(d.noise_std, t, x_t), column(r[t], x_t)
  return x_t - step * noise * eps_hat + (2 * step).sqrt() * noise * z, x0_hat

MOVES:dict[str, Callable[..., Moves]] = {
  "ddim": ddim, "ode": ode, "dpm": dpm, "sde": sde, "pc": pc, "langevin": langevin}
