"""Sections 2 and 3 of "Denoising Diffusion Probabilistic Models" (Ho, Jain, Abbeel 2020, arXiv:2006.11239).

Read it beside the paper: names are the paper's symbols, time is the paper's t = 1..T, and row 0 of every table is
the data. Every forward formula is that of one jump of the chain, from time s to a later time t:

  q(x_t | x_s) = N(√α_{t|s} x_s, β_{t|s} I),   α_{t|s} = ᾱ_t / ᾱ_s,   β_{t|s} = 1 − α_{t|s}

With s = t−1 these are α_t and β_t (Eq. 2), with s = 0 they are ᾱ_t and 1 − ᾱ_t (Eq. 4); with any other s they are the
α_t and β_t of a shorter chain that visits only some of the times (not in the paper).

Tensors: x (B, C, H, W) float32 in [-1, 1]; t (B,) int32, or one int for the whole batch. A model is any callable
model(x_t, t) that returns a tensor of x_t's shape. Nothing here draws a random number: eps and noise are arguments.
"""
import math
from collections.abc import Callable, Sequence
import numpy as np
from tinygrad import Tensor, dtypes

Time = int|Sequence[int]|np.ndarray|Tensor
Model = Callable[..., Tensor]  # model(x_t, t)

def make_beta(T:int, beta_1:float, beta_T:float, schedule:str) -> np.ndarray:
  """β_1 .. β_T, Section 4: variances of the forward steps, float64 (T+1,) with β_0 = 0. "linear" is the paper's."""
  if schedule == "linear": beta = np.linspace(beta_1, beta_T, T)
  if schedule == "const": beta = np.full(T, beta_T)                                             # not in the paper
  if schedule == "quad": beta = np.linspace(math.sqrt(beta_1), math.sqrt(beta_T), T) ** 2       # not in the paper
  if schedule == "cosine":           # not in the paper: Nichol & Dhariwal 2021, Eq. 17; beta_1 and beta_T are unused
    f = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2  # ᾱₜ = f(t)/f(0)
    beta = np.minimum(1 - f[1:] / f[:-1], 0.999)
  if schedule == "geometric":        # not in the paper: log(ᾱₜ/(1−ᾱₜ)) falls evenly, as in Kingma et al. 2021
    snr = (1 - beta_1) / beta_1 * (1 - beta_T) ** np.arange(T)  # ᾱₜ/(1−ᾱₜ), by which βₜ = β_T (1−ᾱₜ) from t = 2 on
    beta = np.append(beta_1, beta_T / (1 + snr[1:]))
  return np.append(0.0, beta)

class DDPM:
  """The diffusion of Section 2: tables β, α, ᾱ, β̃ (np.float64, T+1 rows, row t is time t) and what follows from them.

  schedule, of β_1 .. β_T, Section 4
    "linear": from beta_1 to beta_T in equal steps, the paper's. Not in the paper: "quad", the same in √β; "const",
    all beta_T; "cosine", ᾱ_t falls as a squared cosine (Nichol & Dhariwal 2021), whatever beta_1 and beta_T are;
    "geometric", from β_1 on each step leaves 1 − beta_T of the signal-to-noise ratio ᾱ_t/(1−ᾱ_t)
  sigma, what the variance σ_t² of p_θ is, Section 3.2
    "beta": β_t, best for data ~ N(0, I). "beta_tilde": β̃_t, best for data that are a single point
  predict, what the model's output means, Table 2
    "eps": ε, the paper's. "mu": μ_θ, the mean of p_θ itself. "x0": x_0
  Raises ValueError for any other argument.
  """
  def __init__(self, T:int=1000, beta_1:float=1e-4, beta_T:float=0.02, schedule:str="linear", sigma:str="beta",
               predict:str="eps"):
    check_settings(T, beta_1, beta_T, schedule, sigma, predict)
    self.T, self.schedule, self.sigma, self.predict = int(T), schedule, sigma, predict
    self.beta = make_beta(self.T, beta_1, beta_T, schedule)
    self.alpha = 1 - self.beta
    self.alpha_bar = np.cumprod(self.alpha)  # ᾱₜ = α₁ α₂ … αₜ
    if self.alpha_bar[-1] < 1e-70:
      raise ValueError(f"alpha_bar_T = {self.alpha_bar[-1]:.0e} is too small for float32: lower T or the betas")
    self.beta_tilde = np.zeros(self.T + 1)   # β̃ₜ = (1−ᾱₜ₋₁)/(1−ᾱₜ) βₜ, Eq. 7
    self.beta_tilde[1:] = (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:]) * self.beta[1:]
    # On the device: log ᾱ in two float32 parts, because 1 − ᾱₜ/ᾱₛ in plain float32 can be off by several percent.
    log_alpha_bar = np.cumsum(np.log1p(-self.beta))
    high = log_alpha_bar.astype(np.float32)
    self.log_alpha_bar = Tensor(high).realize(), Tensor((log_alpha_bar - high).astype(np.float32)).realize()

  # *** Sections 2 and 3.1: the forward process q ***

  def jump(self, x:Tensor, t:Time, s:Tensor|None=None) -> tuple[Tensor, Tensor]:
    """√α_{t|s} and β_{t|s} of q(x_t | x_s), shaped to multiply x; s = 0, the data, by default. Right to about 1e-6."""
    t = self.time(x, t)
    s = t * 0 if s is None else s
    def at(i:Tensor) -> list[Tensor]: return [column(part.to(i.device)[i], x) for part in self.log_alpha_bar]
    (high_t, low_t), (high_s, low_s) = at(t), at(s)
    d = (high_t - high_s) + (low_t - low_s)                      # log α_{t|s} = log ᾱₜ − log ᾱₛ
    series = -d * (1 + d/2 * (1 + d/3 * (1 + d/4 * (1 + d/5))))  # 1 − exp(d) for d near 0
    return (d / 2).exp(), (d > -0.1).where(series, 1 - d.exp())  # β_{t|s} = 1 − α_{t|s}

  def q_step(self, x:Tensor, t:Time, eps:Tensor) -> Tensor:
    """q(x_t | x_{t-1}), Eq. 2: one step of noise. x = x_{t-1} and eps ~ N(0, I) (B, C, H, W) -> x_t."""
    same_shape(x=x, eps=eps)
    sqrt_alpha, beta = self.jump(x, *self.times(x, t, None))
    return sqrt_alpha * x + beta.sqrt() * eps               # xₜ = √(1−βₜ) xₜ₋₁ + √βₜ ε

  def q_sample(self, x0:Tensor, t:Time, eps:Tensor) -> Tensor:
    """q(x_t | x_0), Eq. 4: all t steps of noise at once. x0 and eps ~ N(0, I) (B, C, H, W) -> x_t."""
    same_shape(x0=x0, eps=eps)
    sqrt_alpha_bar, var = self.jump(x0, t)
    return sqrt_alpha_bar * x0 + var.sqrt() * eps           # xₜ = √ᾱₜ x₀ + √(1−ᾱₜ) ε

  def posterior_weights(self, x:Tensor, t:Tensor, s:Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. 7: the weights of x_0 and of x_t in μ̃, and β̃, each shaped to multiply x."""
    sqrt_alpha, beta = self.jump(x, t, s)   # √α_{t|s}, β_{t|s}
    sqrt_alpha_bar, var_s = self.jump(x, s) # √ᾱ_s, 1−ᾱ_s
    var_t = self.jump(x, t)[1]              # 1−ᾱ_t
    return sqrt_alpha_bar * beta / var_t, sqrt_alpha * var_s / var_t, var_s / var_t * beta

  def q_posterior(self, x0:Tensor, x_t:Tensor, t:Time, s:Time|None=None) -> tuple[Tensor, Tensor]:
    """q(x_{t-1} | x_t, x_0), Eq. 6-7; q(x_s | x_t, x_0) for any s < t. -> mean μ̃ (B, C, H, W), var β̃ (B, 1, 1, 1).

    At s = 0 it is the point x_0 itself: mean x_0, variance 0. Raises ValueError where s >= t is known.
    """
    same_shape(x_t=x_t, x0=x0)
    t, s = self.times(x_t, t, s)
    weight_x0, weight_x_t, beta_tilde = self.posterior_weights(x_t, t, s)
    mean = weight_x0 * x0 + weight_x_t * x_t                # μ̃ = √ᾱₜ₋₁ βₜ/(1−ᾱₜ) x₀ + √αₜ (1−ᾱₜ₋₁)/(1−ᾱₜ) xₜ
    return column(s > 0, x_t).where(mean, x0), beta_tilde   # β̃ = (1−ᾱₜ₋₁)/(1−ᾱₜ) βₜ

  def prior_kl(self, x0:Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)), Eq. 5: (B,) bits/dim. Near 0 if T steps leave nothing of the data."""
    sqrt_alpha_bar, var = self.jump(x0, self.T)
    return bits_per_dim(kl_normal(sqrt_alpha_bar * x0, var, 0.0, 1.0))

  # *** Section 3.2: the reverse process p_θ ***

  def predict_x0(self, x_t:Tensor, t:Time, out:Tensor) -> Tensor:
    """x̂_0 from the model's output, Eq. 15 (predict="eps"); Eq. 7 solved for x_0 (predict="mu"). (B, C, H, W)."""
    same_shape(x_t=x_t, out=out)
    if self.predict == "x0": return out
    if self.predict == "mu":
      weight_x0, weight_x_t, _ = self.posterior_weights(x_t, *self.times(x_t, t, None))
      return (out - weight_x_t * x_t) / weight_x0
    sqrt_alpha_bar, var = self.jump(x_t, t)
    return (x_t - var.sqrt() * out) / sqrt_alpha_bar        # x̂₀ = (xₜ − √(1−ᾱₜ) ε_θ) / √ᾱₜ

  def predict_eps(self, x_t:Tensor, t:Time, x0:Tensor) -> Tensor:
    """The noise that leads from x_0 to x_t, Eq. 4 solved for ε. (B, C, H, W)."""
    same_shape(x_t=x_t, x0=x0)
    sqrt_alpha_bar, var = self.jump(x_t, t)
    return (x_t - sqrt_alpha_bar * x0) / var.sqrt()         # ε = (xₜ − √ᾱₜ x₀) / √(1−ᾱₜ)

  def p_mean_var(self, model:Model, x_t:Tensor, t:Time, s:Time|None=None,
                 clip:bool=True) -> tuple[Tensor, Tensor, Tensor]:
    """p_θ(x_{t-1} | x_t), Eq. 1, mean by Eq. 11; p_θ(x_s | x_t) for any s < t. -> mean, variance (B, 1, 1, 1), x̂_0.

    Eq. 11 is Eq. 7 with the x̂_0 of Eq. 15 in the place of x_0. clip (the authors' code, not in the paper) first brings
    x̂_0 into [-1, 1], where the data are. With predict="mu" the mean of x_{t-1} is the model's output itself, which is
    not clipped; that of an earlier x_s comes from x̂_0. The variance is σ_t² of Section 3.2: β_t or β̃_t, as `DDPM` says.
    """
    t, s = self.times(x_t, t, s)
    out = model(x_t, t)
    x0_hat = self.predict_x0(x_t, t, out)
    if clip: x0_hat = x0_hat.clip(-1, 1)
    # without clipping this is Eq. 11 as printed, μ_θ = 1/√αₜ (xₜ − βₜ/√(1−ᾱₜ) ε_θ): test_eq11_is_eq7_with_eq15
    mean, beta_tilde = self.q_posterior(x0_hat, x_t, t, s)  # μ_θ(xₜ, t) = μ̃(xₜ, x̂₀)
    if self.predict == "mu": mean = column(s == t - 1, x_t).where(out, mean)
    return mean, self.jump(x_t, t, s)[1] if self.sigma == "beta" else beta_tilde, x0_hat

  def p_sample(self, model:Model, x_t:Tensor, t:Time, noise:Tensor, s:Time|None=None, clip:bool=True) -> Tensor:
    """x_{t-1} ~ p_θ(x_{t-1} | x_t), Algorithm 2, line 4; x_s for any s < t. (B, C, H, W).

    noise ~ N(0, I) is line 3's z; where s = 0 it is not used.
    """
    same_shape(x_t=x_t, noise=noise)
    t, s = self.times(x_t, t, s)
    mean, var, _ = self.p_mean_var(model, x_t, t, s, clip)
    return mean + column(s > 0, x_t).where(var.sqrt() * noise, 0.0)  # xₜ₋₁ = μ_θ + σₜ z,  z = 0 at the last step

  def score(self, model:Model, x_t:Tensor, t:Time) -> Tensor:
    """∇ log q(x_t) as the model sees it, Section 3.2 and Eq. 12: (B, C, H, W)."""
    out = model(x_t, t := self.time(x_t, t))
    same_shape(x_t=x_t, out=out)
    eps = out if self.predict == "eps" else self.predict_eps(x_t, t, self.predict_x0(x_t, t, out))
    return -eps / self.jump(x_t, t)[1].sqrt()              # ∇ log q(xₜ) ≈ −ε_θ / √(1−ᾱₜ)

  # *** Sections 3.3 and 3.4: what is minimized and what is measured ***

  def loss_simple(self, model:Model, x0:Tensor, t:Time, eps:Tensor) -> Tensor:
    """L_simple, Eq. 14: mean squared error of the model, a scalar, at one time for each example and one noise eps."""
    return self.loss_terms(model, x0, t, eps).mean()

  def loss_terms(self, model:Model, x0:Tensor, t:Time, eps:Tensor) -> Tensor:
    """Eq. 14 before its expectation: the mean squared error of each example (B,)."""
    t, x_t = self.time(x0, t), self.q_sample(x0, t, eps)
    target = self.target(x0, x_t, t, eps)
    same_shape(x0=x0, out=(out := model(x_t, t)))
    return (target - out).square().mean(tuple(range(1, x0.ndim)))  # ‖ε − ε_θ(√ᾱₜ x₀ + √(1−ᾱₜ) ε, t)‖²

  def target(self, x0:Tensor, x_t:Tensor, t:Time, eps:Tensor) -> Tensor:
    """What the model's answer is compared with: ε (the paper), x_0 (predict="x0") or μ̃ (predict="mu", Eq. 8)."""
    return eps if self.predict == "eps" else x0 if self.predict == "x0" else self.q_posterior(x0, x_t, t)[0]

  def vlb_term(self, model:Model, x0:Tensor, t:Time, eps:Tensor, clip:bool=True) -> Tensor:
    """The bound's term of time t, Eq. 5: L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p_θ), or L_0 (Eq. 13) at t = 1.

    x0 (B, C, H, W) on the 256 levels, x_t made from it with eps -> (B,) bits/dim. Summed over t = 1..T, with
    prior_kl(x0), it is the bound. With σ_t fixed, the KL is the weighted squared error of μ in Eq. 8, 9, 10, or that
    of ε in Eq. 12, plus what does not depend on the model. At t = 1 the variance is β̃_2, as in the authors' code (not
    in the paper): β̃_1 is 0. It is β_1/2 where that is more, as it is if β_2 is far below β_1 ("geometric").
    """
    t = self.time(x0, t)
    x_t = self.q_sample(x0, t, eps)
    mean_q, var_q = self.q_posterior(x0, x_t, t)
    mean_p, var_p, _ = self.p_mean_var(model, x_t, t, clip=clip)
    last = column(t == 1, x0)
    var_p = last.where(float(max(self.beta_tilde[2], self.beta[1] / 2) if self.T > 1 else self.beta[1]), var_p)
    L_0 = -discretized_log_likelihood(x0, mean_p, var_p.sqrt())
    return bits_per_dim(last.where(L_0, kl_normal(mean_q, var_q, mean_p, var_p)))

  # *** which times are taken ***

  def time(self, x:Tensor, t:Time, first:int=1) -> Tensor:
    """t (an int, an array or a Tensor) as an int Tensor (B,) where x is. ValueError if known to leave first..T."""
    if not isinstance(t, Tensor):
      t = np.asarray(t)
      if t.dtype.kind not in "iu" or t.shape not in ((), x.shape[:1]) or t.min() < first or t.max() > self.T:
        raise ValueError(f"a time must be one int or {x.shape[0]} of them within {first}..{self.T}, not {t.tolist()}")
      t = Tensor(np.full(x.shape[:1], t, np.int32))
    if t.shape != x.shape[:1] or not dtypes.is_int(t.dtype):
      raise ValueError(f"a time must be an int tensor of shape {x.shape[:1]}, not {t.dtype} {t.shape}")
    return t.shard_like(x)

  def times(self, x:Tensor, t:Time, s:Time|None) -> tuple[Tensor, Tensor]:
    """(t, s) as int Tensors (B,), s = t−1 by default. ValueError unless s < t, where that is known."""
    known = not isinstance(t, Tensor) and not isinstance(s, Tensor) and s is not None
    if known and np.any(np.asarray(s) >= np.asarray(t)): raise ValueError(f"s must be below t, but s = {s}, t = {t}")
    t = self.time(x, t)
    return t, t - 1 if s is None else self.time(x, s, 0)

def kl_normal(mean_q:Tensor, var_q:Tensor, mean_p:Tensor|float, var_p:Tensor|float) -> Tensor:
  """KL(N(mean_q, var_q) || N(mean_p, var_p)), the terms of Eq. 5 in closed form: elementwise, nats."""
  r = var_q / var_p
  d = r - 1
  series = d * d * (1/2 - d * (1/3 - d/4))                # r − 1 − log r near r = 1, where float32 keeps nothing of it
  gap = (d.abs() < 0.05).where(series, d - r.log())
  return (gap + (mean_q - mean_p).square() / var_p) / 2   # ½ (r − 1 − log r + (μ_q − μ_p)²/σₚ²),  r = σ_q²/σₚ²

def log_cdf(z:Tensor) -> Tensor:
  """log Φ(z) of the standard normal, for Eq. 13: relative error < 1e-6 for z <= 0, where Tensor.erf leaves nothing."""
  a = (z < 0).where(-z, z)
  u = 1 / (1 + 0.3 * a)
  poly:Tensor|float = 0.0
  for c in (-0.1699297, 0.6758353, -0.8922221, 0.3705922, -0.1398007, 0.1772458, 0.4079786, 1.0000654, -2.1229117):
    poly = poly * u + c                  # a minimax fit of log Φ(−a) + a²/2 − log u, made for this file
  tail = u.log() + poly - a * a / 2      # log Φ(−|z|)
  return (z < 0).where(tail, (1 - tail.exp()).log())

def discretized_log_likelihood(x0:Tensor, mean:Tensor, sigma:Tensor|float) -> Tensor:
  """log p_θ(x_0 | x_1), Eq. 13: log of the mass N(mean, sigma²) gives the bin of each x0, (B, C, H, W) nats.

  x0 holds the 256 levels k/127.5 − 1. A bin reaches 1/255 to either side; those of −1 and 1 reach to infinity.
  """
  same_shape(x0=x0, mean=mean)
  edge = x0.abs() > 0.999
  # The normal is symmetric: mirror each bin to the left tail, where log Φ is exact; an edge bin's open end to −∞.
  c = edge.where((mean - x0) * x0.sign(), -(x0 - mean).abs())
  upper, lower = log_cdf((c + 1/255) / sigma), log_cdf((c - 1/255) / sigma)
  gap = (upper - lower).maximum(1e-6)                       # never log 0, however wide sigma is
  return upper + edge.where(0.0, (1 - (-gap).exp()).log())  # log(Φ(δ₊) − Φ(δ₋)) = log Φ(δ₊) + log(1 − Φ(δ₋)/Φ(δ₊))

# *** helpers ***

def column(v:Tensor, x:Tensor) -> Tensor:
  """v (B,) as (B, 1, 1, 1), to be broadcast against x."""
  return v.reshape(-1, *[1] * (x.ndim - 1))

def bits_per_dim(nats:Tensor) -> Tensor:
  """(B, C, H, W) nats -> (B,) bits/dim."""
  return nats.flatten(1).mean(1) / math.log(2)

# *** which arguments are taken ***

def check_settings(T:int, beta_1:float, beta_T:float, schedule:str, sigma:str, predict:str):
  """ValueError for what `DDPM` does not know."""
  for name, value, known in (("schedule", schedule, ("linear", "cosine", "quad", "const", "geometric")),
                             ("sigma", sigma, ("beta", "beta_tilde")), ("predict", predict, ("eps", "x0", "mu"))):
    if value not in known: raise ValueError(f"{name} must be one of {', '.join(known)}, not {value!r}")
  if not isinstance(T, (int, np.integer)) or T < 1: raise ValueError(f"T must be a whole number from 1 up, not {T!r}")
  if not (0 < beta_1 < 1 and 0 < beta_T < 1):
    raise ValueError(f"beta_1 and beta_T must lie between 0 and 1, not {beta_1} and {beta_T}")
  if schedule in ("linear", "quad") and beta_1 > beta_T:
    raise ValueError(f"beta_1 must not exceed beta_T, but {beta_1} > {beta_T}")

def same_shape(**tensors:Tensor):
  """ValueError unless all have one shape: a wrong one would broadcast in silence."""
  if len({x.shape for x in tensors.values()}) > 1:
    raise ValueError("shapes must agree: " + ", ".join(f"{name} {x.shape}" for name, x in tensors.items()))
