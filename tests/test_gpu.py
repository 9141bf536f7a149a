"""GPUs without one: tensor cores on tinygrad's emulators of three vendors, and what graphs need of kernels."""
import os, subprocess, sys
import numpy as np
import pytest
import unet
from common import ROOT, arr, close, random_model
from engine.capture import captured
from fast import cpu, gpu, scope
from test_unet import kernels
from tinygrad import Device, Tensor, nn
from tinygrad.engine.realize import get_call_arg_uops
pytestmark = pytest.mark.slow

EMULATED = """if True:
  import sys
  import numpy as np
  from tinygrad import Tensor, dtypes
  from tinygrad.uop.ops import Ops
  from fast import gpu, kernels, schedules, scope
  dtype, rng, chosen, parted = getattr(dtypes, sys.argv[1]), np.random.default_rng(0), [], []
  on_tensor_cores, schedules.ENOUGH = kernels.on_tensor_cores, 1  # a warp keeps several tiles, as in large products
  def noted(kernel, device):
    made = on_tensor_cores(kernel, device)
    chosen.append(made is not None and made.arg.opts_to_apply[0].op.name == "TC")
    parted.append(sum(u.op is Ops.RANGE and u.arg[0] >= schedules.PARTS for u in made.backward_slice))
    return made
  kernels.on_tensor_cores = noted
  def draw(*shape): return Tensor(rng.standard_normal(shape).astype(np.float32)).cast(dtype).realize()
  def num(t): return t.float().numpy().astype(np.float64)
  def error(ours, want): return np.abs(num(ours) - want).max() / np.abs(want).max()
  def conv(x, w, lo, hi):
    x, k = np.pad(x, ((0, 0), (lo, hi), (lo, hi), (0, 0))), w.shape[0]
    H = x.shape[1] - k + 1
    return sum(np.einsum("bhwc,co->bhwo", x[:, i:i+H, j:j+H], w[i, j]) for i in range(k) for j in range(k)), x
  errors = {}
  O = int(sys.argv[2])
  scope().__enter__()
  for B, S, C, O, k in ((16, 2, 16, O, 3), (1, 16, 16, O, 3), (16, 2, 32, 64, 1)):  # M: images, a row of pixels, both
    x, w, g = draw(B, S, S, C), draw(k, k, C, O), draw(B, S, S, O)
    y = gpu.convolve(x, w)
    dx, dw = (y * g).sum().gradient(x, w)
    want, padded = conv(num(x), num(w), k//2, k//2)
    errors[f"conv {B} {S} {k}"] = error(y, want)
    errors[f"dx {B} {S} {k}"] = error(dx, conv(num(g), num(w)[::-1, ::-1].transpose(0, 1, 3, 2), k//2, k//2)[0])
    errors[f"dw {B} {S} {k}"] = error(dw, np.stack([[np.einsum("bhwc,bhwo->co", padded[:, i:i+S, j:j+S], num(g))
                                                     for j in range(k)] for i in range(k)]))
  q, k, v, g = [draw(1, 16, 16) for _ in range(4)]
  out = gpu.attention(q, k, v)
  e = np.exp(num(q) @ num(k).transpose(0, 2, 1) / 4)
  p = e / e.sum(2, keepdims=True)
  dp = num(g) @ num(v).transpose(0, 2, 1)
  ds = p * (dp - (dp * p).sum(2, keepdims=True)) / 4
  grads = (out * g).sum().gradient(q, k, v)
  errors |= {"attention": error(out, p @ num(v)), "dq": error(grads[0], ds @ num(k)),
             "dk": error(grads[1], ds.transpose(0, 2, 1) @ num(q)),
             "dv": error(grads[2], p.transpose(0, 2, 1) @ num(g))}
  worst = max(errors, key=errors.get)
  print(len(chosen), sum(chosen), *map(parted.count, (1, 2)), errors[worst], worst)"""

@pytest.mark.parametrize("device,dtype", [
  ("PYTHON::sm_80", "bfloat16"), ("PYTHON::METAL", "bfloat16"), ("PYTHON::METAL", "float32"),
  ("PYTHON::gfx1100", "bfloat16"),
  *[pytest.param(d, "float16", marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="needs Python 3.12"))
    for d in ("PYTHON::sm_80", "PYTHON::METAL", "PYTHON::gfx1100")]])
def test_tensor_cores_of_three_vendors(device, dtype):
  """Convolution, its two gradients and the products of attention against float64, within the type's rounding."""
  # 8 output channels are half a tile on NVIDIA's and AMD's: on AMD's it is not filled up
  channels = "16" if "gfx" in device else "8"
  r = subprocess.run([sys.executable, "-c", EMULATED, dtype, channels], cwd=ROOT, capture_output=True, text=True,
                     env=os.environ | {"DEV": device, "PLAIN": "0"})
  assert r.returncode == 0, r.stderr[-2000:]
  kernels, on_cores, one, two, error, worst = r.stdout.split(maxsplit=5)
  assert int(kernels) == int(on_cores) >= 15 and int(one) > 0 < int(two)
  assert float(error) < {"bfloat16": 1.5e-2, "float16": 2e-3, "float32": 1e-6}[dtype], worst

LOADS = """if True:
  import re, sys, types
  from tinygrad.device import Compiler
  class Source(Compiler):  # NVIDIA's compiler is not here
    def __init__(self, *args, **options): super().__init__()
    def compile(self, src): return src.encode()
  names = "NVRTCCompiler", "NVCCCompiler", "NVPTXCompiler", "PTXCompiler"
  sys.modules["tinygrad.runtime.support.compiler_cuda"] = types.SimpleNamespace(**{n: Source for n in names})
  from tinygrad import Tensor, dtypes
  from engine.capture import captured
  from fast import gpu
  from tools.bench import kernels, source
  def step(x, w, g):
    y = gpu.convolve(x, w)
    return y, *(y * g).sum().gradient(x, w)
  shapes, graph = ((128, 16, 16, 256), (3, 3, 256, 256), (128, 16, 16, 256)), captured(step)
  x, w, g = [Tensor.empty(*shape, dtype=dtypes.bfloat16).realize() for shape in shapes]
  graph(x, w, g)
  for program in kernels([graph]):
    if "= __WMMA" not in (code := source(program)): continue
    loop = max(code.split("for ("), key=lambda part: part.count("= __WMMA"))
    print(program.arg.name, loop.count("= (*"), loop.count("= __WMMA"))"""

def test_bfloat16_is_loaded_by_several_numbers_at_once():
  """Loads and instructions of the tensor cores in the innermost loop. A warp has 4 x 8 tiles, of which a thread has 8
  numbers of each of the 4 and 4 of each of the 8: one by one, 64 loads. Two are neighbours as terms of one sum (x, and
  the transposed weights), four as numbers of four tiles (the weights; and both factors of their gradient)."""
  r = subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT, capture_output=True, text=True,
                     env=os.environ | {"DEV": "NULL:CUDA:sm_90", "PLAIN": "0", "PARALLEL": "0", "CACHELEVEL": "0"})
  assert r.returncode == 0, r.stderr[-2000:]
  loads = {name: [int(n) for n in counts] for name, *counts in map(str.split, r.stdout.splitlines())}
  assert loads == {"conv3_16x16_256_256": [32//2 + 32//4, 32], "conv3_16x16_256_256_flipped": [32//2 + 32//2, 32],
                   "weight3_16x16_256_256": [32//4 + 32//4, 32]}

PADDED = """if True:
  import numpy as np
  from tinygrad import Tensor, dtypes
  from fast import gpu, kernels
  chosen, on_tensor_cores = [], kernels.on_tensor_cores
  def noted(kernel, device):
    made = on_tensor_cores(kernel, device)
    chosen.append(made is not None)
    return made
  kernels.on_tensor_cores = noted
  def draw(*shape): return Tensor(np.ones(shape, np.float32)).cast(dtypes.bfloat16).realize()
  for images, outputs in ((16, 16), (16, 8), (5, 16)): gpu.convolve(draw(images, 2, 2, 16), draw(1, 1, 16, outputs))
  print(*map(int, chosen))"""

@pytest.mark.parametrize("device,cores", [("PYTHON::sm_80", "1 1 1"), ("PYTHON::gfx1201", "1 0 0")])
def test_products_are_not_padded_on_amd(device, cores):
  """LLVM 19 makes wrong code of it: where 16 x 16 does not fit, no tensor core is taken. Elsewhere it is filled up."""
  r = subprocess.run([sys.executable, "-c", PADDED], cwd=ROOT, env=os.environ | {"DEV": device}, capture_output=True,
                     text=True)
  assert r.returncode == 0, r.stderr[-2000:]
  assert r.stdout.strip() == cores

@pytest.mark.parametrize("way,dtype", [(way, dtype) for way in ("cpu", "gpu") for dtype in ("float32", "bfloat16")])
def test_each_kernel_of_a_step_reads_all_its_buffers_and_ours_have_names_of_their_own(way, dtype, monkeypatch):
  """tinygrad's graphs pass all buffers by position, but leave out those that a kernel does not read."""
  if way == "gpu":
    for name in ("linear", "convolve", "group_norm", "attention"): monkeypatch.setattr(unet, name, getattr(gpu, name))
    monkeypatch.setattr(unet.GroupNorm, "silu", lambda g, x: gpu.group_norm(x, g.weight, g.bias, 4, silu=True))
    monkeypatch.setattr(unet.GroupNorm, "__call__", lambda g, x: gpu.group_norm(x, g.weight, g.bias, 4))
  model = unet.lower(random_model(num_classes=2, dropout=0.1, image_size=(8, 4)), unet.DTYPES[dtype])
  x, t, y, seed = [Tensor(a).realize() for a in (arr(2, 1, 8, 4), np.array([3, 800], np.int32),
                                                 np.array([2, 0], np.int32), np.array([1, 2], np.uint32))]
  params = nn.state.get_parameters(model)
  train = captured(lambda x, t, y, seed: model(x, t, y, seed).square().mean().gradient(*params))
  sample = captured(lambda x, t: model(x, t) * 2)
  train(x, t, y, seed)
  sample(x, t)
  sources:dict[str, set[str]] = {}
  for call in kernels(train) + kernels(sample):
    info, number = call.src[0].arg, len(get_call_arg_uops(call))
    assert tuple(info.globals) == tuple(range(number)), info.name
    sources.setdefault(info.function_name, set()).add(call.src[0].src[2].arg)
  ours = {k: len(v) for k, v in sources.items() if not k.startswith(("E_", "r_"))}
  assert len(ours) > 30 and set(ours.values()) == {1}, ours

NORM = """if True:
  import numpy as np
  from tinygrad import Tensor
  from fast import gpu
  r = np.random.default_rng(0)
  size = (2, 3, 4, 8)  # 12 pixels of 8 channels: as many threads share a sum
  x, w, b, g, d = [r.standard_normal(s) for s in (size, (8,), (8,), size, size)]
  def by_hand(x, w, b):
    v = x.reshape(2, 12, 4, 2)
    v = (v - v.mean((1, 3), keepdims=True)) / np.sqrt(v.var((1, 3), keepdims=True) + 1e-6)
    return (z := v.reshape(x.shape) * w + b) / (1 + np.exp(-z))
  ours = [Tensor(a.astype(np.float32)).realize() for a in (x, w, b)]
  y = gpu.group_norm(*ours, 4, silu=True)
  print(np.abs(y.numpy() - by_hand(x, w, b)).max())
  for i, grad in enumerate((y * Tensor(g.astype(np.float32))).sum().gradient(*ours)):
    step, grad = d if i == 0 else d[0, 0, 0], grad.numpy()
    ends = [by_hand(*(a + s*1e-5*step if j == i else a for j, a in enumerate((x, w, b)))) for s in (1, -1)]
    print(abs((grad * step).sum() - (g * (ends[0] - ends[1])).sum() / 2e-5) / np.abs(grad * step).sum())"""

@pytest.mark.parametrize("device", ("PYTHON::sm_80", "PYTHON::METAL"))
def test_group_norm_whose_sums_are_shared_by_the_threads_of_a_block(device):
  """Values and gradients, against float64, by differences."""
  r = subprocess.run([sys.executable, "-c", NORM], cwd=ROOT, env=os.environ | {"DEV": device, "PLAIN": "0"},
                     capture_output=True, text=True)
  assert r.returncode == 0, r.stderr[-2000:]
  assert max(map(float, r.stdout.split())) < 5e-6, r.stdout

LOWERED = """if True:
  import sys
  sys.path.insert(0, "tests")
  import numpy as np, unet
  from common import arr, random_model
  from engine.capture import captured
  from tinygrad import Tensor, dtypes, nn
  x, eps = Tensor(arr(2, 1, 4, 4).clip(-1, 1)).realize(), Tensor(arr(2, 1, 4, 4, seed=1)).realize()
  t = Tensor(np.array([20, 700], np.int32)).realize()
  def step(dtype):
    scale = x.numel() if dtype == dtypes.float16 else 1  # loss scaling
    model = unet.lower(random_model(channel_mult=(1,), image_size=4), dtype)
    def loss_and_gradient(x, t, eps):
      loss = (eps - model(x, t)).square().mean()
      grads = (loss * scale).gradient(*nn.state.get_parameters(model))
      return [loss, *grads]
    loss, *grads = captured(loss_and_gradient)(x, t, eps)
    return loss.item(), np.concatenate([g.float().numpy().ravel() for g in grads]) / scale
  loss, grad = step(dtypes.float32)
  for low_loss, low in (step(dtypes.bfloat16), step(dtypes.float16)):
    print(abs(low_loss - loss) / loss, np.linalg.norm(low - grad) / np.linalg.norm(grad))"""

def test_loss_and_gradients_in_lower_precision():
  """Of a small network, against float32: they differ by the type's rounding, which some twenty layers have added up."""
  r = subprocess.run([sys.executable, "-c", LOWERED], cwd=ROOT, env=os.environ | {"PLAIN": "0"},
                     capture_output=True, text=True)
  assert r.returncode == 0, r.stderr[-2000:]
  for limit, line in zip((0.05, 0.008), r.stdout.splitlines(), strict=True):
    loss, grad = map(float, line.split())
    assert loss < limit and 1e-5 < grad < limit

@pytest.mark.parametrize("batch,size,k,stride", [(22, 4, 3, 1), (50, 1, 1, 1), (6, 8, 3, 2), (100, 2, 1, 1)])
def test_gradients_of_any_batch(batch, size, k, stride):
  """No image is left out, however a batch is cut into groups."""
  x, w, g = arr(batch, size, size, 8), arr(k, k, 8, 16, seed=1), arr(batch, size//stride, size//stride, 16, seed=2)
  lo, hi = (k//2, k//2) if stride == 1 else (0, 1)
  padded, H = np.pad(x.astype(np.float64), ((0, 0), (lo, hi), (lo, hi), (0, 0))), size//stride
  want = np.stack([[np.einsum("bhwc,bhwo->co", padded[:, i:i+stride*H:stride, j:j+stride*H:stride], g)
                    for j in range(k)] for i in range(k)])
  for convolve in (gpu.convolve, cpu.convolve):
    images, weight, after = [Tensor(a).realize() for a in (x, w, g)]
    with scope():
      dw, = (convolve(images, weight, stride=stride) * after).sum().gradient(weight)
      close(dw.numpy(), want, atol=1e-4 * np.abs(want).max())

@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="names CPU devices")
def test_tensors_on_several_devices_are_computed_as_tinygrad_does():
  x, w, devices = arr(2, 4, 4, 8), arr(3, 3, 8, 8, seed=1), ("CPU:0", "CPU:1")
  with scope():
    y = unet.convolve(Tensor(x).shard(devices, 0).realize(), Tensor(w).shard(devices).realize())
    close(y.numpy(), unet.convolve(Tensor(x).realize(), Tensor(w).realize()).numpy(), atol=1e-4)
