"""Tests by independent calculation: closed forms, float64, numerical integration, brute force;
never the code's own output.

  make test                         all of them
  .venv/bin/python -m pytest -q test_ddpm.py -k ddpm      one section: ddpm, unet, data, train, sample or evaluate
"""
import contextlib, ctypes, functools, gzip, hashlib, http.server, inspect, io, json, math, os, pathlib, re, signal, stat
import subprocess, sys, tarfile, threading, time, tracemalloc, types, zipfile, zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import pytest
from PIL import Image
import unet  # before the others, because it tells tinygrad how to compile
import data, evaluate, sample, train
from ddpm import DDPM, column, discretized_log_likelihood, kl_normal, log_cdf
from evaluate import auc, bound, geometric, ode_bpd, ode_log_density, rate_distortion, times, trajectory_bound
from sample import SAMPLERS, ddim_encode, ddim_step, draw_x_T, generators, guided, normals, timesteps
from tinygrad import Device, GlobalCounters, Tensor, TinyJit, nn

close = np.testing.assert_allclose
rng = lambda seed=0: np.random.default_rng(seed)
f32 = lambda a: Tensor(np.asarray(a, np.float32)).realize()

# ***** ddpm.py *****

SCHEDULES = ("linear", "cosine", "quad", "const")
col = lambda *v: f32(np.array(v, np.float64).reshape(-1, 1, 1, 1))
at_times = lambda *t: Tensor(np.array(t, np.int32))
num = lambda x: x.numpy().astype(np.float64)
vec = lambda x: num(x).ravel()
integrate = lambda y, x: ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()
const = lambda a: lambda x_t, t: f32(a)  # a model that returns a

def products(d, t, s):
  """Float64 without a ratio or a logarithm: √α_{t|s}, β_{t|s}, with 1 − α₁…αₙ summed as β₁ + α₁β₂ + α₁α₂β₃ + …"""
  def one(t, s):
    a, b = 1.0, 0.0
    for i in range(s + 1, t + 1): b, a = b + a * d.beta[i], a * (1 - d.beta[i])
    return math.sqrt(a), b
  return one(t, s)

def posterior(d, t, s):
  """Eq. 7 in float64: weight of x_0, weight of x_t, variance. By conditioning one normal on another."""
  (a_ts, b_ts), (a_s, b_s) = products(d, t, s), products(d, s, 0)
  if s == 0: return 1.0, 0.0, 0.0
  precision = 1 / b_s + a_ts**2 / b_ts  # prior N(a_s x0, b_s), likelihood x_t = a_ts x_s + noise
  return a_s / b_s / precision, a_ts / b_ts / precision, 1 / precision

def weights(d, t, s):
  """posterior for a batch of at_times, each of the three (B, 1, 1, 1)."""
  return np.array([posterior(d, int(i), int(j)) for i, j in zip(t, s)]).T.reshape(3, -1, 1, 1, 1)

# *** schedules ***

def test_linear_schedule_is_the_papers():
  d = DDPM()
  assert d.T == 1000
  assert all(a.shape == (1001,) and a.dtype == np.float64 for a in (d.beta, d.alpha, d.alpha_bar, d.beta_tilde))
  assert d.beta[1] == 1e-4 and d.beta[1000] == 0.02 and np.allclose(np.diff(d.beta[1:]), (0.02 - 1e-4) / 999)
  assert d.beta[0] == 0 and d.alpha[0] == d.alpha_bar[0] == 1 and d.beta_tilde[0] == d.beta_tilde[1] == 0
  assert d.alpha_bar[1000] == pytest.approx(math.prod(1 - b for b in d.beta))
  assert d.alpha_bar[1000] == pytest.approx(4.036e-5, rel=1e-3)
  for t in (2, 1000): assert d.beta_tilde[t] == pytest.approx(posterior(d, t, t - 1)[2])

def test_other_schedules():
  c = DDPM(schedule="cosine")
  f = lambda t: math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2
  assert [c.alpha_bar[t] for t in (1, 500, 998)] == pytest.approx([f(t) / f(0) for t in (1, 500, 998)], rel=1e-9)
  assert c.beta[1000] == 0.999 and c.beta[999] < 0.999
  q = DDPM(schedule="quad")
  assert (q.beta[1], q.beta[1000]) == pytest.approx((1e-4, 0.02)) and np.allclose(np.diff(np.sqrt(q.beta[1:]), 2), 0)
  assert (DDPM(schedule="const").beta[1:] == 0.02).all()

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_short_chains_work(schedule):
  for T in (1, 2, 3, 10):
    d = DDPM(T, schedule=schedule)
    assert len(d.beta) == T + 1 and (0 < d.beta[1:]).all() and (d.beta[1:] < 1).all()
    a = d.alpha_bar[-1]
    assert vec(d.q_sample(col(1, 0), T, col(0, 1))) == pytest.approx([math.sqrt(a), math.sqrt(1 - a)], rel=1e-5)
  d, x = DDPM(1, schedule=schedule), f32(rng().standard_normal((2, 1, 2, 2)))
  x1 = d.p_sample(lambda x_t, t: x_t * 0.1, x, 1, x)      # T = 1: x̂_0, without noise
  a = d.alpha_bar[1]
  close(x1.numpy(), (num(x) * (1 - 0.1 * math.sqrt(1 - a)) / math.sqrt(a)).clip(-1, 1), rtol=1e-5)

# *** forward process ***

def test_eq2_iterated_is_eq4():
  d = DDPM(40, 1e-3, 0.2)
  step, many = [TinyJit(lambda x, t, eps: d.q_step(x, t, eps).realize()) for _ in range(2)]
  mean, var = np.array([1.0]), np.array([0.0])      # follow x = m x_0 + N(0, v) through Eq. 2
  for t in range(1, 41):
    m = vec(step(col(1.0).realize(), at_times(t).realize(), col(0.0).realize()))
    n = vec(step(col(0.0).realize(), at_times(t).realize(), col(1.0).realize()))
    mean, var = mean * m, var * m**2 + n**2
    if t in (1, 2, 25, 40):
      assert vec(d.q_sample(col(1, 0), t, col(0, 1)))**[1, 2] == pytest.approx([mean[0], var[0]], rel=1e-5)
  r, x = rng(1), np.full((20000, 1, 1, 1), 0.7, np.float32)
  noise = lambda: r.standard_normal(x.shape).astype(np.float32)
  y = f32(x)
  for t in range(1, 41): y = many(y.realize(), at_times(*[t] * 20000).realize(), f32(noise()).realize())
  y, z = vec(y), vec(d.q_sample(f32(x), 40, f32(noise())))
  assert y.mean() == pytest.approx(z.mean(), abs=0.03) and y.std() == pytest.approx(z.std(), rel=0.02)
  assert y.mean() == pytest.approx(0.7 * math.sqrt(d.alpha_bar[40]), abs=0.02)

def test_q_sample_every_t_in_one_batch():
  d, r = DDPM(), rng(2)
  x0, eps = r.uniform(-1, 1, (1000, 1, 1, 2)), r.standard_normal((1000, 1, 1, 2))
  a = d.alpha_bar[1:].reshape(-1, 1, 1, 1)
  got = d.q_sample(f32(x0), at_times(*range(1, 1001)), f32(eps)).numpy()
  close(got, np.sqrt(a) * x0 + np.sqrt(1 - a) * eps, atol=2e-6)
  back = d.predict_eps(f32(got), at_times(*range(1, 1001)), f32(x0)).numpy()
  close(back, eps, atol=2e-4)  # float32 x_t over √(1−ᾱ₁) = 0.01

# *** posterior ***

@pytest.mark.parametrize("t,s", [(20, 19), (2, 1), (20, 7), (9, 1)])
def test_eq7_is_bayes_rule(t, s):
  d, x0, x_t = DDPM(20, 0.01, 0.3), 0.6, -0.4
  x = np.linspace(-8, 8, 160001)
  normal = lambda x, m, v: np.exp(-(x - m) ** 2 / (2 * v)) / np.sqrt(2 * np.pi * v)
  (a_ts, b_ts), (a_s, b_s) = products(d, t, s), products(d, s, 0)
  p = normal(x, a_s * x0, b_s) * normal(x_t, a_ts * x, b_ts)  # q(x_s | x_0) q(x_t | x_s)
  p /= p.sum()
  mean = (p * x).sum()
  got = d.q_posterior(col(x0), col(x_t), t, s)
  assert (got[0].item(), got[1].item()) == pytest.approx((mean, (p * (x - mean) ** 2).sum()), rel=1e-5)

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_posterior_in_float32_for_every_t(schedule):
  d = DDPM(schedule=schedule)
  @TinyJit
  def both(t, s):
    zero, one = f32(np.zeros((N, 1, 1, 1))), f32(np.ones((N, 1, 1, 1)))
    (w0, v), (wt, _) = d.q_posterior(one, zero, t, s), d.q_posterior(zero, one, t, s)
    return w0.realize(), wt.realize(), v.realize()
  T = np.arange(1, 1001)
  t, s = np.concatenate([[T, T - 1], [T, T // 2], [T, T * 0], [T, np.maximum(T - 10, 0)], [T, np.minimum(T - 1, 1)]], 1)
  N = len(t)
  log_alpha_bar = np.cumsum(np.log1p(-d.beta.astype(np.longdouble)))
  one_minus, ab_s = -np.expm1(log_alpha_bar), np.exp(log_alpha_bar[s])
  a_ts, b_ts = np.exp(log_alpha_bar[t] - log_alpha_bar[s]), -np.expm1(log_alpha_bar[t] - log_alpha_bar[s])
  ratio = one_minus[s] / one_minus[t]
  want = [np.sqrt(ab_s) * b_ts / one_minus[t], np.sqrt(a_ts) * ratio, ratio * b_ts]
  for i in (0, 500, 999, 1300, 1999, 3900): # the reference itself against products
    assert [float(w[i]) for w in want] == pytest.approx(posterior(d, int(t[i]), int(s[i])), rel=1e-7, abs=1e-12)
  for _ in range(3):  # the third call replays the JIT's graph
    got = both(at_times(*t).realize(), at_times(*s).realize())
  for g, w in zip(got, want):
    close(vec(g), w.astype(np.float64), rtol=5e-6, atol=0)
  assert (vec(got[0])[s == 0] == 1).all() and (vec(got[1])[s == 0] == 0).all() and (vec(got[2])[s == 0] == 0).all()

def test_t_may_be_int_array_or_tensor_and_s_defaults_to_t_minus_1():
  d, x = DDPM(), f32(rng().standard_normal((2, 1, 2, 2)))
  want = num(d.q_posterior(x * 0.5, x, at_times(9, 9), at_times(8, 8))[0])
  for t, s in ((9, None), ([9, 9], None), (9, 8), (at_times(9, 9), 8), (np.int64(9), at_times(8, 8))):
    assert (num(d.q_posterior(x * 0.5, x, t, s)[0]) == want).all()

# *** reverse process ***

@pytest.mark.parametrize("t,s", [(1, 0), (2, 1), (500, 499), (1000, 999), (1000, 900), (600, 1)])
def test_eq11_is_eq7_with_eq15(t, s):
  d, r = DDPM(), rng(t)
  x_t, eps = r.standard_normal((2, 1, 2, 2)), r.standard_normal((2, 1, 2, 2))
  (a_ts, b_ts), (a_t, b_t) = products(d, t, s), products(d, t, 0)
  mean = (x_t - b_ts / math.sqrt(b_t) * eps) / a_ts             # Eq. 11 as printed
  got, var, x0_hat = d.p_mean_var(const(eps), f32(x_t), t, None if s == t - 1 else s, clip=False)
  close(got.numpy(), mean, rtol=1e-5, atol=2e-5)
  close(x0_hat.numpy(), (x_t - math.sqrt(b_t) * eps) / a_t, rtol=1e-4, atol=1e-4)
  assert vec(var) == pytest.approx([b_ts] * 2, rel=1e-5)         # σ² = β
  var = DDPM(sigma="beta_tilde").p_mean_var(const(eps), f32(x_t), t, s, clip=False)[1]
  assert vec(var) == pytest.approx([posterior(d, t, s)[2]] * 2, rel=1e-5)

def test_clip():
  d, x_t = DDPM(), f32(3 * rng().standard_normal((4, 1, 2, 2)))
  zero = lambda x, t: x * 0
  mean, _, x0_hat = d.p_mean_var(zero, x_t, 900)
  free, _, x0_free = d.p_mean_var(zero, x_t, 900, clip=False)
  assert abs(num(x0_free)).max() > 1 and (num(x0_hat) == num(x0_free).clip(-1, 1)).all()
  assert (num(mean) == num(d.q_posterior(x0_hat, x_t, 900)[0])).all() and abs(num(mean) - num(free)).max() > 1e-3

def test_every_predict_mode_gives_the_same_reverse_step():
  t, r = np.array([1, 2, 30, 50]), rng(3)
  x0, eps = r.uniform(-0.9, 0.9, (4, 1, 2, 2)), r.standard_normal((4, 1, 2, 2))
  d = {p: DDPM(50, 1e-3, 0.1, predict=p) for p in ("eps", "x0", "mu")}
  a = d["eps"].alpha_bar[t].reshape(-1, 1, 1, 1)
  x_t = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
  mu_tilde = lambda s: sum(w * x for w, x in zip(weights(d["eps"], t, s), (x0, x_t)))
  mean, jump = mu_tilde(t - 1), mu_tilde(t // 2)
  for p, exact in (("eps", eps), ("x0", x0), ("mu", mean)):
    model = const(exact)
    m, _, x0_hat = d[p].p_mean_var(model, f32(x_t), at_times(*t))
    j = d[p].p_mean_var(model, f32(x_t), at_times(*t), at_times(*t // 2))[0]
    got = Tensor.stack(m, j, x0_hat, d[p].score(model, f32(x_t), at_times(*t)) * 0.03).numpy()
    close(got, np.stack([mean, jump, x0, -0.03 * eps / np.sqrt(1 - a)]), atol=3e-5)
    assert d[p].loss_simple(model, f32(x0), at_times(*t), f32(eps)).item() < 1e-12

def test_p_sample():
  d, r = DDPM(), rng(4)
  x_t, z = f32(r.standard_normal((3, 1, 2, 2))), f32(r.standard_normal((3, 1, 2, 2)))
  model = lambda x, t: x * 0.3
  t, s = at_times(1, 2, 700), at_times(0, 0, 300)
  mean, var, x0_hat = d.p_mean_var(model, x_t, t)
  sigma = np.sqrt(d.beta[[1, 2, 700]]).reshape(-1, 1, 1, 1) * np.array([0, 1, 1]).reshape(-1, 1, 1, 1)  # z = 0 at t = 1
  close(d.p_sample(model, x_t, t, z).numpy(), mean.numpy() + sigma * z.numpy(), atol=1e-6)
  free = d.p_mean_var(model, x_t, t, clip=False)[0].numpy()
  close(d.p_sample(model, x_t, t, z, clip=False).numpy(), free + sigma * z.numpy(), rtol=1e-5, atol=1e-6)
  short = d.p_sample(model, x_t, t, z, s)
  assert (num(short)[:2] == num(x0_hat)[:2]).all()               # s = 0: x̂_0 and no noise, from any t
  mean, var, _ = d.p_mean_var(model, x_t, t, s)
  assert var.numpy()[2, 0, 0, 0] == pytest.approx(1 - d.alpha_bar[700] / d.alpha_bar[300], rel=1e-5)
  close(num(short)[2], (num(mean) + np.sqrt(num(var)) * num(z))[2], atol=1e-6)

@pytest.mark.parametrize("sigma,chain", [("beta_tilde", range(1000, -1, -1)), ("beta", range(1000, -1, -4)),
                                         ("beta_tilde", range(1000, -1, -25))])
def test_algorithm2_with_the_exact_eps_returns_the_data(sigma, chain):
  d, r, m, v = DDPM(sigma=sigma), rng(5), 0.3, 0.25      # the data: N(0.3, 0.25)
  a = d.alpha_bar
  table = Tensor(np.stack([np.sqrt(a), a * v + 1 - a], 1).astype(np.float32)).realize()
  def model(x, t):                                        # E[ε | x_t] = √(1−ᾱ) (x_t − √ᾱ m) / (ᾱ v + 1−ᾱ)
    row = table[t].reshape(-1, 2, 1, 1)
    return (1 - row[:, :1].square()).sqrt() * (x - row[:, :1] * m) / row[:, 1:]
  @TinyJit
  def step(x, t, s, z): return d.p_sample(model, x, t, z, s, clip=False).realize()
  shape, (mean, var) = (1024, 1, 2, 2), (0.0, 1.0)
  x = f32(r.standard_normal(shape))
  for t, s in zip(chain, chain[1:]):
    args = [Tensor(np.full(shape[0], i, np.int32)).realize() for i in (t, s)]
    x = step(x.realize(), *args, f32(r.standard_normal(shape)).realize())
    k = math.sqrt(a[t]) * v / (a[t] * v + 1 - a[t])       # x̂_0 = m + k (x_t − √ᾱ m): the chain stays normal, so its
    w0, wt, beta_tilde = posterior(d, t, s)               # moments follow in float64
    mean = w0 * (m + k * (mean - math.sqrt(a[t]) * m)) + wt * mean
    var = (w0 * k + wt) ** 2 * var + (s > 0) * (1 - a[t] / a[s] if sigma == "beta" else beta_tilde)
  x = vec(x)
  assert x.mean() == pytest.approx(mean, abs=0.03) and x.std() == pytest.approx(math.sqrt(var), rel=0.05)
  if len(chain) > 250: assert (mean, math.sqrt(var)) == pytest.approx((m, math.sqrt(v)), rel=0.02)  # the data's

def test_score_of_a_gaussian():
  d, m, v, t = DDPM(), 0.3, 0.25, 400
  a, x = d.alpha_bar[t], rng(6).standard_normal((3, 1, 2, 2))
  eps = math.sqrt(1 - a) * (x - math.sqrt(a) * m) / (a * v + 1 - a)                     # the mean of ε given x_t
  want = -(x - math.sqrt(a) * m) / (a * v + 1 - a)                                      # x_t ~ N(√ᾱ m, ᾱ v + 1 − ᾱ)
  close(d.score(const(eps), f32(x), t).numpy(), want, rtol=1e-5)
  x0 = rng(7).uniform(-1, 1, (3, 1, 2, 2))                                              # denoising score matching:
  x_t = num(d.q_sample(f32(x0), t, f32(x)))                                             # ε gives ∇ log q(x_t | x_0)
  close(d.score(const(x), f32(x_t), t).numpy(), -(x_t - math.sqrt(a) * x0) / (1 - a), atol=1e-4)

# *** losses and the bound ***

def test_loss_simple():
  r = rng(8)
  x0, eps, k = r.uniform(-1, 1, (64, 1, 4, 4)), r.standard_normal((64, 1, 4, 4)), r.standard_normal((64, 1, 4, 4))
  t = r.integers(1, 1001, 64)
  loss = lambda model, **kw: DDPM(**kw).loss_simple(model, f32(x0), at_times(*t), f32(eps))
  zero = loss(lambda x, t: x * 0)
  assert zero.shape == () and zero.item() == pytest.approx((eps**2).mean(), rel=1e-5)
  assert zero.item() == pytest.approx(1, abs=0.15)
  assert loss(const(k)).item() == pytest.approx(((k - eps) ** 2).mean(), rel=1e-5)
  assert loss(const(k), predict="x0").item() == pytest.approx(((k - x0) ** 2).mean(), rel=1e-5)
  a = DDPM().alpha_bar[t].reshape(-1, 1, 1, 1)
  x_t, (w0, wt, _) = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps, weights(DDPM(), t, t - 1)
  assert loss(const(k), predict="mu").item() == pytest.approx(((k - w0 * x0 - wt * x_t) ** 2).mean(), rel=1e-5)
  seen = []
  loss(lambda *args: (seen.extend(args), args[0])[1])         # the model is called with x_t and the paper's t
  close(seen[0].numpy(), x_t, atol=2e-6)
  assert (seen[1].numpy() == t).all()

def bin_mass(k, mean, sigma):
  """Eq. 13 by math.erfc in float64, each bin taken on the side where nothing cancels."""
  x, phi = k / 127.5 - 1, lambda z: 0.5 * math.erfc(-z / math.sqrt(2))
  lo = -math.inf if k == 0 else (x - 1/255 - mean) / sigma
  hi = math.inf if k == 255 else (x + 1/255 - mean) / sigma
  return phi(-lo) - phi(-hi) if lo > 0 else phi(hi) - phi(lo)

levels = f32((np.arange(256) / 127.5 - 1).reshape(256, 1, 1, 1))

def test_eq13_against_numerical_integration():
  def integral(k, mean, sigma):
    x = np.linspace((k - 0.5) / 127.5 - 1, (k + 0.5) / 127.5 - 1, 20001)
    return integrate(np.exp(-(x - mean) ** 2 / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi)), x)
  mean = float(np.float32(0.137))
  for sigma in (0.0074, 0.1, 1.0):
    got = vec(discretized_log_likelihood(levels, levels * 0 + mean, sigma))
    for k in range(1, 255, 7):
      p = integral(k, mean, sigma)
      assert p == pytest.approx(bin_mass(k, mean, sigma), rel=1e-5, abs=1e-250)
      if p > 1e-250: assert got[k] == pytest.approx(math.log(p), abs=1e-3, rel=1e-5)
      else: assert got[k] < -500

def test_eq13_sums_to_one_and_is_right_in_the_tails():
  mean, sigma = np.meshgrid([-1.6, -1, -0.5, 0.0, 0.0031, 0.77, 1, 1.4], [0.0005, 0.0073, 0.05, 0.5, 2])
  mean, sigma = mean.ravel().astype(np.float32), sigma.ravel().astype(np.float32)
  wide = lambda v: f32(np.broadcast_to(v, (256, 1, 1, len(mean))))
  m = wide(mean).contiguous().realize()
  log_p = discretized_log_likelihood(levels.expand(256, 1, 1, len(mean)), m, wide(sigma))
  (gradient,) = log_p.sum().gradient(m)
  assert np.isfinite(gradient.numpy()).all()
  log_p = num(log_p).reshape(256, -1)
  assert np.isfinite(log_p).all() and (log_p < 1e-6).all()
  close(np.exp(log_p).sum(0), 1, atol=1e-5)
  for j in range(len(mean)):
    p = np.array([bin_mass(k, float(mean[j]), float(sigma[j])) for k in range(256)])
    close(log_p[p > 1e-280, j], np.log(p[p > 1e-280]), rtol=5e-5, atol=5e-4)
    far = np.sign(levels.numpy().ravel() - mean[j]) * np.gradient(log_p[:, j])
    assert (far[1:-1][p[1:-1] < 1e-12] < 0).all()        # further from the mean is never more likely, however far

def test_log_cdf():
  z = np.concatenate([np.linspace(-35, 6, 500), [0.0]]).astype(np.float32)
  want = [math.log(math.erfc(-v / math.sqrt(2)) / 2) for v in z.astype(np.float64)]
  close(num(log_cdf(f32(z))), want, rtol=2e-6, atol=1e-6)
  (gradient,) = log_cdf(z := f32([0.0, -1e-3, 1e-3]).realize()).sum().gradient(z)
  assert num(gradient) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-3)

def test_eq13_gradient():
  m = f32(np.full((256, 1, 1, 1), 0.1)).realize()
  (gradient,) = discretized_log_likelihood(levels, m, 0.1).sum().gradient(m)
  m, h = float(np.float32(0.1)), 1e-5
  want = [(math.log(bin_mass(k, m + h, 0.1)) - math.log(bin_mass(k, m - h, 0.1))) / (2 * h) for k in range(256)]
  close(vec(gradient), want, rtol=1e-3, atol=2e-2)

def test_kl_normal():
  mean_q, var_q, mean_p, var_p = 0.3, 0.5, -0.2, 0.9
  got = kl_normal(*[col(v) for v in (mean_q, var_q, mean_p, var_p)]).item()
  log_n = lambda x, m, v: -(x - m) ** 2 / (2 * v) - 0.5 * np.log(2 * np.pi * v)
  x = np.linspace(-9, 9, 100001)
  gap = lambda x: log_n(x, mean_q, var_q) - log_n(x, mean_p, var_p)
  assert got == pytest.approx(integrate(np.exp(log_n(x, mean_q, var_q)) * gap(x), x), rel=1e-5)
  assert got == pytest.approx(gap(mean_q + math.sqrt(var_q) * rng().standard_normal(400000)).mean(), abs=0.005)
  ratio = np.array([0.01, 0.5, 0.949, 0.951, 0.999, 1, 1.0001, 1.049, 1.051, 3]).astype(np.float32)
  got = vec(kl_normal(col(*ratio) * 0 + 0.1, col(*ratio), 0.1, 1.0))
  close(got, (ratio - 1.0 - np.log(ratio.astype(np.float64))) / 2, rtol=3e-4)

def test_prior_kl():
  x0 = rng(10).uniform(-1, 1, (3, 2, 4, 4))
  d = DDPM()
  assert d.prior_kl(f32(x0)).shape == (3,) and (num(d.prior_kl(f32(x0))) < 1e-4).all()
  for d in (DDPM(), DDPM(30, 1e-3, 0.1)):
    a = d.alpha_bar[-1]
    nats = 0.5 * (a * x0**2 - a - np.log1p(-a))          # KL(N(√ᾱ x₀, 1−ᾱ) || N(0, 1))
    assert num(d.prior_kl(f32(x0))) == pytest.approx(nats.mean((1, 2, 3)) / math.log(2), rel=1e-3)

@pytest.mark.parametrize("sigma,T", [("beta", 1000), ("beta_tilde", 1000), ("beta", 1)])
def test_vlb_term(sigma, T):
  d, r = DDPM(T, sigma=sigma), rng(11)
  t = np.array([1, 2, 3, 50, 400, 999, 1000, 1]).clip(1, T)   # t = 1 and t > 1 in one batch
  k, eps = r.integers(0, 256, (8, 2, 2, 2)), r.standard_normal((8, 2, 2, 2))
  k[7, 0, 0] = 0, 255                                         # both edge bins at t = 1
  x0, out = k / 127.5 - 1, eps + 0.3 * r.standard_normal((8, 2, 2, 2))
  for clip in (True, False) if (sigma, T) == ("beta", 1000) else (True,):
    got, want = num(d.vlb_term(const(out), f32(x0), at_times(*t), f32(eps), clip=clip)), []
    for i in range(8):
      (a, b), (w0, wt, var_q) = products(d, t[i], 0), posterior(d, t[i], t[i] - 1)
      x_t = a * x0[i] + math.sqrt(b) * eps[i]
      x0_hat = (x_t - math.sqrt(b) * out[i]) / a
      if clip: x0_hat = x0_hat.clip(-1, 1)
      mean_q, mean_p = w0 * x0[i] + wt * x_t, w0 * x0_hat + wt * x_t
      var_p = d.beta[t[i]] if sigma == "beta" else var_q
      if t[i] == 1:
        std = math.sqrt(d.beta_tilde[2] if T > 1 else d.beta[1])
        nats = np.array([-math.log(bin_mass(*a, std)) for a in zip(k[i].ravel(), mean_p.ravel())])
      else: nats = math.log(var_p / var_q) / 2 + (var_q + (mean_q - mean_p) ** 2) / (2 * var_p) - 0.5
      want.append(nats.mean() / math.log(2))
    assert got.shape == (8,)
    close(got, want, rtol=2e-3, atol=2e-7)

def test_vlb_term_can_be_trained_on():
  d, r = DDPM(), rng(12)
  x0, eps = f32(r.integers(0, 256, (3, 1, 2, 2)) / 127.5 - 1), f32(r.standard_normal((3, 1, 2, 2)))
  out = f32(r.standard_normal((3, 1, 2, 2))).realize()
  (gradient,) = d.vlb_term(lambda x, t: out, x0, at_times(1, 2, 1000), eps, clip=False).sum().gradient(out)
  assert np.isfinite(gradient.numpy()).all() and (abs(num(gradient)).max((1, 2, 3)) > 0).all()

model = lambda x, t: x * (t.reshape(-1, 1, 1, 1) * 1e-3)

def test_jitted_equals_eager_for_new_t():
  d = DDPM()
  every = lambda x, t, z: d.p_sample(model, x, t, z) + d.vlb_term(model, x, t, z).reshape(-1, 1, 1, 1)
  jitted = TinyJit(lambda *args: every(*args).realize())
  for i in range(4):
    x, z = rng(i).standard_normal((2, 3, 1, 2, 2)) * 0.5
    args = [v.realize() for v in (f32(x), at_times(1, *rng(i).integers(1, 1001, 2)), f32(z))]
    got = jitted(*args).numpy()
  close(got, every(*args).numpy(), rtol=1e-6)

@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="names two CPU devices")
def test_sharded_equals_single_device():
  x, z = rng().standard_normal((2, 2, 1, 2, 2)).astype(np.float32)
  two = lambda a: f32(a).shard(("CPU:0", "CPU:1"), 0)
  want = DDPM().p_sample(model, f32(x), at_times(1, 600), f32(z)).numpy()
  close(DDPM().p_sample(model, two(x), at_times(1, 600), two(z)).numpy(), want, rtol=1e-6)

# *** words ***

@pytest.mark.parametrize("name,number", [
  ("q_step", "Eq. 2"), ("q_sample", "Eq. 4"), ("q_posterior", "Eq. 6-7"), ("predict_x0", "Eq. 15"),
  ("predict_eps", "Eq. 4"), ("p_mean_var", "Eq. 1,"), ("p_mean_var", "Eq. 11"), ("p_sample", "Algorithm 2, line 4"),
  ("loss_simple", "Eq. 14"), ("vlb_term", "Eq. 5"), ("vlb_term", "Eq. 13"), ("prior_kl", "Eq. 5"),
  ("score", "Section 3.2")])
def test_docstrings_begin_with_the_number(name, number):
  assert number in getattr(DDPM, name).__doc__.split("\n")[0]

def test_docstrings_of_functions():
  assert "Eq. 13" in discretized_log_likelihood.__doc__.split("\n")[0] and "Eq. 5" in kl_normal.__doc__.split("\n")[0]

@pytest.mark.parametrize("bad,word", [
  (dict(T=0), "0"), (dict(T=-5), "-5"), (dict(T=2.5), "2.5"), (dict(T=20000), "alpha_bar_T"), (dict(beta_1=0), "0"),
  (dict(beta_1=-1e-4), "-0.0001"), (dict(beta_T=1.0), "1"), (dict(beta_T=math.nan), "nan"),
  (dict(beta_1=math.inf), "inf"), (dict(beta_1=0.03), "0.03 > 0.02"), (dict(schedule="line"), "'line'"),
  (dict(sigma="learned"), "'learned'"), (dict(predict="v"), "'v'")])
def test_bad_settings(bad, word):
  with pytest.raises(ValueError, match=word): DDPM(**bad)

x, wrong = f32(np.zeros((2, 1, 2, 2))), f32(np.zeros((2, 3, 2, 2)))
same, bad_model = lambda x, t: x, lambda x, t: wrong

@pytest.mark.parametrize("name,args", [
  ("q_step", (x, 0, x)), ("q_sample", (x, 1001, x)), ("q_sample", (x, 1.5, x)), ("q_sample", (x, at_times(1), x)),
  ("q_sample", (x, [1, 2, 3], x)), ("q_sample", (x, f32([1, 2]), x)), ("q_posterior", (x, x, 5, 5)),
  ("q_posterior", (x, x, 5, 6)), ("q_posterior", (x, x, 5, -1)), ("p_sample", (same, x, [5, 9], x, 7)),
  ("q_step", (x, 5, wrong)), ("q_sample", (x, 5, wrong)),
  ("q_posterior", (wrong, x, 5)), ("p_sample", (same, x, 5, wrong)), ("p_sample", (bad_model, x, 5, x)),
  ("loss_simple", (bad_model, x, 5, x)), ("score", (bad_model, x, 5)), ("predict_eps", (x, 5, wrong))])
def test_bad_arguments(name, args):
  with pytest.raises(ValueError, match="time|below|shapes"): getattr(DDPM(), name)(*args)

def test_bad_shape_in_eq13():
  with pytest.raises(ValueError, match="shapes"): discretized_log_likelihood(x, wrong, 0.1)

