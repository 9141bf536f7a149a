"""The project as a library: a user's own model and own arrays, trained, saved, loaded and sampled from."""
import dataclasses, threading
import numpy as np
import pytest
from common import ROOT, TINY, arr, close, f32, random_model, refused, rng
from engine.capture import captured
from engine.state import State
from extras import editing
from files import checkpoint
from files.weights import read_tensors, write_tensors
from test_train import IMAGES, LABELS, Affine, about, affine, cache, config  # noqa: F401
from test_train import contents, fit, losses, saved_step
from tinygrad import Device, Tensor, TinyJit, dtypes, nn
from tinygrad.helpers import TRAINING
import data, evaluate, sample, train
from ddpm import DDPM
from train import Config
from unet import UNet

class Net:
  """A network of tinygrad's own layers, with labels: 3 classes and "none"."""
  def __init__(self, c:int=1):
    self.first, self.last = nn.Conv2d(c + 1, 8, 3, padding=1), nn.Conv2d(8, c, 3, padding=1)
    self.label = nn.Embedding(4, 8)
  def __call__(self, x, t, y):
    level = (t.float() / 50).reshape(-1, 1, 1, 1).expand(-1, 1, *x.shape[2:])
    return self.last((self.first(x.cat(level, dim=1)) + self.label(y).reshape(-1, 8, 1, 1)).silu())

def loads(model, out):
  """The averaged weights of a run, by tinygrad's own means."""
  nn.state.load_state_dict(model, nn.state.safe_load(out/"ema.safetensors"), verbose=False)
  return model

def numbers(model): return {k: v.numpy() for k, v in nn.state.get_state_dict(model).items()}

# *** a model of one's own ***

@pytest.mark.quick
def test_a_model_of_ones_own(tmp_path):
  model, images = Net(), np.clip(rng().normal(200, 20, (256, 1, 8, 8)), 0, 255).astype(np.uint8)
  settings = dict(steps=150, lr=0.01, ema=0.9, save_every=50, class_conditional=True)
  out = fit(tmp_path/"run", images, np.arange(256) % 3, model, **settings)
  assert out == tmp_path/"run" and np.mean(losses(out)[-20:]) < 0.6 * np.mean(losses(out)[:5])
  raw, saved = numbers(model), read_tensors(out/"last.safetensors")[0]
  for k, v in raw.items(): close(v, saved[f"raw.{k}"], rtol=0)  # the model itself holds what was trained
  again = loads(Net(), out)
  for k, v in numbers(again).items(): close(v, saved[f"ema.{k}"], rtol=0)
  assert about(out/"ema.safetensors")["classes"] == ["0", "1", "2"] and "unet" not in about(out/"ema.safetensors")
  # it is a sampler's model, and the images are those it was trained on: bright
  y = Tensor(np.arange(6, dtype=np.int32) % 3).realize()
  *_, (t, x, _) = sample.SAMPLERS["ddim"](DDPM(50, beta_T=0.2), lambda x, t: again(x, t, y),
                                          sample.draw_x_T(6, (1, 8, 8), 0), 50)
  assert t == 0 and abs(data.to_uint8(x.numpy()).mean() - 200) < 20

class Noisy:
  """It answers a random number of its own, 0 to 100, the same for all pixels."""
  def __init__(self): self.w = f32(np.ones(1))
  def __call__(self, x, t): return x * 0 + self.w * 100 * Tensor.rand(1)

@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="names another CPU device")
def test_random_numbers_of_another_device():
  Tensor.manual_seed(3)
  step, x = captured(lambda x: (x + Tensor.rand(1, device="CPU:1")).realize()), f32(np.zeros(1)).to("CPU:1").realize()
  assert len({step(x).item() for _ in range(5)}) == 5

def test_random_numbers_of_a_models_own(tmp_path):
  """They differ from call to call, also if nothing has drawn any before: as in a new process, the generator is new."""
  Tensor.manual_seed(3)
  root = np.sqrt(losses(fit(tmp_path, model=Noisy(), steps=8, lr=1e-12)))
  assert len(root) == 8 and root.std() > 10
  Tensor.manual_seed(3)
  net = Noisy()
  said = sample.SAMPLERS["ddpm"](DDPM(8, predict="x0"), net, sample.draw_x_T(1, (1, 2, 2), 0), 8, clip=False)
  assert np.std([x0.numpy().mean() for *_, x0 in said][1:]) > 10

@pytest.mark.parametrize("wrong,words", [
  (dict(steps="3"), ("--steps", "whole")), (dict(T=10.5), ("--T", "whole")), (dict(lr="fast"), ("--lr", "1e-12")),
  (dict(attn=16), ("--attn", "whole numbers")),
  (dict(channel_mult=(1, 1.5)), ("--channel-mult", "whole numbers")), (dict(seed=None), ("--seed", "whole")),
  (dict(schedule="foo"), ("--schedule must be one of linear",)), (dict(dtype="float64"), ("--dtype must be one of",))])
def test_settings_that_cannot_be(tmp_path, wrong, words):
  refused(lambda: fit(tmp_path/"run", **wrong), *words)
  assert not (tmp_path/"run").exists()

def test_steps_that_change_nothing_are_said(tmp_path, capsys):
  for steps, anneal, said in ((2, 4, 0), (4, 4, 0), (6, 4, 1), (6, 0, 0)):
    fit(tmp_path/f"{steps} {anneal}", steps=steps, anneal=anneal)
    assert capsys.readouterr().err.count("rate is 0 after step 4 (--anneal): the steps from there to 6 change") == said

def test_numbers_of_numpy_as_settings(tmp_path):
  out = fit(tmp_path, steps=np.int64(2), lr=np.float32(0.5), T=np.int32(50))
  assert fit(tmp_path, steps=3, lr=0.5) == out and len(losses(out)) == 3
  tensors, meta = read_tensors(out/"last.safetensors")[0], about(out/"last.safetensors")
  write_tensors(out/"last.safetensors", tensors, meta | {"train": meta["train"] | {"T": "50"}})  # as before
  fit(tmp_path, steps=4, lr=0.5)
  assert saved_step(out) == 4
  refused(lambda: fit(tmp_path, steps=5, lr=0.5, T=51), "T = 50, not 51")

def test_its_run_goes_on(tmp_path):
  """In one piece or in two: the same numbers. The second model begins with other weights, which do not matter."""
  first, second = Net(), Net()
  weights = {k: v + 0 for k, v in numbers(first).items()}
  fit(tmp_path/"a", model=first, steps=4, class_conditional=True)
  for k, v in nn.state.get_state_dict(first).items(): v.replace(f32(weights[k]))
  fit(tmp_path/"b", model=first, steps=2, class_conditional=True)
  fit(tmp_path/"b", model=second, steps=4, class_conditional=True)
  assert contents(tmp_path/"a") == contents(tmp_path/"b") and losses(tmp_path/"a") == losses(tmp_path/"b")

def test_what_a_run_leaves_belongs_to_it(tmp_path):
  """A second run with the same object begins where the first has brought it, and harms nothing of the first."""
  model = affine()
  first = fit(tmp_path/"a", model=model)
  before, weights = contents(first), numbers(model)
  second = fit(tmp_path/"b", model=model, steps=1, lr=1e-12)
  assert contents(first) == before
  for k, v in weights.items(): close(read_tensors(second/"last.safetensors")[0][f"raw.{k}"], v, atol=1e-9)

def test_an_unhashable_model(tmp_path):
  model, d, jits = affine(), DDPM(5, 0.01, 0.5), {}
  with pytest.raises(TypeError): hash(model)
  w, b = (getattr(model, k).numpy().astype(np.float64) for k in "wb")
  fit(tmp_path, model=model, steps=1, lr=1e-12)
  x_T = sample.draw_x_T(2, (1, 8, 8), 0)
  for _ in range(2):
    x = x_T.numpy().astype(np.float64)
    for t, got, _ in sample.SAMPLERS["ddim"](d, model, x_T, 5, jits=jits):
      eps = x * w + b * (t + 1) / 100                        # x is of time t + 1
      x0 = np.clip((x - d.noise_std[t + 1] * eps) / d.sqrt_alpha_bar[t + 1], -1, 1)
      eps = (x - d.sqrt_alpha_bar[t + 1] * x0) / d.noise_std[t + 1]
      x = d.sqrt_alpha_bar[t] * x0 + d.noise_std[t] * eps
      close(got.numpy(), x, atol=1e-5)
  assert np.isfinite(evaluate.bound(d, model, IMAGES[:2]).total).all()

def test_weights_with_two_names(tmp_path):
  class Tied:
    def __init__(self): self.a = self.b = f32(arr(1, 8, 8, scale=0.3))
    def __call__(self, x, t): return x * self.a + self.b
  model = Tied()
  loss, batch = lambda m, x: m(x, Tensor([0])).square().flatten(1).mean(1), [arr(4, 1, 8, 8)]
  state = State(model)
  state.gradient(loss, batch)
  x, a = batch[0].astype(np.float64), arr(1, 8, 8, scale=0.3).astype(np.float64)
  want = (2 * (x * a + a) * (x + 1) / 64).mean(0)             # by way of both names
  assert state.size == 64
  close(state.flat["grad"].numpy()[:64].reshape(1, 8, 8), want, rtol=1e-4, atol=1e-6)
  out = fit(tmp_path, model=model, steps=2)
  saved = read_tensors(out/"ema.safetensors")[0]
  assert set(saved) == {"a", "b"} and np.array_equal(saved["a"], saved["b"])
  fit(tmp_path, model=Tied(), steps=3)
  assert saved_step(tmp_path) == 3

def test_what_is_not_trained_is_kept(tmp_path):
  class Model(Affine):
    def __init__(self, level):
      super().__init__(*[getattr(affine(), k) for k in "wb"])
      self.level, self.order = f32([level]).is_param_(False), Tensor([3, 1, 2])
    def __call__(self, x, t): return super().__call__(x, t) + self.level
  fit(tmp_path/"a", model=Model(0.5), steps=4)
  again = numbers(loads(Model(9), tmp_path/"a"))
  assert again["level"].tolist() == [0.5] and again["order"].tolist() == [3, 1, 2]
  fit(tmp_path/"b", model=Model(0.5), steps=2)
  fit(tmp_path/"b", model=(other := Model(9)), steps=4)       # random constants would be others in each program
  assert contents(tmp_path/"a") == contents(tmp_path/"b") and other.level.numpy() == 0.5

def test_statistics_of_batches(tmp_path):
  """tinygrad's BatchNorm counts the batches that it has seen; the average has the same statistics."""
  class Model:
    def __init__(self): self.norm, self.w = nn.BatchNorm(1), f32(np.full((1, 8, 8), 0.5))
    def __call__(self, x, t): return self.norm(x) * self.w
  model = Model()
  fit(tmp_path, model=model, steps=4, lr=1e-12, ema=0.5)
  assert model.norm.num_batches_tracked.numpy() == 4
  d, mean = DDPM(50, beta_T=0.2), 0.0
  for n in range(1, 5):
    x, t, eps, *_ = train.draw(config(tmp_path), IMAGES, LABELS, 3, n)
    a, b = (np.reshape(v[t], (-1, 1, 1, 1)) for v in (d.sqrt_alpha_bar, d.noise_std))
    x_t = a * (x / 127.5 - 1) + b * eps
    mean = 0.9 * mean + 0.1 * x_t.mean()
  close(loads(Model(), tmp_path).norm.running_mean.numpy(), [mean], atol=1e-5)

def test_training_is_said(tmp_path):
  seen = []
  class Model(Affine):
    def __call__(self, x, t):
      seen.append((x.shape[0], bool(TRAINING)))
      return super().__call__(x, t)
  fit(tmp_path, model=Model(*[getattr(affine(), k) for k in "wb"]), steps=1, sample_every=1, T=3)
  assert set(seen) == {(8, True), (36, False)}

def test_a_model_that_reads_the_host(tmp_path):
  class Model(Affine):
    def __call__(self, x, t): return x * self.w * float(t.numpy().mean() / 50) + self.b
  fit(tmp_path, model=Model(*[getattr(affine(), k) for k in "wb"]), steps=3)
  assert len(set(losses(tmp_path))) == 3

def test_a_step_that_runs_twice_counts_once(tmp_path):
  """The first try, which cannot be captured, leaves nothing in tensors that are not trained."""
  class Model(Affine):
    def __call__(self, x, t): return self.norm(x) * self.w * float(t.numpy().mean() / 50) + self.b
  model = Model(*[getattr(affine(), k) for k in "wb"])
  model.norm = nn.BatchNorm(1)
  fit(tmp_path, model=model, steps=3)
  assert model.norm.num_batches_tracked.item() == 3

def test_a_models_own_config_means_nothing_here(tmp_path):
  class Model(Affine):
    def __init__(self, width, depth=3):
      super().__init__(*[getattr(affine(), k) for k in "wb"])
      self.config, self.dtype = {"width": object(), "more": width}, "mine"
  for steps in (1, 2): fit(tmp_path, model=(model := Model(steps)), steps=steps)
  assert saved_step(tmp_path) == 2 and model.dtype == "mine"

@dataclasses.dataclass(frozen=True)
class Frozen:
  w:Tensor
  def __call__(self, x, t): return x * self.w

def test_a_frozen_dataclass_in_16_bits(tmp_path):
  fit(tmp_path, model=Frozen(f32(arr(1, 8, 8))), steps=2, dtype="bfloat16")
  assert saved_step(tmp_path) == 2

def test_a_model_may_be_a_tinyjit():
  """Used before or not: it becomes a part of the captured step."""
  net, d, x_T = affine(), DDPM(5, 0.01, 0.5), sample.draw_x_T(2, (1, 8, 8), 0)
  def draw(name, model): return np.stack([x.numpy() for _, x, _ in sample.SAMPLERS[name](d, model, x_T, 5)])
  fresh, used = (TinyJit(lambda x, t: net(x, t).realize()) for _ in range(2))
  for i in range(3): used(f32(arr(2, 1, 8, 8, seed=i)), Tensor(np.full(2, i + 1, np.int32)).realize())
  for name in ("ddim", "ode"):
    want = draw(name, net)
    for jit in (fresh, used, fresh): close(draw(name, jit), want, rtol=1e-5, atol=1e-6)
  x, t = f32(arr(2, 1, 8, 8, seed=9)), Tensor(np.full(2, 3, np.int32)).realize()
  close(used(x, t).numpy(), net(x, t).numpy(), rtol=1e-5)     # and it is as it was

def test_steps_that_are_kept_know_which_weights_they_have(tmp_path):
  net, jits, d, x_T = affine(), {}, DDPM(5, 0.01, 0.5), sample.draw_x_T(2, (1, 8, 8), 0)
  def draw(**kept): return np.stack([x.numpy() for _, x, _ in sample.SAMPLERS["ddim"](d, net, x_T, 5, **kept)])
  before, n = draw(jits=jits), len(jits)
  assert (draw(jits=jits) == before).all() and len(jits) == n
  net.w.replace(f32(net.w.numpy() * 2))
  assert np.abs(draw(jits=jits) - before).max() > 0.1 and (draw(jits=jits) == draw()).all()
  encode = lambda **kept: editing.ddim_encode(d, net, x_T, [5, 3, 0], **kept).numpy()
  before = encode(jits=jits)
  net.w.replace(f32(net.w.numpy() / 2))
  assert np.abs(encode(jits=jits) - before).max() > 0.01 and (encode(jits=jits) == encode()).all()

def test_an_answer_that_is_the_input_is_each_steps_own():
  d, x_T = DDPM(4, 0.1, 0.5, predict="x0"), sample.draw_x_T(2, (1, 2, 2), 0)
  for name in ("ddpm", "ddim", "ode", "dpm"):
    a, b = (np.stack([x0_hat.numpy() for *_, x0_hat in sample.SAMPLERS[name](d, model, x_T, 4, clip=False)])
            for model in (lambda x, t: x, lambda x, t: x * 1.0000001))
    close(a, b, rtol=1e-5, atol=1e-5)

def test_a_network_that_was_in_16_bits_is_trained_in_those_that_are_asked_for():
  small = dict(channel_mult=(1,), attn_resolutions=())
  for dtype in (dtypes.float32, dtypes.bfloat16):
    net = random_model(**small)
    net.dtype = dtypes.bfloat16
    state = State(net, dtype)
    assert (state.model.dtype, state.average.dtype) == (dtype, dtypes.float32)

class Broken:
  def __init__(self, **parts): self.__dict__.update(parts)
  def __call__(self, x, t): return (x * self.w).mean(1)

class Lambdas:
  """A copy of it would have the functions of the first, and so its weights."""
  def __init__(self): self.w, self.layers = f32(arr(1, 8, 8)), [Tensor.relu, lambda x: x * 2, [lambda x: x * self.w]]
  def __call__(self, x, t): return self.layers[-1][0](x)

@pytest.mark.parametrize("model,words", [
  (Broken(), "no tensors"), (lambda x, t: x, "no tensors"), (Broken(w=Tensor([1, 2])), "no tensors of floats"),
  (Broken(w=f32(np.zeros(8)), lock=threading.Lock()), "cannot be copied"),
  (Broken(w=f32(np.zeros(8))), "shapes must agree"), (UNet(**TINY | {"image_size": 16}), "(1, 16, 16) (1, 8, 8)"),
  (UNet(**TINY | {"in_channels": 3}), "(3, 8, 8) (1, 8, 8)"),
  (Lambdas(), "Lambdas.__init__.<locals>.<lambda> average")])
def test_models_that_do_not_do(tmp_path, model, words):
  refused(lambda: fit(tmp_path/"run", model=model), *words.split())
  assert not (tmp_path/"run"/"last.safetensors").exists()

# *** arrays of one's own ***

def test_an_array_and_a_u_net(tmp_path):
  """Floats, five channels, height and width apart; with labels. The checkpoint says what is needed to draw from it."""
  images = rng().normal(3, 10, (64, 5, 8, 12))
  c = Config(**dict(out=tmp_path/"run", T=50, beta_T=0.2, batch=4, steps=2, channels=8, channel_mult=(1,), attn=(),
                    num_res_blocks=1, norm_groups=4, dropout=0.0, sample_every=0, class_conditional=True))
  before = images.copy()
  out = train.fit(c, images, LABELS)
  assert np.array_equal(images, before)
  net, meta = checkpoint.load(out/"ema.safetensors")
  assert sample.image_shape(net) == (5, 8, 12) and net.config["num_classes"] == 3
  assert meta["limits"] == [images.min(), images.max()] and meta["dataset"] is None
  *_, (_, x, _) = sample.SAMPLERS["ddim"](DDPM(**meta["ddpm"]), net, sample.draw_x_T(1, (5, 8, 12), 0), 1)
  drawn = data.unscaled(x.numpy(), meta["limits"])
  assert drawn.shape == (1, 5, 8, 12) and drawn.min() >= images.min() * 1.001 and drawn.dtype == np.float32

@pytest.mark.parametrize("images,shape", [
  (rng().integers(0, 256, (64, 8, 12, 5), np.uint8), (5, 8, 12)), (rng().random((64, 6, 8)), (1, 6, 8)),
  (Tensor(rng().random((64, 3, 4, 4)).astype(np.float32)), (3, 4, 4)), (IMAGES.tolist(), (1, 8, 8)),
  (rng().random((64, 2, 9, 7)) > 0.5, (2, 9, 7)), (np.float16(rng().random((64, 4, 6, 10))), (4, 6, 10))])
def test_arrays_of_all_kinds(tmp_path, monkeypatch, images, shape):
  """Samples of any number of channels can be shown, and what is trained on lies in [-1, 1]."""
  seen, draw = [], train.draw
  monkeypatch.setattr(train, "draw", lambda *a: seen.append(draw(*a)) or seen[-1])
  fit(tmp_path, images, model=affine(shape), steps=1, sample_every=1, T=3)
  x = data.scaled(seen[0].x)
  assert x.shape == (8, *shape) and x.min() >= -1 and x.max() <= 1 and x.max() - x.min() > 1.5
  assert (tmp_path/"samples.png").exists() and about(tmp_path/"ema.safetensors")["dataset"] is None

def test_the_bound_needs_levels(tmp_path):
  refused(lambda: fit(tmp_path/"run", IMAGES / 7, loss="vlb"), "--loss vlb", "8 bits")
  assert not (tmp_path/"run").exists()

@pytest.mark.parametrize("images,labels,words", [
  (np.zeros((0, 1, 8, 8), np.uint8), None, "shape"), (IMAGES.astype(object), None, "uint8 or floats"),
  ([1, 2], None, "shape"), (None, None, "shape"), (IMAGES, LABELS[:3], "labels (3,) 64"), ("nothing", None, "nothing"),
  (IMAGES * np.nan, None, "finite"), (np.zeros((4, 1, 8, 8)), None, "all its numbers"),
  (IMAGES, LABELS - 1, "whole numbers from 0")])
def test_arrays_that_are_refused(tmp_path, images, labels, words):
  refused(lambda: fit(tmp_path/"run", images, labels), *words.split())
  assert not (tmp_path/"run").exists()

def test_words_for_labels_and_paths_for_places(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  names = np.array(["cat", "dog", "cat", "ant"] * 16)
  c = dataclasses.replace(config(""), out=Config.out, class_conditional=True, steps=1)
  out = train.fit(c, IMAGES, names, affine())
  assert str(out) == "runs/array" and about(out/"ema.safetensors")["classes"] == ["ant", "cat", "dog"]
  np.save(tmp_path/"mine.npy", IMAGES)
  out = train.fit(dataclasses.replace(c, class_conditional=False), tmp_path/"mine.npy", model=affine())
  assert str(out) == "runs/mine" and about(out/"ema.safetensors")["dataset"] == str(tmp_path/"mine.npy")
  init = ROOT/"checkpoints"/"mnist.safetensors"
  refused(lambda: train.fit(dataclasses.replace(c, init=init, restart=True), IMAGES, names, affine()), str(init))

def test_a_schedule_of_ones_own_and_labels_that_are_always_shown(tmp_path):
  """A run takes both from its Config; --init takes the schedule from its checkpoint."""
  own = [0.1, 0.2, 0.3]
  out = fit(tmp_path/"run", T=3, schedule=own, steps=1, class_conditional=True, drop_labels=0.0)
  said = about(out/"ema.safetensors")
  assert said["ddpm"]["schedule"] == own and said["null_class"] is False
  checkpoint.save(tmp_path/"a.safetensors", UNet(**TINY), said)
  c = train.arguments(["--init", str(tmp_path/"a.safetensors")])
  fit(tmp_path/"next", T=3, schedule=c.schedule, steps=1)
  assert about(tmp_path/"next"/"ema.safetensors")["null_class"] is True
  refused(lambda: fit(tmp_path/"other", T=4, schedule=own), "T = 4 numbers")

# *** around it ***

def in_a_thread(call):
  """What it returns, or its exception."""
  found = []
  def go():
    try: found.append(call())
    except BaseException as e: found.append(e)
  thread = threading.Thread(target=go)
  thread.start()
  thread.join()
  return found[0]

def test_training_in_a_thread(tmp_path):
  """As notebooks and Gradio do: no signals are set, and another thread has opened tinygrad's cache of kernels."""
  def train_there(name): return fit(tmp_path/name, IMAGES[:, :, :, :5], model=affine((1, 8, 5)), steps=2)
  assert in_a_thread(lambda: train_there("a")) == train_there("b").parent/"a"
  assert contents(tmp_path/"a") == contents(tmp_path/"b")
