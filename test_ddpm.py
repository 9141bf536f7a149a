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

# ***** unet.py *****

GOLDEN = pathlib.Path(os.environ.get("GOLDEN_DIR", pathlib.Path(__file__).parent.parent/"shared"/"golden"))
TINY = dict(in_channels=1, channels=8, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.0,
            image_size=8, norm_groups=4)

def arr(*shape, seed=0, scale=1.0):
  return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)

def conv_by_hand(x, w, stride, lo, hi):
  x, k = np.pad(x.astype(np.float64), ((0, 0), (lo, hi), (lo, hi), (0, 0))), w.shape[0]
  H, W = [(n-k)//stride+1 for n in x.shape[1:3]]
  return sum(np.einsum("bhwc,co->bhwo", x[:, i:i+stride*H:stride, j:j+stride*W:stride], w[i, j])
             for i in range(k) for j in range(k))

def gradients(f, *arrays, seed=7):
  """The gradients of Σ r f(arrays) for a fixed random r, by tinygrad, and r."""
  ts = [Tensor(a).realize() for a in arrays]
  out = f(*ts)
  r = arr(*out.shape, seed=seed)
  return [g.numpy() for g in (out * Tensor(r)).sum().gradient(*ts)], r

def slope(f, arrays, i, r, h=1e-4):
  """The same sum's derivative along a random direction of the i-th array, by central differences in float64."""
  d = arr(*arrays[i].shape, seed=99+i).astype(np.float64)
  at = lambda s: float((r * f(*(a + s*h*d if j == i else a.astype(np.float64) for j, a in enumerate(arrays)))).sum())
  return (at(1) - at(-1)) / (2*h), d

@pytest.mark.parametrize("B,S,C,O,k,stride,lo,hi", [
  (2, 6, 5, 16, 3, 1, 1, 1), (8, 4, 16, 3, 3, 1, 1, 1), (3, 6, 4, 8, 3, 2, 0, 1), (2, 3, 16, 32, 1, 1, 0, 0),
  (4, 1, 8, 8, 1, 1, 0, 0), (2, 8, 1, 4, 3, 2, 0, 1)])
def test_convolution_and_its_gradients(B, S, C, O, k, stride, lo, hi):
  x, w, bias = arr(B, S, S, C), arr(k, k, C, O, seed=1), arr(1, 1, 1, O, seed=2)
  H = (S+lo+hi-k)//stride+1
  per_image, full = arr(B, 1, 1, O, seed=3), arr(B, H, H, O, seed=4)
  by_hand = lambda x, w, *adds: conv_by_hand(x, w, stride, lo, hi) + sum(adds)
  f = lambda x, w, *adds: unet.convolve(x, w, *adds, stride=stride, lo=lo, hi=hi)
  args = (x, w, bias, per_image, full)
  np.testing.assert_allclose(f(*map(Tensor, args)).numpy(), by_hand(*args), atol=2e-4)
  grads, r = gradients(f, *args)
  for i, g in enumerate(grads):
    want, d = slope(by_hand, args, i, r)
    assert abs((g*d).sum() - want) < 1e-3 * np.abs(g*d).sum() + 1e-4, i

def test_matrix_product_is_a_convolution_with_a_kernel_for_each_image():
  q, k = arr(3, 1, 6, 4), arr(3, 1, 1, 4, 10, seed=1)
  by_hand = lambda q, k: np.einsum("bhnc,bhcm->bhnm", q, k[:, 0])
  np.testing.assert_allclose(unet.convolve(Tensor(q), Tensor(k)).numpy(), by_hand(q, k), atol=1e-5)
  grads, r = gradients(unet.convolve, q, k)
  for i, g in enumerate(grads):
    want, d = slope(by_hand, (q, k), i, r)
    assert abs((g*d).sum() - want) < 1e-3 * np.abs(g*d).sum()

@pytest.mark.parametrize("silu", [True, False])
def test_group_norm_and_its_gradients(silu):
  x, w, b = arr(3, 4, 4, 12, scale=2) + 1, arr(12, seed=1), arr(12, seed=2)
  def by_hand(x, w, b):
    v = x.reshape(3, 16, 3, 4)
    v = (v - v.mean((1, 3), keepdims=True)) / np.sqrt(v.var((1, 3), keepdims=True) + 1e-6)
    z = v.reshape(x.shape) * w + b
    return z / (1 + np.exp(-z)) if silu else z
  f = lambda *a: unet.norm_function(3, silu)(*a)[0]
  np.testing.assert_allclose(f(*map(Tensor, (x, w, b))).numpy(), by_hand(x, w, b), atol=1e-5)
  grads, r = gradients(f, x, w, b)
  for i, g in enumerate(grads):
    want, d = slope(by_hand, (x, w, b), i, r)
    assert abs((g*d).sum() - want) < 1e-3 * np.abs(g*d).sum(), i

def test_group_norm_far_from_zero():
  x = arr(2, 4, 4, 8) + 300  # Σx² − (Σx)² in float32 would lose the variance
  y = unet.norm_function(4, False)(Tensor(x), Tensor(np.ones(8, np.float32)),
                                   Tensor(np.zeros(8, np.float32)))[0].numpy()
  v = x.astype(np.float64).reshape(2, 16, 4, 2)
  np.testing.assert_allclose(y.reshape(v.shape), (v - v.mean((1, 3), keepdims=True)) / v.std((1, 3), keepdims=True),
                             atol=2e-3)

def test_softmax_and_its_gradient():
  s = arr(2, 1, 5, 28, scale=30)
  def by_hand(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)
  np.testing.assert_allclose(unet.softmax(Tensor(s)).numpy(), by_hand(s), atol=1e-6)
  (g,), r = gradients(unet.softmax, s)
  want, d = slope(by_hand, (s,), 0, r, h=1e-5)
  assert abs((g*d).sum() - want) < 1e-3 * np.abs(g*d).sum()

def test_attention():
  layer, x = unet.Attention(np.random.default_rng(0), 8, 2), arr(2, 3, 3, 8)
  layer.out.weight = Tensor(arr(1, 1, 8, 8, seed=5))
  w = {k: v.numpy().astype(np.float64) for k, v in nn.state.get_state_dict(layer).items()}
  v = x.astype(np.float64).reshape(2, 9, 2, 4)
  h = ((v - v.mean((1, 3), keepdims=True)) / np.sqrt(v.var((1, 3), keepdims=True) + 1e-6)).reshape(2, 9, 8)
  q, k, v = [h @ w[f"{n}.weight"][0, 0] for n in "qkv"]
  e = np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(8))
  want = x.reshape(2, 9, 8) + (e / e.sum(-1, keepdims=True)) @ v @ w["out.weight"][0, 0]
  np.testing.assert_allclose(layer(Tensor(x)).numpy().reshape(2, 9, 8), want, atol=1e-5)

def test_the_papers_network_has_its_number_of_parameters():
  assert sum(p.numel() for p in nn.state.get_parameters(unet.UNet())) == 35_746_307

def test_time_is_embedded_from_zero_as_sines_then_cosines():
  model = unet.UNet(**TINY)
  eye = lambda n, o: Tensor(np.eye(n, o, dtype=np.float32))
  model.time1.weight, model.time2.weight = eye(8, 32), eye(32, 32)  # leaves silu(silu(embedding))
  out = model.embed(Tensor(np.array([1, 2, 1000], np.int32)), None).numpy()[:, :8]
  freq = 10000 ** (-np.arange(4) / 3)
  e = np.concatenate([np.sin(np.outer([0, 1, 999], freq)), np.cos(np.outer([0, 1, 999], freq))], 1)
  silu = lambda z: z / (1 + np.exp(-z))
  np.testing.assert_allclose(out, silu(silu(e)), atol=2e-4)

def test_initialisation():
  w = unet.fan_average(np.random.default_rng(0), 3, 3, 64, 32).numpy()
  limit = np.sqrt(6 / (9*64 + 9*32))
  assert abs(w).max() <= limit and abs(w.std() - limit/np.sqrt(3)) < 0.01*limit
  state = nn.state.get_state_dict(unet.UNet(**TINY))
  small = [k for k, v in state.items() if k.endswith("weight") and 0 < np.abs(v.numpy()).max() < 1e-4]
  assert sorted(small) == sorted(k for k in state if k.endswith(("conv2.weight", "out.weight")) and "norm" not in k)

def random_model(**kw):
  """A network whose last layers are not near 0, so that every weight has an influence."""
  model = unet.UNet(**{**TINY, **kw})
  for i, p in enumerate(nn.state.get_parameters(model)):
    p.replace(Tensor(p.numpy() + arr(*p.shape, seed=i, scale=0.1)).realize())
  return model

def test_gradients_of_the_network_by_finite_differences():
  model = random_model(num_classes=2)
  x, t, y, r = (Tensor(arr(4, 1, 8, 8)), Tensor(np.array([1, 5, 500, 1000], np.int32)),
                Tensor(np.array([0, 1, 2, 1], np.int32)), Tensor(arr(4, 1, 8, 8, seed=1)))
  for v in (x, t, y, r): v.realize()
  f = TinyJit(lambda: (model(x, t, y) * r).sum().realize())
  names, params = zip(*nn.state.get_state_dict(model).items())
  grads = (model(x, t, y) * r).sum().gradient(*params)
  Tensor.realize(*grads)
  for pick in ("conv_in.weight", "time1.weight", "label", "down.0.0.temb.weight", "down.1.0.weight", "mid.1.q.weight",
               "up.1.0.shortcut.weight", "up.1.2.bias", "norm_out.weight"):
    p, g = params[names.index(pick)], grads[names.index(pick)].numpy()
    kept, d = p.numpy(), np.sign(g) * (np.abs(g) > np.median(np.abs(g)))
    h = 3e-3
    vals = []
    for s in (1, -1):
      p.assign(Tensor((kept + s*h*d).astype(np.float32))).realize()
      vals.append(f().item())
    p.assign(Tensor(kept)).realize()
    assert abs((vals[0]-vals[1])/(2*h) - (g*d).sum()) < 0.03 * np.abs(g*d).sum(), pick

@pytest.mark.parametrize("case", ["diffusers_tiny", "diffusers_tiny_old_names"])
def test_known_answers(case, tmp_path):
  if not (GOLDEN/case).exists(): pytest.skip("the known answers are not on this machine")
  model, _ = unet.load(GOLDEN/case)
  known = np.load(GOLDEN/case/"case.npz")
  out = model(Tensor(known["x"]), Tensor((known["timestep_from_0"]+1).astype(np.int32))).numpy()
  assert np.abs(out - known["eps"]).max() < 1e-4 * np.abs(known["eps"]).max()
  unet.save(tmp_path/"copy", model, {"ddpm": {"T": 50}}, layout="diffusers")
  again, meta = unet.load(tmp_path/"copy")
  assert meta["ddpm"]["T"] == 50
  for (k, v), w in zip(nn.state.get_state_dict(model).items(), nn.state.get_parameters(again)):
    assert np.array_equal(v.numpy(), w.numpy()), k

def test_checkpoint_round_trip_and_refusals(tmp_path):
  model = random_model(num_classes=3)
  unet.save(tmp_path/"a.safetensors", model, {"ddpm": {"T": 7}, "dataset": "x"})
  again, meta = unet.load(tmp_path/"a.safetensors")
  assert meta["ddpm"] == {"T": 7} and tuple(again.config["channel_mult"]) == (1, 2)
  for v, w in zip(nn.state.get_parameters(model), nn.state.get_parameters(again)):
    assert np.array_equal(v.numpy(), w.numpy())
  with pytest.raises(OSError): unet.load(tmp_path/"missing.safetensors")
  (tmp_path/"p.bin").write_bytes(b"\x80\x04")
  with pytest.raises(ValueError, match="pickle"): unet.load(tmp_path/"p.bin")
  tensors, _ = unet.read_tensors(tmp_path/"a.safetensors")
  for change, match in ((lambda t: t.pop("mid.1.q.bias"), "lacks tensor 'mid.1.q.bias'"),
                        (lambda t: t.update(extra=np.zeros(1, np.float32)), "unknown tensor 'extra'"),
                        (lambda t: t.update({"conv_in.bias": np.zeros(9, np.float32)}), "conv_in.bias.*shape"),
                        (lambda t: t.update({"conv_in.bias": np.full(8, np.nan, np.float32)}), "not finite")):
    changed = dict(tensors)
    change(changed)
    unet.write_tensors(tmp_path/"b.safetensors", changed, {"unet": model.config})
    with pytest.raises(ValueError, match=match): unet.load(tmp_path/"b.safetensors")
  for key, value, match in (("act_fn", "relu", "act_fn"),
                            ("down_block_types", ["ResnetDownsampleBlock2D", "DownBlock2D"], "ResnetDownsampleBlock2D"),
                            ("norm_eps", 1e-5, "norm_eps")):
    config, _ = unet.to_diffusers(unet.UNet(**TINY), {})
    (tmp_path/"d").mkdir(exist_ok=True)
    (tmp_path/"d"/"config.json").write_text(json.dumps(config | {key: value}))
    with pytest.raises(ValueError, match=match): unet.load(tmp_path/"d")
  with pytest.raises(ValueError, match="divide"): unet.UNet(**{**TINY, "image_size": 9})
  with pytest.raises(ValueError, match="groups"): unet.UNet(**{**TINY, "norm_groups": 3})

def test_damaged_checkpoints_are_read_right_or_refused(tmp_path):
  unet.write_tensors(tmp_path/"a.safetensors", {"x": arr(3, 4), "y": np.arange(5, dtype=np.int32)}, {"unet": {}})
  good, rng, read = (tmp_path/"a.safetensors").read_bytes(), np.random.default_rng(0), 0
  n = int.from_bytes(good[:8], "little")
  cases = [(2**60).to_bytes(8, "little") + good[8:], b"", good[:7], good[:8+n], good + b"\0"]
  for i in range(1200):
    b, at = bytearray(good), int(rng.integers(len(good) if i % 3 else 8+n))
    kind = i % 4
    if kind < 2: b[at] ^= 1 << int(rng.integers(8))
    elif kind == 2: del b[at:at+int(rng.integers(1, 40))]
    else: b[at:at] = rng.integers(0, 256, int(rng.integers(1, 40)), np.uint8).tobytes()
    cases.append(bytes(b))
  for c in cases:
    (tmp_path/"b.safetensors").write_bytes(c)
    try: tensors, _ = unet.read_tensors(tmp_path/"b.safetensors")
    except (ValueError, OSError) as e: assert "\n" not in str(e)
    else:
      read += 1
      assert sum(v.nbytes for v in tensors.values()) <= len(c)
  assert 0 < read < len(cases)/2  # flipped bits of a weight cannot be seen

def test_tensors_that_overlap_or_lie_outside_are_refused(tmp_path):
  unet.write_tensors(tmp_path/"a.safetensors", {"x": arr(4), "y": arr(4, seed=1)}, {})
  good = (tmp_path/"a.safetensors").read_bytes()
  for places in (b"[00,16]", b"[32,48]", b"[20,36]"):  # where y's [16,32] should stand
    (tmp_path/"b.safetensors").write_bytes(good.replace(b"[16,32]", places))
    with pytest.raises(ValueError, match="b.safetensors"): unet.read_tensors(tmp_path/"b.safetensors")
  (tmp_path/"b.safetensors").write_bytes(good.replace(b"[0,16]", b"[8,24]").replace(b"[16,32]", b"[24,40]") + bytes(8))
  with pytest.raises(ValueError, match="does not lie"): unet.read_tensors(tmp_path/"b.safetensors")
  (tmp_path/"b.safetensors").write_bytes(good.replace(b"[16,32]", b"[ 0,16]"))  # the same place twice
  with pytest.raises(ValueError, match="does not lie"): unet.read_tensors(tmp_path/"b.safetensors")

def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
  unet.write_tensors(tmp_path/"a.safetensors", {"x": arr(3)}, {})
  before = (tmp_path/"a.safetensors").read_bytes()
  def full(*_): raise OSError(28, "No space left on device")
  monkeypatch.setattr(os, "fsync", full)
  with pytest.raises(OSError, match="a.safetensors.*No space left"):
    unet.write_tensors(tmp_path/"a.safetensors", {"x": arr(30)}, {})
  assert (tmp_path/"a.safetensors").read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]

def test_dropout():
  x, seed = Tensor(np.ones((4, 8, 8, 16), np.float32)), lambda s: Tensor(np.array([s], np.uint32))
  a, b, c = [unet.dropout(x, 0.25, seed(s)).numpy() for s in (1, 1, 2)]
  assert np.array_equal(a, b) and not np.array_equal(a, c)
  assert set(np.unique(a)) == {0.0, np.float32(1/0.75)} and abs((a == 0).mean() - 0.25) < 4 * np.sqrt(0.25*0.75/a.size)
  assert abs(np.corrcoef((a == 0).ravel(), (c == 0).ravel())[0, 1]) < 4 / np.sqrt(a.size)
  assert abs(np.corrcoef((a == 0).ravel()[1:], (a == 0).ravel()[:-1])[0, 1]) < 4 / np.sqrt(a.size)

# *** what tinygrad's CPU device is helped with ***

shared_cores = pytest.mark.skipif(getattr(Device[Device.DEFAULT], "graph", None) is not unet.Team,
                                  reason="for the CPU with 2 cores or more")

@shared_cores
@pytest.mark.parametrize("members", (1, 2, 5))
def test_jitted_kernels_are_shared_among_cores(members, monkeypatch):
  monkeypatch.setattr(unet, "cores", lambda: members)
  unet.team.cache_clear()
  x, w, full = arr(24, 16, 16, 16), arr(3, 3, 16, 16, seed=1), arr(24, 16, 16, 16, seed=2)
  @TinyJit
  def f(x, w, full):
    y = unet.convolve(x, w, full, lo=1, hi=1)
    dx, dw = (y * full).sum().gradient(x, w)
    return y.realize(), dx.realize(), dw.realize(), (full.exp() + x).realize()
  f.cnt = 1
  try:
    for shift in (0, 1, 2):  # with other buffers each time
      y, dx, dw, e = [v.numpy() for v in f(*(Tensor(a + np.float32(shift)).realize() for a in (x, w, full)))]
      xs, ws, fs = x + np.float32(shift), w + np.float32(shift), full + np.float32(shift)
      np.testing.assert_allclose(y, conv_by_hand(xs, ws, 1, 1, 1) + fs, rtol=1e-4, atol=1e-2)
      flipped = ws[::-1, ::-1].transpose(0, 1, 3, 2)
      np.testing.assert_allclose(dx, conv_by_hand(fs, flipped, 1, 1, 1), rtol=1e-4, atol=1e-2)
      padded = np.pad(xs.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
      want = np.stack([[np.einsum("bhwc,bhwo->co", padded[:, i:i+16, j:j+16], fs) for j in range(3)] for i in range(3)])
      np.testing.assert_allclose(dw, want, rtol=1e-4, atol=0.1)
      np.testing.assert_allclose(e, np.exp(fs.astype(np.float64)) + xs, rtol=1e-5, atol=1e-4)
    graphs = [c for c in f.captured.linear.src if c.src[0].arg == "graph"]
    rounds = [call.src[0].arg.global_size[0] for c in graphs for call in c.src[0].src[0].src]
    assert max(rounds) >= 8 and len(graphs) >= 1
  finally:
    monkeypatch.undo()
    unet.team.cache_clear()

@shared_cores
def test_a_core_does_not_wait_for_one_that_was_interrupted():
  program, _ = unet.team()
  command, arrived = np.zeros((1, 35), np.uint64), np.array([0, 1], np.uint64)  # no rounds; somebody has left
  give_way = ctypes.cast(ctypes.CDLL(None).sched_yield, ctypes.c_void_p).value
  program.fxn(*map(ctypes.c_uint64, (command.ctypes.data, 1, 0, 2, arrived.ctypes.data, give_way)))
  assert arrived[0] == 1

def test_a_second_program_schedules_and_lowers_nothing(tmp_path):
  program = """if True:
    import sys, numpy as np, unet
    made, put = [], unet.Kept.__setitem__
    unet.Kept.__setitem__ = lambda cache, key, value: (made.append(key), put(cache, key, value))
    from tinygrad import Tensor
    x = Tensor(np.arange(2*8*8*8, dtype=np.float32).reshape(2, 8, 8, 8) % 7).realize()
    model = unet.UNet(1, 8, (1,), 1, (), 0., 8, 4)
    y = model.down[0][0](x, Tensor(np.ones((2, 32), np.float32)).realize(), None)
    total = y.sum().item() if len(sys.argv) < 2 else y.square().sum().item()
    print(len(made) > 0, total, y.numpy().tobytes().hex())"""
  def call(*more, **env):
    env = os.environ | {"CACHEDB": str(tmp_path/"cache.db"), "CACHELEVEL": "2"} | env
    out = subprocess.run([sys.executable, "-c", program, *more], cwd=Path(__file__).parent, env=env,
                         capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    return out.stdout.split()
  first, second, other = call(), call(), call("other")
  assert first[0] == "True" and second[0] == "False" and first[1:] == second[1:]
  assert other[0] == "True" and other[2] == first[2]  # what is new is made
  assert call(TRANSCENDENTAL="2")[0] == "True"        # and under another setting all of it

# ***** train.py *****

SMALL = ["--dataset", "glyphs", "--batch", "8", "--channels", "8", "--channel-mult", "1", "--attn", "",
         "--norm-groups", "4", "--sample-every", "0", "--T", "50"]

def run(out, *flags): train.main([*SMALL, "--out", str(out), *map(str, flags)])

def contents(out):
  return {f.name: f.read_bytes() for f in sorted(pathlib.Path(out).iterdir()) if f.is_file() and f.name != "log.jsonl"}

def losses(out): return [json.loads(line)["loss"] for line in (pathlib.Path(out)/"log.jsonl").read_text().splitlines()]

def test_resume_is_exact_and_seeds_matter(tmp_path):
  run(tmp_path/"a", "--steps", 6, "--save-every", 3, "--dropout", 0.1)
  run(tmp_path/"b", "--steps", 4, "--save-every", 2, "--dropout", 0.1)
  with open(tmp_path/"b"/"log.jsonl", "a") as f:
    f.write('{"step": 5, "loss": 0}\n{"st')  # as a killed run would leave it
  run(tmp_path/"b", "--steps", 6, "--save-every", 3, "--dropout", 0.1)
  assert (contents(tmp_path/"a") == contents(tmp_path/"b") and losses(tmp_path/"a") == losses(tmp_path/"b")
          and len(losses(tmp_path/"a")) == 6)
  with pytest.raises(ValueError, match="lr"): run(tmp_path/"b", "--steps", 8, "--dropout", 0.1, "--lr", 1e-5)
  with pytest.raises(ValueError, match="channels|network"):
    run(tmp_path/"b", "--steps", 8, "--dropout", 0.1, "--channels", 16)
  run(tmp_path/"b", "--restart", "--steps", 2, "--dropout", 0.1, "--seed", 1)
  assert losses(tmp_path/"b")[0] != losses(tmp_path/"a")[0]

def test_a_number_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path, monkeypatch):
  run(tmp_path, "--steps", 2, "--save-every", 1)
  before, draw = contents(tmp_path), train.draw
  def broken(*args):
    x, t, eps, *rest = draw(*args)
    return x, t, eps * np.float32(np.nan if args[-1] == 4 else 1), *rest
  monkeypatch.setattr(train, "draw", broken)
  with pytest.raises(ValueError, match="step 4.*nan.*last.safetensors"): run(tmp_path, "--steps", 6, "--save-every", 10)
  assert contents(tmp_path) == before

def step_once(accum=1, gpus=1, steps=2, **flags):
  """The state after some steps on noise, and what came out of each."""
  a = train.arguments([*SMALL, "--accum", str(accum), "--gpus", str(gpus),
                       *(f for k, v in flags.items() for f in (f"--{k}", str(v)))])
  config = dict(TINY, channel_mult=a.channel_mult, attn_resolutions=(), dropout=a.dropout)
  base = Device.DEFAULT.split(":")[0]
  state = train.State(config, (Device.DEFAULT,) if gpus == 1 else tuple(f"{base}:{i}" for i in range(gpus)))
  step, images, seen = (train.make_step(state, DDPM(T=a.T), a),
                        np.random.default_rng(0).integers(0, 256, (8, 1, 8, 8), np.uint8), [])
  for n in range(1, steps+1):
    x, t, eps, y, seeds = train.draw(a, images, np.zeros(8, np.int32), 0, n)
    part = 8//accum
    for k in range(accum):
      h = np.array([k > 0, k == accum-1, *train.hyper(a, n)], np.float32)
      before = {name: state.fetch(f)[:state.size].copy() for name, f in state.flat.items()}
      loss, norm = step(*(state.lay(v[k*part:(k+1)*part]).realize() for v in (x, t, eps, y)),
                        state.lay(seeds[k], None).realize(), state.lay(h, None).realize())
      after = {name: state.fetch(f)[:state.size].copy() for name, f in state.flat.items()}
      seen.append((state.fetch(loss), float(state.fetch(norm)), before, after, h, GlobalCounters.mem_used))
  return seen

def test_adam_clipping_and_average_against_float64():
  for _, norm, before, after, h, _ in step_once(clip=0.5):
    g = after["grad"].astype(np.float64)
    assert abs(norm - np.sqrt((g*g).sum())) < 1e-4 * norm
    g *= min(1, 0.5/norm)
    lr, c1, c2, decay = h[2:].astype(np.float64)
    m, v = 0.9*before["m"] + 0.1*g, 0.999*before["v"] + 0.001*g*g
    w = before["raw"] - lr * (m/c1) / (np.sqrt(v/c2) + 1e-8)
    for name, want in (("m", m), ("v", v), ("raw", w), ("ema", decay*before["ema"] + (1-decay)*w)):
      np.testing.assert_allclose(after[name], want, rtol=1e-4, atol=1e-7, err_msg=name)
    assert np.abs(after["raw"] - after["ema"]).max() > 0  # the average is no alias of the weights

def test_parts_of_a_batch_and_several_devices_give_the_same_step():
  one = step_once()
  last = lambda seen: (seen[-1][1], seen[-1][3]["grad"])
  for other in (step_once(accum=2), step_once(gpus=4) if Device.DEFAULT == "CPU" else one):
    assert abs(last(other)[0] - last(one)[0]) < 1e-3 * last(one)[0]
    np.testing.assert_allclose(last(other)[1], last(one)[1], atol=2e-5)

def test_times_are_drawn_by_their_weight_in_the_bound():
  # the weight of ‖ε − ε_θ‖² is half of what log SNR loses in a step, up to its square
  for flags in ([], ["--schedule", "quad", "--beta-1", "1e-6", "--beta-T", "0.03"]):
    a = train.arguments(["--times", "weighted", "--batch", "64", *flags])
    d = DDPM(a.T, a.beta_1, a.beta_T, a.schedule)
    w, p = train.chances(a.T, a.beta_1, a.beta_T, a.schedule)
    snr = d.alpha_bar[1:] / (1 - d.alpha_bar[1:])
    lost = -np.diff(np.log(snr))
    for v in (w, p): assert v[0] == 0 and v.sum() == pytest.approx(1) and len(v) == 1001
    close(w[102:] / w[500], lost[100:] / lost[498], rtol=0.05)
    assert w[1] / w[500] == pytest.approx(1 / (lost[498] + lost[498]**2/2), rel=0.05)  # β₁/(α₁(1−ᾱ₁)) is 1/α₁
    rarer = (p / p[1])[1:] / (w / w[1])[1:]  # 1 down to SNR 1, then a tenth at SNR 1/100
    close(rarer[snr >= 1], 1)
    close(np.interp(math.log(100), -np.log(snr), rarer), 0.1, rtol=0.01)
    # with γ = 100 the same at the other end: at SNR 10,000 a hundredth of the weight, a tenth of the draws
    for v, u, least in zip(train.chances(a.T, a.beta_1, a.beta_T, a.schedule, 100), (w, p), (0.01, 0.1)):
      less = v[1:] / u[1:] * (u[500] / v[500])
      close(less[snr <= 100], 1)
      assert v[0] == 0 and v.sum() == pytest.approx(1) and (np.diff(less) > -1e-9).all()
      if snr[0] > 1e4: close(np.interp(-math.log(1e4), -np.log(snr), less), least, rtol=0.01)
    t = np.stack([train.draw(a, np.zeros((64, 1, 8, 8), np.uint8), np.zeros(64, np.int32), 0, n)[1]
                  for n in range(1, 201)])
    for low, high in ((1, 1), (2, 10), (11, 300), (301, 1000)):
      want, inside = p[low:high+1].sum() * 64, ((t >= low) & (t <= high)).sum(1)
      assert abs(inside.mean() - want) < 5*np.sqrt(want/200)
      assert np.abs(inside - want).max() <= 1  # one from each stratum
    assert abs(np.corrcoef(np.arange(64).repeat(200), t.T.ravel())[0, 1]) < 5/np.sqrt(t.size)  # whichever the image
  # so drawn, L_vlb's estimate is what evenly drawn times give
  model = lambda x, t: x * 0.9
  d, eps = DDPM(T=20), f32(rng(2).standard_normal((20, 1, 4, 4)))
  x0 = f32(rng(1).integers(0, 256, (20, 1, 4, 4)) / 127.5 - 1)
  L, p = vec(d.vlb_term(model, x0, at_times(*range(1, 21)), eps)), train.chances(20, 1e-4, 0.02, "linear")[1][1:]
  t = np.random.default_rng(0).choice(20, 200_000, p=p)
  assert (L[t] / p[t]).mean() == pytest.approx(L.sum(), rel=5 * (L[t] / p[t]).std() / L.sum() / math.sqrt(200_000))

@pytest.mark.parametrize("loss", ("simple", "vlb"))
def test_errors_that_clipping_mends_and_weighted_times(loss):
  """A new network answers ε_θ = 0, so x̂_0 is beyond the edge that x_0 lies on wherever ε points outwards: no error
  there with --clip-x0. Elsewhere it is ε, also where x̂_0 is beyond the edge and x_0 within."""
  a = train.arguments([*SMALL, "--clip-x0", "--batch", "64", "--loss", loss, "--times", "weighted"])
  d, state = DDPM(T=a.T), train.State(dict(TINY, channel_mult=a.channel_mult, attn_resolutions=()), (Device.DEFAULT,))
  images = rng(7).choice(np.array([0, 100, 255], np.uint8), (64, 1, 8, 8))
  x, t, eps, y, seeds = train.draw(a, images, np.zeros(64, np.int32), 0, 1)
  t = np.maximum(t, 2)  # L_0 is no squared error
  before = state.fetch(state.flat["raw"])
  h = np.array([0, 1, *train.hyper(a, 1)], np.float32)
  got = state.fetch(train.make_step(state, d, a)(*(state.lay(v).realize() for v in (x, t, eps, y, seeds[0], h)))[0])
  mended = (x == 0) & (eps < 0) | (x == 255) & (eps > 0)
  assert 0.2 < mended.mean() < 0.45 and np.abs(state.fetch(state.flat["raw"]) - before).max() > 0
  want = (eps**2 * ~mended).reshape(64, -1).mean(1)
  if loss == "vlb":  # Eq. 12; σ_t² = β_t is not the posterior's variance, which adds what does not depend on the model
    r = d.beta_tilde[t] / d.beta[t]
    want = (want * d.beta[t] / (d.alpha[t] * (1 - d.alpha_bar[t])) + r - 1 - np.log(r)) / 2 / LOG2
  # so that the mean over draws is that over even ones, or, of L_simple, with L_vlb's weights
  w, p = train.chances(a.T, a.beta_1, a.beta_T, a.schedule)
  want *= w[t] / p[t] if loss == "simple" else 1 / (a.T * p[t])
  close(got, want, rtol=2e-4)

@pytest.mark.parametrize("times", ("uniform", "weighted"))
def test_min_snr_weights(times):
  """Above γ the weight γ/SNR turns the error of ε into γ times that of x̂_0, Eq. 15; a new network answers ε_θ = 0."""
  a = train.arguments([*SMALL, "--batch", "64", "--min-snr", "5", "--times", times])
  d, state = DDPM(T=a.T), train.State(dict(TINY, channel_mult=a.channel_mult, attn_resolutions=()), (Device.DEFAULT,))
  x, t, eps, y, seeds = train.draw(a, rng(7).integers(0, 256, (64, 1, 8, 8), np.uint8), np.zeros(64, np.int32), 0, 1)
  h = np.array([0, 1, *train.hyper(a, 1)], np.float32)
  got = state.fetch(train.make_step(state, d, a)(*(state.lay(v).realize() for v in (x, t, eps, y, seeds[0], h)))[0])
  x0, squared = x / 127.5 - 1, lambda v: (np.asarray(v, np.float64)**2).reshape(64, -1).mean(1)
  x_t = d.q_sample(f32(x0), at_times(*t), f32(eps))
  in_x0 = squared(d.predict_x0(x_t, at_times(*t), x_t * 0).numpy() - x0)
  clear = d.alpha_bar[t] > 5/6                                # SNR > 5
  assert 0.2 < clear.mean() < 0.8
  want = np.where(clear, 5 * in_x0, squared(eps))
  if times == "weighted":  # each t counts as in L_vlb, of which it is min(SNR, γ)/SNR; an error of 1 everywhere is 1
    (w, _), (_, p) = [train.chances(a.T, a.beta_1, a.beta_T, a.schedule, g) for g in (0, 5)]
    all_t = np.minimum(1, 5 * (1 - d.alpha_bar[1:]) / d.alpha_bar[1:])
    want *= w[t] / p[t] / (w[1:] * all_t).sum()
  close(got, want, rtol=1e-3)
  for flags in (["--loss", "vlb"], ["--predict", "x0"]):
    with pytest.raises(ValueError, match="--min-snr"): train.arguments([*SMALL, "--min-snr", "5", *flags])

def test_dequantized_images_and_dropped_labels():
  images = rng().integers(0, 256, (64, 1, 8, 8), np.uint8)
  draw = lambda *flags: train.draw(train.arguments([*SMALL, "--batch", "64", *flags]),
                                   images, np.zeros(64, np.int32), 9, 1)
  whole, spread = draw()[0], draw("--dequantize")[0]
  u = spread - whole
  assert whole.dtype == np.uint8 and u.min() >= -0.5 and u.max() <= 0.5 and abs(u.std() - 12**-0.5) < 0.01
  assert abs(np.corrcoef(u.ravel(), draw()[2].ravel())[0, 1]) < 5 / 64
  for p in (0, 0.5, 1): assert abs((draw("--drop-labels", str(p))[3] == 9).mean() - p) < 0.3
  assert (draw("--drop-labels", "0")[3] == 0).all() and (draw("--drop-labels", "1")[3] == 9).all()

def test_warm_up_and_average():
  a = train.arguments(["--warmup", "10", "--lr", "0.1", "--ema", "0.99"])
  assert (train.hyper(a, 1)[0] == pytest.approx(0.01)
          and train.hyper(a, 10)[0] == train.hyper(a, 99)[0] == pytest.approx(0.1))
  assert train.hyper(a, 1)[3] == pytest.approx(2/11) and train.hyper(a, 10**6)[3] == 0.99
  a = train.arguments(["--warmup", "10", "--lr", "0.1", "--anneal", "100"])
  assert [train.hyper(a, n)[0] for n in (1, 51, 100, 101, 500)] == pytest.approx([0.01, 0.05, 0.001, 0, 0])
  assert train.arguments(["--dataset", "cifar10"]).lr == 2e-4 and train.arguments(["--dataset", "cifar10"]).flip

def test_every_t_is_trained_and_the_draws_are_independent():
  a = train.arguments([*SMALL, "--batch", "64", "--T", "20"])
  draws = [train.draw(a, np.zeros((64, 1, 8, 8), np.uint8), np.zeros(64, np.int32), 10, n) for n in range(1, 201)]
  t, eps = np.concatenate([d[1] for d in draws]), np.concatenate([d[2] for d in draws])
  counts = np.bincount(t, minlength=21)
  # T and 1 as often as the others
  assert counts[0] == 0 and len(counts) == 21 and np.abs(counts[1:] - 640).max() < 5*np.sqrt(640)
  assert abs(eps.mean()) < 5/np.sqrt(eps.size) and abs(eps.std() - 1) < 5/np.sqrt(eps.size)
  flat = eps.reshape(len(eps), -1)
  for other in (t, sample.draw_x_T(len(t), (1, 1, 1), a.seed).numpy().ravel()):
    assert np.abs([np.corrcoef(other, flat[:, j])[0, 1] for j in range(0, 64, 8)]).max() < 5/np.sqrt(len(t))
  assert len({d[2].tobytes() for d in draws}) == 200
  assert abs(np.mean([d[3] == 10 for d in draws]) - 0.1) < 0.02  # labels dropped

@pytest.mark.parametrize("flags,match", [
  (["--batch", "0"], "--batch 0"), (["--steps", "-5"], "--steps -5"), (["--lr", "nan"], "--lr nan"),
  (["--ema", "1"], "--ema"), (["--dropout", "1"], "--dropout"), (["--T", "0"], "--T 0"),
  (["--channel-mult", "0,1"], "--channel-mult"), (["--accum", "3"], "--accum 3"), (["--clip", "-1"], "--clip"),
  (["--min-snr", "-1"], "--min-snr -1")])
def test_flags_out_of_range(flags, match):
  with pytest.raises(ValueError, match=match): train.arguments([*SMALL, *flags])

@pytest.mark.parametrize("program,flags,says", [
  ("train.py", ["--dataset", "nonsense"], "nonsense"), ("train.py", ["--out", "/proc/x"], "/proc/x"),
  ("sample.py", ["--checkpoint", "missing.safetensors"], "missing.safetensors"),
  ("evaluate.py", ["--checkpoint", "missing.safetensors"], "missing.safetensors"),
  ("train.py", ["--dataset", "glyphs", "--channels", "12", "--norm-groups", "5"], "groups")])
def test_programs_end_with_one_sentence(program, flags, says, tmp_path):
  r = subprocess.run([sys.executable, str(pathlib.Path(__file__).parent/program), *flags],
                     capture_output=True, text=True, cwd=tmp_path)
  assert r.returncode and says in r.stderr.splitlines()[-1] and "Traceback" not in r.stderr, r.stderr

def test_no_device_and_no_compiler(tmp_path):
  for env, says in (({"DEV": "NOSUCH"}, "NOSUCH"), ({"DEV": "CPU", "CC": "no-such-compiler"}, "clang")):
    r = subprocess.run([sys.executable, str(pathlib.Path(__file__).parent/"train.py"), "--out", str(tmp_path/"r")],
                       capture_output=True, text=True, env={**os.environ, **env, "XDG_CACHE_HOME": str(tmp_path)})
    assert r.returncode and says in r.stderr.splitlines()[-1] and "Traceback" not in r.stderr, r.stderr

def test_killed_and_interrupted_runs_end_with_the_same_bytes(tmp_path):
  command = [sys.executable, str(pathlib.Path(__file__).parent/"train.py"), *SMALL,
             "--steps", "12", "--save-every", "2"]
  log = tmp_path/"stopped"/"log.jsonl"
  run(tmp_path/"whole", "--steps", 12, "--save-every", 2)
  for lines, how in ((1, signal.SIGKILL), (4, signal.SIGINT)):  # stopped once the log has more lines than that
    p = subprocess.Popen([*command, "--out", str(tmp_path/"stopped")], stderr=subprocess.PIPE, text=True)
    while p.poll() is None and not (log.exists() and log.read_text().count("\n") > lines): time.sleep(0.002)
    p.send_signal(how)
    says = p.communicate()[1]
    if how == signal.SIGINT:  # Ctrl-C saves the step it is at
      assert p.returncode == 130 and "run the same command again" in says
      assert (json.loads(unet.read_tensors(tmp_path/"stopped"/"last.safetensors")[1]["ddpm"])["step"]
              == len(losses(tmp_path/"stopped")))
  run(tmp_path/"stopped", "--steps", 12, "--save-every", 2)
  assert (contents(tmp_path/"whole") == contents(tmp_path/"stopped")
          and losses(tmp_path/"whole") == losses(tmp_path/"stopped"))

def test_memory_does_not_grow():
  used = [seen[-1] for seen in step_once(steps=20)]
  assert len(set(used[3:])) == 1

@pytest.mark.parametrize("predict,loss,sigma", [("mu", "vlb", "beta"), ("x0", "simple", "beta_tilde")])
def test_other_rows_of_table_2_and_labels(tmp_path, predict, loss, sigma):
  run(tmp_path, "--steps", 1, "--predict", predict, "--loss", loss, "--sigma", sigma, "--class-conditional",
      "--beta-1", 1e-3, "--beta-T", 0.3)
  model, meta = unet.load(tmp_path/"ema.safetensors")
  assert (meta["ddpm"] == {"T": 50, "beta_1": 1e-3, "beta_T": 0.3, "schedule": "linear", "sigma": sigma,
                           "predict": predict} and model.config["num_classes"] == 10)

def test_a_run_can_begin_with_the_weights_of_another(tmp_path):
  run(tmp_path/"a", "--steps", 3)
  before = unet.read_tensors(tmp_path/"a"/"ema.safetensors")[0]
  run(tmp_path/"b", "--steps", 1, "--lr", 1e-9, "--init", tmp_path/"a")
  raw = unet.read_tensors(tmp_path/"b"/"last.safetensors")[0]
  for k, v in before.items():
    for key in ("raw", "ema"): close(raw[f"{key}.{k}"], v, atol=1e-6)
  with pytest.raises(ValueError, match="--init.*another network"):
    run(tmp_path/"c", "--steps", 1, "--channels", 16, "--init", tmp_path/"a")

# ***** data.py *****

def refused(call, *words):
  """The call is refused in one sentence that holds all the words."""
  with pytest.raises((ValueError, OSError)) as caught: call()
  assert type(caught.value) in (ValueError, OSError, FileNotFoundError)
  message = str(caught.value)
  assert "\n" not in message and len(message) > 15 and not [w for w in words if str(w) not in message], message

@pytest.fixture
def offline(monkeypatch, tmp_path):
  """An empty cache, no $DATA_DIR and no network; gives a folder to work in."""
  def unreachable(*args, **kwargs): raise OSError("no network in tests")
  monkeypatch.setattr("urllib.request.urlopen", unreachable)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  monkeypatch.delenv("DATA_DIR", raising=False)
  work = tmp_path / "work"
  work.mkdir()
  return work

def idx(array):
  return bytes((0, 0, 8, array.ndim)) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.tobytes()

def write_idx(folder, part="train", n=6, seed=0, pack=gzip.compress, end=".gz"):
  rng = np.random.default_rng(seed)
  images, labels = rng.integers(0, 256, (n, 5, 7), np.uint8), rng.integers(0, 10, n, np.uint8)
  folder.mkdir(parents=True, exist_ok=True)
  (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(images)))
  (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(labels)))
  return images, labels

# ------------------------------------------------------------------------------------------------ datasets

@pytest.mark.skipif(not os.path.isdir(os.path.join(os.environ.get("DATA_DIR", ""), "mnist")), reason="no MNIST here")
def test_mnist_is_mnist():
  x, y = data.load("mnist")
  assert x.shape == (60000, 1, 28, 28) and x.dtype == np.uint8 and y.dtype == np.int32 and y[0] == 5
  assert np.bincount(y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
  assert abs(x.mean() / 255 - 0.1307) < 1e-4 and abs(x.std() / 255 - 0.3081) < 1e-4  # the constants everybody uses
  x, y = data.load("mnist", "test")
  assert x.shape == (10000, 1, 28, 28) and y[:5].tolist() == [7, 2, 1, 0, 4]
  files = Path(os.environ["DATA_DIR"], "mnist")
  for file, sha in data.SHA256["mnist"].items():
    if (files / file).exists(): assert hashlib.sha256(gzip.decompress((files / file).read_bytes())).hexdigest() == sha

@pytest.mark.skipif(not os.path.isfile(os.path.join(os.environ.get("DATA_DIR", ""), "cifar10-jpg-test.zip")),
                    reason="no JPEG copies of CIFAR-10 here")
def test_cifar10_from_jpegs():
  x, y = data.load("cifar10", "test")
  assert x.shape == (10000, 3, 32, 32) and np.bincount(y).tolist() == [1000] * 10
  with zipfile.ZipFile(os.path.join(os.environ["DATA_DIR"], "cifar10-jpg-test.zip")) as z:
    names = sorted(n for n in z.namelist() if n.endswith(".jpg"))
    for i in (0, 4321, 9999):
      assert (x[i] == np.asarray(Image.open(io.BytesIO(z.read(names[i]))).convert("RGB")).transpose(2, 0, 1)).all()
      assert data.CIFAR10_CLASSES[y[i]] == names[i].split("/")[1]

def test_glyphs_are_digits_and_always_the_same():
  (x, y), (u, v) = data.load("glyphs"), data.load("glyphs", "test")
  assert x.shape == (10000, 1, 16, 16) and u.shape == (2000, 1, 16, 16) and x.dtype == np.uint8 and y.dtype == np.int32
  assert np.bincount(y).tolist() == [1000] * 10 and np.bincount(v).tolist() == [200] * 10
  assert np.array_equal(x, data.load("glyphs")[0]) and np.array_equal(u, data.load("glyphs", "test")[0])
  assert len(np.unique(x, axis=0)) == 10000
  assert not set(map(bytes, u)) & set(map(bytes, x))
  assert np.median(x) < 8 and x.max() == 255  # white on black
  assert max(x[:, 0, i].mean() for i in (0, -1)) < 25 and max(x[:, 0, :, i].mean() for i in (0, -1)) < 25  # nothing cut
  a, b = u.reshape(2000, -1).astype(np.float32), x.reshape(10000, -1).astype(np.float32)
  nearest = (a @ b.T - (b * b).sum(1) / 2).argmax(1)  # the nearest training image has the same digit: they can be read
  assert (y[nearest] == v).mean() > 0.97

def test_names_and_splits(offline):
  refused(lambda: data.load("minst"), "minst", *data.DATASETS, "or a folder of images")
  for name in ("", "\0", "x" * 5000): refused(lambda: data.load(name))
  refused(lambda: data.load("glyphs", "validation"), "validation", "train", "test")
  refused(lambda: data.load("mnist", data_dir=offline / "gone"), offline / "gone")
  refused(lambda: data.load("mnist", size=16), "mnist", "size")
  refused(lambda: data.load("mnist"), "train-images-idx3-ubyte.gz", "no network in tests", "DATA_DIR")
  refused(lambda: data.load("cifar10"), "cifar-10-binary.tar.gz", "no network in tests")

@pytest.mark.parametrize("place", ["mnist", "MNIST/raw", "."])
@pytest.mark.parametrize("end, pack", [("", bytes), (".gz", gzip.compress)])
def test_idx_layouts(offline, monkeypatch, place, end, pack):
  images, labels = write_idx(offline / place, pack=pack, end=end)
  x, y = data.load("mnist", data_dir=offline)
  assert np.array_equal(x[:, 0], images) and np.array_equal(y, labels) and y.dtype == np.int32
  x[:] = 0  # the caller's own to write to
  monkeypatch.setenv("DATA_DIR", str(offline))
  assert np.array_equal(data.load("mnist")[0][:, 0], images)

def test_where_files_are_looked_for(offline, monkeypatch):
  cache = Path(os.environ["XDG_CACHE_HOME"], "ddpm")
  for place, n in ((offline / "a", 3), (offline / "b", 4), (cache, 5)): write_idx(place / "mnist", n=n)
  assert len(data.load("mnist")[0]) == 5
  monkeypatch.setenv("DATA_DIR", str(offline / "b"))
  assert len(data.load("mnist")[0]) == 4 and len(data.load("mnist", data_dir=offline / "a")[0]) == 3
  (offline / "a" / "mnist" / "train-labels-idx1-ubyte.gz").unlink()
  assert len(data.load("mnist", data_dir=offline / "a")[0]) == 4  # half a dataset is none
  write_idx(offline / "c")  # bare MNIST files are not taken for Fashion-MNIST, which has the same file names
  refused(lambda: data.load("fashion_mnist", data_dir=offline / "c"), "fashion_mnist")
  write_idx(offline / "fashion", n=7)
  assert len(data.load("fashion_mnist", data_dir=offline / "fashion")[0]) == 7

def test_damaged_idx_is_refused(offline):
  images, labels = write_idx(offline, pack=bytes, end="")
  file, good = offline / "train-images-idx3-ubyte", idx(images)
  def now(blob, *words):
    file.write_bytes(blob)
    refused(lambda: data.load("mnist", data_dir=offline), *words)
  now(good[:-1], file, "less")
  now(good + b"\0", file, "more")
  now(b"", file)
  now(good[:9], file)
  now(b"\0\0\x09\3" + good[4:], file, "IDX")  # signed bytes
  now(b"\0\0\x08\1" + good[4:], file, "IDX")  # one dimension
  now(idx(images[:0]), file, "impossible")
  now(b"\0\0\x08\3" + b"\xff" * 12, file, "impossible")
  now(idx(np.zeros((1, 1024, 1024), np.uint8)) + b"\0", file, "more")
  now(idx(images[:5]), file, "5 images", "6 labels")
  packed = gzip.compress(good)
  now(packed[:-9], file)
  now(packed[:-6] + bytes(6), file)  # wrong checksum
  now(packed + b"junk", file)
  file.write_bytes(good)
  (offline / "train-labels-idx1-ubyte").write_bytes(idx(np.full(6, 10, np.uint8)))
  refused(lambda: data.load("mnist", data_dir=offline), "label 10")

def test_a_false_claim_of_size_allocates_nothing(offline):
  write_idx(offline, pack=bytes, end="")
  file = offline / "train-images-idx3-ubyte"
  claim = lambda *shape: b"\0\0\x08\3" + b"".join(n.to_bytes(4, "big") for n in shape)
  for blob in (claim(2**32 - 1, 2**32 - 1, 2**32 - 1), claim(250, 1000, 1000) + bytes(9),
               gzip.compress(claim(1, 2, 3) + bytes(10**8), 1)):
    file.write_bytes(blob)
    tracemalloc.start()
    refused(lambda: data.load("mnist", data_dir=offline), file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2e7

def write_cifar(folder, n=3):
  """A small CIFAR-10 in the binary version, packed; gives the images and labels of the training part."""
  rng = np.random.default_rng(1)
  files, images, labels = {}, [], []
  for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
    pixels, label = rng.integers(0, 256, (n, 3, 32, 32), np.uint8), rng.integers(0, 10, n, np.uint8)
    files[name] = b"".join(bytes([l]) + p[0].tobytes() + p[1].tobytes() + p[2].tobytes() for p, l in zip(pixels, label))
    if "data" in name: images.append(pixels), labels.append(label)
  with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
    for name, blob in files.items():
      info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
      info.size = len(blob)
      tar.addfile(info, io.BytesIO(blob))
  return np.concatenate(images), np.concatenate(labels), files

def test_cifar10_binary(offline):
  images, labels, files = write_cifar(offline)
  for _ in range(2):
    x, y = data.load("cifar10", data_dir=offline)
    assert np.array_equal(x, images) and np.array_equal(y, labels) and y.dtype == np.int32
    assert len(data.load("cifar10", "test", offline)[0]) == 3
    (offline / "cifar-10-batches-bin").mkdir(exist_ok=True)  # and once more, unpacked
    for name, blob in files.items(): (offline / "cifar-10-batches-bin" / name).write_bytes(blob)
    with contextlib.suppress(FileNotFoundError): (offline / "cifar-10-binary.tar.gz").unlink()
  for bad in (b"", bytes(3072), bytes(3074), b"\x0a" + bytes(3072), bytes(30_733_073)):
    (offline / "cifar-10-batches-bin" / "data_batch_3.bin").write_bytes(bad)
    refused(lambda: data.load("cifar10", data_dir=offline), offline)
  with tarfile.open(offline / "cifar-10-binary.tar.gz", "w:gz") as tar:  # a folder where a file should be
    info = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
    info.type = tarfile.DIRTYPE
    tar.addfile(info)
  (offline / "cifar-10-batches-bin" / "test_batch.bin").unlink()
  refused(lambda: data.load("cifar10", "test", offline), "cifar-10-binary.tar.gz")

def write_jpegs(file, skip=""):
  with zipfile.ZipFile(file, "w") as z:
    for i, name in enumerate(data.CIFAR10_CLASSES):
      blob = io.BytesIO()
      Image.new("L", (32, 32), i * 20).save(blob, "JPEG", quality=95)
      if name != skip: z.writestr(f"test/{name}/0001.jpg", blob.getvalue())

def test_cifar10_jpegs_zipped_and_unpacked(offline, capsys, monkeypatch):
  file = offline / "cifar10-jpg-test.zip"
  write_jpegs(file)
  x, y = data.load("cifar10", "test", offline)
  assert x.shape == (10, 3, 32, 32) and y.tolist() == list(range(10))  # three channels, even if all are gray
  assert np.abs(x.mean((1, 2, 3)) - np.arange(10) * 20).max() < 1 and "lossy" in capsys.readouterr().err
  with zipfile.ZipFile(file) as z: z.extractall(offline / "cifar10")
  file.unlink()
  assert np.array_equal(data.load("cifar10", "test", offline)[0], x)
  write_jpegs(offline / "cifar10" / file.name, skip="deer")
  refused(lambda: data.load("cifar10", "test", offline / "cifar10"), file.name, "deer")
  write_jpegs(offline / "cifar10" / file.name)
  with monkeypatch.context() as m:
    m.setattr(data, "LIMIT", 100)  # larger files in the archive are not unpacked
    refused(lambda: data.load("cifar10", "test", offline / "cifar10"), "all 10")
  (offline / "cifar10" / file.name).write_bytes(b"PK not a zip")
  refused(lambda: data.load("cifar10", "test", offline / "cifar10"), file.name)

# ------------------------------------------------------------------------------------------------ downloads

@pytest.fixture
def mirrors(tmp_path, monkeypatch):
  """A server on this machine whose first three mirrors fail in different ways: gives {path asked: times}."""
  images, labels = write_idx(tmp_path / "served")
  asked = []
  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      asked.append(self.path)
      how, name = self.path.strip("/").split("/")
      blob = (tmp_path / "served" / name).read_bytes()
      sent = {"cut": blob[:-20], "altered": gzip.compress(gzip.decompress(blob)[:-1] + b"\0")}.get(how, blob)
      self.send_response(404 if how == "dead" else 200)
      self.send_header("Content-Length", str(len(blob) if how == "cut" else len(sent)))
      self.end_headers()
      if how != "dead": self.wfile.write(sent)
    def log_message(self, *args): pass
  server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
  threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
  base = f"http://127.0.0.1:{server.server_port}/"
  monkeypatch.setitem(data.MIRRORS, "mnist", [f"{base}{how}/" for how in ("dead", "cut", "altered", "good")])
  monkeypatch.setitem(data.SHA256, "mnist", {"train-images-idx3-ubyte.gz": hashlib.sha256(idx(images)).hexdigest(),
                                             "train-labels-idx1-ubyte.gz": hashlib.sha256(idx(labels)).hexdigest()})
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  monkeypatch.delenv("DATA_DIR", raising=False)
  monkeypatch.setenv("no_proxy", "*")
  yield images, asked, tmp_path
  server.shutdown()
  server.server_close()

def test_download_goes_on_to_the_next_mirror(mirrors):
  images, asked, tmp_path = mirrors
  assert np.array_equal(data.load("mnist")[0][:, 0], images)
  assert [p.split("/")[1] for p in asked] == ["dead", "cut", "altered", "good"] * 2
  assert np.array_equal(data.load("mnist")[0][:, 0], images) and len(asked) == 8  # the second time from the cache
  assert {p.name for p in (tmp_path / "xdg/ddpm/mnist").iterdir()} == set(data.SHA256["mnist"])
  (tmp_path / "xdg/ddpm/mnist/train-labels-idx1-ubyte.gz").unlink()
  assert np.array_equal(data.load("mnist")[0][:, 0], images) and len(asked) == 12  # only what is missing

def test_a_wrong_download_never_enters_the_cache(mirrors, monkeypatch):
  _, asked, tmp_path = mirrors
  monkeypatch.setitem(data.MIRRORS, "mnist", data.MIRRORS["mnist"][:3])
  refused(lambda: data.load("mnist"), "train-images-idx3-ubyte.gz", "404", "SHA-256")
  assert len(asked) == 3 and not list((tmp_path / "xdg/ddpm/mnist").iterdir())
  monkeypatch.setattr(data, "LIMIT", 100)
  refused(lambda: data.load("mnist"), "too long")

def test_two_downloads_at_once(mirrors):
  images, _, tmp_path = mirrors
  with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda _: data.load("mnist")[0], range(4)))
  assert all(np.array_equal(x[:, 0], images) for x in found)
  assert {p.name for p in (tmp_path / "xdg/ddpm/mnist").iterdir()} == set(data.SHA256["mnist"])

def test_digest_of_the_file_itself_and_the_published_names(mirrors, monkeypatch):
  images, _, tmp_path = mirrors
  blobs = {name: (tmp_path / "served" / name).read_bytes() for name in data.SHA256["mnist"]}
  monkeypatch.setitem(data.SHA256, "mnist", {name: hashlib.sha256(blob).hexdigest() for name, blob in blobs.items()})
  assert np.array_equal(data.load("mnist")[0][:, 0], images)
  for name in ("mnist", "fashion_mnist", "cifar10"):
    assert len(data.MIRRORS[name]) >= 2 and all(re.fullmatch("[0-9a-f]{64}", sha) for sha in data.SHA256[name].values())

# ------------------------------------------------------------------------------------------------ folders

def png(width, height, bits=1, rows=b""):
  """A PNG of one gray channel, made by hand."""
  chunk = lambda kind, body: len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big")
  head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes((bits, 0, 0, 0, 0))
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows, 1)) + chunk(b"IEND", b"")

def one(folder, img, name="a.png", **how):
  """What `load` makes of a folder with this one image."""
  folder.mkdir(parents=True, exist_ok=True)
  for old in folder.iterdir(): old.unlink()
  if isinstance(img, bytes): (folder / name).write_bytes(img)
  else: img.save(folder / name, **how)
  return data.load(str(folder))[0][0]

def test_every_kind_of_image_looks_as_people_see_it(offline):
  f, red = offline / "f", (255, 0, 0)
  flat = lambda x: [np.unique(c).tolist() for c in x]
  palette = Image.new("P", (8, 8), 1)
  palette.putpalette([0, 0, 0, 255, 0, 0])
  assert flat(one(f, palette)) == [[255], [0], [0]]
  assert flat(one(f, palette, transparency=1)) == [[255]]  # transparent: white, which is gray
  assert flat(one(f, Image.new("RGBA", (8, 8), (255, 0, 0, 0)))) == [[255]]
  assert flat(one(f, Image.new("RGBA", (8, 8), (0, 0, 255, 51)))) == [[204], [204], [255]]  # 1/5 blue on white
  assert flat(one(f, Image.new("LA", (8, 8), (0, 255)))) == [[0]]
  assert flat(one(f, Image.new("1", (8, 8), 1))) == [[255]]
  assert flat(one(f, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.tif")) == [[255], [0], [0]]
  x = one(f, Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "a.JPG", format="JPEG", quality=95)
  assert x[0].min() > 240 and x[1:].max() < 15
  ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)  # 16 bits: scaled, not clipped
  assert np.abs(one(f, Image.fromarray(ramp))[0] - ramp / 257).max() <= 0.5
  assert np.abs(one(f, Image.fromarray(ramp), "a.tiff")[0] - ramp / 257).max() <= 0.5
  assert np.abs(one(f, Image.fromarray(ramp.astype(np.int32)), "a.tiff")[0] - ramp / 257).max() <= 0.5
  assert np.abs(one(f, Image.fromarray((ramp / 65535).astype(np.float32)), "a.tiff")[0] - ramp / 257).max() <= 0.5
  assert one(f, png(8, 8, 16, bytes(17 * 8)))[0].max() == 0
  frames = [Image.new("RGB", (8, 8), c) for c in (red, (0, 255, 0))]
  assert flat(one(f, frames[0], "a.gif", save_all=True, append_images=frames[1:])) == [[255], [0], [0]]
  turned = Image.fromarray(np.repeat(np.arange(0, 256, 32, dtype=np.uint8)[:, None], 8, 1))  # dark at the top
  exif = Image.Exif()
  exif[0x0112] = 6  # "turn it right by a quarter": dark at the right
  x = one(f, turned, exif=exif)[0]
  assert x[0].tolist() == list(range(224, -1, -32)) and (x == x[0]).all()

def test_classes_splits_and_hidden_files(offline):
  def put(path, value, size=8):
    (offline / path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (size, size), value).save(offline / path, "PNG")
  for path, value in (("d/top.png", 1), ("d/b/2.PNG", 2), ("d/b/deep/er/3.JPEG", 3), ("d/a/4.webp", 4),
                      ("d/.h/5.png", 5), ("d/b/._6.png", 6), ("d/b/text.txt", 7)): put(path, value)
  (offline / "d" / "b" / "loop").symlink_to(offline / "d")
  (offline / "linked").mkdir()
  put("linked/8.png", 8)
  (offline / "d" / "c").symlink_to(offline / "linked")
  os.mkfifo(offline / "d" / "pipe.png")  # would wait for ever
  x, y = data.load(str(offline / "d"))
  assert x.shape == (5, 1, 8, 8)
  assert sorted(zip(x[:, 0, 0, 0].tolist(), y.tolist())) == [(1, 0), (2, 2), (3, 2), (4, 1), (8, 3)]
  for split in ("train", "test"): assert np.array_equal(data.load(offline / "d", split)[0], x)  # a Path; both splits
  for path, value in (("s/train/cat/1.png", 1), ("s/train/dog/2.png", 2), ("s/test/dog/3.png", 3), ("s/val/4.png", 4)):
    put(path, value)
  x, y = data.load(str(offline / "s"), "test")
  assert x[:, 0, 0, 0].tolist() == [3] and y.tolist() == [1]  # a dog is a dog, though this half has no cat
  assert data.load(str(offline / "s"))[0][:, 0, 0, 0].tolist() == [1, 2]

def test_folder_sizes_and_channels(offline):
  def folder(name, *images):
    (offline / name).mkdir()
    for i, img in enumerate(images): img.save(offline / name / f"{i}.png")
    return str(offline / name)
  gray, wide = Image.new("L", (28, 28), 9), Image.new("L", (60, 20))
  wide.paste(255, (20, 0, 40, 20))  # white in the central square
  assert data.load(folder("same", gray, gray))[0].shape == (2, 1, 28, 28)
  assert data.load(folder("most", gray, gray, wide))[0].shape == (3, 1, 28, 28)
  x = data.load(folder("mixed", wide, Image.new("L", (9, 9)), Image.new("L", (90, 21))))[0]
  assert x.shape == (3, 1, 16, 16) and x[0].min() > 240  # median side 20, down to 16; central crop
  assert data.load(folder("large", Image.new("L", (300, 200))))[0].shape == (1, 1, 64, 64)
  assert data.load(folder("tiny", Image.new("RGB", (1, 1), "red"), Image.new("L", (1, 3000))))[0].shape == (2, 3, 8, 8)
  assert data.load(folder("given", wide, gray), size=12)[0].shape == (2, 1, 12, 12)
  assert data.load(folder("colour", gray, Image.new("RGB", (28, 28), "red")))[0].shape == (2, 3, 28, 28)
  for bad in (0, -3, 10**6): refused(lambda: data.load(str(offline / "given"), size=bad), bad)

def test_broken_images_are_counted_and_named(offline, capsys):
  f = offline / "f"
  f.mkdir()
  refused(lambda: data.load(str(f)), f, "no images")
  noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
  for name in ("cut.png", "cut.jpg"):
    noise.save(f / name)
    (f / name).write_bytes((f / name).read_bytes()[:-400])
  (f / "empty.gif").write_bytes(b"")
  (f / "text.bmp").write_bytes(b"hello")
  (f / "bomb.png").write_bytes(png(60000, 60000))  # Pillow's error
  (f / "large.png").write_bytes(png(10000, 10000, 1, bytes(1251 * 10000)))  # Pillow's warning
  refused(lambda: data.load(str(f)), f, "all 6 are broken")
  noise.save(f / "good.png")
  capsys.readouterr()
  x, y = data.load(str(f))
  err = capsys.readouterr().err
  assert np.array_equal(x[0], np.asarray(noise).transpose(2, 0, 1)) and y.tolist() == [0]
  assert err.count("\n") == 1 and "6 of 7" in err
  assert all(file.name in err for file in f.iterdir() if file.stem != "good")

def test_any_damage_is_read_or_refused(offline):
  """Bytes flipped, cut out and put in, at random: a result or one sentence, never another error."""
  rng, cases, read = np.random.default_rng(0), 0, 0
  def harmed(blob):
    blob, where = bytearray(blob), int(rng.integers(len(blob)))
    how = rng.integers(4)
    if how == 0: blob[where] ^= 1 << int(rng.integers(8))
    if how == 1: del blob[where:where + int(rng.integers(1, 40))]
    if how == 2: blob[where:where] = rng.bytes(int(rng.integers(1, 40)))
    if how == 3: blob[where:where + 4] = rng.choice([b"\xff" * 4, b"\0" * 4, b"\x7f\xff\xff\xff"])
    return bytes(blob)
  def attack(file, times, call):
    nonlocal cases, read
    good = file.read_bytes()
    for _ in range(times):
      file.write_bytes(harmed(good))
      cases += 1
      try: x, y = call()
      except (ValueError, OSError) as e:
        assert type(e) in (ValueError, OSError) and "\n" not in str(e) and str(offline) in str(e)
      else:
        read += 1
        assert x.dtype == np.uint8 and x.ndim == 4 and y.dtype == np.int32 and len(x) == len(y) > 0
    file.write_bytes(good)
  for end, pack in (("", bytes), (".gz", gzip.compress)):
    write_idx(offline / end.strip(".") / "idx", n=2, pack=pack, end=end)
    for file in (offline / end.strip(".") / "idx").iterdir():
      attack(file, 40, lambda: data.load("mnist", data_dir=file.parent))
  noise = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
  for i, end in enumerate(("png", "jpg", "gif", "tif", "webp", "bmp", "ppm")):
    (offline / end).mkdir()
    noise.save(offline / end / f"a.{end}")
    attack(offline / end / f"a.{end}", 40, lambda: data.load(str(offline / end)))
  write_jpegs(offline / "cifar10-jpg-test.zip")
  attack(offline / "cifar10-jpg-test.zip", 40, lambda: data.load("cifar10", "test", offline))
  (offline / "tar").mkdir()
  write_cifar(offline / "tar", n=1)
  attack(offline / "tar" / "cifar-10-binary.tar.gz", 30, lambda: data.load("cifar10", "test", offline / "tar"))
  assert cases >= 300 and cases / 10 < read < cases * 0.9

# ------------------------------------------------------------------------------------------------ batches

@pytest.mark.parametrize("batch", [1, 4, 10, 7, 33])
def test_each_epoch_has_every_image_once(batch):
  images, labels = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), np.arange(10, dtype=np.int32) * 2
  steps = [data.batch_at(images, labels, step, batch, seed=3) for step in range(10)]
  assert all(x.shape == (batch, 1, 1, 1) and x.dtype == np.uint8 and y.dtype == np.int32 for x, y in steps)
  stream = np.concatenate([x.ravel() for x, _ in steps])
  assert all((x.ravel() * 2 == y).all() for x, y in steps)
  epochs = [stream[i:i + 10].tolist() for i in range(0, len(stream) - 9, 10)]
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len(epochs) == 1 or len(set(map(tuple, epochs))) > 1  # and in a new order

def test_a_batch_depends_on_seed_and_step_alone():
  rng = np.random.default_rng(0)
  images, labels = rng.integers(0, 256, (50, 3, 4, 5), np.uint8), np.arange(50, dtype=np.int32)
  get = lambda step, seed=0: data.batch_at(images, labels, step, 16, seed, flip=True)
  forwards = [get(step) for step in range(12)]
  data._permutation.cache_clear()
  for step in reversed(range(12)):
    get(99 - step, seed=step)  # something else in between
    assert all(np.array_equal(a, b) for a, b in zip(get(step), forwards[step]))
  assert not np.array_equal(get(0)[1], get(0, seed=1)[1])
  assert np.array_equal(images, np.random.default_rng(0).integers(0, 256, (50, 3, 4, 5), np.uint8))  # left untouched

def test_flips_mirror_half_of_the_images():
  images, labels = np.random.default_rng(0).integers(0, 256, (500, 3, 4, 6), np.uint8), np.arange(500, dtype=np.int32)
  masks = []
  for step in range(8):
    x, y = data.batch_at(images, labels, step, 250, 0, flip=True)
    plain, same = data.batch_at(images, labels, step, 250, 0)
    assert np.array_equal(y, same) and np.array_equal(plain, images[y])
    masks.append((x != plain).any((1, 2, 3)))
    assert np.array_equal(x[masks[-1]], np.flip(plain[masks[-1]], 3))
  assert 900 < np.sum(masks) < 1100 and not np.array_equal(masks[0], masks[1])  # 1000 of 2000, sigma 22

def test_batches_that_cannot_be(offline):
  images, labels = np.zeros((4, 1, 2, 2), np.uint8), np.zeros(4, np.int32)
  for step, batch, seed in ((0, 0, 0), (-1, 2, 0), (0, 2, -1)):
    refused(lambda: data.batch_at(images, labels, step, batch, seed), f"batch of {batch}")
  refused(lambda: data.batch_at(images[:0], labels[:0], 0, 2, 0), "0 images")

# ------------------------------------------------------------------------------------------------ images out

def test_to_uint8_inverts_the_scaling():
  every = np.arange(256)
  assert np.array_equal(data.to_uint8((every / 127.5 - 1).astype(np.float32)), every)
  x = np.random.default_rng(0).uniform(-1, 1, 1000)
  assert np.abs(data.to_uint8(x) - (x + 1) * 127.5).max() <= 0.5 and data.to_uint8(x).dtype == np.uint8
  assert data.to_uint8(np.array([-1.01, -9, -np.inf, 1.01, 9, np.inf])).tolist() == [0, 0, 0, 255, 255, 255]
  refused(lambda: data.to_uint8(np.array([0, np.nan])), "NaN")

@pytest.mark.parametrize("shape, ncols, scale, size", [
  ((5, 3, 4, 6), 3, 2, (3 * 14 + 2, 2 * 10 + 2)), ((1, 1, 8, 8), 9, 1, (12, 12)),
  ((16, 1, 28, 28), None, None, (234, 234)), ((64, 3, 32, 32), None, None, (530, 530)),
  ((2, 1, 300, 200), None, None, (406, 304))])
def test_grid_geometry(shape, ncols, scale, size):
  images = np.random.default_rng(0).integers(0, 128, shape, np.uint8)
  picture = data.grid(images, ncols, scale)
  assert picture.size == size and picture.mode == ("L" if shape[1] == 1 else "RGB")
  pixels = np.asarray(picture).reshape(size[1], size[0], -1)
  columns = ncols and min(ncols, shape[0]) or int(np.ceil(shape[0] ** 0.5))
  cell = (size[0] - 2) // columns - 2
  k = cell // shape[3]
  seen = np.zeros(pixels.shape[:2], bool)
  for i in range(shape[0]):
    top, left = 2 + i // columns * (shape[2] * k + 2), 2 + i % columns * (cell + 2)
    area = slice(top, top + shape[2] * k), slice(left, left + cell)
    assert np.array_equal(pixels[area][::k, ::k].transpose(2, 0, 1), images[i])
    assert np.array_equal(pixels[area][k - 1::k, k - 1::k].transpose(2, 0, 1), images[i])
    seen[area] = True
  assert (pixels[~seen] == 128).all()

def test_grid_is_seen_and_fits():
  assert data.grid(np.zeros((1, 1, 16, 16), np.uint8)).size[0] >= 56 + 4
  for n in (1000, 5000): assert max(data.grid(np.zeros((n, 1, 16, 16), np.uint8)).size) <= 1600
  assert max(data.grid(np.zeros((50, 1, 16, 16), np.uint8), 2).size) <= 1600
  for bad in (np.zeros((0, 1, 8, 8), np.uint8), np.zeros((2, 2, 8, 8), np.uint8), np.zeros((2, 1, 8, 8))):
    for call in (data.grid, data.to_terminal, functools.partial(data.save_npz, "/nowhere/x.npz")):
      refused(lambda: call(bad), str(bad.shape))
  refused(lambda: data.grid(np.zeros((2, 1, 8, 8), np.uint8), 0), "0 columns")
  refused(lambda: data.grid(np.zeros((2, 1, 8, 8), np.uint8), 2, 0), "0 times")

@pytest.mark.parametrize("c, h", [(3, 4), (1, 5)])
def test_the_terminal_shows_the_pixels(c, h):
  images = np.random.default_rng(0).integers(0, 256, (3, c, h, 5), np.uint8)
  images[0] //= 128  # long runs of one colour
  text = data.to_terminal(images, columns=11)  # room for two of five and a gap
  rows = []
  for line in text.split("\n"):
    assert line.endswith("\033[0m") and line.count("▀") == 11
    upper, lower, now = [], [], None
    for codes, block in re.findall(r"\033\[38;2;([\d;]+)m|(▀)", line):
      if codes: now = [int(v) for v in codes.replace("48;2;", "").split(";")]
      if block: upper.append(now[:3]), lower.append(now[3:])
    rows += [upper, lower]
  shown = np.array(rows).transpose(2, 0, 1)
  for i in range(2): assert (shown[:, :h, 6 * i:6 * i + 5] == images[i]).all()
  assert not shown[:, :, 5].any() and not shown[:, h:].any()
  assert data.to_terminal(images, columns=2).split("\n")[0].count("▀") == 5  # at least one

def test_files_hold_what_was_saved(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (3, 3, 8, 9), np.uint8)
  data.save_png(tmp_path / "new" / "folder" / "a.png", data.grid(images, 3, 1))
  assert np.array_equal(np.asarray(Image.open(tmp_path / "new/folder/a.png")), np.asarray(data.grid(images, 3, 1)))
  data.save_npz(tmp_path / "a.npz", images[:, :1])
  with np.load(tmp_path / "a.npz", allow_pickle=False) as z:
    assert z.files == ["arr_0"] and z["arr_0"].dtype == np.uint8
    assert np.array_equal(z["arr_0"], images[:, 0, :, :, None])
  data.save_gif(tmp_path / "a.gif", [data.grid(image[None], scale=1) for image in images], ms=50)
  gif = Image.open(tmp_path / "a.gif")
  times = []
  for i in range(gif.n_frames):
    gif.seek(i)
    times.append(gif.info["duration"])
  assert times == [50, 50, 2000] and gif.info["loop"] == 0
  refused(lambda: data.save_gif(tmp_path / "b.gif", []), "b.gif")
  assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "a.npz", "new"]

@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, OSError])
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path, error):
  path = tmp_path / "file"
  path.write_bytes(b"old")
  with pytest.raises(error), data.atomic(path) as f:
    f.write(b"half of the new")
    f.flush()
    assert path.read_bytes() == b"old"
    raise error
  assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
  with data.atomic(path) as f: f.write(b"new")
  assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]

def test_a_new_file_is_like_any_other(tmp_path):
  (tmp_path / "plain").write_bytes(b"")
  with data.atomic(tmp_path / "file") as f: f.write(b"1")
  assert stat.S_IMODE(os.stat(tmp_path / "file").st_mode) == stat.S_IMODE(os.stat(tmp_path / "plain").st_mode)
  (tmp_path / "link").symlink_to(tmp_path / "file")
  with data.atomic(tmp_path / "link") as f: f.write(b"2")
  assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"2"

def test_places_that_cannot_be_written(tmp_path):
  picture = Image.new("L", (4, 4))
  (tmp_path / "file").write_bytes(b"old")
  os.mkfifo(tmp_path / "pipe")
  for path in (tmp_path, tmp_path / "file" / "a.png", tmp_path / "pipe", tmp_path / ("x" * 300), "/", "/proc/no/a.png"):
    refused(lambda: data.save_png(path, picture), "cannot write", path)
  refused(lambda: data.save_png(tmp_path / "file" / "a.png", picture), "is a file, not a folder")
  refused(lambda: data.save_png(tmp_path / ("x" * 300), picture), "too long")
  assert (tmp_path / "file").read_bytes() == b"old" and {p.name for p in tmp_path.iterdir()} == {"file", "pipe"}

BLUE, RED = (31, 119, 180), (214, 39, 40)  # the first curves' colours

def where(picture, colour):
  """Rows and columns of the pixels of a curve, below the legend."""
  near = np.abs(np.asarray(picture).astype(int) - colour).sum(2) < 60
  y, x = np.nonzero(near[64:])
  return y + 64, x

def test_plot_draws_what_it_is_given():
  xs = np.arange(101)
  y, x = where(data.plot({"up": (xs, xs**2)}, "title", "x", "y"), BLUE)
  at = lambda column: y[np.abs(x - column) < 2].mean()
  left, right = x.min(), x.max()
  assert right - left > 600 and abs(at(left) - y.max()) < 5 and abs(at(right) - y.min()) < 5
  half = at((left + right) / 2)
  assert abs((y.max() - half) / (y.max() - y.min()) - 0.25) < 0.02  # (1/2)^2
  y, x = where(data.plot({"e": (xs, np.exp(xs / 5.0))}, log_y=True), BLUE)
  assert abs(y[np.abs(x - (x.min() + x.max()) / 2) < 2].mean() - (y.min() + y.max()) / 2) < 3  # a straight line
  y, x = where(data.plot({"two": (xs, xs), "parts": (xs, np.where(abs(xs - 50) < 20, np.nan, -xs))}), RED)
  assert len(x) and not ((x > x.min() + 0.35 * (x.max() - x.min())) & (x < x.min() + 0.65 * (x.max() - x.min()))).any()

@pytest.mark.parametrize("log_y", [False, True])
def test_plot_of_nearly_nothing(log_y):
  for series in ({}, {"a": ([], [])}, {"a": ([1], [np.nan])}, {"a": ([1, 2], [5, 5])}, {"a": ([0, 1], [-1, 0])},
                 {"a": ([0, 1e-12], [1e9, 1e9 + 1])}, {"a": ([0, 1e12], [1e-300, 1e300])},
                 {"a": ([1, 2], [np.inf, 3])}):
    assert data.plot(series, "title", "x", "y", log_y).size == (720, 440)
  y, x = where(data.plot({"dot": ([3, 4, 5], [7, np.nan, np.nan])}, log_y=log_y), BLUE)
  assert 10 < len(x) < 60 and abs(x.mean() - 370) < 40 and abs(y.mean() - 235) < 40  # a dot in the middle
  refused(lambda: data.plot({"uneven": ([1, 2], [1])}), "uneven")

def test_ticks_are_round_numbers():
  assert [text for _, text in data._ticks(0, 1)] == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
  assert [text for _, text in data._ticks(0, 30000)] == ["0", "5,000", "10,000", "15,000", "20,000", "25,000", "30,000"]
  assert [text for _, text in data._log_ticks(-2, 1)] == ["0.01", "0.1", "1", "10"]
  for lo, hi in ((-0.3, 0.7), (2.9, 3.1), (1e-7, 3e-7), (-5e8, 4e9)):
    ticks = data._ticks(lo, hi)
    assert 3 <= len(ticks) <= 8 and all(lo <= v <= hi for v, _ in ticks)
    assert all(abs(float(text.replace(",", "")) - v) <= 1e-3 * (hi - lo) for v, text in ticks)

def test_progress_passes_everything_on(capsys, monkeypatch):
  assert list(data.progress(range(5), "counting", 5)) == [0, 1, 2, 3, 4] and capsys.readouterr().err == ""
  clock = iter(range(0, 1000, 6))
  monkeypatch.setattr(data.time, "monotonic", lambda: next(clock))
  assert list(data.progress(["ab", "cd"], "counting", 4, len)) == ["ab", "cd"]
  assert re.findall(r"(\d+)%.*counting", capsys.readouterr().err) == ["50", "100"]

# ***** sample.py *****

T, MODE, SD = 200, 0.6, 0.1
at = lambda t, n: Tensor(np.full(n, t, np.int32)).realize()
short = lambda T=T, **kwargs: DDPM(T, 0.1 / T, min(0.7, 20 / T), **kwargs)  # the paper's schedule with fewer steps

def exact(d, mode=MODE, sd=SD):
  """The exact eps of data that are ±mode in every pixel, with noise sd: -√(1-ᾱ) times the score of their mixture."""
  ab = f32(d.alpha_bar)
  def model(x, t):
    a = column(ab[t], x)
    var, m = a * sd**2 + 1 - a, a.sqrt() * mode
    return (1 - a).sqrt() * (x - m * (x * m / var).tanh()) / var
  return model

def last(iterator):
  *_, (t, x, x0_hat) = iterator
  assert t == 0
  return x.numpy()

def everywhere(f):  # the samplers with all that they do: ddim with and without noise
  return pytest.mark.parametrize("name, options", [("ddpm", {}), ("ddim", {}), ("ddim", {"eta": 1.0}), ("sde", {}),
                                                   ("pc", {}), ("ode", {}), ("langevin", {"inner": 2})])(f)

# *** times and noise ***

@pytest.mark.parametrize("spacing", ("linear", "quadratic"))
def test_timesteps_run_from_T_to_0(spacing):
  for T in (1, 2, 3, 50, 1000):
    for steps in range(1, T + 1) if T < 1000 else (1, 2, 10, 31, 32, 33, 500, 999, 1000):
      times = timesteps(T, steps, spacing)
      assert len(times) == steps + 1 and times[0] == T and times[-1] == 0 and (np.diff(times) < 0).all()
  assert timesteps(1000, 4, spacing) == ([1000, 750, 500, 250, 0] if spacing == "linear" else [1000, 562, 250, 62, 0])

def test_wrong_times_are_refused():
  d, x = short(10), f32(np.zeros((2, 1, 1, 1)))
  for steps in (0, -1, 11, [11, 5, 0], [5], [5, 5, 0], [0, 5], [5, -1], []):
    with pytest.raises(ValueError): SAMPLERS["ddpm"](d, None, x, steps)  # at once, not in the first step
  with pytest.raises(ValueError): timesteps(10, 5, "cubic")
  with pytest.raises(ValueError): SAMPLERS["ddpm"](d, None, x, 5, seed=-1)
  with pytest.raises(ValueError): SAMPLERS["ddpm"](d, None, x, 5, first=[1, 2, 3])
  for eta in (-0.1, 1.1, math.nan):
    with pytest.raises(ValueError): SAMPLERS["ddim"](d, None, x, 5, eta=eta)

def test_noise_is_independent_of_x_T_of_other_steps_and_of_other_images():
  d, n, shape = short(10, predict="x0"), 400, (1, 8, 8)
  ratio = d.beta_tilde[1:] / d.beta[1:]
  x_T = draw_x_T(n, shape, 7)
  xs = [x_T.numpy()] + [x.numpy() for _, x, _ in SAMPLERS["ddpm"](d, lambda x, t: x * 0 + column(t, x) * 0, x_T, 10, 7)]
  z = [(x_s - math.sqrt(d.alpha[t]) * ratio[t - 1] * x_t) / math.sqrt(d.beta[t])  # Algorithm 2 with x̂_0 = 0, for z
       for t, x_t, x_s in zip(range(10, 1, -1), xs, xs[1:])]
  draws = [xs[0], *z[:3], np.roll(z[0], 1, 0), np.roll(xs[0], 1, 0), draw_x_T(n, shape, 8).numpy(),
           normals(generators(7, 3, range(n)), shape)]
  corr = np.corrcoef([a.ravel() for a in draws])
  assert np.abs(corr - np.eye(len(draws))).max() < 5 / math.sqrt(n * 64)
  for a in draws: assert abs(a.mean()) < 5 / math.sqrt(n * 64) and abs(a.std() - 1) < 5 / math.sqrt(2 * n * 64)

@everywhere
def test_image_i_is_the_same_bytes_in_any_batch(name, options):
  d, jits = short(12), {}
  run = lambda x, seed=3, **kw: last(SAMPLERS[name](d, model, x, 6, seed=seed, jits=jits, **kw, **options)).tobytes()
  model, x_T = exact(d), draw_x_T(8, (2, 3, 3), 3)
  assert draw_x_T(5, (2, 3, 3), 3, first=3).numpy().tobytes() == x_T.numpy()[3:].tobytes()
  whole = run(x_T)
  assert run(x_T[:3]) + run(x_T[3:], first=3) == whole == run(x_T.numpy())
  assert run(x_T[:3], first=np.arange(3)) == run(x_T[:3])
  if name != "ode" and (name, options) != ("ddim", {}):
    assert run(x_T, first=1) != whole
    assert run(x_T, seed=4) != whole

# *** what holds for every sampler ***

@everywhere
def test_data_are_recovered(name, options):
  d = short(sigma="beta_tilde")
  steps = T // 4 if name == "langevin" else T                # five evaluations each
  x = last(SAMPLERS[name](d, exact(d), draw_x_T(1024, (1, 2, 4), 0), steps,
                          **({} if options == {"inner": 2} else options))).ravel()
  off = np.abs(x) - MODE
  assert abs(x.mean()) < 5 * x.std() / math.sqrt(len(x))
  assert abs((x > 0).mean() - 0.5) < 5 * 0.5 / math.sqrt(len(x))
  assert np.abs(x).mean() == pytest.approx(MODE, abs=0.007)
  assert x.std() == pytest.approx(math.sqrt(MODE**2 + SD**2), rel=0.015)
  assert off.std() == pytest.approx(SD, rel=0.25 if name == "langevin" else 0.13)
  assert (np.abs(off) > 4 * SD).mean() < 0.003

@pytest.mark.parametrize("host", (False, True))
@everywhere
def test_every_number_of_steps_starts_at_T_and_lands_on_x0(name, options, host):
  T = 3 if host else 6
  d, x_T, seen, jits = short(T, predict="x0"), draw_x_T(2, (1, 2, 2), 0), [], {}
  def model(x, t):  # x̂_0 tells the time at which it was asked
    seen.append(t)
    return (Tensor(t.numpy().reshape(-1, 1, 1, 1) / np.ones(x.shape, np.float32) / T) if host
            else x * 0 + column(t, x) / T)
  for steps in range(1, T + 1):
    out = list(SAMPLERS[name](d, model, x_T, steps, jits=jits, **options))
    times = timesteps(T, steps)
    assert [t for t, _, _ in out] == times[1:]
    for t, (_, x, x0_hat) in zip(times, out): close(x0_hat.numpy(), t / T, rtol=1e-6)
    assert all(x.shape == x_T.shape and np.isfinite(x.numpy()).all() for _, x, _ in out)
    close(out[-1][1].numpy(), times[-2] / T, rtol=2e-6)      # ᾱ = 1: x_0 is x̂_0, without noise
  assert all(t.shape == (2,) and t.dtype.name == "int" for t in seen)

@everywhere
def test_what_was_given_stays_as_it_was(name, options):
  d, x_T = short(9), draw_x_T(3, (1, 2, 2), 0)
  before, model = x_T.numpy().copy(), exact(d)
  run = lambda: SAMPLERS[name](d, model, x_T, 9, **options)
  kept = [(x.numpy().copy(), x0_hat.numpy().copy()) for _, x, x0_hat in run()]
  for (x, x0_hat), (_, x_late, x0_late) in zip(kept, list(run())):
    assert (x == x_late.numpy()).all() and (x0_hat == x0_late.numpy()).all()
  assert (x_T.numpy() == before).all()

@pytest.mark.parametrize("name", ("ddpm", "ddim", "pc"))
def test_a_model_may_leave_the_device_and_may_predict_anything(name):
  x_T, eps_model, n = draw_x_T(4, (1, 2, 2), 0), exact(short(4)), 4
  d = {p: short(n, predict=p) for p in ("eps", "x0", "mu")}
  def x0(x, t): return d["eps"].predict_x0(x, t, eps_model(x, t))
  def mu(x, t): return d["eps"].q_posterior(x0(x, t), x, t, t - 1)[0]
  def host(x, t): return Tensor(eps_model(f32(x.numpy()), Tensor(t.numpy())).numpy())
  def half_host(x, t): return x * float(t.numpy()[0]) / n     # a jit would keep the first t for ever
  run = lambda d, model: last(SAMPLERS[name](d, model, x_T, n))
  ours = run(d["eps"], eps_model)
  for other in (run(d["eps"], host), run(d["x0"], x0), run(d["mu"], mu)): close(ours, other, atol=3e-5)
  close(run(d["eps"], half_host), run(d["eps"], lambda x, t: x * column(t, x) / n), atol=1e-6)

@everywhere
def test_clipping_is_a_switch(name, options):
  d, x_T = short(8), draw_x_T(4, (1, 4, 4), 0)
  for clip in (True, False):
    out = [x0_hat.numpy() for _, _, x0_hat in SAMPLERS[name](d, exact(d, 3.0), x_T, 8, clip=clip, **options)]
    assert (np.abs(out).max() <= 1) == clip and (np.abs(out[-1]).max() > 2) != clip

def test_the_compiled_step_is_kept_for_the_next_call_and_reads_new_labels():
  d, jits, y = short(8, predict="x0"), {}, at(1, 2)
  calls = []
  def net(x, t, y): return calls.append(0) or x * 0 + column(t, x) * 0 + column(y, x) / 4
  model, x_T = guided(net, y, 1, 3), draw_x_T(2, (1, 1, 1), 0)
  close(last(SAMPLERS["ddpm"](d, model, x_T, 8, jits=jits)), 0.25)
  n = len(calls)
  y.assign(at(2, 2)).realize()
  close(last(SAMPLERS["ddpm"](d, model, x_T, 4, jits=jits)), 0.5)
  assert len(calls) == n and len(jits) == 1

# *** each against its equation ***

def chain(d, x, times, seed, step):
  """Algorithm 2 in float64: step(x_t, t, s, z), with the noise that image i draws in its own order."""
  rngs = [np.random.default_rng([seed, 0x5A, 2, i]) for i in range(len(x))]
  x = x.numpy().astype(np.float64)
  for t, s in zip(times, times[1:]):
    z = np.stack([r.standard_normal(x.shape[1:], np.float32) for r in rngs]) if s else 0.0
    x = step(x, t, s, z)
  return x

def eps64(d, x, t, mode=MODE, sd=SD):
  a = d.alpha_bar[t]
  var, m = a * sd**2 + 1 - a, math.sqrt(a) * mode
  return math.sqrt(1 - a) * (x - m * np.tanh(x * m / var)) / var

@pytest.mark.parametrize("sigma", ("beta", "beta_tilde"))
def test_ddpm_is_algorithm_2(sigma):
  d = short(20, sigma=sigma)
  def step(x, t, s, z):
    a, var = d.alpha[t], d.beta[t] if sigma == "beta" else d.beta_tilde[t]
    return (x - d.beta[t] / math.sqrt(1 - d.alpha_bar[t]) * eps64(d, x, t)) / math.sqrt(a) + math.sqrt(var) * z
  x_T = draw_x_T(50, (1, 2, 2), 5)
  close(last(SAMPLERS["ddpm"](d, exact(d), x_T, 20, 5, clip=False)), chain(d, x_T, range(20, -1, -1), 5, step),
        atol=2e-5)

@pytest.mark.parametrize("steps", (20, 7))
@pytest.mark.parametrize("clip", (True, False))
def test_ddim_with_eta_1_is_algorithm_2(steps, clip):
  d = short(20, sigma="beta_tilde")
  x_T, model = draw_x_T(50, (1, 2, 2), 0), exact(d, 1.2)
  both = [SAMPLERS[name](d, model, x_T, steps, clip=clip, **o) for name, o in (("ddpm", {}), ("ddim", {"eta": 1}))]
  for (t, x, x0), (_, y, y0) in zip(*both, strict=True):
    close(x.numpy(), y.numpy(), atol=3e-5)
    close(x0.numpy(), y0.numpy(), atol=3e-5)

@pytest.mark.parametrize("eta", (0.0, 0.3, 1.0))
def test_ddim_step_is_eq_12(eta):
  d, rng = DDPM(), np.random.default_rng(0)
  for t, s in ((1000, 999), (1000, 1), (1000, 0), (500, 20), (2, 1), (2, 0), (1, 0)):
    x0, eps, z = rng.standard_normal((3, 4, 1, 2, 2))
    a, a_s = d.alpha_bar[t], d.alpha_bar[s]
    x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
    sigma = eta * math.sqrt((1 - a_s) / (1 - a)) * math.sqrt(1 - a / a_s)        # Eq. 16
    x_s = math.sqrt(a_s) * x0 + math.sqrt(max(0, 1 - a_s - sigma**2)) * eps + sigma * z
    ours = ddim_step(d, f32(eps), f32(x_t), t, s, eta, f32(z))
    close(ours.numpy(), x_s, atol=5e-5 if t == 1000 else 2e-6)                    # x̂_0 at T: 1e-7 / √ᾱ_T
    close(ours.numpy(), ddim_step(d, f32(eps), f32(x_t), at(t, 4), at(s, 4), eta, f32(z)).numpy(), atol=1e-7)
    if s == 0: close(ours.numpy(), x0, atol=5e-5)
    if eta == 0 and s: close(ddim_step(d, f32(eps), f32(x_s), s, t).numpy(), x_t, atol=5e-6)
  with pytest.raises(ValueError): ddim_step(d, f32(eps), f32(x_t), 2, 1, 0.5)

def test_ddim_decodes_what_it_encoded():
  d, rng = short(100), np.random.default_rng(0)
  x0 = rng.choice((-MODE, MODE), (200, 1, 1, 2)) + 0.3 * rng.standard_normal((200, 1, 1, 2))
  model, errors = exact(d, MODE, 0.3), []
  for iterations in (1, 2, 6):
    x_T = ddim_encode(d, model, f32(x0), 100, iterations=iterations)
    assert 0.9 < x_T.numpy().std() < 1.2
    errors.append(np.abs(last(SAMPLERS["ddim"](d, model, x_T, 100, clip=False)) - x0).max())
  assert 1e-3 < errors[0] < 0.1 and errors[1] < 0.01 and errors[2] < 1e-4

def test_ode_is_of_second_order_and_ddim_of_first():
  """For data N(0, 0.5²) the flow scales x with the standard deviation of q(x_t). The step to 0 is left out: Euler's."""
  d, x_T, end = short(400), draw_x_T(8, (1, 2, 2), 1), 40
  sd = lambda t: math.sqrt(d.alpha_bar[t] * 0.5**2 + 1 - d.alpha_bar[t])
  def error(name, steps):
    *_, (_, x, _) = SAMPLERS[name](d, exact(d, 0.0, 0.5), x_T, np.linspace(400, end, steps + 1).astype(int), clip=False)
    return np.abs(x.numpy() - x_T.numpy() * sd(end) / sd(400)).max()
  ode, ddim = [[error(name, steps) for steps in (20, 40)] for name in ("ode", "ddim")]
  assert 3.2 < ode[0] / ode[1] < 5 and 1.8 < ddim[0] / ddim[1] < 2.3 and ddim[1] > 5 * ode[1]

def test_sde_is_eq_6_and_pc_adds_langevin():
  d = short(20)
  def reverse(x, t, s, z):
    b, score = math.log(d.alpha_bar[s] / d.alpha_bar[t]), -eps64(d, x, t) / math.sqrt(1 - d.alpha_bar[t])
    if s == 0: return (x + (1 - d.alpha_bar[t]) * score) / math.sqrt(d.alpha_bar[t])   # Tweedie: x̂_0
    return x + b * (x / 2 + score) + math.sqrt(b) * z
  def langevin(x, t, step, z):
    return x - step * eps64(d, x, t) / math.sqrt(1 - d.alpha_bar[t]) + math.sqrt(2 * step) * z
  def pc(x, t, s, z):
    return langevin(x, t, 2 * d.alpha[t] * 0.1**2 * (1 - d.alpha_bar[t]), z) if s == t else reverse(x, t, s, z)
  def ald(x, t, s, z): return langevin(x, t, 0.3 * (1 - d.alpha_bar[t]), z) if s else reverse(x, t, s, z)
  x_T, times, twice = draw_x_T(50, (1, 2, 2), 5), [20, 13, 5, 0], [20, 20, 13, 13, 5, 5, 0]
  for name, options, path, step in (("sde", {}, times, reverse), ("pc", {"snr": 0.1}, twice, pc),
                                    ("langevin", {"inner": 2, "r": 0.3}, twice, ald)):
    close(last(SAMPLERS[name](d, exact(d), x_T, times, 5, clip=False, **options)), chain(d, x_T, path, 5, step),
          atol=3e-5)

def test_training_eps_is_denoising_score_matching():
  """Vincent 2011: E‖s(x_t) + ε/√(1−ᾱ)‖² − E‖s(x_t) − ∇log q(x_t)‖² is the same for every s. Eq. 14 is the first, times
  1−ᾱ; so the best ε_θ is −√(1−ᾱ) ∇log q(x_t), the exact model of these tests."""
  d, t, n = short(), 40, 400
  a = d.alpha_bar[t]
  u = (np.arange(n) + 0.5) / n
  grid = np.linspace(-7, 7, 20001)
  cdf = np.cumsum(np.exp(-grid**2 / 2))
  normal = np.interp(u, cdf / cdf[-1], grid)                  # n equally likely values of N(0, 1)
  x0 = np.concatenate([MODE + 0.3 * normal[::2], -MODE + 0.3 * normal[1::2]])
  x0, eps = [v.reshape(-1, 1, 1, 1) for v in np.meshgrid(x0, normal)]
  x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
  def log_q(x):
    var, m = a * 0.3**2 + 1 - a, math.sqrt(a) * MODE
    return np.logaddexp(-(x - m)**2 / 2 / var, -(x + m)**2 / 2 / var)
  truth = (log_q(x_t + 1e-5) - log_q(x_t - 1e-5)) / 2e-5
  time, ours = at(t, n * n), exact(d, MODE, 0.3)
  close(d.score(ours, f32(x_t), time).numpy(), truth, atol=2e-4)  # the tests' model is the gradient of a density
  gaps, losses = [], []
  for model in (ours, lambda x, t: x * 0.8, lambda x, t: (x * 2).sin(), lambda x, t: x * 0 + 0.5):
    losses.append(d.loss_simple(model, f32(x0), time, f32(eps)).item() / (1 - a))
    gaps.append(losses[-1] - ((d.score(model, f32(x_t), time).numpy() - truth)**2).mean())
  assert min(losses[1:]) > losses[0] + 0.05
  close(gaps, gaps[0], rtol=1e-2)

def test_guidance_0_and_1_are_identities():
  rng, calls = np.random.default_rng(0), []
  x, t, y = f32(rng.standard_normal((4, 1, 2, 2))), at(5, 4), Tensor(np.array([0, 1, 2, 1], np.int32))
  def net(x, t, y): return calls.append(x.shape[0]) or x * (column(y, x) + 1) + column(t, x) + column(y, x).sin()
  labelled, free = net(x, t, y).numpy(), net(x, t, at(3, 4)).numpy()
  assert (guided(net, y, 1, 3)(x, t).numpy() == labelled).all() and (guided(net, y, 0, 3)(x, t).numpy() == free).all()
  assert calls == [4] * 4                                     # one evaluation, not two
  close(guided(net, y, 3.5, 3)(x, t).numpy(), 3.5 * labelled - 2.5 * free, rtol=1e-5)

# *** the command ***

@pytest.fixture
def command(monkeypatch, tmp_path):
  """sample.main in an empty folder, with the exact model for a network: classes 0 and 1 are its two modes."""
  meta = {"ddpm": dict(T=12, beta_1=0.1 / 12, beta_T=0.9), "dataset": "glyphs"}
  class Net:
    config = {"in_channels": 1, "image_size": 16, "num_classes": 2}
    def __call__(self, x, t, y=None):
      d = DDPM(**meta["ddpm"])
      a = column(f32(d.alpha_bar)[t], x)
      var, m = a * SD**2 + 1 - a, a.sqrt() * MODE
      side = ((x * m / var).tanh() if y is None
              else (column(y, x) == 2).where((x * m / var).tanh(), column(y, x) * 2. - 1))
      return (1 - a).sqrt() * (x - m * side) / var
  loaded = []
  monkeypatch.setattr(sample.unet, "load", lambda path, raw=False: loaded.append((path, raw)) or (Net(), meta))
  monkeypatch.chdir(tmp_path)
  def run(line): sample.main(["--checkpoint", "model", *line.split()])
  run.loaded, run.net, run.meta = loaded, Net, meta
  return run

def read(path): return np.load(path)["arr_0"]

def test_the_files(command):
  command("--n 5 --npz a.npz --gif a.gif --out pictures/a.png")
  a = read("a.npz")
  assert a.shape == (5, 16, 16, 1) and a.dtype == np.uint8
  assert np.asarray(Image.open("pictures/a.png")).tolist() == np.asarray(data.grid(a.transpose(0, 3, 1, 2))).tolist()
  gif = Image.open("a.gif")
  assert gif.n_frames == 13
  gif.seek(12)
  close(np.asarray(gif.convert("L"), int), np.asarray(Image.open("pictures/a.png"), int), atol=3)
  ddpm, x_T = DDPM(**command.meta["ddpm"]), draw_x_T(5, (1, 16, 16), 0)
  command("--n 5 --npz b.npz --guidance 0")
  direct = last(SAMPLERS["ddpm"](ddpm, guided(command.net(), at(2, 5), 1, 2), x_T, 12))
  assert (data.to_uint8(direct).transpose(0, 2, 3, 1) == read("b.npz")).all()
  kinds = (a > 127).reshape(5, -1)[:, 0]                     # without a class each image has one of its own
  assert ((a > 127).reshape(5, -1) == kinds[:, None]).all()
  direct = last(SAMPLERS["ddpm"](ddpm, guided(command.net(), Tensor(kinds.astype(np.int32)), 1, 2), x_T, 12))
  assert (data.to_uint8(direct).transpose(0, 2, 3, 1) == a).all()

def test_batch_and_n_change_no_image(command):
  for i, line in enumerate(("--n 7", "--n 7 --batch 3", "--n 4")): command(f"{line} --seed 5 --steps 6 --npz {i}.npz")
  a, b, c = map(read, ("0.npz", "1.npz", "2.npz"))
  assert a.tobytes() == b.tobytes() and a[:4].tobytes() == c.tobytes() and len({v.tobytes() for v in a}) == 7

def test_classes(command):
  command("--classes --n 3 --batch 4 --npz a.npz")
  assert [v.mean() > 127 for v in read("a.npz")] == [False] * 3 + [True] * 3
  for label in (0, 1):
    command(f"--class {label} --n 2 --npz a.npz --guidance 2")
    assert ((read("a.npz") > 127) == label).all()
  command("--n 2 --npz a.npz --guidance 0")                  # by the null label: both modes
  assert 0.3 < (read("a.npz") > 127).mean() < 0.7
  command("--n 61 --npz a.npz")                              # without a class: unmixed, both among two, in any order
  share = (read("a.npz") > 127).mean((1, 2, 3))
  assert (abs(share - 0.5) > 0.45).all()
  pairs = (share[:60] > 0.5).reshape(30, 2)
  assert (pairs.sum(1) == 1).all() and 5 < pairs[:, 0].sum() < 25

def test_the_figures(command, monkeypatch):
  kept = []
  monkeypatch.setattr(sample.data, "save_png", lambda path, img: kept.append(img))
  grids = []
  grid = data.grid
  monkeypatch.setattr(sample.data, "grid",
                      lambda images, ncols=None: grids.append((images, ncols)) or grid(images, ncols))
  command("--progressive --n 2 --guidance 0")
  images, ncols = grids[-1]
  assert images.shape == (20, 1, 16, 16) and ncols == 10
  edge = np.abs(images.astype(float) - 127.5).mean((1, 2, 3)).reshape(2, 10)
  assert (edge[:, -1] > edge[:, 0] + 20).all()               # x̂_0 is grey at T and black and white at 0
  command("--shared 3 --n 2")
  images, ncols = grids[-1]
  assert images.shape == (2 * 4 * 4, 1, 16, 16) and ncols == 4
  assert len({v.tobytes() for v in images}) == len(images)
  signs = (images.reshape(2, 4, 4, 256) > 127).astype(float)
  same = [(signs[:, row, 1] == signs[:, row, 2]).mean() for row in range(4)]
  assert same[0] < 0.6 and same[3] > 0.7                     # from x_T they share nothing, from x_{T/4} most modes
  assert (signs[:, 3, 0] == signs[:, 3, 1]).mean() > 0.75    # and the first image of a row is their latent
  command("--interpolate 1 --n 2")
  images, ncols = grids[-1]
  assert images.shape == (26, 1, 16, 16) and ncols == 13
  glyphs = {v.tobytes() for v in data.load("glyphs", "test")[0]}
  assert [v.tobytes() in glyphs for v in images] == ([True] + [False] * 11 + [True]) * 2
  command("--interpolate 12 --n 1 --sampler ode")
  assert grids[-1][0].shape == (13, 1, 16, 16)
  with pytest.raises(ValueError, match="from 1 to T = 12"): command("--interpolate 13")
  with pytest.raises(ValueError, match="unknown dataset"): command("--interpolate 3 --dataset nothing")

def test_interpolation_mixes_latents_of_one_noise(command):
  d, images = DDPM(**command.meta["ddpm"]), data.load("glyphs", "test")[0][:4]
  def draw(x, times, keep=(0,), index=None):                  # a decoder that does nothing
    assert times == [7, 4, 0] and (index == np.repeat([0, 1], 11)).all()
    return {0: (x, None)}
  rows, ncols = sample.interpolate(draw, d, images, 7, [12, 8, 7, 4, 0], 3)
  rows, x0 = rows.reshape(2, 13, 256), images.reshape(2, 2, 256) / 127.5 - 1
  close(rows[:, [0, 12]], x0, atol=1e-6)
  close(rows[:, 1:12], rows[:, [1]] + np.linspace(0, 1, 11)[:, None] * (rows[:, [11]] - rows[:, [1]]), atol=1e-5)
  eps = (rows[:, [1, 11]] - math.sqrt(d.alpha_bar[7]) * x0) / math.sqrt(1 - d.alpha_bar[7])
  assert abs(eps.std() - 1) < 0.1 and np.abs(np.corrcoef(eps.reshape(4, 256)) - np.eye(4)).max() < 0.3

def test_raw_weights_and_the_newest_run(command, monkeypatch, tmp_path):
  with pytest.raises(ValueError, match="no runs"): unet.find_checkpoint(None, True)
  for i, name in enumerate(("old", "new")):
    for file in ("ema", "last"):
      (path := tmp_path / "runs" / name / f"{file}.safetensors").parent.mkdir(parents=True, exist_ok=True)
      path.touch()
      sample.os.utime(path, (i, i))
  assert unet.find_checkpoint(None, False) == "runs/new/ema.safetensors"
  assert unet.find_checkpoint(None, True) == "runs/new/last.safetensors"
  assert unet.find_checkpoint("runs/old", True) == "runs/old/last.safetensors"
  assert unet.find_checkpoint("owner/name", False) == "owner/name"
  command("--n 1 --raw --steps 2")
  assert command.loaded[-1] == ("model", True)

@pytest.mark.parametrize("line", ("--n 0", "--n x", "--steps 0", "--seed -1", "--batch 0", "--eta 0.5", "--guidance -1",
  "--sampler ddim --eta 1.5", "--sampler nothing", "--class 0 --guidance nan", "--class 0 --classes",
  "--shared 2 --sampler ode", "--shared 2 --gif a.gif", "--classes --progressive", "--out /",
  "--npz /proc/version/a.npz", "--dataset mnist", "--unknown"))
def test_wrong_arguments_are_one_sentence(command, line):
  with pytest.raises(SystemExit) as e: command(line)
  assert str(e.value).startswith("sample.py: ") and "\n" not in str(e.value) and not command.loaded

def test_wrong_for_this_model(command, monkeypatch):
  for line in ("--steps 13", "--class 2"):
    with pytest.raises(ValueError, match="must be from"): command(line)
  command.net.config = {**command.net.config, "num_classes": 0}
  for line in ("--class 0", "--classes", "--guidance 2"):
    with pytest.raises(ValueError, match="without classes"): command(line)
  command("--n 1 --steps 2 --npz a.npz")
  assert read("a.npz").shape == (1, 16, 16, 1)

def test_docstrings_name_what_they_compute():
  for f, number in ((SAMPLERS["ddpm"], "Algorithm 2"), (ddim_step, "Eq. 12"), (SAMPLERS["ddim"], "Eq. 12"),
                    (SAMPLERS["sde"], "Eq. 6"), (SAMPLERS["pc"], "Algorithms 3 and 5"), (SAMPLERS["ode"], "Eq. 13"),
                    (SAMPLERS["langevin"], "Algorithm 1"), (guided, "Eq. 6"), (sample.progressive, "Figure 6"),
                    (sample.shared, "Figure 7"), (sample.interpolate, "Figure 8")):
    assert number in inspect.getdoc(f).split("\n\n")[0], f

# ***** evaluate.py *****

LOG2 = math.log(2)
scaled = lambda k: k / 127.5 - 1
cdf = np.vectorize(lambda z: math.erfc(-z / math.sqrt(2)) / 2)
mean_dim = lambda v: v.reshape(len(v), -1).mean(1)
gaussian_images = lambda n, m, s, shape: data.to_uint8(rng(1).normal(m, s, (n, *shape)))
some_images = lambda n, shape=(1, 4, 4), seed=0: rng(seed).integers(0, 256, (n, *shape)).astype(np.uint8)

def table(values):
  """A table of T+1 numbers for a model: t (B,) -> (B, 1, 1, 1)."""
  row = Tensor(np.asarray(values, np.float32)).realize()
  return lambda t: row[t].reshape(-1, 1, 1, 1)

def gaussian_model(d, m, s, factor=1.0):
  """The exact eps for data N(m, s²): E[ε | xₜ] = √(1−ᾱ) (xₜ − √ᾱ m) / (ᾱ s² + 1−ᾱ); times `factor`, a wrong one."""
  ab = d.alpha_bar
  weight, mean = table(factor * np.sqrt(1 - ab) / (ab * s * s + 1 - ab)), table(np.sqrt(ab) * m)
  return lambda x, t: weight(t) * (x - mean(t))

def log_mass(k, m, s):
  """log of N(m, s²)'s mass on each bin of the levels k, float64."""
  x = scaled(k)
  lo, hi = np.where(k == 0, 0, cdf((x - 1/255 - m) / s)), np.where(k == 255, 1, cdf((x + 1/255 - m) / s))
  return np.log(hi - lo)

# *** the bound ***

def reference(d, x0, t, eps, out, predict, clip):
  """Eq. 5's term of one image at one time, bits/dim, and x̂_0, the textbook's way in float64. out(x, t) -> array."""
  beta = np.append(0, np.linspace(d.beta[1], d.beta[-1], d.T))
  alpha, ab = 1 - beta, np.cumprod(1 - beta)
  x_t = math.sqrt(ab[t]) * x0 + math.sqrt(1 - ab[t]) * eps
  y = out(x_t, t)
  raw = (x_t - math.sqrt(1 - ab[t]) * y) / math.sqrt(ab[t]) if predict == "eps" else y
  x0_hat = raw.clip(-1, 1) if clip else raw
  tilde = lambda t: (1 - ab[t-1]) / (1 - ab[t]) * beta[t]
  mu = lambda x0: (math.sqrt(ab[t-1]) * beta[t] * x0 + math.sqrt(alpha[t]) * (1 - ab[t-1]) * x_t) / (1 - ab[t])
  if t == 1: nats = -log_mass(np.rint((x0 + 1) * 127.5), x0_hat, math.sqrt(tilde(2)))
  else:
    v, w = tilde(t), beta[t] if d.sigma == "beta" else tilde(t)
    nats = (math.log(w / v) + v / w + (mu(x0) - mu(x0_hat))**2 / w - 1) / 2
  eps_hat = (x_t - math.sqrt(ab[t]) * raw) / math.sqrt(1 - ab[t])
  return nats.mean() / LOG2, ((eps - eps_hat)**2).mean(), ((x0 - x0_hat)**2).mean()

@pytest.mark.parametrize("sigma, predict, clip",
                         [("beta", "eps", True), ("beta_tilde", "eps", False), ("beta", "x0", True)])
def test_every_term_in_float64(sigma, predict, clip):
  d, k, seed = DDPM(7, 1e-3, 0.3, sigma=sigma, predict=predict), some_images(5, (3, 2, 4)), 11
  labels = np.array([3, 0, 1, 2, 2], np.int64) if clip else None
  def model(x, t, y=None): return 0.7 * x + 0.1 * x.sin() + 0.02 * (t if y is None else t + y).reshape(-1, 1, 1, 1)
  b = bound(d, model, k, seed, clip=clip, batch=4, labels=labels)
  assert b["t"].tolist() == [[1, 2, 3, 4, 5, 6, 7]] * 5 and b["weight"].tolist() == [1] * 7
  for i in range(5):
    for t in range(1, 8):
      eps = np.random.default_rng((seed, i, t, 0)).standard_normal((3, 2, 4), np.float32).astype(np.float64)
      out = lambda x, t: 0.7 * x + 0.1 * np.sin(x) + 0.02 * (t + (labels[i] if clip else 0))
      want = reference(d, scaled(k[i:i+1]), t, eps, out, predict, clip)
      close([b[name][i, t-1] for name in ("L", "mse_eps", "mse_x0")], want, rtol=2e-4)
  a = np.prod(1 - np.linspace(1e-3, 0.3, 7))
  L_T = mean_dim((1 - a) + a * scaled(k)**2 - 1 - np.log(1 - a)) / 2 / LOG2
  close(b["L_T"], L_T, rtol=1e-4)
  close(b["total"], L_T + b["L"].sum(1), rtol=1e-6)

def test_bound_nears_the_closed_form_as_T_grows_and_stays_above():
  """Data N(0.1, 0.25²) on the 256 levels, exact eps: −log p is known. The paper's betas, times 1000/T."""
  k, gap = gaussian_images(200, 0.1, 0.25, (1, 16, 16)), {}
  nll = -mean_dim(log_mass(k, 0.1, 0.25)) / LOG2
  for T in (20, 4000):
    d = DDPM(T, 0.1 / T, min(20 / T, 0.95))
    b = bound(d, gaussian_model(d, 0.1, 0.25), k, samples_t=min(40, T - 1), batch=2048)
    above = b["total"] - nll
    gap[T] = above.mean() / nll.mean()
    assert above.mean() > -3 * above.std() / math.sqrt(200)
  assert gap[4000] < 0.01 < gap[20]

def test_L_T_of_the_papers_schedule():
  k = np.concatenate([some_images(3), np.zeros((1, 1, 4, 4), np.uint8), np.full((1, 1, 4, 4), 255, np.uint8)])
  b = bound(DDPM(), lambda x, t: x, k, samples_t=1)
  a = math.prod(1 - x for x in np.linspace(1e-4, 0.02, 1000))
  close(b["L_T"], mean_dim(a * scaled(k)**2 - a - math.log1p(-a)) / 2 / LOG2, rtol=1e-3)
  assert (b["L_T"] < 1e-4).all()

def test_noise_is_of_image_and_time_so_batches_do_not_matter():
  d, k = DDPM(5, 0.01, 0.4), some_images(5)
  whole, parts = [bound(d, lambda x, t: 0.5 * x, k, 3, samples_t=2, batch=size) for size in (64, 4)]
  close(whole["L"], parts["L"], rtol=1e-5)
  assert (whole["t"] == parts["t"]).all()
  draws = evaluate.noise(3, [0, 0, 1, 2, 0], [1, 2, 1, 1, 1], (1, 2, 3))
  assert draws.dtype == np.float32 and len(np.unique(draws[:4])) == 24 and np.array_equal(draws[0], draws[4])
  assert not np.isin(evaluate.noise(4, [0], 1, (1, 2, 3)), draws).any()

def test_what_is_an_image():
  k = some_images(2)
  for x in (k, Tensor(k), scaled(k), Tensor(scaled(k).astype(np.float32))): assert np.array_equal(evaluate.levels(x), k)
  for bad in (scaled(k) + 0.003, k[0], k[:0], scaled(k) * 2, scaled(k) * math.nan):
    with pytest.raises(ValueError): evaluate.levels(bad)
  with pytest.raises(ValueError, match="not finite"): bound(DDPM(2), lambda x, t: x * math.nan, k)

def test_model_that_reads_the_host_is_not_captured():
  d, k = DDPM(2, 0.01, 0.5), some_images(2)
  host = lambda x, t: Tensor(x.numpy() * t.numpy().astype(np.float32).reshape(-1, 1, 1, 1) / 9)
  plain = lambda x, t: x * t.reshape(-1, 1, 1, 1) / 9
  close(bound(d, host, k, batch=2)["L"], bound(d, plain, k, batch=2)["L"], rtol=1e-5)

# *** which times ***

@pytest.mark.parametrize("T", (2, 3, 10, 50, 1000))
def test_geometric(T):
  for n in {1, 2, 5, T // 2, T - 1} & set(range(1, T)):
    g = geometric(T, n)
    assert len(g) == n + 1 and g[0] == 1 and g[-1] == T and (np.diff(g) > 0).all()
  ratios = geometric(10**6, 6)[1:] / geometric(10**6, 6)[:-1]
  close(ratios, 10, rtol=0.01)

@pytest.mark.parametrize("T, M", [(30, 7), (30, 1), (30, 29), (2, 1), (1000, 20)])
def test_strata_are_unbiased(T, M):
  t, weight = times(T, 4000, 5, samples_t=M)
  assert t.shape == (4000, M + 1) and (t[:, 0] == 1).all() and weight[0] == 1 and weight.sum() == T
  assert len(np.unique(t[:, 1:])) > 0.98 * (T - 1)            # every time may come
  f = rng(3).random(T + 1) / np.arange(1, T + 2)
  estimate = f[t] @ weight
  assert abs(estimate.mean() - f[1:].sum()) <= 4 * estimate.std() / math.sqrt(4000) + 1e-12
  for drawn, size in zip(t.T[1:], weight[1:]):               # a stratum: `size` neighbours, equally often
    values, counts = np.unique(drawn, return_counts=True)
    assert len(values) <= size and values[-1] - values[0] < size
    assert abs(counts - 4000 / size).max() < 5 * math.sqrt(4000 / size) + 1

def test_stratified_bound_and_its_standard_error():
  """One image again and again: the mean is that of all terms, the scatter of a mean is what its standard error says."""
  d, k = DDPM(60, 1e-3, 0.25), some_images(1).repeat(2000, 0)
  model = gaussian_model(d, 0, 0.5, 0.9)
  every, some = [bound(d, model, k, seed, samples_t=m, batch=4096)["total"] for seed, m in ((0, None), (1, 6))]
  assert abs(every.mean() - some.mean()) < 4 * math.hypot(every.std(), some.std()) / math.sqrt(2000)
  means, errors = zip(*[evaluate.mean_error(part) for part in some.reshape(100, 20)])
  assert 0.8 < np.std(means) / np.mean(errors) < 1.25

def test_every_kth():
  for T, K in ((30, 1), (30, 4), (30, 29), (31, 5), (2, 7)):
    t, weight = times(T, 2, every=K)
    assert t[0].tolist() == t[1].tolist() == [1, *sorted({*range(2, T + 1, K), T})] and weight[0] == 1
    close(weight[1:].sum(), T - 1)
    close((3 + 2 * t[0, 1:]) @ weight[1:], (3 + 2 * np.arange(2, T + 1)).sum())  # a straight line is summed exactly
  assert (times(30, 1)[1] == 1).all() and times(1, 3)[0].tolist() == [[1]] * 3 and times(1, 3, samples_t=4)[1] == [1]

def test_chain_of_one_step():
  b = bound(DDPM(1, 0.5, 0.5), lambda x, t: x, some_images(2))
  close(b["total"], b["L"][:, 0] + b["L_T"])

# *** Eq. 3 and Eq. 5 ***

def test_eq3_along_a_trajectory_in_float64():
  d, k, seed, T = DDPM(5, 0.01, 0.5), some_images(3), 4, 5
  eq3, sampled, kl = trajectory_bound(d, lambda x, t: 0.6 * x, k, seed, batch=2, clip=False)
  beta = np.append(0, np.linspace(0.01, 0.5, T))
  alpha, ab = 1 - beta, np.cumprod(1 - beta)
  tilde = lambda t: (1 - ab[t-1]) / (1 - ab[t]) * beta[t]
  mu = lambda t, x0, x_t: (math.sqrt(ab[t-1]) * beta[t] * x0 + math.sqrt(alpha[t]) * (1 - ab[t-1]) * x_t) / (1 - ab[t])
  lognormal = lambda x, m, v: (-((x - m)**2 / v + math.log(2 * math.pi * v)) / 2).mean() / LOG2
  for i in range(3):
    x = x0 = scaled(k[i])
    ratio, kls = 0.0, []
    for t in range(1, T + 1):
      eps = np.random.default_rng((seed, i, t, 0)).standard_normal((1, 4, 4), np.float32).astype(np.float64)
      x_t = math.sqrt(alpha[t]) * x + math.sqrt(beta[t]) * eps
      x0_hat = x_t * (1 - 0.6 * math.sqrt(1 - ab[t])) / math.sqrt(ab[t])
      if t == 1: log_p = log_mass(k[i], x0_hat, math.sqrt(tilde(2))).mean() / LOG2
      else: log_p = lognormal(x, mu(t, x0_hat, x_t), beta[t])
      kls.append(-log_p if t == 1 else (((mu(t, x0, x_t) - mu(t, x0_hat, x_t))**2 / beta[t]).mean()
                                        + tilde(t) / beta[t] - 1 - math.log(tilde(t) / beta[t])) / 2 / LOG2)
      ratio += log_p - lognormal(x_t, math.sqrt(alpha[t]) * x, beta[t])
      x = x_t
    close(eq3[i], -ratio - lognormal(x, 0, 1), rtol=1e-4)  # −log p(x_T) − Σ log p/q
    close(kl[i, :T], kls, rtol=1e-3)
    close(kl[i, T], mean_dim(ab[T] * x0[None]**2 - ab[T] - math.log(1 - ab[T]))[0] / 2 / LOG2, rtol=1e-4)
  close(sampled.sum(1), eq3, rtol=1e-4)                    # Bayes: the same number, path by path
  close(sampled[:, 0], kl[:, 0])

def test_eq3_and_eq5_agree_and_the_variance_falls():
  d, k = DDPM(10, 0.01, 0.9), gaussian_images(1, 0.1, 0.25, (1, 4, 4)).repeat(3000, 0)
  for factor in (1.0, 0.8):
    eq3, sampled, kl = trajectory_bound(d, gaussian_model(d, 0.1, 0.25, factor), k, batch=3000, clip=False)
    difference = eq3 - kl.sum(1)
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(3000) < 0.1
    spread = np.abs((sampled - kl)[:, 1:].mean(0)) / ((sampled - kl)[:, 1:].std(0) / math.sqrt(3000))
    assert (spread < 4.5).all()                            # each draw's mean is its KL
    assert (kl.var(0)[1:] < sampled.var(0)[1:] / 5).all()  # and its variance falls, at every t
    assert sampled.var(0).sum() > 2 * kl.var(0).sum()

# *** rate and distortion ***

@pytest.mark.parametrize("options", [{}, {"samples_t": 4}])
def test_rate_and_distortion(options, tmp_path, monkeypatch):
  t, weight = times(9, 6, **options)
  L, mse_x0 = rng().random((2, *t.shape))
  b = {"t": t, "weight": weight, "L": L, "mse_x0": mse_x0, "L_T": rng(1).random(6)}
  b["total"] = b["L_T"] + (L * weight).sum(1)
  rows = rate_distortion(9, b)
  close(rows[-1, 2] + b["L"][:, 0].mean(), b["total"].mean(), rtol=1e-9)
  assert (np.diff(rows[:, 0]) > 0).all() and rows[-1, :2].tolist() == [9, 1] and (rows[:, 0] + rows[:, 1] == 10).all()
  for row, j in zip(rows, reversed(range(b["t"].shape[1]))):
    rate = []
    for t in b["t"][:, j]:  # what it took to know x_t: L_T and all the terms of later times
      rate.append(np.mean([b["L_T"][i] + sum(L * w for L, w, u in zip(b["L"][i], weight, b["t"][i]) if u > t)
                           for i in range(6)]))
    when, rmse = b["t"][:, j].mean(), 127.5 * math.sqrt(b["mse_x0"][:, j].mean())
    close(row, [10 - when, when, np.mean(rate), rmse], rtol=1e-9)
  if not options: assert rows[0, 2] == pytest.approx(b["L_T"].mean())
  plot, drawn = data.plot, []
  monkeypatch.setattr(data, "plot", lambda series, *a: drawn.extend(series.values()) or plot(series, *a))
  evaluate.save_rate_distortion(tmp_path / "a" / "rd.csv", rows)
  close(drawn, [[rows[:, i], rows[:, j]] for i, j in ((0, 3), (0, 2), (2, 3))])
  lines = (tmp_path / "a" / "rd.csv").read_text().splitlines()
  assert lines[0] == "reverse_step,t,rate_bits_per_dim,distortion_rmse"
  close(np.array([[float(v) for v in line.split(",")] for line in lines[1:]]), rows, rtol=1e-6)
  image = Image.open(tmp_path / "a" / "rd.png")
  assert image.size == (2160, 440) and len({image.crop((x, 0, x + 720, 440)).tobytes() for x in (0, 720, 1440)}) == 3

# *** outliers ***

def test_auc_counts_pairs():
  for seed in range(5):
    a, b = rng(seed).integers(0, 8, 13) / 8, rng(seed + 50).integers(2, 10, 9) / 8  # with ties
    assert auc(a, b) == pytest.approx(np.mean([(y > x) + (y == x) / 2 for x in a for y in b]))
  assert auc(np.array([1., 2]), np.array([3., 4])) == 1 and auc(np.array([3., 4]), np.array([1., 2])) == 0

def test_contrast(monkeypatch):
  k = some_images(6, (1, 8, 12))
  assert (evaluate.contrast("inverted", k) == 255 - k).all()
  assert (evaluate.contrast("shifted", k)[:, :, 2:, 3:] == k[:, :, :-2, :-3]).all()
  colours = np.full((4, 3, 5, 5), 7, np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]
  monkeypatch.setattr(data, "load", lambda name, split, data_dir: (colours, np.zeros(4)))
  assert np.array_equal(evaluate.contrast("x", k), np.full((4, 1, 8, 12), 7) + np.arange(4).reshape(4, 1, 1, 1))
  assert evaluate.contrast("x", some_images(2, (3, 4, 4))).shape == (2, 3, 4, 4)

def test_captions_under_images():
  k = np.full((3, 1, 28, 28), 40, np.uint8)
  sheet = np.asarray(evaluate.captioned(k, ["1.234", "5", ""]))
  assert sheet.shape[2] == 3 and (sheet == 40).all(2).sum() >= 3 * 84 * 84
  tiles = [sheet[2 + r * 102:102 + r * 102, 2 + c * 86:86 + c * 86] for r, c in ((0, 0), (0, 1), (1, 0))]
  ink = [(tile[84:] < 128).sum() for tile in tiles]
  assert ink[0] > ink[1] > ink[2] == 0

# *** the ODE ***

def log_normal(x, m, s): return -((x - m) / s)**2 / 2 - math.log(s * math.sqrt(2 * math.pi))

def test_ode_density_of_a_gaussian():
  d, x = DDPM(), rng(2).normal(0.1, 0.25, (6, 1, 2, 2))
  want = log_normal(x, 0.1, 0.25).reshape(6, -1).sum(1)
  got = ode_log_density(d, gaussian_model(d, 0.1, 0.25), Tensor(x.astype(np.float32)), 100, batch=4)
  assert got.shape == (6,) and np.abs(np.expm1(got.numpy() - want)).max() < 0.01
  exact = ode_log_density(d, gaussian_model(d, 0.1, 0.25), x[:1], 100, probes=0).numpy()
  close(exact, got.numpy()[:1], atol=1e-4)  # the Jacobian is diagonal, so one probe is exact

@pytest.mark.parametrize("s,start,steps", [
  (0.25, 0.1, 100), (0.25, 0.003, 100), (1e-6, 2/255/12**0.5, 30), (1e-6, 0.05, 30)])
def test_ode_density_of_points_that_bear_noise(s, start, steps):
  """q(x) at the noise level is N(m √(1−start²), s² (1−start²) + start²), below t = 1 (where √(1−ᾱ) = 0.01) as well.

  Nearly all data at one point (s = 1e-6) get ever sharper there: a single step from 0 to t = 1 would be far off."""
  d, m = DDPM(), 0.1
  mean, sd = m * math.sqrt(1 - start**2), math.sqrt(s * s * (1 - start**2) + start**2)
  x = rng(6).normal(mean, sd, (6, 1, 1, 1))
  got = ode_log_density(d, gaussian_model(d, m, s), x, steps, start=start).numpy()
  assert np.abs(got - log_normal(x, mean, sd).ravel()).max() < (0.025 if s > 1e-3 else 3e-3)

def test_ode_knows_the_ends_of_the_levels():
  """A model that takes all data for −1.5 or 1.2: kept to −1 and 1, these are points that bear noise, exactly."""
  d, start = DDPM(), 0.004
  for point, edge in ((-1.5, -1), (1.2, 1)):
    x = rng(6).normal(edge * math.sqrt(1 - start**2), start, (6, 1, 1, 1))
    kept, free = [ode_log_density(d, gaussian_model(d, point, 1e-6), x, 40, start=start, discrete=discrete).numpy()
                  for discrete in (True, False)]
    want = log_normal(x, edge * math.sqrt(1 - start**2), start).ravel()
    assert np.abs(kept - want).max() < 0.03  # the mean of x_T is ±0.006
    assert np.abs(free - log_normal(x, point, start).ravel()).max() < 0.01 * np.abs(free).min() and free.max() < -1000

@pytest.mark.parametrize("s", (0.0005, 0.001, 0.002, 0.004, 0.0058, 0.007, 0.05))
def test_on_levels(s):
  """For p(x_0) ~ exp(a x_0): the mean given y is y + a s² on the line, and on the levels a sum over all of them."""
  k = np.arange(256) / 127.5 - 1
  for a in (0, -40.0, 200.0)[:2 if s > 0.01 else 3]:
    y = rng(3).uniform(-0.5, 0.5, (5, 1, 4, 4))
    log_w = a * k - ((y[..., None] - k) / s)**2 / 2
    w = np.exp(log_w - log_w.max(-1, keepdims=True))
    got = evaluate.on_levels(f32(y + a * s * s), Tensor(np.array([s], np.float32))).numpy()
    close(got, (w * k).sum(-1) / w.sum(-1), atol=2e-6 if s > 0.0008 else 1e-4)  # half-way between two a hair decides
  ends = evaluate.on_levels(f32([[[[-1.3, 1.01]]]]), Tensor(np.array([s], np.float32)))
  assert ends.numpy().ravel().tolist() == [-1, 1]

def mixture_model(d, a, s):
  """The exact eps for pixels (N(-a, s²) + N(a, s²)) / 2."""
  ab = d.alpha_bar
  var, mean, sigma = table(ab * s * s + 1 - ab), table(np.sqrt(ab) * a), table(np.sqrt(1 - ab))
  return lambda x, t: sigma(t) * (x - mean(t) * (x * mean(t) / var(t)).tanh()) / var(t)

@pytest.mark.parametrize("schedule", ("linear", "cosine"))
def test_ode_density_of_a_mixture(schedule):
  d, x = DDPM(schedule=schedule), rng(3).normal(0, 0.12, (8, 1, 1, 2)) + 0.5 * rng(4).choice([-1, 1], (8, 1, 1, 2))
  x[0] = 0.0, 0.1  # between the modes too
  want = np.logaddexp(log_normal(x, 0.5, 0.12), log_normal(x, -0.5, 0.12)).reshape(8, -1).sum(1) - 2 * LOG2
  got = ode_log_density(d, mixture_model(d, 0.5, 0.12), x, 200).numpy()
  assert np.abs(np.expm1(got - want)).max() < 0.01

def test_hutchinson_on_correlated_pixels():
  """N(0, S) with S full: probes=0 is exact, each seed's probes scatter around it."""
  d, S = DDPM(200, 1e-3, 0.1), np.array([[0.2, 0.12, 0.05], [0.12, 0.3, -0.1], [0.05, -0.1, 0.25]])
  x = rng(5).multivariate_normal(np.zeros(3), S, 400).reshape(-1, 1, 1, 3)[[0] * 400]
  precision = [np.linalg.inv(a * S + (1 - a) * np.eye(3)) * math.sqrt(1 - a) for a in d.alpha_bar]
  P = Tensor(np.array(precision, np.float32)).realize()
  model = lambda x, t: (P[t] @ x.reshape(-1, 3, 1)).reshape(x.shape)
  want = -(x[0].ravel() @ np.linalg.solve(S, x[0].ravel()) + np.linalg.slogdet(2 * math.pi * S)[1]) / 2
  exact = ode_log_density(d, model, x[:1], 60, probes=0).numpy()
  assert np.abs(np.expm1(exact - want)).max() < 0.01
  draws, more = [ode_log_density(d, model, x, 10, probes=p, batch=400).numpy() for p in (1, 4)]
  exact = ode_log_density(d, model, x[:1], 10, probes=0).numpy()
  assert draws.std() > 0.01 and abs(draws.mean() - exact[0]) < 4 * draws.std() / 20
  assert 0.4 < more.std() / draws.std() < 0.6

def test_ode_steps():
  d, x, asked = DDPM(12, 0.01, 0.5), rng().normal(0, 0.3, (1, 1, 1, 1)), []
  def model(x, t):
    asked.extend(t.numpy().tolist())
    return 0.5 * x
  for steps in (1, 2, 7, 12):
    asked.clear()
    ode_log_density(d, model, x, steps)
    assert len(asked) == 2 * steps - 1 and min(asked) == (1 if steps > 1 else 12) and max(asked) == 12
  for steps in (0, 13):
    with pytest.raises(ValueError, match="from 1 to T = 12"): ode_log_density(d, model, x, steps)
  with pytest.raises(ValueError, match="probes"): ode_log_density(d, model, np.zeros((1, 1, 9, 9)), 3, probes=0)
  with pytest.raises(ValueError, match="probes"): ode_log_density(d, model, x, 3, probes=-1)

def test_dequantization(monkeypatch):
  """A density that is uniform over the 256 bins needs 8 bits; every point stays in its bin and fills it."""
  seen = []
  def uniform(d, model, x, steps, seed, start, discrete):
    seen.append(np.asarray(x))
    assert start == pytest.approx((x - scaled(k)).std(), rel=0.05)
    return Tensor(np.full(len(x), 16 * math.log(255 / 512), np.float32))  # the bins reach from -256/255 to 256/255
  monkeypatch.setattr(evaluate, "ode_log_density", uniform)
  k = some_images(300)
  k[0, 0, 0, :2] = 0, 255
  close(ode_bpd(None, None, k, 5).numpy(), 8, rtol=1e-6)
  ode_bpd(None, None, Tensor(scaled(k).astype(np.float32)), 5)
  assert np.array_equal(*seen)
  place = (seen[0] - scaled(k)) * 127.5
  assert place.min() > -0.5 and place.max() < 0.5 and abs(place.mean()) < 0.02 and abs(place.std() - 12**-0.5) < 0.01
  assert len(np.unique(place.round(9))) > 4700

def truncated(low, high):
  """The entropy, nats, and the deviation of N(0, 1) kept within low..high, by numerical integration."""
  u = np.linspace(max(low, -12), min(high, 12), 400_001)
  p = np.exp(-u * u / 2)
  p /= p.sum() * (u[1] - u[0])
  mean = lambda v: (p * v).sum() * (u[1] - u[0])
  return -mean(np.log(p)), math.sqrt(mean(u * u) - mean(u)**2)

def test_normal_dequantization():
  """Noise of a sixth of a bin's width, kept in the bin; those of 0 and 255 are open outside. log q is its density."""
  k = np.repeat(np.array([0, 1, 128, 254, 255], np.uint8), 10_000).reshape(5, 1, 100, 100)
  x, sd, log_q = evaluate.dequantized(k, discrete=True)
  u = ((x - (k / 127.5 - 1)) / sd).reshape(5, -1)
  assert sd == 1 / 765 and u[1:].min() >= -3 and u[:-1].max() <= 3 and u[0].min() < -3.1 and u[4].max() > 3.1
  for i, (low, high) in enumerate(((-math.inf, 3), (-3, 3), (-3, 3), (-3, 3), (-3, math.inf))):
    entropy, deviation = truncated(low, high)
    assert abs(-log_q[i] / 10_000 - entropy - math.log(sd)) < 0.03 and abs(u[i].std() - deviation) < 0.03
  v = np.linspace(-3, 3, 6001)  # q at the points, from log q's own sum, against a density that integrates to 1
  q = np.exp(-v * v / 2) / np.trapezoid(np.exp(-v * v / 2), v) / sd
  close(log_q[2], np.log(np.interp(u[2], v, q)).sum(), rtol=1e-4)

@pytest.mark.parametrize("discrete,steps", ((False, 60), (True, 100)))
def test_ode_bpd_of_a_gaussian(discrete, steps):
  """The mass of N(m, s²) in each bin; with `discrete` as well, as its density is straight across one: the narrow noise
  by itself would cost log₂ 6 − 2.04 = 0.54 bits."""
  d, k = DDPM(), gaussian_images(100, 0.1, 0.25, (1, 4, 4))
  got = ode_bpd(d, gaussian_model(d, 0.1, 0.25), k, steps, discrete=discrete).numpy()
  want = -mean_dim(log_mass(k, 0.1, 0.25)) / LOG2
  close(got.mean(), want.mean(), atol=0.04 if discrete else 0.02)
  if not discrete: close(got[:30], want[:30], atol=0.02)

# *** the program ***

@pytest.fixture
def program(monkeypatch, tmp_path, capsys):
  """main() on a model without weights and a few images: a function of the flags -> (JSON, stdout, stderr)."""
  state = types.SimpleNamespace(
    images=gaussian_images(30, 0, 0.3, (1, 8, 8)), labels=(np.arange(30) % 3).astype(np.int32), asked=[],
    config={"image_size": 8, "in_channels": 1, "num_classes": 0}, ddpm={"T": 40, "beta_1": 3e-3, "beta_T": 0.45},
    dataset="mnist")
  class Model:
    config = state.config
    def __call__(self, x, t, *y):
      state.asked.append(len(y))
      return 0.8 * x if not y else x * (y[0] + 1).reshape(-1, 1, 1, 1) / 5
  meta = lambda: {"ddpm": state.ddpm, "dataset": state.dataset, "step": 9}
  monkeypatch.setattr(unet, "load", lambda path, raw=False: (Model(), meta()))
  monkeypatch.setattr(data, "load", lambda name, split, data_dir=None, size=None: (state.images, state.labels))
  monkeypatch.chdir(tmp_path)
  def run(*flags):
    evaluate.main(["--checkpoint", "c.safetensors", *map(str, flags), "--json", "out/b.json"])
    return json.loads((tmp_path / "out/b.json").read_text()), *capsys.readouterr()
  run.state = state
  return run

def test_program(program, tmp_path):
  flags = "--every", 1, "--n", 12, "--batch", 5, "--seed", 3, "--rate-distortion", "rd/x.csv", "--outliers", 4
  r, out, err = program(*flags)
  assert [r[name] for name in ("dims", "n", "seed", "T", "step", "dataset")] == [64, 12, 3, 40, 9, "mnist"]
  assert r["t"] == list(range(1, 41)) and r["L_t"][0] == r["L_0"] == r["distortion"]
  assert r["L_T"] + np.dot(r["weight"], r["L_t"]) == pytest.approx(r["bits_per_dim"])
  assert r["rate"] + r["distortion"] == pytest.approx(r["bits_per_dim"])
  assert len(set(r["index"])) == 12 and np.mean(r["per_image"]) == pytest.approx(r["bits_per_dim"])
  assert r["standard_error"] == pytest.approx(np.std(r["per_image"], ddof=1) / math.sqrt(12))
  b = bound(DDPM(**program.state.ddpm), lambda x, t: 0.8 * x, program.state.images[r["index"]], 3)
  close(r["per_image"], b["total"], rtol=1e-5)
  close(r["mse_t"], b["mse_eps"].mean(0), rtol=1e-5)
  assert r["mse"] == pytest.approx(np.mean(r["mse_t"]))
  assert r["rmse"] == pytest.approx(127.5 * math.sqrt(b["mse_x0"][:, 0].mean()), rel=1e-5)
  assert r["outliers"] == np.array(r["index"])[np.argsort(r["per_image"])[::-1][:4]].tolist()
  assert "64 dimensions" in out and f"{r['bits_per_dim']:.6f}" in out and f"± {r['standard_error']:.6f}" in out
  assert not err
  assert Image.open("outliers.png").size[0] > 100 and Image.open("rd/x.png") and len(open("rd/x.csv").readlines()) == 41

def test_default_is_stratified_and_more_estimates(program):
  r, out, err = program("--n", 10, "--against", "inverted", "--ode", 6, "--naive", 8)
  assert len(r["t"]) == 21 and sum(r["weight"]) == 40 and "unbiased" in r["estimator"] and "unbiased" in out
  d, k, model = DDPM(**program.state.ddpm), program.state.images[r["index"]], lambda x, t: 0.8 * x
  b = bound(d, model, 255 - k, samples_t=20)["total"]
  area = auc(np.array(r["per_image"]), b)
  assert r["against"]["inverted"] == pytest.approx({"auc": area, "bits_per_dim": b.mean(), "n": 10}, rel=1e-5)
  assert r["ode"]["bits_per_dim"] == pytest.approx(ode_bpd(d, model, k, 6).numpy().mean(), rel=1e-4)
  eq3, drawn, kl = trajectory_bound(d, model, k[:1].repeat(8, 0))
  assert [r["naive"][name] for name in ("eq3", "eq5")] == pytest.approx([eq3.mean(), kl.sum(1).mean()], rel=1e-4)
  assert r["naive"]["variance_falls"] == pytest.approx(drawn.var(0).sum() / kl.var(0).sum(), rel=1e-2)

def test_warning_when_L_T_is_not_close_to_zero(program):
  program.state.ddpm = {"T": 40, "beta_1": 1e-3, "beta_T": 0.1}
  r, out, err = program("--n", 1, "--every", 7)
  assert r["L_T"] > 1e-4 and err.startswith("evaluate.py: warning: L_T") and err.count("\n") == 1
  assert r["t"] == [1, 2, 9, 16, 23, 30, 37, 40] and r["standard_error"] is None
  assert "not unbiased" in out and "not unbiased" in r["estimator"]

def test_labels(program, monkeypatch):
  program.state.config["num_classes"], seen = 3, []
  monkeypatch.setattr(evaluate, "bound", lambda *a, **kw: seen.append(kw) or bound(*a, **kw))
  none, true = [program("--n", 6, "--samples-t", 1, *flag)[0] for flag in ([], ["--labels", "--no-clip"])]
  assert set(program.state.asked) == {1} and none["index"] == true["index"]
  assert seen[0]["labels"].tolist() == [3] * 6
  assert np.array_equal(seen[1]["labels"], program.state.labels[true["index"]])
  assert [kw["clip"] for kw in seen] == [none["clip"], true["clip"]] == [True, False]
  assert not np.isclose(none["per_image"], true["per_image"]).any()

@pytest.mark.parametrize("flags, words", [
  ("--n 0", "--n '0' from 1"), ("--n 31", "--n 31 30 images 1 to 30"), ("--every 41", "--every 41 1 to 40"),
  ("--samples-t 40", "--samples-t 40 1 to 39"), ("--every 2 --samples-t 3", "--samples-t --every"),
  ("--ode 41", "--ode 41 1 to 40"), ("--seed -1", "--seed '-1' from 0 to"), ("--batch x", "--batch 'x' from 1 to"),
  ("--batch 65537", "--batch to 65536"), ("--naive 1", "--naive from 2"), ("--split dev", "--split train"),
  ("--outliers 9 --n 5", "--outliers 9 1 to 5"), ("--rate-distortion x.txt", "--rate-distortion x.txt .csv"),
  ("--labels", "--labels without classes"), ("--outliers 2 --out .", "--out .png"), ("--nonsense", "--nonsense"),
  ("--rate-distortion f/x.csv", "cannot write f/x.csv")])
def test_one_sentence_for_bad_flags(program, flags, words, tmp_path):
  (tmp_path / "f").write_text("a file, no folder")
  with pytest.raises((SystemExit, ValueError, OSError)) as e: program(*flags.split())
  assert not isinstance(e.value, SystemExit) or isinstance(e.value.code, str)
  assert all(word in str(e.value) for word in words.split()) and "\n" not in str(e.value)
  assert not program.state.asked  # before any work

def test_mismatches_are_said(program):
  for key, value, words in (("image_size", 16, "1x8x8"), ("in_channels", 3, "3x8x8")):
    with pytest.MonkeyPatch.context() as m:
      m.setitem(program.state.config, key, value)
      with pytest.raises(ValueError, match=words): program()
  program.state.config["num_classes"] = 2
  with pytest.raises(ValueError, match="more classes than the 2"): program("--labels")
  program.state.config["num_classes"] = 3
  with pytest.raises(ValueError, match="--against cifar10"): program("--labels", "--against", "cifar10")
  program.state.dataset = None
  with pytest.raises(ValueError, match="--dataset"): program()
  program.state.ddpm = {"steps": 3}
  with pytest.raises(ValueError, match="c.safetensors"): program()

def test_no_traceback(tmp_path):
  command = [sys.executable, os.path.abspath(evaluate.__file__), "--checkpoint", "none.safetensors"]
  r = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert r.returncode == 1 and r.stderr.startswith("evaluate.py: ") and r.stderr.count("\n") == 1 and not r.stdout

def test_sliced_wasserstein_distance():
  a = np.clip(rng(1).normal(100, 10, (3000, 1, 4, 4)), 0, 255).round().astype(np.uint8)
  shift = np.array([0, 60] * 8, np.uint8).reshape(1, 1, 4, 4)
  assert evaluate.sliced_wasserstein(a, a[::-1]) < 1e-3
  close(evaluate.sliced_wasserstein(a, a + shift), np.sqrt(60**2 / 2), rtol=0.05)  # a shift: its root mean square
  b = np.clip(rng(2).normal(100, 30, (3000, 1, 4, 4)), 0, 255).round().astype(np.uint8)
  close(evaluate.sliced_wasserstein(a, b), 20, rtol=0.05)  # W₂ of N(m, 10²) and N(m, 30²)

def test_samples_are_read_or_refused(tmp_path):
  images = rng().integers(0, 256, (5, 3, 4, 4), dtype=np.uint8)
  data.save_npz(tmp_path / "a.npz", images)
  assert np.array_equal(evaluate.read_npz(tmp_path / "a.npz"), images)
  np.savez(tmp_path / "b.npz", arr_0=np.array([{}], object))  # a pickle
  (tmp_path / "c.npz").write_bytes(b"PK\3\4 no zip")
  for name in ("b.npz", "c.npz", "none.npz"):
    with pytest.raises((ValueError, OSError), match=name): evaluate.read_npz(tmp_path / name)

def test_sampling_needs_the_memory_of_one_batch(tmp_path, monkeypatch):
  unet.save(tmp_path / "a.safetensors", unet.UNet(**TINY), {"ddpm": {"T": 4, "beta_T": 0.5}})
  seen, call = [], unet.UNet.__call__
  monkeypatch.setattr(unet.UNet, "__call__", lambda self, x, *rest: seen.append(x.shape[0]) or call(self, x, *rest))
  sample.main(["--checkpoint", str(tmp_path / "a.safetensors"), "--n", "10", "--batch", "4",
               "--out", str(tmp_path / "a.png"), "--npz", str(tmp_path / "a.npz")])
  assert set(seen) <= {4} and len(evaluate.read_npz(tmp_path / "a.npz")) == 10

def test_sharded_files_are_put_together(tmp_path):
  unet.save(tmp_path, model := random_model(), {}, layout="diffusers")
  whole = tmp_path / "diffusion_pytorch_model.safetensors"
  tensors, _ = unet.read_tensors(whole)
  names = {k: f"part-{i % 2}.safetensors" for i, k in enumerate(tensors)}
  for part in set(names.values()):
    unet.write_tensors(tmp_path / part, {k: v for k, v in tensors.items() if names[k] == part}, {})
  (tmp_path / f"{whole.name}.index.json").write_text(json.dumps({"weight_map": names}))
  whole.unlink()
  again, _ = unet.load(tmp_path)
  for v, w in zip(nn.state.get_parameters(model), nn.state.get_parameters(again)):
    assert np.array_equal(v.numpy(), w.numpy())
  (tmp_path / "part-1.safetensors").unlink()
  with pytest.raises(OSError, match="part-1"): unet.load(tmp_path)
