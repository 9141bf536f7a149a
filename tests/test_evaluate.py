"""evaluate.py: which terms of the bound are drawn, the program; extras/: the ODE, outliers, the quality of samples."""
import itertools, json, math, re, subprocess, sys
from types import SimpleNamespace
import numpy as np
import pytest
from PIL import Image
from common import ROOT, close, f32, refused, rng
from engine.batches import choose, geometric, mean_error
from engine.streams import stream
from extras import lenet, likelihood, quality
from extras.editing import read_set
from extras.likelihood import dequantized, ode_bpd, ode_grid, ode_log_density, on_levels
from extras.quality import auc, contrast, sliced_wasserstein
from files import checkpoint, pictures
from files.dataset import dataset
from test_ddpm import gaussian_images, gaussian_model, scaled, some_images, table
from tinygrad import Tensor
import data, evaluate, sample
from ddpm import DDPM
from evaluate import bound, times, trajectory_bound

LOG2 = math.log(2)

# *** the bound ***

def test_noise_is_of_image_and_time_so_batches_do_not_matter():
  d, k = DDPM(5, 0.01, 0.4), some_images(5)
  whole, parts = [bound(d, lambda x, t: 0.5 * x, k, 3, samples_t=2, batch=size) for size in (64, 4)]
  close(whole.L, parts.L, rtol=1e-5)
  assert (whole.t == parts.t).all()
  draws = evaluate.noise(3, np.array([0, 0, 1, 2, 0]), np.array([1, 2, 1, 1, 1]), (1, 2, 3))
  assert draws.dtype == np.float32 and len(np.unique(draws[:4])) == 24 and np.array_equal(draws[0], draws[4])
  assert not np.isin(evaluate.noise(4, np.array([0]), 1, (1, 2, 3)), draws).any()

def test_what_is_an_image():
  k = some_images(2)
  for x in (k, Tensor(k), scaled(k), Tensor(scaled(k).astype(np.float32))): assert np.array_equal(data.levels(x), k)
  for bad in (scaled(k) + 0.003, k[0], k[:0], scaled(k) * 2, scaled(k) * math.nan):
    with pytest.raises(ValueError): data.levels(bad)
  with pytest.raises(ValueError, match="not finite"): bound(DDPM(2), lambda x, t: x * math.nan, k)

def test_a_shorter_chain_tells_the_network_the_time_of_the_whole_one():
  """Its numbers are those of a DDPM with its β as a schedule and of a network that counts as it does."""
  d, visits, k = DDPM(12, 0.01, 0.4), [11, 8, 3, 2, 0], some_images(3)
  c = d.every(visits)
  same, model = DDPM(4, schedule=c.beta[1:].tolist()), gaussian_model(d, 0.2, 0.6)
  counts, x0 = Tensor(np.array(visits[::-1], np.int32)).realize(), f32(scaled(k))
  def own(x, t): return model(x, counts[t])
  def by_eq5(d, m): return evaluate.variational_bound(d, m, x0, lambda t: x0 * 0.3 + t / 9).numpy()
  for measure in (lambda d, m: bound(d, m, k).total, lambda d, m: trajectory_bound(d, m, k).eq3,
                  lambda d, m: ode_bpd(d, m, k, 3).numpy(), by_eq5):
    close(measure(c, model), measure(same, own), rtol=1e-5)
    assert np.abs(measure(c, model) - measure(same, model)).min() > 1e-3

def test_numbers_of_terms_and_batches_that_are_none():
  d, k = DDPM(5, 0.01, 0.4), some_images(2)
  for wrong in (dict(samples_t=-1), dict(samples_t=2.5), dict(batch=0), dict(batch=-1), dict(seed=1.5), dict(seed=-1)):
    refused(lambda wrong=wrong: bound(d, lambda x, t: x, k, **wrong), *wrong.values())

def test_model_that_reads_the_host_is_not_captured():
  d, k = DDPM(2, 0.01, 0.5), some_images(2)
  host = lambda x, t: Tensor(x.numpy() * t.numpy().astype(np.float32).reshape(-1, 1, 1, 1) / 9)
  plain = lambda x, t: x * t.reshape(-1, 1, 1, 1) / 9
  close(bound(d, host, k, batch=2).L, bound(d, plain, k, batch=2).L, rtol=1e-5)

def test_each_use_of_randomness_is_a_stream_of_its_own(monkeypatch):
  seen, k = set(), some_images(3)
  def watched(seed, use, *index): return (seen.add((use, *index)), stream(seed, use, *index))[1]
  for module in ("evaluate", "extras.likelihood", "extras.quality", "engine.batches"):
    monkeypatch.setattr(sys.modules[module], "stream", watched)
  monkeypatch.setattr(data, "load", lambda *a: (k, np.zeros(3)))
  d, model = DDPM(2, 0.1, 0.5), lambda x, t: x
  bound(d, model, k, 7, samples_t=1)
  trajectory_bound(d, model, k, 7)
  ode_bpd(d, model, k, 2, 7)
  contrast("x", k, seed=7)
  sliced_wasserstein(k, k, 5, 7)
  choose(9, 3, 7, "evaluated images")
  each = ("times of the bound", "dequantization")
  assert seen == {("directions",), ("evaluated images",), ("other images",),
                  *((use, i) for use in each for i in range(3)),
                  *(("noise of the bound", i, t) for i in range(3) for t in (1, 2)),
                  *(("probes", i, call) for i in range(3) for call in range(4))}

# *** which times ***

@pytest.mark.parametrize("T", (2, 3, 10, 50, 1000))
def test_geometric(T):
  for n in {1, 2, 5, T // 2, T - 1} & set(range(1, T)):
    g = geometric(T, n)
    assert len(g) == n + 1 and g[0] == 1 and g[-1] == T and (np.diff(g) > 0).all()
  ratios = geometric(10**6, 6)[1:] / geometric(10**6, 6)[:-1]
  close(ratios, 10, rtol=0.01)

def test_stratified_bound_and_its_standard_error():
  """One image again and again: the mean is that of all terms, the scatter of a mean is what its standard error says."""
  d, k = DDPM(60, 1e-3, 0.25), some_images(1).repeat(1000, 0)
  model = gaussian_model(d, 0, 0.5, 0.9)
  every, some = [bound(d, model, k, seed, samples_t=m, batch=4096).total for seed, m in ((0, None), (1, 6))]
  assert abs(every.mean() - some.mean()) < 4 * math.hypot(every.std(), some.std()) / math.sqrt(1000)
  means, errors = zip(*[mean_error(part) for part in some.reshape(50, 20)])
  assert 0.7 < np.std(means) / np.mean(errors) < 1.4

def test_all_terms_and_few_times():
  t, weight = times(30, 2)
  assert t.tolist() == [[*range(1, 31)]] * 2 and (weight == 1).all()
  assert times(1, 3)[0].tolist() == [[1]] * 3 and times(1, 3, samples_t=4)[1] == [1]
  assert np.array_equal(times(30, 5, 2, 4)[0][:3], times(30, 3, 2, 4)[0])  # image i's are its own
  t, weight = times(1000, 1, samples_t=20)
  assert (np.diff(weight[1:]) >= 0).all() and weight[1] == 1 < 100 < weight[-1]  # wider with t, as the terms fall

def test_chain_of_one_step():
  b = bound(DDPM(1, 0.5, 0.5), lambda x, t: x, some_images(2))
  close(b.total, b.L[:, 0] + b.L_T)

# *** not in the paper: outliers ***

def test_auc_counts_pairs():
  for seed in range(5):
    a, b = rng(seed).integers(0, 8, 13) / 8, rng(seed + 50).integers(2, 10, 9) / 8  # with ties
    assert auc(a, b) == pytest.approx(np.mean([(y > x) + (y == x) / 2 for x in a for y in b]))
  assert auc(np.array([1., 2]), np.array([3., 4])) == 1 and auc(np.array([3., 4]), np.array([1., 2])) == 0

def test_contrast(monkeypatch):
  k = some_images(6, (1, 8, 12))
  assert (contrast("inverted", k) == 255 - k).all()
  assert (contrast("shifted", k)[:, :, 2:, 3:] == k[:, :, :-2, :-3]).all()
  colours = np.full((4, 3, 5, 5), 7, np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]
  monkeypatch.setattr(data, "load", lambda name, split, data_dir: (colours, np.zeros(4)))
  assert np.array_equal(contrast("x", k), np.full((4, 1, 8, 12), 7) + np.arange(4).reshape(4, 1, 1, 1))
  assert contrast("x", some_images(2, (3, 4, 4))).shape == (2, 3, 4, 4)
  for images, others in ((some_images(2, (5, 4, 4)), colours), (k, colours[:, :2]), (k, colours / np.float32(255))):
    monkeypatch.setattr(data, "load", lambda name, split, data_dir, others=others: (others, np.zeros(4)))
    refused(lambda images=images: contrast("x", images), "x has", "channels")

# *** not in the paper: the ODE ***

def log_normal(x, m, s): return -((x - m) / s)**2 / 2 - math.log(s * math.sqrt(2 * math.pi))

def test_ode_density_of_a_gaussian():
  d, x = DDPM(), rng(2).normal(0.1, 0.25, (6, 1, 2, 2))
  want = log_normal(x, 0.1, 0.25).reshape(6, -1).sum(1)
  got = ode_log_density(d, gaussian_model(d, 0.1, 0.25), Tensor(x.astype(np.float32)), 100, batch=4)
  assert got.shape == (6,) and np.abs(np.expm1(got.numpy() - want)).max() < 0.01

@pytest.mark.parametrize("s,start,steps", [
  (0.25, 0.5, 100), (0.25, 0.1, 100), (0.25, 0.003, 100), (1e-6, 2/255/12**0.5, 30), (1e-6, 0.05, 30)])
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
    got = on_levels(f32(y + a * s * s), Tensor(np.array([s], np.float32))).numpy()
    close(got, (w * k).sum(-1) / w.sum(-1), atol=2e-6 if s > 0.0008 else 1e-4)  # half-way between two a hair decides
  ends = on_levels(f32([[[[-1.3, 1.01]]]]), Tensor(np.array([s], np.float32)))
  assert ends.numpy().ravel().tolist() == [-1, 1]

def mixture_model(d, a, s):
  """The exact eps for pixels (N(-a, s²) + N(a, s²)) / 2."""
  ab = d.alpha_bar
  var, mean, sigma = table(ab * s * s + 1 - ab), table(np.sqrt(ab) * a), table(np.sqrt(1 - ab))
  return lambda x, t: sigma(t) * (x - mean(t) * (x * mean(t) / var(t)).tanh()) / var(t)

@pytest.mark.parametrize("schedule", ("linear", "cosine", "geometric"))
def test_ode_density_of_a_mixture(schedule):
  d, x = DDPM(schedule=schedule), rng(3).normal(0, 0.12, (5, 1, 1, 2)) + 0.5 * rng(4).choice([-1, 1], (5, 1, 1, 2))
  x[0] = 0.0, 0.1  # between the modes too
  want = np.logaddexp(log_normal(x, 0.5, 0.12), log_normal(x, -0.5, 0.12)).reshape(5, -1).sum(1) - 2 * LOG2
  got = ode_log_density(d, mixture_model(d, 0.5, 0.12), x, 120).numpy()
  assert np.abs(np.expm1(got - want)).max() < 0.02

def test_hutchinson_on_correlated_pixels():
  """N(0, S) with S full: the estimates scatter around the density, the less the more steps they are drawn in. Of one
  pixel there is nothing to estimate: v² = 1 for both signs."""
  d, S = DDPM(200, 1e-3, 0.1), np.array([[0.2, 0.12, 0.05], [0.12, 0.3, -0.1], [0.05, -0.1, 0.25]])
  x = rng(5).multivariate_normal(np.zeros(3), S, 1).reshape(1, 1, 1, 3)
  precision = [np.linalg.inv(a * S + (1 - a) * np.eye(3)) * math.sqrt(1 - a) for a in d.alpha_bar]
  P = Tensor(np.array(precision, np.float32)).realize()
  model = lambda x, t: (P[t] @ x.reshape(-1, 3, 1)).reshape(x.shape)
  want = -(x.ravel() @ np.linalg.solve(S, x.ravel()) + np.linalg.slogdet(2 * math.pi * S)[1]) / 2
  few, many = [ode_log_density(d, model, x[[0] * 400], steps, batch=400).numpy() for steps in (15, 60)]
  assert few.std() > 0.01 and abs(many.mean() - want) < 0.01 + 4 * many.std() / 20
  assert 0.4 < many.std() / few.std() < 0.7
  one = gaussian_model(d, 0.1, 0.25)
  draws = ode_log_density(d, one, np.full((40, 1, 1, 1), 0.3), 30, batch=40).numpy()
  assert draws.std() < 1e-5 and abs(draws[0] - log_normal(0.3, 0.1, 0.25)) < 0.02

@pytest.mark.parametrize("schedule", ("linear", "cosine", "quad", "const", "geometric"))
def test_ode_grid(schedule):
  """Every number of steps up to T there is; between wide whole times each is taken, elsewhere log s grows evenly."""
  for T, start in itertools.product((1, 2, 10, 1000), (0.0, 1 / 765)):
    d = DDPM(T, schedule=schedule)
    for n in {1, 2, 5, T // 2, T - 1, T} & set(range(1, T + 1)):
      s, t = map(np.array, zip(*ode_grid(d, n, start)))
      assert len(t) <= n + 1 and (start or len(t) == n + 1) and t[-1] == T and (np.diff(s) > 0).all()
      assert s[-1] == math.sqrt(1 / d.alpha_bar[-1] - 1) and s[0] == pytest.approx(start, rel=1e-4)
  s, t = map(np.array, zip(*ode_grid(d, 50, 1 / 765)))
  wide = np.diff(np.log(s))
  close(wide[(np.diff(t) > 1) & (t[:-1] > 50)], np.median(wide), rtol=0.2)

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
  refused(lambda: ode_log_density(d, model, np.zeros((4, 4)), 3), "(n, C, H, W)", "(4, 4)")
  refused(lambda: ode_log_density(d, lambda x, t: x * math.nan, x, 3), "diverged")

def test_few_steps_of_the_ode_give_a_normals_density():
  """Also no less than it: too large a density would be a bound that is none. Heun's method alone is off by -0.009."""
  d, sd = DDPM(), 0.3
  model, x = gaussian_model(d, 0, sd), rng(3).normal(0, sd, (400, 1, 1, 1))
  for steps, most in ((4, 2), (10, 0.12), (20, 0.02), (50, 2e-3)):
    off = (log_normal(x, 0, sd).ravel() - ode_log_density(d, model, x, steps, start=1 / 765).numpy()) / LOG2
    assert (-2e-4 if steps > 10 else -most) < off.mean() < most, (steps, off.mean())

def test_dequantization(monkeypatch):
  """A density that is uniform over the 256 bins needs 8 bits; every point stays in its bin and fills it."""
  seen = []
  def uniform(d, model, x, steps, seed, start, discrete):
    seen.append(np.asarray(x))
    assert start == pytest.approx((x - scaled(k)).std(), rel=0.05)
    return Tensor(np.full(len(x), 16 * math.log(255 / 512), np.float32))  # the bins reach from -256/255 to 256/255
  monkeypatch.setattr(likelihood, "ode_log_density", uniform)
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
  x, sd, log_q = dequantized(k, discrete=True)
  u = ((x - (k / 127.5 - 1)) / sd).reshape(5, -1)
  assert sd == 1 / 765 and u[1:].min() >= -3 and u[:-1].max() <= 3 and u[0].min() < -3.1 and u[4].max() > 3.1
  for i, (low, high) in enumerate(((-math.inf, 3), (-3, 3), (-3, 3), (-3, 3), (-3, math.inf))):
    entropy, deviation = truncated(low, high)
    assert abs(-log_q[i] / 10_000 - entropy - math.log(sd)) < 0.03 and abs(u[i].std() - deviation) < 0.03
  v = np.linspace(-3, 3, 6001)  # q at the points, from log q's own sum, against a density that integrates to 1
  q = np.exp(-v * v / 2) / np.trapezoid(np.exp(-v * v / 2), v) / sd
  close(log_q[2], np.log(np.interp(u[2], v, q)).sum(), rtol=1e-4)

@pytest.mark.parametrize("discrete,steps", ((False, 50), (True, 60)))
def test_ode_bpd_of_a_gaussian(discrete, steps):
  """The mass of N(m, s²) in each bin; with `discrete` as well, as its density is straight across one: the narrow noise
  by itself would cost log₂ 6 − 2.04 = 0.54 bits."""
  d, (k, want) = DDPM(), gaussian_images(50, 0.1, 0.25, (1, 4, 4))
  got = ode_bpd(d, gaussian_model(d, 0.1, 0.25), k, steps, discrete=discrete).numpy()
  close(got.mean(), want.mean(), atol=0.04 if discrete else 0.02)
  if not discrete: close(got[:30], want[:30], atol=0.02)

# *** the program ***

@pytest.fixture
def program(monkeypatch, tmp_path, capsys):
  """main() on a model without weights and a few images: a function of the flags -> (JSON, stdout, stderr)."""
  state = SimpleNamespace(
    images=gaussian_images(30, 0, 0.3, (1, 8, 8))[0], labels=(np.arange(30) % 3).astype(np.int32), asked=[], read=[],
    config={"image_size": 8, "in_channels": 1, "num_classes": 0}, ddpm={"T": 40, "beta_1": 3e-3, "beta_T": 0.45},
    meta={"dataset": "mnist", "step": 9})
  class Model:
    config = state.config
    def __call__(self, x, t, *y):
      state.asked.append(len(y))
      return 0.8 * x if not y else x * (y[0] + 1).reshape(-1, 1, 1, 1) / 5
  def read(name, split="train", data_dir=None, **how):
    state.read.append((name, split, how))
    return dataset(state.images, state.labels, ["0", "1", "2"], heldout=True)
  monkeypatch.setattr(sample, "open_device", lambda *_: None)  # whose line would be in stderr
  monkeypatch.setattr(checkpoint, "load", lambda path, raw=False: (Model(), {"ddpm": state.ddpm, **state.meta}))
  monkeypatch.setattr(data, "read", read)
  monkeypatch.chdir(tmp_path)
  def run(*flags):
    evaluate.main(["--checkpoint", "c.safetensors", *map(str, flags), "--json", "out/b.json"])
    return json.loads((tmp_path / "out/b.json").read_text()), *capsys.readouterr()
  run.state = state
  return run

@pytest.mark.quick
def test_program(program):
  r, out, err = program("--samples-t", 0, "--n", 12, "--batch", 5, "--seed", 3)
  assert [r[name] for name in ("dims", "n", "seed", "T", "step", "dataset")] == [64, 12, 3, 40, 9, "mnist"]
  assert r["t"] == list(range(1, 41)) and r["L_t"][0] == r["L_0"] == r["distortion"]
  assert r["L_T"] + np.dot(r["weight"], r["L_t"]) == pytest.approx(r["bits_per_dim"])
  assert r["rate"] + r["distortion"] == pytest.approx(r["bits_per_dim"])
  assert len(set(r["index"])) == 12 and np.mean(r["per_image"]) == pytest.approx(r["bits_per_dim"])
  assert r["standard_error"] == pytest.approx(np.std(r["per_image"], ddof=1) / math.sqrt(12))
  b = bound(DDPM(**program.state.ddpm), lambda x, t: 0.8 * x, program.state.images[r["index"]], 3)
  close(r["per_image"], b.total, rtol=1e-5)
  close(r["mse_t"], b.mse_eps.mean(0), rtol=1e-5)
  assert r["mse"] == pytest.approx(np.mean(r["mse_t"]))
  assert r["rmse"] == pytest.approx(127.5 * math.sqrt(b.mse_x0[:, 0].mean()), rel=1e-5)
  assert "64 dimensions" in out and f"{r['bits_per_dim']:.6f}" in out and f"± {r['standard_error']:.6f}" in out
  assert program.state.read == [("mnist", "test", {})] and not err

def test_default_is_stratified_and_more_estimates(program):
  r, out, err = program("--n", 10, "--against", "inverted", "--ode", 6, "--naive", 8)
  assert len(r["t"]) == 21 and sum(r["weight"]) == 40 and "unbiased" in r["estimator"] and "unbiased" in out
  assert r["mse"] == pytest.approx(np.dot(r["weight"], r["mse_t"]) / 40)
  d, k, model = DDPM(**program.state.ddpm), program.state.images[r["index"]], lambda x, t: 0.8 * x
  b = bound(d, model, 255 - k, samples_t=20).total
  area = auc(np.array(r["per_image"]), b)
  assert r["against"]["inverted"] == pytest.approx({"auc": area, "bits_per_dim": b.mean(), "n": 10}, rel=1e-5)
  assert r["ode"]["bits_per_dim"] == pytest.approx(ode_bpd(d, model, k, 6).numpy().mean(), rel=1e-4)
  eq3, drawn, kl = trajectory_bound(d, model, k[:1].repeat(8, 0))
  assert [r["naive"][name] for name in ("eq3", "eq5")] == pytest.approx([eq3.mean(), kl.sum(1).mean()], rel=1e-4)
  assert r["naive"]["variance_falls"] == pytest.approx(drawn.var(0).sum() / kl.var(0).sum(), rel=1e-2)
  assert r["naive"]["index"] == r["index"][0] and r["naive"]["n"] == 8

def test_warning_when_L_T_is_not_close_to_zero(program):
  program.state.ddpm = {"T": 40, "beta_1": 1e-3, "beta_T": 0.1}
  r, out, err = program("--n", 1, "--samples-t", 7)
  assert r["L_T"] > 1e-3 and err.startswith("evaluate.py: warning: L_T") and err.count("\n") == 1
  assert r["standard_error"] is None and "± nan" in out and len(r["t"]) == 8

@pytest.mark.parametrize("meta, flags, clip", [
  ({}, [], True), ({"clip": True}, [], True), ({"clip": False}, [], False), ({"clip": True}, ["--no-clip"], False)])
def test_clips_as_the_checkpoint_says(program, monkeypatch, meta, flags, clip):
  """In every estimate that clips; sample.py does the same."""
  program.state.meta |= meta
  seen, both = [], (bound, trajectory_bound)
  for f in both:
    monkeypatch.setattr(evaluate, f.__name__, lambda *a, f=f, **kw: seen.append(kw["clip"]) or f(*a, **kw))
  r = program("--n", 2, "--samples-t", 1, "--naive", 2, "--against", "shifted", *flags)[0]
  assert seen == [clip] * 3 and r["clip"] == clip
  want = bound(DDPM(**program.state.ddpm), lambda x, t: 0.8 * x, program.state.images[r["index"]], 0, 1, clip=clip)
  close(r["per_image"], want.total, rtol=1e-5)

def test_labels(program, monkeypatch):
  program.state.config["num_classes"], seen = 3, []
  monkeypatch.setattr(evaluate, "bound", lambda *a, **kw: seen.append(kw) or bound(*a, **kw))
  none, true = [program("--n", 6, "--samples-t", 1, "--ode", 1, "--naive", 2, *f)[0] for f in ([], ["--labels"])]
  assert set(program.state.asked) == {1} and none["index"] == true["index"]
  assert seen[0]["labels"].tolist() == [3] * 6
  assert np.array_equal(seen[1]["labels"], program.state.labels[true["index"]])
  assert not np.isclose(none["per_image"], true["per_image"]).any()
  for name, key in (("ode", "bits_per_dim"), ("naive", "eq3")): assert none[name][key] != true[name][key]

def test_labels_are_compared_by_name(program, monkeypatch):
  """The images' set has the classes 0, 1, 2; the model knows them in another order, and one more."""
  program.state.config["num_classes"], seen = 4, []
  monkeypatch.setattr(evaluate, "bound", lambda *a, **kw: seen.append(kw["labels"]) or bound(*a, **kw))
  program.state.meta["classes"] = ["2", "0", "more", "1"]
  r = program("--n", 6, "--samples-t", 1, "--labels")[0]
  assert seen[0].tolist() == [[1, 3, 0][k] for k in program.state.labels[r["index"]]]
  program.state.meta["classes"] = ["2", "0", "more", "still more"]
  refused(lambda: program("--labels", "--samples-t", 1), "--labels", "other classes")

def test_images_are_read_as_for_training(program):
  """By what the checkpoint says of them, however the dataset is spelled; an array keeps its channels."""
  program.state.meta |= {"dataset": "a/folder", "how": (how := dict(size=None, fit="pad", mode="gray", multiple=4))}
  program("--n", 1, "--samples-t", 1, "--split", "train")
  for name in ("./a/folder/", "an.npz", "cifar10"): program("--n", 1, "--samples-t", 1, "--dataset", name)
  assert program.state.read == [("a/folder", "train", how), ("./a/folder/", "test", how),
                                ("an.npz", "test", how | {"mode": None, "size": (8, 8)}), ("cifar10", "test", {})]

def test_images_of_another_size_are_brought_into_the_models(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  for side in (10, 20):
    (folder := tmp_path / str(side)).mkdir()
    Image.fromarray(rng(side).integers(0, 256, (side, side), np.uint8)).save(folder / "a.png")
  meta = {"dataset": str(tmp_path / "10"), "how": {"size": None, "fit": "pad", "mode": None, "multiple": 4}}
  for spelled in ("10", "x/../10"):
    (tmp_path / "x").mkdir(exist_ok=True)
    found = read_set(str(tmp_path / spelled), "test", None, (8, 8), meta)
    assert np.array_equal(found.images[0, 0], np.asarray(Image.open(tmp_path / "10" / "a.png"))[1:9, 1:9])
  assert read_set(str(tmp_path / "20"), "test", None, (8, 8), meta).images.shape == (1, 1, 8, 8)

@pytest.mark.parametrize("flags, words", [
  ("--n 0", "--n '0' 1 or more"), ("--n 31", "--n 31 30"), ("--samples-t 41", "40 times"), ("--ode 41", "40 times"),
  ("--seed -1", "--seed '-1' from 0 to"), ("--seed 2147483648", "--seed from 0 to"),
  ("--batch x", "--batch 'x' from 1 to"), ("--batch 65537", "--batch to 65536"), ("--naive 1", "--naive 2 or more"),
  ("--split dev", "--split train"),
  ("--labels", "--labels without classes"), ("--nonsense", "--nonsense"), ("--js x", "--js"),
  ("--json f/x.json", "cannot write f/x.json"), ("--json ./f/..", "cannot write ./f/..")])
def test_one_sentence_for_bad_flags(program, flags, words, tmp_path):
  (tmp_path / "f").write_text("a file, no folder")
  refused(lambda: evaluate.main(["--checkpoint", "c.safetensors", *flags.split()]), *words.split())
  assert not program.state.asked  # before any work

def test_mismatches_are_said(program, monkeypatch):
  for key, value, words in (("image_size", 16, "(1, 16, 16)"), ("image_size", (8, 4), "(1, 8, 4)"),
                            ("in_channels", 3, "(3, 8, 8)")):
    with pytest.MonkeyPatch.context() as m:
      m.setitem(program.state.config, key, value)
      refused(program, "mnist", "(1, 8, 8)", words)
  program.state.config["num_classes"] = 2
  refused(lambda: program("--labels"), "--labels", "other classes")
  program.state.config["num_classes"] = 3
  refused(lambda: program("--labels", "--against", "cifar10"), "--labels", "other classes")
  del program.state.meta["dataset"]
  refused(program, "--dataset")
  program.state.ddpm = {"steps": 3}
  refused(program, "c.safetensors")

def test_floats_have_no_decoder(program, monkeypatch):
  floats = rng().random((4, 1, 8, 8))
  read = data.read
  monkeypatch.setattr(data, "read", lambda *a, **how: read(*a)._replace(images=floats, limits=(0.0, 1.0)))
  refused(program, "mnist", "256 levels", "Eq. 13")

def test_no_traceback(tmp_path):
  command = [sys.executable, ROOT/"evaluate.py", "--checkpoint", "none.safetensors"]
  r = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert r.returncode == 1 and r.stderr.splitlines()[-1].startswith("evaluate.py: ") and "none.safetensors" in r.stderr
  assert "Traceback" not in r.stderr and not r.stdout

# *** not in the paper: the quality of samples ***

def test_sliced_wasserstein_distance():
  a = np.clip(rng(1).normal(100, 10, (3000, 1, 4, 4)), 0, 255).round().astype(np.uint8)
  shift = np.array([0, 60] * 8, np.uint8).reshape(1, 1, 4, 4)
  assert sliced_wasserstein(a, a[::-1]) < 1e-3
  close(sliced_wasserstein(a, a + shift), np.sqrt(60**2 / 2), rtol=0.05)  # a shift: its root mean square
  b = np.clip(rng(2).normal(100, 30, (3000, 1, 4, 4)), 0, 255).round().astype(np.uint8)
  close(sliced_wasserstein(a, b), 20, rtol=0.05)  # W₂ of N(m, 10²) and N(m, 30²)

@pytest.fixture
def compared(tmp_path, monkeypatch, capsys):
  """main() in a folder of its own: a function of flags -> the two distances, all that is printed, what was compared."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(quality, "open_device", lambda *_: None)
  seen, distance = [], quality.sliced_wasserstein
  monkeypatch.setattr(quality, "sliced_wasserstein", lambda a, b, **kw: seen.append((a, b)) or distance(a, b, **kw))
  def run(*flags):
    seen.clear()
    evaluate.main([*map(str, flags)])
    out = capsys.readouterr().out
    return [float(v) for v in re.findall(r" (\d+\.\d{6}) ", out)], out, seen
  return run

def test_some_of_the_samples_are_drawn_at_random(compared, tmp_path):
  """A file of rows of classes begins with one class."""
  x = np.repeat(np.uint8([10, 200]), 50).reshape(-1, 1, 1, 1) + np.arange(256, dtype=np.uint8).reshape(16, 16) % 9
  pictures.save_npz(tmp_path / "x.npz", x)
  for seed in (0, 1):
    taken = compared("--samples", "x.npz", "--dataset", "x.npz", "--n", 20, "--seed", seed)[2][0][0]
    assert len(taken) == 20 and 4 < (taken.mean((1, 2, 3)) > 100).sum() < 16
  assert len(compared("--samples", "x.npz", "--dataset", "x.npz")[2][0][0]) == 100

def test_samples_are_compared_with_the_checkpoints_images(compared, tmp_path, monkeypatch):
  """Read as for training, with --split; as many training images; and --n is of the samples."""
  for half, n in (("train", 30), ("test", 20)):
    (folder := tmp_path / "set" / half).mkdir(parents=True)
    for i in range(n): Image.fromarray(rng([n, i]).integers(0, 256, (8, 12), np.uint8)).save(folder / f"{i}.png")
  how = {"size": [6, 6], "fit": "pad", "mode": None, "multiple": 2}
  monkeypatch.setattr(checkpoint, "load", lambda path, raw=False: (None, {"dataset": "set", "how": how}))
  made = rng(5).integers(0, 256, (10, 1, 6, 6), np.uint8)
  pictures.save_npz(tmp_path / "made.npz", made)
  _, out, seen = compared("--samples", "made.npz", "--checkpoint", "c.safetensors", "--n", 7)
  (a, b), (real, c) = seen
  kept = [i for i, x in enumerate(made) if any(np.array_equal(x, v) for v in a)]
  assert len(kept) == 7 and np.array_equal(a, made[kept]) and b is c
  assert "7 samples to 20 test images" in out and "of 255" in out
  assert np.array_equal(b, data.load("set", "test", size=(6, 6), fit="pad")[0])
  train = {x.tobytes() for x in data.load("set", "train", size=(6, 6), fit="pad")[0]}
  assert len(real) == 7 and {x.tobytes() for x in real} < train
  # of another dataset in the samples' size; without a checkpoint
  out = compared("--samples", "made.npz", "--dataset", "set", "--split", "train")[1]
  assert "10 samples to 30 train images" in out

def test_samples_of_floats_are_compared_in_their_own_unit(compared, tmp_path):
  """The set reaches from -50 to 150 and the samples, 10 above it, from -40 to 110."""
  x = rng(1).random((200, 1, 4, 4)) * 200 - 50
  x[0, 0, 0, :2] = -50, 150
  np.save(tmp_path / "set.npy", x)
  np.savez(tmp_path / "made.npz", arr_0=np.clip(x, -50, 100).transpose(0, 2, 3, 1) + 10)
  _, out, seen = compared("--samples", "made.npz", "--dataset", "set.npy")
  close(seen[0][0], np.clip(x, -50, 100) + 10, atol=1e-3)
  close(seen[0][1], x, atol=1e-3)
  assert "of 200," in out
  shifted = x + 10
  np.savez(tmp_path / "made.npz", arr_0=shifted.transpose(0, 2, 3, 1))
  assert compared("--samples", "made.npz", "--dataset", "set.npy")[0][0] == pytest.approx(10, rel=0.2)

def test_samples_that_are_refused(compared, tmp_path, monkeypatch):
  np.save(tmp_path / "set.npy", some_images(20))
  np.savez(tmp_path / "pickle.npz", arr_0=np.array([{}], object))
  (tmp_path / "no.npz").write_bytes(b"PK\3\4 no zip")
  np.savez(tmp_path / "colour.npz", arr_0=some_images(5, (4, 4, 3)))
  np.savez(tmp_path / "floats.npz", arr_0=rng().random((5, 4, 4, 1)))
  for name, word in (("pickle", ""), ("no", ""), ("none", "there is no"), ("colour", "(1, 4, 4)"), ("floats", "float")):
    refused(lambda name=name: compared("--samples", f"{name}.npz", "--dataset", "set.npy"), f"{name}.npz", word)
  np.savez(tmp_path / "good.npz", arr_0=some_images(5, (4, 4, 1)))
  monkeypatch.setattr(checkpoint, "load", lambda path, raw=False: (None, {}))
  refused(lambda: compared("--samples", "good.npz", "--checkpoint", "c.safetensors"), "--dataset")
  good = "--samples", "good.npz", "--dataset", "set.npy"
  for flags in (["--labels"], ["--raw"], ["--ode", 3], ["--naive", 3], ["--against", "shifted"], ["--samples-t", 3],
                ["--samples-t", 0], ["--dtype", "float16"], ["--n", 6]):
    refused(lambda flags=flags: compared(*good, *flags), flags[0])
  refused(lambda: compared(*good, "--json", "./good.npz"), "good.npz would be written over")
  (tmp_path / "photos").mkdir()
  np.savez(tmp_path / "photos" / "good.npz", arr_0=some_images(5, (4, 4, 1)))
  Image.fromarray(some_images(1, (4, 4))[0]).save(tmp_path / "photos" / "a.png")
  inside = "--samples", "photos/good.npz", "--dataset", "photos"
  refused(lambda: compared(*inside, "--json", "photos/dataset.json"), "photos/dataset.json would lie among the images")
  refused(lambda: compared(*inside, "--nearest", 2), "photos/good.nearest.png would lie among the images of photos")
  (tmp_path / "v1.5").mkdir()  # of a folder, the picture is beside it, under its whole name
  assert quality.beside(str(tmp_path / "v1.5")) == quality.beside(f"{tmp_path}/v1.5/../v1.5/") == \
    str(tmp_path / "v1.5.nearest.png")
  assert sorted(f.name for f in (tmp_path / "photos").iterdir()) == ["a.png", "good.npz"]
  (tmp_path / "c.safetensors").touch()
  refused(lambda: compared(*good, "--checkpoint", "c.safetensors", "--json", "c.safetensors"), "written over")
  (tmp_path / "good.nearest.png").mkdir()
  refused(lambda: compared(*good, "--nearest", 2), "cannot write good.nearest.png")
  refused(lambda: compared("--ode-levels"), "--ode STEPS")

def test_what_is_left_out_and_what_is_not_held_out_is_said(tmp_path, capsys, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  for half, n in (("train", 3), ("test", 2)):
    (folder := tmp_path / "set" / half).mkdir(parents=True)
    for i in range(n): Image.fromarray(rng([n, i]).integers(0, 256, (8, 8), np.uint8)).save(folder / f"{i}.png")
  (tmp_path / "set" / "train" / "3.png").write_text("broken")
  for name, words in (("set", ["3.png"]), ("set/test", ["not split"])):
    evaluate.main(["--samples", str(tmp_path / "set" / "train"), "--dataset", str(tmp_path / name)])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "3.png" in said[0] and all(word in said[1] for word in words), said

# *** not in the paper: LeNet, and the nearest training images ***

def test_frechet_distance():
  """Closed forms: a scaled and shifted copy; and for 2x2, tr M^½ = (tr M + 2 √det M)^½ of M = Σ_a Σ_b."""
  a = rng(1).standard_normal((500, 7)) * np.arange(1, 8) + 3
  close(lenet.frechet(a, a), 0, atol=1e-8)
  m = np.linspace(-2, 2, 7)
  close(lenet.frechet(a, 0.4 * a + m), np.square(0.6 * a.mean(0) - m).sum() + 0.36 * a.var(0, ddof=1).sum(), rtol=1e-9)
  a, b = rng(2).standard_normal((2, 400, 2)) @ np.array([[[1, 2], [0, 1.]], [[3, 0], [-1, 0.5]]])
  A, B = np.cov(a.T), np.cov(b.T)
  root = np.sqrt(np.trace(A @ B) + 2 * np.sqrt(np.linalg.det(A @ B)))
  close(lenet.frechet(a, b), np.square(a.mean(0) - b.mean(0)).sum() + np.trace(A) + np.trace(B) - 2 * root, rtol=1e-9)

def test_nearest_images():
  known = rng(1).integers(0, 256, (4500, 1, 5, 4), np.uint8)  # in three parts
  index = rng(2).permutation(4500)[:700]
  close(lenet.nearest(known[index], known), (index, np.zeros(700)))
  moved = known[index].astype(np.float32) + np.array([3, 0, 4, 0], np.float32)
  close(lenet.nearest(moved, known), (index, np.full(700, 2.5)), rtol=1e-5)  # √((9 + 16) / 4)

def test_distances_are_printed_before_a_lenet_is_trained(monkeypatch, capsys, tmp_path):
  def stopped(*_): raise KeyboardInterrupt
  monkeypatch.setattr(lenet, "trained", stopped)
  x = some_images(20, (1, 16, 16))
  with pytest.raises(KeyboardInterrupt):
    lenet.report_nearest(x[:4], data.read(x, labels=np.arange(20) % 2), x[:3], 2, str(tmp_path / "a.png"))
  assert re.findall(r"image, (\w+).* 0\.0", capsys.readouterr().out) == ["samples", "test"]

@pytest.mark.slow
def test_lenet_and_nearest_at_the_terminal(compared, tmp_path, monkeypatch):
  """Two classes, dark and bright; the samples are ten training images. LeNets are kept: a second run trains none."""
  monkeypatch.setattr(lenet, "SEEDS", 2)
  made, adam = [], lenet.nn.optim.Adam
  monkeypatch.setattr(lenet.nn.optim, "Adam", lambda *a, **how: made.append(adam(*a, **how)) or made[-1])
  x = rng(1).integers(0, 60, (96, 1, 16, 16), np.uint8) + np.arange(96, dtype=np.uint8).reshape(-1, 1, 1, 1) % 2 * 150
  np.savez(tmp_path / "set.npz", images=x, labels=np.arange(96) % 2)
  pictures.save_npz(tmp_path / "made.npz", x[:10])
  flags = "--samples", "made.npz", "--dataset", "set.npz", "--lenet", "--nearest", 3, "--json", "r.json"
  out = compared(*flags)[1]
  first = json.loads((tmp_path / "r.json").read_text())
  close([v.b1_t.item() for v in made], 0.9 ** (10 * 96 // 32), rtol=1e-4)  # each step has moved Adam's own state
  assert "10 samples to 96 test images" in out and "over 2 LeNets" in out and "of which a LeNet is sure" in out
  assert first["lenet"]["right_of_test_images"]["each"] == [100, 100]
  assert [*first["nearest"]] == ["samples"]  # the set is not split: no image is apart from those of training
  assert first["nearest"]["samples"] == [0.0] * 10 and len(first["lenet"]["Fréchet_LeNet_distance"]["each"]) == 2
  assert Image.open(tmp_path / "made.nearest.png").size[0] >= 720
  features, p = lenet.answers(lenet.trained(data.read(tmp_path / "set.npz"), 0), x)
  assert features.shape == (96, 84) and (p.argmax(1) == np.arange(96) % 2).all()
  monkeypatch.setattr(lenet.nn.optim, "Adam", lambda *_, **__: pytest.fail("a LeNet is trained again"))
  compared(*flags)
  assert json.loads((tmp_path / "r.json").read_text()) == first
  refused(lambda: compared("--lenet"), "--samples")
  np.savez(tmp_path / "one.npz", images=x)
  refused(lambda: compared("--samples", "made.npz", "--dataset", "one.npz", "--lenet"), "--lenet", "1 classes")
