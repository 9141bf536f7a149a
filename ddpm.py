"""Sections 2 and 3 of "Denoising Diffusion Probabilistic Models" (Ho, Jain, Abbeel 2020,
arXiv:2006.11239): the forward process q, the reverse process p_θ, the losses and the bound.
Time is the paper's t = 1..T. Every coefficient is a float64 table of T+1 rows; row 0 is the data.
Tensors: x_0 (B, C, H, W) in [-1, 1], x_t and ε of its shape; t (B,) int32, or one int; `out`, the
network's answer to (x_t, t). Noise is an argument. A wrong shape or time raises ValueError."""
from __future__ import annotations
import copy, math
from collections.abc import Callable, Sequence
import numpy as np
from tinygrad import Tensor, dtypes

Time = int|Sequence[int]|np.ndarray|Tensor
CHOICES = {"schedule": ("linear", "cosine", "quad", "const", "geometric"),
           "sigma": ("beta", "beta_tilde", "learned"), "predict": ("eps", "x0", "mu", "v")}

def make_beta(T:int, beta_1:float, beta_T:float, schedule:str|Sequence[float]) -> np.ndarray:
  """β_1 .. β_T, Section 4: the variances of the forward steps, float64 (T+1,) with β_0 = 0."""
  if not isinstance(schedule, str): beta, schedule = np.array(schedule, np.float64), "own"
  if schedule == "linear": beta = np.linspace(beta_1, beta_T, T)
  if schedule == "const": beta = np.full(T, beta_T)  # this and "quad": tried in Appendix B
  if schedule == "quad": beta = np.linspace(math.sqrt(beta_1), math.sqrt(beta_T), T) ** 2
  if schedule == "cosine":     # not in the paper: Nichol & Dhariwal 2021, Eq. 17: ᾱₜ = f(t)/f(0)
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
  if schedule == "geometric":  # nor this, as in Kingma et al. 2021: log ᾱₜ/(1−ᾱₜ) falls linearly
    snr = (1 - beta_1) / beta_1 * (1 - beta_T) ** np.arange(T)
    beta = np.append(beta_1, beta_T / (1 + snr[1:]))
  if beta.shape == (T,) and 0 < beta.min() <= beta.max() < 1: return np.append(0.0, beta)
  raise ValueError(f"a schedule of one's own must be T = {T} numbers between 0 and 1")

class DDPM:
  """The diffusion of Section 2: its tables, and each equation as a method. CHOICES lists the words.
  schedule: all β_t as a list, or how they go from beta_1 to beta_T: "linear"; "quad" and "const",
    always beta_T, tried in Appendix B; not in the paper: "geometric"; "cosine", which uses neither.
  sigma: p_θ's variance σ_t², Section 3.2: "beta", β_t; "beta_tilde", β̃_t; "learned", Table 2's
    Σ_θ: `out` has C channels more, log σ_t² of each pixel (as in the authors' code).
  predict: what the network answers: "eps", ε; "mu", μ_θ (Table 2); "x0", x_0 (end of Section 3.2);
    "v", √ᾱ ε − √(1−ᾱ) x_0 (not in the paper: Salimans & Ho 2022, arXiv:2202.00512).
  times[t] is the time to give the network at step t: t itself, except in chains of `every`."""
  def __init__(self, T:int=1000, beta_1:float=1e-4, beta_T:float=0.02,
               schedule:str|Sequence[float]="linear", sigma:str="beta", predict:str="eps"):
    check(T, beta_1, beta_T, schedule=schedule, sigma=sigma, predict=predict)
    self.T, self.sigma, self.predict, self.times = int(T), sigma, predict, np.arange(T + 1)
    self.make_tables(make_beta(self.T, beta_1, beta_T, schedule))
    if (last := self.alpha_bar[-1]) < 1e-70:
      raise ValueError(f"alpha_bar_T = {last:.0e} is too small for float32: lower T or the betas")
  def make_tables(self, beta:np.ndarray, whole:DDPM|None=None, step_of:np.ndarray|None=None):
    """Every coefficient from β. A shorter chain stops at the steps `step_of` of the `whole` one."""
    self.beta, self.alpha = beta, 1 - beta
    self.alpha_bar = np.cumprod(self.alpha)                                 # ᾱₜ = α₁ α₂ … αₜ
    noise_var = -np.expm1(np.cumsum(np.log1p(-beta)))                       # 1−ᾱₜ to every digit
    prev = np.append(0.0, noise_var[:-1])                                   # 1−ᾱₜ₋₁
    self.sqrt_alpha, self.sqrt_beta = np.sqrt(self.alpha), np.sqrt(beta)
    self.sqrt_alpha_bar, self.noise_std = np.sqrt(self.alpha_bar), np.sqrt(noise_var)  # √(1−ᾱₜ)
    noise_var[0] = 1                                                        # keeps row 0 from 0/0
    self.mu_x0 = np.append(1, self.sqrt_alpha_bar[:-1]) * beta / noise_var  # Eq. 7: weights in μ̃
    self.mu_xt, self.beta_tilde = np.sqrt(self.alpha) * prev / noise_var, prev / noise_var * beta
    self.var = self.beta_tilde if self.sigma == "beta_tilde" else beta      # Section 3.2: σₜ²
    # L_0's σ₁², for "beta" as well: β̃₂ (the authors' code), or β₁/2 if larger (not in the paper)
    least = max(self.beta_tilde[2], beta[1] / 2) if self.T > 1 else beta[1]
    self.tilde_L0, self.var_L0 = (np.r_[v[0], least, v[2:]] for v in (self.beta_tilde, self.var))
    r = np.append(1, self.tilde_L0[1:] / self.var_L0[1:])
    self.kl_const = (r - 1 - np.log(r)) / 2  # Eq. 8's C: KL(N(μ, β̃ₜ) ‖ N(μ, σₜ²)), r = β̃ₜ/σₜ²
    # A network's μ and log σ² describe a step of the whole chain: invert its Eq. 7, scale σ² by β.
    self.out_x0, self.out_xt, self.log_scale = self.mu_x0, self.mu_xt, np.zeros(self.T + 1)
    if whole is not None:
      self.out_x0, self.out_xt = whole.out_x0[step_of], whole.out_xt[step_of]
      self.log_scale[1:] = np.log(beta[1:] / whole.beta[step_of][1:]) + whole.log_scale[step_of][1:]
    self.tables = [v for v in vars(self).values() if isinstance(v, np.ndarray) and v.dtype == float]
    self.on_device = Tensor(np.stack(self.tables, 1).astype(np.float32)).realize() # (T+1, tables)
  def every(self, times:Sequence[int]) -> DDPM:
    """The chain that visits only `times` = [τ_n, ..., τ_0 = 0]: a DDPM of n steps whose ᾱ_i is the
    ᾱ of time τ_i, so β_i = 1 − ᾱ_τᵢ/ᾱ_τᵢ₋₁ (not in the paper: Nichol & Dhariwal 2021)."""
    s = np.atleast_1d(times)[::-1]
    if s.dtype.kind not in "iu" or len(s) < 2 or s[0] or s[-1] > self.T or (np.diff(s) < 1).any():
      raise ValueError(f"the times must decrease from at most {self.T} to 0, not {times}")
    chain, a = copy.copy(self), self.alpha_bar[s]
    chain.T, chain.times = len(s) - 1, self.times[s]
    if s[-1] == chain.T and self.out_x0 is self.mu_x0: chain.make_tables(self.beta[s])
    else: chain.make_tables(np.append(0.0, 1 - a[1:] / a[:-1]), self, s)
    return chain
  def at(self, table:np.ndarray, t:Time, x:Tensor) -> Tensor:
    """table[t], float32 (B, 1, 1, 1), ready to multiply x."""
    t, own = self.time(x, t), [i for i, known in enumerate(self.tables) if known is table]
    if not own: return column(Tensor(table.astype(np.float32)).to(x.device)[t], x)
    rows = self.on_device.to(x.device)[t].contiguous()  # one look-up for all of the chain's tables
    return column(rows[:, own[0]], x)

  # *** Sections 2 and 3.1: the forward process q ***
  def q_step(self, x:Tensor, t:Time, eps:Tensor) -> Tensor:
    """q(x_t | x_{t-1}), Eq. 2: one step of noise. x = x_{t-1}, ε ~ N(0, I) -> x_t."""
    t = self.time(x, t, eps=eps)
    return self.at(self.sqrt_alpha, t, x) * x + self.at(self.sqrt_beta, t, x) * eps
  def q_sample(self, x0:Tensor, t:Time, eps:Tensor) -> Tensor:
    """q(x_t | x_0), Eq. 4: t steps of noise at once, x_t = √ᾱ_t x_0 + √(1−ᾱ_t) ε."""
    t = self.time(x0, t, eps=eps)
    return self.at(self.sqrt_alpha_bar, t, x0) * x0 + self.at(self.noise_std, t, x0) * eps
  def q_posterior(self, x0:Tensor, x_t:Tensor, t:Time) -> tuple[Tensor, Tensor]:
    """q(x_{t-1} | x_t, x_0), Eq. 6-7: mean μ̃, variance β̃_t (B, 1, 1, 1). At t = 1: x_0 and 0."""
    t = self.time(x_t, t, x0=x0)
    mean = self.at(self.mu_x0, t, x_t) * x0 + self.at(self.mu_xt, t, x_t) * x_t
    return mean, self.at(self.beta_tilde, t, x_t)  # μ̃ = √ᾱₜ₋₁βₜ/(1−ᾱₜ) x₀ + √αₜ(1−ᾱₜ₋₁)/(1−ᾱₜ) xₜ
  def prior_kl(self, x0:Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) ‖ N(0, I)), Eq. 5: (B,) bits/dim. Near 0 if x_T hides all of x_0."""
    a = float(self.alpha_bar[-1])
    return bits_per_dim((a * x0.square() - a - math.log1p(-a)) / 2)

  # *** Section 3.2: the reverse process p_θ ***
  def predict_x0(self, x_t:Tensor, t:Time, out:Tensor) -> Tensor:
    """x̂_0 from the network's answer: Eq. 15 for predict="eps". (B, C, H, W)."""
    t = self.time(x_t, t, out=(out := self.answer(x_t, out)))
    a, b = self.at(self.sqrt_alpha_bar, t, x_t), self.at(self.noise_std, t, x_t)
    if self.predict == "eps": return (x_t - b * out) / a     # x̂₀ = (xₜ − √(1−ᾱₜ) ε_θ) / √ᾱₜ
    if self.predict == "x0": return out
    if self.predict == "v": return a * x_t - b * out
    return (out - self.at(self.out_xt, t, x_t) * x_t) / self.at(self.out_x0, t, x_t)  # from Eq. 7
  def predict_eps(self, x_t:Tensor, t:Time, x0:Tensor) -> Tensor:
    """ε from x_t and a given x_0 (not from the network): Eq. 4 solved for ε. (B, C, H, W)."""
    t = self.time(x_t, t, x0=x0)
    return (x_t - self.at(self.sqrt_alpha_bar, t, x_t) * x0) / self.at(self.noise_std, t, x_t)
  def p_mean_var(self, x_t:Tensor, t:Time, out:Tensor, clip:bool=True) -> tuple[Tensor, ...]:
    """p_θ(x_{t-1} | x_t), Eq. 1, with the mean of Eq. 11, that is Eq. 7 with Eq. 15's x̂_0 for x_0.
    -> mean; σ_t², (B, 1, 1, 1) or, learned, as x_t; x̂_0. clip (the authors' code, not the paper)
    brings x̂_0 into [-1, 1] first. A predicted μ is taken as it is, but not in a shorter chain."""
    x0_hat = self.predict_x0(x_t, t, out)
    if clip: x0_hat = x0_hat.clip(-1, 1)
    # unclipped, this is Eq. 11 as printed: μ_θ = 1/√αₜ (xₜ − βₜ/√(1−ᾱₜ) ε_θ)
    mean = self.q_posterior(x0_hat, x_t, t)[0]               # μ_θ(xₜ, t) = μ̃(xₜ, x̂₀)
    if self.predict == "mu" and self.out_x0 is self.mu_x0: mean = self.answer(x_t, out)
    if self.sigma != "learned": return mean, self.at(self.var, t, x_t), x0_hat
    same_shape(x_t=x_t, log_var=(log_var := out[:, x_t.shape[1]:]))
    return mean, (log_var + self.at(self.log_scale, t, x_t)).exp(), x0_hat
  def p_sample(self, x_t:Tensor, t:Time, out:Tensor, z:Tensor, clip:bool=True):
    """x_{t-1} ~ p_θ(x_{t-1} | x_t), Algorithm 2, line 4; and x̂_0. z ~ N(0, I), unused at t = 1."""
    t = self.time(x_t, t, z=z)
    mean, var, x0_hat = self.p_mean_var(x_t, t, out, clip)
    return mean + column(t > 1, x_t).where(var.sqrt() * z, 0.0), x0_hat  # xₜ₋₁ = μ_θ + σₜ z
  def score(self, x_t:Tensor, t:Time, out:Tensor) -> Tensor:
    """∇ log q(x_t) as the network sees it, Section 3.2: −ε_θ/√(1−ᾱ_t), (B, C, H, W)."""
    eps = self.predict_eps(x_t, t, self.predict_x0(x_t, t, out))
    if self.predict == "eps": eps = self.answer(x_t, out)
    return -eps / self.at(self.noise_std, t, x_t)

  # *** Sections 2 and 3.2 to 3.4: what is minimized and what is measured ***
  def loss_simple(self, model:Callable[..., Tensor], x0:Tensor, t:Time, eps:Tensor) -> Tensor:
    """L_simple, Eq. 14: mean of (ε − ε_θ(√ᾱ_t x_0 + √(1−ᾱ_t) ε, t))² over images and dimensions."""
    t, x_t = self.time(x0, t), self.q_sample(x0, t, eps)
    return self.squared_error(x0, x_t, t, eps, model(x_t, t)).mean()
  def squared_error(self, x0:Tensor, x_t:Tensor, t:Time, eps:Tensor, out:Tensor) -> Tensor:
    """Eq. 14 before its expectation: the mean of (target − answer)² in each example, (B,)."""
    same_shape(x0=x0, eps=eps, out=(out := self.answer(x0, out)))
    return (self.target(x0, x_t, t, eps) - out).square().flatten(1).mean(1)
  def target(self, x0:Tensor, x_t:Tensor, t:Time, eps:Tensor) -> Tensor:
    """What the network should answer: ε (Eq. 14), μ̃ (Eq. 8, 9, 10), x_0 or v, see `predict`."""
    if self.predict == "eps": return eps
    if self.predict == "x0": return x0
    if self.predict == "mu": return self.q_posterior(x0, x_t, t)[0]
    return self.at(self.sqrt_alpha_bar, t, x0) * eps - self.at(self.noise_std, t, x0) * x0
  def vlb_term(self, x0:Tensor, x_t:Tensor, t:Time, out:Tensor, clip:bool=True) -> Tensor:
    """The bound's term for time t, Eq. 5: L_{t-1} by Eq. 8; for t = 1 L_0 by Eq. 13. (B,) bits/dim.
    x0 must lie on the 256 levels. L_0's σ_1² is var_L0's. The bound: prior_kl(x0) + Σ_t of this."""
    mu_tilde, (mu, var, _) = self.q_posterior(x0, x_t, t)[0], self.p_mean_var(x_t, t, out, clip)
    if self.sigma == "learned":                              # Eq. 8's C depends on θ then
      const = ((r := self.at(self.tilde_L0, t, x0) / var) - 1 - r.log()) / 2
    else: var, const = self.at(self.var_L0, t, x0), self.at(self.kl_const, t, x0)
    L = (mu_tilde - mu).square() / (2 * var) + const         # ‖μ̃ − μ_θ‖²/(2σₜ²) + C, Eq. 8
    L_0 = -discretized_log_likelihood(x0, mu, var.sqrt())    # −log p_θ(x₀ | x₁), Eq. 13
    return bits_per_dim(column(self.time(x0, t) == 1, x0).where(L_0, L))
  def vlb_weight(self, t:int|np.ndarray) -> np.ndarray:
    """Eq. 12's factor β_t²/(2 σ_t² α_t (1−ᾱ_t)) of ‖ε − ε_θ‖² in L_{t-1}, float64. A learned σ_t²
    counts as β_t. σ_1² is β_1 or, for "beta_tilde", L_0's variance, because β̃_1 = 0."""
    var = self.tilde_L0 if self.sigma == "beta_tilde" else self.beta
    return self.beta[t] ** 2 / (2 * var[t] * self.alpha[t] * self.noise_std[t] ** 2)

  # *** what the arguments mean ***
  def answer(self, x:Tensor, out:Tensor) -> Tensor:
    """What `predict` names: all of the network's answer or, with a learned σ, its first half."""
    return out[:, :x.shape[1]] if self.sigma == "learned" else out
  def time(self, x:Tensor, t:Time, **others:Tensor) -> Tensor:
    """t, (B,) int, on x's device. ValueError if it is no time (a Tensor's numbers: not read)."""
    same_shape(x=x, **others)
    if not isinstance(t, Tensor):
      known = np.asarray(t)
      if known.dtype.kind not in "iu" or known.min() < 1 or known.max() > self.T or known.ndim > 1:
        raise ValueError(f"a time must be whole numbers within 1..{self.T}, not {known.tolist()}")
      t = Tensor(known.astype(np.int32)) if known.ndim else Tensor(np.full(x.shape[0], t, np.int32))
    if t.shape == x.shape[:1] and dtypes.is_int(t.dtype): return t.to(x.device)
    raise ValueError(f"a time must be an int tensor {x.shape[:1]}, not {t.dtype} {t.shape}")

def discretized_log_likelihood(x0:Tensor, mean:Tensor, sigma:Tensor|float) -> Tensor:
  """Eq. 13, log p_θ(x_0 | x_1) of each pixel and channel, (B, C, H, W) nats: the log of the mass of
  N(μ, σ²) in x_0's bin, log[Φ((x_0 + 1/255 − μ)/σ) − Φ((x_0 − 1/255 − μ)/σ)]. The bins of −1 and 1
  have no outer edge. All are mirrored to the left tail, where `log_cdf` is accurate."""
  same_shape(x0=x0, mean=mean)
  edge = x0.abs() > 0.999
  c = edge.where((mean - x0) * x0.sign(), -(x0 - mean).abs())  # x_0 − μ, mirrored
  upper, lower = log_cdf((c + 1/255) / sigma), log_cdf((c - 1/255) / sigma)
  gap = (upper - lower).maximum(1e-6)                       # never log 0, however wide σ is
  return upper + edge.where(0.0, (1 - (-gap).exp()).log())  # log Φ(δ₊) + log(1 − Φ(δ₋)/Φ(δ₊))
def log_cdf(z:Tensor) -> Tensor:
  """log Φ(z), for Eq. 13: relative error < 1e-6 for z <= 0, even where float32 Φ(z) is 0."""
  a = (z < 0).where(-z, z)
  u, poly = 1 / (1 + 0.3 * a), a * 0
  for c in (-0.1699297, 0.6758353, -0.8922221, 0.3705922, -0.1398007, 0.1772458, 0.4079786,
            1.0000654, -2.1229117): poly = poly * u + c     # a fit of log Φ(−a) + a²/2 − log u
  tail = u.log() + poly - a * a / 2                         # log Φ(−|z|)
  return (z < 0).where(tail, (1 - tail.exp()).log())
def column(v:Tensor, x:Tensor) -> Tensor: return v.reshape(-1, *[1] * (x.ndim - 1))  # (B, 1, 1, 1)
def bits_per_dim(nats:Tensor) -> Tensor: return nats.flatten(1).mean(1) / math.log(2)  # (B,)
def same_shape(**tensors:Tensor):  # another shape would be broadcast in silence
  if len({x.shape for x in tensors.values()}) > 1:
    raise ValueError(f"shapes must agree: { {k: x.shape for k, x in tensors.items()} }")
def check(T:int, beta_1:float, beta_T:float, **words:str|Sequence[float]):
  for k, word in words.items():
    if k == "schedule" and not isinstance(word, str): continue  # of one's own
    if word not in CHOICES[k]: raise ValueError(f"{k} must be one of {CHOICES[k]}, not {word!r}")
  if not 1 <= T < math.inf or T % 1: raise ValueError(f"T must be whole and 1 or more, not {T!r}")
  rises = str(words["schedule"]) in ("linear", "quad")
  if not (0 < beta_1 < 1 and 0 < beta_T < 1) or rises and beta_1 > beta_T:
    raise ValueError(f"beta_1 = {beta_1} and beta_T = {beta_T} must rise between 0 and 1")
