"""Appendix B: the network and its operations, plain (unet.py's own) and fast (fast/), against float64 by hand."""
import numpy as np
import pytest
import unet
from common import GOLDEN, TINY, arr, close, random_model
from files import checkpoint
from tinygrad import Tensor, TinyJit, nn

@pytest.fixture(params=["plain", "fast"])
def way(request, monkeypatch):
  monkeypatch.setenv("PLAIN", str(int(request.param == "plain")))
  return request.param

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

@pytest.mark.parametrize("B,S,C,O,k,stride", [
  (2, 6, 5, 16, 3, 1), (8, 4, 16, 3, 3, 1), (3, 6, 4, 8, 3, 2), (2, 3, 16, 32, 1, 1), (4, 1, 8, 8, 1, 1),
  (2, 8, 1, 4, 3, 2), (1, 7, 3, 5, 3, 1)])
def test_convolution(B, S, C, O, k, stride, way):
  lo, hi = (k//2, k//2) if stride == 1 else (0, 1)
  by_hand = lambda x, w, *adds: conv_by_hand(x, w, stride, lo, hi) + sum(adds)
  adds = arr(1, 1, 1, O, seed=2), arr(B, 1, 1, O, seed=3), arr(B, S//stride, S//stride, O, seed=4)
  check(lambda *a: unet.convolve(*a, stride=stride), by_hand, arr(B, S, S, C), arr(k, k, C, O, seed=1), *adds,
        atol=2e-4)

def test_linear(way):
  check(unet.linear, lambda x, w, b: x @ w + b, arr(3, 8), arr(8, 12, seed=1), arr(12, seed=2))

def normalized(x, groups):
  v = x.reshape(x.shape[0], -1, groups, x.shape[3]//groups)
  return ((v - v.mean((1, 3), keepdims=True)) / np.sqrt(v.var((1, 3), keepdims=True) + 1e-6)).reshape(x.shape)

@pytest.mark.parametrize("silu", [True, False])
def test_group_norm(silu, way):
  def by_hand(x, w, b):
    z = normalized(x, 3) * w + b
    return z / (1 + np.exp(-z)) if silu else z
  check(lambda x, w, b: unet.group_norm(x, w, b, 3, silu), by_hand,
        arr(3, 4, 4, 12, scale=2) + 1, arr(12, seed=1), arr(12, seed=2))

def test_group_norm_far_from_zero(way):
  x = arr(2, 4, 4, 8) + 300  # Σx² − (Σx)² in float32 would lose the variance
  y = unet.group_norm(Tensor(x), Tensor(np.ones(8, np.float32)), Tensor(np.zeros(8, np.float32)), 4, False).numpy()
  close(y, normalized(x.astype(np.float64), 4), atol=2e-3)

def softmax(s):
  e = np.exp(s - s.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)

@pytest.mark.parametrize("N,C", [(9, 8), (16, 4), (28, 6)])
def test_attention(N, C, way):
  by_hand = lambda q, k, v: softmax(q @ k.transpose(0, 2, 1) / np.sqrt(C)) @ v
  check(unet.attention, by_hand, arr(2, N, C, scale=3), arr(2, N, C, seed=1, scale=3), arr(2, N, C, seed=2))

def test_attention_layer(way):
  layer, x = unet.Attention(np.random.default_rng(0), 8, 2), arr(2, 3, 3, 8)
  layer.out.weight = Tensor(arr(1, 1, 8, 8, seed=5))
  w = {k: v.numpy().astype(np.float64) for k, v in nn.state.get_state_dict(layer).items()}
  h = normalized(x.astype(np.float64), 2).reshape(2, 9, 8)
  q, k, v = [h @ w[f"{n}.weight"][0, 0] for n in "qkv"]
  want = x.reshape(2, 9, 8) + softmax(q @ k.transpose(0, 2, 1) / np.sqrt(8)) @ v @ w["out.weight"][0, 0]
  close(layer(Tensor(x)).numpy().reshape(2, 9, 8), want, atol=1e-5)

def test_upsampling():
  x = arr(2, 3, 3, 4)
  assert np.array_equal(unet.upsample(Tensor(x)).numpy(), x.repeat(2, 1).repeat(2, 2))

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

def test_the_papers_network_has_its_number_of_parameters():
  assert sum(p.numel() for p in nn.state.get_parameters(unet.UNet())) == 35_746_307

def test_time_is_embedded_from_zero_as_sines_then_cosines():
  model = unet.UNet(**TINY)
  eye = lambda n, o: Tensor(np.eye(n, o, dtype=np.float32))
  model.time1.weight, model.time2.weight = eye(8, 32), eye(32, 32)  # leaves silu(silu(embedding))
  out = model.embed(Tensor(np.array([1, 2, 1000], np.int32))).numpy()[:, :8]
  freq = 10000 ** (-np.arange(4) / 3)
  e = np.concatenate([np.sin(np.outer([0, 1, 999], freq)), np.cos(np.outer([0, 1, 999], freq))], 1)
  silu = lambda z: z / (1 + np.exp(-z))
  close(out, silu(silu(e)), atol=2e-4)

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

def test_plain_and_fast_are_the_same_network(monkeypatch):
  """Values and all gradients of a network with every kind of layer."""
  model = random_model(num_classes=2, in_channels=3, channel_mult=(1, 2, 2), image_size=16, attn_resolutions=(8, 4))
  x, t, y, r = arr(2, 3, 16, 16), np.array([3, 800], np.int32), np.array([2, 0], np.int32), arr(2, 3, 16, 16, seed=1)
  def both():
    out = model(Tensor(x), Tensor(t), Tensor(y))
    grads = (out * Tensor(r)).sum().gradient(*nn.state.get_parameters(model))
    Tensor.realize(out, *grads)
    return out.numpy(), [g.numpy() for g in grads]
  (out, grads), _ = both(), monkeypatch.setenv("PLAIN", "1")
  plain_out, plain_grads = both()
  close(out, plain_out, rtol=0, atol=1e-5 * np.abs(plain_out).max())
  greatest = max(np.abs(g).max() for g in plain_grads)
  for g, p in zip(grads, plain_grads): close(g, p, rtol=0, atol=1e-5 * greatest)

@pytest.mark.parametrize("case", ["diffusers_tiny", "diffusers_tiny_old_names"])
def test_known_answers(case, way):
  if not (GOLDEN/case).exists(): pytest.skip("the known answers are not on this machine")
  model, _ = checkpoint.load(GOLDEN/case)
  known = np.load(GOLDEN/case/"case.npz")
  out = model(Tensor(known["x"]), Tensor((known["timestep_from_0"]+1).astype(np.int32))).numpy()
  assert np.abs(out - known["eps"]).max() < 1e-4 * np.abs(known["eps"]).max()

@pytest.mark.parametrize("wrong,word", [
  ({"image_size": 9}, "divide"), ({"norm_groups": 3}, "groups"), ({"channels": 7}, "even|groups"),
  ({"dropout": 1.0}, "dropout"), ({"channel_mult": ()}, "size"), ({"num_classes": -1}, "size")])
def test_sizes_that_do_not_fit(wrong, word):
  with pytest.raises(ValueError, match=word): unet.UNet(**{**TINY, **wrong})
