"""train.py: the step against float64, what is drawn, and runs that are stopped, killed, continued or refused."""
import dataclasses, inspect, json, math, os, re, shutil, signal, subprocess, sys, time, tracemalloc
from pathlib import Path
from types import SimpleNamespace
import numpy as np
import pytest
from common import ROOT, TINY, arr, close, f32, random_model, refused, rng
from engine import folder
from engine.batches import ahead
from engine.capture import placed
from engine.state import State
from engine.terminal import run as program
from extras import editing, objectives
from files import checkpoint, hub, pictures
from files.weights import read_tensors, write_tensors
from PIL import Image
from tinygrad import Device, GlobalCounters, Tensor, dtypes, helpers, nn
from tinygrad.device import CompileError
import data, sample, train
from ddpm import DDPM
from train import Config
from unet import UNet

IMAGES, LABELS = rng().integers(0, 256, (64, 1, 8, 8), np.uint8), np.arange(64, dtype=np.int32) % 3

@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
  """Where decoded images are kept; compiled kernels stay where they are."""
  with pytest.MonkeyPatch.context() as m:
    m.setenv("CACHEDB", helpers.CACHEDB)
    m.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield

@pytest.fixture(scope="module")
def images(tmp_path_factory):
  """A dataset of 64 small images in three classes."""
  path = tmp_path_factory.mktemp("data")/"images.npz"
  np.savez(path, images=IMAGES, labels=LABELS)
  return path

# *** what most of these tests train: few kernels, and a gradient that can be written down ***

@dataclasses.dataclass
class Affine:
  """The answer w x_t + b t/100 (1 + y)."""
  w:Tensor
  b:Tensor
  def __call__(self, x:Tensor, t:Tensor, y:Tensor|None=None) -> Tensor:
    slope = t.float() / 100 if y is None else t.float() / 100 * (1 + y)
    return x * self.w + self.b * slope.reshape(-1, 1, 1, 1)

def affine(shape=(1, 8, 8)) -> Affine: return Affine(f32(arr(*shape, scale=0.3)), f32(np.full((shape[0], 1, 1), 0.1)))

def config(out, **changes) -> Config:
  return Config(**dict(out=str(out), T=50, beta_T=0.2, batch=8, steps=4, warmup=0, lr=1e-3, sample_every=0) | changes)

def fit(out, images=IMAGES, labels=LABELS, model=None, **changes) -> Path:
  return train.fit(config(out, **changes), images, labels, model or affine())

# the program, with a small U-Net
SMALL = ["--batch", "4", "--channels", "8", "--channel-mult", "1", "--attn", "", "--num-res-blocks", "1", "--T", "50",
         "--dropout", "0.1", "--norm-groups", "4", "--sample-every", "0", "--warmup", "2", "--lr", "1e-3"]

def run(out, source, *flags): train.main([*SMALL, "--dataset", str(source), "--out", str(out), *map(str, flags)])

def contents(out):
  return {f.name: f.read_bytes() for f in sorted(Path(out).iterdir()) if f.is_file() and f.name != "log.jsonl"}

def log(out): return [json.loads(line) for line in (Path(out)/"log.jsonl").read_text().splitlines()]
def losses(out): return [e["loss"] for e in log(out)] if (Path(out)/"log.jsonl").exists() else []
def about(file): return json.loads(read_tensors(file)[1]["ddpm"])
def saved_step(out): return about(out/"last.safetensors")["step"]

# *** a step ***

def by_hand(c:Config, model:Affine):
  """Algorithm 1 in float64 numpy, for Affine: (weights, average, m, v by name; losses and norms of each step)."""
  a = np.cumprod(1 - np.linspace(c.beta_1, c.beta_T, c.T))
  beta = np.append(0, np.linspace(c.beta_1, c.beta_T, c.T))
  a, w = np.append(1, a), {k: getattr(model, k).numpy().astype(np.float64) for k in "wb"}
  ema, m, v = ({k: u * f for k, u in w.items()} for f in (1, 0, 0))
  each, norms = [], []
  for n in range(1, c.steps + 1):
    x, t, eps, y, _ = train.draw(c, IMAGES, LABELS, 3, n)
    col = lambda u: np.reshape(u, (-1, 1, 1, 1))
    x0, root, noise = x / 127.5 - 1, col(np.sqrt(a[t])), col(np.sqrt(1 - a[t]))
    x_t, slope = root * x0 + noise * eps, col(t / 100 * (1 + y * c.class_conditional))
    before = col(a[t-1])
    mu = (np.sqrt(before) * col(beta[t]) * x0 + np.sqrt(1 - col(beta[t])) * (1 - before) * x_t) / noise**2
    target = {"eps": eps, "x0": x0, "mu": mu, "v": root * eps - noise * x0}[c.predict]
    weight = np.minimum(1, c.min_snr * (1 - a[t]) / a[t]) if c.min_snr else np.ones(c.batch)
    error = x_t * w["w"] + w["b"] * slope - target
    each.append((error**2).mean((1, 2, 3)) * weight)
    per_answer = 2 * error * col(weight) / error.size
    g = {"w": (per_answer * x_t).sum(0), "b": (per_answer * slope).sum().reshape(1, 1, 1)}
    norms.append(math.sqrt(sum((u**2).sum() for u in g.values())))
    lr = c.lr * min(1, n / c.warmup) * (1 - (n - 1) / c.anneal)
    for k in w:
      g[k] = g[k] * min(1, c.clip / norms[-1])
      m[k], v[k] = 0.9 * m[k] + 0.1 * g[k], 0.999 * v[k] + 0.001 * g[k]**2
      w[k] = w[k] - lr * (m[k] / (1 - 0.9**n)) / (np.sqrt(v[k] / (1 - 0.999**n)) + 1e-8)
      decay = min(c.ema, (1 + n) / (10 + n))
      ema[k] = decay * ema[k] + (1 - decay) * w[k]
  return w, ema, m, v, each, norms

@pytest.mark.quick
@pytest.mark.parametrize("changes", [
  {}, {"predict": "v", "accum": 4, "flip": True}, {"predict": "x0", "clip": 0.05}, {"predict": "mu"}, {"min_snr": 5.0},
  {"class_conditional": True, "drop_labels": 0.5, "seed": 3}, {"dtype": "bfloat16"}, {"dtype": "float16", "accum": 2}])
def test_five_steps_against_float64(tmp_path, changes):
  c = config(tmp_path, **dict(steps=5, warmup=3, anneal=8, ema=0.3, clip=1e3) | changes)
  model = affine()
  w, ema, m, v, each, norms = by_hand(c, model)
  train.fit(c, IMAGES, LABELS, model)
  got, meta = read_tensors(tmp_path/"last.safetensors")
  rtol = 1e-4 if c.dtype == "float32" else 0.02  # of the products' operands; what is summed up stays in float32
  for k in "wb":
    for key, want in (("raw", w), ("ema", ema)): close(got[f"{key}.{k}"], want[k], rtol=0, atol=3e-7 * rtol / 1e-4)
  for key, want in (("m", m), ("v", v)):
    close(got[f"adam.{key}"], np.append(want["w"], want["b"]), rtol=2 * rtol, atol=rtol * np.abs(want["w"]).max())
  for entry, loss, norm, n in zip(log(tmp_path), each, norms, range(1, 6), strict=True):
    assert entry["loss"] == pytest.approx(loss.mean(), rel=rtol) and entry["grad_norm"] == pytest.approx(norm, rel=rtol)
    assert entry["lr"] == pytest.approx(1e-3 * min(1, n/3) * (1 - (n-1)/8)) and entry["step"] == n
  smooth = each[0].mean()
  for n in range(2, 6): smooth += (each[n-1].mean() - smooth) / n
  assert entry["smooth"] == pytest.approx(smooth, rel=rtol) and json.loads(meta["ddpm"])["smooth"] == entry["smooth"]
  t = np.array([train.draw(c, IMAGES, LABELS, 3, 5).t]).ravel()
  for i, band in enumerate(entry["bands"]):  # the quarters of 1..50: up to 13, 25, 38, 50
    here = [e for e, u in zip(each[4], t) if (1, 14, 26, 39)[i] <= u <= (13, 25, 38, 50)[i]]
    assert (band is None) == (not here) and (not here or band == pytest.approx(np.mean(here), rel=rtol))

def test_16_bits_and_parts_of_a_batch_give_a_u_nets_gradient():
  c, found = Config(batch=4, T=50), []
  loss, batch = train.make_loss(DDPM(T=50), c), train.draw(c, IMAGES, LABELS, 3, 1)
  for dtype, parts in (("float32", 1), ("bfloat16", 2)):
    state = State(random_model(channel_mult=(1,), attn_resolutions=()), train.DTYPES[dtype])
    found += [state.gradient(loss, batch, parts), state.flat["grad"].numpy()]
  each, grad, low_each, low_grad = found
  close(low_each, each, rtol=0.02)
  assert 1e-5 < np.linalg.norm(low_grad - grad) / np.linalg.norm(grad) < 0.05

def test_small_gradients_in_float16():
  """Each is 2.4e-9: float16 has no number between 0 and 6e-8."""
  @dataclasses.dataclass
  class Model:
    w:Tensor
  state = State(Model(f32(np.ones((64, 64)))), dtypes.float16)
  loss = lambda model, x: (x.cast(dtypes.float16) * model.w).flatten(1).float().mean(1) * 1e-5
  assert state.gradient(loss, [np.ones((2, 1, 64, 64), np.float32)]).shape == (2,)
  close(state.flat["grad"].numpy()[:4096], 1e-5 / 4096, rtol=2e-3)

def test_memory_does_not_grow():
  state, c, used = State(affine()), config("none"), []
  loss, update = train.make_loss(DDPM(T=50), c), train.make_update(state, c)
  for n in range(1, 13):
    state.gradient(loss, train.draw(c, IMAGES, LABELS, 3, n))
    update(placed(np.array(train.rates(c, n), np.float32), state.device)).numpy()
    used.append(GlobalCounters.mem_used)
  assert len(set(used[3:])) == 1

# *** objectives ***

def loss_at_each_time(c:Config, model):
  """The loss of one image and one noise at each t = 1..T, and what is needed for Eq. 8."""
  d = DDPM(c.T, c.beta_1, c.beta_T, c.schedule, c.sigma, c.predict)
  t, r = np.arange(1, c.T + 1, dtype=np.int32), rng(3)
  x, eps = r.integers(0, 256, (c.T, 1, 4, 4), np.uint8), r.standard_normal((c.T, 1, 4, 4)).astype(np.float32)
  each = train.make_loss(d, c)(model, Tensor(x), Tensor(t), Tensor(eps), Tensor(t * 0)).numpy().astype(np.float64)
  return d, each, f32(x / 127.5 - 1), Tensor(t), Tensor(eps)

@pytest.mark.parametrize("predict", ("x0", "mu", "v"))
def test_weighted_times_measure_the_bound_whatever_is_predicted(predict):
  """Drawn and weighted, L_simple is Eq. 8 summed over t, for any model, but for one factor."""
  factors = []
  for model in (lambda x, t: x * 0.3, lambda x, t: x * 0.1 * t.reshape(-1, 1, 1, 1) / 50):
    c = Config(T=50, beta_T=0.2, predict=predict, times="weighted")
    d, each, x0, t, eps = loss_at_each_time(c, model)
    x0, eps, (a, b, m0, mt, var) = x0.numpy(), eps.numpy(), (
      np.reshape(v[1:], (-1, 1, 1, 1)) for v in (d.sqrt_alpha_bar, d.noise_std, d.mu_x0, d.mu_xt, d.beta))
    x_t = a * x0 + b * eps
    out = model(f32(x_t), t).numpy()
    mu = {"x0": m0 * out + mt * x_t, "mu": out, "v": m0 * (a * x_t - b * out) + mt * x_t}[predict]
    bound = ((m0 * x0 + mt * x_t - mu)**2 / (2 * var)).mean((1, 2, 3))
    factors.append((objectives.chances(d)[1][1:] * each)[1:].sum() / bound[1:].sum())  # L_0 is no squared error
  assert factors[0] == pytest.approx(factors[1], rel=1e-3)

@pytest.mark.parametrize("min_snr", (0.0, 2.0))
def test_importance_lowers_the_variance_of_a_gradient_and_leaves_its_mean(min_snr):
  """Over t drawn from p the mean of w f is that of min(1, γ/SNR) f over all t. Of gradients whose root mean square is
  SNR^¼, p is the distribution with the least variance, which is (Σ share SNR^¼)² by Cauchy and Schwarz."""
  share, p = objectives.chances(d := DDPM(), min_snr, "importance")
  w = objectives.time_weights(d, Config(times="importance", min_snr=min_snr)).numpy()
  a = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
  counts, large = np.minimum(1, min_snr * (1 - a) / a) if min_snr else np.ones(1000), (a / (1 - a))**0.25
  assert p.shape == w.shape == (1001,) and p[0] == 0 and p.sum() == pytest.approx(1)
  close(1000 * p[1:] * w[1:], counts, rtol=1e-5)
  def second(p): return ((counts / 1000 * large)**2 / p).sum()
  assert second(p[1:]) == pytest.approx((counts / 1000 * large).sum()**2, rel=1e-9)
  for other in (np.full(1000, 1e-3), objectives.chances(d, min_snr)[1][1:]): assert second(p[1:]) < 0.8 * second(other)
  far = DDPM(4000, beta_T=0.04)  # ᾱ_T is 5e-36: no t is left out
  w = objectives.time_weights(far, Config(T=4000, times="importance")).numpy()
  close(4000 * objectives.chances(far, 0, "importance")[1][1:] * w[1:], 1, rtol=1e-5)

def test_weights_where_nothing_of_the_image_is_left():
  """ᾱ_t is far below the last digit of 1 − ᾱ_t there: Eq. 7's weight of x_0, by which an answer in μ is divided."""
  d = DDPM(4000, predict="mu")
  want = [math.exp(0.5 * math.fsum(np.log1p(-d.beta[1:t]))) * d.beta[t] for t in (3900, 4000)]
  assert d.alpha_bar[-1] < 1e-17 and d.mu_x0[[3900, 4000]] == pytest.approx(want, rel=1e-9)

def test_min_snr_weighs_the_error_of_x0():
  """Above γ the weight γ/SNR turns the error of ε into γ times that of x̂_0, Eq. 15."""
  c = Config(T=50, beta_1=1e-3, beta_T=0.2, min_snr=5.0)
  d, each, x0, t, eps = loss_at_each_time(c, lambda x, t: x * 0)
  squared = lambda v: (v.astype(np.float64)**2).mean((1, 2, 3))
  in_x0 = squared(d.predict_x0(x_t := d.q_sample(x0, t, eps), t, x_t * 0).numpy() - x0.numpy())
  clear = d.alpha_bar[1:] > 5/6                                # SNR > 5
  assert 5 < clear.sum() < 40
  close(each, np.where(clear, 5 * in_x0, squared(eps.numpy())), rtol=1e-3)

@pytest.mark.parametrize("loss", ("simple", "vlb"))
def test_no_error_that_clipping_mends(loss):
  """With the answer ε_θ = 0, x̂_0 is beyond the edge that x_0 lies on wherever ε points outwards: no error there with
  --clip-x0. Elsewhere it is ε, also where x̂_0 is beyond the edge and x_0 within."""
  c, d, r = Config(T=50, clip_x0=True, loss=loss), DDPM(T=50), rng(7)
  x, t = r.choice(np.array([0, 100, 255], np.uint8), (64, 1, 8, 8)), r.integers(2, 51, 64).astype(np.int32)
  eps = r.standard_normal(x.shape).astype(np.float32)
  got = train.make_loss(d, c)(lambda x, t: x * 0, Tensor(x), Tensor(t), Tensor(eps), Tensor(t * 0)).numpy()
  mended = (x == 0) & (eps < 0) | (x == 255) & (eps > 0)
  assert 0.2 < mended.mean() < 0.45
  want = (eps**2 * ~mended).reshape(64, -1).mean(1)
  if loss == "vlb":  # Eq. 12; σ_t² = β_t is not the posterior's variance, which adds what does not depend on the model
    ratio = d.beta_tilde[t] / d.beta[t]
    want = (want * d.beta[t] / (d.alpha[t] * (1 - d.alpha_bar[t])) + ratio - 1 - np.log(ratio)) / 2 / math.log(2)
  close(got, want, rtol=2e-4)

def test_a_learned_variance_is_trained_where_clipping_mends_the_mean():
  """--clip-x0 with --sigma learned: log σ² is the network's everywhere, and its term is Eq. 8's with μ̃ = μ."""
  c, d = Config(T=50, clip_x0=True, loss="vlb", sigma="learned"), DDPM(T=50, sigma="learned")
  x, t = np.zeros((4, 1, 8, 8), np.uint8), np.full(4, 30, np.int32)   # black, and ε < 0: x̂_0 is below −1 everywhere
  eps, log_var = -np.abs(rng(8).standard_normal(x.shape)).astype(np.float32) - 0.01, np.log(d.beta[30]) + 0.3
  def model(x, t): return (x * 0).cat(x * 0 + log_var, dim=1)
  got = train.make_loss(d, c)(model, Tensor(x), Tensor(t), Tensor(eps), Tensor(t * 0)).numpy()
  r = d.beta_tilde[30] / math.exp(log_var)
  close(got, (r - 1 - math.log(r)) / 2 / math.log(2), rtol=1e-4)

def test_noise_of_another_shape_is_refused():
  x0, x_t, eps = (f32(arr(n, 1, 8, 8)) for n in (2, 2, 1))  # it would be the same for both images
  with pytest.raises(ValueError, match="shapes must agree"): DDPM(T=50).squared_error(x0, x_t, 3, eps, x_t)

def test_classes_without_an_image_are_not_shown(tmp_path):
  """Labels counted from 1: of class 0 the network learns nothing."""
  shown = []
  class Model(Affine):
    def __call__(self, x, t, y):
      if len(x) == 36: shown.append(y)
      return super().__call__(x, t, y)
  model = Model(*[getattr(affine(), k) for k in "wb"])
  fit(tmp_path, labels=LABELS + 1, model=model, class_conditional=True, steps=1, sample_every=1, T=3)
  assert about(tmp_path/"ema.safetensors")["untrained"] == [0]
  assert shown[0].numpy().tolist() == [1, 2, 3] * 12

def test_dropout_has_the_seeds_that_were_drawn():
  """In training alone, whatever Config has: a network of one's own may have been made with another."""
  class Net(UNet):
    def __init__(self): self.seen = []
    def __call__(self, x, t, seed=None): return self.seen.append(seed) or x
  c, net = Config(T=50, batch=4, dropout=0.0), Net()
  loss, batch = train.make_loss(DDPM(T=50), c), train.draw(Config(T=50, batch=4), IMAGES, LABELS, 3, 1)
  given = [Tensor(v) for v in batch]
  loss(net, *given)
  loss(net, *given[:4])
  assert net.seen[1] is None and np.array_equal(net.seen[0].numpy(), batch.seeds)
  class Plain(UNet):
    def __init__(self): pass
    def __call__(self, x, t): return x
  assert loss(Plain(), *given).shape == (4,)
  others = [train.draw(c, IMAGES, LABELS, 3, n).seeds for n in (1, 2)]
  assert len({*map(int, np.concatenate(others))}) == 8 and others[0].dtype == np.uint32

# *** what is drawn ***

def test_every_t_is_trained_and_the_draws_are_independent():
  c = Config(batch=64, T=20, class_conditional=True)
  x, y = np.zeros((64, 1, 8, 8), np.uint8), np.zeros(64, np.int32)
  draws = [train.draw(c, x, y, 10, n) for n in range(1, 201)]
  t, eps = np.concatenate([d.t for d in draws]), np.concatenate([d.eps for d in draws])
  counts = np.bincount(t, minlength=21)
  # T and 1 as often as the others
  assert counts[0] == 0 and len(counts) == 21 and np.abs(counts[1:] - 640).max() < 5*np.sqrt(640)
  assert abs(eps.mean()) < 5/np.sqrt(eps.size) and abs(eps.std() - 1) < 5/np.sqrt(eps.size)
  flat = eps.reshape(len(eps), -1)
  for other in (t, sample.draw_x_T(len(t), (1, 1, 1), c.seed).numpy().ravel()):
    assert np.abs([np.corrcoef(other, flat[:, j])[0, 1] for j in range(0, 64, 8)]).max() < 5/np.sqrt(len(t))
  assert len({d.eps.tobytes() for d in draws}) == 200
  for n, times in ((1, "weighted"), (2, "weighted"), (3, "importance")):  # one from each of 64 equal strata
    drawn = objectives.chances(DDPM(T=20), 1, times)[1]
    assert np.abs(np.bincount(train.draw(c, x, y, 10, n, drawn).t, minlength=21) - 64*drawn).max() < 1 + 1e-6
  assert abs(np.mean([d.y == 10 for d in draws]) - 0.1) < 0.02  # labels dropped
  for p in (0.0, 1.0):
    dropped = train.draw(dataclasses.replace(c, drop_labels=p), x, y, 10, 1).y
    assert (dropped == (10 if p else 0)).all() and dropped.dtype == np.int32

def test_what_is_drawn_ahead_comes_in_order_and_so_does_what_goes_wrong():
  made, end = [], 5
  def make(i):
    if i == end: raise ValueError("no fifth")
    return made.append(i) or i * i
  assert list(ahead(make, range(1, 5))) == [(1, 1), (2, 4), (3, 9), (4, 16)] and made == [1, 2, 3, 4]
  found = ahead(make, range(3, 9))
  assert [next(found), next(found)] == [(3, 9), (4, 16)]
  with pytest.raises(ValueError, match="no fifth"): next(found)
  assert list(ahead(make, [])) == []

def test_flips_know_nothing_of_the_times():
  """Image i was once flipped at step n + 1 if and only if t of image 2i + 1 at step n was at most T/2."""
  images = np.tile(np.arange(8, dtype=np.uint8), (256, 1, 1, 1))
  c = Config(batch=256, seed=3, flip=True)
  drawn = [train.draw(c, images, np.zeros(256, np.int32), 0, n)[:2] for n in range(1, 61)]
  agree = [(x[:128, 0, 0, 0] > 0) == (t[1::2] <= 500) for (_, t), (x, _) in zip(drawn, drawn[1:])]
  assert 0.45 < np.mean(agree) < 0.55  # of 59 x 128; its deviation is 0.006

def test_warm_up_and_average():
  rates = lambda n, **changes: train.rates(Config(warmup=10, lr=0.1, ema=0.99, **changes), n)
  assert rates(1)[0] == pytest.approx(0.01) and rates(10)[0] == rates(10**6)[0] == pytest.approx(0.1)
  assert rates(1)[3] == pytest.approx(2/11) and rates(10**6)[3] == 0.99
  assert [rates(n, anneal=100)[0] for n in (1, 51, 100, 101, 500)] == pytest.approx([0.01, 0.05, 0.001, 0, 0])
  assert train.rates(Config(warmup=0), 1)[0] == 2e-4

# *** the command line ***

def test_defaults_are_the_papers_and_presets_know_better():
  c = train.arguments(["--dataset", "cifar10"])
  assert dataclasses.replace(c, dataset="glyphs", out="runs/<dataset>", flip=False) == Config() and c.flip
  assert (c.T, c.beta_1, c.beta_T, c.batch, c.lr, c.ema, c.dropout, c.steps, c.warmup, c.clip) == (
    1000, 1e-4, 0.02, 128, 2e-4, 0.9999, 0.1, 800_000, 5000, 1.0)
  papers = {k: p.default for k, p in inspect.signature(UNet).parameters.items()}
  assert papers | train.network(c, (1, 3, 32, 32), 0) == papers
  assert train.arguments([]).dataset == "glyphs" and train.arguments([]).out == "runs/glyphs"
  c = train.arguments(["--dataset", "a/folder/", "--image-size", "8x16", "--channel-mult", "1,3", "--no-flip"])
  assert (c.out, c.image_size, c.channel_mult, c.flip, c.batch) == ("runs/folder", (8, 16), (1, 3), False, 32)
  assert train.arguments(["--image-size", "24"]).image_size == 24

def test_the_learning_rate_falls_to_0_at_the_end_of_the_preset_or_of_a_longer_run(tmp_path, capsys):
  rate = lambda n, *flags: train.rates(train.arguments(["--out", str(tmp_path/"new"), *flags]), n)[0]
  for dataset in ("mnist", "glyphs", "fashion_mnist"):
    steps, lr = [train.PRESETS[dataset][k] for k in ("steps", "lr")]
    short, long = ("--dataset", dataset, "--steps", "10"), ("--dataset", dataset, "--steps", str(2*steps))
    assert rate(steps//2 + 1, *short) == rate(steps + 1, *long) == pytest.approx(lr/2) and rate(steps + 1, *short) == 0
    assert rate(steps + 1, *short, "--anneal", "0") == lr
    # the preset's weights are for L_simple of ε, not for t counted as in L_vlb; so are its times
    own = train.PRESETS[dataset]["min_snr"]
    for flags, gamma, times in (
        ([], own, "importance"), (["--loss", "vlb"], 0, "uniform"), (["--predict", "x0"], 0, "uniform"),
        (["--times", "weighted"], 0, "weighted"), (["--times", "weighted", "--predict", "v"], 0, "weighted"),
        (["--min-snr", "3", "--times", "weighted"], 3, "weighted"), (["--min-snr", "0"], 0, "importance"),
        (["--loss", "simple", "--predict", "eps", "--times", "uniform"], own, "uniform")):
      capsys.readouterr()
      c = train.arguments(["--dataset", dataset, *flags])
      assert (c.min_snr, c.times, c.lr) == (gamma, times, lr if times == "importance" else lr / 2)
      said, preset = capsys.readouterr().err, train.PRESETS[dataset]
      for key in ("min_snr", "times", "lr"):  # what neither the preset nor a flag says is said
        told = getattr(c, key) != preset[key] and (flag := f"--{key.replace('_', '-')}") not in flags
        assert (f"{flag} {getattr(c, key)}" in said if told else f"--{key.replace('_', '-')}" not in said), said
      assert train.arguments(["--dataset", dataset, *flags, "--lr", "0.5"]).lr == 0.5
  assert rate(10**6, "--dataset", "cifar10") == 2e-4
  # a run knows its own, whatever --steps is when it goes on; beyond its end it would learn nothing
  fit(tmp_path, anneal=9)
  again = lambda *flags: train.arguments(["--out", str(tmp_path), *flags]).anneal
  assert again("--steps", "9") == 9 and again("--steps", "10", "--anneal", "50") == 50
  assert again("--steps", "3000", "--restart") == 3000
  with pytest.raises(ValueError, match="0 from step 10 on.*--change --anneal 10.*--init"): again("--steps", "10")
  fit(tmp_path/"old", anneal=9, min_snr=5.0, lr=1e-3)  # nor does another preset since then change it
  c = train.arguments(["--out", str(tmp_path/"old"), "--dataset", "mnist"])
  assert (c.steps, c.anneal, c.min_snr, c.times, c.lr) == (9, 9, 5.0, "uniform", 1e-3)
  assert train.arguments(["--out", str(tmp_path/"old"), "--dataset", "mnist", "--anneal", "0"]).lr == 1e-3
  assert train.arguments(["--out", str(tmp_path/"old"), "--dataset", "mnist", "--lr", "0.5"]).lr == 0.5
  assert train.arguments(["--out", str(tmp_path/"old"), "--min-snr", "2"]).min_snr == 2.0

@pytest.mark.parametrize("flags,match", [
  (["--batch", "0"], "--batch.*'0'"), (["--steps", "-5"], "--steps.*'-5'"), (["--lr", "nan"], "--lr.*'nan'"),
  (["--ema", "1"], "--ema"), (["--dropout", "1"], "--dropout"), (["--T", "0"], "--T.*'0'"), (["--attn", "x"], "--attn"),
  (["--channel-mult", "0,1"], "--channel-mult"), (["--min-snr", "-1"], "--min-snr"), (["--clip", "-1"], "--clip"),
  (["--drop-labels", "1.1"], "--drop-labels"), (["--image-size", "0"], "--image-size"), (["--nonsense"], "--nonsense"),
  (["--image-size", "8x8x8"], "--image-size"), (["--fit", "squeeze"], "--fit"), (["--step", "5"], "--step"),
  (["--seed", "-1"], "--seed"), (["--seed", str(2**31)], "--seed"), (["--predict", "y"], "--predict.*'y'"),
  (["--schedule", "const", "--beta-1", "0.001"], "const has no use for --beta-1"),
  (["--dataset", "cifar10", "--drop-labels", "0.5"], "--drop-labels is for --class-conditional")])
def test_flags_out_of_range(flags, match):
  with pytest.raises(ValueError, match=match) as no: train.arguments([*SMALL, *flags])
  assert "\n" not in str(no.value)

@pytest.mark.parametrize("changes,words", [
  ({"accum": 3}, "--accum 3"), ({"accum": 0}, "--accum 0"), ({"channel_mult": ()}, "--channel-mult"),
  ({"min_snr": 5.0, "loss": "vlb"}, "--min-snr"), ({"min_snr": 5.0, "predict": "x0"}, "--min-snr"),
  ({"times": "importance", "predict": "v"}, "--times importance"), ({"times": "importance", "loss": "vlb"}, "--loss"),
  ({"sigma": "learned"}, "--sigma --loss"), ({"schedule": "cosine", "beta_1": 0.5}, "cosine --beta-1"),
  ({"loss": "mse"}, "--loss simple, mse"), ({"times": "even"}, "--times weighted"), ({"dtype": "float8"}, "--dtype"),
  ({"save_every": 0}, "--save-every"), ({"lr": -1.0}, "--lr"), ({"ema": 2.0}, "--ema"), ({"batch": 0}, "--batch"),
  ({"lr": math.nan}, "--lr"), ({"keep_every": -1}, "--keep-every"), ({"seed": -1}, "seed"),
  ({"steps": 1.5}, "--steps whole, from 1"), ({"schedule": np.full(50, 0.1)}, "--schedule"),
  ({"flip": "false"}, "--flip True or False"), ({"image_size": "8x8"}, "size of 8x8"), ({"image_size": 4.5}, "4.5")])
def test_settings_that_do_not_go(tmp_path, changes, words):
  refused(lambda: fit(tmp_path/"run", **dict(beta_T=0.02) | changes), *words.split())
  assert not (tmp_path/"run").exists()

def test_what_would_harm_or_be_ignored_is_refused(tmp_path):
  """A run among its own images; the weights of a run whose state is gone; --fit where nothing is fitted."""
  photos = pictures_in(tmp_path/"photos", 3)
  before = sorted(photos.rglob("*"))
  for out in (photos, photos/"run"): refused(lambda out=out: run(out, photos), str(out), "training images")
  assert sorted(photos.rglob("*")) == before
  (tmp_path/"run").mkdir()
  for name in ("ema.safetensors", "log.jsonl"): (tmp_path/"run"/name).write_text("precious")
  refused(lambda: fit(tmp_path/"run"), "last.safetensors", "--restart")
  for name in ("ema.safetensors", "log.jsonl"): assert (tmp_path/"run"/name).read_text() == "precious"
  fit(tmp_path/"far", steps=5)
  (tmp_path/"far"/"last.safetensors").unlink()
  refused(lambda: fit(tmp_path/"far", steps=6, save_every=3), "last.safetensors", "--restart")
  fit(tmp_path/"far", steps=6, save_every=5)  # as a run that was killed in its first save leaves it: it begins anew
  assert saved_step(tmp_path/"far") == 6
  refused(lambda: run(tmp_path/"other", "glyphs", "--fit", "pad"), "--fit", "glyphs")

def test_help_names_every_field(capsys):
  with pytest.raises(SystemExit) as end: train.arguments(["--help"])
  says = capsys.readouterr().out
  for f in dataclasses.fields(Config): assert f"--{f.name.replace('_', '-')}" in says and f.metadata["help"]
  assert end.value.code == 0

@pytest.mark.parametrize("flags,says", [
  (["--dataset", "nonsense"], "nonsense"), (["--out", "/proc/x"], "/proc/x"), (["--accum", "3"], "--accum 3"),
  (["--channels", "12", "--norm-groups", "5"], "groups"), (["--init", "missing.safetensors"], "missing.safetensors"),
  (["--image-size", "20"], "glyphs"), (["--T", "20000"], "alpha_bar_T")])
def test_the_program_ends_with_one_sentence(flags, says, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as end: program(lambda: train.main([*SMALL, *flags]))
  assert says in end.value.code and "\n" not in end.value.code

def test_an_error_of_a_kernels_compiler_is_one_sentence():
  def failing(): raise CompileError("kernel.cu(3): cannot open source file\n  \"cuda_bf16.h\"")
  with pytest.raises(SystemExit) as end: program(failing)
  assert "cuda_bf16.h" in str(end.value) and "CUDA_PATH" in str(end.value) and "\n" not in str(end.value)

@pytest.mark.parametrize("init", (False, True))
@pytest.mark.parametrize("env,says", [
  ({"DEV": "NOSUCH"}, "NOSUCH"), ({"DEV": "CPU", "CC": "no-such-compiler"}, "clang"),
  ({"DEV": "CPU", "CACHEDB": "cache.db"}, "whole path"), ({"DEV": "CPU", "CACHEDB": "/proc/no/c.db"}, "/proc/no/c.db")])
def test_no_device_and_no_compiler(tmp_path, env, says, init):
  flags = ["--init", str(ROOT/"checkpoints"/"mnist.safetensors")] if init else []
  r = subprocess.run([sys.executable, str(ROOT/"train.py"), "--out", str(tmp_path/"r"), *flags], capture_output=True,
                     text=True, env={**os.environ, "CACHEDB": str(tmp_path/"cache.db"), **env})
  assert r.returncode and says in r.stderr.splitlines()[-1] and "Traceback" not in r.stderr, r.stderr

# *** runs that go on ***

@pytest.fixture(scope="module")
def whole(tmp_path_factory, images):
  """A run of 40 steps in one piece, and one that ended after 6."""
  out = tmp_path_factory.mktemp("whole")
  run(out/"whole", images, "--class-conditional", "--steps", 40, "--save-every", 5)
  run(out/"begun", images, "--class-conditional", "--steps", 6, "--save-every", 3)
  return out/"whole", out/"begun"

def same(a, b): return contents(a) == contents(b) and losses(a) == losses(b)

def test_resume_is_exact(tmp_path, whole, images):
  whole, begun = whole
  shutil.copytree(begun, tmp_path/"b")
  with open(tmp_path/"b"/"log.jsonl", "a") as f: f.write('{"step": 7, "loss": 0}\n{"st')  # as a killed run leaves it
  run(tmp_path/"b", images, "--class-conditional", "--steps", 40, "--save-every", 20)
  assert same(whole, tmp_path/"b") and len(losses(whole)) == 40
  saved = read_tensors(whole/"last.safetensors")[0]
  for raw, key in ((True, "raw"), (False, "ema")):
    state = nn.state.get_state_dict(checkpoint.load(whole/"last.safetensors", raw)[0])
    assert all(np.array_equal(v.numpy(), saved[f"{key}.{k}"]) for k, v in state.items())
  assert not np.array_equal(saved["raw.conv_in.weight"], saved["ema.conv_in.weight"])

def test_a_run_of_the_program_before_goes_on(tmp_path, whole, images):
  """It knew fewer settings, and knew what lies in memory by other names; what came later was off."""
  whole, begun = whole
  tensors, metadata = read_tensors(begun/"last.safetensors")
  meta = json.loads(metadata["ddpm"])
  for young in ("processes", "labels"): del meta["train"][young]
  for young in ("out_channels", "head_channels", "norm_eps", "down_pad", "freq_shift"):
    for place in (meta["unet"], meta["train"]["network"]): del place[young]
  for young in ("limits", "classes", "how"): del meta[young]
  meta["train"] |= {"dataset": "another spelling", "dequantize": False}
  (tmp_path/"b").mkdir()
  write_tensors(tmp_path/"b"/"last.safetensors", tensors, meta)
  shutil.copy(begun/"log.jsonl", tmp_path/"b")
  run(tmp_path/"b", images, "--class-conditional", "--steps", 40)
  assert same(whole, tmp_path/"b")
  write_tensors(tmp_path/"b"/"last.safetensors", tensors, meta | {"train": meta["train"] | {"dequantize": True}})
  refused(lambda: run(tmp_path/"b", images, "--class-conditional", "--steps", 40), "dequantize = True, which is gone")
  # and one of the first programs had neither these
  for young in ("times", "min_snr", "clip_x0", "drop_labels", "init", "anneal"): del meta["train"][young]
  write_tensors(tmp_path/"b"/"last.safetensors", tensors, meta)
  with pytest.raises(ValueError, match="anneal = 0, not 50"):
    run(tmp_path/"b", images, "--class-conditional", "--steps", 40, "--anneal", 50)
  run(tmp_path/"b", images, "--class-conditional", "--steps", 6)

def test_an_own_models_run_goes_on_and_seeds_matter(tmp_path):
  fit(tmp_path/"a", steps=6)
  fit(tmp_path/"b", steps=4, save_every=2)
  fit(tmp_path/"b", steps=6, data_dir="anywhere")
  assert same(tmp_path/"a", tmp_path/"b")
  fit(tmp_path/"b", steps=2, restart=True, seed=1)
  assert len(losses(tmp_path/"b")) == 2 and losses(tmp_path/"b")[0] != losses(tmp_path/"a")[0]

@pytest.fixture(scope="module")
def begun(tmp_path_factory): return fit(tmp_path_factory.mktemp("runs")/"begun", steps=2)

@pytest.mark.parametrize("changes,words", [
  ({"lr": 1e-5}, "lr = 0.001, not 1e-05 --change"), ({"batch": 16}, "batch = 8, not 16 --change"),
  ({"seed": 1}, "seed = 0"), ({"T": 40}, "T = 50, not 40 --restart"), ({"beta_T": 0.3}, "beta_T"),
  ({"predict": "v"}, "predict"), ({"flip": True}, "flip"), ({"accum": 2}, "accum"), ({"clip": 0.5}, "clip"),
  ({"warmup": 3, "change": True}, "warmup"), ({"dtype": "bfloat16"}, "dtype"), ({"anneal": 9}, "anneal"),
  ({"class_conditional": True}, "class_conditional")])
def test_other_settings_are_refused_by_name(begun, changes, words):
  before = contents(begun)
  refused(lambda: fit(begun, **dict(steps=4) | changes), *words.split())
  assert contents(begun) == before and len(losses(begun)) == 2

def test_other_data_networks_and_states_are_refused(begun, tmp_path):
  before = contents(begun)
  refused(lambda: fit(begun, IMAGES[::-1].copy()), "other images", "--out")
  refused(lambda: fit(begun, IMAGES[:32], LABELS[:32]), "images = [64, 1, 8, 8]")
  refused(lambda: fit(begun, model=affine((1, 1, 8))), "state of this network", "--restart")
  refused(lambda: fit(begun, model=UNet(**TINY | {"channel_mult": (1,)})), "network = None")
  assert contents(begun) == before
  fit(begun, labels=None, steps=2)  # which it does not look at
  tensors, metadata = read_tensors(begun/"last.safetensors")
  meta = json.loads(metadata["ddpm"])
  for i, (bad, word) in enumerate((({**tensors, "raw.w": tensors["raw.w"] * np.float32(np.nan)}, "finite"),
                                   ({k: v for k, v in tensors.items() if k != "adam.m"}, "state of this network"))):
    (out := tmp_path/str(i)).mkdir()
    write_tensors(out/"last.safetensors", bad, meta)
    refused(lambda: fit(out), word, "--restart")
  for text in ({}, {**meta, "step": "x"}, {**meta, "train": 3}):
    write_tensors(tmp_path/"0"/"last.safetensors", tensors, text)
    refused(lambda: fit(tmp_path/"0"), "is not the state of a run")

def test_labels_matter_where_they_are_shown(tmp_path):
  fit(tmp_path, class_conditional=True, steps=1)
  refused(lambda: fit(tmp_path, IMAGES, LABELS[::-1].copy(), class_conditional=True, steps=2), "labels")
  fit(tmp_path, class_conditional=True, steps=2)

@pytest.mark.parametrize("broken", ("nan", "inf", "1e30"))
def test_a_number_that_is_not_finite_stops_the_run_and_saves_nothing(tmp_path, monkeypatch, broken):
  fit(tmp_path, steps=2, save_every=1)
  before, draw = contents(tmp_path), train.draw
  def bad(*args):
    batch = draw(*args)
    return batch._replace(eps=batch.eps * np.float32(broken)) if args[4] == 4 else batch
  monkeypatch.setattr(train, "draw", bad)
  refused(lambda: fit(tmp_path, steps=6, save_every=10), "step 4", "last.safetensors")
  assert contents(tmp_path) == before
  refused(lambda: fit(tmp_path/"new", steps=6), "step 4", "no checkpoint")
  assert not (tmp_path/"new"/"ema.safetensors").exists()

@pytest.mark.parametrize("end", ("", "/"))
def test_how_the_path_is_spelled_does_not_matter(tmp_path, images, end):
  pictures_in(tmp_path/"train"/"a", 3)
  pictures_in(tmp_path/"train"/"b", 3)
  for i, source in enumerate((f"{tmp_path}/train{end}", os.path.relpath(tmp_path/"train"))):
    train.fit(config(tmp_path/"run", steps=i + 1), source, model=affine((3, 8, 8)))
  assert saved_step(tmp_path/"run") == 2 and folder.place("runs/<dataset>", "x/faces/") == "runs/faces"
  assert folder.place("runs/<dataset>", "..") == folder.place("runs/<dataset>", "../..") == "runs/folder"
  assert about(tmp_path/"run"/"ema.safetensors")["dataset"] == os.path.relpath(tmp_path/"train")
  assert not any("held_out" in e for e in log(tmp_path/"run"))  # there are no images apart from these

@pytest.mark.parametrize("name", ("log.jsonl", "loss.png", "samples", "samples.png"))
def test_a_folder_of_other_things_is_not_touched(tmp_path, name):
  (tmp_path/name).write_text('{"step": 1, "loss": 0.9}\n')
  for restart in (False, True):
    refused(lambda restart=restart: fit(tmp_path, restart=restart), tmp_path, "not a run's folder", name)
  assert [f.name for f in tmp_path.iterdir()] == [name] and "0.9" in (tmp_path/name).read_text()
  (tmp_path/"ema_model.safetensors").touch()  # another program's
  refused(lambda: fit(tmp_path), tmp_path, "not a run's folder", name)
  (tmp_path/"ema_model.safetensors").unlink()
  (tmp_path/name).rename(tmp_path/"other")
  fit(tmp_path, steps=2, save_every=1, keep_every=1)
  assert (tmp_path/"other").exists() and saved_step(tmp_path) == 2
  for file in (".lock", "last.safetensors", "ema.safetensors"): (tmp_path/file).unlink()  # a run's without its state
  fit(tmp_path, steps=1, restart=True)

def test_what_another_run_had_is_said(tmp_path):
  run(tmp_path, "glyphs", "--steps", 1)
  refused(lambda: run(tmp_path, "glyphs", "--steps", 2, "--num-res-blocks", 2),
          "network = {'num_res_blocks': 1}, not {'num_res_blocks': 2}")

def test_changed_settings_are_noted(tmp_path, capsys):
  fit(tmp_path, steps=2)
  middle = read_tensors(tmp_path/"last.safetensors")[0]
  new = dict(lr=1e-9, batch=16, ema=0.5, anneal=100, min_snr=3.0)
  fit(tmp_path, steps=3, change=True, **new)
  (*_, second, note, third), err = log(tmp_path), capsys.readouterr().err
  assert (second["step"], note["step"], third["step"]) == (2, 2, 3) and third["lr"] == pytest.approx(0.98e-9)
  for words in ("lr from 0.001 to 1e-09", "batch from 8 to 16", "ema from 0.9999 to 0.5", "anneal from 0 to 100",
                "min_snr from 0.0 to 3.0", "not bit for bit"):
    assert words in note["note"] and words in err
  close(read_tensors(tmp_path/"last.safetensors")[0]["raw.w"], middle["raw.w"], atol=1e-8)  # it went on from there
  adam = read_tensors(tmp_path/"last.safetensors")[0]["adam.v"]
  assert (adam >= 0.999 * middle["adam.v"] * (1 - 1e-6)).all() and (middle["adam.v"] > 0).all()
  fit(tmp_path, steps=4, **new)  # from now on the run's own settings
  assert len(log(tmp_path)) == 5
  refused(lambda: fit(tmp_path, steps=5, batch=16), "lr = 1e-09, not 0.001")

def test_weights_that_are_kept(tmp_path, capsys):
  fit(tmp_path, steps=5, keep_every=2)
  kept = sorted(f.name for f in tmp_path.glob("ema-*"))
  assert kept == ["ema-000002.safetensors", "ema-000004.safetensors"]
  fit(tmp_path/"to_2", steps=2)
  close(read_tensors(tmp_path/kept[0])[0]["w"], read_tensors(tmp_path/"to_2"/"ema.safetensors")[0]["w"], rtol=0)
  assert about(tmp_path/kept[0])["step"] == 2 and saved_step(tmp_path) == 5
  fit(tmp_path, steps=1, restart=True)
  assert "2 files of the run before stay, as ema-00000" in capsys.readouterr().err

# *** --init ***

def test_a_run_can_begin_with_the_network_and_the_weights_of_another(tmp_path, whole, capsys):
  """For another number of classes the table of the labels alone is made anew."""
  begun = whole[1]  # three classes
  flags = ["--attn", "", "--init", str(begun), "--out", str(tmp_path)]
  theirs, weights = about(begun/"ema.safetensors"), read_tensors(begun/"ema.safetensors")[0]
  c = train.arguments(flags)
  assert not capsys.readouterr().err and train.network(c, IMAGES.shape, 3) == checkpoint.load(
    begun/"ema.safetensors")[0].config and {k: getattr(c, k) for k in train.DIFFUSION} == theirs["ddpm"]
  c = train.arguments([*flags, "--T", "60"])
  assert f"{begun} has T = 50; here it is 60" in capsys.readouterr().err and c.T == 60
  for classes, anew in ((3, False), (5, True), (0, False)):
    state = State(UNet(**train.network(c, IMAGES.shape, classes)))
    label = state.arrays().get("raw.label")
    assert folder.begin(c, state, {}) == (0, 0.0)
    says, arrays = capsys.readouterr().err, state.arrays()
    assert "begins with the weights of" in says and ("the table of the labels is made anew" in says) == anew
    assert ("the table of the labels is left out" in says) == (classes == 0)
    for k, v in weights.items():
      for key in ("raw", "ema"):
        if k != "label" or classes == 3: close(arrays[f"{key}.{k}"], v, rtol=0)
    if anew: assert label.shape == (6, 32) and np.array_equal(arrays["ema.label"], label)
    assert not arrays["adam.m"].any() and not arrays["adam.v"].any()
  other = State(UNet(**train.network(dataclasses.replace(c, channels=16), IMAGES.shape, 3)))
  (tmp_path/"log.jsonl").write_text('{"step": 1}')
  refused(lambda: folder.begin(c, other, {}), "--init", "another network")
  assert (tmp_path/"log.jsonl").read_text() == '{"step": 1}'

def test_what_no_flag_says_is_the_checkpoints(tmp_path, monkeypatch):
  """What files of other programs have: the norm's epsilon, heads of attention, padding, frequencies; another target."""
  theirs = dict(head_channels=4, norm_eps=1e-5, down_pad=1, freq_shift=0)
  net = UNet(**TINY | dict(channel_mult=(1,), attn_resolutions=()), **theirs)
  checkpoint.save(tmp_path/"a.safetensors", net, {"ddpm": {"T": 30, "predict": "v"}})
  flags = ["--dataset", "mnist", "--init", str(tmp_path/"a.safetensors"), "--out", str(tmp_path/"b")]
  c = train.arguments(flags)
  assert (c.T, c.predict, c.min_snr, c.channels, c.channel_mult, c.attn) == (30, "v", 0.0, 8, (1,), ())
  assert train.network(c, (1, 1, 8, 8), 0) == {**net.config}
  # a cosine has no β₁ and β_T, whatever a file says; arguments that a file leaves out are UNet's; the rest is refused
  checkpoint.save(tmp_path/"a.safetensors", net, {"ddpm": {"T": 30, "schedule": "cosine", "beta_1": 0.3}})
  objectives.check(c := train.arguments(flags))
  assert c.schedule == "cosine"
  tensors = read_tensors(tmp_path/"a.safetensors")[0]
  meta = {"unet": {k: v for k, v in net.config.items() if k != "dropout"}}
  write_tensors(tmp_path/"a.safetensors", tensors, meta)
  assert train.arguments(flags).dropout == train.network(train.arguments(flags), (1, 1, 8, 8), 0)["dropout"] == 0.1
  for damaged in (None, {"nothing": 1}):
    write_tensors(tmp_path/"a.safetensors", tensors, meta | {"ddpm": damaged})
    refused(lambda: train.arguments(flags), "a.safetensors does not describe its diffusion")

def test_a_run_goes_on_without_the_checkpoint_that_it_began_with(tmp_path, whole, images):
  shutil.copytree(whole[1], tmp_path/"first")
  flags = ["--batch", "4", "--sample-every", "0", "--dataset", str(images), "--out", str(tmp_path/"b"),
           "--init", str(tmp_path/"first")]
  train.main([*flags, "--steps", "1"])
  shutil.rmtree(tmp_path/"first")
  train.main([*flags, "--steps", "2"])
  assert saved_step(tmp_path/"b") == 2
  refused(lambda: train.arguments([*flags, "--restart"]), "first")

# *** programs that are stopped ***

OWN = """if True:
  import sys
  sys.path[:0] = {paths}
  import test_train
  from engine.hosts import run
  if __name__ == "__main__": run(lambda: test_train.fit(sys.argv[1], **eval(sys.argv[2])))"""

@pytest.fixture
def start(tmp_path_factory):
  """start(*command): a program that may be stopped. start.own(out, settings): one that trains these tests' model."""
  programs, file = [], tmp_path_factory.mktemp("program")/"own.py"
  file.write_text(OWN.format(paths=[str(ROOT), str(ROOT/"tests")]))
  def begin(*command, **env):
    programs.append(subprocess.Popen([sys.executable, *map(str, command)], text=True, stderr=subprocess.PIPE,
                                     start_new_session=True, env={**os.environ, **env}))
    return programs[-1]
  begin.own = lambda out, settings, **env: begin(file, out, settings, **env)
  yield begin
  for p in programs:
    if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
    p.wait()

def wait_for_lines(process, out, n):
  """Until the log has more than n lines, or the program has ended."""
  file = out/"log.jsonl"
  while process.poll() is None and not (file.exists() and file.read_text().count("\n") > n): time.sleep(0.002)

@pytest.mark.slow
def test_killed_and_interrupted_runs_end_with_the_same_bytes(tmp_path, start):
  settings, stopped = dict(steps=400, save_every=20, class_conditional=True), tmp_path/"stopped"
  for lines, how in ((30, signal.SIGKILL), (100, signal.SIGINT)):
    p = start.own(stopped, settings)
    wait_for_lines(p, stopped, lines)
    p.send_signal(how)
    says = p.communicate()[1]
    if how == signal.SIGINT:  # Ctrl-C saves the step it is at
      assert p.returncode == 130 and "stopping after this step" in says and "run the same command again" in says, says
      assert saved_step(stopped) == len(losses(stopped)) < 400
    else: assert p.returncode == -how and saved_step(stopped) >= 20
  (stopped/".0123456789abcdef.tmp").write_bytes(b"what a killed run left")
  fit(stopped, **settings)
  fit(tmp_path/"whole", **settings)
  assert same(tmp_path/"whole", stopped)

@pytest.mark.slow
def test_a_run_that_is_told_to_end_saves_and_no_other_program_may_use_its_folder(tmp_path, start, images):
  flags = "--dataset", images, "--out", tmp_path, "--save-every", 10**6
  p = start(ROOT/"train.py", *SMALL, *flags, "--steps", 2000)
  wait_for_lines(p, tmp_path, 2)
  refused(lambda: folder.claim(tmp_path).__enter__(), f"{tmp_path} is in use")
  for _ in "ab": os.killpg(p.pid, signal.SIGTERM)  # as timeout does: twice, and to every process of it
  says = p.communicate()[1]
  assert p.returncode == 143 and "saved: run the same command again" in says and "Traceback" not in says, says
  done = saved_step(tmp_path)
  assert done == len(losses(tmp_path)) > 2
  run(tmp_path, images, "--steps", done + 2)
  assert [e["step"] for e in log(tmp_path)] == list(range(1, done + 3))

@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="elsewhere the first step may take minutes")
def test_a_run_that_is_told_to_end_while_it_compiles(tmp_path, start):
  """The processes that compile get the signal as well."""
  out = tmp_path/"run"
  p = start.own(out, dict(steps=1000), CACHEDB=tmp_path/"cache.db")  # nothing is kept
  def ready(pid):  # a signal that comes while Python starts in it ends the process
    status = Path(f"/proc/{pid}/status")
    if not status.exists(): return time.sleep(2) is None
    return int(re.search(r"SigIgn:\s*(\w+)", status.read_text())[1], 16) >> signal.SIGTERM - 1 & 1
  def compiles():
    there = subprocess.check_output(["ps", "-axww", "-o", "ppid=", "-o", "pid=", "-o", "args="], text=True).splitlines()
    children = [line.split()[1] for line in there if line.split()[0] == str(p.pid) and "spawn_main" in line]
    return children and all(map(ready, children))
  while p.poll() is None and not compiles() and not losses(out): time.sleep(0.02)
  os.killpg(p.pid, signal.SIGTERM)
  says = p.communicate(timeout=500)[1]
  assert p.returncode == 143 and saved_step(out) == len(losses(out)) and "Traceback" not in says, says

@pytest.mark.parametrize("how, error", ((signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)))
def test_whoever_calls_fit_learns_of_the_stop(tmp_path, monkeypatch, how, error):
  rates, both = train.rates, (signal.SIGINT, signal.SIGTERM)
  handlers = [signal.signal(s, signal.default_int_handler) for s in both]
  def signalled(c, n):
    if n == 3: signal.raise_signal(how)
    return rates(c, n)
  monkeypatch.setattr(train, "rates", signalled)
  try:
    with pytest.raises(error): fit(tmp_path)
    assert signal.getsignal(how) is signal.default_int_handler
  finally:
    for s, handler in zip(both, handlers): signal.signal(s, handler)
  assert saved_step(tmp_path) == 3

# *** what a run says ***

def test_first_lines_and_progress(tmp_path, capsys):
  fit(tmp_path, steps=2, T=20)
  says = capsys.readouterr()
  first, warning, *_ = says.err.splitlines()[1:]
  assert first == ("an array: 64 images of 1 x 8 x 8 in 3 classes; read as N, C, H, W; the classes are not used; "
                   f"flips off; 65 parameters; batch 8; to {tmp_path}")
  assert "warning" in warning and "T = 20" in warning and not says.out  # √ᾱ_T is 34%
  line = says.err.splitlines()[-1]
  assert re.fullmatch(r"step +2/2  loss \d\.\d{4}  grad +\d+\.\d{3}  +\d+\.\d images/s  0:00:00 left", line), line
  fit(tmp_path, steps=2, T=20)
  assert "from step 2 on" in (says := capsys.readouterr().err) and "has 2 steps already" in says
  fit(tmp_path/"dark", steps=1, flip=True)
  assert "warning" not in (says := capsys.readouterr().err) and "flips on" in says

def test_time_left_counts_hours_beyond_a_day(tmp_path, monkeypatch, capsys):
  ticks = iter(range(0, 10**9, 100_000))  # between two looks at the clock there are 100,000 s
  monkeypatch.setattr(folder, "time", SimpleNamespace(**{**vars(time), "monotonic": lambda: next(ticks)}))
  fit(tmp_path, steps=4)
  left = {int(n): (int(h), m, s) for n, h, m, s in
          re.findall(r"step +(\d)/4 .* (\d+):(\d\d):(\d\d) left", capsys.readouterr().err)}
  assert left[4] == (0, "00", "00") and left[3][0] >= 27 and left[2][0] == 2 * left[3][0] + 1
  assert left[3][0] * 3600 + int(left[3][1]) * 60 + int(left[3][2]) == 100_000

def test_pictures_of_samples_are_of_the_same_noise(tmp_path, monkeypatch):
  grids, grid, asked = [], pictures.grid, []
  monkeypatch.setattr(pictures, "grid", lambda x, *a: grids.append(x) or grid(x, *a))
  class Model(Affine):
    def __call__(self, x, t, y=None):
      if x.shape[0] == 36: asked.append((self is model, y.numpy()))
      return super().__call__(x, t, y)
  model = Model(*[getattr(affine(), k) for k in "wb"])
  fit(tmp_path, steps=3, T=5, sample_every=2, lr=1e-12, model=model, class_conditional=True)
  assert {f.name for f in (tmp_path/"samples").iterdir()} == {"000002.png", "000003.png"}
  assert (tmp_path/"samples.png").read_bytes() == (tmp_path/"samples"/"000003.png").read_bytes()
  assert len(grids) == 4 and grids[0].shape == (36, 1, 8, 8) and np.array_equal(grids[0], grids[3])
  assert len({x.tobytes() for x in grids[0]}) == 36
  assert asked and all((y == np.arange(36) % 3).all() and not raw for raw, y in asked)  # with the averaged weights
  image = Image.open(tmp_path/"loss.png")
  assert image.size == (720, 440) and len(image.getcolors(10**6)) > 10

# *** the log ***

def write_log(path, steps):
  with open(path, "w") as f:
    for n in steps:
      entry = {"step": n, "loss": 1/n, "smooth": 2/n, "grad_norm": 1., "lr": 1e-3, "bands": [1.]*4, "images_per_s": 9.9}
      f.write(json.dumps(entry) + "\n")

def test_a_long_runs_log_has_every_so_many_steps(tmp_path, monkeypatch):
  monkeypatch.setattr(folder, "write", lambda *a: None)
  c, curves = config(tmp_path, steps=6000, save_every=1000), []
  monkeypatch.setattr(pictures, "loss_curve", lambda path, *curve: curves.append(curve))
  batch = np.arange(1, 9), np.ones(8)
  with folder.Record(c, SimpleNamespace(), None, None, None, {}, {}, 0, 0.0) as record:
    for n in range(1, 6001):
      record.save, last = (lambda *a: None) if n < 6000 else folder.Record.save.__get__(record), n == 6000
      assert record.step(n, batch[0], batch[1] * n, 1.0, 1e-3) == last
  steps = [e["step"] for e in log(tmp_path)]
  assert steps == sorted({*range(3, 6001, 3), *range(1000, 6001, 1000)})
  (at, loss, smooth, held_out), = curves
  assert at.tolist() == loss.tolist() == steps and held_out is None
  assert smooth[-1] == pytest.approx(6000 - 0.99/0.01)  # so far an average of 1/100 lags behind a ramp

def test_a_long_log_is_not_read_into_memory(tmp_path):
  write_log(tmp_path/"log.jsonl", range(1, 20_001))
  tracemalloc.start()
  try:
    folder.cut(tmp_path/"log.jsonl", 19_999)
    assert tracemalloc.get_traced_memory()[1] < 1e6 < (tmp_path/"log.jsonl").stat().st_size
  finally: tracemalloc.stop()

@pytest.mark.parametrize("damage", [
  "", "no json\n", '{"step": null}\n', "[]\n", "\0\xff\n", '{"step": 3, "loss": 1}\n'])
def test_a_damaged_log_ends_where_the_damage_is(tmp_path, damage):
  path = tmp_path/"log.jsonl"
  write_log(path, (1, 2))
  good = path.read_text()
  path.write_bytes((good + damage + '{"step": 4, "loss": 1, "smooth": 1}\n' * bool(damage)).encode("latin-1"))
  folder.cut(path, 9)
  assert path.read_text() == good
  close(folder.curve(path, "loss", "smooth"), [[1, 2], [1, 0.5], [2, 1]])
  folder.cut(path, 1, "a note")
  assert log(tmp_path)[1:] == [{"step": 1, "note": "a note"}]
  close(folder.curve(path, "loss"), [[1], [1]])
  path.unlink()
  folder.cut(path, 9)
  assert path.read_text() == "" and folder.curve(path, "loss", "smooth").shape == (3, 0)

# *** images of a folder ***

def pictures_in(path, n, size=(8, 8), seed=0):
  path.mkdir(parents=True)
  for i in range(n):
    Image.fromarray(rng([seed, i]).integers(0, 256, (*size, 3), np.uint8)).save(path/f"{i}.png")
  return path

class Enough(Exception): pass

@pytest.mark.parametrize("size,flags,shape,said", [
  ((50, 50), [], 48, "cut from 50x50 to 48x48"), ((50, 50), ["--channel-mult", "1,2"], 50, ""),
  ((80, 40), [], (80, 40), ""), ((64, 64), ["--image-size", "32"], 32, "resized to 32x32"),
  ((64, 64), ["--image-size", "32x16"], (32, 16), "to 32x16")])
def test_size_of_the_images_of_a_folder(tmp_path, monkeypatch, size, flags, shape, said):
  def net(**config):
    assert config["image_size"] == shape and config["in_channels"] == 3
    raise Enough
  monkeypatch.setattr(train, "UNet", net)
  with pytest.raises(Enough): train.main(["--dataset", str(pictures_in(tmp_path/"p", 3, size)), *flags])
  found = data.read(str(tmp_path/"p"), size=train.arguments(flags).image_size, multiple=2 if "1,2" in flags else 8)
  assert said in found.about

def test_a_folder_is_trained_on_at_the_size_that_is_said_and_read_as_then(tmp_path):
  source = pictures_in(tmp_path/"p", 3, (13, 13))
  own = affine((3, 8, 4))
  train.fit(config(tmp_path/"run", steps=1, image_size=(8, 4), fit="pad"), str(source), model=own)
  meta = about(tmp_path/"run"/"ema.safetensors")
  assert meta["how"] == {"size": [8, 4], "fit": "pad", "mode": None, "multiple": 1} and meta["dataset"] == str(source)
  refused(lambda: train.fit(config(tmp_path/"run", steps=2, image_size=(8, 4)), str(source), model=own), "other images")

def test_an_image_of_more_than_8_bits_is_as_bright_as_in_training(tmp_path, capsys):
  """By the same white, also where its own brightest pixel is darker; a mask has its own."""
  ramp = lambda top: np.linspace(0, top, 64).astype(np.uint16).reshape(8, 8)
  (tmp_path/"train").mkdir()
  for i, top in enumerate((4095, 1500)): Image.fromarray(ramp(top)).save(tmp_path/"train"/f"{i}.png")
  train.fit(config(tmp_path/"run", steps=1), str(tmp_path/"train"), model=affine())
  meta = about(tmp_path/"run"/"ema.safetensors")
  assert meta["span"] == [0, 4095]
  hub.check_images(meta, "run")
  file, want = str(tmp_path/"train"/"1.png"), np.rint(ramp(1500) / 4095 * 255)
  assert (data.read(tmp_path/"train").images[1, 0] == want).all()
  assert (editing.read([file], (1, 8, 8), meta["how"], meta["span"])[0, 0] == want).all()
  assert "values from 0 to 4095 made 0 to 255, as for training" in capsys.readouterr().err
  photo, mask = editing.read_mask(file, file, (1, 8, 8), meta["how"], meta["span"])
  assert (photo[0, 0] == want).all() and (mask[0, 0] == (ramp(1500) / 1500 * 255 > 127)).all()

@pytest.mark.parametrize("times", ("uniform", "weighted"))
def test_held_out_loss(tmp_path, monkeypatch, times):
  """At each save, the same images, t and ε, under the averaged weights; on the scale of the training loss."""
  for half, n in (("train", 40), ("val", 20)): pictures_in(tmp_path/"p"/half, n, seed=n)
  curves, loss_curve, seen = [], pictures.loss_curve, []
  monkeypatch.setattr(pictures, "loss_curve", lambda *a: curves.append(a[4]) or loss_curve(*a))
  held_out, draw, given = objectives.held_out, train.draw, []
  monkeypatch.setattr(objectives, "held_out", lambda *a: seen.append(held_out(*a)) or seen[-1])
  monkeypatch.setattr(train, "draw", lambda *a: given.append(a[5]) or draw(*a))
  c = config(tmp_path/"run", steps=5, save_every=2, lr=0.05, times=times, min_snr=3.0 * (times == "weighted"))
  train.fit(c, str(tmp_path/"p"), model=affine((3, 8, 8)))
  average = read_tensors(tmp_path/"run"/"ema.safetensors")[0]
  (x, t, eps, _), = seen
  assert {v.tobytes() for v in x} == {v.tobytes() for v in data.load(str(tmp_path/"p"), "test")[0]} and len(t) == 20
  d, col = DDPM(50, 1e-4, 0.2), lambda u: np.reshape(u, (-1, 1, 1, 1))
  x_t = col(np.sqrt(d.alpha_bar[t])) * (x / 127.5 - 1) + col(np.sqrt(1 - d.alpha_bar[t])) * eps
  each = ((x_t * average["w"] + average["b"] * col(t) / 100 - eps)**2).mean((1, 2, 3))
  if times == "weighted":
    share, drawn = objectives.chances(d, 3.0)
    assert all(np.array_equal(chances, drawn) for chances in given)
    each = each * share[t] / drawn[t]
    counts = np.bincount(t, minlength=51)
    assert np.abs(counts - 20 * drawn).max() < 1 + 1e-6
  else:  # one in each of 20 equal strata, and as far from T as from 1
    assert ((np.sort(t) - 1) * 20 // 50 == np.arange(20)).all() and (np.sort(t) + np.sort(t)[::-1] == 51).all()
  found = {e["step"]: e["held_out"] for e in log(tmp_path/"run") if "held_out" in e}
  assert list(found) == [2, 4, 5]
  assert found[5] == pytest.approx(each.mean(), rel=1e-4) and len(set(found.values())) == 3
  close(curves[-1], [list(found), list(found.values())])
  train.fit(dataclasses.replace(c, steps=6), str(tmp_path/"p"), model=affine((3, 8, 8)))
  assert [e["step"] for e in log(tmp_path/"run") if "held_out" in e] == [2, 4, 5, 6]
  assert all(np.array_equal(a, b) for a, b in zip(*seen))

def test_one_class_alone_is_refused(tmp_path):
  source = str(pictures_in(tmp_path/"p", 4))
  refused(lambda: train.fit(config(tmp_path/"run", class_conditional=True), source, model=affine((3, 8, 8))),
          "one class", "sub-folders", "dataset.json", "labels of an array")
  refused(lambda: fit(tmp_path/"run", labels=None, class_conditional=True), "one class")
  assert not (tmp_path/"run").exists()

@pytest.mark.parametrize("classes,told", [(0, True), (2, True), (3, False)])
def test_a_u_net_for_other_classes_is_refused(classes, told, tmp_path):
  net = UNet(1, 4, (1,), 1, (), 0.0, 8, 2, classes)
  refused(lambda: train.fit(config=config(tmp_path/"run", class_conditional=told), images=IMAGES, labels=LABELS,
                            model=net), f"for {classes} classes", f"for {3 * told}")

def test_attention_at_a_size_that_no_level_has_is_said(tmp_path, capsys):
  word = "no self-attention at 16 (--attn): the network's levels are 8, 4 pixels wide\n"
  for attn, said in (((4, 16), word), ((4,), "")):
    c = Config(channels=4, channel_mult=(1, 2), norm_groups=2, attn=attn)
    net = UNet(**train.network(c, (1, 1, 8, 8), 0))
    objectives.check_data(c, net, data.read(np.zeros((2, 1, 8, 8), np.uint8), "train", None))
    assert capsys.readouterr().err == said

# *** Table 2 ***

def test_a_learned_variance_and_labels(tmp_path):
  class Two(Affine):
    def __call__(self, x, t, y): return super().__call__(x, t, y).cat(x * 0 + self.b - 2, dim=1)
  model = affine()
  changes = dict(predict="mu", loss="vlb", sigma="learned", class_conditional=True, steps=3)
  train.fit(c := config(tmp_path, **changes), IMAGES, LABELS, Two(model.w, model.b))
  meta = about(tmp_path/"ema.safetensors")
  assert meta["ddpm"] == {"T": 50, "beta_1": 1e-4, "beta_T": 0.2, "schedule": "linear", "sigma": "learned",
                          "predict": "mu"}
  assert meta["classes"] == ["0", "1", "2"] and "unet" not in meta
  net = train.network(c, IMAGES.shape, 3)
  assert (net["in_channels"], net["out_channels"], net["num_classes"]) == (1, 2, 3)
  refused(lambda: fit(tmp_path/"one", **changes), "shapes must agree")
