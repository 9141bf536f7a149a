"""GPUs without one: kernels for tensor cores on tinygrad's emulators of three vendors; a step compiled for a card."""
import importlib.util, json, os, subprocess, sys
import numpy as np
import pytest
from common import ROOT, arr, close
from fast import cpu, gpu, setup
from tinygrad import Device, Tensor

setup()

EMULATED = """if True:
  import sys
  import numpy as np
  from tinygrad import Tensor, dtypes
  from tinygrad.uop.ops import Ops
  from fast import gpu, kernels
  dtype, rng, chosen = getattr(dtypes, sys.argv[1]), np.random.default_rng(0), []
  on_tensor_cores = kernels.on_tensor_cores
  def noted(kernel, device):
    made = on_tensor_cores(kernel, device)
    chosen.append(made is not None and made.arg.opts_to_apply[0].op.name == "TC")
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
  for B, S, C, O, k in ((16, 2, 16, 8, 3), (1, 16, 16, 8, 3), (16, 2, 16, 16, 1)):  # M: images, a row of pixels, both
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
  print(len(chosen), sum(chosen), max(errors.values()), max((v, k) for k, v in errors.items())[1])"""

@pytest.mark.parametrize("device,dtype", [
  ("PYTHON::sm_80", "bfloat16"), ("PYTHON::METAL", "bfloat16"), ("PYTHON::METAL", "float32"),
  ("PYTHON::gfx1100", "bfloat16"),
  *[pytest.param(d, "float16", marks=pytest.mark.skipif(sys.version_info < (3, 12), reason="needs Python 3.12"))
    for d in ("PYTHON::sm_80", "PYTHON::METAL", "PYTHON::gfx1100")]])
def test_tensor_cores_of_three_vendors(device, dtype):
  """Convolution, its two gradients and the products of attention against float64, within the type's rounding."""
  r = subprocess.run([sys.executable, "-c", EMULATED, dtype], cwd=ROOT, env=os.environ | {"DEV": device, "PLAIN": "0"},
                     capture_output=True, text=True)
  assert r.returncode == 0, r.stderr[-2000:]
  kernels, on_cores, error, worst = r.stdout.split(maxsplit=3)
  assert int(kernels) == int(on_cores) >= 15
  assert float(error) < {"bfloat16": 1.5e-2, "float16": 2e-3, "float32": 1e-6}[dtype], worst

NORM = """if True:
  import numpy as np
  from tinygrad import Tensor
  from fast import gpu
  r = np.random.default_rng(0)
  x, w, b, g, d = [r.standard_normal(s) for s in ((2, 4, 4, 8), (8,), (8,), (2, 4, 4, 8), (2, 4, 4, 8))]
  def by_hand(x, w, b):
    v = x.reshape(2, 16, 4, 2)
    v = (v - v.mean((1, 3), keepdims=True)) / np.sqrt(v.var((1, 3), keepdims=True) + 1e-6)
    return (z := v.reshape(x.shape) * w + b) / (1 + np.exp(-z))
  ours = [Tensor(a.astype(np.float32)).realize() for a in (x, w, b)]
  y = gpu.group_norm(*ours, 4)
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
  from ddpm import DDPM
  from tinygrad import Tensor, dtypes, nn
  d, x0, eps = DDPM(), Tensor(arr(2, 1, 4, 4).clip(-1, 1)), Tensor(arr(2, 1, 4, 4, seed=1))
  t = Tensor(np.array([20, 700], np.int32))
  def step(dtype):
    scale = x0.numel() if dtype == dtypes.float16 else 1  # loss scaling
    model = unet.lower(random_model(channel_mult=(1,), image_size=4), dtype)
    loss = d.loss_simple(model, x0, t, eps)
    grads = (loss * scale).gradient(*nn.state.get_parameters(model))
    return loss.item(), np.concatenate([g.float().numpy().ravel() for g in grads]) / scale
  (loss, grad), (low_loss, low) = step(dtypes.float32), step(getattr(dtypes, sys.argv[1]))
  print(abs(low_loss - loss) / loss, np.linalg.norm(low - grad) / np.linalg.norm(grad))"""

@pytest.mark.parametrize("dtype", ("bfloat16", "float16"))
def test_loss_and_gradients_in_lower_precision(dtype):
  """Of a small network, against float32: they differ by the type's rounding, which some twenty layers have added up."""
  r = subprocess.run([sys.executable, "-c", LOWERED, dtype], cwd=ROOT, env=os.environ | {"PLAIN": "0"},
                     capture_output=True, text=True)
  assert r.returncode == 0, r.stderr[-2000:]
  loss, grad = map(float, r.stdout.split())
  limit = {"bfloat16": 0.05, "float16": 0.008}[dtype]
  assert loss < limit and 1e-5 < grad < limit

@pytest.mark.skipif(not importlib.util.find_spec("nvidia"), reason="needs the wheels of requirements-gpu.txt")
def test_a_step_is_compiled_for_a_card_that_is_not_here(tmp_path):
  """bench.py --target: what it prints of the glyphs preset, against what can be known beforehand."""
  flags = "--preset glyphs --batch 16 --dtype bfloat16 --target CUDA:sm_90 --gpus 2 --json".split()
  r = subprocess.run([sys.executable, "bench.py", *flags], cwd=ROOT, capture_output=True, text=True,
                     env=os.environ | {"CACHEDB": str(tmp_path/"cache.db")})
  assert r.returncode == 0, r.stderr[-2000:]
  out = json.loads(r.stdout.splitlines()[-1])
  assert out["tensor_core_share"] > 0.9 and out["spill_bytes"] == 0 and 16 < out["registers_max"] <= 255
  # one sum over the two devices is a copy each way; the others are tables and constants, none for each parameter
  assert 2 <= out["copies"] <= 7
  assert out["distinct_kernels"] < out["kernels"] and out["flop_per_byte_loaded"] > 4
  assert out["roofline_s"] >= max(out["gflop"] / 989e3, out["gigabytes_moved"] / 3350)  # the data sheet's rates

@pytest.mark.parametrize("target", ("CUDA:sm_1", "TPU", "METAL:M1"))
def test_targets_that_cannot_be_compiled_for(target):
  r = subprocess.run([sys.executable, "bench.py", "--target", target], cwd=ROOT, capture_output=True, text=True)
  assert r.returncode == 1 and "--target" in r.stderr.splitlines()[-1] and "Traceback" not in r.stderr

@pytest.mark.skipif(Device.DEFAULT != "CPU", reason="names CPU devices")
@pytest.mark.parametrize("batch,size,k,stride", [(22, 4, 3, 1), (50, 1, 1, 1), (6, 8, 3, 2), (100, 2, 1, 1)])
def test_gradients_of_any_batch_on_one_device_and_on_two(batch, size, k, stride):
  """The operations for GPUs, here on CPU devices: no image is left out, however a batch is cut into groups."""
  x, w, g = arr(batch, size, size, 8), arr(k, k, 8, 16, seed=1), arr(batch, size//stride, size//stride, 16, seed=2)
  lo, hi = (k//2, k//2) if stride == 1 else (0, 1)
  padded, H = np.pad(x.astype(np.float64), ((0, 0), (lo, hi), (lo, hi), (0, 0))), size//stride
  want = np.stack([[np.einsum("bhwc,bhwo->co", padded[:, i:i+stride*H:stride, j:j+stride*H:stride], g)
                    for j in range(k)] for i in range(k)])
  for devices in (("CPU",), ("CPU:0", "CPU:1")):
    def lay(a, axis): return (Tensor(a).shard(devices, axis) if len(devices) > 1 else Tensor(a)).realize()
    for convolve in (gpu.convolve, cpu.convolve):
      weight = lay(w, None)
      dw, = (convolve(lay(x, 0), weight, stride=stride) * lay(g, 0)).sum().gradient(weight)
      close(dw.to(devices[0]).numpy(), want, atol=1e-4 * np.abs(want).max())
