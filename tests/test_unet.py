"""Appendix B: the network and its operations, plain (unet.py's own) and fast (fast/), against float64 by hand."""
import functools, json
import numpy as np
import pytest
import unet
from common import ROOT, TINY, arr, close, random_model
from engine.capture import captured
from fast import cpu, gpu, scope
from fast.compiler import pairs_of_bfloat16
from tinygrad import Context, Device, Tensor, nn

@pytest.fixture(params=["plain", "fast"])
def way(request):
  with scope() if request.param == "fast" else Context(NOOPT=1): yield request.param  # NOOPT: compiled sooner

def test_the_quick_operations_run_inside_of_the_scope_alone(monkeypatch):
  monkeypatch.setattr(cpu, "linear", lambda *args: "quick")
  monkeypatch.setattr(gpu, "linear", lambda *args: "quick")
  args = [Tensor(a) for a in (arr(1, 2), arr(2, 2), arr(2))]
  assert unet.linear(*args).shape == (1, 2)
  with scope(): assert unet.linear(*args) == "quick"
  monkeypatch.setenv("PLAIN", "1")
  with scope(): assert unet.linear(*args).shape == (1, 2)

def kernels(step):
  """The calls of a captured step, those of its graphs as well."""
  def calls(linear):
    for call in linear.src:
      if call.src[0].arg == "graph": yield from calls(call.src[0].src[0])
      else: yield call
  return list(calls(step.jit.captured.linear))

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

def check(ours, by_hand, *arrays, atol=1e-5):
  """An operation's values against those by hand, its gradients against differences of them."""
  close(ours(*map(Tensor, arrays)).numpy(), by_hand(*[a.astype(np.float64) for a in arrays]), atol=atol)
  grads, r = gradients(ours, *arrays)
  for i, g in enumerate(grads):
    want, d = slope(by_hand, arrays, i, r)
    assert abs((g*d).sum() - want) < 1e-3 * np.abs(g*d).sum() + 1e-4, i

# *** operations ***

@pytest.mark.parametrize("B,H,W,C,O,k,stride,pad", [
  (2, 6, 6, 5, 16, 3, 1, 0), (8, 4, 4, 16, 3, 3, 1, 0), (3, 6, 4, 4, 8, 3, 2, 0), (2, 3, 5, 16, 32, 1, 1, 0),
  (4, 1, 1, 8, 8, 1, 1, 0), (2, 8, 8, 1, 4, 3, 2, 0), (1, 7, 7, 3, 5, 3, 1, 0), (2, 4, 6, 3, 8, 3, 2, 1)])
def test_convolution(B, H, W, C, O, k, stride, pad, way):
  lo, hi = (k//2, k//2) if stride == 1 else (pad, 1-pad)
  by_hand = lambda x, w, *adds: conv_by_hand(x, w, stride, lo, hi) + sum(adds)
  adds = arr(1, 1, 1, O, seed=2), arr(B, 1, 1, O, seed=3), arr(B, H//stride, W//stride, O, seed=4)
  check(functools.partial(unet.convolve, stride=stride, pad=pad), by_hand, arr(B, H, W, C), arr(k, k, C, O, seed=1),
        *adds, atol=2e-4)

@pytest.mark.skipif(not pairs_of_bfloat16(Device.DEFAULT), reason="for processors with AVX512-BF16")
@pytest.mark.parametrize("B,H,W,C,O,k,stride,pad", [
  (3, 4, 8, 32, 48, 3, 1, 0), (2, 3, 5, 48, 16, 3, 1, 0), (2, 8, 4, 16, 32, 3, 2, 0), (2, 4, 4, 32, 16, 3, 2, 1),
  (2, 4, 4, 3, 16, 3, 1, 0), (1, 1, 2, 2, 32, 1, 1, 0), (2, 4, 4, 16, 3, 3, 1, 0)])
def test_convolution_in_pairs_of_bfloat16(B, H, W, C, O, k, stride, pad):
  """Of numbers in bfloat16, against float64: in float32 but for the rounding of y and of dx."""
  lo, hi = (k//2, k//2) if stride == 1 else (pad, 1-pad)
  shapes = [(B, H, W, C), (k, k, C, O), (B, 1, 1, O), (B, H//stride, W//stride, O)]
  x, w, a, g = [Tensor(arr(*s, seed=i)).cast("bfloat16").float().realize() for i, s in enumerate(shapes)]
  def step(x, w, a, g):
    y = unet.convolve(x.cast("bfloat16"), w, a.cast("bfloat16"), stride=stride, pad=pad).float()
    return [y, *(y * g).sum().gradient(x, a, w)]
  quick = captured(step)
  y, dx, da, dw = [v.numpy() for v in quick(x, w, a, g)]
  names = [name for call in kernels(quick) if (name := call.src[0].arg.name).endswith("_pairs")]
  assert any("conv" in name and f"_{C}_{O}" in name for name in names) == (C % 2 == O % 16 == 0)
  assert any("weight" in name for name in names) == (W//stride % 2 == O % 16 == 0)
  x, w, a, g = [v.numpy().astype(np.float64) for v in (x, w, a, g)]
  padded, want = np.pad(x, ((0, 0), (lo, hi), (lo, hi), (0, 0))), conv_by_hand(x, w, stride, lo, hi) + a
  slope, weights = np.zeros_like(padded), np.zeros_like(w)
  for i, j in np.ndindex(k, k):
    at = np.s_[:, i:i+H:stride, j:j+W:stride]
    slope[at] += g @ w[i, j].T
    weights[i, j] = np.einsum("bhwc,bhwo->co", padded[at], g)
  close(dw, weights, atol=1e-5 * np.abs(weights).max())
  close(da, g.sum((1, 2), keepdims=True), atol=1e-4)
  for ours, exact in ((y, want), (dx, slope[:, lo:lo+H, lo:lo+W])):
    assert (np.abs(ours-exact) <= np.abs(exact)/256 + 1e-4).all()

def test_linear(way):
  check(unet.linear, lambda x, w, b: x @ w + b, arr(3, 8), arr(8, 12, seed=1), arr(12, seed=2))

def normalized(x, groups, eps=1e-6):
  v = x.reshape(x.shape[0], -1, groups, x.shape[3]//groups)
  return ((v - v.mean((1, 3), keepdims=True)) / np.sqrt(v.var((1, 3), keepdims=True) + eps)).reshape(x.shape)

@pytest.mark.parametrize("silu,eps", [(True, 1e-6), (False, 1e-6), (True, 0.5)])
def test_group_norm(silu, eps, way):
  def by_hand(x, w, b):
    z = normalized(x, 3, eps) * w + b
    return z / (1 + np.exp(-z)) if silu else z
  check(lambda x, w, b: unet.group_norm(x, w, b, 3, eps, silu), by_hand,
        arr(3, 4, 2, 12, scale=2) + 1, arr(12, seed=1), arr(12, seed=2))

def test_group_norm_far_from_zero(way):
  x = arr(2, 4, 4, 8) + 300  # Σx² − (Σx)² in float32 would lose the variance
  y = unet.group_norm(Tensor(x), Tensor(np.ones(8, np.float32)), Tensor(np.zeros(8, np.float32)), 4).numpy()
  close(y, normalized(x.astype(np.float64), 4), atol=2e-3)

def softmax(s):
  e = np.exp(s - s.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)

@pytest.mark.parametrize("N,C", [(9, 8), (16, 4), (28, 6)])
def test_attention(N, C, way):
  by_hand = lambda q, k, v: softmax(q @ k.transpose(0, 2, 1) / np.sqrt(C)) @ v
  check(unet.attention, by_hand, arr(2, N, C, scale=3), arr(2, N, C, seed=1, scale=3), arr(2, N, C, seed=2))

@pytest.mark.parametrize("head", [0, 2])
def test_attention_layer(head, way):
  norm = functools.partial(unet.GroupNorm, groups=2, eps=1e-6)
  layer, x = unet.Attention(np.random.default_rng(0), 8, norm, head), arr(2, 3, 3, 8)
  layer.out.weight = Tensor(arr(1, 1, 8, 8, seed=5))
  w = {k: v.numpy().astype(np.float64) for k, v in nn.state.get_state_dict(layer).items()}
  h = normalized(x.astype(np.float64), 2).reshape(2, 9, 8)
  q, k, v = [h @ w[f"{n}.weight"][0, 0] for n in "qkv"]
  own = [slice(i, i + (head or 8)) for i in range(0, 8, head or 8)]
  heads = [softmax(q[..., c] @ k[..., c].transpose(0, 2, 1) / np.sqrt(head or 8)) @ v[..., c] for c in own]
  want = x.reshape(2, 9, 8) + np.concatenate(heads, -1) @ w["out.weight"][0, 0]
  close(layer(Tensor(x)).numpy().reshape(2, 9, 8), want, atol=1e-5)

def test_upsampling():
  layer, x = unet.Upsample(np.random.default_rng(0), 4, 4), arr(2, 3, 2, 4)
  layer.weight = Tensor(np.pad(np.eye(4, dtype=np.float32)[None, None], ((1, 1), (1, 1), (0, 0), (0, 0))))
  assert np.array_equal(layer(Tensor(x)).numpy(), x.repeat(2, 1).repeat(2, 2))

def test_dropout():
  x, seed = Tensor(np.ones((4, 8, 8, 16), np.float32)), lambda s: Tensor(np.arange(s, s+4).astype(np.uint32))
  a, b, c = [unet.dropout(x, 0.25, seed(s)).numpy() for s in (1, 1, 9)]
  assert np.array_equal(a, b) and not np.array_equal(a, c)
  assert set(np.unique(a)) == {0.0, np.float32(1/0.75)} and abs((a == 0).mean() - 0.25) < 4 * np.sqrt(0.25*0.75/a.size)
  assert abs(np.corrcoef((a == 0).ravel(), (c == 0).ravel())[0, 1]) < 4 / np.sqrt(a.size)
  assert not np.array_equal(a[0], a[1])
  # what is dropped of an image does not depend on the others of its batch
  assert np.array_equal(a[2:3], unet.dropout(x[:1], 0.25, Tensor(np.array([3], np.uint32))).numpy())
  assert abs(np.corrcoef((a == 0).ravel()[1:], (a == 0).ravel()[:-1])[0, 1]) < 4 / np.sqrt(a.size)

# *** the network ***

def network_by_hand(model, x, t, y):
  """Appendix B in float64, for TINY's two levels: what follows what, written out with the weights' names."""
  w, c = {k: v.numpy().astype(np.float64) for k, v in nn.state.get_state_dict(model).items()}, model.config
  def silu(z): return z / (1 + np.exp(-z))
  def norm(name, h): return normalized(h, c["norm_groups"], c["norm_eps"]) * w[f"{name}.weight"] + w[f"{name}.bias"]
  def dense(name, v): return v @ w[f"{name}.weight"] + w[f"{name}.bias"]
  def conv(name, h, stride=1):
    lo, hi = (w[f"{name}.weight"].shape[0] // 2,) * 2 if stride == 1 else (c["down_pad"], 1 - c["down_pad"])
    return conv_by_hand(h, w[f"{name}.weight"], stride, lo, hi) + w[f"{name}.bias"]
  def block(name, h):
    z = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", h))) + dense(f"{name}.temb", emb)[:, None, None]
    skip = conv(f"{name}.shortcut", h) if f"{name}.shortcut.bias" in w else h
    return conv(f"{name}.conv2", silu(norm(f"{name}.norm2", z))) + skip
  def attend(name, h):
    n, size = norm(f"{name}.norm", h), c["head_channels"] or h.shape[3]
    q, k, v = [conv(f"{name}.{p}", n).reshape(len(h), -1, h.shape[3]) for p in "qkv"]
    heads = [np.s_[..., i:i+size] for i in range(0, h.shape[3], size)]
    out = [softmax(q[s] @ k[s].transpose(0, 2, 1) / np.sqrt(size)) @ v[s] for s in heads]
    return h + conv(f"{name}.out", np.concatenate(out, -1).reshape(h.shape))
  half = c["channels"] // 2
  angle = (t[:, None] - 1) * 10000 ** (-np.arange(half) / (half - 1))
  time = dense("time2", silu(dense("time1", np.concatenate([np.sin(angle), np.cos(angle)], 1))))
  emb = silu(time + w["label"][y])
  skips = [conv("conv_in", x.transpose(0, 2, 3, 1))]
  skips.append(block("down.0.0", skips[-1]))
  skips.append(conv("down.1.0", skips[-1], 2))
  skips.append(attend("down.2.1", block("down.2.0", skips[-1])))
  h = block("mid.2", attend("mid.1", block("mid.0", skips[-1])))
  def joined(h): return np.concatenate([h, skips.pop()], -1)
  h = attend("up.0.1", block("up.0.0", joined(h)))
  h = attend("up.1.1", block("up.1.0", joined(h)))
  h = conv("up.1.2", h.repeat(2, 1).repeat(2, 2))
  h = block("up.3.0", joined(block("up.2.0", joined(h))))
  return conv("conv_out", silu(norm("norm_out", h))).transpose(0, 3, 1, 2)

@pytest.mark.parametrize("more", [{}, {"down_pad": 1, "head_channels": 4, "norm_eps": 1e-2}])
def test_the_network_is_that_of_appendix_b(more, way):
  model, x, t = random_model(num_classes=2, **more), arr(2, 1, 8, 8), np.array([1, 700])
  for y in (np.array([1, 0]), None):  # without labels: "no class", the last
    given = () if y is None else (Tensor(y.astype(np.int32)),)
    out = model(Tensor(x), Tensor(t.astype(np.int32)), *given).numpy()
    want = network_by_hand(model, x.astype(np.float64), t, np.array([2, 2]) if y is None else y)
    close(out, want, rtol=0, atol=2e-5 * np.abs(want).max())

def test_each_layer_drops_by_a_seed_of_its_own(monkeypatch):
  seen = []
  monkeypatch.setattr(unet, "dropout", lambda h, p, seed: seen.append((p, *seed.numpy())) or h)
  model, x, t = random_model(dropout=0.3), Tensor(arr(2, 1, 8, 8)), Tensor(np.array([3, 4], np.int32))
  model(x, t)
  assert not seen
  model(x, t, seed=Tensor(np.array([5, 90], np.uint32)))
  chances, first, second = zip(*seen)
  assert chances == (0.3,) * 8 and len({*first}) == len({*second}) == 8  # its residual blocks

def test_the_papers_network_has_its_number_of_parameters():
  assert sum(p.numel() for p in nn.state.get_parameters(unet.UNet())) == 35_746_307

@pytest.mark.parametrize("shift", [1, 0])
def test_time_is_embedded_from_zero_as_sines_then_cosines(shift):
  model = unet.UNet(**TINY, freq_shift=shift)
  eye = lambda n, o: Tensor(np.eye(n, o, dtype=np.float32))
  model.time1.weight, model.time2.weight = eye(8, 32), eye(32, 32)  # leaves silu(silu(embedding))
  out = model.embed(Tensor(np.array([1, 2, 1000], np.int32))).numpy()[:, :8]
  freq = 10000 ** (-np.arange(4) / (4-shift))
  e = np.concatenate([np.sin(np.outer([0, 1, 999], freq)), np.cos(np.outer([0, 1, 999], freq))], 1)
  silu = lambda z: z / (1 + np.exp(-z))
  close(out, silu(silu(e)), atol=2e-4)

def test_the_frequencies_are_made_once_and_are_no_weight(monkeypatch):
  """Also if a step that is being captured asks for them first: the step would copy them from the host each time."""
  unet.frequencies.cache_clear()
  model, t = unet.UNet(**TINY), [Tensor(np.array([i], np.int32)).realize() for i in (1, 500)]
  step = captured(lambda t: model.embed(t).realize())
  first, second = step(t[0]).numpy(), step(t[1]).numpy()
  close(first, model.embed(t[0]).numpy(), atol=1e-6)
  close(second, model.embed(t[1]).numpy(), atol=1e-6)
  assert {c.src[0].op.name for c in kernels(step)} == {"PROGRAM"}
  assert not [k for k in nn.state.get_state_dict(model) if "freq" in k]

def test_initialisation():
  w = unet.fan_average(np.random.default_rng(0), 3, 3, 64, 32).numpy()
  limit = np.sqrt(6 / (9*64 + 9*32))
  assert abs(w).max() <= limit and abs(w.std() - limit/np.sqrt(3)) < 0.01*limit
  state = nn.state.get_state_dict(unet.UNet(**TINY))
  small = [k for k, v in state.items() if k.endswith("weight") and 0 < np.abs(v.numpy()).max() < 1e-4]
  assert sorted(small) == sorted(k for k in state if k.endswith(("conv2.weight", "out.weight")) and "norm" not in k)

def test_gradients_of_the_network_by_finite_differences():
  model = random_model(num_classes=2)
  x, t, y, r = (Tensor(arr(4, 1, 8, 8)), Tensor(np.array([1, 5, 500, 1000], np.int32)),
                Tensor(np.array([0, 1, 2, 1], np.int32)), Tensor(arr(4, 1, 8, 8, seed=1)))
  for v in (x, t, y, r): v.realize()
  names, params = zip(*nn.state.get_state_dict(model).items())
  f = captured(lambda: (model(x, t, y) * r).sum().realize())
  grads = captured(lambda: (model(x, t, y) * r).sum().gradient(*params))()
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

@pytest.mark.slow
def test_plain_and_fast_are_the_same_network(monkeypatch):
  """Values and all gradients of a network with every kind of layer. Both are compiled inside of the scope, sooner."""
  model = random_model(in_channels=3, num_classes=2, image_size=(8, 4), out_channels=2, head_channels=4, norm_eps=1e-3,
                       down_pad=1, freq_shift=0)
  x, t, y, r = arr(2, 3, 8, 4), np.array([3, 800], np.int32), np.array([2, 0], np.int32), arr(2, 2, 8, 4, seed=1)
  def both(plain):
    monkeypatch.setenv("PLAIN", plain)
    out = model(Tensor(x), Tensor(t), Tensor(y))
    grads = (out * Tensor(r)).sum().gradient(*nn.state.get_parameters(model))
    monkeypatch.setenv("PLAIN", "0")
    Tensor.realize(out, *grads)
    return out.numpy(), [g.numpy() for g in grads]
  with scope(): (plain_out, plain_grads), (out, grads) = both("1"), both("0")
  close(out, plain_out, rtol=0, atol=1e-5 * np.abs(plain_out).max())
  greatest = max(np.abs(g).max() for g in plain_grads)
  for g, p in zip(grads, plain_grads): close(g, p, rtol=0, atol=1e-5 * greatest)

def test_the_arguments_and_the_names_of_the_weights():
  """A file of before these arguments loads as it did: its config lacks them, its weights have these names."""
  with open(ROOT/"checkpoints"/"mnist.safetensors", "rb") as f:
    header = json.loads(f.read(int.from_bytes(f.read(8), "little")))
  sizes = json.loads(header["__metadata__"]["ddpm"])["unet"]
  model = unet.UNet(**sizes)
  state = nn.state.get_state_dict(model)
  assert {k: list(v.shape) for k, v in state.items()} == {k: v["shape"] for k, v in header.items() if "shape" in v}
  new = dict(out_channels=None, head_channels=0, norm_eps=1e-6, down_pad=0, freq_shift=1)
  assert json.loads(json.dumps(model.config)) == new | sizes

def test_a_time_may_be_one_int():
  model, x = random_model(channel_mult=(1,), image_size=2), Tensor(arr(2, 1, 2, 2))
  want = model(x, Tensor(np.array([7, 7], np.int32))).numpy()
  for t in (7, Tensor(np.array([7, 7], np.uint8))): close(model(x, t).numpy(), want, atol=1e-6)

def test_head_channels_divide_every_level_that_has_attention():
  with pytest.raises(ValueError, match="16 channels do not divide by head_channels"):
    unet.UNet(**TINY | dict(channels=16, channel_mult=(1, 2), attn_resolutions=(8,), head_channels=32))

@pytest.mark.parametrize("size,attn,where", [((8, 16), (8,), 1), ((16, 8), (8,), 1), (8, (8,), 0), ((4, 8), (4,), 1)])
def test_where_attention_is(size, attn, where):
  """At the level at which the longer side has this length; a model takes images of other sides than its own."""
  model = unet.UNet(**TINY | dict(image_size=size, attn_resolutions=attn))
  has = [i for i, layers in enumerate(model.down) if any(isinstance(layer, unet.Attention) for layer in layers)]
  assert has == [2*where]  # down: a block, halving, a block

@pytest.mark.parametrize("wrong,word", [
  ({"image_size": 9}, "divide"), ({"norm_groups": 3}, "groups"), ({"channels": 7}, "even|groups"),
  ({"dropout": 1.0}, "dropout"), ({"channel_mult": ()}, "size"), ({"num_classes": -1}, "size"),
  ({"image_size": (8, 9)}, "8x9"), ({"head_channels": 3}, "head_channels"), ({"down_pad": 2}, "down_pad"),
  ({"out_channels": -1}, "size"), ({"norm_eps": 0}, "norm_eps"), ({"image_size": 8.0}, "whole"),
  ({"image_size": (8, 8.0)}, "whole"), ({"channel_mult": (1, 1.5)}, "whole")])
def test_sizes_that_do_not_fit(wrong, word):
  with pytest.raises(ValueError, match=word): unet.UNet(**{**TINY, **wrong})
