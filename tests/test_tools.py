"""bench and target: what they count of a step, here and for a card that is not here, against what is known before."""
import importlib.util, json, os, re, subprocess, sys
import numpy as np
import pytest
import train, unet
from common import ROOT, TINY, arr, close, random_model
from engine.capture import captured
from engine.state import State
from tinygrad import Device, GlobalCounters, Tensor, helpers
from tools import bench, target

def test_the_products_of_a_network_by_hand():
  """One level of 8x4 pixels and 4 channels: 32 pixels, blocks of two 3x3 convolutions and a layer of the time."""
  model = unet.UNet(1, 4, (1,), 1, (), 0., (8, 4), 2)
  blocks = 3*(9*4*4 + 9*4*4) + 2*(9*8*4 + 9*4*4 + 8*4)  # on the way down and in the middle; of 8 channels on the way up
  pixels = 32 * (9*4 + blocks + 4*4*4 + 9*4)            # conv_in, attention's four, conv_out
  assert bench.forward_flops(model, (3, 1, 8, 4)) == 3*2*(pixels + 2*32*32*4 + 4*16 + 16*16 + 5*16*4)

SMALL = TINY | dict(channel_mult=(1,), attn_resolutions=())
CONFIG = dict(channels=8, channel_mult=(1,), num_res_blocks=1, attn=(), dropout=0.0, norm_groups=4, warmup=0, lr=1e-3)

def test_all_kernels_of_a_step_are_counted():
  """Those of both graphs of a training step, inside of batches too: as many as tinygrad runs one by one."""
  state, c = State(random_model(**SMALL)), train.Config(batch=2, **CONFIG)
  before = state.flat["raw"].numpy()
  in_batches = len(bench.calls(bench.training_step(state, c, (2, 1, 8, 8))()))
  # the program's own step: the first one of Adam moves each weight by the learning rate
  moved = np.abs(state.flat["raw"].numpy() - before)[np.abs(state.flat["grad"].numpy()) > 1e-4]
  assert moved.size > 1000
  close(moved, 1e-3, rtol=1e-2)
  with helpers.Context(JIT=2):
    once = bench.training_step(state, c, (2, 1, 8, 8))
    once()
    GlobalCounters.reset()
    assert in_batches == len(bench.calls(once())) == GlobalCounters.kernel_count > 100

def test_each_kernel_by_itself():
  x, w = [Tensor(a).realize() for a in (arr(8, 16, 16, 32), arr(3, 3, 32, 32, seed=1))]
  graph = captured(lambda x: unet.convolve(x, w).realize())
  graph(x)
  first, _, *lines = bench.slowest([graph], 9).splitlines()
  assert first.startswith(f"a training step's {len(bench.kernels([graph]))} kernels")
  most = max(lines, key=lambda line: float(line.split()[-1].rstrip("%"))).split()
  # y has 8 · 16 · 16 · 32 numbers, each a sum of 288 products
  gflop = float(most[2]) * float(most[4]) / 1e3
  assert gflop == pytest.approx(2*288*8*16*16*32 / 1e9, rel=0.05)
  shares = [float(re.findall(r"([\d.]+)%", line)[0]) for line in lines]
  assert sum(shares) == pytest.approx(100, abs=1) and shares == sorted(shares, reverse=True)
  if Device.DEFAULT == "CPU":
    peak = float(re.search(r"numpy: (\d+) GFLOP/s", first)[1])
    assert peak > 0 and float(most[6].rstrip("%")) == pytest.approx(100*float(most[4])/peak, rel=0.05)

FIELDS = """preset batch dtype device setup_s first_step_s step_s step_fastest_s step_slowest_s train_images_per_s
train_gflops executed_over_needed kernels distinct_kernels sample_first_step_s sample_step_s sample_images_per_s
sample_gflops sample_kernels peak_memory_bytes parameters unet"""

def test_what_bench_prints(capsys, monkeypatch):
  monkeypatch.setitem(bench.NETWORKS, "glyphs", (CONFIG, (1, 8, 8)))
  bench.main(["--preset", "glyphs", "--batch", "2", "--repeats", "3", "--kernels", "2", "--json"])
  *table, last = capsys.readouterr().out.splitlines()
  said = json.loads(last)
  assert list(said) == FIELDS.split() and len(table) == 9
  assert said["parameters"] == State(unet.UNet(**SMALL)).size and said["unet"]["num_classes"] == 0
  assert said["step_fastest_s"] <= said["step_s"] <= said["step_slowest_s"]
  assert said["train_images_per_s"] == 2/said["step_s"] and 1 <= said["executed_over_needed"] < 2
  assert said["distinct_kernels"] < said["kernels"] > said["sample_kernels"]

def call(name, *flags, **env):
  return subprocess.run([sys.executable, "-m", name, *flags], cwd=ROOT, capture_output=True, text=True,
                        env={k: v for k, v in os.environ.items() if k != "DEV"} | env)

@pytest.mark.skipif(not importlib.util.find_spec("nvidia"), reason="needs the wheels of requirements-gpu.txt")
def test_a_step_is_compiled_for_a_card_that_is_not_here(tmp_path):
  """What target prints of the glyphs preset, against what can be known beforehand."""
  flags = "--preset glyphs --batch 16 --dtype bfloat16 --device CUDA:sm_90 --json".split()
  r = call("tools.target", *flags, CACHEDB=str(tmp_path/"cache.db"))
  assert r.returncode == 0, r.stderr[-2000:]
  out = json.loads(r.stdout.splitlines()[-1])
  assert (out["target"], out["dtype"], out["batch"]) == ("CUDA:sm_90", "bfloat16", 16)
  for step in (out, out["sampling"]):
    assert step["tensor_core_share"] > 0.9 and step["spill_bytes"] == step["copies"] == 0
    assert 16 < step["registers_max"] <= 255
    assert step["distinct_kernels"] < step["kernels"] and step["flop_per_byte_loaded"] > 4
    # the data sheet's rates; at most twelve loads, of two bytes each, are a thread's share of a product's numbers
    assert step["pipes_s"] >= step["roofline_s"] >= max(step["gflop"] / 989e3, step["gigabytes_moved"] / 3350)
    assert step["pipes_s"] == pytest.approx(sum(step["pipes"].values()))
    assert 1/2 < step["loads_per_tensor_instruction"] <= 12
  # the network's products, counted from their shapes, are nearly all of the work
  model = unet.UNet(**bench.chosen(bench.flags("", "").parse_args(flags[:6]))[1])
  needed = bench.forward_flops(model, (16, 1, 16, 16)) / 1e9
  assert 1 < out["sampling"]["gflop"] / needed < 1.1 and 1 < out["gflop"] / (3*needed) < 1.25

CODE = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E R3, desc[UR4][R2.64] ;
.L_x_1:
        /*0020*/                   LDG.E.U16 R3, desc[UR4][R2.64] ;
        /*0030*/              @!P1 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0040*/                   PRMT R3, R3, 0x5410, R4 ;
        /*0050*/                   IMAD.WIDE R2, R5, 0x2, R2 ;
        /*0060*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0070*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0080*/               @P0 BRA `(.L_x_1) ;
        /*0090*/              @!P0 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
.L_x_2:
        /*00b0*/                   BRA `(.L_x_2);
"""

def test_the_pipes_of_an_inner_loop():
  """Of two loops, one in the other, by hand: seven instructions, loads of 2 and of 16 bytes a thread."""
  loop = target.innermost(CODE)
  assert [i.split(".")[0] for i in loop] == ["LDG", "LDG", "PRMT", "IMAD", "HMMA", "HMMA", "BRA"]
  busy = target.clocks(loop, target.CARDS["sm_90"], target.CARDS["sm_90"].tensor_16)
  assert busy.pop("tensor") == pytest.approx(2, rel=1e-3)  # 4096 operations a clock: 16 x 8 x 16 products and sums
  assert busy == {"load": 1 + 4, "integer": 1/2, "multiply": 1/2, "issue": 7/4}
  assert target.tensor_flop("HMMA.1688.F32.TF32") == 2*16*8*8 and target.tensor_flop("FFMA") == 0
  straight = CODE[:CODE.index(".L_x_0")] + CODE[CODE.index("        /*0060"):CODE.index("        /*0080")]
  assert len(target.innermost(straight)) == 3 and target.innermost("") == []

@pytest.mark.parametrize("device", ("CUDA:sm_1", "TPU", "METAL:M1"))
def test_targets_that_cannot_be_compiled_for(device):
  r = call("tools.target", "--device", device)
  assert r.returncode == 1 and "--device" in r.stderr and r.stderr.count("\n") == 1

def test_a_missing_compiler_is_said(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(RuntimeError, match="requirements-gpu.txt"): target.open_target("CUDA:sm_90", False)

@pytest.mark.parametrize("name,flags,words", [
  ("tools.bench", ["--batch", "0"], "--batch"), ("tools.bench", ["--preset", "big"], "--preset"),
  ("tools.bench", ["--target", "CUDA:sm_90"], "--target"), ("tools.target", [], "--device")])
def test_one_sentence(name, flags, words):
  r = call(name, *flags)
  assert r.returncode == 1 and words in r.stderr and r.stderr.count("\n") == 1
