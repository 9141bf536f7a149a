"""The paper's mathematics by independent calculation: closed forms, float64, numerical integration, brute force; never
the code's own output. In the paper's order: schedules, q and its posterior, p_θ, losses and the bound, samplers.

  make test                   these and those of tests/, which are no mathematics
  make test ARGS="-k eq7"     those with eq7 in their name
  make test ARGS="-m quick"   these and one of each program
"""
import math, types
import numpy as np
import pytest
from common import close, f32, rng
from ddpm import DDPM, column, discretized_log_likelihood, kl_normal, log_cdf
from evaluate import bound, times, trajectory_bound
from engine.streams import stream
from sample import SAMPLERS, ddim_encode, ddim_step, draw_x_T, guided, normals, timesteps
from tinygrad import Device, Tensor, TinyJit

pytestmark = pytest.mark.quick
SCHEDULES = ("linear", "cosine", "quad", "const", "geometric")
def col(*v): return f32(np.array(v, np.float64).reshape(-1, 1, 1, 1))
def at_times(*t): return Tensor(np.array(t, np.int32))
def num(x): return x.numpy().astype(np.float64)
def vec(x): return num(x).ravel()
def integrate(y, x): return ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()
def const(a): return lambda x_t, t: f32(a)  # a model that returns a
def scaled(k): return k / 127.5 - 1

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
  g = DDPM(100, 4e-6, 0.3, "geometric")
  assert g.beta[1] == 4e-6
  for t in (2, 3, 50, 100):  # the signal-to-noise ratio falls by the same factor in each step
    assert g.alpha_bar[t] / (1 - g.alpha_bar[t]) == pytest.approx(0.7**(t - 1) * (1 - 4e-6) / 4e-6, rel=1e-9)

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_short_chains_work(schedule):
  for T in (1, 2, 3, 10):
    d = DDPM(T, schedule=schedule)
    assert len(d.beta) == T + 1 and (d.beta[1:] > 0).all() and (d.beta[1:] < 1).all()
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

@pytest.mark.parametrize("clip", (True, False))
def test_mu_is_the_mean_of_p_itself(clip):
  """Table 2: only the x̂_0 derived from the model's μ is clipped, and only a longer jump goes by it."""
  ten, t, s = lambda x, t: x * 0 + 10, np.array([1, 2, 500, 500, 1000, 9]), np.array([0, 1, 499, 300, 999, 0])
  d, x = DDPM(predict="mu"), rng(13).standard_normal((6, 1, 2, 2))
  (w0, wt, _), (v0, vt, _) = weights(d, t, t - 1), weights(d, t, s)
  x0_hat = (10 - wt * x) / w0
  if clip: x0_hat = x0_hat.clip(-1, 1)
  for before in (None, at_times(*s)):
    mean, var, got = d.p_mean_var(ten, f32(x), at_times(*t), before, clip)
    jump = np.zeros(6, bool) if before is None else s < t - 1
    assert (num(mean)[~jump] == 10).all()
    close(num(mean)[jump], (v0 * x0_hat + vt * x)[jump], rtol=1e-4, atol=1e-5)
    close(got.numpy(), x0_hat, rtol=1e-4, atol=1e-5)
    z = f32(np.ones(x.shape))
    noise = np.sqrt(num(var)) * (t > 1 if before is None else s > 0).reshape(-1, 1, 1, 1)
    close(d.p_sample(ten, f32(x), at_times(*t), z, before, clip).numpy(), num(mean) + noise, rtol=1e-5)
  assert (d.p_mean_var(ten, f32(x), 500, 499, clip)[0].numpy() == 10).all()

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
  x, phi = scaled(k), lambda z: 0.5 * math.erfc(-z / math.sqrt(2))
  lo = -math.inf if k == 0 else (x - 1/255 - mean) / sigma
  hi = math.inf if k == 255 else (x + 1/255 - mean) / sigma
  return phi(-lo) - phi(-hi) if lo > 0 else phi(hi) - phi(lo)

levels = f32(scaled(np.arange(256)).reshape(256, 1, 1, 1))

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

def exact_prior(d, x0):
  """L_T = KL(N(√ᾱ x₀, 1−ᾱ) || N(0, 1)) of each image in float64, bits/dim."""
  a = d.alpha_bar[-1]
  return 0.5 * (a * x0**2 - a - np.log1p(-a)).mean((1, 2, 3)) / math.log(2)

def exact_term(d, x0, t, eps, model, clip=True):
  """Eq. 5's term of one image at one time in float64: .L bits/dim, p_θ's .mean and .var, .x0_hat and the .eps_hat that
  belongs to x̂_0 before clipping."""
  (a, b), (w0, wt, var_q) = products(d, t, 0), posterior(d, t, t - 1)
  x_t = a * x0 + math.sqrt(b) * eps
  out = model(x_t)
  free = {"eps": (x_t - math.sqrt(b) * out) / a, "x0": out, "mu": (out - wt * x_t) / w0}[d.predict]
  x0_hat = free.clip(-1, 1) if clip else free
  mean_q, mean = w0 * x0 + wt * x_t, out if d.predict == "mu" else w0 * x0_hat + wt * x_t
  var = d.beta[t] if d.sigma == "beta" else var_q
  if t == 1:
    var = d.beta[1] / 2 if d.schedule == "geometric" else d.beta_tilde[2] if d.T > 1 else d.beta[1]
    nats = -np.log(np.vectorize(bin_mass)(np.rint((x0 + 1) * 127.5), mean, math.sqrt(var)))
  else: nats = math.log(var / var_q) / 2 + (var_q + (mean_q - mean) ** 2) / (2 * var) - 0.5
  return types.SimpleNamespace(L=nats.mean() / math.log(2), mean=mean, var=var, x0_hat=x0_hat,
                               eps_hat=(x_t - a * free) / math.sqrt(b))

def test_prior_kl():
  x0 = rng(10).uniform(-1, 1, (3, 2, 4, 4))
  assert (num(DDPM().prior_kl(f32(x0))) < 1e-4).all()
  for d in (DDPM(), DDPM(30, 1e-3, 0.1)):
    assert num(d.prior_kl(f32(x0))) == pytest.approx(exact_prior(d, x0), rel=1e-3)

@pytest.mark.parametrize("sigma,T,predict,schedule", [
  ("beta", 1000, "eps", "linear"), ("beta_tilde", 1000, "eps", "linear"), ("beta", 1, "eps", "linear"),
  ("beta", 1000, "mu", "linear"), ("beta_tilde", 1000, "eps", "geometric")])
def test_vlb_term(sigma, T, predict, schedule):
  d, r = DDPM(T, schedule=schedule, sigma=sigma, predict=predict), rng(11)
  t = np.array([1, 2, 3, 50, 400, 999, 1000, 1]).clip(1, T)   # t = 1 and t > 1 in one batch
  k, eps = r.integers(0, 256, (8, 2, 2, 2)), r.standard_normal((8, 2, 2, 2))
  k[7, 0, 0] = 0, 255                                         # both edge bins at t = 1
  x0, out = scaled(k), eps + 0.3 * r.standard_normal((8, 2, 2, 2))
  if predict == "mu": out = 1.01 * x0 + 0.01 * out            # outside [-1, 1] as well
  for clip in (True, False) if (sigma, T) == ("beta", 1000) else (True,):
    got = num(d.vlb_term(const(out), f32(x0), at_times(*t), f32(eps), clip=clip))
    want = [exact_term(d, x0[i], t[i], eps[i], lambda x_t, i=i: out[i], clip).L for i in range(8)]
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

# *** the bound of a whole image: Eq. 5 and Eq. 3 ***

def table(values):
  """A table of T+1 numbers for a model: t (B,) -> (B, 1, 1, 1)."""
  row = f32(values)
  return lambda t: row[t].reshape(-1, 1, 1, 1)

def gaussian_model(d, m, s, factor=1.0):
  """The exact eps for data N(m, s²): E[ε | xₜ] = √(1−ᾱ) (xₜ − √ᾱ m) / (ᾱ s² + 1−ᾱ); times `factor`, a wrong one."""
  ab = d.alpha_bar
  weight, mean = table(factor * np.sqrt(1 - ab) / (ab * s * s + 1 - ab)), table(np.sqrt(ab) * m)
  return lambda x, t: weight(t) * (x - mean(t))

def gaussian_images(n, m, s, shape):
  """Images uint8 (n, C, H, W) of N(m, s²), and the exact −log of their probability, bits/dim (n,)."""
  k = np.rint((rng(1).normal(m, s, (n, *shape)).clip(-1, 1) + 1) * 127.5).astype(np.uint8)
  return k, -np.log2([bin_mass(i, m, s) for i in range(256)])[k].mean((1, 2, 3))

def some_images(n, shape=(1, 4, 4)): return rng().integers(0, 256, (n, *shape)).astype(np.uint8)

def the_noise(seed, i, t, shape):
  return stream(seed, "noise of the bound", i, t).standard_normal(shape, np.float32).astype(np.float64)

@pytest.mark.parametrize("sigma, predict, clip", [("beta", "eps", True), ("beta_tilde", "mu", False),
                                                  ("beta", "x0", True)])
def test_eq5_term_by_term(sigma, predict, clip):
  d, k, seed = DDPM(7, 1e-3, 0.3, sigma=sigma, predict=predict), some_images(5, (3, 2, 4)), 11
  labels = np.array([3, 0, 1, 2, 2], np.int64) if clip else None
  def model(x, t, y=None): return 0.7 * x + 0.1 * x.sin() + 0.02 * (t if y is None else t + y).reshape(-1, 1, 1, 1)
  b = bound(d, model, k, seed, clip=clip, batch=4, labels=labels)
  assert b["t"].tolist() == [[1, 2, 3, 4, 5, 6, 7]] * 5 and b["weight"].tolist() == [1] * 7
  for i, x0 in enumerate(scaled(k)):
    for t in range(1, 8):
      eps, known = the_noise(seed, i, t, x0.shape), 0.02 * (t + (labels[i] if clip else 0))
      want = exact_term(d, x0, t, eps, lambda x, known=known: 0.7 * x + 0.1 * np.sin(x) + known, clip)
      errors = ((eps - want.eps_hat)**2).mean(), ((x0 - want.x0_hat)**2).mean()
      close([b[name][i, t-1] for name in ("L", "mse_eps", "mse_x0")], [want.L, *errors], rtol=2e-4)
  close(b["L_T"], exact_prior(d, scaled(k)), rtol=1e-4)
  close(b["total"], b["L_T"] + b["L"].sum(1), rtol=1e-6)

def test_eq5_nears_the_closed_form_as_T_grows_and_stays_above():
  """Data N(0.1, 0.25²) on the 256 levels, exact eps: −log p is known. The paper's betas, times 1000/T."""
  (k, nll), gap = gaussian_images(200, 0.1, 0.25, (1, 16, 16)), {}
  for T in (20, 4000):
    d = DDPM(T, 0.1 / T, min(20 / T, 0.95))
    b = bound(d, gaussian_model(d, 0.1, 0.25), k, samples_t=min(40, T - 1), batch=2048)
    above = b["total"] - nll
    gap[T] = above.mean() / nll.mean()
    assert above.mean() > -3 * above.std() / math.sqrt(200)
  assert gap[4000] < 0.01 < gap[20]

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

def test_eq3_along_a_trajectory():
  d, k, seed, T = DDPM(5, 0.01, 0.5), some_images(3), 4, 5
  eq3, sampled, kl = trajectory_bound(d, lambda x, t: 0.6 * x, k, seed, batch=2, clip=False)
  def log_normal(x, m, v): return (-((x - m)**2 / v + math.log(2 * math.pi * v)) / 2).mean() / math.log(2)
  for i, x0 in enumerate(scaled(k)):
    x, ratio, terms = x0, 0.0, []
    for t in range(1, T + 1):
      x_t = math.sqrt(d.alpha[t]) * x + math.sqrt(d.beta[t]) * the_noise(seed, i, t, x0.shape)
      a, b = products(d, t, 0)
      p = exact_term(d, x0, t, (x_t - a * x0) / math.sqrt(b), lambda x_t: 0.6 * x_t, clip=False)
      log_p = -p.L if t == 1 else log_normal(x, p.mean, p.var)
      ratio += log_p - log_normal(x_t, math.sqrt(d.alpha[t]) * x, d.beta[t])
      terms.append(p.L)
      x = x_t
    close(eq3[i], -ratio - log_normal(x, 0, 1), rtol=1e-4)  # −log p(x_T) − Σ log p/q
    close(kl[i], [*terms, *exact_prior(d, x0[None])], rtol=1e-3)
  close(sampled.sum(1), eq3, rtol=1e-4)                     # Bayes: the same number, path by path
  close(sampled[:, 0], kl[:, 0])

def test_eq3_and_eq5_agree_and_the_variance_falls():
  d, k = DDPM(10, 0.01, 0.9), gaussian_images(1, 0.1, 0.25, (1, 4, 4))[0].repeat(3000, 0)
  for factor in (1.0, 0.8):
    eq3, sampled, kl = trajectory_bound(d, gaussian_model(d, 0.1, 0.25, factor), k, batch=3000, clip=False)
    difference = eq3 - kl.sum(1)
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(3000) < 0.1
    spread = np.abs((sampled - kl)[:, 1:].mean(0)) / ((sampled - kl)[:, 1:].std(0) / math.sqrt(3000))
    assert (spread < 4.5).all()                            # each draw's mean is its KL
    assert (kl.var(0)[1:] < sampled.var(0)[1:] / 5).all()  # and its variance falls, at every t
    assert sampled.var(0).sum() > 2 * kl.var(0).sum()

# *** the samplers ***

T, MODE, SD = 200, 0.6, 0.1
def at(t, n): return Tensor(np.full(n, t, np.int32)).realize()
def short(T=T, **options): return DDPM(T, 0.1 / T, min(0.7, 20 / T), **options)  # the paper's schedule in fewer steps

def exact(d, mode=MODE, sd=SD):
  """The exact ε of data that are ±mode in every pixel, with noise sd: −√(1−ᾱ) times the score of their mixture."""
  alpha_bar = f32(d.alpha_bar)
  def model(x, t):
    a = column(alpha_bar[t], x)
    var, m = a * sd**2 + 1 - a, a.sqrt() * mode
    return (1 - a).sqrt() * (x - m * (x * m / var).tanh()) / var
  return model

def exact64(d, x, t):
  """The same in float64, for one t."""
  a = d.alpha_bar[t]
  var, m = a * SD**2 + 1 - a, math.sqrt(a) * MODE
  return math.sqrt(1 - a) * (x - m * np.tanh(x * m / var)) / var

def last(visits):
  *_, (t, x, _) = visits
  assert t == 0
  return x.numpy()

def everywhere(test):
  """For the samplers with all that they do: ddim with and without noise."""
  every = [*((name, {}) for name in SAMPLERS if name != "langevin"), ("ddim", {"eta": 1.0}), ("langevin", {"inner": 2})]
  return pytest.mark.parametrize("name, options", every)(test)

# *** the samplers: times and noise ***

@pytest.mark.parametrize("spacing", ("linear", "quadratic"))
def test_timesteps_run_from_T_to_0(spacing):
  for T in (1, 2, 3, 50, 1000):
    for steps in range(1, T + 1) if T < 1000 else (1, 2, 10, 31, 32, 33, 500, 999, 1000):
      times = timesteps(T, steps, spacing)
      assert len(times) == steps + 1 and times[0] == T and times[-1] == 0 and (np.diff(times) < 0).all()
  assert timesteps(1000, 4, spacing) == ([1000, 750, 500, 250, 0] if spacing == "linear" else [1000, 562, 250, 62, 0])

@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_refuse_at_the_call(name):
  d, x = short(10), f32(np.zeros((2, 1, 1, 1)))
  for steps in (0, -1, 11, [11, 5, 0], [5], [5, 5, 0], [0, 5], [5, -1], []):
    with pytest.raises(ValueError): SAMPLERS[name](d, None, x, steps)
  wrong = {"ddim": {"eta": (-0.1, 1.1, math.nan)}, "pc": {"snr": (0, -1, math.nan)},
           "langevin": {"inner": (0,), "r": (0, 1, math.nan)}}.get(name, {})
  for option, values in {"seed": (-1,), "first": ([1, 2, 3],), **wrong}.items():
    for value in values:
      with pytest.raises(ValueError): SAMPLERS[name](d, None, x, 5, **{option: value})
  with pytest.raises(ValueError): timesteps(10, 5, "cubic")

def test_noise_is_independent_of_x_T_of_other_steps_and_of_other_images():
  d, n, shape = short(10, predict="x0"), 400, (1, 8, 8)
  ratio = d.beta_tilde[1:] / d.beta[1:]
  x_T = draw_x_T(n, shape, 7)
  xs = [x_T.numpy()] + [x.numpy() for _, x, _ in SAMPLERS["ddpm"](d, lambda x, t: x * 0 + column(t, x) * 0, x_T, 10, 7)]
  z = [(x_s - math.sqrt(d.alpha[t]) * ratio[t - 1] * x_t) / math.sqrt(d.beta[t])  # Algorithm 2 with x̂_0 = 0, for z
       for t, x_t, x_s in zip(range(10, 1, -1), xs, xs[1:])]
  draws = [xs[0], *z[:3], np.roll(z[0], 1, 0), np.roll(xs[0], 1, 0), draw_x_T(n, shape, 8).numpy(),
           normals([stream(7, "latents", i) for i in range(n)], shape)]
  corr = np.corrcoef([a.ravel() for a in draws])
  assert np.abs(corr - np.eye(len(draws))).max() < 5 / math.sqrt(n * 64)
  for a in draws: assert abs(a.mean()) < 5 / math.sqrt(n * 64) and abs(a.std() - 1) < 5 / math.sqrt(2 * n * 64)

@everywhere
def test_image_i_is_the_same_bytes_in_any_batch(name, options):
  d, jits = short(12), {}
  model, x_T = exact(d), draw_x_T(8, (2, 3, 3), 3)
  def run(x, seed=3, **kw): return last(SAMPLERS[name](d, model, x, 6, seed=seed, jits=jits, **kw, **options)).tobytes()
  assert draw_x_T(5, (2, 3, 3), 3, first=3).numpy().tobytes() == x_T.numpy()[3:].tobytes()
  whole = run(x_T)
  assert run(x_T[:3]) + run(x_T[3:], first=3) == whole == run(x_T.numpy())
  assert run(x_T[:3], first=np.arange(3)) == run(x_T[:3])
  if name != "ode" and (name, options) != ("ddim", {}):
    assert run(x_T, first=1) != whole
    assert run(x_T, seed=4) != whole

# *** the samplers: what holds for each ***

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
    for t, (_, _, x0_hat) in zip(times, out): close(x0_hat.numpy(), t / T, rtol=1e-6)
    assert all(x.shape == x_T.shape and np.isfinite(x.numpy()).all() for _, x, _ in out)
    close(out[-1][1].numpy(), times[-2] / T, rtol=2e-6)      # ᾱ = 1: x_0 is x̂_0, without noise
  assert all(t.shape == (2,) and t.dtype.name == "int" for t in seen)

@everywhere
def test_what_was_given_stays_as_it_was(name, options):
  d, x_T = short(9), draw_x_T(3, (1, 2, 2), 0)
  before, model = x_T.numpy().copy(), exact(d)
  def run(): return SAMPLERS[name](d, model, x_T, 9, **options)
  kept = [(x.numpy().copy(), x0_hat.numpy().copy()) for _, x, x0_hat in run()]
  for (x, x0_hat), (_, x_late, x0_late) in zip(kept, list(run())):
    assert (x == x_late.numpy()).all() and (x0_hat == x0_late.numpy()).all()
  assert (x_T.numpy() == before).all()

@pytest.mark.parametrize("name", ("ddpm", "ddim", "pc"))
def test_a_model_may_leave_the_device_and_may_predict_anything(name):
  n, x_T, eps_model = 4, draw_x_T(4, (1, 2, 2), 0), exact(short(4))
  d = {p: short(n, predict=p) for p in ("eps", "x0", "mu")}
  def x0(x, t): return d["eps"].predict_x0(x, t, eps_model(x, t))
  def mu(x, t): return d["eps"].q_posterior(x0(x, t), x, t, t - 1)[0]
  def host(x, t): return Tensor(eps_model(f32(x.numpy()), Tensor(t.numpy())).numpy())
  def half_host(x, t): return x * float(t.numpy()[0]) / n     # a jit would keep the first t for ever
  def run(d, model): return last(SAMPLERS[name](d, model, x_T, n, clip=False))
  ours = run(d["eps"], eps_model)
  for other in (run(d["eps"], host), run(d["x0"], x0), run(d["mu"], mu)): close(ours, other, atol=3e-5)
  close(run(d["eps"], half_host), run(d["eps"], lambda x, t: x * column(t, x) / n), rtol=1e-5, atol=1e-6)

@everywhere
def test_clipping_is_a_switch(name, options):
  d, x_T = short(8), draw_x_T(4, (1, 4, 4), 0)
  for clip in (True, False):
    out = [x0_hat.numpy() for _, _, x0_hat in SAMPLERS[name](d, exact(d, 3.0), x_T, 8, clip=clip, **options)]
    assert (np.abs(out).max() <= 1) == clip and (np.abs(out[-1]).max() > 2) != clip

def test_the_captured_step_is_kept_for_the_next_call_and_reads_new_labels():
  d, jits, y, calls = short(8, predict="x0"), {}, at(1, 2), []
  def net(x, t, y): return calls.append(0) or x * 0 + column(t, x) * 0 + column(y, x) / 4
  model, x_T = guided(net, y, 1, 3), draw_x_T(2, (1, 1, 1), 0)
  close(last(SAMPLERS["ddpm"](d, model, x_T, 8, jits=jits)), 0.25)
  n = len(calls)
  y.assign(at(2, 2)).realize()
  close(last(SAMPLERS["ddpm"](d, model, x_T, 4, jits=jits)), 0.5)
  assert len(calls) == n and len(jits) == 1

@pytest.mark.parametrize("name, one, other", [
  ("ddpm", {"clip": True}, {"clip": False}), ("ddim", {"eta": 0.2}, {"eta": 0.9}), ("pc", {"snr": 0.1}, {"snr": 0.4}),
  ("langevin", {"r": 0.1}, {"r": 0.4})])
def test_a_kept_step_is_not_taken_with_other_options(name, one, other):
  d, jits, x_T = short(6), {}, draw_x_T(2, (1, 2, 2), 0)
  model = exact(d, 1.5)
  def run(options, **kept): return [x.tolist() for _, x, _ in SAMPLERS[name](d, model, x_T, 6, **options, **kept)]
  assert [run(one, jits=jits), run(other, jits=jits)] == [run(one), run(other)] and run(one) != run(other)

# *** the samplers: each against its equation ***

def chain(d, x, times, seed, step):
  """Algorithm 2 in float64: step(x_t, t, s, z), with the noise that image i draws in its own order."""
  rngs = [np.random.default_rng([seed, 0x5A, 2, i]) for i in range(len(x))]
  x = x.numpy().astype(np.float64)
  for t, s in zip(times, times[1:]):
    z = np.stack([r.standard_normal(x.shape[1:], np.float32) for r in rngs]) if s else 0.0
    x = step(x, t, s, z)
  return x

@pytest.mark.parametrize("sigma", ("beta", "beta_tilde"))
def test_ddpm_is_algorithm_2(sigma):
  d = short(20, sigma=sigma)
  def step(x, t, s, z):
    a, var = d.alpha[t], d.beta[t] if sigma == "beta" else d.beta_tilde[t]
    return (x - d.beta[t] / math.sqrt(1 - d.alpha_bar[t]) * exact64(d, x, t)) / math.sqrt(a) + math.sqrt(var) * z
  x_T = draw_x_T(50, (1, 2, 2), 5)
  ours = last(SAMPLERS["ddpm"](d, exact(d), x_T, 20, 5, clip=False))
  close(ours, chain(d, x_T, range(20, -1, -1), 5, step), atol=2e-5)

@pytest.mark.parametrize("steps", (20, 7))
@pytest.mark.parametrize("clip", (True, False))
def test_ddim_with_eta_1_is_algorithm_2(steps, clip):
  d = short(20, sigma="beta_tilde")
  x_T, model = draw_x_T(50, (1, 2, 2), 0), exact(d, 1.2)
  both = [SAMPLERS[name](d, model, x_T, steps, clip=clip, **o) for name, o in (("ddpm", {}), ("ddim", {"eta": 1}))]
  for (_, x, x0), (_, y, y0) in zip(*both, strict=True):
    close(x.numpy(), y.numpy(), atol=3e-5)
    close(x0.numpy(), y0.numpy(), atol=3e-5)

@pytest.mark.parametrize("eta", (0.0, 0.3, 1.0))
def test_ddim_step_is_eq_12(eta):
  d, r = DDPM(), rng(0)
  for t, s in ((1000, 999), (1000, 1), (1000, 0), (500, 20), (2, 1), (2, 0), (1, 0)):
    x0, eps, z = r.standard_normal((3, 4, 1, 2, 2))
    a, a_s = d.alpha_bar[t], d.alpha_bar[s]
    x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
    sigma = eta * math.sqrt((1 - a_s) / (1 - a)) * math.sqrt(1 - a / a_s)         # Eq. 16
    x_s = math.sqrt(a_s) * x0 + math.sqrt(max(0, 1 - a_s - sigma**2)) * eps + sigma * z
    ours = ddim_step(d, f32(eps), f32(x_t), t, s, eta, f32(z))
    close(ours.numpy(), x_s, atol=5e-5 if t == 1000 else 2e-6)                    # x̂_0 at T: 1e-7 / √ᾱ_T
    close(ours.numpy(), ddim_step(d, f32(eps), f32(x_t), at(t, 4), at(s, 4), eta, f32(z)).numpy(), atol=1e-7)
    if s == 0: close(ours.numpy(), x0, atol=5e-5)
    if eta == 0 and s: close(ddim_step(d, f32(eps), f32(x_s), s, t).numpy(), x_t, atol=5e-6)
  with pytest.raises(ValueError): ddim_step(d, f32(eps), f32(x_t), 2, 1, 0.5)

def test_ddim_decodes_what_it_encoded():
  d, r = short(50), rng(0)
  x0 = r.choice((-MODE, MODE), (200, 1, 1, 2)) + 0.3 * r.standard_normal((200, 1, 1, 2))
  model, errors = exact(d, MODE, 0.3), []
  for iterations in (1, 2, 6):
    x_T = ddim_encode(d, model, f32(x0), 50, iterations=iterations)
    assert 0.9 < x_T.numpy().std() < 1.2
    errors.append(np.abs(last(SAMPLERS["ddim"](d, model, x_T, 50, clip=False)) - x0).max())
  assert 1e-3 < errors[0] < 0.2 and errors[1] < errors[0] / 5 and errors[2] < 1e-4

def test_ode_is_of_second_order_and_ddim_of_first():
  """For data N(0, 0.5²) the flow scales x with the standard deviation of q(x_t). The step to 0 is left out: Euler's."""
  d, x_T, end = short(400), draw_x_T(8, (1, 2, 2), 1), 40
  def sd(t): return math.sqrt(d.alpha_bar[t] * 0.5**2 + 1 - d.alpha_bar[t])
  def error(name, steps):
    *_, (_, x, _) = SAMPLERS[name](d, exact(d, 0.0, 0.5), x_T, np.linspace(400, end, steps + 1).astype(int), clip=False)
    return np.abs(x.numpy() - x_T.numpy() * sd(end) / sd(400)).max()
  ode, ddim = [[error(name, steps) for steps in (20, 40)] for name in ("ode", "ddim")]
  assert 3.2 < ode[0] / ode[1] < 5 and 1.8 < ddim[0] / ddim[1] < 2.3 and ddim[1] > 5 * ode[1]

def test_sde_is_eq_6_and_pc_adds_langevin():
  d = short(20)
  def reverse(x, t, s, z):
    b, score = math.log(d.alpha_bar[s] / d.alpha_bar[t]), -exact64(d, x, t) / math.sqrt(1 - d.alpha_bar[t])
    if s == 0: return (x + (1 - d.alpha_bar[t]) * score) / math.sqrt(d.alpha_bar[t])   # Tweedie: x̂_0
    return x + b * (x / 2 + score) + math.sqrt(b) * z
  def langevin(x, t, step, z):
    return x - step * exact64(d, x, t) / math.sqrt(1 - d.alpha_bar[t]) + math.sqrt(2 * step) * z
  def pc(x, t, s, z):
    return langevin(x, t, 2 * d.alpha[t] * 0.1**2 * (1 - d.alpha_bar[t]), z) if s == t else reverse(x, t, s, z)
  def annealed(x, t, s, z): return langevin(x, t, 0.3 * (1 - d.alpha_bar[t]), z) if s else reverse(x, t, s, z)
  x_T, times, twice = draw_x_T(50, (1, 2, 2), 5), [20, 13, 5, 0], [20, 20, 13, 13, 5, 5, 0]
  for name, options, path, step in (("sde", {}, times, reverse), ("pc", {"snr": 0.1}, twice, pc),
                                    ("langevin", {"inner": 2, "r": 0.3}, twice, annealed)):
    ours = last(SAMPLERS[name](d, exact(d), x_T, times, 5, clip=False, **options))
    close(ours, chain(d, x_T, path, 5, step), atol=3e-5)

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
  calls, t, y = [], at(5, 4), Tensor(np.array([0, 1, 2, 1], np.int32))
  x = f32(rng(0).standard_normal((4, 1, 2, 2)))
  def net(x, t, y): return calls.append(x.shape[0]) or x * (column(y, x) + 1) + column(t, x) + column(y, x).sin()
  labelled, free = net(x, t, y).numpy(), net(x, t, at(3, 4)).numpy()
  assert (guided(net, y, 1, 3)(x, t).numpy() == labelled).all() and (guided(net, y, 0, 3)(x, t).numpy() == free).all()
  assert calls == [4] * 4                                     # one evaluation, not two
  close(guided(net, y, 3.5, 3)(x, t).numpy(), 3.5 * labelled - 2.5 * free, rtol=1e-5)
