"""make gpu-report: every part is in the file, whatever happens to it; PyTorch's network is ours."""
import fcntl, json, os, re, subprocess, sys, time
import numpy as np
import pytest
from common import ROOT, arr, close, random_model
from tinygrad import Tensor, nn
from tools import report

def run(*flags, **env):
  return subprocess.run([sys.executable, "-m", "tools.report", *map(str, flags)], cwd=ROOT, env=os.environ | env,
                        capture_output=True, text=True)

@pytest.mark.slow
def test_all_parts_at_small_sizes(tmp_path):
  """A cold cache takes minutes, which the report would not wait for by itself."""
  r = run("--small", "--minutes", 120, "--out", tmp_path/"report.md")
  assert r.returncode == 0, r.stderr[-2000:]
  text = (tmp_path/"report.md").read_text()
  titles = [line for line in text.split("\n") if line.startswith("## ")]
  assert len(titles) == len(report.PARTS) == r.stderr.count(" s\n") and "failed" not in text, text
  for title, (name, *_) in zip(titles, report.PARTS): assert name in title
  parts = dict(zip((name for name, *_ in report.PARTS), text.split("\n## ")[1:]))
  assert "2 passed" in parts["Tests"] and parts["Speed"].count("| glyphs | 4 |") == 1 and "| 5 | " in parts["Training"]
  lines = parts["The ten slowest kernels"].split("each by itself: ")[1].split("\n")
  assert len([line for line in lines if "%" in line]) == 10  # each has its share

def part(code):
  """A part that runs a program and says what it printed."""
  return lambda r: f"It said {report.call(r, sys.executable, '-c', code)}"

def test_a_part_that_fails_or_hangs_loses_nothing_else(tmp_path, monkeypatch, capsys):
  """Nor does one outlive its time, with all that it has started."""
  out, held = tmp_path/"report.md", tmp_path/"held"
  hang = f"""if True:
    import fcntl, subprocess
    f = open({str(held)!r}, "w")
    fcntl.flock(f, fcntl.LOCK_EX)
    print("so far", flush=True)
    subprocess.run(["sleep", "600"], pass_fds=[f.fileno()])"""
  monkeypatch.setattr(report, "PARTS", [
    ("First", 480, part("print('quick')")),
    ("Second", 480, lambda r: f"in the file: {'quick' in out.read_text()}"),
    ("Broken", 480, part("import sys; sys.exit('what is wrong')")),
    ("Wrong", 480, lambda r: {}["none"]),
    ("Slow", 5, part(hang)),
    ("Late", 0.1, part("print('never')")),
    ("Last", 480, part("print('end')"))])
  report.main(["--out", str(out)])
  first, second, broken, wrong, slow, late, last = out.read_text().split("\n## ")[1:]
  assert "It said quick" in first and "in the file: True" in second and "It said end" in last
  assert "1 failed" in broken and "status 1" in broken and "what is wrong" in broken
  assert "KeyError" in wrong and "cut off after 5 s" in slow and "so far" in slow and "No time was left" in late
  assert capsys.readouterr().err.count(", 1 failed") == 4
  with open(held) as f:
    for left in reversed(range(100)):
      try: fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)  # as soon as all who hold it are dead
      except BlockingIOError: assert left
      else: break
      time.sleep(0.1)

def test_no_part_outlives_the_whole(tmp_path, monkeypatch):
  monkeypatch.setattr(report, "PARTS", [(name, 480, part("import time; time.sleep(600)")) for name in "ab"])
  report.main(["--out", str(tmp_path/"report.md"), "--minutes", "0.06"])
  first, second = (tmp_path/"report.md").read_text().split("\n## ")[1:]
  assert re.search(r"cut off after \d s", first) and "No time was left" in second

@pytest.mark.parametrize("device,types", [("CUDA", 4), ("METAL", 3)])
def test_what_a_card_is_asked(device, types, tmp_path, monkeypatch):
  """Two networks in each type, without and with BEAM, the paper's in bfloat16 first; then by PyTorch."""
  asked = []
  def call(r, *command, share=1., **env):
    asked.append(" ".join([*command[1:], *(f"{k}={v}" for k, v in env.items())]))
    if "report.about" in command[-1]: return json.dumps({"device": device, "processor": False})
    if "report.draw" in command[-1]: return json.dumps({"seconds": [20, 2.0, 11.98]})
    if "find_spec('torch')" in command[-1]: return "True"
    if "--json" not in command and "tools.torch_peer" not in command: return None
    flags = dict(zip(command, command[1:]))
    same = ("kernels", "distinct_kernels", "sample_kernels", "first_step_s", "train_gflops", "sample_images_per_s",
            "sample_gflops", "sample_first_step_s", "peak_memory_bytes", "parameters")
    return json.dumps(dict.fromkeys(same, 256) | {
      "preset": flags.get("--preset"), "batch": int(flags["--batch"]), "dtype": flags["--dtype"], "device": "card",
      "unet": {}, "train_images_per_s": 256 if "tools.bench" in command else 512, "compiled": "--compile" in command,
      "adam": "fused", "layout": "channels_last", "sample_layout": "contiguous"})
  monkeypatch.setattr(report, "call", call)
  monkeypatch.setenv("DEV", device)
  report.main(["--out", str(tmp_path/"report.md")])
  text, bench = (tmp_path/"report.md").read_text(), [c for c in asked if "tools.bench" in c and "--json" in c]
  assert bench[0].startswith("-m tools.bench --preset cifar10 --batch 128 --dtype bfloat16 --json BEAM=0")
  assert len(bench) == 4*types and ("--tf32" in " ".join(bench)) == (types == 4)
  assert sum("BEAM=2" in c for c in bench) == sum("--preset mnist --batch 32" in c for c in bench) == 2*types
  assert "--steps 200 --dtype bfloat16" in " ".join(asked)
  assert text.count("| 1000.0 |") == 4*types  # seconds for 256,000 images at 256 a second
  assert "| 20.0 | 12.0 | 10.00 |" in text    # 998 steps take 9.98 s
  if device == "METAL":  # where the network in PyTorch would be on the processor
    assert not any("torch_peer" in c for c in asked)
    return
  assert sum("torch_peer" in c for c in asked) == 6
  peer = "| card | channels_last, contiguous | fused | 256.0 | 0 | 512.0 | 0.50 | 256.0 | 1.00 |"
  assert f"| cifar10 | 128 | bfloat16 | yes {peer}" in text and f"| mnist | 32 | float32 | no {peer}" in text

@pytest.mark.parametrize("flags,words", [(["--out", "/"], "cannot write /"), (["--minutes", "0"], "--minutes"),
                                         (["--big"], "--big")])
def test_one_sentence(flags, words):
  r = run(*flags)
  assert r.returncode == 1 and words in r.stderr and r.stderr.count("\n") == 1 and "Traceback" not in r.stderr

@pytest.mark.parametrize("attention,layout", [(4, "contiguous"), (8, "channels_last")])
def test_pytorchs_network_is_ours(attention, layout):
  torch = pytest.importorskip("torch")
  from tools import torch_peer
  ours = random_model(attn_resolutions=(attention,), channel_mult=(1, 2, 2))
  theirs, state = torch_peer.UNet(**ours.config), {}
  for name, p in nn.state.get_state_dict(ours).items():
    v = p.numpy()
    state[name] = torch.from_numpy(np.ascontiguousarray(v.transpose(3, 2, 0, 1) if v.ndim == 4 else v.T))
  theirs.load_state_dict(state)
  x, t = arr(2, 1, 8, 8), np.array([1, 1000], np.int32)
  out = theirs(torch.from_numpy(x), torch.from_numpy(t))
  close(ours(Tensor(x), Tensor(t)).numpy(), out.detach().numpy(), atol=1e-4)
  training, sampling = torch_peer.steps(theirs, x.shape, "cpu", "bfloat16", layout, False)
  last = layout == "channels_last"
  assert theirs.down[0][0].conv1.weight.is_contiguous(memory_format=torch_peer.LAYOUTS[layout])
  assert theirs.down[0][0].conv1.weight.is_contiguous() != last
  before = state["conv_in.weight"].clone()
  training()
  assert not torch.equal(theirs.conv_in.weight, before) and np.isfinite(sampling().numpy()).all()

def test_the_better_of_two_layouts_counts():
  """Of each step by itself; and on a processor Adam is the one that goes through all tensors at once."""
  pytest.importorskip("torch")
  network = dict(in_channels=1, channels=8, channel_mult=[1], num_res_blocks=1, attn_resolutions=[], image_size=8,
                 norm_groups=4)
  size = sum(p.numel() for p in nn.state.get_parameters(random_model(**network)))
  flags = ["--batch", "2", "--repeats", "1", "--parameters", str(size), "--network", json.dumps(network)]
  r = subprocess.run([sys.executable, "-m", "tools.torch_peer", *flags], cwd=ROOT, capture_output=True, text=True)
  assert r.returncode == 0, r.stderr[-2000:]
  said = json.loads(r.stdout)
  assert said["adam"] == ("foreach" if said["device"] == "cpu" else "fused")
  for kind, layout in (("step_s", "layout"), ("sample_step_s", "sample_layout")):
    each = said[f"{kind}_by_layout"]
    assert set(each) == {"contiguous", "channels_last"}
    assert said[kind] == min(each.values()) == each[said[layout]]
  assert said["train_images_per_s"] == 2/said["step_s"]

def test_the_peer_refuses_a_network_that_it_does_not_know():
  pytest.importorskip("torch")
  from tools import torch_peer
  for other in (dict(num_classes=10), dict(head_channels=8), dict(down_pad=1)):
    with pytest.raises(ValueError): torch_peer.UNet(**other)
