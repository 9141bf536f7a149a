"""evaluate.py and beyond.py: which terms of the bound are drawn, rate and distortion, the ODE, outliers, programs."""
import itertools, json, math, subprocess, sys, types
import numpy as np
import pytest
from PIL import Image
import beyond, data, evaluate
from beyond import auc, ode_bpd, ode_grid, ode_log_density
from common import ROOT, close, f32, rng
from ddpm import DDPM
from evaluate import bound, rate_distortion, times, trajectory_bound
from files import checkpoint, estimates, pictures
from engine.batches import geometric
from engine.streams import stream
from test_ddpm import gaussian_images, gaussian_model, scaled, some_images, table
from tinygrad import Tensor

LOG2 = math.log(2)

# *** the bound ***

def test_L_T_of_the_papers_schedule():
  k = np.concatenate([some_images(3), np.zeros((1, 1, 4, 4), np.uint8), np.full((1, 1, 4, 4), 255, np.uint8)])
  b = bound(DDPM(), lambda x, t: x, k, samples_t=1)
  a = math.prod(1 - x for x in np.linspace(1e-4, 0.02, 1000))
  close(b["L_T"], (a * scaled(k)**2 - a - math.log1p(-a)).mean((1, 2, 3)) / 2 / LOG2, rtol=1e-3)
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
  for x in (k, Tensor(k), scaled(k), Tensor(scaled(k).astype(np.float32))): assert np.array_equal(data.levels(x), k)
  for bad in (scaled(k) + 0.003, k[0], k[:0], scaled(k) * 2, scaled(k) * math.nan):
    with pytest.raises(ValueError): data.levels(bad)
  with pytest.raises(ValueError, match="not finite"): bound(DDPM(2), lambda x, t: x * math.nan, k)

def test_model_that_reads_the_host_is_not_captured():
  d, k = DDPM(2, 0.01, 0.5), some_images(2)
  host = lambda x, t: Tensor(x.numpy() * t.numpy().astype(np.float32).reshape(-1, 1, 1, 1) / 9)
  plain = lambda x, t: x * t.reshape(-1, 1, 1, 1) / 9
  close(bound(d, host, k, batch=2)["L"], bound(d, plain, k, batch=2)["L"], rtol=1e-5)

def test_each_use_of_randomness_is_a_stream_of_its_own(monkeypatch):
  seen, k = set(), some_images(3)
  def watched(seed, use, *index): return (seen.add((use, *index)), stream(seed, use, *index))[1]
  for module in (evaluate, beyond, estimates): monkeypatch.setattr(module, "stream", watched)
  monkeypatch.setattr(data, "load", lambda *a: (k, np.zeros(3)))
  d, model = DDPM(2, 0.1, 0.5), lambda x, t: x
  bound(d, model, k, 7, samples_t=1)
  trajectory_bound(d, model, k, 7)
  ode_bpd(d, model, k, 2, 7)
  beyond.contrast("x", k, seed=7)
  beyond.sliced_wasserstein(k, k, 5, 7)
  estimates.choose(9, 3, 7, "evaluated images")
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
  plot, drawn = pictures.plot, []
  monkeypatch.setattr(pictures, "plot", lambda series, *a: drawn.extend(series.values()) or plot(series, *a))
  evaluate.save_rate_distortion(tmp_path / "a" / "rd.csv", rows)
  close(drawn, [[rows[:, i], rows[:, j]] for i, j in ((0, 3), (0, 2), (2, 3))])
  lines = (tmp_path / "a" / "rd.csv").read_text().splitlines()
  assert lines[0] == "reverse_step,t,rate_bits_per_dim,distortion_rmse"
  close(np.array([[float(v) for v in line.split(",")] for line in lines[1:]]), rows, rtol=1e-6)
  image = Image.open(tmp_path / "a" / "rd.png")
  assert image.size == (2160, 440) and len({image.crop((x, 0, x + 720, 440)).tobytes() for x in (0, 720, 1440)}) == 3

# *** not in the paper: outliers ***

def test_auc_counts_pairs():
  for seed in range(5):
    a, b = rng(seed).integers(0, 8, 13) / 8, rng(seed + 50).integers(2, 10, 9) / 8  # with ties
    assert auc(a, b) == pytest.approx(np.mean([(y > x) + (y == x) / 2 for x in a for y in b]))
  assert auc(np.array([1., 2]), np.array([3., 4])) == 1 and auc(np.array([3., 4]), np.array([1., 2])) == 0

def test_contrast(monkeypatch):
  k = some_images(6, (1, 8, 12))
  assert (beyond.contrast("inverted", k) == 255 - k).all()
  assert (beyond.contrast("shifted", k)[:, :, 2:, 3:] == k[:, :, :-2, :-3]).all()
  colours = np.full((4, 3, 5, 5), 7, np.uint8) + np.arange(4, dtype=np.uint8)[:, None, None, None]
  monkeypatch.setattr(data, "load", lambda name, split, data_dir: (colours, np.zeros(4)))
  assert np.array_equal(beyond.contrast("x", k), np.full((4, 1, 8, 12), 7) + np.arange(4).reshape(4, 1, 1, 1))
  assert beyond.contrast("x", some_images(2, (3, 4, 4))).shape == (2, 3, 4, 4)

# *** not in the paper: the ODE ***

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
    got = beyond.on_levels(f32(y + a * s * s), Tensor(np.array([s], np.float32))).numpy()
    close(got, (w * k).sum(-1) / w.sum(-1), atol=2e-6 if s > 0.0008 else 1e-4)  # half-way between two a hair decides
  ends = beyond.on_levels(f32([[[[-1.3, 1.01]]]]), Tensor(np.array([s], np.float32)))
  assert ends.numpy().ravel().tolist() == [-1, 1]

def mixture_model(d, a, s):
  """The exact eps for pixels (N(-a, s²) + N(a, s²)) / 2."""
  ab = d.alpha_bar
  var, mean, sigma = table(ab * s * s + 1 - ab), table(np.sqrt(ab) * a), table(np.sqrt(1 - ab))
  return lambda x, t: sigma(t) * (x - mean(t) * (x * mean(t) / var(t)).tanh()) / var(t)

@pytest.mark.parametrize("schedule", ("linear", "cosine", "geometric"))
def test_ode_density_of_a_mixture(schedule):
  d, x = DDPM(schedule=schedule), rng(3).normal(0, 0.12, (8, 1, 1, 2)) + 0.5 * rng(4).choice([-1, 1], (8, 1, 1, 2))
  x[0] = 0.0, 0.1  # between the modes too
  want = np.logaddexp(log_normal(x, 0.5, 0.12), log_normal(x, -0.5, 0.12)).reshape(8, -1).sum(1) - 2 * LOG2
  got = ode_log_density(d, mixture_model(d, 0.5, 0.12), x, 200).numpy()
  assert np.abs(np.expm1(got - want)).max() < 0.01

def test_hutchinson_on_correlated_pixels():
  """N(0, S) with S full: probes=0 is exact, the probes scatter around it, the less the more there are or the more steps
  they are drawn in."""
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
  assert 0.4 < ode_log_density(d, model, x, 40, probes=1, batch=400).numpy().std() / draws.std() < 0.7

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
  with pytest.raises(ValueError, match="probes"): ode_log_density(d, model, np.zeros((1, 1, 9, 9)), 3, probes=0)
  with pytest.raises(ValueError, match="probes"): ode_log_density(d, model, x, 3, probes=-1)

def test_dequantization(monkeypatch):
  """A density that is uniform over the 256 bins needs 8 bits; every point stays in its bin and fills it."""
  seen = []
  def uniform(d, model, x, steps, seed, start, discrete):
    seen.append(np.asarray(x))
    assert start == pytest.approx((x - scaled(k)).std(), rel=0.05)
    return Tensor(np.full(len(x), 16 * math.log(255 / 512), np.float32))  # the bins reach from -256/255 to 256/255
  monkeypatch.setattr(beyond, "ode_log_density", uniform)
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
  x, sd, log_q = beyond.dequantized(k, discrete=True)
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
  d, (k, want) = DDPM(), gaussian_images(100, 0.1, 0.25, (1, 4, 4))
  got = ode_bpd(d, gaussian_model(d, 0.1, 0.25), k, steps, discrete=discrete).numpy()
  close(got.mean(), want.mean(), atol=0.04 if discrete else 0.02)
  if not discrete: close(got[:30], want[:30], atol=0.02)

# *** the program ***

@pytest.fixture
def program(monkeypatch, tmp_path, capsys):
  """main() on a model without weights and a few images: a function of the flags -> (JSON, stdout, stderr)."""
  state = types.SimpleNamespace(
    images=gaussian_images(30, 0, 0.3, (1, 8, 8))[0], labels=(np.arange(30) % 3).astype(np.int32), asked=[],
    config={"image_size": 8, "in_channels": 1, "num_classes": 0}, ddpm={"T": 40, "beta_1": 3e-3, "beta_T": 0.45},
    dataset="mnist")
  class Model:
    config = state.config
    def __call__(self, x, t, *y):
      state.asked.append(len(y))
      return 0.8 * x if not y else x * (y[0] + 1).reshape(-1, 1, 1, 1) / 5
  meta = lambda: {"ddpm": state.ddpm, "dataset": state.dataset, "step": 9}
  monkeypatch.setattr(evaluate, "open_device", lambda *_: None)  # whose line would be in stderr
  monkeypatch.setattr(checkpoint, "load", lambda path, raw=False: (Model(), meta()))
  monkeypatch.setattr(data, "load", lambda name, split, data_dir=None, size=None: (state.images, state.labels))
  monkeypatch.chdir(tmp_path)
  def run(*flags):
    evaluate.main(["--checkpoint", "c.safetensors", *map(str, flags), "--json", "out/b.json"])
    return json.loads((tmp_path / "out/b.json").read_text()), *capsys.readouterr()
  run.state = state
  return run

@pytest.mark.quick
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
  assert Image.open("outliers.png").size[0] > 100 and Image.open("rd/x.png")
  assert len((tmp_path / "rd" / "x.csv").read_text().splitlines()) == 41

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
  ("--n 0", "--n '0' 1 or more"), ("--n 31", "--n 31 30 images 1 to 30"), ("--every 41", "--every 41 1 to 40"),
  ("--samples-t 40", "--samples-t 40 1 to 39"), ("--every 2 --samples-t 3", "--samples-t --every"),
  ("--ode 41", "--ode 41 1 to 40"), ("--seed -1", "--seed '-1' from 0 to"), ("--batch x", "--batch 'x' from 1 to"),
  ("--batch 65537", "--batch to 65536"), ("--naive 1", "--naive 2 or more"), ("--split dev", "--split train"),
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
  command = [sys.executable, ROOT/"evaluate.py", "--checkpoint", "none.safetensors"]
  r = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
  assert r.returncode == 1 and r.stderr.splitlines()[-1].startswith("evaluate.py: ") and "none.safetensors" in r.stderr
  assert "Traceback" not in r.stderr and not r.stdout

def test_sliced_wasserstein_distance():
  a = np.clip(rng(1).normal(100, 10, (3000, 1, 4, 4)), 0, 255).round().astype(np.uint8)
  shift = np.array([0, 60] * 8, np.uint8).reshape(1, 1, 4, 4)
  assert beyond.sliced_wasserstein(a, a[::-1]) < 1e-3
  close(beyond.sliced_wasserstein(a, a + shift), np.sqrt(60**2 / 2), rtol=0.05)  # a shift: its root mean square
  b = np.clip(rng(2).normal(100, 30, (3000, 1, 4, 4)), 0, 255).round().astype(np.uint8)
  close(beyond.sliced_wasserstein(a, b), 20, rtol=0.05)  # W₂ of N(m, 10²) and N(m, 30²)

def test_samples_are_read_or_refused(tmp_path):
  images = rng().integers(0, 256, (5, 3, 4, 4), dtype=np.uint8)
  pictures.save_npz(tmp_path / "a.npz", images)
  assert np.array_equal(beyond.read_npz(tmp_path / "a.npz"), images)
  np.savez(tmp_path / "b.npz", arr_0=np.array([{}], object))  # a pickle
  (tmp_path / "c.npz").write_bytes(b"PK\3\4 no zip")
  for name in ("b.npz", "c.npz", "none.npz"):
    with pytest.raises((ValueError, OSError), match=name): beyond.read_npz(tmp_path / name)
