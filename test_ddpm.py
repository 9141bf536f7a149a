"""The paper's mathematics by independent calculation: closed forms in float64, numerical integration, brute force;
never the code's own output. A test has the number of its equation in its name.

  make test                   these and those of tests/, which are no mathematics
  make test ARGS="-k eq7"     those with eq7 in their name
  make test ARGS="-m quick"   these and one of each program
"""
import math, types
import numpy as np
import pytest
from common import close, f32, rng
from ddpm import DDPM, column, discretized_log_likelihood, log_cdf
from engine.streams import stream
from evaluate import bound, variational_bound, times, trajectory_bound
from extras import objectives
from extras.samplers import ddim_move
from sample import SAMPLERS, draw_x_T, timesteps
from tinygrad import Tensor, TinyJit

pytestmark = pytest.mark.quick
SCHEDULES = ("linear", "cosine", "quad", "const", "geometric")
SIGMAS = ("beta", "beta_tilde", "learned")
CHAIN = [1000, 900, 600, 599, 40, 1, 0]  # with long steps and single ones
GPU = 1e-4  # a tolerance where a GPU's exp, log and tanh count, which are coarser than a processor's
def col(*v): return f32(np.array(v, np.float64).reshape(-1, 1, 1, 1))
def at_times(*t): return Tensor(np.array(t, np.int32)).realize()
def num(x): return x.numpy().astype(np.float64)
def vec(x): return num(x).ravel()
def integrate(y, x): return ((y[1:] + y[:-1]) / 2 * np.diff(x)).sum()
def const(a): return lambda x_t, t: f32(a)  # a model that answers a
def scaled(k): return k / 127.5 - 1
def log_normal(x, m, v): return -(x - m)**2 / (2 * v) - np.log(2 * np.pi * v) / 2

def products(d, t, s):
  """Float64 without a ratio or a logarithm: √ of α_{s+1}…α_t, and 1 minus it, summed as β₁ + α₁β₂ + α₁α₂β₃ + …"""
  a, b = 1.0, 0.0
  for i in range(s + 1, t + 1): b, a = b + a * d.beta[i], a * (1 - d.beta[i])
  return math.sqrt(a), b

def posterior(d, t, s):
  """q(x_s | x_t, x_0) in float64: weight of x_0, weight of x_t, variance. By conditioning one normal on another."""
  (a_ts, b_ts), (a_s, b_s) = products(d, t, s), products(d, s, 0)
  if s == 0: return 1.0, 0.0, 0.0
  precision = 1 / b_s + a_ts**2 / b_ts  # prior N(a_s x0, b_s), likelihood x_t = a_ts x_s + noise
  return a_s / b_s / precision, a_ts / b_ts / precision, 1 / precision

def weights(d, t, s):
  """posterior for a batch of times, each of the three (B, 1, 1, 1)."""
  return np.array([posterior(d, int(i), int(j)) for i, j in zip(t, s)]).T.reshape(3, -1, 1, 1, 1)

def chain_of(d, times):
  """The chain of `times` and these, [0, ..., T]; for None the whole one."""
  return (d, np.arange(d.T + 1)) if times is None else (d.every(times), np.array(times[::-1]))

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
  for kind in (list, tuple, np.array):
    assert DDPM(3, schedule=kind([0.3, 0.1, 0.2])).beta.tolist() == [0, 0.3, 0.1, 0.2]
  for own in ([0.1, 0.2], [0.1, 0.2, 1.0], [0.1, 0.0, 0.2], [0.1, math.nan, 0.2]):
    with pytest.raises(ValueError, match="T = 3 numbers between 0 and 1"): DDPM(3, schedule=own)
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
  x1, x0_hat = d.p_sample(x, 1, x * 0.1, x)                   # T = 1: x̂_0, without noise
  a = d.alpha_bar[1]
  close(x1.numpy(), (num(x) * (1 - 0.1 * math.sqrt(1 - a)) / math.sqrt(a)).clip(-1, 1), rtol=1e-5)
  assert (x1.numpy() == x0_hat.numpy()).all()

# *** the forward process ***

@pytest.mark.parametrize("times", (None, CHAIN))
def test_eq2_iterated_is_eq4(times):
  d = DDPM()
  c, visits = chain_of(d, times)
  t, one, zero = at_times(*range(1, c.T + 1)), f32(np.ones((c.T, 1, 1, 1))), f32(np.zeros((c.T, 1, 1, 1)))
  (m, n), (mean, sd) = [[vec(q(one, t, zero)), vec(q(zero, t, one))] for q in (c.q_step, c.q_sample)]
  close(np.stack([m, n**2], 1), [products(d, *jump) for jump in zip(visits[1:], visits)], rtol=1e-6)
  a, b = 1.0, 0.0                                             # follow x = a x_0 + N(0, b) through Eq. 2
  for i in range(c.T):
    a, b = a * m[i], b * m[i]**2 + n[i]**2
    assert (mean[i], sd[i]**2) == pytest.approx((a, b), rel=2e-5)

def test_eq4_every_t_in_one_batch():
  d, r = DDPM(), rng(2)
  x0, eps = r.uniform(-1, 1, (1000, 1, 1, 2)), r.standard_normal((1000, 1, 1, 2))
  a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)).reshape(-1, 1, 1, 1)
  got = d.q_sample(f32(x0), at_times(*range(1, 1001)), f32(eps)).numpy()
  close(got, np.sqrt(a) * x0 + np.sqrt(1 - a) * eps, atol=2e-6)
  back = d.predict_eps(f32(got), at_times(*range(1, 1001)), f32(x0)).numpy()
  close(back, eps, atol=2e-4)                                 # float32 x_t over √(1−ᾱ₁) = 0.01
  close(vec(d.at(np.arange(1001.0), at_times(7, 1000), f32(x0[:2]))), [7, 1000])  # also of one's own table

# *** its posterior ***

def step_from(d, t, s):
  """A chain in which one step leads from t to s, and the number of this step."""
  visits = sorted({t, s, 0}, reverse=True)
  return (d, t) if s == t - 1 else (d.every(visits), len(visits) - 1)

@pytest.mark.parametrize("t, s", [(20, 19), (2, 1), (20, 7), (9, 1)])
def test_eq7_is_bayes_rule(t, s):
  d, x0, x_t = DDPM(20, 0.01, 0.3), 0.6, -0.4
  x = np.linspace(-8, 8, 160001)
  (a_ts, b_ts), (a_s, b_s) = products(d, t, s), products(d, s, 0)
  p = np.exp(log_normal(x, a_s * x0, b_s) + log_normal(x_t, a_ts * x, b_ts))  # q(x_s | x_0) q(x_t | x_s)
  p /= p.sum()
  mean = (p * x).sum()
  c, i = step_from(d, t, s)
  got = c.q_posterior(col(x0), col(x_t), i)
  assert (got[0].item(), got[1].item()) == pytest.approx((mean, (p * (x - mean) ** 2).sum()), rel=1e-5)

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_eq7_in_float32_for_every_t(schedule):
  d = DDPM(schedule=schedule)
  log_alpha_bar = np.cumsum(np.log1p(-d.beta.astype(np.longdouble)))
  for visits in (range(1000, -1, -1), timesteps(1000, 300), CHAIN, [1000, 0]):
    c, t, s = d.every(visits), np.array(visits[-2::-1]), np.array(visits[:0:-1])
    one_minus, a_ts = -np.expm1(log_alpha_bar), np.exp(log_alpha_bar[t] - log_alpha_bar[s])
    b_ts, ratio = -np.expm1(log_alpha_bar[t] - log_alpha_bar[s]), one_minus[s] / one_minus[t]
    want = [np.sqrt(np.exp(log_alpha_bar[s])) * b_ts / one_minus[t], np.sqrt(a_ts) * ratio, ratio * b_ts]
    for i in (0, len(t) // 2, len(t) - 1):                    # the reference itself against `posterior`
      assert [float(w[i]) for w in want] == pytest.approx(posterior(d, int(t[i]), int(s[i])), rel=1e-7, abs=1e-12)
    steps, zero, one = at_times(*range(1, c.T + 1)), f32(np.zeros((c.T, 1, 1, 1))), f32(np.ones((c.T, 1, 1, 1)))
    (w0, v), (wt, _) = c.q_posterior(one, zero, steps), c.q_posterior(zero, one, steps)
    for g, w in zip((w0, wt, v), want): close(vec(g), w.astype(np.float64), rtol=1e-6, atol=0)
    assert (vec(w0)[0], vec(wt)[0], vec(v)[0]) == (1, 0, 0)   # at t = 1 it is x_0 itself

def test_t_may_be_an_int_an_array_or_a_tensor():
  d, x = DDPM(), f32(rng().standard_normal((2, 1, 2, 2)))
  want = num(d.q_posterior(x * 0.5, x, at_times(9, 9))[0])
  for t in (9, [9, 9], np.array([9, 9]), np.int64(9)):
    assert (num(d.q_posterior(x * 0.5, x, t)[0]) == want).all()

# *** a shorter chain is another DDPM ***

@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_is_a_chain_of_the_same_alpha_bar(schedule):
  d = DDPM(schedule=schedule, sigma="beta_tilde")
  c = d.every(CHAIN)
  assert c.T == 6 and c.times.tolist() == CHAIN[::-1] and d.T == 1000 and d.times.tolist() == list(range(1001))
  close(c.alpha_bar, d.alpha_bar[CHAIN[::-1]], rtol=1e-9)
  for i, (t, s) in enumerate(zip(CHAIN[-2::-1], CHAIN[:0:-1]), 1):
    a, b = products(d, t, s)
    assert (c.alpha[i], c.beta[i], c.beta_tilde[i]) == pytest.approx((a * a, b, posterior(d, t, s)[2]), rel=1e-8)
  assert c.beta[0] == c.beta_tilde[0] == c.beta_tilde[1] == 0 and c.alpha[0] == c.alpha_bar[0] == 1
  x, eps = f32(rng(1).standard_normal((6, 1, 2, 2))), f32(rng(2).standard_normal((6, 1, 2, 2)))
  whole = d.q_sample(x, at_times(*CHAIN[-2::-1]), eps).numpy()
  close(c.q_sample(x, at_times(*range(1, 7)), eps).numpy(), whole, atol=1e-6)

@pytest.mark.parametrize("sigma, predict", [("beta", "eps"), ("learned", "mu")])
def test_every_of_every_is_every_and_all_times_change_nothing(sigma, predict):
  d, r = DDPM(sigma=sigma, predict=predict), rng(3)
  x, out = f32(r.standard_normal((3, 1, 2, 2))), f32(r.standard_normal((3, 1 + (sigma == "learned"), 2, 2)))
  def reverse(c, *t): return np.concatenate([np.broadcast_to(num(v), x.shape) for v in c.p_mean_var(x, t, out)])
  twice, once = d.every(CHAIN).every([6, 3, 1, 0]), d.every([1000, 599, 1, 0])
  assert twice.times.tolist() == once.times.tolist() == [0, 1, 599, 1000]
  close(reverse(twice, 1, 2, 3), reverse(once, 1, 2, 3), rtol=1e-5, atol=1e-6)
  for c in (d.every(range(1000, -1, -1)), d.every(range(700, -1, -1))):  # the first steps are the whole chain's
    assert (c.beta == d.beta[:c.T + 1]).all() and (c.times == np.arange(c.T + 1)).all()
    close(reverse(c, 1, 2, 700), reverse(d, 1, 2, 700), rtol=1e-6)

# *** the reverse process ***

@pytest.mark.parametrize("t, s", [(1, 0), (2, 1), (500, 499), (1000, 999), (1000, 900), (600, 1), (9, 0)])
def test_eq11_is_eq7_with_eq15(t, s):
  d, r = DDPM(), rng(t)
  x_t, eps, log_var = r.standard_normal((3, 2, 1, 2, 2))
  (a_ts, b_ts), (a_t, b_t) = products(d, t, s), products(d, t, 0)
  mean = (x_t - b_ts / math.sqrt(b_t) * eps) / a_ts           # Eq. 11 as printed
  c, i = step_from(d, t, s)
  got, var, x0_hat = c.p_mean_var(f32(x_t), i, f32(eps), clip=False)
  close(got.numpy(), mean, rtol=1e-5, atol=2e-5)
  close(x0_hat.numpy(), (x_t - math.sqrt(b_t) * eps) / a_t, rtol=1e-4, atol=1e-4)
  close(c.predict_x0(f32(x_t), i, f32(eps)).numpy(), x0_hat.numpy(), rtol=1e-6)
  assert vec(var) == pytest.approx([b_ts] * 2, rel=1e-5)      # σ² = β
  var = step_from(DDPM(sigma="beta_tilde"), t, s)[0].p_mean_var(f32(x_t), i, f32(eps), clip=False)[1]
  assert vec(var) == pytest.approx([posterior(d, t, s)[2]] * 2, rel=1e-5)
  out = f32(np.concatenate([eps, log_var], 1))                # the network knows the whole chain's step alone: its σ²
  free, var, _ = step_from(DDPM(sigma="learned"), t, s)[0].p_mean_var(f32(x_t), i, out, clip=False)
  close(free.numpy(), got.numpy(), rtol=1e-6)                 # grows as β does
  close(var.numpy(), np.exp(log_var) * b_ts / d.beta[t], rtol=GPU)

def test_clip():
  d, x_t = DDPM(), f32(3 * rng().standard_normal((4, 1, 2, 2)))
  mean, _, x0_hat = d.p_mean_var(x_t, 900, x_t * 0)
  free, _, x0_free = d.p_mean_var(x_t, 900, x_t * 0, clip=False)
  assert abs(num(x0_free)).max() > 1 and (num(x0_hat) == num(x0_free).clip(-1, 1)).all()
  w0, wt, _ = posterior(d, 900, 899)
  close(mean.numpy(), w0 * num(x0_hat) + wt * num(x_t), rtol=1e-5)
  assert abs(num(mean) - num(free)).max() > 1e-3

@pytest.mark.parametrize("sigma", ("beta", "learned"))
@pytest.mark.parametrize("times", (None, [50, 30, 29, 2, 1, 0]))
def test_eq15_and_every_other_answer_give_the_same_reverse_step(sigma, times):
  r, whole, t = rng(3), DDPM(50, 1e-3, 0.1), np.array([1, 2, 30, 50])  # what the network is told
  visits = chain_of(whole, times)[1]
  i = np.searchsorted(visits, t)
  s = visits[i - 1]
  x0, eps, log_var = r.uniform(-0.9, 0.9, (4, 1, 2, 2)), *r.standard_normal((2, 4, 1, 2, 2))
  a = whole.alpha_bar[t].reshape(-1, 1, 1, 1)
  x_t = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
  def mu_tilde(s): return sum(w * x for w, x in zip(weights(whole, t, s), (x0, x_t)))
  answers = {"eps": eps, "x0": x0, "mu": mu_tilde(t - 1), "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x0}
  for predict, exact in answers.items():
    c, _ = chain_of(DDPM(50, 1e-3, 0.1, sigma=sigma, predict=predict), times)
    out = f32(np.concatenate([exact, log_var], 1) if sigma == "learned" else exact)
    given = f32(x_t), at_times(*i), out
    mean, _, x0_hat = c.p_mean_var(*given)
    got = Tensor.stack(mean, x0_hat, c.predict_x0(*given), c.score(*given) * 0.03).numpy()
    close(got, np.stack([mu_tilde(s), x0, x0, -0.03 * eps / np.sqrt(1 - a)]), atol=GPU)
    if times is None: assert c.loss_simple(lambda x, t, out=out: out, f32(x0), given[1], f32(eps)).item() < 1e-11

@pytest.mark.parametrize("clip", (True, False))
def test_mu_is_the_mean_of_p_itself(clip):
  """Table 2: only the x̂_0 derived from the model's μ is clipped, and only a shorter chain goes by it."""
  d, x, z = DDPM(predict="mu"), rng(13).standard_normal((5, 1, 2, 2)), f32(np.ones((5, 1, 2, 2)))
  for some, i in ((None, np.array([1, 2, 500, 999, 1000])), ([1000, 500, 300, 2, 1, 0], np.arange(1, 6))):
    c, visits = chain_of(d, some)
    t, s = visits[i], visits[i - 1]
    (w0, wt, _), (v0, vt, _) = weights(d, t, t - 1), weights(d, t, s)
    x0_hat = (10 - wt * x) / w0
    if clip: x0_hat = x0_hat.clip(-1, 1)
    mean, var, got = c.p_mean_var(f32(x), at_times(*i), f32(x * 0 + 10), clip)
    if c is d: assert (num(mean) == 10).all()
    else: close(num(mean), v0 * x0_hat + vt * x, rtol=1e-4, atol=1e-5)
    close(got.numpy(), x0_hat, rtol=1e-4, atol=1e-5)
    noise = np.sqrt(num(var)) * (i > 1).reshape(-1, 1, 1, 1)
    close(c.p_sample(f32(x), at_times(*i), f32(x * 0 + 10), z, clip)[0].numpy(), num(mean) + noise, rtol=1e-5)

@pytest.mark.parametrize("times", (None, CHAIN))
def test_p_sample_is_algorithm_2_line_4(times):
  d, t = DDPM(), (1, 2, 700) if times is None else (1, 2, 6)
  (c, visits), (x_t, z) = chain_of(d, times), rng(4).standard_normal((2, 3, 1, 2, 2))
  z[0] = math.nan                                             # unused at t = 1
  var = [products(d, visits[i], visits[i - 1])[1] for i in t]
  for clip in (True, False):
    mean, _, x0_hat = c.p_mean_var(f32(x_t), t, f32(0.3 * x_t), clip)
    got, x0 = c.p_sample(f32(x_t), t, f32(0.3 * x_t), f32(z), clip)
    want = num(mean) + np.sqrt(var).reshape(-1, 1, 1, 1) * z
    close(got.numpy()[1:], want[1:], atol=1e-6, rtol=1e-5)
    assert (got.numpy()[0] == mean.numpy()[0]).all() and (x0.numpy() == x0_hat.numpy()).all()
  close(got.numpy()[0], x0.numpy()[0], atol=1e-6)             # the mean at t = 1 is x̂_0

def table(values):
  """A table of T+1 numbers for a model: t (B,) -> (B, 1, 1, 1)."""
  row = f32(values)
  return lambda t: row[t].reshape(-1, 1, 1, 1)

def gaussian_model(d, m, s, factor=1.0):
  """The exact eps for data N(m, s²): E[ε | xₜ] = √(1−ᾱ) (xₜ − √ᾱ m) / (ᾱ s² + 1−ᾱ); times `factor`, a wrong one."""
  ab = d.alpha_bar
  weight, mean = table(factor * np.sqrt(1 - ab) / (ab * s * s + 1 - ab)), table(np.sqrt(ab) * m)
  return lambda x, t: weight(t) * (x - mean(t))

@pytest.mark.parametrize("sigma, visits", [("beta_tilde", range(1000, -1, -2)), ("beta", range(1000, -1, -4)),
                                           ("beta_tilde", range(1000, -1, -25))])
def test_algorithm_2_with_the_exact_eps_returns_the_data(sigma, visits):
  d, r, m, v = DDPM(sigma=sigma), rng(5), 0.3, 0.25           # the data: N(0.3, 0.25)
  a, c, model = d.alpha_bar, d.every(visits), gaussian_model(d, m, math.sqrt(v))
  @TinyJit
  def step(x, i, told, z): return c.p_sample(x, i, model(x, told), z, clip=False)[0].realize()
  shape, (mean, var) = (1024, 1, 2, 2), (0.0, 1.0)
  x = f32(r.standard_normal(shape))
  for i, t, s in zip(range(c.T, 0, -1), visits, visits[1:]):
    args = [Tensor(np.full(shape[0], v, np.int32)).realize() for v in (i, t)]
    x = step(x.realize(), *args, f32(r.standard_normal(shape)).realize())
    k = math.sqrt(a[t]) * v / (a[t] * v + 1 - a[t])           # x̂_0 = m + k (x_t − √ᾱ m): the chain stays normal, so
    w0, wt, beta_tilde = posterior(d, t, s)                   # its moments follow in float64
    mean = w0 * (m + k * (mean - math.sqrt(a[t]) * m)) + wt * mean
    var = (w0 * k + wt) ** 2 * var + (s > 0) * (1 - a[t] / a[s] if sigma == "beta" else beta_tilde)
  x = vec(x)
  assert x.mean() == pytest.approx(mean, abs=0.03) and x.std() == pytest.approx(math.sqrt(var), rel=0.05)
  if c.T > 250: assert (mean, math.sqrt(var)) == pytest.approx((m, math.sqrt(v)), rel=0.02)  # the data's

def test_score_of_a_gaussian():
  d, m, v, t = DDPM(), 0.3, 0.25, 400
  a, x = d.alpha_bar[t], rng(6).standard_normal((3, 1, 2, 2))
  eps = math.sqrt(1 - a) * (x - math.sqrt(a) * m) / (a * v + 1 - a)  # the mean of ε given x_t
  want = -(x - math.sqrt(a) * m) / (a * v + 1 - a)                   # x_t ~ N(√ᾱ m, ᾱ v + 1 − ᾱ)
  close(d.score(f32(x), t, f32(eps)).numpy(), want, rtol=1e-5)
  x0 = rng(7).uniform(-1, 1, (3, 1, 2, 2))                           # denoising score matching:
  x_t = num(d.q_sample(f32(x0), t, f32(x)))                          # ε gives ∇ log q(x_t | x_0)
  close(d.score(f32(x_t), t, f32(x)).numpy(), -(x_t - math.sqrt(a) * x0) / (1 - a), atol=1e-4)

# *** losses and the bound ***

def test_eq14_is_the_mean_squared_error():
  r = rng(8)
  x0, eps, k = r.uniform(-1, 1, (64, 1, 4, 4)), r.standard_normal((64, 1, 4, 4)), r.standard_normal((64, 1, 4, 4))
  t = r.integers(1, 1001, 64)
  def loss(model, **kw): return DDPM(**kw).loss_simple(model, f32(x0), at_times(*t), f32(eps))
  zero = loss(lambda x, t: x * 0)
  assert zero.shape == () and zero.item() == pytest.approx((eps**2).mean(), rel=1e-5)
  assert zero.item() == pytest.approx(1, abs=0.15)
  a, (w0, wt, _) = DDPM().alpha_bar[t].reshape(-1, 1, 1, 1), weights(DDPM(), t, t - 1)
  x_t = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
  targets = {"eps": eps, "x0": x0, "mu": w0 * x0 + wt * x_t, "v": np.sqrt(a) * eps - np.sqrt(1 - a) * x0}
  for predict, target in targets.items():
    assert loss(const(k), predict=predict).item() == pytest.approx(((k - target) ** 2).mean(), rel=1e-5)
  learned = np.concatenate([k, 9 + k], 1)                     # L_simple does not depend on a learned variance
  assert loss(const(learned), sigma="learned").item() == pytest.approx(((k - eps) ** 2).mean(), rel=1e-5)
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

levels = scaled(np.arange(256)).reshape(256, 1, 1, 1)

def test_eq13_against_numerical_integration():
  def integral(k, mean, sigma):
    x = np.linspace((k - 0.5) / 127.5 - 1, (k + 0.5) / 127.5 - 1, 20001)
    return integrate(np.exp(log_normal(x, mean, sigma**2)), x)
  mean = float(np.float32(0.137))
  for sigma in (0.0074, 0.1, 1.0):
    got = vec(discretized_log_likelihood(f32(levels), f32(levels * 0 + mean), sigma))
    for k in range(1, 255, 7):
      p = integral(k, mean, sigma)
      assert p == pytest.approx(bin_mass(k, mean, sigma), rel=1e-5, abs=1e-250)
      if p > 1e-250: assert got[k] == pytest.approx(math.log(p), abs=1e-3, rel=1e-5)
      else: assert got[k] < -500

def test_eq13_sums_to_one_and_is_right_in_the_tails():
  mean, sigma = np.meshgrid([-1.6, -1, -0.5, 0.0, 0.0031, 0.77, 1, 1.4], [0.0005, 0.0073, 0.05, 0.5, 2])
  mean, sigma = mean.ravel().astype(np.float32), sigma.ravel().astype(np.float32)
  wide = lambda v: f32(np.broadcast_to(v, (256, 1, 1, len(mean))))
  m = wide(mean)
  log_p = discretized_log_likelihood(wide(levels), m, wide(sigma))
  (gradient,) = log_p.sum().gradient(m)
  assert np.isfinite(gradient.numpy()).all()
  log_p = num(log_p).reshape(256, -1)
  assert np.isfinite(log_p).all() and (log_p < 1e-6).all()
  close(np.exp(log_p).sum(0), 1, atol=GPU)
  for j in range(len(mean)):
    p = np.array([bin_mass(k, float(mean[j]), float(sigma[j])) for k in range(256)])
    close(log_p[p > 1e-280, j], np.log(p[p > 1e-280]), rtol=5e-5, atol=5e-4)
    far = np.sign(levels.ravel() - mean[j]) * np.gradient(log_p[:, j])
    assert (far[1:-1][p[1:-1] < 1e-12] < 0).all()             # further from the mean is never more likely

def test_eq13_log_cdf():
  z = np.concatenate([np.linspace(-35, 6, 500), [0.0]]).astype(np.float32)
  want = [math.log(math.erfc(-v / math.sqrt(2)) / 2) for v in z.astype(np.float64)]
  close(num(log_cdf(f32(z))), want, rtol=2e-6, atol=1e-6)
  (gradient,) = log_cdf(z := f32([0.0, -1e-3, 1e-3])).sum().gradient(z)
  assert num(gradient) == pytest.approx(math.sqrt(2 / math.pi), rel=1e-3)

def test_eq13_gradient():
  m = f32(np.full((256, 1, 1, 1), 0.1))
  (gradient,) = discretized_log_likelihood(f32(levels), m, 0.1).sum().gradient(m)
  m, h = float(np.float32(0.1)), 1e-5
  want = [(math.log(bin_mass(k, m + h, 0.1)) - math.log(bin_mass(k, m - h, 0.1))) / (2 * h) for k in range(256)]
  close(vec(gradient), want, rtol=1e-3, atol=2e-2)

def kl_by_integration(m_q, v_q, m_p, v_p):
  """KL(N(m_q, v_q) ‖ N(m_p, v_p)) in nats: ∫ q log q/p."""
  x = m_q + math.sqrt(v_q) * np.linspace(-12, 12, 20001)
  q = log_normal(x, m_q, v_q)
  return integrate(np.exp(q) * (q - log_normal(x, m_p, v_p)), x)

def one_pixel(d, t, wrong, seed):
  """For times t (n,): x_0 on a level, ε and x_t (n,), and an answer of ε that is wrong by so much, N(0, wrong²)."""
  r, (a, b) = rng(seed), np.array([products(d, int(v), 0) for v in t]).T
  x0, eps = scaled(r.integers(0, 256, len(t))), r.standard_normal(len(t))
  return [v.astype(np.float32).astype(np.float64) for v in
          (x0, eps, a * x0 + np.sqrt(b) * eps, eps + wrong * r.standard_normal(len(t)))]

def with_variance(d, out, log_var):
  """The network's answer (n, C, 1, 1) of one pixel, with log σ² if it is learned."""
  return f32(np.stack([out, log_var] if d.sigma == "learned" else [out], 1).reshape(len(out), -1, 1, 1))

@pytest.mark.parametrize("times", (None, CHAIN))
@pytest.mark.parametrize("sigma", SIGMAS)
def test_eq8_is_the_kl_of_two_normals(sigma, times):
  d = DDPM(sigma=sigma)
  c, visits = chain_of(d, times)
  i = np.array([2, 3, 4, 6, 2, 3, 4, 6] if times else [2, 10, 300, 1000, 2, 10, 300, 1000])
  t, s = visits[i], visits[i - 1]
  wrong = np.array([0] * 4 + [0.5] * 4)                       # with the right mean what is left is Eq. 8's constant
  x0, _, x_t, out = one_pixel(d, t, wrong, 20)
  log_var = np.log(d.beta[t]) + rng(21).uniform(-1.5, 0.7, 8)
  got = vec(c.vlb_term(col(*x0), col(*x_t), at_times(*i), with_variance(d, out, log_var), clip=False)) * math.log(2)
  for j in range(8):
    (w0, wt, beta_tilde), (a, b), beta = posterior(d, t[j], s[j]), products(d, t[j], 0), products(d, t[j], s[j])[1]
    m_q, m_p = (w0 * v + wt * x_t[j] for v in (x0[j], (x_t[j] - math.sqrt(b) * out[j]) / a))
    v_p = {"beta": beta, "beta_tilde": beta_tilde, "learned": math.exp(log_var[j]) * beta / d.beta[t[j]]}[sigma]
    want = kl_by_integration(m_q, beta_tilde, m_p, v_p)
    assert got[j] == pytest.approx(want, rel=2e-3, abs=1e-6)
    if j in (0, 5):                                           # and by Monte Carlo
      x = m_q + math.sqrt(beta_tilde) * rng(22).standard_normal(200_000)
      draws = log_normal(x, m_q, beta_tilde) - log_normal(x, m_p, v_p)
      assert abs(draws.mean() - got[j]) < 4.5 * draws.std() / math.sqrt(200_000) + 1e-6

def variance_at_1(beta_tilde_2, beta_1):
  """L_0's variance where it would be β̃₁ = 0: β̃₂ as in the authors' code, but β₁/2 where that is more."""
  return max(beta_tilde_2, beta_1 / 2)

@pytest.mark.parametrize("times", (None, CHAIN))
@pytest.mark.parametrize("sigma", SIGMAS)
def test_eq12_is_eq8_in_terms_of_eps(sigma, times):
  """L_{t-1} less its least value is β²/(2σ²α(1−ᾱ)) ‖ε − ε_θ‖²."""
  d = DDPM(sigma=sigma)
  c, visits = chain_of(d, times)
  i = np.arange(2, 7) if times else np.array([2, 3, 10, 100, 600, 1000])
  t, s = visits[i], visits[i - 1]
  beta, b = np.array([products(d, *v)[1] for v in zip(t, s)]), np.array([products(d, v, 0)[1] for v in t])
  var = np.array([posterior(d, *v)[2] for v in zip(t, s)]) if sigma == "beta_tilde" else beta
  x0, eps, x_t, _ = one_pixel(d, t, 0, 23)
  def L(out): return vec(c.vlb_term(col(*x0), col(*x_t), at_times(*i), with_variance(d, out, np.log(d.beta[t])), False))
  factor = beta**2 / (2 * var * (1 - beta) * b)
  close((L(eps + 3) - L(eps)) * math.log(2) / 3**2, factor, rtol=1e-3)
  close([c.vlb_weight(int(v)) for v in i], factor, rtol=1e-9)
  close(c.vlb_weight(i), factor, rtol=1e-9)
  assert c.vlb_weight(i).dtype == np.float64
  first, beta_1 = posterior(d, visits[2], visits[1])[2], products(d, visits[1], 0)[1]
  var_1 = variance_at_1(first, beta_1) if sigma == "beta_tilde" else beta_1
  assert c.vlb_weight(1) == pytest.approx(beta_1 / (2 * var_1 * (1 - beta_1)), rel=1e-9)

def exact_prior(d, x0):
  """L_T = KL(N(√ᾱ x₀, 1−ᾱ) ‖ N(0, 1)) of each image by integration, bits/dim."""
  a = d.alpha_bar[-1]
  nats = [kl_by_integration(math.sqrt(a) * v, 1 - a, 0, 1) for v in x0.ravel()]
  return np.reshape(nats, x0.shape).mean((1, 2, 3)) / math.log(2)

def exact_term(d, x0, i, eps, answer, clip=True, visits=None):
  """Eq. 5's term of one image at step i of the chain of `visits`, [0, ..., T], in float64. answer: out, or that of x_t.
  -> .L bits/dim, p_θ's .mean and .var, .x0_hat and the .eps_hat that belongs to x̂_0 before clipping."""
  visits = range(d.T + 1) if visits is None else visits
  t, s = visits[i], visits[i - 1]
  (a, b), (w0, wt, var_q), beta = products(d, t, 0), posterior(d, t, s), products(d, t, s)[1]
  (whole_w0, whole_wt, _), whole = posterior(d, t, t - 1), len(visits) == d.T + 1
  x_t = a * x0 + math.sqrt(b) * eps
  out = answer(x_t) if callable(answer) else answer
  out, log_var = np.split(out, 2) if d.sigma == "learned" else (out, 0)
  free = {"eps": lambda: (x_t - math.sqrt(b) * out) / a, "x0": lambda: out, "v": lambda: a * x_t - math.sqrt(b) * out,
          "mu": lambda: (out - whole_wt * x_t) / whole_w0}[d.predict]()
  x0_hat = free.clip(-1, 1) if clip else free
  mean_q, mean = w0 * x0 + wt * x_t, out if d.predict == "mu" and whole else w0 * x0_hat + wt * x_t
  var = {"beta": beta, "beta_tilde": var_q, "learned": np.exp(log_var) * beta / d.beta[t]}[d.sigma]
  if i == 1:
    if d.sigma != "learned": var = variance_at_1(posterior(d, visits[2], visits[1])[2], beta) if d.T > 1 else beta
    nats = -np.log(np.vectorize(bin_mass)(np.rint((x0 + 1) * 127.5), mean, np.sqrt(var)))
  else: nats = np.log(var / var_q) / 2 + (var_q + (mean_q - mean) ** 2) / (2 * var) - 0.5
  return types.SimpleNamespace(L=nats.mean() / math.log(2), mean=mean, var=var, x0_hat=x0_hat,
                               eps_hat=(x_t - a * free) / math.sqrt(b))

def test_eq5_prior_kl():
  x0 = rng(10).uniform(-1, 1, (3, 2, 4, 4))
  assert (num(DDPM().prior_kl(f32(x0))) < 1e-4).all()
  for d in (DDPM(), DDPM(30, 1e-3, 0.1), DDPM().every(CHAIN)):
    assert num(d.prior_kl(f32(x0))) == pytest.approx(exact_prior(d, x0), rel=1e-3)

@pytest.mark.parametrize("sigma, T, predict, schedule, times", [
  ("beta", 1000, "eps", "linear", None), ("beta_tilde", 1000, "eps", "linear", None),
  ("beta", 1, "eps", "linear", None), ("beta", 1000, "mu", "linear", None),
  ("beta_tilde", 1000, "eps", "geometric", None),
  ("beta", 1000, "v", "cosine", None), ("learned", 1000, "eps", "linear", None), ("learned", 1, "v", "linear", None),
  ("beta_tilde", 1000, "x0", "linear", CHAIN), ("beta", 1000, "mu", "linear", CHAIN),
  ("learned", 1000, "mu", "linear", CHAIN), ("beta", 1000, "eps", "linear", range(30, -1, -1))])
def test_eq5_vlb_term(sigma, T, predict, schedule, times):
  d, r = DDPM(T, schedule=schedule, sigma=sigma, predict=predict), rng(11)
  c, visits = chain_of(d, times)
  i = np.array([1, 2, 3, 50, 400, 999, 1000, 1]).clip(1, c.T)  # t = 1 and t > 1 in one batch
  t = visits[i]
  k, eps = r.integers(0, 256, (8, 2, 1, 2)), r.standard_normal((8, 2, 1, 2))
  k[7, 0, 0] = 0, 255                                          # both edge bins at t = 1
  x0, out = scaled(k), eps + 0.3 * r.standard_normal(k.shape)
  if predict in ("mu", "x0"): out = 1.01 * x0 + 0.01 * out     # outside [-1, 1] as well
  if sigma == "learned":
    out = np.concatenate([out, np.log(d.beta[t]).reshape(-1, 1, 1, 1) + r.uniform(-1, 1, k.shape)], 1)
  a = d.alpha_bar[t].reshape(-1, 1, 1, 1)
  x_t = np.sqrt(a) * x0 + np.sqrt(1 - a) * eps
  for clip in (True, False) if (sigma, T) == ("beta", 1000) else (True,):
    got = num(c.vlb_term(f32(x0), f32(x_t), at_times(*i), f32(out), clip=clip))
    want = [exact_term(d, x0[j], i[j], eps[j], out[j], clip, visits).L for j in range(8)]
    assert got.shape == (8,)
    close(got, want, rtol=2e-3, atol=2e-7)

def test_eq5_term_can_be_trained_on():
  d, r = DDPM(), rng(12)
  x0, x_t = f32(scaled(r.integers(0, 256, (3, 1, 2, 2)))), f32(r.standard_normal((3, 1, 2, 2)))
  out = f32(r.standard_normal((3, 1, 2, 2)))
  (gradient,) = d.vlb_term(x0, x_t, at_times(1, 2, 1000), out, clip=False).sum().gradient(out)
  assert np.isfinite(gradient.numpy()).all() and (abs(num(gradient)).max((1, 2, 3)) > 0).all()

def test_eq8_gradient_of_a_learned_variance():
  """∂KL/∂log σ² is ½ (1 − (β̃ + ‖μ̃ − μ‖²)/σ²): least at σ² = β̃ + ‖μ̃ − μ‖². At t = 1 by differences of Eq. 13."""
  d, t = DDPM(sigma="learned"), np.array([1, 1, 2, 40, 500, 1000])
  x0, eps, x_t, out = one_pixel(d, t, 0.3, 24)
  log_var = np.log(d.beta[t]) + rng(25).uniform(-1, 1, 6)
  answer = with_variance(d, out, log_var)
  (gradient,) = d.vlb_term(col(*x0), col(*x_t), at_times(*t), answer, clip=False).sum().gradient(answer)
  def term(j, log_var):
    out_j = np.array([out[j], log_var]).reshape(2, 1, 1)
    return exact_term(d, x0[j].reshape(1, 1, 1), t[j], eps[j], out_j, clip=False)
  want = [(term(j, v + 1e-4).L - term(j, v - 1e-4).L) / 2e-4 for j, v in enumerate(log_var[:2])]
  for j in range(2, 6):
    (w0, wt, beta_tilde), p = posterior(d, t[j], t[j] - 1), term(j, log_var[j])
    gap = w0 * x0[j] + wt * x_t[j] - p.mean.item()
    want.append((1 - (beta_tilde + gap**2) / p.var.item()) / 2 / math.log(2))
  close(gradient.numpy()[:, 1, 0, 0], want, rtol=2e-3, atol=1e-4)
  assert (np.abs(gradient.numpy()[:, 0]) > 0).all()           # and into the mean as well

# *** what extras/objectives.py does to them ***

@pytest.mark.parametrize("sigma", ("beta", "beta_tilde"))
@pytest.mark.parametrize("predict", ("eps", "x0", "mu", "v"))
def test_share_of_each_time_in_the_bound(predict, sigma):
  """What an error of the answer adds to L_{t-1}, relative to t = 500, whatever it is an answer in."""
  d, r, t = DDPM(sigma=sigma, predict=predict), rng(14), np.array([500, 2, 10, 100, 900, 1000])
  x0, eps = f32(scaled(r.integers(0, 256, (6, 1, 1, 2)))), f32(r.standard_normal((6, 1, 1, 2)))
  x_t = d.q_sample(x0, at_times(*t), eps).realize()
  target = d.target(x0, x_t, at_times(*t), eps).realize()
  def L(out): return num(d.vlb_term(x0, x_t, at_times(*t), out, clip=False))
  added, share = L((target + 10).realize()) - L(target), objectives.vlb_share(d)
  close(share[t] / share[500], added / added[0], rtol=2e-3)
  assert share.shape == (1001,) and share[0] == 0 and share.sum() == pytest.approx(1)
  var = variance_at_1(d.beta_tilde[2], 1e-4) if sigma == "beta_tilde" else 1e-4
  at_1 = {"eps": 1e-4 / 0.9999, "v": 1e-4}.get(predict, 1)    # ‖x_0 − x̂_0‖²/(2σ²): x̂_0 is x_1/√α − √(β/α) ε there
  at_500 = d.mu_x0[500]**2 * {"eps": 1 / d.alpha_bar[500] - 1, "v": 1 - d.alpha_bar[500], "x0": 1,
                              "mu": d.mu_x0[500]**-2}[predict]
  var_500 = d.beta[500] if sigma == "beta" else posterior(d, 500, 499)[2]
  assert share[1] / share[500] == pytest.approx(at_1 / var / (at_500 / var_500), rel=1e-6)

def test_min_snr_weight():
  d = DDPM()                                                  # ᾱ₁ = 0.9999, so SNR is 9999 at t = 1
  assert objectives.min_snr_weight(d, 5)[[1, 300, 1000]] == pytest.approx([5 / 9999, 1, 1])

@pytest.mark.parametrize("predict, min_snr", [("eps", 0), ("eps", 5), ("x0", 0), ("mu", 0), ("v", 0)])
def test_weighted_times_are_importance_sampling(predict, min_snr):
  d = DDPM(predict=predict)
  share, drawn = objectives.chances(d, min_snr)
  for p in (share, drawn): assert p.shape == (1001,) and p[0] == 0 and (p[1:] > 0).all() and p.sum() == pytest.approx(1)
  want = objectives.vlb_share(d)[1:]
  if min_snr: want = want * np.minimum(1, min_snr * (1 - d.alpha_bar[1:]) / d.alpha_bar[1:])
  close(share[1:], want / want.sum(), rtol=1e-9)
  if not min_snr:  # ᾱ/(1−ᾱ) is 4.036e-5 at T: there it is drawn √ of that as often as Eq. 12 counts it
    often = drawn[1:] / d.vlb_weight(np.arange(1, 1001))
    assert often[-1] / often[0] == pytest.approx(math.sqrt(4.036e-5), rel=1e-3)
  for loss, counts in (("simple", share[1:]), ("vlb", np.full(1000, 1 / 1000))):
    c = types.SimpleNamespace(times="weighted", loss=loss, min_snr=min_snr)
    close(drawn[1:] * num(objectives.time_weights(d, c))[1:], counts, rtol=1e-5)
  t = objectives.weighted_times(drawn, 5000, rng(15))
  assert t.dtype == np.int32 and np.abs(np.bincount(t, minlength=1001) - 5000 * drawn).max() < 1 + 1e-6  # one a stratum
  assert abs(np.corrcoef(np.arange(5000), t)[0, 1]) < 5 / math.sqrt(5000)

# *** the bound of a whole image: Eq. 5 and Eq. 3 ***

def gaussian_images(n, m, s, shape):
  """Images uint8 (n, C, H, W) of N(m, s²), and the exact −log of their probability, bits/dim (n,)."""
  k = np.rint((rng(1).normal(m, s, (n, *shape)).clip(-1, 1) + 1) * 127.5).astype(np.uint8)
  return k, -np.log2([bin_mass(i, m, s) for i in range(256)])[k].mean((1, 2, 3))

def some_images(n, shape=(1, 4, 4)): return rng().integers(0, 256, (n, *shape)).astype(np.uint8)

def the_noise(seed, i, t, shape):
  return stream(seed, "noise of the bound", i, t).standard_normal(shape, np.float32).astype(np.float64)

@pytest.mark.parametrize("sigma, predict, clip", [("beta", "eps", True), ("beta_tilde", "mu", False),
                                                  ("beta", "x0", True), ("learned", "v", True)])
def test_eq5_term_by_term(sigma, predict, clip):
  d, k, seed = DDPM(7, 1e-3, 0.3, sigma=sigma, predict=predict), some_images(5, (2, 1, 2)), 11
  labels = np.array([3, 0, 1, 2, 2], np.int64) if clip else None
  def model(x, t, y=None):
    out = 0.7 * x + 0.1 * x.sin() + 0.02 * (t if y is None else t + y).reshape(-1, 1, 1, 1)
    return out.cat(0.1 * x - 3, dim=1) if sigma == "learned" else out
  b = bound(d, model, k, seed, clip=clip, batch=4, labels=labels)
  assert b.t.tolist() == [[1, 2, 3, 4, 5, 6, 7]] * 5 and b.weight.tolist() == [1] * 7
  for i, x0 in enumerate(scaled(k)):
    for t in range(1, 8):
      eps, known = the_noise(seed, i, t, x0.shape), 0.02 * (t + (labels[i] if clip else 0))
      def answer(x, known=known):
        out = 0.7 * x + 0.1 * np.sin(x) + known
        return np.concatenate([out, 0.1 * x - 3]) if sigma == "learned" else out
      want = exact_term(d, x0, t, eps, answer, clip)
      errors = ((eps - want.eps_hat)**2).mean(), ((x0 - want.x0_hat)**2).mean()
      close([b.L[i, t-1], b.mse_eps[i, t-1], b.mse_x0[i, t-1]], [want.L, *errors], rtol=2e-4)
  close(b.L_T, exact_prior(d, scaled(k)), rtol=1e-4)
  close(b.total, b.L_T + b.L.sum(1), rtol=1e-6)

def test_eq5_as_it_is_written():
  d, k = DDPM(3, 1e-3, 0.3), some_images(2, (1, 1, 2))
  def noise(t): return f32(np.stack([the_noise(5, i, t, k.shape[1:]) for i in range(2)]))
  got = variational_bound(d, lambda x, t: 0.7 * x + 0.1 * t.float().reshape(2, 1, 1, 1), f32(scaled(k)), noise)
  def term(i, x0, t): return exact_term(d, x0, t, the_noise(5, i, t, x0.shape), lambda x: 0.7 * x + 0.1 * t).L
  def terms(i, x0): return [term(i, x0, t) for t in (1, 2, 3)]
  close(got.numpy(), exact_prior(d, scaled(k)) + [sum(terms(i, x0)) for i, x0 in enumerate(scaled(k))], rtol=2e-4)

def test_eq5_nears_the_closed_form_as_T_grows_and_stays_above():
  """Data N(0.1, 0.25²) on the 256 levels, exact eps: −log p is known. The paper's betas, times 1000/T."""
  (k, nll), gap = gaussian_images(200, 0.1, 0.25, (1, 16, 16)), {}
  for T in (20, 4000):
    d = DDPM(T, 0.1 / T, min(20 / T, 0.95))
    above = bound(d, gaussian_model(d, 0.1, 0.25), k, samples_t=min(40, T - 1), batch=2048).total - nll
    gap[T] = above.mean() / nll.mean()
    assert above.mean() > -3 * above.std() / math.sqrt(200)
  assert gap[4000] < 0.01 < gap[20]

@pytest.mark.parametrize("T, M", [(30, 7), (30, 1), (30, 29), (2, 1), (1000, 20)])
def test_eq5_from_some_of_its_terms_is_unbiased(T, M):
  t, weight = times(T, 4000, 5, samples_t=M)
  assert t.shape == (4000, M + 1) and (t[:, 0] == 1).all() and weight[0] == 1 and weight.sum() == T
  assert len(np.unique(t[:, 1:])) > 0.98 * (T - 1)            # every time may come
  f = rng(3).random(T + 1) / np.arange(1, T + 2)
  estimate = f[t] @ weight
  assert abs(estimate.mean() - f[1:].sum()) <= 4 * estimate.std() / math.sqrt(4000) + 1e-12
  for drawn, size in zip(t.T[1:], weight[1:]):                # a stratum: `size` neighbours, equally often
    values, counts = np.unique(drawn, return_counts=True)
    assert len(values) <= size and values[-1] - values[0] < size
    assert abs(counts - 4000 / size).max() < 5 * math.sqrt(4000 / size) + 1

def test_eq3_along_a_trajectory():
  d, k, seed, T = DDPM(5, 0.01, 0.5), some_images(3, (1, 1, 3)), 4, 5
  eq3, sampled, kl = trajectory_bound(d, lambda x, t: 0.6 * x, k, seed, batch=2, clip=False)
  def log_p_of(x, m, v): return log_normal(x, m, v).mean() / math.log(2)
  for i, x0 in enumerate(scaled(k)):
    x, ratio, terms = x0, 0.0, []
    for t in range(1, T + 1):
      x_t = math.sqrt(d.alpha[t]) * x + math.sqrt(d.beta[t]) * the_noise(seed, i, t, x0.shape)
      a, b = products(d, t, 0)
      p = exact_term(d, x0, t, (x_t - a * x0) / math.sqrt(b), lambda x_t: 0.6 * x_t, clip=False)
      log_p = -p.L if t == 1 else log_p_of(x, p.mean, p.var)
      ratio += log_p - log_p_of(x_t, math.sqrt(d.alpha[t]) * x, d.beta[t])
      terms.append(p.L)
      x = x_t
    close(eq3[i], -ratio - log_p_of(x, 0, 1), rtol=1e-4)     # −log p(x_T) − Σ log p/q
    close(kl[i], [*terms, *exact_prior(d, x0[None])], rtol=1e-3)
  close(sampled.sum(1), eq3, rtol=1e-4)                      # Bayes: the same number, path by path
  close(sampled[:, 0], kl[:, 0])

def test_eq3_and_eq5_agree_and_the_variance_falls():
  d, k = DDPM(10, 0.01, 0.9), gaussian_images(1, 0.1, 0.25, (1, 2, 2))[0].repeat(3000, 0)
  for factor in (1.0, 0.8):
    eq3, sampled, kl = trajectory_bound(d, gaussian_model(d, 0.1, 0.25, factor), k, batch=3000, clip=False)
    difference = eq3 - kl.sum(1)
    assert abs(difference.mean()) < 4 * difference.std() / math.sqrt(3000) < 0.1
    spread = np.abs((sampled - kl)[:, 1:].mean(0)) / ((sampled - kl)[:, 1:].std(0) / math.sqrt(3000))
    assert (spread < 4.5).all()                              # each draw's mean is its KL
    assert (kl.var(0)[1:] < sampled.var(0)[1:] / 5).all()    # and its variance falls, at every t
    assert sampled.var(0).sum() > 2 * kl.var(0).sum()

# *** the samplers: what holds for each ***

T, MODE, SD = 200, 0.6, 0.1
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
  def model(x, t):                                           # x̂_0 tells the time at which it was asked
    seen.append(t)
    return f32(np.broadcast_to(t.numpy().reshape(-1, 1, 1, 1) / T, x.shape)) if host else x * 0 + column(t, x) / T
  for steps in range(1, T + 1):
    out = list(SAMPLERS[name](d, model, x_T, steps, jits=jits, **options))
    visits = timesteps(T, steps)
    assert [t for t, _, _ in out] == visits[1:]
    for t, (_, _, x0_hat) in zip(visits, out): close(x0_hat.numpy(), t / T, rtol=1e-6)
    assert all(x.shape == x_T.shape and np.isfinite(x.numpy()).all() for _, x, _ in out)
    close(out[-1][1].numpy(), visits[-2] / T, rtol=2e-6)     # ᾱ = 1: x_0 is x̂_0, without noise
  assert all(t.shape == (2,) and t.dtype.name == "int" for t in seen)

@pytest.mark.parametrize("steps", (4, 3))
@pytest.mark.parametrize("name", ("ddpm", "ddim", "pc"))
def test_a_model_may_predict_anything_also_on_a_shorter_chain(name, steps):
  x_T, d = draw_x_T(4, (1, 2, 2), 0), {p: short(4, predict=p) for p in ("eps", "x0", "mu", "v")}
  eps, beta = exact(d["eps"]), f32(d["eps"].beta)
  def x0(x, t): return d["eps"].predict_x0(x, t, eps(x, t))
  answers = {"x0": x0, "mu": lambda x, t: d["eps"].q_posterior(x0(x, t), x, t)[0],
             "v": lambda x, t: d["v"].target(x0(x, t), x, t, eps(x, t))}
  def run(d, model): return last(SAMPLERS[name](d, model, x_T, steps, clip=False))
  ours = run(d["eps"], eps)
  for p, answer in answers.items(): close(ours, run(d[p], answer), atol=GPU)
  def with_beta(x, t): return eps(x, t).cat(x * 0 + column(beta[t].log(), x), dim=1)
  close(ours, run(short(4, sigma="learned"), with_beta), atol=GPU)  # a learned Σ that has learned σ² = β

# *** the samplers: each against its equation ***

def in_float64(x, visits, seed, step):
  """Algorithm 2's loop: step(x_t, t, s, z), with the noise that image i draws in its own order."""
  rngs = [np.random.default_rng([seed, 0x5A, 2, i]) for i in range(len(x))]
  x = num(x)
  for t, s in zip(visits, visits[1:]):
    z = np.stack([r.standard_normal(x.shape[1:], np.float32) for r in rngs]) if s else 0.0
    x = step(x, t, s, z)
  return x

@pytest.mark.parametrize("sigma", ("beta", "beta_tilde"))
@pytest.mark.parametrize("visits", (range(20, -1, -1), [20, 13, 12, 5, 0]))
def test_ddpm_is_algorithm_2(sigma, visits):
  d = short(20, sigma=sigma)
  def step(x, t, s, z):
    (a, beta), var = products(d, t, s), posterior(d, t, s)[2]
    mean = (x - beta / math.sqrt(1 - d.alpha_bar[t]) * exact64(d, x, t)) / a
    return mean + math.sqrt(beta if sigma == "beta" else var) * z
  x_T = draw_x_T(50, (1, 2, 2), 5)
  ours = last(SAMPLERS["ddpm"](d, exact(d), x_T, visits, 5, clip=False))
  close(ours, in_float64(x_T, visits, 5, step), atol=GPU)

@pytest.mark.parametrize("steps", (20, 7))
@pytest.mark.parametrize("clip", (True, False))
def test_ddim_with_eta_1_is_algorithm_2(steps, clip):
  d = short(20, sigma="beta_tilde")
  x_T, model = draw_x_T(50, (1, 2, 2), 0), exact(d, 1.2)
  both = [SAMPLERS[name](d, model, x_T, steps, clip=clip, **o) for name, o in (("ddpm", {}), ("ddim", {"eta": 1}))]
  for (_, x, x0), (_, y, y0) in zip(*both, strict=True):
    close(x.numpy(), y.numpy(), atol=GPU)
    close(x0.numpy(), y0.numpy(), atol=GPU)

@pytest.mark.parametrize("eta", (0.0, 0.3, 1.0))
def test_ddim_is_its_equation_12(eta):
  d, r = DDPM(), rng(0)
  for t, s in ((1000, 999), (1000, 1), (1000, 0), (500, 20), (2, 1), (2, 0), (1, 0)):
    x0, eps, z = r.standard_normal((3, 4, 1, 2, 2))
    a, a_s = d.alpha_bar[t], d.alpha_bar[s]
    x_t = math.sqrt(a) * x0 + math.sqrt(1 - a) * eps
    sigma = eta * math.sqrt((1 - a_s) / (1 - a)) * math.sqrt(1 - a / a_s)  # its Eq. 16
    x_s = math.sqrt(a_s) * x0 + math.sqrt(max(0, 1 - a_s - sigma**2)) * eps + sigma * z
    c, i = step_from(d, t, s)
    ours, _ = ddim_move(c, const(eps), f32(x_t), at_times(*[i] * 4), f32(z) if eta else None, False, eta)
    close(ours.numpy(), x_s, atol=GPU if t == 1000 else 2e-6)              # x̂_0 at T: 1e-7 / √ᾱ_T
    if s == 0: close(ours.numpy(), x0, atol=GPU)

def test_ode_and_dpm_are_of_second_order_and_ddim_of_first():
  """For data N(0, 0.2²) the flow scales x with the standard deviation of q(x_t). The step to 0 is left out: Euler's."""
  d, x_T, end = short(400), draw_x_T(8, (1, 2, 2), 1), 40
  def sd(t): return math.sqrt(d.alpha_bar[t] * 0.2**2 + 1 - d.alpha_bar[t])
  def error(name, steps):
    *_, (_, x, _) = SAMPLERS[name](d, exact(d, 0.0, 0.2), x_T, np.linspace(400, end, steps + 1).astype(int), clip=False)
    return np.abs(x.numpy() - x_T.numpy() * sd(end) / sd(400)).max()
  ode, dpm, ddim = [[error(name, steps) for steps in (20, 40)] for name in ("ode", "dpm", "ddim")]
  assert 3.2 < ode[0] / ode[1] < 5 and 1.8 < ddim[0] / ddim[1] < 2.3 and ddim[1] > 5 * ode[1]
  assert 3.2 < dpm[0] / dpm[1] < 5 and ddim[1] > 2 * dpm[1]

def test_sde_is_its_equation_6_and_pc_adds_langevin():
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
  x_T, visits, twice = draw_x_T(50, (1, 2, 2), 5), [20, 13, 5, 0], [20, 20, 13, 13, 5, 5, 0]
  for name, options, path, step in (("sde", {}, visits, reverse), ("pc", {"snr": 0.1}, twice, pc),
                                    ("langevin", {"inner": 2, "r": 0.3}, twice, annealed)):
    ours = last(SAMPLERS[name](d, exact(d), x_T, visits, 5, clip=False, **options))
    close(ours, in_float64(x_T, path, 5, step), atol=GPU)

def test_eq14_is_denoising_score_matching():
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
  time, ours = at_times(*[t] * n * n), exact(d, MODE, 0.3)
  def score(model): return d.score(f32(x_t), time, model(f32(x_t), time)).numpy()
  close(score(ours), truth, atol=2e-4)                        # the tests' model is the gradient of a density
  gaps, losses = [], []
  for model in (ours, lambda x, t: x * 0.8, lambda x, t: (x * 2).sin(), lambda x, t: x * 0 + 0.5):
    losses.append(d.loss_simple(model, f32(x0), time, f32(eps)).item() / (1 - a))
    gaps.append(losses[-1] - ((score(model) - truth)**2).mean())
  assert min(losses[1:]) > losses[0] + 0.05
  close(gaps, gaps[0], rtol=1e-2)
